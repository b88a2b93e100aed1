"""The command line as its users meet it: what goes to stdout and stderr, exit codes, the chat."""

import contextlib
import errno
import fcntl
import importlib.util
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import av
import numpy as np
import pytest
import torch
from PIL import Image

import zipvl
from zipvl import cli as zipvl_cli
from zipvl import report as zipvl_report
from zipvl.engine import inputs as engine_inputs
from zipvl.engine import load as engine_load
from zipvl.engine import session as engine_session
from zipvl.engine.stats import Stats
from zipvl.model.decoder import Decoder
from zipvl.vision.family import Family

ROOT = Path(__file__).parent.parent
SCRIPT = str(ROOT / "generate.py")


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(oracle: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a space and other letters in its name: `model`, `clip.mp4`, `picture.png`."""
    home = tmp_path_factory.mktemp("cli") / "meine Dateien 写真 é"
    shutil.copytree(oracle("llava_onevision").folder, home / "model")
    colours = np.random.default_rng().integers(0, 256, (20, 48, 64, 3), dtype=np.uint8)
    with av.open(str(home / "clip.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=10, width=64, height=48, pix_fmt="yuv420p")
        for picture in colours:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode(None))
    Image.fromarray(colours[0]).save(home / "picture.png")
    return home


@pytest.fixture(autouse=True)
def _ctrl_c_works() -> Iterator[None]:
    """A suite started in the background by a shell ignores SIGINT, and so would its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Terminal(io.TextIOWrapper):
    """A stream that says it is a terminal."""

    def __init__(self, data: bytes = b"") -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8", write_through=True)

    def isatty(self) -> bool:
        return True

    def text(self) -> str:
        return self.buffer.getvalue().decode()


class Cli:
    """generate.main in this process: arguments in, (exit code, stdout, stderr) out."""

    def __init__(self, generate: ModuleType, files: Path, capsys: pytest.CaptureFixture,
                 patch: pytest.MonkeyPatch) -> None:  # fmt: skip
        self.generate, self.files, self.capsys, self.patch = generate, files, capsys, patch
        self.stdin(io.TextIOWrapper(io.BytesIO(b"")))

    def stdin(self, stream: object) -> None:
        self.patch.setattr(sys, "stdin", stream)

    def __call__(self, *args: str, model: str | None = "model") -> tuple[int, str, str]:
        first = ["-m", str(self.files / model)] if model else []
        self.capsys.readouterr()
        try:
            code = self.generate.main([*first, *args])
        except SystemExit as e:
            code = e.code
        return code, *self.capsys.readouterr()

    def ask(self, *args: str) -> tuple[int, str, str]:
        """A prompt about the clip, 6 tokens, dense: quick."""
        media = () if {"-v", "-i"} & {*args} else ("-v", str(self.files / "clip.mp4"), "-n", "4")
        return self(*media, "-p", "What happens?", "--max-new-tokens", "6", *args)

    def chat(self, *lines: str, args: tuple[str, ...] = ()) -> tuple[int, str, str]:
        """A chat about the clip with these typed lines, then end of input."""
        self.stdin(Terminal("".join(f"{line}\n" for line in lines).encode()))
        clip = str(self.files / "clip.mp4")
        return self("-v", clip, "-n", "4", "--max-new-tokens", "6", *args)


@pytest.fixture
def cli(generate: ModuleType, files: Path, capsys: pytest.CaptureFixture,
        monkeypatch: pytest.MonkeyPatch) -> Cli:  # fmt: skip
    return Cli(generate, files, capsys, monkeypatch)


def strict_json(text: str) -> dict:
    """The one object in `text`; NaN and Infinity are no JSON."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in JSON")

    return json.loads(text, parse_constant=refuse)


def one_sentence(err: str) -> str:
    """The error line, which is all that stderr holds."""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "Traceback" not in err
    return err


# --- what is printed where --------------------------------------------------------------------


def test_answer_on_stdout_rest_on_stderr(cli: Cli, files: Path) -> None:
    code, out, err = cli.ask("--stats", "--seed", "3")
    engine = zipvl.load(files / "model")
    inputs = engine.prepare("What happens?", video=str(files / "clip.mp4"), frames=4)
    assert (code, out) == (0, engine.generate(inputs, max_new_tokens=6).text + "\n")
    headline = err.splitlines()[0]
    for part in ("llava_onevision", "hf layout", "float32", "cpu", "4 frames", "ZipVL(tau=0.975"):
        assert part in headline
    assert f"{len(inputs)} tokens, {int(inputs.is_visual.sum())} visual" in headline
    for stage in ("video", "vision", "prefill", "decode", "kept", "cache", "memory", "layer"):
        assert any(line.startswith(stage) for line in err.splitlines()), stage
    assert cli.ask("-q") == (0, out, "")


def test_json(cli: Cli) -> None:
    code, out, _ = cli.ask("--json", "--dense", "--temperature", "1.5", "--seed", "5")
    assert code == 0
    assert out.count("\n") == 1
    run = strict_json(out)
    assert set(run) == {"text", "finish_reason", "tokens", "usage", "stats", "warnings", "env"}
    usage = run["usage"]
    assert usage["completion_tokens"] == len(run["tokens"]) == run["stats"]["new_tokens"] == 6
    assert usage["total_tokens"] == usage["prompt_tokens"] + 6
    assert 0 < usage["visual_tokens"] < usage["prompt_tokens"]
    assert run["finish_reason"] == "length"
    assert {"video", "vision", "prefill", "decode"} <= set(run["stats"]["seconds"])
    assert run["stats"]["kv_bytes"] == run["stats"]["kv_bytes_dense"] > 0
    assert run["env"]["seed"] == 5
    assert run["env"]["torch"] == torch.__version__
    assert (run["env"]["dtype"], run["env"]["device"]) == ("float32", "cpu")
    assert run["text"] + "\n" == cli.ask("--dense", "--temperature", "1.5", "--seed", "5")[1]


# --- several methods --------------------------------------------------------------------------

LOSSY = "zipvl:tau=0.05,always=last"  # answers otherwise than dense


def rows(err: str) -> dict[str, str]:
    """The lines of the table by method."""
    lines = err.splitlines()
    head = next(i for i, line in enumerate(lines) if line.split()[:2] == ["answer", "prefill"])
    return {line.split()[0]: line for line in lines[head + 1 :]}


def test_compare_runs_each_method_as_alone(cli: Cli, files: Path) -> None:
    methods = ["dense", "zipvl-stream", LOSSY]
    code, out, err = cli.ask("--compare", ",".join(methods))
    engine = zipvl.load(files / "model")
    inputs = engine.prepare("What happens?", video=str(files / "clip.mp4"), frames=4)
    alone = {m: engine.generate(inputs, m, max_new_tokens=6) for m in methods}
    texts = {m: result.text for m, result in alone.items()}
    assert len(set(texts.values())) > 1
    assert (code, out) == (0, "".join(f"{m}: {text}\n" for m, text in texts.items()))
    table = rows(err)
    assert list(table) == methods
    assert "the first" in table["dense"]
    for method, result in alone.items():
        line, stats = table[method], result.stats
        assert f"{stats.ratio:.1%}" in line
        assert f"{stats.prefill_work:.1%}" in line
        assert f"{stats.kv_bytes / 2**20:.2f} " in line
        first = alone["dense"].tokens
        if method != "dense":
            differs = [a != b for a, b in zip(result.tokens, first, strict=True)]
            said = f"token {differs.index(True) + 1} " if any(differs) else "same"
            assert said in line
    assert f"2 of 3: {alone['zipvl-stream'].stats.method}" in err
    code, out, err = cli.ask("--compare", "dense,zipvl:tau=1", "-q")
    assert (code, out, err) == (0, texts["dense"] + "\n", "")  # both agree: said once


def test_compare_as_json(cli: Cli) -> None:
    code, out, _ = cli.ask("--json", "--compare", f"dense,{LOSSY}")
    assert code == 0
    runs = strict_json(out)["runs"]
    assert [run["method"] for run in runs] == ["dense", LOSSY]
    for run in runs:
        alone = strict_json(cli.ask("--json", "--method", run["method"])[1])
        assert {k: run[k] for k in ("text", "tokens", "usage")} == {
            k: alone[k] for k in ("text", "tokens", "usage")
        }
        seconds = run["stats"]["seconds"]
        assert seconds["first_token"] >= seconds["prefill"]
    assert runs[0]["stats"]["seconds"]["video"] > 0  # read once, for the first
    assert runs[1]["stats"]["seconds"]["video"] == 0


def test_compare_encodes_once(cli: Cli) -> None:
    calls, encode = [], Family.encode
    cli.patch.setattr(Family, "encode", lambda *a, **o: calls.append(1) or encode(*a, **o))
    assert cli.ask("--compare", "dense,zipvl,zipvl-stream")[0] == 0
    assert len(calls) == 1


def test_a_method_that_fails_leaves_the_others(cli: Cli, tmp_path: Path) -> None:
    for name, line in (("bug", "1 / 0"), ("refuses", "raise UsageError('not\\nthis prompt')")):
        (tmp_path / f"{name}.py").write_text(
            "from zipvl.errors import UsageError\nfrom zipvl.policy import Policy\n"
            f"class Mine(Policy):\n    def plan(self, view):\n        {line}\n"
        )
    bug, refuses = (f"{tmp_path / name}.py:Mine" for name in ("bug", "refuses"))
    code, out, err = cli.ask("--compare", f"dense,{bug},{refuses},zipvl:tau=1")
    assert (code, out) == (1, cli.ask("-q", "--dense")[1])
    table = rows(err)
    assert "failed: " in table[bug]
    assert "division by zero" in table[bug]
    assert re.search(r"failed: not.*this prompt", table[refuses])
    assert "same" in table["zipvl:tau=1"]
    code, out, _ = cli.ask("--json", "--compare", f"{bug},dense")
    assert code == 1
    assert [set(run) == {"method", "error"} for run in strict_json(out)["runs"]] == [True, False]
    code, out, err = cli.ask("-q", "--compare", f"{bug},{refuses}")
    assert (code, out) == (1, "")


def test_ctrl_c_in_a_comparison_shows_what_is_done(cli: Cli) -> None:
    cli.patch.setattr(Decoder, "prefill", interrupting(Decoder.prefill, 3))  # the first wakes up
    code, _, err = cli.ask("--compare", "dense,zipvl,zipvl-stream")
    assert code == 130
    assert list(rows(err)) == ["dense", "zipvl"]
    assert "interrupted" in rows(err)["zipvl"]


def test_a_rate_is_not_cut_at_32(cli: Cli) -> None:
    """Frames are the engine's own number where none was given."""
    asked, prepare = [], zipvl.Engine.prepare
    cli.patch.setattr(
        zipvl.Engine, "prepare", lambda *a, **k: asked.append(a[4:6]) or prepare(*a, **k)
    )
    clip = str(cli.files / "clip.mp4")
    for args in (("--fps", "8"), ("--fps", "8", "-n", "4"), ()):
        assert cli("-v", clip, "-p", "x", "--max-new-tokens", "1", "-q", *args)[0] == 0
    assert asked == [("auto", 8.0), (4, 8.0), ("auto", None)]


def test_prompt_from_standard_input(cli: Cli) -> None:
    wanted = cli.ask("-q")[1]
    cli.stdin(io.TextIOWrapper(io.BytesIO(b"  What happens?\n\n"), encoding="utf-8"))
    assert cli("-v", str(cli.files / "clip.mp4"), "-n", "4", "--max-new-tokens", "6", "-p", "-",
               "-q") == (0, wanted, "")  # fmt: skip


def test_hints_say_when_the_method_does_not_pay(cli: Cli) -> None:
    assert "hint:" not in cli.ask("--dense", "--stats")[2]
    err = cli.ask("--tau", "0.99999", "--stats", "--max-new-tokens", "1")[2]
    assert "of the tokens took part in attention" in err
    assert "faster with --dense" in err
    assert "drops little" in err
    few = cli("-p", "x", "--method", "zipvl:always=last", "--tau", "0.1", "--stats",
              "--max-new-tokens", "500", "--seed", "1")[2]  # fmt: skip
    assert "took part" not in few
    assert "room for new tokens" in few


@pytest.mark.parametrize(
    "method", ["snapkv:budget=32", "h2o:heavy=4,recent=4", "zipcache", "fastv"]
)
def test_hints_are_true_of_methods_that_leave_attention_alone(cli: Cli, method: str) -> None:
    err = cli.ask("--method", method, "--stats", "--max-new-tokens", "1")[2]
    assert "took part" not in err
    assert "choosing tokens" not in err


def test_hints_speak_of_the_cache_in_bytes(cli: Cli) -> None:
    """All tokens at 2 bits, as kivi holds them, are no method that drops little."""
    layer = {
        "chose": False,
        "tokens": 100,
        "ratio": 1.0,
        "work": 1.0,
        "cached": 100,
        "kv_bytes": 300,
    }
    seconds = {"prefill_probe": 1.0, "prefill_attend": 1.0}
    for held, said in ((300, 0), (950, 1)):
        layers = [layer | {"kv_bytes": held}] * 2
        stats = Stats("KIVI(kv_bits=2)", 100, 50, 3, 1, seconds, layers, 100, 100, 2000, 0)
        assert len([*zipvl_report.hints(stats)]) == said
        assert sum("drops little" in hint for hint in zipvl_report.hints(stats)) == said


def test_one_token_has_no_rate(cli: Cli) -> None:
    line = next(x for x in cli.ask("--stats", "--max-new-tokens", "1")[2].splitlines()
                if x.startswith("decode"))  # fmt: skip
    assert line.endswith(" s   1 token")
    err = cli.ask("--stats", "--max-new-tokens", "2")[2]
    assert re.search(r"^decode .* 2 tokens, [\d.]+/s$", err, re.M)


def test_media_options(cli: Cli) -> None:
    picture, clip = str(cli.files / "picture.png"), str(cli.files / "clip.mp4")
    code, out, _ = cli.ask("-i", picture, "-v", clip, "-v", clip, "--fps", "2", "--start", "0.4",
                           "--end", "1.6", "--json", "--system", "Be brief.")  # fmt: skip
    run = strict_json(out)
    assert code == 0
    times = [f["time"] for f in run["stats"]["frames"]]
    assert times == pytest.approx([0.4, 0.9, 1.4] * 2)


def test_bars_only_on_a_terminal(cli: Cli) -> None:
    assert "prefill layers" not in cli.ask()[2]
    for quiet in ((), ("-q",)):
        screen = Terminal()
        with cli.patch.context() as patch:
            patch.setattr(sys, "stderr", screen)
            assert cli.ask(*quiet)[0] == 0
        for bar in ("read frames", "encode frames", "prefill layers"):
            assert (bar in screen.text()) == (not quiet)


def test_plain_lines_of_progress_elsewhere(cli: Cli) -> None:
    """Every ten seconds; here after each step."""
    with cli.patch.context() as patch:
        patch.setattr(zipvl_report, "EVERY", 0.0)
        _, _, err = cli.ask()
        assert "read frames: 1 of 4\nread frames: 2 of 4\n" in err
        assert "load weights: 1 of " in err
        assert "encode frames: 4 of 4\n" in err
        assert "prefill layers: 2 of " in err
        assert all(c.isprintable() or c == "\n" for c in err)
        assert cli.ask("-q")[2] == ""
    times = iter((0.0, 4.0, 11.0, 12.0, 20.0, 22.0))
    cli.patch.setattr(time, "monotonic", lambda: next(times))
    with zipvl_report.progress_lines("work", 3) as step:
        step(1)
        step(1)  # says so, at 11 and then 12
        step(1)
    assert cli.capsys.readouterr().err == "work: 2 of 3\n"


def test_the_demo_is_the_default(cli: Cli) -> None:
    """No model: the bundled one; no media either: its clip."""
    demo = cli.files.parent / "demo"
    if not demo.exists():
        shutil.copytree(cli.files / "model", demo / "model")
        shutil.copy(cli.files / "clip.mp4", demo / "clip.mp4")
    cli.patch.setattr(engine_load, "DEMO", demo)
    args = ("-p", "What happens?", "-n", "4", "--max-new-tokens", "6")
    code, out, err = cli(*args, model=None)
    assert (code, out) == (0, cli.ask("-q")[1])
    assert "4 frames" in err
    code, _, err = cli(*args, "-i", str(cli.files / "picture.png"), model=None)
    assert code == 0
    assert "frames," not in err


def test_help_fits_a_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = zipvl_cli.build_parser().format_help()
    assert text.count("\n") < 60
    assert max(map(len, text.splitlines())) <= 80
    for option in zipvl_cli.build_parser()._actions:
        assert option.help, f"{option.option_strings} has no help"


# --- three doors ------------------------------------------------------------------------------


def test_three_doors_are_one_program(generate: ModuleType) -> None:
    """generate.py, the console script and `python -m zipvl` call the same function."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["zipvl"].partition(":")
    door = importlib.import_module("zipvl.__main__")
    assert list(scripts) == ["zipvl"]
    assert generate.main is door.main is getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(
    ("called", "shown"),
    [
        ("somewhere/generate.py", "generate.py"),
        ("bin/zipvl", "zipvl"),
        ("site-packages/zipvl/__main__.py", "python -m zipvl"),
    ],
)
def test_usage_names_the_door(cli: Cli, called: str, shown: str) -> None:
    cli.patch.setattr(sys, "argv", [called])
    code, out, err = cli("-p", model=None)
    assert (code, out) == (2, "")
    assert err.startswith(f"usage: {shown} [-m MODEL]")
    assert f"\n{shown}: error: " in err
    assert f"{shown} -v clip.mp4" in " ".join(cli("--help", model=None)[1].split())


def test_python_m_zipvl_answers(cli: Cli, files: Path) -> None:
    """A real process through the other door: the same bytes and code."""
    code, out, _ = cli("-p", "What?", "--max-new-tokens", "3", "-q")
    command = [sys.executable, "-m", "zipvl", "-m", str(files / "model"), "-p", "What?", "-q"]
    done = subprocess.run(
        [*command, "--max-new-tokens", "3"],
        cwd=ROOT,
        capture_output=True,
        timeout=100,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )
    assert (done.returncode, done.stdout.decode(), done.stderr) == (code, out, b"")


# --- exit codes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ([], "no prompt"),
        (["-p", "x", "--dense", "--tau", "0.9"], "--dense keeps every token"),
        (["-p", "x", "--dense", "--keep-ratio", "0"], "--dense keeps every token"),
        (["-p", "x", "--dense", "--probe", "1+1"], "--dense keeps every token"),
        (["-p", "x", "--dense", "--method", "zipvl"], "--dense keeps every token"),
        (["-p", "x", "--compare", "dense,zipvl", "--tau", "0.9"], "write zipvl:tau=0.9"),
        (["-p", "x", "--compare", "dense,zipvl", "--dense"], "--compare names its methods"),
        (["-p", "x", "--compare", "dense"], "give two or more different methods"),
        (["-p", "x", "--compare", "dense,zipvl,dense"], "give two or more different methods"),
        (["--compare", "dense,zipvl"], "are for one question: give -p TEXT"),
        (["-p", "x", "--probe", "64"], "write recent+random"),
        (["-p", "x", "--probe", "a+b"], "write recent+random"),
        (["-p", "x", "--probe", "²+3"], "write recent+random"),
        (["-p", "x", "--probe", ""], "write recent+random"),
        (["-p", "x", "--probe", "-1+3"], "expected one argument|write recent"),
        (["-p", "x", "--frames", "many"], "invalid int value"),
        (["-p", "x", "--fram", "3"], "unrecognized arguments"),
        (["-p", "x", "clip.mp4"], "unrecognized arguments"),
        (["-p"], "expected one argument"),
    ],
)
def test_usage_errors(cli: Cli, args: list[str], named: str) -> None:
    code, out, err = cli(*args)
    assert (code, out) == (2, "")
    assert err.startswith("usage: ")
    assert any(n in err for n in named.split("|"))


QUICK = [  # seen before torch is imported; the answer's own door says the same
    (["--max-new-tokens", "0"], "max_new_tokens is 0: give a whole number from 1 on"),
    (["--temperature", "-1"], "temperature is -1.0: give 0 (greedy) or more"),
    (["--temperature", "inf"], "temperature is inf: give 0 (greedy) or more"),
    (["--top-p", "2"], "top_p is 2.0: give a share above 0 and up to 1"),
    (["--top-k", "-1"], "top_k is -1: give 0 (off) or more"),
    (["--seed", str(2**63)], f"seed is {2**63}: give a whole number of at most 63 bits"),
    (["--frames", "0"], "frames is 0: give 1 to"),
    (["--fps", "0"], "fps is 0.0: give frames a second"),
    (["--start", "-1"], "start is -1.0: give seconds"),
    (["--start", "nan"], "start is nan: give seconds"),
    (["--start", "0:05", "--end", "2"], "start 5 lies after end 2"),
    (["--reader", "opencv"], "unknown reader 'opencv': give pyav or decord"),
    (["--method", "zipfl:tau=3"], "unknown method 'zipfl': use one of dense, zipvl, zipvl-stream"),
    (["--method", "gone.py:X"], "method file gone.py does not exist: check the path"),
    (
        ["--compare", "dense,zipfl:tau=3"],
        "unknown method 'zipfl': use one of dense, zipvl, zipvl-stream",
    ),
    (["--compare", "gone.py:X,dense"], "method file gone.py does not exist: check the path"),
    (["--compare", "dense,"], "unknown method ''"),
    (["-v", "gone.mp4"], "gone.mp4 does not exist: check the path"),
    (["-i", "gone.png"], "gone.png is not a file: check the path"),
    (["-p", "a <image>"], "the prompt has 1 <image> markers but 0 images were given"),
    (["-p", "<video> <video>"], "the prompt has 2 <video> markers but 1 videos were given"),
    (["-p", "caf\udce9"], "the prompt is not valid Unicode text"),
    (["-p", ""], "the prompt is empty: give -p TEXT"),
    (["-p", " \n "], "the prompt is empty: give -p TEXT"),
    (["-p", "-"], "the prompt is empty: give -p TEXT"),  # an empty standard input
]


def test_faults_of_the_command_line_need_no_torch() -> None:
    code = """if True:
        import json, sys, zipvl.cli
        for args in json.loads(sys.argv[1]):
            code = zipvl.cli.main(["-p", "x", *args])
            print(json.dumps([code, "torch" in sys.modules]), file=sys.stderr)
    """
    command = [sys.executable, "-c", code, json.dumps([args for args, _ in QUICK])]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, timeout=60)  # fmt: skip
    lines = done.stderr.splitlines()
    assert (done.stdout, len(lines)) == ("", 2 * len(QUICK)), done.stderr
    for (args, sentence), said, code in zip(QUICK, lines[::2], lines[1::2], strict=True):
        wrong_file = args[0] in ("-v", "-i")
        assert said.startswith(f"error: {sentence}")
        assert json.loads(code) == [1 if wrong_file else 2, False]


def test_the_same_words_as_in_python(cli: Cli) -> None:
    """What the command tells early is what the engine would tell late."""
    engine, clip = zipvl.load(cli.files / "model"), str(cli.files / "clip.mp4")
    inputs = engine.prepare("x")
    for args, ask in (
        (["--max-new-tokens", "0"], lambda: engine.generate(inputs, max_new_tokens=0)),
        (["--temperature", "-1"], lambda: engine.generate(inputs, temperature=-1.0)),
        (["--top-p", "0"], lambda: engine.generate(inputs, top_p=0.0)),
        (["--top-k", "-1"], lambda: engine.generate(inputs, top_k=-1)),
        (["--seed", str(2**63)], lambda: engine.generate(inputs, seed=2**63)),
        (["--frames", "0"], lambda: engine.prepare("x", video=clip, frames=0)),
        (["--fps", "0"], lambda: engine.prepare("x", video=clip, fps=0.0)),
        (["--start", "-1"], lambda: engine.prepare("x", video=clip, start=-1.0)),
        (["--reader", "x"], lambda: engine.prepare("x", video=clip, reader="x")),
        (["--method", "zipfl"], lambda: zipvl.load_policy("zipfl")),
        (["--method", "gone.py:X"], lambda: zipvl.load_policy("gone.py:X")),
        (["-v", "gone.mp4"], lambda: engine.prepare("x", video="gone.mp4")),
        (["-i", "gone.png"], lambda: engine.prepare("x", images=["gone.png"])),
        (["-p", "a <image>"], lambda: engine.prepare("a <image>")),
        (["-p", "caf\udce9"], lambda: engine.prepare("caf\udce9")),
    ):
        with pytest.raises(zipvl.ZipvlError) as late:
            ask()
        assert cli("-p", "x", *args)[2] == f"error: {late.value}\n"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("5", 5), ("5.5", 5.5), ("0:05", 5), ("90:00", 5400), ("1:02:03.5", 3723.5), ("-1", -1)],
)
def test_times(text: str, wanted: float) -> None:
    assert zipvl_cli.seconds(text) == wanted


@pytest.mark.parametrize("text", ["", "x", "1:", ":5", "1:60", "1:60:00", "1:2:3:4", "1.5:2"])
def test_times_that_are_none(cli: Cli, text: str) -> None:
    code, _, err = cli("-p", "x", f"--start={text}")
    assert code == 2
    assert f"{text!r} is no moment: write seconds, mm:ss or hh:mm:ss" in err


def test_version_and_methods(cli: Cli) -> None:
    from zipvl.policies import METHODS

    assert cli("--version", model=None) == (0, f"zipvl {zipvl.__version__}\n", "")
    code, out, err = cli("--list-methods", model=None)
    assert (code, err) == (0, "")
    said = {line.split()[0]: line.split(maxsplit=1)[1] for line in out.splitlines()}
    assert said == {m: kind.__doc__.splitlines()[0] for m, kind in METHODS.items()}
    assert all(text.endswith(".") for text in said.values())
    assert max(map(len, out.splitlines())) <= 110


def test_public_names_load_on_first_use() -> None:
    """In a fresh process: the package itself is quick, and every way to name a thing of it works."""
    code = """if True:
        import sys
        import zipvl
        assert zipvl.__version__ and {*zipvl.__all__} <= {*dir(zipvl)}
        assert not {"torch", "numpy"} & {*sys.modules}
        assert not hasattr(zipvl, "no_such_name")
        from zipvl import Policy
        assert zipvl.Policy is Policy is zipvl.policy.Policy
        assert issubclass(zipvl.UsageError, zipvl.ZipvlError)
        assert "torch" in sys.modules and callable(zipvl.load)
        from zipvl import *
        assert load_policy("dense") and Engine.prepare
    """
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_usage_errors_need_no_torch() -> None:
    code = (
        "import runpy, sys\n"
        "try: {}\n"
        "except SystemExit as e: print(e.code, sorted({{'torch', 'numpy'}} & {{*sys.modules}}))"
    )
    for door in ("run_path('generate.py', run_name='__main__')",
                 "run_module('zipvl', run_name='__main__')"):  # fmt: skip
        for args, status in ((["--help"], 0), (["-p", "x", "--probe", "3"], 2)):
            done = subprocess.run(
                [sys.executable, "-c", code.format(f"runpy.{door}"), *args],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert done.stdout.splitlines()[-1] == f"{status} []", done.stderr


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--method", "zipfl"], "unknown method 'zipfl'"),
        (["--method", "dense", "--tau", "0.9"], "'dense' has no option 'tau'"),
        (["--method", "streaming", "--keep-ratio", "0.5"], "no option 'ratio'"),
        (["--keep-ratio", "0.5"], "'zipvl' has no option 'ratio' (--keep-ratio)"),
        (["--keep-ratio", "0.5"], "fixed, random, hired, vidcom2_like, fastv, sgl"),
        (["--tau", "1.5"], "tau is 1.5: give a share of the attention mass, above 0 and up to 1"),
        (["--method", "zipvl:tau=95"], "tau is 95.0: give a share"),
        (["--method", "zipvl:seed=99999999999999999999"], "seed is 99999999999999999999: give"),
        (["--method", "kivi:kv_bits=4,2"], "write two bit widths as 4/2"),
        (["--method", "random", "--probe", "4+4"], "no option 'random'"),
        (["--kv-bits", "2,4"], "kv_bits is '2,4': give 2, 4 or 8"),
        (["--kv-bits", ""], "kv_bits is ''"),
        (["--method", "h2o", "--kv-bits", "4"], "no option 'kv_bits'"),
        (["--tau", "0"], "tau is 0.0"),
        (["--tau", "nan"], "tau is nan"),
        (["--probe", "0+0"], "must be 1 probe or more"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--seed", "99999999999999999999"], "seed is 99999999999999999999"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--frames", "0"], "frames is 0"),
        (["--start", "3", "--end", "2"], "start 3 lies after end 2"),
        (["--start", "1000"], "behind the end"),
        (["--reader", "opencv"], "unknown reader 'opencv'"),
        (["--dtype", "int4"], "unknown dtype 'int4'"),
        (["--device", "cuda:77"], "device 'cuda:77' cannot be used"),
        (["--attn", "fast"], "unknown attention backend 'fast'"),
        (["--template", "poem"], "template 'poem'"),
        (["-p", "a <image>"], "1 <image> markers but 0 images"),
        (["-p", "caf\udce9"], "not valid Unicode"),
    ],
)
def test_options_without_sense(cli: Cli, args: list[str], named: str) -> None:
    code, out, err = cli.ask(*args, "-q")
    assert (code, out) == (2, "")
    assert named in one_sentence(err)


def test_options_with_sense(cli: Cli) -> None:
    for args, shown in (
        (["--tau", "0.9", "--probe", "8+4"], "ZipVL(tau=0.9, recent=8, random=4"),
        (["--method", "zipvl:tau=0.5", "--tau", "0.75"], "ZipVL(tau=0.75"),
        (["--method", "random", "--keep-ratio", "0.5"], "Random("),
        (["--kv-bits", "4,2"], "kv_bits=(4, 2)"),
        (["--kv-bits", "4/2"], "kv_bits=(4, 2)"),
        (["--tau", "1"], "ZipVL(tau=1.0"),
        (["--kv-bits", "8"], "kv_bits=(8,)"),
        (["--method", "kivi", "--kv-bits", "4"], "KIVI(kv_bits=4"),
        (["--dense"], "Dense()"),
    ):
        code, _, err = cli.ask(*args)
        assert code == 0
        assert shown in err


def test_bytes_that_are_no_text(cli: Cli) -> None:
    cli.stdin(io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    code, out, err = cli("-p", "-", "-q")
    assert (code, out) == (2, "")
    assert "not valid Unicode" in one_sentence(err)


def test_input_errors(cli: Cli, files: Path, tmp_path: Path) -> None:
    text = tmp_path / "notes.mp4"
    text.write_text("These are notes, not a film.")
    other = tmp_path / "other"
    shutil.copytree(files / "model", other)
    raw = json.loads((other / "config.json").read_text())
    kind = {"architectures": ["MambaForCausalLM"], "model_type": "mamba"}
    (other / "config.json").write_text(json.dumps(raw | kind))
    for args, model, named in (
        (["-v", "no such.mp4"], "model", "no such.mp4 does not exist"),
        (["-v", str(text)], "model", "notes.mp4"),
        (["-v", str(tmp_path)], "model", "is a directory"),
        (["-v", "https://example.com/a.mp4"], "model", "not a local file"),
        (["-i", "no.png"], "model", "no.png is not a file"),
        (["-i", str(text)], "model", "cannot be read as a picture"),
        ([], "absent", "neither a folder nor a hub id"),
        ([], "clip.mp4", "is a file: give the checkpoint's folder"),
        ([], str(tmp_path), "config.json is missing"),
        ([], str(other), "MambaForCausalLM"),
    ):
        code, out, err = cli("-p", "x", "-q", *args, model=model)
        assert (code, out) == (1, ""), named
        assert named in one_sentence(err)


def test_a_mistyped_file_is_told_before_loading(cli: Cli) -> None:
    cli.patch.setattr(engine_load, "load_weights", None)
    for flag, name in (("-v", "gone.mp4"), ("-i", "gone.png")):
        code, _, err = cli("-p", "x", flag, name)
        assert code == 1
        assert name in one_sentence(err)


def test_kernels_are_handed_on(cli: Cli) -> None:
    assert cli.ask("-q", "--kernels", "plain")[0] == 0
    code, out, err = cli.ask("-q", "--kernels", "fast")
    assert (code, out) == (2, "")
    assert "'fast': use auto or plain" in one_sentence(err)


def test_verbose_shows_where(cli: Cli) -> None:
    with pytest.raises(zipvl.ModelError, match="neither a folder"):
        cli("-p", "x", "--verbose", model="absent")


def test_unforeseen_errors_are_one_line(cli: Cli) -> None:
    def fail(*_args: object, **_options: object) -> None:
        raise ZeroDivisionError("division by zero")

    cli.patch.setattr(Decoder, "prefill", fail)
    code, _, err = cli.ask("-q")
    assert code == 1
    assert "ZeroDivisionError: division by zero (--verbose shows where)" in one_sentence(err)


@pytest.mark.parametrize(
    ("refusal", "number"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.25 GiB. GPU 0"), "7.25 GiB"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8123456 bytes."),
         "8123456 bytes"),
    ],
)  # fmt: skip
def test_out_of_memory(cli: Cli, refusal: Exception, number: str) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise refusal

    before = cli.ask("-q")
    with cli.patch.context() as patch:
        patch.setattr(Decoder, "prefill", refuse)
        code, _, err = cli.ask("-q")
    assert code == 3
    assert number in one_sentence(err)
    assert "--frames" in err
    assert cli.ask("-q") == before


def test_memory_errors_are_exit_3(cli: Cli) -> None:
    """In whose words they ever come, and behind whatever sentence."""

    def hidden(*_: object) -> None:
        try:
            raise ImportError("libavcodec.so: failed to map segment from shared object")
        except ImportError:
            raise zipvl.MediaError("needs the package av: pip install av") from None

    def threadless(*_: object) -> None:
        try:
            raise av.error.BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        except av.error.FFmpegError:
            raise zipvl.MediaError("x.mp4 has a frame that cannot be shown: damaged") from None

    for refusal in (
        MemoryError(),
        RuntimeError("std::bad_alloc"),
        RuntimeError("can't start new thread"),
        RuntimeError("unable to mmap 3724496 bytes from file <x>: Cannot allocate memory (12)"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
        hidden,
        threadless,
    ):
        with cli.patch.context() as patch:
            fail = refusal if callable(refusal) else interrupted_by(refusal)
            patch.setattr(engine_load, "find_checkpoint", fail)
            code, out, err = cli.ask("-q")
        assert (code, out) == (3, "")
        assert "out of memory (" in one_sentence(err)
        assert "--frames" in err
        assert "pip install" not in err


def interrupted_by(error: Exception) -> Callable:
    def fail(*_args: object, **_options: object) -> None:
        raise error

    return fail


def test_a_damaged_file_is_no_lack_of_memory(cli: Cli) -> None:
    """FFmpeg has no other word for a header that asks for more than it allows."""

    def refuse(*_: object) -> None:
        try:
            raise av.error.MemoryError(errno.ENOMEM, "Cannot allocate memory", "x.mp4")
        except av.error.FFmpegError as e:
            raise zipvl.MediaError(f"x.mp4 is not a readable video ({e.strerror})") from None

    cli.patch.setattr(engine_load, "find_checkpoint", refuse)
    code, _, err = cli.ask("-q")
    assert code == 1
    assert "x.mp4 is not a readable video" in one_sentence(err)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ulimit -v")
def test_little_memory(files: Path) -> None:
    """An answer or exit 3; C++ may abort where it cannot raise."""
    codes = []
    for megabytes in (1200, 1000, 900, 800, 700, 600, 500, 400):
        command = (
            f"ulimit -v {megabytes}000; exec {sys.executable} {SCRIPT} -p 'What comes first?' -q"
        )
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
        codes.append(done.returncode)
        if done.returncode == 3:
            assert "out of memory" in one_sentence(done.stderr)
    assert {3} <= {*codes} <= {0, 3, 134, -signal.SIGABRT}, codes


# --- streams and names of any kind ------------------------------------------------------------


def shell(command: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, timeout=60)


def test_closed_streams() -> None:
    program = f"{sys.executable} {SCRIPT}"
    done = shell(f"{program} -p x -v gone.mp4 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")
    done = shell(f"{program} -p - <&-")
    assert (done.returncode, done.stderr.count(b"the prompt is empty")) == (2, 1)
    done = shell(f"{program} --version >&-")
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.slow
def test_an_answer_into_closed_streams(files: Path) -> None:
    program = f"{sys.executable} {SCRIPT} -m '{files}/model' -p x --max-new-tokens 2"
    done = shell(f"{program} --stats <&- >&- 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_names_in_any_bytes(cli: Cli) -> None:
    for name in ("caf\udce9.mp4", "\x1b[31mred\x07\n.mp4", "\u202egnp.exe"):
        for flag in ("-v", "-i", "-m"):
            code, out, err = cli("-p", "x", "-q", flag, name, model=None)
            assert (code, out) == (1, "")
            assert all(c.isprintable() for c in one_sentence(err)[:-1])
        assert cli("-p", "x", "-q", "--method", name)[0] == 2
        said = cli("-p", "x", name)[2]
        assert "unrecognized arguments" in said
        assert all(c.isprintable() or c == "\n" for c in said)
    picture = os.fsdecode(os.fsencode(str(cli.files)) + b"/caf\xe9.png")
    shutil.copy(cli.files / "picture.png", picture)
    code, out, err = cli.ask("-i", picture)
    assert (code, len(out) > 1, "error" in err) == (0, True, False)


# --- Ctrl-C and pipes -------------------------------------------------------------------------


def interrupting(function: Callable, call: int = 1) -> Callable:
    """`function`, but its n-th call gets the signal that Ctrl-C sends."""
    calls = []

    def wrapped(*args: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return function(*args, **options)

    return wrapped


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (engine_load, "load_weights"),
        (engine_inputs, "Reading"),
        (Family, "encode"),
        (Decoder, "prefill"),
    ],
)
def test_interrupt_before_the_answer(cli: Cli, owner: object, name: str) -> None:
    with cli.patch.context() as patch:
        patch.setattr(owner, name, interrupting(getattr(owner, name)))
        code, out, err = cli.ask("-q")
    assert (code, out.strip(), err) == (130, "", "")


def stopped(argv: list[str], module: str) -> subprocess.CompletedProcess:
    """generate.py, with a real Ctrl-C at the moment when it imports `module`."""
    code = f"""if True:
        import os, runpy, signal, sys
        class Stop:
            def find_spec(self, name, *_):
                if name == {module!r}:
                    sys.meta_path.remove(self)
                    os.kill(os.getpid(), signal.SIGINT)
        sys.meta_path.insert(0, Stop())
        sys.argv = {["generate.py", *argv]!r}
        runpy.run_path("generate.py", run_name="__main__")
    """
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60,
                          stdin=subprocess.DEVNULL)  # fmt: skip


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "module",
    [
        "zipvl", "zipvl.vision.video", "numpy", "torch",
        *(pytest.param(m, marks=SLOW) for m in ("argparse", "zipvl.report", "numpy.random", "torch.nn",
                                               "torch.linalg", "zipvl.model.cache", "tokenizers", "av",
                                               "av.error", "zipvl.engine.load")),
    ],
)  # fmt: skip
def test_ctrl_c_while_importing(module: str) -> None:
    """130 to a shell: by exit, or by the signal itself."""
    done = stopped(["-p", "What comes first?"], module)
    assert done.returncode in (130, -signal.SIGINT)
    assert (done.stdout, done.stderr) == (b"", b"")


@pytest.mark.slow
def test_ctrl_c_at_any_moment() -> None:
    for moment in (0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0, 1.3, 1.6, 2.0, 2.5):
        child = subprocess.Popen([sys.executable, SCRIPT, "-p", "What comes first?", "-q"],
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
        time.sleep(moment)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
        assert child.returncode in (130, -signal.SIGINT) or out, moment  # 0: it had answered
        assert err == b"", moment


@pytest.mark.slow
def test_ctrl_c_behind_the_answer() -> None:
    """While Python takes itself apart."""
    for moment in (0, 0.002, 0.004, 0.02):
        child = subprocess.Popen([sys.executable, SCRIPT, "-p", "What comes first?", "-q"],
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
        child.stdout.readline()
        time.sleep(moment)
        child.send_signal(signal.SIGINT)
        assert child.communicate(timeout=60)[1] == b""
        assert child.returncode in (0, 130, -signal.SIGINT)


def test_another_programs_handler_stays(cli: Cli) -> None:
    """main() in a Python program: what its Ctrl-C does is its own, before and after."""
    for handler in (signal.SIG_IGN, lambda *_: None, signal.default_int_handler):
        signal.signal(signal.SIGINT, handler)
        assert cli.ask("-q")[0] == 0
        assert cli("-p", "")[0] == 2
        assert signal.getsignal(signal.SIGINT) is handler
    answers: list[tuple] = []
    thread = threading.Thread(target=lambda: answers.append(cli.ask("-q")))
    thread.start()
    thread.join()
    assert answers[0][0] == 0


def test_interrupted_statistics(cli: Cli) -> None:
    """--stats tells what was measured before Ctrl-C, in which stage ever it came."""
    for name, there, missing in (
        ("prefill", ("video",), ("prefill  ", "decode ", "layer ")),
        ("decode", ("video", "vision", "prefill", "decode", "kept", "layer"), ()),
    ):
        with cli.patch.context() as patch:
            patch.setattr(Decoder, name, interrupting(getattr(Decoder, name)))
            code, _, err = cli.ask("--stats")
        begins = [line[:7] for line in err.splitlines()[1:]]
        assert code == 130
        assert all(any(line.startswith(stage[:7]) for line in begins) for stage in there), err
        assert not any(stage in err for stage in missing)
        assert not re.search(r"^video +0\.000", err, re.M)


def test_interrupted_prefill_is_still_json(cli: Cli) -> None:
    cli.patch.setattr(Decoder, "prefill", interrupting(Decoder.prefill))
    code, out, _ = cli.ask("--json")
    run = strict_json(out)
    assert (code, run["finish_reason"], run["text"], run["tokens"]) == (130, "interrupted", "", [])


def test_interrupted_answers_are_flushed(cli: Cli) -> None:
    whole = strict_json(cli.ask("--json", "--dense")[1])
    for args in ((), ("--json",)):
        with cli.patch.context() as patch:
            patch.setattr(Decoder, "decode", interrupting(Decoder.decode, 4))
            code, out, _ = cli.ask("--dense", *args)
        assert code == 130
        if args:
            run = strict_json(out)
            assert (run["finish_reason"], run["stats"]["new_tokens"]) == ("interrupted", 4)
            assert run["stats"]["seconds"].keys() >= {"video", "vision", "prefill", "decode"}
            assert run["tokens"] == whole["tokens"][:4]
            assert run["usage"]["completion_tokens"] == 4
            out = run["text"] + "\n"
        assert len(out) > 1
        assert whole["text"].startswith(out[:-1])


def running(files: Path, *args: str, **options: object) -> subprocess.Popen:
    """generate.py as its own process, with an answer long enough to be cut short."""
    command = [
        sys.executable,
        SCRIPT,
        "-m",
        str(files / "model"),
        "--max-new-tokens",
        "3000",
        *args,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    return subprocess.Popen(command, env=environment, **options)


def test_ctrl_c_as_a_process(files: Path) -> None:
    child = running(files, "-p", "Tell me all.", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    first = child.stdout.read(40)
    child.send_signal(signal.SIGINT)
    rest, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert len(first) == 40
    assert rest.endswith(b"\n")
    assert b"Traceback" not in err
    assert err.count(b"\n") == 1  # the headline


def test_broken_pipe_is_silent(files: Path) -> None:
    child = running(files, "-p", "Tell me all.", "-q", stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE)  # fmt: skip
    child.stdout.read(1)
    child.stdout.close()  # what `| head -c 1` does
    assert child.wait(timeout=60) == 0
    assert child.stderr.read() == b""
    child.stderr.close()


# --- the chat ---------------------------------------------------------------------------------


def test_chat_turns_build_on_each_other(cli: Cli, files: Path) -> None:
    code, out, err = cli.chat("What happens?", "And then?", args=("--dense",))
    assert code == 0
    engine = zipvl.load(files / "model")
    video = str(files / "clip.mp4")
    first = engine.generate(engine.prepare("What happens?", video=video, frames=4), "dense", 6).text
    talk = [
        {"role": "user", "content": "What happens?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And then?"},
    ]
    second = engine.generate(engine.prepare(talk, video=video, frames=4), "dense", 6).text
    assert out == f"{first}\n{second}\n"
    assert err.count("> ") == 3  # two questions and the end of input


def test_chat_reads_and_encodes_once(cli: Cli) -> None:
    reads, encodes = [], []
    read, encode = engine_inputs.Reading, Family.encode
    cli.patch.setattr(engine_inputs, "Reading", lambda *a, **k: reads.append(a[0]) or read(*a, **k))
    cli.patch.setattr(Family, "encode", lambda *a, **k: encodes.append(1) or encode(*a, **k))
    picture = cli.files / "picture.png"
    code, _, err = cli.chat("What?", "And?", "/clear", "Who?", f"/image {picture}", "Now?")
    assert (code, err.count("error")) == (0, 0)
    assert len(reads) == 1
    assert len(encodes) == 2  # the clip, and later the picture


def test_chat_commands(cli: Cli) -> None:
    clip, picture = cli.files / "clip.mp4", cli.files / "picture.png"
    code, out, err = cli.chat(
        "/stats", "/help", "What?", "/stats", "/video", f"/video {clip}", "",
        f"/image  {picture} ", "Both?", "/clear", "Again?", "/quit", "never asked",
    )  # fmt: skip
    assert code == 0
    assert out.count("\n") == 3
    assert "nothing asked yet" in err
    assert err.count("prefill  ") == 1  # one summary
    assert err.count("/quit leaves") == 3  # at the start, /help, and /video without a file
    told = [line for line in err.replace("> ", "").splitlines() if "visual tokens" in line[-40:]]
    assert len(told) == 4  # start, /stats, /video, /image: no question repeats it
    assert " layout)" in told[0]
    assert told[0].endswith("; ZipVL")
    assert [" layout)" in line for line in told] == [True, False, False, False]


def test_chat_clear_forgets(cli: Cli) -> None:
    """And the media are still there: nothing but questions goes through the model again."""
    sizes, prefill, extend = [], Decoder.prefill, Decoder.extend
    cli.patch.setattr(
        Decoder, "prefill", lambda *a, **k: sizes.append(len(a[1])) or prefill(*a, **k)
    )
    cli.patch.setattr(Decoder, "extend", lambda *a, **k: sizes.append(len(a[1])) or extend(*a, **k))
    code, out, _ = cli.chat("What?", "What?", "/clear", "What?", args=("-q", "--dense"))
    first, _, again = out.splitlines()
    assert (code, again) == (0, first)
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize(
    ("kind", "extended"), [("general", 2), ("media", 2), ("first", 1), ("none", 0)]
)
def test_chat_reuse_is_chosen(cli: Cli, kind: str, extended: int) -> None:
    """For a general question, or none: the prefill comes before the question."""
    calls, extend = [], Decoder.extend
    cli.patch.setattr(Decoder, "extend", lambda *a, **k: calls.append(1) or extend(*a, **k))
    code, out, err = cli.chat("What?", "And?", args=("--reuse", kind, "--dense"))
    assert (code, out.count("\n"), len(calls)) == (0, 2, extended), err


def test_unknown_reuse(cli: Cli) -> None:
    code, out, err = cli.ask("--reuse", "all")
    assert (code, out) == (2, "")
    assert "unknown reuse 'all': use one of first, general, media, none" in err
    assert zipvl_cli.REUSE == engine_session.REUSE


def test_serve_is_a_word_of_the_command(cli: Cli) -> None:
    """Its own options and help; an option of its own is none of the others."""
    code, out, err = cli("serve", "--help", model=None)
    assert (code, err) == (0, "")
    assert "--media-root" in out
    code, out, err = cli("serve", "--port", "70000", model=None)
    assert (code, out) == (2, "")
    assert "--port" in one_sentence(err)
    assert cli("--media-root", "x", "-p", "What?")[0] == 2
    assert "serve" in cli("--help")[1]


def test_films_are_saved_and_opened(cli: Cli, tmp_path: Path) -> None:
    """The answer that the session gave, in less time; a chat about it, too."""
    film, want = str(tmp_path / "a.zipvl"), cli.ask("--dense")[1]
    code, out, err = cli.ask("--save", film, "--dense", "--stats")
    assert (code, out) == (0, want)
    assert re.search(r"saved .*a\.zipvl: \d+\.\d\d MiB", err)
    code, out, err = cli("--open", film, "-p", "What happens?", "--max-new-tokens", "6", "--stats")
    assert (code, out) == (0, want)
    assert "4 frames" in err
    assert "Dense()" in err
    assert re.search(r"prefill .* tokens, \d+/s, and \d+ as they were", err)
    code, out, err = cli("--open", film, "-p", "What happens?", "--max-new-tokens", "6", "--json")
    assert strict_json(out)["stats"]["reused"] > 30
    cli.stdin(Terminal(b"What happens?\n/save %s\n" % str(tmp_path / "b.zipvl").encode()))
    code, out, err = cli("--open", film, "--max-new-tokens", "6")
    assert (code, out) == (0, want)
    assert (tmp_path / "b.zipvl").stat().st_size == (tmp_path / "a.zipvl").stat().st_size
    code, out, err = cli("--open", film, "-p", "What?", "--max-new-tokens", "2", "--dense", "-q")
    assert (code, err) == (0, "")
    for wrong, told in (
        (("--open", film, "-p", "What?", "--method", "zipvl", "-q"), "saved with Dense"),
        (
            ("--open", str(cli.files / "clip.mp4"), "-p", "What?", "-q"),
            "not a readable safetensors",
        ),
        (("--open", film + "x", "-p", "What?", "-q"), "does not exist"),
    ):
        code, out, err = cli(*wrong)
        assert (code, out) == (1 + ("--method" in wrong), "")
        assert told in one_sentence(err)
    for wrong in (("--open", film, "-v", "a.mp4"), ("--open", film, "--report", "a.html"),
                  ("--save", "a.txt")):  # fmt: skip
        assert cli(*wrong, "-p", "What?")[0] == 2
    cli.stdin(Terminal(f"/video {cli.files / 'clip.mp4'}\nWhat happens?\n".encode()))
    code, out, err = cli("--open", film, "--max-new-tokens", "6")
    assert (code, out) == (0, want)
    assert "have no pixels" in err


def test_chat_says_what_it_forgets(cli: Cli) -> None:
    picture = cli.files / "picture.png"
    err = cli.chat(f"/image {picture}", "What?", f"/image {picture}", "Both?")[2]
    assert err.count("the talk so far is forgotten") == 1


def test_chat_knows_its_commands(cli: Cli) -> None:
    code, out, err = cli.chat("/foo", "/home/me/a.mp4", "exit", "never asked", args=("-q",))
    assert (code, out) == (0, "")
    assert "unknown command /foo; /image FILE" in err
    assert "unknown command /home/me/a.mp4" in err


@pytest.mark.parametrize("line", ["/video {}", "And?"])
def test_chat_interrupt_while_preparing_returns_to_the_prompt(cli: Cli, line: str) -> None:
    """The talk and the media are as they were."""
    clip, prepare = cli.files / "clip.mp4", zipvl.Engine.prepare
    wanted = cli.chat("What?", "Who?", args=("-q", "--dense"))[1]
    cli.patch.setattr(zipvl.Engine, "prepare", interrupting(prepare, 3))  # the clip, What?, this
    lines = ("What?", line.format(clip), "Who?")
    code, out, err = cli.chat(*lines, args=("-q", "--dense"))
    assert (code, out) == (0, wanted)
    assert "Traceback" not in err


def test_chat_survives_errors(cli: Cli) -> None:
    """A bad file is forgotten, a prompt at fault is left out, running out of memory ends a turn."""
    wanted = cli.chat("What?")[1]
    code, out, err = cli.chat(
        "/image gone.png", "/video gone.mp4", "look at <image>", "What?", args=("-q",)
    )
    assert (code, out) == (0, wanted)
    assert "/quit leaves" not in err
    errors = [line for line in err.splitlines() if line.startswith("> error: ")]
    assert len(errors) == 3, err
    assert all(n in e for n, e in zip(("gone.png", "gone.mp4", "<image>"), errors, strict=True)), (
        err
    )
    prefill, refused = Decoder.prefill, []

    def refuse_once(*args: object, **options: object) -> object:
        if not refused:
            refused.append(1)
            raise torch.OutOfMemoryError("Tried to allocate 9.00 GiB")
        return prefill(*args, **options)

    cli.patch.setattr(Decoder, "prefill", refuse_once)
    code, out, err = cli.chat("What?", "What?")
    assert (code, out.strip()) == (0, wanted.strip())
    assert "9.00 GiB" in err


def test_chat_starts_with_readable_media(cli: Cli) -> None:
    cli.stdin(Terminal(b"What?\n"))
    code, out, err = cli("-v", str(cli.files / "model" / "config.json"), "-q")
    assert (code, out) == (1, "")
    one_sentence(err)


def test_chat_interrupt_ends_the_answer_only(cli: Cli) -> None:
    cli.patch.setattr(Decoder, "decode", interrupting(Decoder.decode, 3))
    code, out, err = cli.chat("What?", "And?", args=("--dense", "-q"))
    assert code == 0
    assert err.endswith("> \n")  # the shell's own prompt starts a line
    first, second = out.splitlines()
    assert first
    assert second
    assert "error" not in err


def test_chat_has_no_json(cli: Cli) -> None:
    code, out, err = cli.chat("What?", args=("--json",))
    assert (code, out) == (2, "")
    assert "give -p TEXT" in err


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals on this system")
def test_chat_on_a_real_terminal(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All three streams on a terminal: answer, the line before by the arrow key, Ctrl-C at the
    prompt; bars leave no text behind."""
    monkeypatch.setenv("TERM", "xterm")
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    child = running(files, "-v", str(files / "clip.mp4"), "-n", "4", "--max-new-tokens", "5",
                    stdin=slave, stdout=slave, stderr=slave, start_new_session=True)  # fmt: skip
    os.close(slave)
    seen = b""

    def until(mark: bytes, start: int = 0) -> None:
        nonlocal seen
        end = time.monotonic() + 60
        while mark not in seen[start:]:
            assert time.monotonic() < end, seen
            if select.select([master], [], [], 1)[0]:
                seen += os.read(master, 4096)

    until(b"> ")
    start = len(seen)
    os.write(master, b"What happens?\n")
    until(b"\n> ", start)
    assert b"prefill layers" in seen
    start = len(seen)
    os.write(master, b"\x1b[A\n")  # the arrow upwards: the line before, to be edited
    until(b"What happens?", start)
    until(b"\n> ", start)
    for _ in range(20):  # a signal between the prompt and the read that waits for a line is late
        child.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=1)
            break
    assert child.returncode == 130
    os.close(master)
    assert b"Traceback" not in seen
