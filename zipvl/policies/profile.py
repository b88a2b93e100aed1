"""Profiles of PrefixKV: the share of a prompt that each layer keeps, measured once, as JSON."""

import json
from pathlib import Path
from typing import Any

from ..config import read_json
from ..errors import ModelError, UsageError
from ..policy import View, check

FORMAT, VERSION = "zipvl-prefixkv", 1


def write_profile(path: Path, ratio: float, shares: list[float], **made: Any) -> None:
    """`shares`, one a layer, of a budget `ratio`; `made` says of what, for people only."""
    head = {"format": FORMAT, "version": VERSION, "ratio": ratio}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head | made | {"shares": shares}) + "\n", encoding="utf-8")


def read_profile(path: str, ratio: float) -> tuple[float, ...]:
    """The shares in a file of write_profile, made for this `ratio`. Raises ValueError as options
    do (policy.check)."""
    try:
        raw = read_json(Path(path))
    except ModelError:
        raise ValueError(f"profile {path} is no readable file of one JSON object") from None
    again = "make one with python -m lab.calibrate"
    kind, made = (raw.get("format"), raw.get("version")), f"{raw.get('ratio')!r:.20}"
    check(kind == (FORMAT, VERSION), f"profile {path} is not {FORMAT} version {VERSION}: {again}")
    given = raw.get("shares")
    shares = given if isinstance(given, list) and all(map(is_share, given)) else []
    check(bool(shares), f"profile {path} has no `shares` from 0 to 1, one for each layer: {again}")
    check(raw.get("ratio") == ratio, f"profile {path} is of ratio={made}: give it, not {ratio}")
    return tuple(map(float, shares))


def is_share(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x <= 1


def counted(shares: tuple[float, ...], view: View, path: str) -> int:
    """How many tokens a layer keeps. Raises UsageError where the model has other layers."""
    if len(shares) != view.num_layers:
        raise UsageError(
            f"profile {path} has {len(shares)} layers, and the model {view.num_layers}: make one "
            "of this model with python -m lab.calibrate"
        )
    return round(shares[view.layer] * view.length)
