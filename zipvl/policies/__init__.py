"""The methods by name, and what a text names: `zipvl:tau=0.96`, `my.py:Class:ratio=0.3`."""

import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..policy import Policy
from .fastv import FastV
from .h2o import H2O
from .kivi import KIVI
from .snapkv import SnapKV
from .streaming import StreamingLLM
from .zipcache import ZipCache
from .zipvl import Fixed, Random, ZipVL, ZipVLPlus, ZipVLQuant


class Dense(Policy):
    """Every token attends, stays and goes on: what the base class does, the baseline by name."""


METHODS: dict[str, type[Policy]] = {
    "dense": Dense,
    "zipvl": ZipVL,
    "zipvl+": ZipVLPlus,
    "fixed": Fixed,
    "random": Random,
    "fastv": FastV,
    "streaming": StreamingLLM,
    "h2o": H2O,
    "snapkv": SnapKV,
    "zipvl-quant": ZipVLQuant,
    "zipcache": ZipCache,
    "kivi": KIVI,
}


def load_policy(method: str | Policy, **options: Any) -> Policy:
    """`zipvl`, `zipvl:tau=0.96,recent=32`, `my.py:Class`, `my.py:Class:tau=0.9`, or a Policy.

    `options` override what the text says; those that are None count as not given.
    Raises UsageError that lists the valid names or options.
    """
    if isinstance(method, Policy):
        return method
    head, _, tail = method.partition(":")
    if head.endswith(".py"):
        name, _, tail = tail.partition(":")
        cls = from_file(Path(head), name)
    elif head in METHODS:
        cls = METHODS[head]
    else:
        raise UsageError(
            f"unknown method {head!r}: use one of {', '.join(METHODS)}, or my_file.py:Class"
        )
    given = dict(parse(item, method) for item in tail.split(",") if item)
    given |= {k: v for k, v in options.items() if v is not None}
    valid = inspect.signature(cls).parameters
    if unknown := given.keys() - valid.keys():
        listed = ", ".join(f"{p.name}={p.default}" for p in valid.values()) or "none"
        raise UsageError(f"method {head!r} has no option {min(unknown)!r}: it takes {listed}")
    try:
        return cls(**{name: fit(value, valid[name]) for name, value in given.items()})
    except (TypeError, ValueError) as e:
        raise UsageError(f"method {method!r}: {e}") from None


def parse(item: str, method: str) -> tuple[str, Any]:
    """`option=value` of the text `method` as a name and a number or text. Raises UsageError."""
    key, equals, value = item.partition("=")
    if not equals:
        raise UsageError(f"method {method!r}: {item!r} is not of the form option=value")
    for kind in (int, float):
        try:
            return key.strip(), kind(value)
        except ValueError:
            pass
    return key.strip(), value.strip()


def fit(value: Any, option: inspect.Parameter) -> Any:
    """`value` if it is of the kind of the option's default; a whole number also fits a float."""
    wanted = {int: "a whole number", float: "a number", str: "a name"}.get(type(option.default))
    if wanted is None or isinstance(value, type(option.default)):
        return value
    if isinstance(option.default, float) and isinstance(value, int):
        return float(value)
    raise ValueError(f"{option.name} is {value!r}: give {wanted}, such as {option.default}")


def from_file(path: Path, name: str) -> type[Policy]:
    """The method `name` of a user's own file. Raises UsageError."""
    if not path.is_file():
        raise UsageError(
            f"method file {path} does not exist: check the path before the first colon"
        )
    spec = importlib.util.spec_from_file_location(f"zipvl_method_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as e:  # the user's own file: any mistake in it ends up here
        why = f"{type(e).__name__}: {e}"
        raise UsageError(f"method file {path} cannot be imported ({why}): correct it") from None
    classes = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Policy)]
    found = {c.__name__: c for c in classes if c.__module__ == module.__name__}
    if name not in found:
        known = f"it has {', '.join(found)}" if found else "it has no Policy class"
        raise UsageError(
            f"method file {path} has no method {name!r}: {known}; write {path}:ClassName"
        )
    return found[name]
