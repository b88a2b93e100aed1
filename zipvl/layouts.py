"""The two layouts of LLaVA checkpoints, told apart by config keys, never by the folder's name:

  HF layout        config.json has `text_config` / `vision_config`   (llava-hf/...)
  original layout  config.json has `mm_vision_tower`                 (liuhaotian/..., lmms-lab/...)
"""

import ast
import re
from pathlib import Path
from typing import Any

from .config import MediaConfig, ModelConfig, VisionConfig, read_json, read_text, read_vision
from .errors import ModelError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
ONEVISION_PINPOINTS = [[384 * a, 384 * b] for a in range(1, 7) for b in range(1, 7)]
NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
CLIP_L_336 = dict(model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096,
                  num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14)  # fmt: skip
SIGLIP_SO400M = dict(model_type="siglip_vision_model", hidden_size=1152, intermediate_size=4304,
                     num_hidden_layers=27, num_attention_heads=16, image_size=384, patch_size=14)  # fmt: skip
PUBLIC_TOWERS = {
    "openai/clip-vit-large-patch14-336": CLIP_L_336,
    "google/siglip-so400m-patch14-384": SIGLIP_SO400M,
}


def read_config(folder: Path) -> ModelConfig:
    """Config of the checkpoint in `folder`, either layout. Raises ModelError with the key at fault."""
    raw = read_json(folder / "config.json")
    if isinstance(raw.get("text_config"), dict) or isinstance(raw.get("vision_config"), dict):
        return _read_hf(folder, raw)
    if "mm_vision_tower" in raw:
        return _read_original(folder, raw)
    kind = (raw.get("architectures") or [raw.get("model_type")])[0]
    raise ModelError(
        f"{folder / 'config.json'} describes {kind!r}, which is not a LLaVA-family model: "
        "zipvl loads LLaVA-1.5, NeXT, NeXT-Video, OneVision and LongVA"
    )


def _preprocessor(folder: Path) -> dict[str, Any]:
    """Image-processor settings: preprocessor_config.json (v4) or processor_config.json (v5)."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).exists():
            raw = read_json(folder / name)
            raw = raw.get("image_processor", raw)
            if "image_mean" in raw or "size" in raw:
                return raw
    return {}


def _pixels(pre: dict[str, Any], vision: VisionConfig) -> dict[str, Any]:
    """The MediaConfig fields about pixels, from processor settings with the tower's own as fallback."""
    size = pre.get("size")
    squash = vision.kind == "siglip" if size is None else isinstance(size, dict) and "height" in size
    mean, std = (HALF, HALF) if vision.kind == "siglip" else (CLIP_MEAN, CLIP_STD)
    return dict(
        size=vision.image_size,
        resize="squash" if squash else "crop",
        mean=tuple(pre.get("image_mean") or mean),
        std=tuple(pre.get("image_std") or std),
    )


HF_FAMILIES = {
    "LlavaForConditionalGeneration": "llava",
    "LlavaNextForConditionalGeneration": "llava_next",
    "LlavaNextVideoForConditionalGeneration": "llava_next_video",
    "LlavaOnevisionForConditionalGeneration": "llava_onevision",
}


def _read_hf(folder: Path, raw: dict) -> ModelConfig:
    where = str(folder / "config.json")
    name = (raw.get("architectures") or [None])[0]
    family = HF_FAMILIES.get(name, raw.get("model_type") if name is None else name)
    if family not in HF_FAMILIES.values():
        raise ModelError(f"{where}: architecture {family!r} is not supported ({', '.join(HF_FAMILIES)} are)")
    onevision, video = family == "llava_onevision", family == "llava_next_video"
    text, tower = dict(raw.get("text_config") or {}), dict(raw.get("vision_config") or CLIP_L_336)
    tower.setdefault("model_type", "siglip_vision_model" if onevision else "clip_vision_model")
    layers = raw.get("vision_feature_layer", -1 if onevision else -2)
    strategy = raw.get("vision_feature_select_strategy", "full" if onevision else "default")
    vision = read_vision(tower, layers if isinstance(layers, list) else [layers], strategy, where)
    pre = _preprocessor(folder)
    pinpoints = raw.get("image_grid_pinpoints") or (ONEVISION_PINPOINTS if onevision else NEXT_PINPOINTS)
    plain = "pad" if pre.get("do_pad") and family == "llava" else "crop"
    limit = re.fullmatch(r"anyres_max_(\d+)", raw.get("vision_aspect_ratio", "anyres_max_9"))
    tied = bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    return ModelConfig(
        text=read_text(text, text.get("model_type", "qwen2" if onevision else "llama"), tied, where),
        vision=vision,
        media=MediaConfig(
            **_pixels(pre, vision),
            image=plain if family == "llava" else "anyres",
            pinpoints=() if family == "llava" else tuple((h, w) for h, w in pinpoints),
            merge="flat" if family == "llava" else "spatial_unpad",
            max_tiles=int(limit[1]) if onevision and limit else None,
            several="pad" if onevision else "same",
            pool="bilinear" if onevision else raw.get("spatial_pool_mode", "average"),
            stride=2 if onevision else raw.get("spatial_pool_stride", 2),
            pool_first=video,
            video_newline="one" if onevision else "none",
        ),
        family=family,
        layout="hf",
        projector="mlp2x_gelu",
        projector_bias=raw.get("multimodal_projector_bias", True),
        newline=family != "llava",
        image_token=raw.get("image_token_index", raw.get("image_token_id", _image_token(family))),
        video_token=raw.get("video_token_index", raw.get("video_token_id", _video_token(family))),
        max_length=text.get("max_position_embeddings"),
    )


def _image_token(family: str) -> int:
    return {"llava_next_video": 32001, "llava_onevision": 151646}.get(family, 32000)


def _video_token(family: str) -> int:
    return {"llava_next_video": 32000, "llava_onevision": 151647}.get(family, 32000)


def _pinpoint_list(value: Any, tile: int, where: str) -> tuple[tuple[int, int], ...]:
    """Original pinpoints are (width, height): a list, a Python literal, or "(1x1),...,(6x6)" in tiles."""
    if isinstance(value, str) and "x" in value:
        pairs = [tuple(map(int, p)) for p in re.findall(r"\((\d+)x(\d+)\)", value)]
        if not pairs:
            raise ModelError(f"{where}: image_grid_pinpoints {value!r} is not understood")
        (a, b), (c, d) = pairs[0], pairs[-1]
        value = [(i * tile, j * tile) for i in range(a, c + 1) for j in range(b, d + 1)]
    elif isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise ModelError(f"{where}: image_grid_pinpoints {value!r} is not understood") from None
    return tuple((h, w) for w, h in value or [])


def _tower_config(folder: Path, name: str, where: str) -> tuple[dict, str]:
    """The tower's config dict and the place (folder or hub id) where its weights may be."""
    for place in (Path(name), folder / name):
        if (place / "config.json").exists():
            return read_json(place / "config.json"), str(place)
    for public, config in PUBLIC_TOWERS.items():
        if name == public or Path(name).name == public.split("/")[1]:
            return config, public
    raise ModelError(
        f"{where}: mm_vision_tower {name!r} is neither a folder with a config.json nor one of "
        f"{', '.join(PUBLIC_TOWERS)}: put the tower's folder there"
    )


def _read_original(folder: Path, raw: dict) -> ModelConfig:
    where = str(folder / "config.json")
    name = (raw.get("architectures") or [raw.get("model_type") or ""])[0].lower()
    kind = next((k for k in ("mistral", "qwen") if k in name), "llama")
    kind = {"qwen": "qwen2"}.get(kind, kind)
    tower, place = _tower_config(folder, raw["mm_vision_tower"], where)
    siglip = "siglip" in str((tower.get("vision_config") or tower).get("model_type", ""))
    select = raw.get("mm_vision_select_feature", "patch")
    vision = read_vision(
        tower, None if siglip else [raw.get("mm_vision_select_layer", -2)], select, where
    )
    if kind != "llama":  # the original Qwen and Mistral classes ignore rope_scaling
        raw = raw | {"rope_scaling": None}
    merge, aspect = raw.get("mm_patch_merge_type", "flat"), raw.get("image_aspect_ratio") or "square"
    limit = re.fullmatch(r"anyres_max_(\d+)", aspect)
    longva, onevision = merge == "unires", limit is not None
    newline = "unpad" in merge
    return ModelConfig(
        text=read_text(raw, kind, bool(raw.get("tie_word_embeddings")), where),
        vision=vision,
        media=MediaConfig(
            **_pixels({}, vision),
            image="anyres" if aspect.startswith("anyres") else "pad" if aspect == "pad" else "crop",
            pinpoints=_pinpoint_list(raw.get("image_grid_pinpoints"), vision.image_size, where),
            merge="tiles" if longva else merge,
            max_tiles=int(limit[1]) if limit else None,
            round_unpad=False,
            several="pad" if onevision else "same",
            pool=raw.get("mm_spatial_pool_mode") or ("bilinear" if siglip else "average"),
            stride=raw.get("mm_spatial_pool_stride") or 2,
            pool_first=raw.get("mm_pooling_position") == "before",
            video_newline=_video_newline(raw, onevision) if newline else "none",
        ),
        family="longva" if longva else "llava_onevision" if onevision else
        "llava_next" if aspect.startswith("anyres") else "llava",
        layout="original",
        projector=raw.get("mm_projector_type", "linear"),
        projector_bias=True,
        newline=newline,
        image_token=-200,
        video_token=-200,
        tower=place,
        max_length=raw.get("tokenizer_model_max_length") or raw.get("max_position_embeddings"),
    )  # fmt: skip


def _video_newline(raw: dict, onevision: bool) -> str:
    """mm_newline_position where it is written; else what each family's own demo sets."""
    spelled = {"one_token": "one", "no_token": "none", "grid": "grid", "frame": "frame"}
    return spelled.get(raw.get("mm_newline_position", ""), "one" if onevision else "none")
