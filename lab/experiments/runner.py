"""What every experiment shares: its arguments, records that outlive an interruption, its results.

OUT/records.jsonl is that of ../records.py: a second run continues where it ends.
OUT/result.json holds settings and rows and nothing that changes from run to run; when and where it
was made is in OUT/run.json.
"""

import os
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from zipvl.engine.engine import Engine
from zipvl.engine.load import load
from zipvl.policies import load_policy
from zipvl.policy import Policy

from ..raw import rounded, write_json
from ..records import Record, measured

OURS = ("ideas.py", "controls.py")


def policy(method: str) -> Policy:
    """load_policy, for which `ideas.py:X` and `controls.py:X` are files beside this one."""
    file, _, rest = method.partition(":")
    return load_policy(f"{Path(__file__).with_name(file)}:{rest}" if file in OURS else method)


@dataclass
class Job:
    """One run of one experiment."""

    name: str
    out: Path
    model: str | None = None  # None: the bundled demo model
    samples: int = 40
    seed: int = 0
    methods: tuple[str, ...] = ()  # instead of the experiment's own
    frames: tuple[int, ...] = (16, 64)
    tokens: tuple[int, ...] = (1024,)  # prompt lengths of text experiments
    device: str = "auto"
    began: float = field(default_factory=time.time)
    loaded: list[Engine] = field(default_factory=list)

    @property
    def engine(self) -> Engine:
        if not self.loaded:
            self.loaded.append(load(self.model, device=self.device))
        return self.loaded[0]

    def settings(self) -> Record:
        """What the records of a folder must have in common."""
        name = Path(self.model).name if self.model else "demo"
        return {"experiment": self.name, "model": name, "seed": self.seed,
                "frames": list(self.frames), "tokens": list(self.tokens)}  # fmt: skip

    def records(
        self,
        units: Iterable[str],
        methods: Iterable[str],
        prepare: Callable[[list[str]], Any],
        measure: Callable[[Any, str], list[Record]],
        chunk: int = 1,
    ) -> list[Record]:
        """records.measured, in OUT/records.jsonl."""
        path = self.out / "records.jsonl"
        return measured(path, self.settings(), units, methods, prepare, measure, chunk)

    def finish(
        self,
        rows: list[Record],
        columns: dict[str, str],
        timing: Record | None = None,
        **more: Any,
    ) -> None:
        """Writes result.json, table.md and run.json (with `timing`), and prints the table."""
        result = {"settings": self.settings() | {"samples": self.samples}, "rows": rows} | more
        write_json(self.out / "result.json", rounded(result))
        text = table(rows, columns)
        (self.out / "table.md").write_text(text, encoding="utf-8")
        print(text, end="")
        where = {"finished": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
                 "session_seconds": round(time.time() - self.began), "torch": torch.__version__,
                 "device": str(self.engine.model.device), "threads": torch.get_num_threads(),
                 "processor": processor(), "cores": os.cpu_count()} | (timing or {})  # fmt: skip
        write_json(self.out / "run.json", where)


def processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(": ")[1] for x in lines if x.startswith("model name")), platform.machine())


def table(rows: list[Record], columns: dict[str, str]) -> str:
    """Markdown; `columns` gives each key a heading; {value, low, high} shows its interval."""
    lines = [f"| {' | '.join(columns.values())} |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(cell(r.get(key)) for key in columns) + " |" for r in rows]
    return "\n".join(lines) + "\n"


def cell(value: Any) -> str:
    if isinstance(value, dict):
        low, high = value["low"], value["high"]
        inside = "" if low is None or low != low else f" ({low:.3g} to {high:.3g})"
        return f"{value['value']:.3g}{inside}"
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else str(value).replace("|", "\\|")
