"""What is measured, the most important first; each job gives the rows of one prompt length or case.

All weights are random, in the shapes of real models (lab/bench/model.py).
"""

import gc
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import cast

import torch

from zipvl.engine.engine import Step
from zipvl.engine.speed import GraphStep, StaticStep
from zipvl.engine.stats import LayerStats, peak_memory, restart_peak
from zipvl.policies import load_policy
from zipvl.policy import Policy

from ..bench.benches import our_steps
from ..bench.kv_memory import layer_bytes
from ..bench.kv_memory import steps as quantised_steps
from ..bench.memory import ROOT
from ..bench.model import Model
from ..bench.timing import Row, timed
from ..experiments.controls import Schedule
from .roofline import Ceilings, allowed, prefill_floor

# What zipvl-stream kept of clips of 64 frames, from the first layer to the last (docs/speed.md).
CURVE = (0.731, 0.600, 0.496, 0.415, 0.342, 0.268, 0.216, 0.172)
FLASH = "dense, FA2"  # FlashAttention-2, which the paper compares with
RUNS = ["dense", "fixed 0.5", "fixed 0.3", "stream"]
BITS = "fixed:ratio=0.3,kv_bits=4/2"
ROOM = 16  # new tokens
BLOCKS = 4  # of decode steps, each timed
ROOMY = 32 * 2**30  # bytes with which all layers of a 7B model take 64k tokens
Steps = Callable[[int, int], object]
PYTEST = [sys.executable, "-m", "pytest", "-o", "addopts=-q", "-m", "gpu"]


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    shape: str = "longva-7b"
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    flash: str = "torch-flash"
    lengths: tuple[int, ...] = (65536, 16384, 131072, 8192, 32768, 200_000)
    depth: int = 28  # layers, up to `whole` tokens, and
    whole: int = 16384
    few: int = 6  # above
    seconds: float = 6.0  # a row of prefill
    contexts: tuple[int, ...] = (8192, 2048, 32768, 131072)
    batches: tuple[int, ...] = (1, 8, 32)
    many_heads: str = "llava-next-13b"
    cache: int = 24 * 2**30  # bytes of the caches that are compared at equal memory
    free: int | None = None  # bytes; None: what the card says
    tests: float = 200.0  # seconds at most


DRY = Size("tiny", "cpu", torch.float32, "sdpa", (256, 128, 512, 64), 4, 128, 3, 0.05,
           (256, 64), (1, 2, 32), "tiny-384", 2**21, 2**23)  # fmt: skip


@dataclass(frozen=True)
class Job:
    kind: str
    settings: str
    keys: list[str]
    rows: Callable[[], Iterator[Row]]


def curve(layers: int, depth: int) -> list[float]:
    """CURVE for `layers` layers that stand for `depth`: all but the last spread over all but the
    last, whose own work is one row."""

    def at(layer: float) -> float:
        x = min(max((layer + 0.5) / depth * len(CURVE) - 0.5, 0), len(CURVE) - 1)
        low = min(int(x), len(CURVE) - 2)
        return CURVE[low] + (x - low) * (CURVE[low + 1] - CURVE[low])

    inner = [at((i + 0.5) / (layers - 1) * (depth - 1) - 0.5) for i in range(layers - 1)]
    return [round(share, 4) for share in (*inner, at(depth - 1))]


def said(e: Exception) -> str:
    return f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"[:300]


def release(device: torch.device) -> None:
    """Memory of what is gone, graphs too, back to the card."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Bench:
    """Makes the models and measures the rows."""

    def __init__(self, size: Size, kernel: str, top: Ceilings):
        self.size, self.kernel, self.top = size, kernel, top
        self.device = torch.device(size.device)
        self.item = size.dtype.itemsize
        self.models: dict[tuple[str, int | None], Model] = {}

    def model(self, shape: str, layers: int | None) -> Model:
        """Held until another shape is asked for, or clear()."""
        if any(held != shape for held, _ in self.models):
            self.clear()
        if (shape, layers) not in self.models:
            made = Model(shape, str(self.device), self.size.dtype, "auto", layers)
            self.models[shape, layers] = made
        return self.models[shape, layers]

    def clear(self) -> None:
        self.models.clear()
        release(self.device)

    def jobs(self) -> Iterator[Job]:
        s, first = self.size, self.size.contexts[0]
        about = f"{s.shape}, {s.dtype}, torch {torch.__version__}"
        yield Job("tests", about, ["tests"], self.tests)
        runs = [FLASH] * (self.kernel != s.flash or s.device == "cpu") + RUNS
        for n in s.lengths:
            layers = s.depth if n <= s.whole else s.few
            kept = ", ".join(map(str, (layers, "layers", *CURVE)))
            keys = [f"prefill {n} {run}" for run in runs]
            yield Job("prefill", f"{about}, {kept}", keys, partial(self.prefill, n, layers, runs))
        for n in s.contexts:
            for batch, ratio, way in product(s.batches, (1.0, 0.3), ("graph", "eager")):
                key = f"decode {n} x {batch} ratio {ratio:g}, {way}"
                yield Job("decode", about, [key], partial(self.decode, n, batch, ratio, way))
            if n == first:
                yield Job("decode", about, [f"decode {n} bits"], partial(self.bits, n))
        keys = ["decode equal memory 1", "decode equal memory 0.3"]
        yield Job("decode", f"{about}, {s.cache} bytes", keys, partial(self.equal, first))
        yield Job("memory", about, ["memory dense", "memory fixed 0.3"], self.memory)

    # --- the gpu tests ---

    def tests(self) -> Iterator[Row]:
        """pytest -m gpu in a process of its own."""
        done = subprocess.run(PYTEST, cwd=ROOT, capture_output=True, text=True, check=False,
                              timeout=self.size.tests)  # fmt: skip
        tail = (done.stdout + done.stderr).strip().splitlines()[-20:] or ["it said nothing"]
        counts = {
            what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped)", tail[-1])
        }
        wrong = {"error": f"pytest -m gpu: {tail[-1]}"} if done.returncode not in (0, 5) else {}
        yield {"key": "tests", "passed": 0, "failed": 0, **counts, "tail": tail, **wrong}  # 5: none

    # --- prefill ---

    def prefill(self, tokens: int, layers: int, runs: list[str]) -> Iterator[Row]:
        """Seconds to the last token's logits, caches included, all runs in turn."""
        model = self.model(self.size.shape, layers)
        kept = "/".join(map(str, curve(layers, self.size.depth)))
        methods: dict[str, Policy] = {
            FLASH: load_policy("dense"), "dense": load_policy("dense"),
            "fixed 0.5": load_policy("fixed:ratio=0.5"), "fixed 0.3": load_policy("fixed:ratio=0.3"),
            "stream": Schedule(kept=kept, recent=32, random=32),
        }  # fmt: skip
        ids = torch.randint(model.config.vocab_size, (tokens,), device=self.device)
        last: dict[str, tuple[list[LayerStats], int]] = {}

        def work(run: str, behind: Model) -> None:
            out = behind.prefill(ids, methods[run], ROOM)[1]
            last[run] = out.layers, sum(cache.nbytes for cache in out.caches)

        behind = {run: model.attending(self.size.flash) if run == FLASH else model for run in runs}
        seconds, failed = self.turns({run: partial(work, run, behind[run]) for run in runs})
        for run in runs:
            row: Row = {"key": f"prefill {tokens} {run}", "run": run, "tokens": tokens, "batch": 1,
                        "layers": layers, "attention": behind[run].backend}  # fmt: skip
            if run in failed:
                yield row | {"error": failed[run]}
                continue
            row |= {"seconds": seconds[run]} | self.details(model, seconds[run], *last[run])
            for base in ("dense", FLASH):
                if base != run and base in seconds:
                    pairs = zip(seconds[base], seconds[run], strict=True)
                    row[f"over {base}"] = statistics.median(b / s for b, s in pairs)
            if run not in (FLASH, "dense") and "dense" in seconds:
                spent, both = statistics.median(seconds["dense"]), (last["dense"][0], last[run][0])
                row["allowed"] = allowed(spent, *both, model.config, self.item, self.top)
            yield row

    def turns(
        self, runs: dict[str, Callable[[], object]]
    ) -> tuple[dict[str, list[float]], dict[str, str]]:
        """Seconds of each run, in turn after a warm-up, and what those that failed said."""
        failed: dict[str, str] = {}
        warm: dict[str, float] = {}
        for name, run in runs.items():
            try:
                warm[name] = timed(self.device, "wall", run)
            except Exception as e:  # one method's failure is not the others'
                failed[name] = said(e)
            release(self.device)
        repeats = int(self.size.seconds * len(warm) / max(1e-9, sum(warm.values()))) - 1
        seconds: dict[str, list[float]] = {name: [] for name in warm}
        for _ in range(min(max(repeats, 1), 7)):
            for name in warm:
                seconds[name].append(timed(self.device, "wall", runs[name]))
        return seconds, failed

    def details(
        self, model: Model, seconds: list[float], layers: list[LayerStats], kv_bytes: int
    ) -> Row:
        """The roofline, the stages of the last run, and what all layers of the shape would take:
        of the last layer a prefill computes one row, so layers that are left out are whole ones."""
        spent, L, depth = statistics.median(seconds), len(layers), self.size.depth
        stages: dict[str, float] = {}
        for layer in layers:
            for stage, value in layer.seconds.items():
                stages[stage] = stages.get(stage, 0.0) + value
        each = [sum(layer.seconds.values()) for layer in layers]
        whole = statistics.mean(each[:-1])
        floor = prefill_floor(layers, model.config, self.item, self.top)
        return {
            "stages": stages, "ratio": statistics.mean(x.attended[0] for x in layers)
            / layers[0].tokens[0], "kv_bytes": kv_bytes, "floor": floor, "share": floor / spent,
            "seconds_per_layer": spent * whole / sum(each),
            "seconds_all_layers": spent * (1 + (depth - L) * whole / sum(each)),
        }  # fmt: skip

    # --- decode ---

    def free(self) -> int:
        release(self.device)
        return self.size.free or torch.cuda.mem_get_info(self.device)[0]

    def decode(self, tokens: int, batch: int, ratio: float, way: str) -> Iterator[Row]:
        model, run = self.model(self.size.shape, self.size.depth), f"ratio {ratio:g}, {way}"
        row = self.decoded(model, tokens, batch, max(1, int(ratio * tokens)), way)
        yield {"key": f"decode {tokens} x {batch} {run}", "run": run, "ratio": ratio, **row}

    def decoded(self, model: Model, tokens: int, batch: int, slots: int, way: str) -> Row:
        """Greedy steps over random caches of `slots` places a sequence; what does not fit is left
        out with a word."""
        c, row = model.config, {"tokens": tokens, "batch": batch, "slots": slots}
        slot = 2 * c.num_kv_heads * c.head_dim * self.item
        places = batch * (slots + ROOM + 2) * (slot + 4 * c.num_kv_heads)  # and their positions
        need, free = (c.num_layers + 2) * places, self.free()  # two: drawn before they are copied
        if need > free:
            why = f"needs {need / 1e9:.4g} GB for caches, {free / 1e9:.4g} GB are free"
            return row | {"skipped": why, "needs": need, "free": free}
        fixed = GraphStep if self.device.type == "cuda" else StaticStep
        kind, new = (Step, BLOCKS) if way == "eager" else (fixed, ROOM)
        work = cast(Steps, our_steps(model, [tokens] * batch, [slots] * batch, new, kind))
        per = new // BLOCKS
        seconds = [timed(self.device, "wall", partial(work, 2 + n, per))
                   for n in range(0, new, per)]  # fmt: skip
        cached = batch * slots * slot * c.num_layers
        return row | self.stepped(seconds, per, batch, model.step_bytes(batch) + cached)

    def stepped(self, seconds: list[float], per: int, batch: int, moved: int) -> Row:
        """Of blocks of `per` steps that each read so many bytes of weights and caches."""
        step = statistics.median(seconds) / per
        return {
            "seconds": seconds, "steps": per, "seconds_per_step": step, "moved": moved,
            "tokens_per_second": batch / step, "share": moved / step / self.top.bandwidth,
        }  # fmt: skip

    def bits(self, tokens: int) -> Iterator[Row]:
        """Kept tokens at 4 bits, the others at 2; turned back into numbers at every step."""
        model, kept = self.model(self.size.shape, self.size.depth), round(0.3 * tokens)
        storage, c = load_policy(BITS).storage, model.config
        with torch.device(self.device):
            work = quantised_steps(model, BITS, kept, False, tokens, 2)
            work()
            seconds = [timed(self.device, "wall", work) for _ in range(BLOCKS)]
        layer = layer_bytes(storage, tokens, kept, False, c.num_kv_heads, c.head_dim)
        moved = model.step_bytes(1) + c.num_layers * layer
        yield {"key": f"decode {tokens} bits", "run": "4/2 bits, eager", "tokens": tokens,
               "batch": 1, "slots": tokens, **self.stepped(seconds, 2, 1, moved)}  # fmt: skip

    def equal(self, tokens: int) -> Iterator[Row]:
        """Tokens a second of as many sequences as fit the same bytes of caches."""
        model = self.model(self.size.many_heads, None)
        c, rates = model.config, []
        slot = 2 * c.num_layers * c.num_kv_heads * c.head_dim * self.item
        for ratio in (1.0, 0.3):
            slots, run = int(ratio * tokens), f"{self.size.many_heads}, ratio {ratio:g}"
            batch = max(1, self.size.cache // ((slots + ROOM + 2) * slot))
            row = {"key": f"decode equal memory {ratio:g}", "run": run, "ratio": ratio,
                   "cache": self.size.cache, **self.decoded(model, tokens, batch, slots, "graph")}  # fmt: skip
            rates.append(row.get("tokens_per_second", 0))
            yield row | (
                {"over dense": rates[1] / rates[0]} if rates[0] and rates[-1] and ratio < 1 else {}
            )

    # --- memory ---

    def memory(self) -> Iterator[Row]:
        """The allocator's peak over a prefill, weights included."""
        s = self.size
        layers = s.depth if self.free() > ROOMY else s.few
        model = self.model(s.shape, layers)
        ids = torch.randint(model.config.vocab_size, (s.lengths[0],), device=self.device)
        for run, method in (("dense", "dense"), ("fixed 0.3", "fixed:ratio=0.3")):
            release(self.device)
            restart_peak(self.device)
            kv_bytes = sum(cache.nbytes for cache in model.prefill(ids, method, ROOM)[1].caches)
            yield {"key": f"memory {run}", "run": run, "tokens": len(ids), "layers": layers,
                   "peak": peak_memory(self.device), "weights": model.weight_bytes,
                   "kv_bytes": kv_bytes}  # fmt: skip
