"""The command in a clone: python generate.py -v clip.mp4 -p "What happens?"

The same program as `zipvl` and `python -m zipvl`; it stands in zipvl/cli.py.
"""

import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is silent here, too; main() knows better

from zipvl.cli import main

if __name__ == "__main__":
    sys.exit(main())
