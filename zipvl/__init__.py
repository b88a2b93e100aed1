"""zipvl: the reference engine of ZipVL (arXiv 2410.08584) for LLaVA, InternVL and Qwen-VL.

All names but the errors load on first use: the engine imports torch, which takes seconds, and
neither `zipvl --help` nor a mistyped option should wait for it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .errors import MediaError, ModelError, OutOfMemory, UsageError, ZipvlError

__version__ = "0.1.0"
__all__ = [
    "Engine", "Inputs", "MediaError", "ModelError", "OutOfMemory", "Piece", "Plan", "Policy",
    "Result", "StepView", "UsageError", "View", "ZipvlError", "demo_clip", "load", "load_policy",
]  # fmt: skip

if TYPE_CHECKING:  # what type checkers and editors read
    from .engine.engine import Engine
    from .engine.inputs import Inputs
    from .engine.load import demo_clip, load
    from .engine.run import Piece, Result
    from .policies import load_policy
    from .policy import Plan, Policy, StepView, View
else:  # what Python does (PEP 562): a public name is that of the first home that has it
    _HOMES = ("policy", "policies", "engine.engine", "engine.load")

    def __getattr__(name: str) -> object:
        for home in _HOMES if name in __all__ else ():
            module = import_module(f".{home}", __name__)
            if hasattr(module, name):
                return getattr(module, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
