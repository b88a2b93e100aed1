"""`python -m lab.eval`: the command of cli.py."""

import sys

from ..command import start

if __name__ == "__main__":
    sys.exit(start("lab.eval.cli"))
