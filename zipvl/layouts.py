"""The two layouts of LLaVA checkpoints, told apart by config keys, never by the folder's name:

HF layout        config.json has `text_config` / `vision_config`   (llava-hf/...)
original layout  config.json has `mm_vision_tower`                 (liuhaotian/..., lmms-lab/...)
"""

import re
from pathlib import Path
from typing import Any

from .config import MediaConfig, ModelConfig, read_json
from .errors import ModelError
from .fields import (
    TEXT_DEFAULTS,
    choice,
    max_length,
    max_tiles,
    number,
    read_pinpoints,
    read_preprocessor,
    read_stride,
    read_text,
    section,
    shown,
)
from .towers import CLIP_L_336, SIGLIP_SO400M, needs_map, read_pixels, read_vision, tower_config

ONEVISION_PINPOINTS = [[384 * a, 384 * b] for a in range(1, 7) for b in range(1, 7)]
NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
SIGLIP_26 = SIGLIP_SO400M | {"num_hidden_layers": 26}  # HF leaves out the block that is never used
HF_FAMILIES = {
    "LlavaForConditionalGeneration": "llava",
    "LlavaNextForConditionalGeneration": "llava_next",
    "LlavaNextVideoForConditionalGeneration": "llava_next_video",
    "LlavaOnevisionForConditionalGeneration": "llava_onevision",
}
MEDIA_TOKENS = {  # ids of a picture's and a video's placeholder where config.json leaves them out
    "llava": (32000, None),  # no video token: its frames stand under the picture's
    "llava_next": (32000, None),
    "llava_next_video": (32001, 32000),
    "llava_onevision": (151646, 151647),
}
DECODERS = ("llama", "mistral", "qwen2")
POOLS = ("average", "max", "bilinear")
NEWLINES = {"one_token": "one", "no_token": "none", "grid": "grid", "frame": "frame"}


def read_config(folder: Path) -> ModelConfig:
    """Config of the checkpoint in `folder`, either layout. ModelError names the key at fault."""
    raw = read_json(folder / "config.json")
    where = str(folder / "config.json")
    if isinstance(raw.get("text_config"), dict) or isinstance(raw.get("vision_config"), dict):
        return _read_hf(folder, raw, where)
    if "mm_vision_tower" in raw:
        return _read_original(folder, raw, where)
    raise ModelError(
        f"{where} describes {shown(_architecture(raw))}, which is not a LLaVA-family model: "
        "zipvl loads LLaVA-1.5, NeXT, NeXT-Video, OneVision and LongVA"
    )


def _architecture(raw: dict) -> Any:
    """architectures[0], which is more reliable than model_type; the latter where it is missing."""
    listed = raw.get("architectures")
    return listed[0] if isinstance(listed, list) and listed else raw.get("model_type")


def _read_hf(folder: Path, raw: dict, where: str) -> ModelConfig:
    name = _architecture(raw)
    families = {**HF_FAMILIES, **{v: v for v in HF_FAMILIES.values()}}
    family = families[choice(name, tuple(families), "architecture", where)]
    onevision, plain = family == "llava_onevision", family == "llava"
    text = section(raw, "text_config", where)
    usual = SIGLIP_26 if onevision else CLIP_L_336
    tower = (
        dict(usual) if raw.get("vision_config") is None else section(raw, "vision_config", where)
    )
    tower.setdefault("model_type", "siglip_vision_model" if onevision else "clip_vision_model")
    select = raw.get("vision_feature_select_strategy", "full" if onevision else "default")
    choice(select, ("default", "full"), "vision_feature_select_strategy", where)
    layers = raw.get("vision_feature_layer", -1 if onevision else -2)
    vision = read_vision(tower, layers, select == "default", where)
    if not plain:
        needs_map(vision, where)
    pre = read_preprocessor(folder)
    canvases = ONEVISION_PINPOINTS if onevision else NEXT_PINPOINTS
    pinpoints = raw.get("image_grid_pinpoints") or canvases
    tied = bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    kind = text.get("model_type", "qwen2" if onevision else "llama")
    decoder = read_text(text, kind, tied, where)
    choice(raw.get("projector_hidden_act", "gelu"), ("gelu",), "projector_hidden_act", where)
    image, video = _media_tokens(raw, family, where)
    tiles = max_tiles(raw.get("vision_aspect_ratio", "anyres_max_9"))
    mode = raw.get("spatial_pool_mode", "average")
    return ModelConfig(
        text=decoder,
        vision=vision,
        media=MediaConfig(
            **read_pixels(pre, vision, str(folder)),
            image="anyres" if not plain else "pad" if pre.get("do_pad") else "crop",
            pinpoints=() if plain else read_pinpoints(pinpoints, vision.image_size, where),
            merge="flat" if plain else "spatial_unpad",
            max_tiles=tiles if onevision else None,
            several="pad" if onevision else "same",
            pool="bilinear" if onevision else choice(mode, POOLS, "spatial_pool_mode", where),
            stride=2 if onevision else read_stride(raw, "spatial_pool_stride", where),
            pool_first=family == "llava_next_video",
            video_newline="one" if onevision else "none",
        ),
        family=family,
        layout="hf",
        projector="mlp2x_gelu",
        projector_bias=bool(raw.get("multimodal_projector_bias", True)),
        newline=not plain,
        image_token=image,
        video_token=video,
        max_length=max_length(TEXT_DEFAULTS[decoder.kind] | text),
    )


def _media_tokens(raw: dict, family: str, where: str) -> tuple[int, int]:
    """(picture, video) placeholder ids, under either spelling."""

    def find(kind: str, usual: int) -> int:
        keys = [key for key in (f"{kind}_token_index", f"{kind}_token_id") if key in raw]
        return number(raw, keys[0], where, least=0) if keys else usual

    usual_image, usual_video = MEDIA_TOKENS[family]
    image = find("image", usual_image)
    return image, image if usual_video is None else find("video", usual_video)


def _read_original(folder: Path, raw: dict, where: str) -> ModelConfig:
    name = str(_architecture(raw)).lower()
    decoder = re.sub("llava|forcausallm|[^a-z0-9]", "", name) or "llama"
    kind = choice({"qwen": "qwen2"}.get(decoder, decoder), DECODERS, f"decoder of {name}", where)
    if kind != "llama":  # the original Qwen and Mistral classes ignore rope_scaling
        raw = raw | {"rope_scaling": None}
    tower, place = tower_config(folder, raw["mm_vision_tower"], where)
    siglip = "siglip" in str((section(tower, "vision_config", place) or tower).get("model_type"))
    select = raw.get("mm_vision_select_feature", "patch")
    choice(select, ("patch", "cls_patch"), "mm_vision_select_feature", where)
    layers = None if siglip else raw.get("mm_vision_select_layer", -2)
    vision = read_vision(tower, layers, select == "patch", where)
    merge = str(raw.get("mm_patch_merge_type") or "flat")
    aspect = str(raw.get("image_aspect_ratio") or "square")
    if merge != "flat":
        needs_map(vision, where)
    tiles, anyres, newline = max_tiles(aspect), aspect.startswith("anyres"), "unpad" in merge
    pinpoints = raw.get("image_grid_pinpoints")
    usual = "bilinear" if siglip else "average"
    mode = raw.get("mm_spatial_pool_mode") or usual
    return ModelConfig(
        text=read_text(raw, kind, bool(raw.get("tie_word_embeddings")), where),
        vision=vision,
        media=MediaConfig(
            **read_pixels({}, vision, where),
            image="anyres" if anyres else "pad" if aspect == "pad" else "crop",
            pinpoints=_flipped(pinpoints, vision.image_size, where) if anyres else (),
            merge="tiles" if merge == "unires" else merge,
            max_tiles=tiles,
            round_unpad=False,
            several="pad" if tiles else "same",
            pool=choice(mode, POOLS, "mm_spatial_pool_mode", where),
            stride=read_stride(raw, "mm_spatial_pool_stride", where),
            pool_first=raw.get("mm_pooling_position") == "before",
            video_newline=_video_newline(raw, tiles is not None, where) if newline else "none",
        ),
        family="longva" if merge == "unires" else "llava_onevision" if tiles else
        "llava_next" if anyres else "llava",
        layout="original",
        projector=str(raw.get("mm_projector_type", "linear")),
        projector_bias=True,
        newline=newline,
        image_token=-200,
        video_token=-200,
        tower=place,
        max_length=max_length(raw),
    )  # fmt: skip


def _flipped(pinpoints: Any, tile: int, where: str) -> tuple[tuple[int, int], ...]:
    """The original code reads pinpoints as (width, height), HF the same list as (height, width)."""
    return tuple((h, w) for w, h in read_pinpoints(pinpoints, tile, where))


def _video_newline(raw: dict, onevision: bool, where: str) -> str:
    """mm_newline_position where it is written; else what each family's own demo sets."""
    value = raw.get("mm_newline_position") or ("one_token" if onevision else "no_token")
    return NEWLINES[choice(value, tuple(NEWLINES), "mm_newline_position", where)]
