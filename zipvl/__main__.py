"""`python -m zipvl`: the command of cli.py."""

import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is silent here, too; main() knows better

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
