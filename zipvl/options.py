"""Options of a method as they are written: `name=value`."""

import inspect
from typing import Any

from .errors import UsageError


def parse(item: str, method: str) -> tuple[str, Any]:
    """`item` of the text `method` as a name and a number or text. Raises UsageError."""
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
