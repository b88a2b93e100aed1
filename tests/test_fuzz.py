"""Files of strangers, damaged on purpose: only our errors, each in time and memory.

fuzzing.py makes and runs the cases; `python tests/fuzzing.py KIND NUMBER` shows one. The slow job is
`pytest -m slow tests/test_fuzz.py -s`, 10,000 cases or as many as ZIPVL_FUZZ says.
"""

import ctypes
import faulthandler
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import fuzzing
import pytest
from fuzzing import Limits

from zipvl.errors import MediaError, ModelError

ROOT = Path(__file__).parent.parent
ROW = re.compile(r"^(\w+) +(\d+) +(\d+) +(\d+) +(\d+) ", re.M)  # kind, cases, ok, refused, faults

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="needs fork, /proc and their limits"
)


def fuzz(count: int) -> None:
    """So many cases in a process of their own: it forks best that has no thread and little memory."""
    command = [sys.executable, "tests/fuzzing.py", str(count)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
    )
    rows = [row for row in ROW.findall(done.stdout) if row[0] in fuzzing.KINDS]
    assert done.returncode == 0, done.stdout
    assert sum(int(row[1]) for row in rows) == count, "stopped early"
    for kind, _, ok, refused, _ in rows:  # damage that always or never shows finds nothing
        assert int(ok) > 0, kind
        assert int(refused) > 0, kind


def test_some_cases() -> None:
    fuzz(60)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_cases() -> None:
    fuzz(int(os.environ.get("ZIPVL_FUZZ", "10000")))


@pytest.mark.slow
def test_a_case_is_the_same_again(tmp_path: Path) -> None:
    first, second = (fuzzing.build(tmp_path / name) for name in ("first", "second"))
    assert contents(first) == contents(second)
    for kind in fuzzing.KINDS:
        for number in range(5):
            for root in (first, second):
                folder = tmp_path / f"{kind}-{number}" / root.name
                folder.mkdir(parents=True)
                fuzzing.lay(kind, number, root, folder)
            assert contents(folder.parent / "first") == contents(folder)


def contents(root: Path) -> dict[Path, bytes]:
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def crash(folder: Path) -> None:
    faulthandler.disable()  # pytest's, which would tell of it
    ctypes.string_at(0)


def spin(folder: Path) -> None:
    while True:
        pass


def sleep(folder: Path) -> None:
    time.sleep(60)


def fill(folder: Path) -> None:
    bytearray(100 << 20)


def fill_in_silence(folder: Path) -> None:
    try:
        bytearray(1 << 40)
    except MemoryError:
        raise ModelError(f"{folder} is damaged") from None


def run_program(folder: Path) -> None:
    try:
        subprocess.run(["true"])
    except OSError:
        raise MediaError(f"{folder} is no picture") from None


def raise_bare(folder: Path) -> None:
    raise KeyError("template")


def panic(folder: Path) -> None:
    raise BaseException("a Rust library panicked")


def speak(folder: Path) -> None:
    print("hello")


class Raw(ModelError):
    """An error that shows what it was given as it is, as none of zipvl's does."""

    def __init__(self, text: str):
        self.text = text

    def __str__(self) -> str:
        return self.text


def refuse(text: str) -> fuzzing.Call:
    def call(folder: Path) -> None:
        raise Raw(text.format(folder))

    return call


PLANTED = ("planted", 0)
FAULTS = {
    "raised KeyError": raise_bare,
    "raised BaseException": panic,
    "signal: SIGSEGV": crash,
    "memory: 1": fill,
    "hides that memory ended": fill_in_silence,
    "reached subprocess.Popen": run_program,
    "stdout: 'hello": speak,
    "is empty": refuse(""),
    "is not one printable line": refuse("{} is\nbad"),
    "is very long": refuse("{} " + "x" * 3000),
    "does not name the file": refuse("some file is bad"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str) -> None:
    limits = Limits(memory=64 << 20)
    ((_, verdict),) = fuzzing.run([(PLANTED, FAULTS[fault])], 1, limits)
    assert verdict.outcome == "fault"
    assert fault in verdict.text


@pytest.mark.parametrize("hang", [spin, sleep])
def test_a_planted_hang_is_found(hang: fuzzing.Call) -> None:
    ((_, verdict),) = fuzzing.run([(PLANTED, hang)], 1, Limits(cpu=1, wall=2.0))
    assert verdict.outcome == "fault"
    assert verdict.text.startswith("time: ")


def test_success_refusal_and_noise_are_told_apart() -> None:
    def warn(folder: Path) -> None:
        print("a library's warning", file=sys.stderr)

    calls = {0: lambda folder: None, 1: warn, 2: refuse("{} is bad")}
    found = dict(fuzzing.run(((("planted", n), call) for n, call in calls.items()), 2, Limits()))
    outcomes = [(v.outcome, bool(v.noise)) for _, v in sorted(found.items())]
    assert outcomes == [("ok", False), ("ok", True), ("refused", False)]
