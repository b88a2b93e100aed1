"""Tiny random checkpoints of every family, in every spelling hub folders come in.

`build_hf` saves a model of the Hugging Face layout through its own class (tiny_original.py has the
original layout); `respell`, `shard` and `as_v4` rewrite a saved folder. The weights are redrawn: the usual init (std .02) gives flat logits on which any engine would agree.
Everything is deterministic in `seed`, and each folder is under a megabyte.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers_tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "image_size": 56, "patch_size": 14, "projection_dim": 32,
}  # fmt: skip
SIGLIP: dict[str, Any] = {  # a 5x5 grid, odd as the real 27x27, and 2 pixels that no patch covers
    "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "image_size": 72, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
LLAMA: dict[str, Any] = dict(
    model_type="llama", **SMALL, max_position_embeddings=4096, rms_norm_eps=1e-5
)
MISTRAL: dict[str, Any] = dict(
    model_type="mistral", **SMALL, num_key_value_heads=2, max_position_embeddings=32768,
    rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, sliding_window=None,
)  # fmt: skip
QWEN2: dict[str, Any] = dict(
    model_type="qwen2", **SMALL, num_key_value_heads=2, max_position_embeddings=32768,
    rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
)  # fmt: skip
CLIP_PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
SIGLIP_PINPOINTS = [[72 * a, 72 * b] for a in range(1, 7) for b in range(1, 7)]
CLIP_PIXELS = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SIGLIP_PIXELS = {
    "size": {"height": 72, "width": 72},
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}


@dataclass(frozen=True)
class HF:
    """What one Hugging Face family is made of; `processor` says which file holds the pixel settings."""

    name: str  # Llava | LlavaNext | LlavaNextVideo | LlavaOnevision
    text: dict[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=lambda: CLIP)
    tokens: tuple[str, ...] = ("<image>", "<pad>")  # added after the tokenizer's own, in this order
    template: str | None = None  # chat template the folder ships
    processor: str = "preprocessor_config.json"


ANYRES = {"image_grid_pinpoints": CLIP_PINPOINTS}
ANYRES_MAX = {"image_grid_pinpoints": SIGLIP_PINPOINTS}
BOTH = ("<image>", "<video>")
LINEAR = {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}}
TIED = {"tie_word_embeddings": True}
V5 = "processor_config.json"
FAMILIES = {
    "llava": HF("Llava", LLAMA, template=tokenizers_tiny.VICUNA, processor=V5),
    "llava_next": HF("LlavaNext", LLAMA, ANYRES),
    "llava_next_mistral": HF("LlavaNext", MISTRAL, ANYRES, processor=V5),
    "llava_next_video": HF(
        "LlavaNextVideo", LLAMA | LINEAR, ANYRES, CLIP, ("<video>", "<image>", "<pad>"),
        tokenizers_tiny.VICUNA,
    ),
    "llava_onevision": HF(
        "LlavaOnevision", QWEN2, ANYRES_MAX, SIGLIP, BOTH, tokenizers_tiny.CHATML
    ),
    "llava_onevision_tied": HF(
        "LlavaOnevision", QWEN2 | TIED, ANYRES_MAX | TIED, SIGLIP, BOTH, processor=V5
    ),
}  # fmt: skip


def build_hf(
    kind: str, folder: Path, seed: int = 0, extra: dict[str, Any] | None = None
) -> nn.Module:
    """Saves one of FAMILIES in `folder` and returns the model; `extra` overrides top-level config keys."""
    made = FAMILIES[kind]
    ids, size = write_tokenizer(folder, made.text["model_type"], made.tokens, made.template)
    tokens = {"image_token_index": ids["<image>"]}
    if "<video>" in ids:
        tokens["video_token_index"] = ids["<video>"]
    config = getattr(transformers, f"{made.name}Config")(
        vision_config=dict(made.vision),
        text_config=made.text | {"vocab_size": -(-size // 64) * 64, "pad_token_id": 0},
        **tokens | made.extra | (extra or {}),
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{made.name}ForConditionalGeneration")(config).eval()
    redraw(model)
    quieten(model.lm_head.weight, sorted(ids.values()), size)
    model.generation_config.eos_token_id = None  # greedy oracles run their full length
    model.save_pretrained(folder)
    _write_pixels(folder, made)
    return model


def _write_pixels(folder: Path, made: HF) -> None:
    """Image settings alone (transformers 4), or nested in one file of all processors (transformers 5)."""
    pixels = SIGLIP_PIXELS if made.vision is SIGLIP else CLIP_PIXELS
    grid = {k: v for k, v in made.extra.items() if k == "image_grid_pinpoints"}
    kind = {"Llava": "CLIP", "LlavaNextVideo": "LlavaNext"}.get(made.name, made.name)
    module = getattr(transformers, f"{kind}ImageProcessorPil")(**pixels, **grid)
    raw = json.loads(module.to_json_string())
    nested = made.processor == "processor_config.json"
    write_json(
        folder / made.processor,
        {"processor_class": f"{made.name}Processor", "image_processor": raw} if nested else raw,
    )


def write_tokenizer(
    folder: Path, kind: str, added: tuple[str, ...], template: str | None = None
) -> tuple[dict[str, int], int]:
    """A toy tokenizer with `added` special tokens; returns the ids of all special ones and the size."""
    qwen = kind == "qwen2"
    write = tokenizers_tiny.write_qwen_like if qwen else tokenizers_tiny.write_llama_like
    write(folder, (*QWEN_SPECIAL, *added) if qwen else added, chat_template=template)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = tokenizer.get_added_tokens_decoder()
    return {str(t): i for i, t in special.items()}, tokenizer.get_vocab_size()


@torch.no_grad()
def redraw(module: nn.Module) -> None:
    """Matrices from N(0, .15^2), vectors (norms and biases too) shifted by N(0, .05^2)."""
    for p in module.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.15)
        else:
            p.add_(torch.randn_like(p) * 0.05)


@torch.no_grad()
def quieten(head: Tensor, special: list[int], size: int) -> None:
    """Special and padding rows never win the argmax: a stop token would cut a comparison short."""
    head[special] *= 0.05
    head[size:] *= 0.05


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, ensure_ascii=False, indent=1), encoding="utf-8")


TO_NEW = [
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^multi_modal_projector\.", "model.multi_modal_projector."),
    (r"^image_newline$", "model.image_newline"),
]
SPELLINGS = {  # from the names transformers 5 saves: a bare tower under old names for the rest
    "bare": [],
    "old": [(r"^vision_tower\.", "vision_tower.vision_model.")],
    "4.52": [(r"^vision_tower\.", "model.vision_tower.vision_model."), *TO_NEW],
    "new": [(r"^vision_tower\.", "model.vision_tower."), *TO_NEW],
    "original": [
        (r"^vision_tower\.", "model.vision_tower.vision_tower.vision_model."),
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.", ""),
        (r"^multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
        (r"^multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
        (r"^image_newline$", "model.image_newline"),
    ],
}


def rename(tensors: dict[str, Tensor], spelling: str) -> dict[str, Tensor]:
    """`tensors` under the names of one of SPELLINGS; each name is changed by one pattern at most."""
    out = {}
    for name, tensor in tensors.items():
        for pattern, new in SPELLINGS[spelling]:
            if re.search(pattern, name):
                name = re.sub(pattern, new, name)
                break
        out[name] = tensor.contiguous()
    return out


def copy_rest(source: Path, target: Path) -> None:
    """Every file but the weights."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and not path.name.startswith("model"):
            (target / path.name).write_bytes(path.read_bytes())


def respell(source: Path, target: Path, spelling: str) -> None:
    """The checkpoint in `source` again in `target`, its tensors under another spelling."""
    copy_rest(source, target)
    save(rename(load_file(source / "model.safetensors"), spelling), target / "model.safetensors")


def save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})


def shard(source: Path, target: Path, count: int = 3) -> None:
    """The same checkpoint in `count` files and an index."""
    copy_rest(source, target)
    tensors = load_file(source / "model.safetensors")
    files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    where = {name: files[i % count] for i, name in enumerate(sorted(tensors))}
    for name in files:
        save({k: t for k, t in tensors.items() if where[k] == name}, target / name)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    write_json(
        target / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": where},
    )


def as_v4(config: dict[str, Any]) -> dict[str, Any]:
    """A config as transformers 4 wrote it: rope_theta and rope_scaling, torch_dtype, no defaults."""
    out = {k: v for k, v in config.items() if k != "dtype"} | {"torch_dtype": "float32"}
    text = dict(out["text_config"])
    rope = dict(text.pop("rope_parameters", None) or {})
    if "rope_theta" in rope:
        text["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type", "default")
    if kind != "default":
        text["rope_scaling"] = dict(type=kind, **rope)
    for key in ("dtype", "layer_types", "head_dim"):
        text.pop(key, None)
    name = text["model_type"].capitalize() + "Config"
    usual = getattr(transformers, name)().to_dict() | {"rope_theta": 1e4}
    keep = {"model_type", "sliding_window"}
    out["text_config"] = {k: v for k, v in text.items() if k in keep or usual.get(k, ...) != v}
    return out
