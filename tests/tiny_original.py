"""Tiny checkpoints of the original layout (liuhaotian, lmms-lab): no Hugging Face class exists, so
parts of transformers are saved under the original tensor names with an original-style config.json.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny import (
    CLIP,
    LLAMA,
    MISTRAL,
    QWEN2,
    SIGLIP,
    quieten,
    redraw,
    rename,
    save,
    write_json,
    write_tokenizer,
)
from torch import Tensor, nn


@dataclass(frozen=True)
class Original:
    """One original-layout model: `config` holds its multimodal keys, `tower` how the tower is stored.

    tower: inside: all its tensors in the checkpoint, only its config in the second folder
           outside: a full CLIP checkpoint in the second folder, nothing inside
    """

    name: str  # LlavaLlama | LlavaMistral | LlavaQwen
    text: dict[str, Any]
    config: dict[str, Any]
    vision: dict[str, Any] = field(default_factory=lambda: CLIP)
    tower: str = "inside"
    newline: bool = True


ANYRES = {
    "mm_patch_merge_type": "spatial_unpad",
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]],
}
SIGLIP_FULL = SIGLIP | {"num_hidden_layers": 4}  # the original code deletes the last block
LONGVA = [[56 * a, 56 * b] for a in range(1, 8) for b in range(1, 8) if 1 < a * b <= 9]
QWEN_LONG = QWEN2 | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e9}}
ORIGINALS = {
    "original_15": Original(
        "LlavaLlama", LLAMA, {"image_aspect_ratio": "pad"}, tower="outside", newline=False
    ),
    "original_16": Original(
        "LlavaLlama",
        LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        ANYRES | {"rope_scaling": {"type": "linear", "factor": 2.0}, "mm_newline_position": "no_token"},
    ),
    "original_16_mistral": Original(
        "LlavaMistral",
        MISTRAL,
        ANYRES  # Mistral's and Qwen's original classes ignore rope_scaling
        | {"rope_scaling": {"type": "linear", "factor": 4.0}, "image_grid_pinpoints": str(
            [tuple(p) for p in ANYRES["image_grid_pinpoints"]])},
    ),
    "original_onevision": Original(
        "LlavaQwen", QWEN2,
        {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres_max_9",
             "image_grid_pinpoints": "(1x1),...,(6x6)", "mm_spatial_pool_mode": "bilinear"},
        SIGLIP_FULL,
    ),
    "original_video": Original(  # LLaVA-Video: a newline ends every row of every frame
        "LlavaQwen", QWEN2,
        {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres_max_9",
             "image_grid_pinpoints": "(1x1),...,(6x6)", "mm_spatial_pool_mode": "bilinear",
             "mm_spatial_pool_stride": 2, "mm_newline_position": "grid"},
        SIGLIP_FULL,
    ),
    "original_longva": Original(
        "LlavaQwen", QWEN_LONG,
        {"mm_patch_merge_type": "unires", "image_aspect_ratio": "anyres", "image_grid_pinpoints": LONGVA},
        newline=False,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """The modules behind an original-layout checkpoint, and its config as written."""

    llm: nn.Module
    tower: nn.Module
    projector: nn.Module
    newline: Tensor | None  # [C]
    config: dict[str, Any]


def build_original(
    kind: str, folder: Path, seed: int = 0, extra: dict[str, Any] | None = None
) -> Parts:
    """Saves one of ORIGINALS in `folder`, its tower's config (and weights) in `folder`-tower.

    `extra` overrides config keys.
    """
    made = ORIGINALS[kind]
    made = replace(made, config=made.config | (extra or {}))
    ids, size = write_tokenizer(folder, made.text["model_type"], ())
    torch.manual_seed(seed)
    parts = _modules(made, size)
    quieten(parts.llm.lm_head.weight, sorted(ids.values()), size)
    tensors = {f"language_model.{k}": t for k, t in parts.llm.state_dict().items()}
    if parts.newline is not None:
        tensors["image_newline"] = parts.newline
    tower = {k.removeprefix("vision_model."): t for k, t in parts.tower.state_dict().items()}
    _write_tower(folder.with_name(folder.name + "-tower"), made, tower)
    if made.tower == "inside":
        last = f"encoder.layers.{made.vision['num_hidden_layers'] - 1}."
        gone = (last, "head.") if made.vision is SIGLIP_FULL else ("head.",)
        tensors |= {f"vision_tower.{k}": t for k, t in tower.items() if not k.startswith(gone)}
    named = rename(tensors, "original")
    named |= {f"model.mm_projector.{k}": t for k, t in parts.projector.state_dict().items()}
    save(named, folder / "model.safetensors")
    write_json(folder / "config.json", parts.config | {
        "mm_vision_tower": str(folder.with_name(folder.name + "-tower"))})  # fmt: skip
    return parts


def _modules(made: Original, size: int) -> Parts:
    decoder = made.name.removeprefix("Llava").replace("Qwen", "Qwen2")
    fields = {k: v for k, v in made.text.items() if k != "model_type"} | {"vocab_size": size}
    llm = getattr(transformers, f"{decoder}ForCausalLM")(
        getattr(transformers, f"{decoder}Config")(**fields)
    )
    name = "CLIP" if made.vision["model_type"].startswith("clip") else "Siglip"
    shape = {k: v for k, v in made.vision.items() if k != "model_type"}
    tower = getattr(transformers, f"{name}VisionModel")(
        getattr(transformers, f"{name}VisionConfig")(**shape)
    )
    projector = _projector(made.config.get("mm_projector_type", "mlp2x_gelu"))
    for module in (llm, tower, projector):
        redraw(module)
    rope = fields.pop("rope_parameters", None) or {}
    if rope.get("rope_theta", 1e4) != 1e4:
        fields["rope_theta"] = rope["rope_theta"]
    config = dict(
        architectures=[f"{made.name}ForCausalLM"], model_type="llava", hidden_act="silu",
        mm_projector_type="mlp2x_gelu", mm_hidden_size=32, mm_vision_select_layer=-2,
        mm_vision_select_feature="patch", mm_use_im_start_end=False, tokenizer_model_max_length=4096,
        torch_dtype="float32", transformers_version="4.37.2", **fields,
    ) | made.config  # fmt: skip
    newline = torch.randn(64) * 0.3 if made.newline else None
    return Parts(llm.eval(), tower.eval(), projector.eval(), newline, config)


def _projector(kind: str) -> nn.Module:
    """As the original builder makes it: a bare layer, or a Sequential with numbered ones."""
    if kind == "linear":
        return nn.Linear(32, 64)
    layers: list[nn.Module] = [nn.Linear(32, 64)]
    for _ in range(int(kind[3]) - 1):
        layers += [nn.GELU(), nn.Linear(64, 64)]
    return nn.Sequential(*layers)


def _write_tower(folder: Path, made: Original, tensors: dict[str, Tensor]) -> None:
    """The tower's repository: its config as the public ones write it, and weights if asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = made.vision["model_type"].removesuffix("_vision_model")
    write_json(
        folder / "config.json",
        {"model_type": kind, "text_config": {}, "vision_config": made.vision},
    )
    if made.tower == "outside":  # with the other half of CLIP and an old buffer, which nobody reads
        other = {
            "logit_scale": torch.ones(()),
            "visual_projection.weight": torch.randn(8, 32),
            "text_model.encoder.layers.0.layer_norm1.weight": torch.ones(8),
            "vision_model.embeddings.position_ids": torch.arange(17)[None],
        }
        save({f"vision_model.{k}": t for k, t in tensors.items()} | other,
             folder / "model.safetensors")  # fmt: skip
