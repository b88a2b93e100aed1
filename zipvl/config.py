"""What a model is, as frozen records, and how a JSON file is read: every bad value is one sentence.

model/layouts.py fills the records from the kinds of checkpoints.
"""

import json
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import ModelError

JSON_BYTES = 2**24  # of a JSON file; the largest known index has half of it


# Decoders, as the classes of transformers 4 fill in what a file leaves out.
LLAMA = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "hidden_act": "silu",
    "max_position_embeddings": 2048,
}  # fmt: skip
DECODERS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mistral": LLAMA | {
        "intermediate_size": 14336, "num_key_value_heads": 8, "sliding_window": 4096,
        "max_position_embeddings": 131072,
    },
    "qwen2": LLAMA | {
        "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
    },
    "qwen3": LLAMA | {
        "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
        "head_dim": 128, "max_position_embeddings": 32768,
    },
}  # fmt: skip


@dataclass(frozen=True)
class TextConfig:
    """Llama, Mistral, Qwen2 or Qwen3 decoder; they differ in the bias of q, k, v, the norm of q and
    k, and in defaults."""

    kind: str  # llama | mistral | qwen2 | qwen3
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_factor: float = 1.0  # linear scaling: positions are divided by it
    rope_sections: tuple[int, ...] = ()  # pairs turned by a token's time, row and column; (): place
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each head's query and key, before they are turned
    tied: bool = False  # lm_head shares the embedding
    sliding_window: int | None = None

    @property
    def kv_width(self) -> int:
        """Numbers that a token's keys and values are, in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class VisionConfig:
    """CLIP or SigLIP tower. `take` lists the hidden states used (0 embeddings, n after block n)."""

    kind: str  # clip | siglip
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float
    hidden_act: str  # quick_gelu | gelu | gelu_pytorch_tanh
    take: tuple[int, ...]
    drop_cls: bool  # CLIP's class token leaves before the projector

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Features of one crop: its patches, and CLIP's class token where it is kept."""
        return self.grid**2 + (self.kind == "clip" and not self.drop_cls)


@dataclass(frozen=True)
class MediaConfig:
    """How pictures and videos become crops, and how the crops' features become tokens."""

    size: int  # side of one crop in pixels
    resize: str  # crop: shortest side to `size`, centre crop | squash: both sides to `size`
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image: str  # crop: one plain crop | pad: padded to a square first | anyres: base crop + tiles
    pinpoints: tuple[tuple[int, int], ...] = ()  # any-resolution canvases (height, width), in order
    merge: str = "flat"  # flat | spatial | spatial_unpad (newline column) | tiles (LongVA: no rows)
    max_tiles: int | None = None  # OneVision: bilinear reduction to about this many tiles of tokens
    round_unpad: bool = True  # HF rounds the unpadded side to 7 digits before truncating
    several: str = "same"  # pad: two or more pictures in a prompt are padded squares, one crop each
    pool: str = "none"  # 2x2 pooling of video frames: none | average | max | bilinear
    stride: int = 2
    pool_first: bool = False  # pool before the projector (HF NeXT-Video) instead of after it
    video_newline: str = "none"  # none | one (at the end) | frame | grid (every row)
    frames: int = 32  # of a video, where nobody says how many
    told: bool = False  # the prompt says how long a video is and when its frames are (LLaVA-Video)


@dataclass(frozen=True)
class LlavaConfig:
    """A LLaVA's way from pixels to tokens (vision/llava.py)."""

    tower: VisionConfig
    media: MediaConfig
    projector: str  # linear | mlpNx_gelu | identity
    projector_bias: bool
    newline: bool  # the checkpoint holds an `image_newline` vector


@dataclass(frozen=True)
class ModelConfig:
    text: TextConfig
    vision: Any  # the record of its family, as LlavaConfig
    family: str  # llava | llava_next | llava_next_video | llava_onevision | longva | ...
    layout: str  # hf | original
    image_token: int  # placeholder id of a picture's tokens (original layout: -200, in no table)
    video_token: int
    markers: dict[str, str] = field(default_factory=dict)  # kind -> what a template writes for a
    #   medium, where that is not the token that stands for its own
    around: tuple[str, str] = ("", "")  # what stands around it in a text without parts
    tower: str | None = None  # folder or hub id that may hold the tower's weights (original layout)
    max_length: int | None = None  # context the checkpoint was trained for, for a warning only


@dataclass(frozen=True)
class Section:
    """An object of a JSON file, read key by key.

    Each reader raises a ModelError that names the file and the key at fault.
    """

    raw: dict[str, Any]
    where: str  # the file, as errors name it

    def holding(self, raw: dict[str, Any]) -> "Section":
        """Another object of the same file."""
        return Section(raw, self.where)

    def get(self, key: str, usual: Any = None) -> Any:
        """The value at `key` as it is, `usual` where it is missing."""
        return self.raw.get(key, usual)

    def number(self, key: str, least: int = 1, most: int = 10**7, usual: int | None = None) -> int:
        """The whole number at `key`, in least..most; `usual` where it is missing or null."""
        value = usual if self.get(key) is None else self.get(key)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.wrong(key, value, f"expected a whole number from {least} to {most}")
        return value

    def positive(self, key: str) -> float:
        """The number above zero at `key`."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e15:
            raise self.wrong(key, value, "expected a number above 0")
        return float(value)

    def flag(self, key: str, usual: bool = False) -> bool:
        """The true or false at `key`, `usual` where it is missing or null."""
        value = usual if self.get(key) is None else self.get(key)
        if not isinstance(value, bool):
            raise self.wrong(key, value, "expected true or false")
        return value

    def choice(self, key: str, options: tuple[str, ...], usual: str | None = None) -> str:
        """The value at `key`, `usual` where it is missing, which must be one of `options`."""
        return self.one_of(self.get(key, usual), options, key)

    def one_of(self, value: Any, options: tuple[str, ...], what: str) -> str:
        """`value` if it is one of `options`; the error calls it `what`."""
        if value not in options:
            raise self.fault(f"{what} {shown(value)} is not supported ({', '.join(options)} are)")
        return value

    def colours(self, key: str, usual: tuple[float, ...]) -> tuple[float, ...]:
        """A number above zero for each of the three channels, `usual` where settings lack them."""
        values = self.get(key) or usual
        if not isinstance(values, list | tuple) or len(values) != 3:
            raise self.wrong(key, values, "expected three numbers")
        return tuple(self.holding({key: value}).positive(key) for value in values)

    def section(self, key: str) -> "Section":
        """A copy of the object at `key`, empty where it is missing or null."""
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(key, value, "expected an object")
        return self.holding(dict(value or {}))

    def wrong(self, key: str, value: Any, expected: str) -> ModelError:
        """The error that says what stands at `key` instead of what was expected."""
        return self.fault(f"{key} is {shown(value)}, {expected}")

    def fault(self, text: str) -> ModelError:
        return ModelError(f"{self.where}: {text}")


def read_text(file: Section, kind: Any, tied: bool) -> TextConfig:
    """Decoder config from HF keys, written by transformers 4 or 5."""
    c = file.holding(DECODERS[file.one_of(kind, tuple(DECODERS), "decoder")] | file.raw)
    rope = c.section("rope_scaling").raw | c.section("rope_parameters").raw
    scaling = c.one_of(
        rope.get("rope_type", rope.get("type", "default")),
        ("default", "linear", "mrope"),
        "rope type",
    )
    c.choice("hidden_act", ("silu",))
    heads, width, own = c.number("num_attention_heads"), c.number("hidden_size"), c.get("head_dim")
    shared = {"num_key_value_heads": c.get("num_key_value_heads") or heads}
    c = c.holding(c.raw | shared | {"head_dim": own or width // heads})
    kv_heads, head_dim = c.number("num_key_value_heads"), c.number("head_dim")
    if (width % heads and not own) or heads % kv_heads or head_dim % 2:
        raise c.fault(
            f"hidden_size {width}, {heads} heads of {head_dim} and {kv_heads} key/value "
            "heads do not divide"
        )
    qwen = kind in ("qwen2", "qwen3")
    windowed = kind == "mistral" or (qwen and c.flag("use_sliding_window"))
    windowed = windowed and c.get("sliding_window") is not None
    return TextConfig(
        kind=kind,
        vocab_size=c.number("vocab_size"),
        hidden_size=width,
        intermediate_size=c.number("intermediate_size"),
        num_layers=c.number("num_hidden_layers", most=1000),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=c.positive("rms_norm_eps"),
        rope_theta=c.holding(c.raw | rope).positive("rope_theta"),
        rope_factor=c.holding(rope).positive("factor") if scaling == "linear" else 1.0,
        rope_sections=_sections(c.holding(c.raw | rope), head_dim),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        tied=tied,
        sliding_window=c.number("sliding_window") if windowed else None,
    )


def _sections(rope: Section, head_dim: int) -> tuple[int, ...]:
    """Of M-RoPE, how many pairs of a head are turned by time, row and column."""
    value = rope.get("mrope_section")
    if value is None:
        return ()
    whole = isinstance(value, list) and len(value) == 3 and all(type(n) is int for n in value)
    if not whole or min(value) < 0 or sum(value) != head_dim // 2:
        raise rope.wrong(
            "mrope_section", value, f"expected three numbers that sum to {head_dim // 2}"
        )
    return tuple(value)


def shown(value: Any) -> str:
    """A value from a file, short enough for a sentence."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = "a huge number"
    return text if len(text) <= 60 else f"{text[:60]}..."


def check_file(path: Path, most: int | None = None) -> None:
    """Raises ModelError where `path` is no regular file, cannot be read or has over `most` bytes.

    To open a pipe would wait for ever, and a device has no end.
    """
    try:
        info = path.stat()
        if stat.S_ISREG(info.st_mode) and not os.access(path, os.R_OK):
            raise PermissionError(13, "Permission denied")
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: a checkpoint folder needs it") from None
    except (OSError, ValueError) as e:
        raise ModelError(f"{path} cannot be read: {getattr(e, 'strerror', None) or e}") from None
    if not stat.S_ISREG(info.st_mode):
        raise ModelError(f"{path} is a folder, a pipe or a device: a checkpoint holds plain files")
    if most is not None and info.st_size > most:
        raise ModelError(
            f"{path} has {info.st_size:,} bytes, and zipvl reads {most:,} of such a file: download "
            "it again"
        )


def read_bytes(path: Path, most: int) -> bytes:
    """What is in a file of a checkpoint. Raises ModelError as `check_file` does."""
    check_file(path, most)
    try:
        with path.open("rb") as file:
            return file.read(most)  # a size may be a lie, in /proc
    except OSError as e:
        raise ModelError(f"{path} cannot be read: {e.strerror or e}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from `path`, or one sentence about why not."""
    try:
        data = json.loads(read_bytes(path, JSON_BYTES).decode())
    except (ValueError, RecursionError) as e:  # bad JSON, bad UTF-8, huge digits
        raise ModelError(f"{path} is not readable JSON ({e}): download the file again") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path} does not hold a JSON object: download the file again")
    return data


def optional_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, {} where there is no such file."""
    return read_json(path) if os.path.exists(path) else {}
