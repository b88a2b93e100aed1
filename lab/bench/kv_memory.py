"""What the cache takes under each method, and what reading a quantised one costs.

    python -m lab.bench.kv_memory --out lab/results/kv_memory.json

Bytes are a formula, checked here against the storage of real tensors at one small size; times are
of decode steps over caches of random keys and values, all methods in one interleaved run.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from zipvl.model.cache import Cache, Kept, Store, store_as
from zipvl.policies import load_policy
from zipvl.policy import Notes, Storage

from ..command import Parser, count, ended
from ..raw import write_json
from .model import DTYPES, SHAPES, Model
from .timing import CLOCKS, Factory, Row, interleaved, machine, ratios

ROOM = 256  # new tokens
BYTES = 2  # bfloat16
PAPER = ["longva-7b", "llava-next-13b", "llava-1.5-7b"]  # the last: a 7B model without shared heads
CASES = {  # name: method, and whether the tokens that are not important leave
    "v2": ("zipvl", True),
    "v1": ("zipvl-quant", False),
    "both": ("zipvl:kv_bits=4", True),
}


def layer_bytes(storage: Storage | None, tokens: int, kept: int, drop: bool, G: int, D: int) -> int:
    """One layer of a prompt of `tokens` of which `kept` are important."""
    others = 0 if drop else tokens - kept
    if storage is None:
        return 2 * (kept + others + ROOM) * G * D * BYTES
    return storage.nbytes(kept, others, ROOM, G, D, BYTES)


def memory_rows(shape: str, tokens: list[int], shares: list[float]) -> list[Row]:
    """Bytes of the whole cache after prefill, by method, length and share of important tokens."""
    _, layers, _, _, G, D, _, _ = SHAPES[shape]
    rows: list[Row] = []
    for n in tokens:
        dense = layers * layer_bytes(None, n, n, True, G, D)
        rows.append(memory_row(shape, n, "dense", 1.0, dense, 0, dense))
        kivi = layers * layer_bytes(load_policy("kivi").storage, n, n, True, G, D)
        scratch = 2 * (n + ROOM) * G * D * BYTES
        rows.append(memory_row(shape, n, "kivi", 1.0, kivi, scratch, dense))
        for name, (method, drop) in CASES.items():
            storage = load_policy(method).storage
            for share in shares:
                kept = round(share * n)
                total = layers * layer_bytes(storage, n, kept, drop, G, D)
                slots = (kept if drop else n) + ROOM
                scratch = 0 if storage is None else 2 * slots * G * D * BYTES
                rows.append(memory_row(shape, n, name, share, total, scratch, dense))
    return rows


def memory_row(
    shape: str, tokens: int, name: str, share: float, total: int, scratch: int, dense: int
) -> Row:
    return {
        "shape": shape, "tokens": tokens, "run": name, "share_kept": share, "kv_bytes": total,
        "scratch_bytes": scratch, "smaller_than_dense": round(dense / total, 3),
        "with_scratch": round(dense / (total + scratch), 3),
    }  # fmt: skip


def check_rows(shapes: list[str], tokens: int, share: float) -> list[Row]:
    """Formula against the bytes of a layer's tensors."""
    rows = []
    for shape in shapes:
        G, D = SHAPES[shape][4:6]
        for name, (method, drop) in {"dense": ("dense", True), **CASES}.items():
            storage, kept = load_policy(method).storage, round(share * tokens)
            store = store_as(storage, ROOM)
            cache = random_cache(store, tokens, kept, drop, G, D, torch.bfloat16)
            formula = layer_bytes(storage, tokens, kept, drop, G, D)
            rows.append({"shape": shape, "tokens": tokens, "share_kept": share, "run": name,
                         "formula": formula, "storage": cache.nbytes})  # fmt: skip
            if cache.nbytes != formula:
                raise SystemExit(f"the formula is wrong: {rows[-1]}")
    return rows


def random_cache(store: Store, tokens: int, kept: int, drop: bool, G: int, D: int,
                 dtype: torch.dtype) -> Cache:  # fmt: skip
    """One layer's cache of random keys and values."""
    n = kept if drop else tokens
    k, v = (torch.randn(n, G, D, dtype=dtype) for _ in range(2))
    precise = None if drop else torch.arange(kept)
    return store([Kept(k, v, torch.arange(n), precise)])


@torch.inference_mode()
def decode_rows(model: Model, args: argparse.Namespace) -> list[Row]:
    """Seconds a step; the cache starts at `tokens`, of which args.share are important."""
    rows: list[Row] = []
    for n in args.tokens:
        kept = round(args.share * n)
        methods = {"dense": ("dense", n, True), "kivi": ("kivi", n, True)}
        methods |= {name: (method, kept, drop) for name, (method, drop) in CASES.items()}
        runs: dict[str, Factory] = {
            name: partial(steps, model, *case, n, args.new) for name, case in methods.items()
        }
        seconds = interleaved(model.device, args.clock, runs, args.repeats)
        rows += [
            {"tokens": n, "share_kept": args.share, "run": name, "seconds": values,
             "steps": args.new, "seconds_per_step": statistics.median(values) / args.new,
             **ratios(seconds, name)}
            for name, values in seconds.items()
        ]  # fmt: skip
    return rows


def steps(
    model: Model, method: str, kept: int, drop: bool, tokens: int, new: int
) -> Callable[[], object]:
    """Greedy steps from position `tokens`."""
    policy, c = load_policy(method), model.config
    store, notes = store_as(policy.storage, ROOM), [Notes(tokens, new)]
    caches = [
        random_cache(store, tokens, kept, drop, c.num_kv_heads, c.head_dim, model.dtype)
        for _ in range(c.num_layers)
    ]

    def work() -> None:
        token = torch.zeros(1, dtype=torch.long)
        for step in range(new):
            at = torch.tensor([tokens + step])
            x = model.decoder.embed_tokens(token)
            hidden = model.decoder.decode(x, at, caches, policy, model.attend, notes)
            token = model.logits(hidden).argmax(1)

    return work


def work(argv: list[str] | None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-0.5b", help="of the decode steps")
    parser.add_argument("--layers", type=count, default=4)
    parser.add_argument("--tokens", type=count, nargs="+", default=[2048, 8192])
    parser.add_argument("--share", type=float, default=0.3, help="important tokens while decoding")
    parser.add_argument("--new", type=count, default=16)
    parser.add_argument("--repeats", type=count, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    args.device = "cpu"
    lengths, shares = [16384, 65536, 131072], [0.2, 0.286, 0.3, 0.4, 0.5]
    memory = [row for shape in PAPER for row in memory_rows(shape, lengths, shares)]
    for row in memory:
        print("{shape:15} {tokens:7} {run:6} {share_kept:.3f} {kv_bytes:14} {smaller_than_dense:7}"
              " {with_scratch:7}".format(**row))  # fmt: skip
    model = Model(args.shape, "cpu", DTYPES[args.dtype], "sdpa", args.layers)
    decode = decode_rows(model, args)
    for row in decode:
        print(f"{row['tokens']:7} {row['run']:6} {1000 * row['seconds_per_step']:8.2f} ms a step")
    command = " ".join(["python -m lab.bench.kv_memory", *sys.argv[1:]])
    report = {
        "machine": machine(args) | {"command": command}, "room": ROOM, "memory": memory,
        "formula_against_storage": check_rows(PAPER, 1000, 0.3),
        "decode": {"shape": args.shape, "layers": model.config.num_layers, "dtype": args.dtype,
                   "clock": args.clock, "rows": decode},
    }  # fmt: skip
    if args.out:
        write_json(args.out, report)


def main(argv: list[str] | None = None) -> int:
    return ended(lambda: work(argv))


if __name__ == "__main__":
    sys.exit(main())
