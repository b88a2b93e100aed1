"""Speed and memory of the decoder; the same as `python -m lab.bench`, which explains itself."""

import sys

from lab.command import start

if __name__ == "__main__":
    sys.exit(start("lab.bench.cli"))
