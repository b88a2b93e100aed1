"""`python -m zipvl.lmms ...` is `python -m lmms_eval ...` that surely knows the model zipvl.

lmms-eval reads the entry points of all packages in one attempt: the first plugin that fails takes
those behind it away. Here the model is registered directly.
"""

import sys
from importlib.util import find_spec

from ..report import say
from . import manifest


def main() -> int:
    """The command; the exit code is lmms-eval's."""
    if find_spec("lmms_eval") is None:
        say(
            "error: lmms-eval is not installed: make an environment of its own (python -m venv "
            "lmms), install zipvl there and pip install lmms-eval 'filelock<4'; docs/evaluate.md"
        )
        return 1
    from lmms_eval.cli.dispatch import main as evaluate
    from lmms_eval.models import MODEL_REGISTRY_V2

    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
    evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
