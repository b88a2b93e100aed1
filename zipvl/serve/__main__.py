"""`python -m zipvl.serve`: the command of app.py."""

import sys

from ..report import open_streams
from .app import main

if __name__ == "__main__":
    open_streams()
    sys.exit(main())
