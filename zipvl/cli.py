"""The command: `zipvl`, `python -m zipvl` and generate.py are this program.

Answers and JSON go to stdout and nothing else does; progress, statistics and errors go to stderr.
Exit codes: 0, 1 input or model error, 2 usage, 3 out of memory, 130 Ctrl-C.

Nothing here imports torch before the command line is known to make sense, so that --help and usage
errors are quick: types are imported for checkers only, everything else where it is used.
"""

from __future__ import annotations

import argparse
import atexit
import json
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from . import __version__
from .errors import UsageError
from .report import (
    as_json,
    fault,
    headline,
    open_streams,
    plain,
    progress_lines,
    say,
    summary,
)
from .vision.source import seconds

if TYPE_CHECKING:
    from .engine.engine import Engine
    from .engine.inputs import Inputs
    from .engine.run import Result, Run
    from .engine.sampler import Sampling
    from .policy import Policy

REUSE = ("first", "general", "media", "none")  # as engine/session.py

Options = dict[str, list[tuple[str, Any, str]]]
# Every option: its names and what its value is called; its default, or what reads a value without
# one (False: a switch without a value, []: may be repeated); help.
OPTIONS: Options = {
    "what to ask": [
        ("-m --model MODEL", str, "checkpoint folder or hub id (default: bundled demo)"),
        ("-v --video FILE", [], "a video; may be repeated"),
        ("-i --image FILE", [], "a picture; may be repeated"),
        ("-p --prompt TEXT", str, "the question; - reads stdin; none on a terminal: chat"),
        ("--open FILE", str, "what --save kept, in place of -v and -i"),
        ("--save FILE", str, "keeps what was read, for later: FILE.zipvl"),
        ("--system TEXT", str, "system prompt"),
        ("--template NAME", str, "prompt template: a built-in name or a .jinja file"),
    ],
    "frames of a video": [
        ("-n --frames FRAMES", int, "how many, uniformly spread (mostly 32)"),
        ("--fps FPS", float, "frames a second instead; at most --frames if given"),
        ("--start TIME", seconds, "from here: seconds, mm:ss or hh:mm:ss"),
        ("--end TIME", seconds, "up to here"),
        ("--reader NAME", "pyav", "how videos are decoded: pyav (default) or decord"),
    ],
    "the answer": [
        ("--max-new-tokens N", 256, "at most so many (default 256)"),
        ("--temperature T", 0.0, "0: the likeliest token (default)"),
        ("--top-p P", 1.0, "likeliest tokens of total mass P (default 1)"),
        ("--top-k K", 0, "the K likeliest tokens; 0: all (default)"),
        ("--seed SEED", 0, "of the sampling (default 0)"),
    ],
    "which tokens to keep": [
        ("--method NAME", str, "zipvl (default); NAME:option=value; my_file.py:Class"),
        ("--compare LIST", str, "a table of methods: dense,zipvl,zipvl-stream"),
        ("--list-methods", False, "the names of the methods, a line each"),
        ("--dense", False, "same as --method dense"),
        ("--tau TAU", float, "share of attention kept (zipvl; default 0.975)"),
        ("--keep-ratio R", float, "share of tokens kept (methods with a ratio)"),
        ("--probe R+R", str, "probe rows, recent+random (zipvl; default 64+64)"),
        ("--kv-bits B", str, "cache bits: 4; or 4/2: all stay, some at 2 (zipvl)"),
        ("--reuse KIND", "first", "of a chat: chosen for the first question, or general"),
    ],
    "the machine": [
        ("--device DEVICE", "auto", "auto, cpu, cuda, cuda:1, mps (default auto)"),
        ("--dtype DTYPE", "auto", "bfloat16 (auto on CUDA, AMX CPUs), float32, float16"),
        ("--attn ATTN", "auto", "auto, sdpa, torch-flash, cudnn, flash-attn(-3)"),
        ("--weights KIND", "full", "packed, int8, int4: decode faster on a CPU"),
        ("--kernels KIND", "auto", "plain: none fused, no graph"),
    ],
    "what to print": [
        ("--stats", False, "seconds by stage and kept tokens by layer, on stderr"),
        ("--json", False, "one JSON object on stdout instead of text"),
        ("--report FILE", str, "a web page of what was kept, where and when: FILE.html"),
        ("-q --quiet", False, "nothing on stderr but errors"),
        ("--verbose", False, "a traceback with every error"),
    ],
}


class Help(argparse.HelpFormatter):
    def _format_action_invocation(self, action: argparse.Action) -> str:
        """As Python 3.13 does it: what a value is called stands there once."""
        value = f" {action.metavar}" if action.metavar else ""
        return ", ".join(action.option_strings) + value


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(plain(message))


def build_parser() -> argparse.ArgumentParser:
    called = Path(sys.argv[0]).name
    parser = Parser(
        prog="python -m zipvl" if called == "__main__.py" else called,
        usage="%(prog)s [-m MODEL] [-v FILE] [-i FILE] [-p TEXT] [options]\n"
        "       %(prog)s serve [options]    (the same over HTTP: docs/serve.md)",
        description="Ask a vision-language model about pictures and videos: "
        '%(prog)s -v clip.mp4 -p "What happens?"',
        allow_abbrev=False,
        formatter_class=Help,
    )
    add_options(parser, OPTIONS)
    parser.add_argument("--version", action="version", version=f"zipvl {__version__}")
    return parser


def add_options(parser: argparse.ArgumentParser, table: Options) -> None:
    """The rows of a table like OPTIONS, in their groups."""
    for title, rows in table.items():
        add = parser.add_argument_group(title).add_argument
        for names, value, text in rows:
            *flags, last = names.split()
            if value is False:
                add(*flags, last, action="store_true", help=text)
            elif value == []:
                add(*flags, metavar=last, action="append", default=value, help=text)
            elif callable(value):
                add(*flags, metavar=last, type=value, help=text)
            else:
                add(*flags, metavar=last, type=type(value), default=value, help=text)


def methods() -> dict[str, str]:
    """The built-in methods and the first line of what each says of itself; their files are read and
    not imported, as that takes torch."""
    files = sorted(Path(__file__).with_name("policies").glob("*.py"))
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    says = dict(re.findall(r'^class (\w+)\(\w+\):\n    """(.*?)(?:""")?$', text, re.M))
    return {name: says[kind] for name, kind in re.findall(r'^ {8}"(.+)": (\w+),$', text, re.M)}


def split_methods(text: str) -> list[str]:
    """`a:x=1,y=2,b` -> [`a:x=1,y=2`, `b`]: `y=2` is one more option of the method before."""
    return re.split(r",(?!\w+=)", text)


def check(a: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Faults of the command line that need no torch to be seen; reads a prompt from stdin.

    Puts the methods to run into `a.methods`, whether the user chose one into `a.chosen`.
    """
    choices = (a.method, a.tau, a.keep_ratio, a.probe, a.kv_bits)
    a.chosen = a.dense or any(choice is not None for choice in choices)
    if a.dense and any(choice is not None for choice in choices):
        parser.error(
            "--dense keeps every token in full precision: leave out --method, --tau, --keep-ratio, "
            "--probe and --kv-bits"
        )
    a.methods = ["dense" if a.dense else a.method or "zipvl"]
    if a.compare is not None:
        a.methods = split_methods(a.compare)
        if a.chosen:
            parser.error(
                "--compare names its methods and their options: leave out --dense, --method, "
                "--tau, --keep-ratio, --probe and --kv-bits, and write zipvl:tau=0.9"
            )
        if len(set(a.methods)) < max(2, len(a.methods)):
            parser.error(f"--compare {a.compare}: give two or more different methods, with commas")
    if a.prompt is None and (a.compare or a.report):
        parser.error("--compare and --report are for one question: give -p TEXT")
    if a.open and (a.video or a.image or a.system):
        parser.error("--open has media and system prompt in its file: leave out -v, -i, --system")
    if (a.open or a.save) and (a.compare or a.report):
        parser.error("--compare and --report read media anew: leave out --open and --save")
    if a.prompt is None and not sys.stdin.isatty():
        parser.error("no prompt: give -p TEXT, or -p - to read it from standard input")
    if a.prompt is None and a.json:
        parser.error("--json prints one answer and a chat has many: give -p TEXT")
    if a.kv_bits is not None and a.kv_bits.isdecimal():
        a.kv_bits = int(a.kv_bits)
    if a.probe is not None:
        if not re.fullmatch(r"\d+\+\d+", a.probe):
            parser.error(f"--probe {a.probe}: write recent+random, for example 64+64")
        recent, random = map(int, a.probe.split("+"))
        a.probe = {"recent": recent, "random": random}
    check_values(a)
    check_media(a)
    if a.prompt == "-":
        a.prompt = sys.stdin.read().strip()
    if a.prompt is not None:
        check_prompt(a)


def check_values(a: argparse.Namespace) -> None:
    """In the words of Run.steps, Sampling and load_policy, which see them later."""
    names = ", ".join(methods())
    for head in (method.partition(":")[0] for method in a.methods):
        own = head.endswith(".py")
        if own and not Path(head).is_file():
            raise UsageError(
                f"method file {head} does not exist: check the path before the first colon"
            )
        if not own and head not in methods():
            raise UsageError(f"unknown method {head!r}: use one of {names}, or my_file.py:Class")
    for valid, sentence in (
        (
            a.max_new_tokens >= 1,
            f"max_new_tokens is {a.max_new_tokens}: give a whole number from 1 on",
        ),
        (0 <= a.temperature < math.inf, f"temperature is {a.temperature}: give 0 (greedy) or more"),
        (0 < a.top_p <= 1, f"top_p is {a.top_p}: give a share above 0 and up to 1"),
        (a.top_k >= 0, f"top_k is {a.top_k}: give 0 (off) or more"),
        (a.reuse in REUSE, f"unknown reuse {a.reuse!r}: use one of {', '.join(REUSE)}"),
        (abs(a.seed) < 2**63, f"seed is {a.seed}: give a whole number of at most 63 bits"),
    ):
        if not valid:
            raise UsageError(sentence)


def check_media(a: argparse.Namespace) -> None:
    """What the files are, by their heads, what to take of a video, and where a page goes."""
    from .vision.source import check_image, local_file
    from .vision.video import READERS, sample

    sample((0.0,), a.frames, a.fps, a.start, a.end)  # has the sentences
    if a.reader not in READERS:
        raise UsageError(f"unknown reader {a.reader!r}: give {' or '.join(READERS)}")
    for path in a.video:
        local_file(path)
    for path in a.image:
        check_image(path)
    if a.report is not None:
        check_target("--report", a.report, (".html", ".htm"))
    if a.save is not None:
        check_target("--save", a.save, (".zipvl",))


def check_target(option: str, path: str, endings: tuple[str, ...]) -> None:
    """Only a file of the same kind is ever replaced: no video, no device, no pipe."""
    folder = os.path.join(os.path.dirname(path), ".")  # a file has no dot
    odd = os.path.exists(path) and not os.path.isfile(path)
    if odd or not os.access(folder, os.W_OK) or not path.lower().endswith(endings):
        kind = f"{'an' if endings[0] == '.html' else 'a'} {endings[0]}"
        raise UsageError(
            f"{option} {path} cannot be written: name {kind} file in a folder you may write to"
        )


def check_prompt(a: argparse.Namespace) -> None:
    """In the words of model/chat.py and engine/inputs.py."""
    if not a.prompt.strip():
        raise UsageError("the prompt is empty: give -p TEXT, or some text on standard input")
    if any("\ud800" <= letter <= "\udfff" for letter in a.prompt):
        raise UsageError("the prompt is not valid Unicode text: pass it as UTF-8")
    if a.open:
        return  # whose media are told when it is opened
    demo = a.model is None and not a.image and not a.video
    for kind, given in (("image", len(a.image)), ("video", len(a.video) or demo)):
        if (n := a.prompt.count(f"<{kind}>")) not in (0, given):
            raise UsageError(
                f"the prompt has {n} <{kind}> markers but {given:d} {kind}s were given"
            )


def run(a: argparse.Namespace) -> int:
    """Everything after the checks. Returns the exit code."""
    from .engine.load import demo_clip, load
    from .policies import load_policy

    options = {"tau": a.tau, "ratio": a.keep_ratio, "kv_bits": a.kv_bits, **(a.probe or {})}
    policies = [load_policy(method, **options) for method in a.methods]
    progress = not a.quiet and (sys.stderr.isatty() or progress_lines)
    engine = load(a.model, a.device, a.dtype, a.attn, a.template, progress, a.weights, a.kernels)
    if not (a.model or a.video or a.image or a.open):
        a.video = [str(demo_clip())]
    asker = Asker(engine, policies, a)
    if a.prompt is None or a.open or a.save:
        from .talk import Talk

        return Talk(engine, asker, a).run()
    return asker.ask(a.prompt)


@contextmanager
def abrupt() -> Iterator[None]:
    """Ctrl-C ends the process at once: amid an import an exception is lost, leaves halves of
    modules behind, or aborts C++. Another program's handler, and one that ignores it, stay."""
    usual = signal.getsignal(signal.SIGINT) in (signal.SIG_DFL, signal.default_int_handler)
    ours = usual and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def main(argv: list[str] | None = None) -> int:
    """The program with arguments `argv` (None: of this process). Returns the exit code."""
    a, words = argparse.Namespace(verbose=False), sys.argv[1:] if argv is None else argv
    try:
        open_streams()
        if words[:1] == ["serve"]:
            return import_module("zipvl.serve.app").main(words[1:])
        with abrupt():
            parser = build_parser()
            parser.parse_args(words, a)
            a.argv = words
            if a.list_methods:
                print("\n".join(f"{name:<17}{text}" for name, text in methods().items()))
                return 0
            check(a, parser)
            import_module("zipvl.engine.load")
            with suppress(ImportError):  # told where a video needs it
                import_module("av")
        return run(a)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our stdout has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as e:
        if a.verbose:
            raise
        try:
            code, sentence = fault(e)
            say("error: " + sentence)
            return code
        except MemoryError:  # nor is there enough for a sentence about it
            os.write(2, b"error: out of memory: give the process more\n")
            return 3
    finally:  # and it is silent while Python takes itself apart
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)


class Asker:
    """One engine and its options: asks one question, about media read for it."""

    def __init__(self, engine: Engine, policies: list[Policy], args: argparse.Namespace) -> None:
        self.engine, self.policies, self.args = engine, policies, args
        self.said: list[str] = []  # what the user knows of the setting

    def announce(self, inputs: Inputs, policies: list[Policy]) -> None:
        """Says what will run, and of a chat's prompts what changed."""
        if self.args.quiet:
            return
        setting = headline(self.engine, policies, inputs, short=self.args.prompt is None)
        warnings = [f"warning: {warning}" for warning in inputs.warnings]
        news = "; ".join(part for part in setting if part not in self.said)
        for line in (news, *(w for w in warnings if w not in self.said)):
            if line:
                say(line)
        self.said = setting + warnings

    def answer(self, inputs: Inputs, policy: Policy, silent: bool) -> Result:
        """follow() of a run of its own."""
        from .engine.run import Run

        return self.follow(Run(self.engine, [inputs], policy, self.sampling()), silent)

    def sampling(self) -> Sampling:
        from .engine.sampler import Sampling

        return Sampling(*(getattr(self.args, x) for x in ("temperature", "top_p", "top_k", "seed")))

    def follow(self, run: Run, silent: bool) -> Result:
        """Streams the answer of a run, or is `silent`. Where Ctrl-C ended it, finish_reason is
        "interrupted" and the statistics are those of what was done."""
        text, words = "", self.engine.chat.detokenizer()

        def show(piece: str) -> str:
            print("" if silent else piece, end="", flush=True)
            return piece

        try:
            for made in run.steps(self.args.max_new_tokens, ignore_eos=False):
                for _, token in made:
                    text += show(words.push(token))
            text += show(words.flush())
        except KeyboardInterrupt:
            run.reasons = ["interrupted"]
        show("\n")
        return replace(run.result(0), text=text)

    def ask(self, prompt: str) -> int:
        """One question; returns the exit code."""
        a = self.args
        frames: int | Literal["auto"] = a.frames or "auto"
        inputs = self.engine.prepare(
            prompt, a.image, a.video, frames, a.fps, a.start, a.end, a.system, a.reader
        )
        self.announce(inputs, self.policies)
        if a.compare or a.report:
            from .compare import study

            return study(a, self.engine, self.policies, self.answer, prompt, inputs)
        return self.tell(inputs, self.answer(inputs, self.policies[0], silent=a.json))

    def tell(self, inputs: Inputs, result: Result) -> int:
        """What the options want to know of an answer; the exit code."""
        a = self.args
        if a.json:
            print(json.dumps(as_json(self.engine, inputs, result, a.model, a.seed)), flush=True)
        if a.stats:
            say(summary(result.stats))
        return 130 if result.finish_reason == "interrupted" else 0
