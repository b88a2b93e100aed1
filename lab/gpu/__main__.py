"""`python -m lab.gpu`: the command of cli.py."""

import sys

from ..command import start

if __name__ == "__main__":
    sys.exit(start("lab.gpu.cli"))
