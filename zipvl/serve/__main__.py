"""`python -m zipvl.serve`: the command of app.py."""

import sys

from .app import main

if __name__ == "__main__":
    sys.exit(main())
