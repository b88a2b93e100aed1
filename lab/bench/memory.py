"""Peak memory of a prefill, each in a process of its own, next to a formula.

    formula = weights + caches + hidden states + the larger of attention and a chunk's MLP

Two measurements: the process's peak resident set, less what it holds before the model is there
(Python, PyTorch, its kernels' own buffers, known from a tiny prefill); and the weights with the
most bytes that tensors made during the prefill had at a time.
"""

import argparse
import json
import statistics
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zipvl.config import TextConfig
from zipvl.engine.run import CHUNK
from zipvl.engine.stats import peak_memory, restart_peak
from zipvl.errors import ZipvlError
from zipvl.model.attention import SCORE_BYTES
from zipvl.model.vlm import VLM

from .model import DTYPES, Model
from .timing import Row
from .vlm import vlm_config

ROOM = 256  # new tokens
PROBES = 128  # rows
ROOT = Path(__file__).parents[2]
CARD = 80 * 10**9
LONG = ("longva-7b", 200_000)  # what must fit one card of 80 GB


def formula(
    config: TextConfig, weights: int, tokens: int, kept: float, chunk: int, item: int
) -> Row:
    """Bytes by part; `kept` tokens a layer on average, `item` bytes a number, MLP by `chunk` rows.

    Hidden states: the embeddings, the residual stream, and a layer's normed input or new output.
    Attention: the keys of all tokens; queries, outputs and values of kept ones, and their keys
    again, contiguous; the projected output of all tokens. Or, where it is more, the scores of probe
    rows, twice, and what the softmax adds up. The peak is a little lower: in the last layer, whose
    cache is the last to come, one row is computed.
    """
    c, kv = config, config.num_kv_heads * config.head_dim
    q = c.num_heads * c.head_dim
    gathered = kept if kept < tokens else 0
    attention = tokens * (kv + c.hidden_size) + kept * (2 * q + kv) + gathered * kv
    scores = min(SCORE_BYTES, 4 * PROBES * c.num_heads // c.num_kv_heads * tokens)
    probe = 2 * scores + 4 * tokens * (c.num_heads + c.head_dim) + tokens * kv * item
    mlp = min(tokens, chunk) * (2 * c.intermediate_size + c.hidden_size)
    parts = {
        "weights": weights,
        "hidden": 3 * tokens * c.hidden_size * item,
        "layer": max(attention * item, mlp * item, probe if gathered else 0),
        "caches": c.num_layers * (kept + ROOM) * 2 * kv * item,
    }
    parts = {name: round(value) for name, value in parts.items()}
    return parts | {"total": sum(parts.values())}


def bench_memory(args: argparse.Namespace) -> list[Row]:
    """Measured and computed peaks for every length and method, and the long video's formula."""
    rows = []
    for tokens in args.tokens:
        for method in args.methods:
            words = [args.shape, tokens, method, args.device, args.dtype, args.attn]
            rows.append(alone(__name__, *words, args.layers or 0))
    return rows + [long_video(*LONG, ratio) for ratio in (1.0, 0.3)]


def alone(module: str, *words: object) -> Row:
    """What `module`, run with `words` in a process of its own, prints as JSON."""
    command = [sys.executable, "-m", module, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        why = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ZipvlError(f"{' '.join(command[2:])} failed: {why[-1]}")
    return json.loads(done.stdout)


def long_video(shape: str, tokens: int, ratio: float) -> Row:
    """The formula for a whole bfloat16 model: tower and head counted, and the video's features."""
    config = vlm_config(shape)
    with torch.device("meta"):
        weights = sum(2 * p.numel() for p in VLM(config).parameters())
    parts = formula(config.text, weights, tokens, ratio * tokens, CHUNK["cuda"], 2)
    parts |= {"features": 2 * tokens * config.text.hidden_size}
    parts["total"] += parts["features"]
    return {"bench": "memory", "shape": shape, "tokens": tokens, "batch": 1, "ratio": ratio,
            "run": f"formula, ratio {ratio:g}", "formula": parts, "card": CARD,
            "share_of_card": parts["total"] / CARD}  # fmt: skip


class Allocated(TorchDispatchMode):
    """Counts the bytes of tensors that PyTorch's operators make while this is on; `most` at a time.

    What an operator needs inside itself and what the allocator wastes are in the process's peak
    only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most = 0, 0
        self.alive: dict[int, int] = {}

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.free, key)

    def free(self, key: int) -> None:
        self.now -= self.alive.pop(key)


def peak(device: torch.device) -> int:
    """Bytes at most so far. Linux's ru_maxrss also counts the process that started this one, so
    this process's own high-water mark comes first."""
    status = Path("/proc/self/status")
    if device.type == "cpu" and status.exists():
        [line] = [x for x in status.read_text().splitlines() if x.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    return peak_memory(device)


@torch.inference_mode()
def measure(shape: str, tokens: int, method: str, device: str, dtype: str, attn: str,
            layers: int | None) -> Row:  # fmt: skip
    """One prefill in this process, which must have done nothing else."""
    kind = DTYPES[dtype]
    warm_up = Model("tiny", device, kind, attn, None)
    with Allocated():  # which brings PyTorch's compiler with it
        warm_up.prefill(torch.zeros(1024, dtype=torch.long, device=device), method, ROOM)
    restart_peak(warm_up.device)
    before = peak(warm_up.device)
    model = Model(shape, device, kind, attn, layers)
    loaded = peak(model.device) - before
    ids = torch.randint(model.config.vocab_size, (tokens,), device=model.device)
    with Allocated() as allocated:
        out = model.prefill(ids, method, ROOM)[1]
    most = peak(model.device) - before
    kept = statistics.mean(layer.attended[0] for layer in out.layers)
    parts = formula(
        model.config, model.weight_bytes, tokens, kept, CHUNK[model.device.type], kind.itemsize
    )
    return {
        "bench": "memory", "shape": shape, "tokens": tokens, "batch": 1, "run": method,
        "ratio": kept / tokens, "measured": most, "loaded": loaded, "before": before,
        "kv_bytes": sum(cache.nbytes for cache in out.caches), "formula": parts,
        "over_formula": most / parts["total"], "allocated": model.weight_bytes + allocated.most,
    }  # fmt: skip


if __name__ == "__main__":
    shape, tokens, method, device, dtype, attn, layers = sys.argv[1:]
    print(json.dumps(measure(shape, int(tokens), method, device, dtype, attn, int(layers) or None)))
