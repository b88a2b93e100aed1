"""The vision tower's part of a checkpoint's config: its shape, and where it comes from."""

from pathlib import Path
from typing import Any

from .config import VisionConfig, read_json
from .errors import ModelError
from .fields import choice, number, positive, read_colours, section, shown

CLIP = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "image_size": 224,
    "num_attention_heads": 12, "patch_size": 32, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu",
}  # fmt: skip
SIGLIP = CLIP | {"patch_size": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"}
VISION_DEFAULTS: dict[str, dict[str, Any]] = {"clip": CLIP, "siglip": SIGLIP}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
CLIP_L_336 = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
    "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
}  # fmt: skip
SIGLIP_SO400M = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
    "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
}  # fmt: skip
PUBLIC_TOWERS = {
    "openai/clip-vit-large-patch14-336": CLIP_L_336,
    "google/siglip-so400m-patch14-384": SIGLIP_SO400M,
}


def read_vision(raw: dict, layers: Any, drop_cls: bool, where: str) -> VisionConfig:
    """Tower config from a CLIP/SigLIP config (a full CLIP config holds it under `vision_config`).

    `layers` are hidden-state indices as configs write them (-2: before the last block), one or a
    list; None means the original SigLIP rule: all blocks but the last. `drop_cls` counts for CLIP.
    """
    inner = section(raw, "vision_config", where) or raw
    kind = inner.get("model_type") or raw.get("model_type")
    name = kind.removesuffix("_vision_model") if isinstance(kind, str) else kind
    kind = choice(name, tuple(VISION_DEFAULTS), "vision tower", where)
    c = VISION_DEFAULTS[kind] | inner
    count = number(c, "num_hidden_layers", where, most=1000)
    listed = [-2] if layers is None else layers if isinstance(layers, list) else [layers]
    if not listed or not all(type(i) is int and -count - 1 <= i <= count for i in listed):
        raise ModelError(
            f"{where}: vision_feature_layer {shown(layers)} does not fit {count} layers"
        )
    heads, width = number(c, "num_attention_heads", where), number(c, "hidden_size", where)
    size, patch = (number(c, key, where, most=10**4) for key in ("image_size", "patch_size"))
    if width % heads or size < patch:
        raise ModelError(
            f"{where}: width {width}, {heads} heads, image {size} and patch {patch} do not fit"
        )
    return VisionConfig(
        kind=kind,
        hidden_size=width,
        intermediate_size=number(c, "intermediate_size", where),
        num_layers=count,
        num_heads=heads,
        image_size=size,
        patch_size=patch,
        layer_norm_eps=positive(c, "layer_norm_eps", where),
        hidden_act=choice(
            c["hidden_act"], ("quick_gelu", "gelu", "gelu_pytorch_tanh"), "hidden_act", where
        ),
        take=tuple(i if i >= 0 else count + 1 + i for i in listed),
        drop_cls=kind == "clip" and drop_cls,
    )


def read_pixels(pre: dict[str, Any], vision: VisionConfig, where: str) -> dict[str, Any]:
    """The MediaConfig fields about pixels: processor settings, the tower's own where they lack."""
    siglip, size = vision.kind == "siglip", pre.get("size")
    squash = siglip if size is None else isinstance(size, dict) and "height" in size
    usual = (HALF, HALF) if siglip else (CLIP_MEAN, CLIP_STD)
    mean, std = read_colours(pre, usual, where)
    resize = "squash" if squash else "crop"
    return {"size": vision.image_size, "resize": resize, "mean": mean, "std": std}


def tower_config(folder: Path, name: Any, where: str) -> tuple[dict, str]:
    """The tower's config dict and the place (folder or hub id) where its weights may be."""
    name = name if isinstance(name, str) else ""
    for place in (folder / name, Path(name)):
        if name and (place / "config.json").exists():
            return read_json(place / "config.json"), str(place)
    for public, config in PUBLIC_TOWERS.items():
        if name == public or Path(name).name == public.split("/")[1]:
            return config, public
    raise ModelError(
        f"{where}: mm_vision_tower {name!r} is neither a folder with a config.json nor one of "
        f"{', '.join(PUBLIC_TOWERS)}: put the tower's folder there"
    )


def needs_map(vision: VisionConfig, where: str) -> None:
    """ModelError where features must lie on a grid and CLIP keeps its class token in front."""
    if vision.kind == "clip" and not vision.drop_cls:
        raise ModelError(f"{where}: only LLaVA-1.5 can keep CLIP's class token (feature selection)")
