"""The pieces of a config.json, checked key by key (towers.py: those of the vision tower).

Hub files leave out every value that equals a class default, so the defaults stand here.
"""

import ast
import re
from pathlib import Path
from typing import Any

from .config import TextConfig, read_json
from .errors import ModelError

LLAMA = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "hidden_act": "silu",
    "max_position_embeddings": 2048,
}  # fmt: skip
MISTRAL = LLAMA | {
    "intermediate_size": 14336, "num_key_value_heads": 8, "sliding_window": 4096,
    "max_position_embeddings": 131072,
}  # fmt: skip
QWEN2 = LLAMA | {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}  # fmt: skip
TEXT_DEFAULTS: dict[str, dict[str, Any]] = {"llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2}


def number(raw: dict, key: str, where: str, least: int = 1, most: int = 10**7) -> int:
    """The whole number at `key`. Raises ModelError for anything else, and outside least..most."""
    value = raw.get(key)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ModelError(
            f"{where}: {key} is {shown(value)}, expected a whole number from {least} to {most}"
        )
    return value


def positive(raw: dict, key: str, where: str) -> float:
    """The number above zero at `key`. Raises ModelError for anything else."""
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e15:
        raise ModelError(f"{where}: {key} is {shown(value)}, expected a number above 0")
    return float(value)


def choice(value: Any, options: tuple[str, ...], what: str, where: str) -> str:
    """`value` if it is one of `options`. Raises ModelError that lists them."""
    if value not in options:
        raise ModelError(
            f"{where}: {what} {shown(value)} is not supported ({', '.join(options)} are)"
        )
    return value


def section(raw: dict, key: str, where: str) -> dict[str, Any]:
    """A copy of the object at `key`, empty where it is missing or null."""
    value = raw.get(key)
    if value is not None and not isinstance(value, dict):
        raise ModelError(f"{where}: {key} is {shown(value)}, expected an object")
    return dict(value or {})


def shown(value: Any) -> str:
    """A value from a file, short enough for a sentence."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = "a huge number"
    return text if len(text) <= 60 else f"{text[:60]}..."


def read_text(raw: dict, kind: Any, tied: bool, where: str) -> TextConfig:
    """Decoder config from HF keys; `raw` may be written by transformers 4 or 5."""
    c = TEXT_DEFAULTS[choice(kind, tuple(TEXT_DEFAULTS), "decoder", where)] | raw
    rope = section(c, "rope_scaling", where) | section(c, "rope_parameters", where)
    scaling = rope.get("rope_type", rope.get("type", "default"))
    choice(scaling, ("default", "linear"), "rope type", where)
    choice(c["hidden_act"], ("silu",), "hidden_act", where)
    heads, width = number(c, "num_attention_heads", where), number(c, "hidden_size", where)
    c["num_key_value_heads"] = c.get("num_key_value_heads") or heads
    c["head_dim"] = raw.get("head_dim") or width // heads
    kv_heads, head_dim = number(c, "num_key_value_heads", where), number(c, "head_dim", where)
    if (width % heads and not raw.get("head_dim")) or heads % kv_heads or head_dim % 2:
        raise ModelError(
            f"{where}: hidden_size {width}, {heads} heads of {head_dim} and {kv_heads} key/value "
            "heads do not divide"
        )
    windowed = kind == "mistral" or (kind == "qwen2" and c.get("use_sliding_window"))
    return TextConfig(
        kind=kind,
        vocab_size=number(c, "vocab_size", where),
        hidden_size=width,
        intermediate_size=number(c, "intermediate_size", where),
        num_layers=number(c, "num_hidden_layers", where, most=1000),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=positive(c, "rms_norm_eps", where),
        rope_theta=positive(rope if "rope_theta" in rope else c, "rope_theta", where),
        rope_factor=positive(rope, "factor", where) if scaling == "linear" else 1.0,
        qkv_bias=kind == "qwen2",
        tied=tied,
        sliding_window=number(c, "sliding_window", where)
        if windowed and c.get("sliding_window") is not None
        else None,
    )


def read_preprocessor(folder: Path) -> dict[str, Any]:
    """Image-processor settings: preprocessor_config.json (v4) or processor_config.json (v5)."""
    for path in (folder / "preprocessor_config.json", folder / "processor_config.json"):
        raw = read_json(path) if path.exists() else {}
        raw = section(raw, "image_processor", str(path)) or raw
        if "image_mean" in raw or "size" in raw:
            return raw
    return {}


def read_colours(
    pre: dict, usual: tuple[tuple[float, ...], ...], where: str
) -> tuple[tuple[float, ...], ...]:
    """(mean, standard deviation) of the three channels, `usual` where settings lack them."""
    out = []
    for key, fallback in zip(("image_mean", "image_std"), usual, strict=True):
        values = pre.get(key) or fallback
        if not isinstance(values, list | tuple) or len(values) != 3:
            raise ModelError(f"{where}: {key} is {shown(values)}, expected three numbers")
        out.append(tuple(positive({key: v}, key, where) for v in values))
    return tuple(out)


def read_pinpoints(value: Any, tile: int, where: str) -> tuple[tuple[int, int], ...]:
    """Canvas sizes in pixels, as the file orders a pair (HF: height, width; original: the reverse).

    A list of pairs, the same as a Python literal, or "(1x1),...,(6x6)": all pairs of tile counts
    between the first and the last. Raises ModelError for anything else, and for parts of a tile.
    """
    if isinstance(value, str) and "x" in value:
        if found := re.fullmatch(r"\((\d\d?)x(\d\d?)\).*\((\d\d?)x(\d\d?)\)", value):
            a, b, c, d = map(int, found.groups())
            value = [(i * tile, j * tile) for i in range(a, c + 1) for j in range(b, d + 1)]
    elif isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = None
    whole = isinstance(value, list | tuple) and 0 < len(value) <= 10**4
    if not whole or not all(_is_canvas(pair, tile) for pair in value):
        raise ModelError(
            f"{where}: image_grid_pinpoints is {shown(value)}, expected pairs of "
            f"multiples of {tile}"
        )
    return tuple((a, b) for a, b in value)


def _is_canvas(pair: Any, tile: int) -> bool:
    return (
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and all(type(side) is int and 0 < side < 10**6 and side % tile == 0 for side in pair)
    )


def max_tiles(aspect: Any) -> int | None:
    """N of "anyres_max_N", OneVision's mark."""
    found = re.fullmatch(r"anyres_max_([1-9]\d{0,3})", str(aspect))
    return int(found[1]) if found else None


def read_stride(raw: dict, key: str, where: str) -> int:
    """The pooling stride at `key`, 2 where it is missing."""
    return number(raw, key, where, most=100) if raw.get(key) is not None else 2


def max_length(raw: dict) -> int | None:
    """The context a checkpoint was trained for, where the file tells."""
    value = raw.get("tokenizer_model_max_length") or raw.get("max_position_embeddings")
    return value if isinstance(value, int) else None
