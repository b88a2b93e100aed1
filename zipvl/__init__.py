"""zipvl: the reference engine of ZipVL (arXiv 2410.08584) for LLaVA-family models."""

from .engine.engine import Engine, Piece
from .engine.inputs import Inputs
from .engine.load import demo_clip, load
from .engine.run import Result
from .errors import MediaError, ModelError, OutOfMemory, UsageError, ZipvlError
from .policy import Plan, Policy, View, load_policy

__version__ = "0.1.0"
__all__ = [
    "Engine", "Inputs", "MediaError", "ModelError", "OutOfMemory", "Piece", "Plan", "Policy",
    "Result", "UsageError", "View", "ZipvlError", "demo_clip", "load", "load_policy",
]  # fmt: skip
