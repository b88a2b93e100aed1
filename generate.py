"""The command in a clone: python generate.py -v clip.mp4 -p "What happens?"

The same program as `zipvl` and `python -m zipvl`; it stands in zipvl/cli.py.
"""

import sys

from zipvl.cli import main

if __name__ == "__main__":
    sys.exit(main())
