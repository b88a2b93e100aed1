"""What a share of kept tokens means for the speed of a prefill, by multiply-adds alone.

    python -m lab.experiments.implied

Prints the tables of docs/architectures.md and docs/cross_attention.md: nothing is measured. For the
first, the decoder is that of Qwen2.5-VL-7B, the shape of Qwen2-7B and so of LongVA-7B. Every layer
keeps the same share in the paper's form, the same share of what is left in the stream form; a
multiply-add of attention costs what one of a linear layer costs, choosing costs 128 probe rows, and
vision is left out.
"""

import math

from zipvl.config import TextConfig
from zipvl.engine.stats import dense_work, layer_work

QWEN = TextConfig("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, 1e-6, 1e6, qkv_bias=True)
LENGTHS = (8192, 32768, 131072, 200000)
SHARES = (0.795, 0.617, 0.421, 0.247)
PROBES = 128


def probes(config: TextConfig, tokens: float) -> float:
    """Multiply-adds of a layer's probe rows: scores of `tokens` keys; their queries are there."""
    return PROBES * tokens * config.num_heads * config.head_dim


def paper(config: TextConfig, n: int, share: float) -> float:
    """Attention among the kept tokens of each layer, every linear layer on all `n`."""
    layer = layer_work(config, n, n, n, n, (share * n) ** 2 / 2)
    return config.num_layers * (layer + probes(config, n))


def stream(config: TextConfig, n: int, share: float) -> float:
    """As zipvl-stream: all see only what earlier layers kept; of those that enter a layer each
    computes a key, and the kept ones all the rest. `share` is the mean over layers."""
    each, total = each_layer(config.num_layers, share), 0.0
    for i in range(config.num_layers):
        entered, kept = round(n * each**i), round(n * each ** (i + 1))
        total += layer_work(config, entered, kept, kept, kept, kept**2 / 2)
        total += probes(config, entered)
    return total


def each_layer(layers: int, mean: float) -> float:
    """The share of what enters it that each layer keeps, so that the mean of the prompt's is
    `mean`."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        below = sum(middle ** (i + 1) for i in range(layers)) / layers < mean
        low, high = (middle, high) if below else (low, middle)
    return high


def rows() -> list[str]:
    out = ["| kept | form | " + " | ".join(f"{n:,}" for n in LENGTHS) + " |"]
    out += ["|---" * (2 + len(LENGTHS)) + "|"]
    for share in SHARES:
        for form in (paper, stream):
            gains = [dense_work(QWEN, n, False) / form(QWEN, n, share) for n in LENGTHS]
            cells = " | ".join(f"{gain:.2f}" for gain in gains)
            out.append(f"| {100 * share:.1f} % | {form.__name__} | {cells} |")
    return out


def mllama(text: int) -> dict[str, float]:
    """Multiply-adds of a prefill of Llama-3.2-11B-Vision: `text` tokens and a picture of four
    tiles. Its tower has 40 layers over tiles padded to a multiple of 8, its decoder 32 layers of
    self-attention and 8 of cross-attention, both with an MLP."""
    tile = (560 // 14) ** 2 + 1
    keys, patches = 4 * tile, 4 * math.ceil(tile / 8) * 8
    width, groups, mlp, tower = 4096, 8 * 128, 3 * 4096 * 14336, 1280
    own = text * (2 * width**2 + mlp)  # queries, outputs and MLP of a layer
    return {
        "vision tower": 40 * patches * tower * (12 * tower + 2 * patches) + keys * 7680 * width,
        "decoder without the picture": 40 * own + 32 * width * text * (2 * groups + text),
        "picture's keys and values": 8 * keys * 2 * width * groups,
        "attention to them": 8 * 2 * width * text * keys,
    }


def parts(lengths: tuple[int, ...] = (64, 512, 2048)) -> list[str]:
    found = [mllama(n) for n in lengths]
    out = ["| share of the multiply-adds | " + " | ".join(f"{n:,}" for n in lengths) + " |"]
    out += ["|---" * (1 + len(lengths)) + "|"]
    for name in found[0]:
        cells = " | ".join(f"{100 * work[name] / sum(work.values()):.1f} %" for work in found)
        out.append(f"| {name} | {cells} |")
    return out


if __name__ == "__main__":
    print("\n".join([*rows(), "", *parts()]))
