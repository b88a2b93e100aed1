"""Raw figures as JSON that git can compare: one row a line."""

import json
from pathlib import Path
from typing import Any


def write_json(path: Path, report: dict[str, Any]) -> None:
    """`report` as a line for each key, and for each item where a key's value is a list of objects;
    makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(spread(report) + "\n", encoding="utf-8")


def rounded(value: Any, digits: int = 6) -> Any:
    """JSON data with its floats cut, NaN as None."""
    if isinstance(value, dict):
        return {k: rounded(v, digits) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v, digits) for v in value]
    if isinstance(value, float):
        return None if value != value else round(value, digits)
    return value


def spread(part: dict[str, Any]) -> str:
    fields = (f"{json.dumps(key)}: {lines(value)}" for key, value in part.items())
    return "{\n" + ",\n".join(fields) + "\n}"


def lines(value: Any) -> str:
    """A list of objects by item, an object that holds such a list by key, the rest on one line."""
    if is_table(value):
        return "[\n" + ",\n".join(map(compact, value)) + "\n]"
    if isinstance(value, dict) and any(map(is_table, value.values())):
        return spread(value)
    return compact(value)


def compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def is_table(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)
