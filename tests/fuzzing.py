"""Hostile files by the thousand, each read in a child process of its own, under limits.

    python tests/fuzzing.py                    200 cases and a table; exit 1 if any is a fault
    python tests/fuzzing.py 10000              so many
    python tests/fuzzing.py picture 17         one of them; its files stay in ./fuzz-picture-17

A reader may succeed, or refuse with an error of zipvl.errors: one line, which names the file or what
was asked of it. Anything else is a fault: another exception, a signal, a hang, gigabytes, a program
started, a word on stdout. The parent has imported everything and forks a child for each case, so
that a case costs milliseconds, and whatever it does ends with it. fuzz_checkpoints.py and
fuzz_media.py make the files, from SEED, kind and number alone (videos: and the ffmpeg there is).
"""

import ctypes
import gc
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import fuzz_checkpoints as checkpoints
import fuzz_media as media
from fuzz_damage import Files, Random

from zipvl.errors import ZipvlError

SEED, JOBS = 0, 2
BUDGET = 1200.0  # seconds of CPU for all cases: ten minutes of two cores
MANY = 1000  # cases; fewer are for a suite in a hurry
LONGEST = 3000  # characters of a message: thirty names fit, a file poured out does not
REPORT = 4000  # bytes of a child's report, few enough for a pipe to take them at once
REACHING = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")
PR_SET_PDEATHSIG = 1
ASKED = (
    "the model",
    "the prompt",
    "the vision features",
    "the attention scores",
    "this model",
)  # known to who asked, and named for that

Name = tuple[str, int | str]  # kind and number, or "bases" and a file
Call = Callable[[Path], object]  # reads the files of a folder, which it may lay there first


@dataclass(frozen=True)
class Limits:
    """Of one child."""

    cpu: int = 10  # seconds, of CPU: clocks run faster on a busy machine
    wall: float = 120.0  # seconds, for one that sleeps
    memory: int = 2**30  # bytes resident, beyond the parent's own


@dataclass(frozen=True)
class Verdict:
    outcome: str  # ok | refused | fault
    text: str  # the refusal, or what went wrong
    cpu: float  # seconds
    memory: int  # bytes resident, beyond the parent's own
    noise: str  # what came on stderr


@dataclass(frozen=True)
class Child:
    """A child at work. It reports through `pipe`; `folder` has its case, stdout and stderr."""

    name: Name
    pid: int
    pipe: int
    folder: Path
    base: int  # bytes of memory of the parent's own
    began: float = field(default_factory=time.monotonic)


def run(
    cases: Iterable[tuple[Name, Call]], jobs: int, limits: Limits
) -> Iterator[tuple[Name, Verdict]]:
    """Each case's name and verdict as it ends, `jobs` at a time."""
    cases, alive = iter(cases), {}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        try:
            while True:
                for name, call in islice(cases, jobs - len(alive)):
                    child = start(name, call, Path(folder), limits)
                    alive[child.pipe] = child
                if not alive:
                    return
                ready, _, _ = select.select(list(alive), [], [], 0.2)
                for pipe, child in list(alive.items()):
                    if pipe in ready or time.monotonic() - child.began > limits.wall:
                        yield child.name, finish(alive.pop(pipe), limits, pipe in ready)
        finally:
            for child in alive.values():
                finish(child, limits, False)


def start(name: Name, call: Call, folder: Path, limits: Limits) -> Child:
    folder = Path(tempfile.mkdtemp(dir=folder))
    (folder / "case").mkdir()
    _, resident, shared, *_ = pages()
    pipe, end = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(pipe)
            os.write(end, live(call, folder, limits).encode(errors="replace")[:REPORT])
        finally:
            os._exit(0)
    os.close(end)
    return Child(name, pid, pipe, folder, (resident - shared) * resource.getpagesize())


def pages() -> list[int]:
    """Pages of this process: mapped, resident, resident but of files, ..."""
    return [int(word) for word in Path("/proc/self/statm").read_text().split()]


def live(call: Call, folder: Path, limits: Limits) -> str:
    """A child's whole life; its outcome, and a text after the first newline."""
    os.setpgid(0, 0)  # what it starts ends with it,
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # and it with its parent
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    # Address space is not memory, as threads reserve much: finish() counts what is resident.
    room = pages()[0] * resource.getpagesize() + 3 * limits.memory
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu, limits.cpu + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    reached: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in REACHING and arguments[0] != sys.executable:
            reached.append(f"reached {event} {arguments}")
            raise PermissionError("a file starts no program and reaches no address")

    sys.addaudithook(watch)
    try:
        call(folder / "case")
        outcome = "ok\n"
    except ZipvlError as e:
        outcome = judge(e, str(folder))
    except BaseException as e:  # panics of Rust libraries are no Exception
        traceback.print_exc()
        here = [f for f in traceback.extract_tb(e.__traceback__) if "/zipvl/" in f.filename]
        where = (
            f"{here[-1].filename}:{here[-1].lineno} {here[-1].name}" if here else "no line of ours"
        )
        outcome = f"fault\nraised {type(e).__name__}: {e!s:.200} ({where})"
    sys.stdout.flush()
    sys.stderr.flush()
    return f"fault\n{reached[0]}" if reached else outcome


def judge(error: ZipvlError, folder: str) -> str:
    """Whether a refusal is a clear line, and no failed allocation in disguise."""
    text, cause, faults = str(error), error.__context__, []
    while cause:
        if isinstance(cause, MemoryError):
            faults.append("hides that memory ended")
        cause = cause.__context__
    if not text.strip():
        faults.append("is empty")
    if not text.isprintable():
        faults.append("is not one printable line")
    if len(text) > LONGEST:
        faults.append("is very long")
    if not any(name in text for name in (folder, *ASKED)):
        faults.append("does not name the file")
    if faults:
        return f"fault\nthe message {', '.join(faults)}: {type(error).__name__} {text!r:.600}"
    return f"refused\n{type(error).__name__} {text}"


def finish(child: Child, limits: Limits, spoke: bool) -> Verdict:
    """Ends a child that has reported or died (it spoke), or run out of time."""
    data = os.read(child.pipe, REPORT) if spoke else b""
    os.close(child.pipe)
    os.killpg(child.pid, signal.SIGKILL)
    _, status, used = os.wait4(child.pid, 0)
    cpu, memory = used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 - child.base
    out, noise = (
        (child.folder / name).read_text(errors="replace") if (child.folder / name).exists() else ""
        for name in ("stdout", "stderr")
    )
    shutil.rmtree(child.folder)
    outcome, _, text = data.decode(errors="replace").partition("\n")
    faults = [text] if outcome == "fault" else []
    died = signal.Signals(os.WTERMSIG(status)) if os.WIFSIGNALED(status) else None
    if not spoke or (not data and died == signal.SIGXCPU):
        faults.append(f"time: over {limits.cpu} s of CPU or {limits.wall:g} s")
    elif not data:
        faults.append(f"signal: {died.name if died else 'none, but no report'}")
    if memory > limits.memory:
        faults.append(f"memory: {memory >> 20} MiB")
    if out:
        faults.append(f"stdout: {out!r:.200}")
    return Verdict("fault" if faults else outcome, "; ".join(faults) or text, cpu, memory, noise)


# --- cases --------------------------------------------------------------------------------------

KINDS: dict[
    str, tuple[str, Callable[[Random, Path], Files], Call]
] = {  # base, what hurts, who reads
    "weights": ("checkpoints", checkpoints.weights, checkpoints.answer),
    "config": ("checkpoints", checkpoints.config, checkpoints.answer),
    "tokenizer": ("tokenizers", checkpoints.tokenizer, checkpoints.chat),
    "template": ("checkpoints", checkpoints.template, checkpoints.chat),
    "video": ("videos", media.video, media.watch),
    "picture": ("pictures", media.picture, media.look),
}


def build(root: Path) -> Path:
    """All bases: root/checkpoints/llava/config.json, ..., root/pictures/PNG-RGB.jpg."""
    root.mkdir(exist_ok=True)
    checkpoints.build_checkpoints(root / "checkpoints")
    checkpoints.build_tokenizers(root / "tokenizers")
    media.build_videos(root / "videos")
    media.build_pictures(root / "pictures")
    return root


def lay(kind: str, number: int, root: Path, folder: Path) -> None:
    """The files of a case."""
    home, hurt, _ = KINDS[kind]
    rng, base = Random(f"{SEED} {kind} {number}"), root / home
    if home in ("checkpoints", "tokenizers"):
        base = rng.choice(sorted(base.iterdir()))
        shutil.copytree(base, folder, copy_function=os.link, dirs_exist_ok=True)
    for name, data in hurt(rng, base).items():
        (folder / name).unlink(missing_ok=True)  # a link: the base stays as it is
        if data is not None:
            (folder / name).write_bytes(data)


def read(kind: str, number: int, root: Path, folder: Path) -> None:
    lay(kind, number, root, folder)
    KINDS[kind][2](folder)


def read_base(path: Path, door: Call, folder: Path) -> None:
    if path.is_dir():
        shutil.copytree(path, folder, dirs_exist_ok=True)
    else:
        shutil.copy(path, folder)
    door(folder)


def cases(count: int, root: Path) -> Iterator[tuple[Name, Call]]:
    """Number 0 of every kind, number 1 of every kind, ..."""
    for n in range(count):
        kind, number = list(KINDS)[n % len(KINDS)], n // len(KINDS)
        yield (kind, number), partial(read, kind, number, root)


def bases(root: Path) -> Iterator[tuple[Name, Call]]:
    """Every base as it is, which must be read without error or noise (pictures: those of usual formats)."""
    doors = {home: door for home, _, door in KINDS.values()}
    for path in sorted(path for home in doors for path in (root / home).iterdir()):
        if path.parent.name != "pictures" or path.name.startswith(media.USUAL):
            yield ("bases", path.name), partial(read_base, path, doors[path.parent.name])


def table(verdicts: dict[Name, Verdict]) -> str:
    rows = ["kind        cases     ok  refused  faults  noisy    CPU s  longest  most MiB"]
    for kind in dict.fromkeys(kind for kind, _ in verdicts):
        mine = [v for (k, _), v in verdicts.items() if k == kind]
        count = Counter(v.outcome for v in mine)
        noisy = sum(bool(v.noise) and v.outcome != "fault" for v in mine)
        rows.append(
            f"{kind:10} {len(mine):6} {count['ok']:6} {count['refused']:8} {count['fault']:7} "
            f"{noisy:6} {sum(v.cpu for v in mine):8.1f} {max(v.cpu for v in mine):8.1f} "
            f"{max(v.memory for v in mine) >> 20:9}"
        )
    return "\n".join(rows)


def run_all(count: int, root: Path) -> int:
    """`count` cases, after all bases if many: faults as they come, a word a minute, a table."""
    checkpoints.answer(checkpoints.DEMO / "model")  # imports what is imported late
    gc.collect()
    gc.freeze()  # else a child's collection would copy every page
    verdicts: dict[Name, Verdict] = {}
    spent, told = 0.0, time.monotonic()
    first = bases(root) if count >= MANY else ()
    for name, verdict in run(chain(first, cases(count, root)), JOBS, Limits()):
        if name[0] == "bases" and (verdict.outcome, verdict.noise) != ("ok", ""):
            verdict = replace(verdict, outcome="fault")
        verdicts[name], spent = verdict, spent + verdict.cpu
        if verdict.outcome == "fault":
            print(*name, f"({verdict.cpu:.1f} s): {verdict.text}", flush=True)
        if time.monotonic() - told > 60:
            told = time.monotonic()
            print(f"{len(verdicts)} of {count} cases", file=sys.stderr, flush=True)
        if spent > BUDGET:
            print(f"stopped after {BUDGET:.0f} s of CPU")
            break
    print(table(verdicts))
    return int(any(v.outcome == "fault" for v in verdicts.values()))


def run_one(kind: str, number: int, root: Path) -> int:
    """One case, all that is to be known of it, and its files to keep."""
    kept = Path(f"fuzz-{kind}-{number}").absolute()
    kept.mkdir(exist_ok=True)
    lay(kind, number, root, kept)
    ((_, verdict),) = run([((kind, number), partial(read, kind, number, root))], 1, Limits())
    print(f"{verdict.noise}\n{verdict}\n{kept}")
    return int(verdict.outcome == "fault")


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="fuzz-bases-") as name:
        root = build(Path(name))
        if len(arguments) == 2:
            return run_one(arguments[0], int(arguments[1]), root)
        return run_all(int(arguments[0]) if arguments else 200, root)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
