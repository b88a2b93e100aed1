"""What is measured, the most important first. A job gives the rows of one prompt length or case.

All weights are random, in the shapes of real models (lab/bench/model.py).
"""

import gc
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import mean, median
from typing import cast

import torch

from zipvl.engine.run import Step
from zipvl.engine.speed import GraphStep, StaticStep
from zipvl.engine.stats import LayerStats, peak_memory, restart_peak
from zipvl.model.cache import store_as
from zipvl.model.vlm import VLM
from zipvl.policies import load_policy
from zipvl.policy import Notes, Policy

from ..bench.benches import our_steps
from ..bench.kv_memory import random_cache
from ..bench.memory import ROOT
from ..bench.model import QUESTION, Model
from ..bench.timing import Row, timed
from ..experiments.controls import Schedule
from .roofline import Ceilings, allowed, floor

# What zipvl-stream kept of the demo's clips of 1,024 frames, from the first layer to the last.
CURVE = (0.576, 0.454, 0.317, 0.213, 0.164, 0.127, 0.101, 0.079)
FLASH, STREAM = "dense, FA2", "stream"  # FlashAttention-2 is what the paper compares with
RUNS = {FLASH: "dense", "dense": "dense", "fixed 0.5": "fixed:ratio=0.5",
        "fixed 0.3": "fixed:ratio=0.3", STREAM: "dense"}  # fmt: skip
BITS = "fixed:ratio=0.3,kv_bits=4/2"
ROOM, BLOCKS = 16, 4  # new tokens; blocks of them that are timed
MOST = 7  # repeats of a prefill
ROOMY = 32 * 2**30  # bytes in which all layers of a 7B model prefill 64k tokens
PYTEST = [sys.executable, "-m", "pytest", "-o", "addopts=-q", "-n", "6", "-m", "gpu"]
Steps = Callable[[int, int], object]


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    shape: str = "longva-7b"
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    flash: str = "torch-flash"
    lengths: tuple[int, ...] = (65536, 16384, 131072, 8192, 32768, 200_000)
    depth: int = 28  # layers up to `whole` tokens, and
    whole: int = 16384
    few: int = 6  # above
    seconds: float = 6.0  # a row of prefill
    contexts: tuple[int, ...] = (8192, 2048, 32768, 131072)
    batches: tuple[int, ...] = (1, 8, 32)
    asked: tuple[int, ...] = (65536, 131072)  # tokens of a film that a question follows
    many_heads: str = "llava-next-13b"
    cache: int = 24 * 2**30  # bytes of caches that are compared at equal memory
    free: int | None = None  # bytes; None: what the card says
    tests: tuple[str, ...] = ()  # what else pytest is told


DRY = Size("tiny", "cpu", torch.float32, "sdpa", (256, 128, 512, 64), 4, 128, 3, 0.05, (256, 64),
           (1, 2, 8), (128,), "tiny-384", 2**20, 3 * 10**6,
           ("--co", "tests/test_cache.py"))  # fmt: skip


@dataclass(frozen=True)
class Job:
    kind: str
    settings: str
    keys: list[str]
    rows: Callable[[], Iterator[Row]]


def curve(layers: int, depth: int) -> str:
    """CURVE for `layers` layers that stand for `depth`, as Schedule takes it: all but the last are
    spread over all but the last, of which one row is computed."""
    shares = []
    for i in range(layers):
        at = (i + 0.5) / (layers - 1) * (depth - 1) if i + 1 < layers else depth - 0.5
        x = min(max(at / depth * len(CURVE) - 0.5, 0), len(CURVE) - 1)
        low = min(int(x), len(CURVE) - 2)
        shares.append(CURVE[low] + (x - low) * (CURVE[low + 1] - CURVE[low]))
    return "/".join(f"{share:.4f}" for share in shares)


def said(e: Exception) -> str:
    return f"{type(e).__name__}: {(str(e).strip().splitlines() or ['no word'])[0]}"[:300]


class Bench:
    """Makes the models and measures the rows."""

    def __init__(self, size: Size, kernel: str, top: Ceilings):
        self.size, self.kernel, self.top = size, kernel, top
        self.device, self.item = torch.device(size.device), size.dtype.itemsize
        self.models: dict[tuple[str, int | None], Model] = {}

    def model(self, shape: str, layers: int | None) -> Model:
        """Made once, and held until another shape is asked for or clear()."""
        if any(held != shape for held, _ in self.models):
            self.clear()
        if (shape, layers) not in self.models:
            made = Model(shape, str(self.device), self.size.dtype, "auto", layers)
            self.models[shape, layers] = made
        return self.models[shape, layers]

    def clear(self) -> None:
        self.models.clear()
        self.free()

    def free(self) -> int:
        """Bytes, once the memory of what is gone, graphs too, is back on the card."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
        return self.size.free or torch.cuda.mem_get_info(self.device)[0]

    def jobs(self) -> Iterator[Job]:
        s, first = self.size, self.size.contexts[0]
        about = f"{s.shape}, {s.dtype}, torch {torch.__version__}"
        yield Job("tests", about, ["tests"], self.tests)
        runs = [r for r in RUNS if r != FLASH or self.kernel != s.flash or s.device == "cpu"]
        for n in s.lengths:
            layers = s.depth if n <= s.whole else s.few
            keys, case = [f"prefill {n} {run}" for run in runs], (n, layers, runs)
            kept = curve(layers, s.depth)
            yield Job("prefill", f"{about}, {kept}", keys, partial(self.prefill, *case, kept))
        for n in s.contexts:
            for batch, ratio, way in product(s.batches, (1.0, 0.3), ("graph", "eager")):
                key = f"decode {n} x {batch} ratio {ratio:g}, {way}"
                yield Job("decode", about, [key], partial(self.decode, n, batch, ratio, way))
            if n == first:
                yield Job("decode", about, [f"decode {n} bits"], partial(self.bits, n))
        for n, ratio in product(s.asked, (1.0, 0.3)):
            key = f"extend {n} ratio {ratio:g}"
            yield Job("extend", about, [key], partial(self.extend, n, ratio))
        keys = ["decode equal memory 1", "decode equal memory 0.3"]
        yield Job("decode", f"{about}, {s.cache} bytes", keys, partial(self.equal, first))
        yield Job("memory", about, ["memory dense", "memory fixed 0.3"], self.memory)

    def tests(self) -> Iterator[Row]:
        """The gpu tests, in a process of their own; other files may need what is not installed."""
        files = [
            p for p in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in p.read_text("utf-8")
        ]
        command = [*PYTEST, *self.size.tests, *map(str, files)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False,
                              timeout=300)  # fmt: skip
        tail = (done.stdout.strip() or done.stderr.strip() or "no word").splitlines()[-20:]
        last = next((x for x in reversed(tail) if re.search(r" in [\d.]+s", x)), "")
        found = re.findall(r"(\d+) (passed|failed|skipped)", last)
        row: Row = {"key": "tests", "passed": 0, "failed": 0, "tail": tail}
        row |= {what: int(n) for n, what in found}
        yield row | ({"error": f"pytest -m gpu: {last or tail[-1]}"} if done.returncode else {})

    # --- prefill ---

    def prefill(self, tokens: int, layers: int, runs: list[str], kept: str) -> Iterator[Row]:
        """Seconds to the last token's logits, caches included, all runs in turn."""
        model = self.model(self.size.shape, layers)
        ids = torch.randint(model.config.vocab_size, (tokens,), device=self.device)
        policies = {run: load_policy(RUNS[run]) for run in runs}
        policies[STREAM] = Schedule(kept=kept, recent=32, random=32)
        behind = {run: model.attending(self.size.flash) if run == FLASH else model for run in runs}
        last: dict[str, list[LayerStats]] = {}

        def work(run: str) -> None:
            last[run] = behind[run].prefill(ids, policies[run], ROOM)[1].layers

        seconds, failed = self.turns({run: partial(work, run) for run in runs})
        for run in runs:
            row: Row = {"key": f"prefill {tokens} {run}", "run": run, "tokens": tokens, "batch": 1,
                        "layers": layers, "attention": behind[run].backend}  # fmt: skip
            if run in failed:
                yield row | {"error": failed[run]}
                continue
            row |= {"seconds": seconds[run]} | self.details(model, seconds[run], last[run])
            for base in [b for b in ("dense", FLASH) if b in seconds and b != run]:
                pairs = zip(seconds[base], seconds[run], strict=True)
                row[f"over {base}"] = median(b / s for b, s in pairs)
            if run not in (FLASH, "dense") and "dense" in seconds:
                case = median(seconds["dense"]), last["dense"], last[run]
                row["allowed"] = allowed(*case, model.config, self.item, self.top)
            yield row

    def turns(
        self, runs: dict[str, Callable[[], object]]
    ) -> tuple[dict[str, list[float]], dict[str, str]]:
        """Seconds of each run, in turn after a warm-up, and what those that failed said."""
        failed, warm = {}, {}
        for name, run in runs.items():
            try:
                warm[name] = timed(self.device, "wall", run)
            except Exception as e:  # one method's failure is not the others'
                failed[name] = said(e)
        repeats = int(self.size.seconds * len(warm) / (sum(warm.values()) or 1)) - 1
        seconds: dict[str, list[float]] = {name: [] for name in warm}
        for _ in range(min(max(repeats, 1), MOST)):
            for name in warm:
                seconds[name].append(timed(self.device, "wall", runs[name]))
        return seconds, failed

    def details(self, model: Model, seconds: list[float], layers: list[LayerStats]) -> Row:
        """Roofline, stages of the last run, and what all layers of the shape would take: of the
        last one a prefill computes one row, so those that were left out are whole ones."""
        spent, missing = median(seconds), self.size.depth - len(layers)
        stages: dict[str, float] = {}
        for stage, value in (item for layer in layers for item in layer.seconds.items()):
            stages[stage] = stages.get(stage, 0.0) + value
        whole = mean(sum(layer.seconds.values()) for layer in layers[:-1])
        one = spent * whole / sum(stages.values())
        least = floor(layers, model.config, self.item, self.top)
        ratio = mean(layer.attended[0] for layer in layers) / layers[0].tokens[0]
        return {
            "seconds_per_layer": one, "seconds_all_layers": spent + missing * one, "floor": least,
            "share": least / spent, "ratio": ratio, "stages": stages,
        }  # fmt: skip

    # --- decode ---

    def decode(self, tokens: int, batch: int, ratio: float, way: str) -> Iterator[Row]:
        model, run = self.model(self.size.shape, self.size.depth), f"ratio {ratio:g}, {way}"
        row = self.decoded(model, tokens, batch, max(1, int(ratio * tokens)), way)
        yield {"key": f"decode {tokens} x {batch} {run}", "run": run, **row}

    def decoded(self, model: Model, tokens: int, batch: int, slots: int, way: str) -> Row:
        """Greedy steps over random caches of `slots` places a sequence, where these fit."""
        c, row = model.config, {"tokens": tokens, "batch": batch, "slots": slots}
        slot = 2 * c.num_kv_heads * c.head_dim * self.item
        layer = batch * (slots + ROOM + 2) * (slot + 4 * c.num_kv_heads)  # positions, too
        need, free = (c.num_layers + 2) * layer, self.free()  # 2: drawn before they are copied
        if need > 0.97 * free:
            why = f"caches need {need / 1e9:.4g} GB, {free / 1e9:.4g} GB are free"
            return row | {"skipped": why, "needs": need, "free": free}
        fixed = GraphStep if self.device.type == "cuda" else StaticStep
        kind, new = (Step, BLOCKS) if way == "eager" else (fixed, ROOM)
        work = cast(Steps, our_steps(model, [tokens] * batch, [slots] * batch, new, kind))
        each = new // BLOCKS
        blocks = [partial(work, 2 + n, each) for n in range(0, new, each)]
        cached = batch * slots * slot * c.num_layers
        return row | self.stepped(blocks, each, batch, model.step_bytes(batch) + cached)

    def stepped(
        self, blocks: Sequence[Callable[[], object]], each: int, batch: int, moved: int
    ) -> Row:
        """Times blocks of `each` steps, a step of which reads so many bytes of weights and caches,
        all that it must move."""
        seconds = [timed(self.device, "wall", block) for block in blocks]
        step = median(seconds) / each
        return {
            "seconds": seconds, "steps": each, "seconds_per_step": step, "moved": moved,
            "tokens_per_second": batch / step, "share": moved / step / self.top.bandwidth,
        }  # fmt: skip

    def extend(self, tokens: int, ratio: float) -> Iterator[Row]:
        """A session's later question, QUESTION tokens over the caches that a film of `tokens` left,
        and the prefill of both, of which some layers are done."""
        shape, n = self.size.shape, QUESTION
        whole, few = self.model(shape, self.size.depth), self.model(shape, self.size.few)
        ids = torch.randint(whole.config.vocab_size, (tokens + n,), device=self.device)
        places = torch.arange(tokens, tokens + n, device=self.device)
        slots, policy = max(1, int(ratio * tokens)), load_policy(f"fixed:ratio={ratio:g}")
        caches = whole.caches([slots], n)

        def ask() -> None:
            for cache in caches:
                cache.spans.shrink([slots])
            x = whole.decoder.embed_tokens(ids[tokens:])
            hidden = whole.decoder.extend(x, [n], places, caches, Policy(), whole.attend)
            whole.logits(hidden[-1:])

        def read() -> None:
            few.prefill(ids, policy if ratio < 1 else "dense", ROOM)

        asked, failed = self.turns({"ask": ask})
        before, more = self.turns({"read": read})  # apart, as one takes a hundred times the other
        row: Row = {"key": f"extend {tokens} ratio {ratio:g}", "run": f"ratio {ratio:g}",
                    "tokens": tokens, "batch": 1, "question": n}  # fmt: skip
        if failed or more:
            yield row | {"error": "; ".join([*failed.values(), *more.values()])}
            return
        # of a prefill's last layer one row is computed
        whole_one = median(before["read"]) * (self.size.depth - 1) / (self.size.few - 1)
        share = median(asked["ask"]) / whole_one
        yield row | {"ask": asked["ask"], "prefill": whole_one, "of prefill": share}

    def bits(self, tokens: int) -> Iterator[Row]:
        """Kept tokens at 4 bits, the others at 2; turned back into numbers at every step."""
        model, policy = self.model(self.size.shape, self.size.depth), load_policy(BITS)
        c, store = model.config, store_as(policy.storage, ROOM)
        case = tokens, round(0.3 * tokens), False, c.num_kv_heads, c.head_dim, model.dtype
        with torch.device(self.device):  # random_cache() names none
            caches = [random_cache(store, *case) for _ in range(c.num_layers)]
        step = Step(cast(VLM, model), caches, [Notes(tokens, ROOM)], policy, model.attend)
        token = torch.zeros(1, dtype=torch.long, device=self.device)
        work = partial(step, token, token + tokens)
        work()
        moved = model.step_bytes(1) + sum(cache.nbytes for cache in caches)
        row = {"key": f"decode {tokens} bits", "run": "4/2 bits, eager", "tokens": tokens}
        yield row | {"batch": 1, "slots": tokens, **self.stepped([work] * BLOCKS, 1, 1, moved)}

    def equal(self, tokens: int) -> Iterator[Row]:
        """Tokens a second of as many sequences as fit the same bytes of caches."""
        model, s, dense = self.model(self.size.many_heads, None), self.size, 0.0
        c = model.config
        slot = 2 * c.num_layers * c.num_kv_heads * c.head_dim * self.item
        for ratio in (1.0, 0.3):
            slots = int(ratio * tokens)
            batch = max(1, s.cache // ((slots + ROOM + 2) * slot))
            row = self.decoded(model, tokens, batch, slots, "graph")
            row |= {"key": f"decode equal memory {ratio:g}", "cache": s.cache,
                    "run": f"{s.many_heads}, ratio {ratio:g}, graph"}  # fmt: skip
            if dense and "seconds" in row:
                row["over dense"] = row["tokens_per_second"] / dense
            dense = row.get("tokens_per_second", 0.0)
            yield row

    # --- memory ---

    def memory(self) -> Iterator[Row]:
        """The allocator's peak over a prefill, weights included."""
        s, layers = self.size, self.size.depth if self.free() > ROOMY else self.size.few
        model = self.model(s.shape, layers)
        ids = torch.randint(model.config.vocab_size, (s.lengths[0],), device=self.device)
        for run in ("dense", "fixed 0.3"):
            self.free()
            restart_peak(self.device)
            caches = model.prefill(ids, RUNS[run], ROOM)[1].caches
            kv_bytes = sum(cache.nbytes for cache in caches)
            del caches
            yield {"key": f"memory {run}", "run": run, "tokens": len(ids), "layers": layers,
                   "peak": peak_memory(self.device), "weights": model.weight_bytes,
                   "kv_bytes": kv_bytes}  # fmt: skip
