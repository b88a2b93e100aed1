"""Measurements that outlive an interruption: a file that grows by a line, and is read first.

The first line holds the settings, every other one a record of one unit (a question, a window of
text) and one method. A second run with the same settings measures only what is missing.
"""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from zipvl.errors import UsageError

from .raw import rounded

Record = dict[str, Any]


def measured(
    path: Path,
    settings: Record,
    units: Iterable[str],
    methods: Iterable[str],
    prepare: Callable[[list[str]], Any],
    measure: Callable[[Any, str], list[Record]],
    chunk: int = 1,
) -> list[Record]:
    """A record for every unit and method, those in `path` first; `prepare` makes `chunk` units
    ready, `measure` gives a record for each of them."""
    methods, units = list(methods), list(units)
    done = {(r["unit"], r["method"]): r for r in earlier(path, settings)}
    chunks = [units[i : i + chunk] for i in range(0, len(units), chunk)]
    work = [(some, [m for m in methods if any((u, m) not in done for u in some)])
            for some in chunks]  # fmt: skip
    total = sum(len(some) * len(missing) for some, missing in work)
    with (
        path.open("a", encoding="utf-8") as file,
        tqdm(total=total, unit="answer", disable=not sys.stderr.isatty()) as bar,
    ):
        for some, missing in work:
            ready = prepare(some) if missing else None
            for method in missing:
                for unit, found in zip(some, measure(ready, method), strict=True):
                    record = rounded({"unit": unit, "method": method} | found)
                    done[unit, method] = record
                    file.write(json.dumps(record) + "\n")
                file.flush()
                bar.update(len(some))
    return [done[u, m] for u in units for m in methods]


def earlier(path: Path, settings: Record) -> list[Record]:
    """Records of an interrupted run; a last line that it could not end is cut off. UsageError if
    they belong to another run, or if a line is no record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole, end, _ = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
    found = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            record = json.loads(line)
            if number > 1:
                record["unit"], record["method"]
        except (ValueError, TypeError, KeyError):
            raise UsageError(
                f"{path}: line {number} is damaged: delete that line, or the file"
            ) from None
        found.append(record)
    if found and found[0] != settings:
        raise UsageError(f"{path} belongs to a run with other settings: give another --out")
    with path.open("ab") as file:
        file.truncate(len(whole + end))
        if not found:
            file.write(json.dumps(settings).encode() + b"\n")
    return found[1:]
