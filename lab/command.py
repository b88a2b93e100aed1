"""How the commands of the lab begin, read their arguments and end: as generate.py does."""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from typing import NoReturn

from zipvl.errors import UsageError, ZipvlError, memory_errors

MAX_WHOLE = 2**53  # as of a method's options
INTERRUPTED = 130  # what a shell calls a command that Ctrl-C ended


def start(module: str) -> int:
    """main() of `module`. While that is imported Ctrl-C ends the process at once: an exception in
    the middle of a compiled import comes out as any other, or not at all."""
    ours = signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    main = import_module(module).main
    signal.signal(signal.SIGINT, ours)
    return main()


def ended(run: Callable[[], object]) -> int:
    """The exit code of a command that does `run`; an error is one sentence on stderr."""
    try:
        import torch

        with memory_errors(torch.device("cpu"), "measuring", "ask for less at a time"):
            run()
    except KeyboardInterrupt:
        return INTERRUPTED
    except ZipvlError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.code
    except OSError as e:  # a folder that cannot be written, a file that is none
        print(f"error: {e.filename or 'file'}: {e.strerror or e}", file=sys.stderr)
        return ZipvlError.code
    return 0


class Parser(argparse.ArgumentParser):
    """Help as it is written; a mistake is a UsageError and not the whole usage again."""

    def __init__(self, description: str | None, prog: str | None = None, epilog: str | None = None):
        super().__init__(prog, description=description, epilog=epilog,
                         formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}: --help lists all")


def count(text: str) -> int:
    """A whole number of 1 or more, as argparse's `type`."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number above 0")
    return int(text)


def seed(text: str) -> int:
    """A whole number from 0 on that every generator takes."""
    if not (text.isdecimal() and int(text) < MAX_WHOLE):
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number from 0 on, below 2^53")
    return int(text)


def counts(text: str) -> list[int]:
    """`16,64` as numbers of 1 or more."""
    try:
        return [count(n) for n in text.split(",")]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give whole numbers above 0, as in 16,64"
        ) from None


def shares(text: str) -> list[float]:
    """`1,0.3` as numbers above 0, at most 1."""
    try:
        found = [float(n) for n in text.split(",")]
    except ValueError:
        found = [0.0]
    if not all(0 < n <= 1 for n in found):
        raise argparse.ArgumentTypeError(f"{text!r}: give shares above 0 up to 1, as in 1,0.3")
    return found
