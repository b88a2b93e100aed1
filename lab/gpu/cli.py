"""One command for whoever has a card: the gpu tests, prefill, decode, memory, next to the paper.

    python -m lab.gpu                          # all of it
    python -m lab.gpu --only decode --again    # these rows once more
    python -m lab.gpu --dry                    # the same code on a CPU, with a tiny model

Writes gpu.json after every row, table.md and figures. What is there from the same card, torch and
sizes is not measured again, so a run that ended early goes on where it stopped.
"""

import argparse
import gc
import json
import os
import subprocess
import time
from importlib.metadata import distributions
from pathlib import Path

import torch

from zipvl.errors import UsageError, ZipvlError

from ..bench.model import Model
from ..bench.timing import Row
from ..command import Parser, ended
from ..raw import rounded, write_json
from .jobs import DRY, Bench, Job, Size, said
from .roofline import Ceilings, measure_ceilings
from .show import figures, line, table

KINDS = ("tests", "prefill", "decode", "extend", "memory")
DRIVER = "nvidia-smi --query-gpu=driver_version --format=csv,noheader"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__, "python -m lab.gpu")
    add = parser.add_argument
    add("--dry", action="store_true", help="on a CPU, tiny: its figures mean nothing")
    add("--out", type=Path, help="default lab/results/gpu; dry: build/gpu-dry")
    add("--only", type=lambda text: text.split(","), default=[*KINDS], help=", ".join(KINDS))
    add("--no-tests", action="store_true", help="leave out pytest -m gpu")
    add("--minutes", type=float, default=9.0, help="after which no job begins")
    add("--again", action="store_true", help="measure what is there, too")
    args = parser.parse_args(argv)
    if unknown := {*args.only} - {*KINDS}:
        raise UsageError(f"--only: {min(unknown)!r}: give some of {', '.join(KINDS)}")
    args.only = [kind for kind in args.only if kind != "tests" or not args.no_tests]
    args.out = args.out or Path("build/gpu-dry" if args.dry else "lab/results/gpu")
    return args


def environment(size: Size) -> Row:
    """The card, what drives it, its ceilings, and which attention kernel runs."""
    cuda = size.device == "cuda"
    top = measure_ceilings(torch.device(size.device), size.dtype)
    return {
        "card": torch.cuda.get_device_name() if cuda else "a CPU, dry run",
        "capability": ".".join(map(str, torch.cuda.get_device_capability())) if cuda else None,
        "memory": torch.cuda.mem_get_info()[1] if cuda else None,
        "driver": subprocess.getoutput(DRIVER).partition("\n")[0] if cuda else None,
        "torch": torch.__version__, "cuda": torch.version.cuda,
        "triton": next((d.version for d in distributions(name="triton")), None),
        "kernels": Model(size.shape, size.device, size.dtype, "auto", 1).backend,
        "shape": size.shape, "dtype": str(size.dtype).removeprefix("torch."),
        "date": time.strftime("%Y-%m-%d"), **top._asdict(),
    }  # fmt: skip


class Log:
    """gpu.json as it grows."""

    def __init__(self, folder: Path, size: Size):
        self.path, self.start = folder / "gpu.json", time.monotonic()
        held = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        self.rows: list[Row] = held.get("rows", [])
        self.env = environment(size)
        self.say(", ".join(f"{key} {value}" for key, value in self.env.items()))
        self.write()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:6.1f} s] {text}", flush=True)

    def here(self) -> list[Row]:
        """The rows of this card."""
        return [row for row in self.rows if row["card"] == self.env["card"]]

    def has(self, job: Job) -> int:
        """How much of it there is: all of its rows 2, some of them errors 1, or 0."""
        rows = [r for r in self.here() if r["key"] in job.keys and r["settings"] == job.settings]
        return (len(rows) == len(job.keys)) * (1 if any("error" in row for row in rows) else 2)

    def add(self, job: Job, row: Row) -> None:
        """In the place of an earlier one of its name."""
        row = {"bench": job.kind, **row, "card": self.env["card"], "settings": job.settings}
        name = row["key"], row["card"]
        self.rows = [r for r in self.rows if (r["key"], r["card"]) != name] + [rounded(row, 9)]
        self.say(line(row))
        self.write()

    def write(self) -> None:
        """Whole or not at all."""
        part = self.path.with_suffix(".part")
        write_json(part, {"env": rounded(self.env, 3), "rows": self.rows})
        os.replace(part, self.path)

    def show(self) -> None:
        folder, rows = self.path.parent, self.here()
        (folder / "table.md").write_text(table(self.env, rows), encoding="utf-8")
        figures(self.env, rows, folder)


def measure(bench: Bench, log: Log, job: Job) -> None:
    """All rows of a job; what raises is a row, too."""
    left = dict.fromkeys(job.keys)
    try:
        for row in job.rows():
            left.pop(row["key"])
            log.add(job, row)
    except Exception as e:
        for key in left:
            log.add(job, {"key": key, "error": said(e)})
    try:
        bench.free()
    except RuntimeError as e:  # an illegal address ends every later call of this process
        raise ZipvlError(f"the card is lost ({said(e)}): run it again to go on") from None


@torch.inference_mode()
def run(args: argparse.Namespace) -> None:
    if not (args.dry or torch.cuda.is_available()):
        raise UsageError("there is no CUDA device here: --dry runs the same code on a CPU, tiny")
    size = DRY if args.dry else Size()
    torch.manual_seed(0)
    log = Log(args.out, size)
    bench = Bench(size, log.env["kernels"], Ceilings(log.env["bandwidth"], log.env["peak"]))
    jobs = [j for j in bench.jobs() if j.kind in args.only and (args.again or log.has(j) < 2)]
    jobs.sort(key=log.has)  # what failed last time comes last
    gc.freeze()  # what is imported: each collection would walk over it
    kind = ""
    try:
        while jobs and time.monotonic() - log.start < 60 * args.minutes:
            job = jobs.pop(0)
            if job.kind != kind:
                bench.clear()  # the models of another kind
            kind = job.kind
            measure(bench, log, job)
    finally:
        gc.unfreeze()
        log.show()
    if jobs:
        left = [key for job in jobs for key in job.keys]
        log.say(f"{args.minutes:g} minutes are over, {len(left)} rows are left: {', '.join(left)}")
    if wrong := [row["key"] for row in log.here() if "error" in row]:
        raise ZipvlError(f"{len(wrong)} rows failed ({', '.join(wrong)}): see {log.path}")


def main(argv: list[str] | None = None) -> int:
    return ended(lambda: run(parse(argv)))
