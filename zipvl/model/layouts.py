"""Which model a checkpoint is, told by config keys, never by the folder's name. The LLaVAs come in
two layouts, other families (OTHERS) in that of Hugging Face:

HF layout        config.json has `text_config` / `vision_config`   (llava-hf/...)
original layout  config.json has `mm_vision_tower`                 (liuhaotian/..., lmms-lab/...)

Hub files leave out every value that equals a class default, so the defaults stand here.
"""

import ast
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..config import (
    DECODERS,
    LlavaConfig,
    MediaConfig,
    ModelConfig,
    Section,
    VisionConfig,
    optional_json,
    read_json,
    read_text,
    shown,
)
from ..errors import ModelError
from ..vision import internvl, qwen
from ..vision.family import CLIP_MEAN, CLIP_STD

# Towers, as the classes of transformers 4 fill them in, and the public ones that checkpoints name.
CLIP = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "image_size": 224,
    "num_attention_heads": 12, "patch_size": 32, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu",
}  # fmt: skip
SIGLIP = CLIP | {"patch_size": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"}
TOWERS: dict[str, dict[str, Any]] = {"clip": CLIP, "siglip": SIGLIP}
HALF = (0.5, 0.5, 0.5)
CLIP_L_336 = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
    "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
}  # fmt: skip
SIGLIP_SO400M = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
    "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
}  # fmt: skip
SIGLIP_26 = SIGLIP_SO400M | {"num_hidden_layers": 26}  # HF leaves out the block that is never used
PUBLIC_TOWERS = {
    "openai/clip-vit-large-patch14-336": CLIP_L_336,
    "google/siglip-so400m-patch14-384": SIGLIP_SO400M,
}
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")

# Families
ONEVISION_PINPOINTS = [[384 * a, 384 * b] for a in range(1, 7) for b in range(1, 7)]
NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
HF_FAMILIES = {
    "LlavaForConditionalGeneration": "llava",
    "LlavaNextForConditionalGeneration": "llava_next",
    "LlavaNextVideoForConditionalGeneration": "llava_next_video",
    "LlavaOnevisionForConditionalGeneration": "llava_onevision",
}
HF_FAMILIES |= {family: family for family in HF_FAMILIES.values()}  # under its model_type
MEDIA_TOKENS: dict[str, tuple[int, int | None]] = {  # a picture's and a video's, where unsaid
    "llava": (32000, None),  # no video token: its frames stand under the picture's
    "llava_next": (32000, None),
    "llava_next_video": (32001, 32000),
    "llava_onevision": (151646, 151647),
}
CANVAS_CROPS, CANVAS_PIXELS, CANVAS_TOKENS = 2**8, 2**26, 2**18  # of one picture
CROP_TOKENS = 2**14
POOLS = ("average", "max", "bilinear")
NEWLINES = {"one_token": "one", "no_token": "none", "grid": "grid", "frame": "frame"}


@dataclass(frozen=True)
class Other:
    """A family that has a file of its own in vision/."""

    family: str
    read: Callable[[Section, Section], Any]  # its record, of config.json and processor settings
    decoder: str  # the usual one
    tokens: tuple[int, int | None]  # usual ids of a picture's and a video's; None: the same one
    usual: dict[str, Any] = field(default_factory=dict)  # what its class fills in where that
    #   differs from this decoder's own
    markers: dict[str, str] = field(default_factory=dict)  # as ModelConfig says
    around: tuple[str, str] = ("", "")


INTERN = Other(
    family="internvl",
    read=internvl.read,
    decoder="qwen2",
    tokens=(151667, None),
    markers={"video": "<video>"},
)
QWEN = Other(
    family="qwen2_vl",
    read=qwen.read,
    decoder="qwen2",
    usual={
        "vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568, "rope_theta": 1e6,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5, "mrope_section": [16, 24, 24],
    },
    tokens=(151655, 151656),
    around=("<|vision_start|>", "<|vision_end|>"),
)  # fmt: skip
OTHERS: dict[str, Other] = {  # by architecture
    "InternVLForConditionalGeneration": INTERN,
    "Qwen2VLForConditionalGeneration": QWEN,
    "Qwen2_5_VLForConditionalGeneration": replace(QWEN, family="qwen2_5_vl", read=qwen.read_25),
}
OTHERS |= {other.family: other for other in OTHERS.values()}  # under its model_type


def read_config(folder: Path) -> ModelConfig:
    """Config of the checkpoint in `folder`, either layout. ModelError names the key at fault."""
    file = Section(read_json(folder / "config.json"), str(folder / "config.json"))
    if (other := OTHERS.get(str(_architecture(file)))) is not None:
        return _read_other(folder, file, other)
    if any(isinstance(file.get(key), dict) for key in ("text_config", "vision_config")):
        return _read_hf(folder, file)
    if "mm_vision_tower" in file.raw:
        return _read_original(folder, file)
    raise ModelError(
        f"{file.where} describes {shown(_architecture(file))}, which zipvl does not load: it loads "
        "LLaVA-1.5, NeXT, NeXT-Video, OneVision, LLaVA-Video, LongVA, InternVL3 and 3.5, "
        "Qwen2-VL and Qwen2.5-VL"
    )


def _architecture(file: Section) -> Any:
    """architectures[0], which is more reliable than model_type; the latter where it is missing."""
    listed = file.get("architectures")
    return listed[0] if isinstance(listed, list) and listed else file.get("model_type")


def _read_hf(folder: Path, file: Section) -> ModelConfig:
    family = HF_FAMILIES[file.one_of(_architecture(file), tuple(HF_FAMILIES), "architecture")]
    onevision, plain = family == "llava_onevision", family == "llava"
    text = file.section("text_config")

    # 1 the tower
    usual = SIGLIP_26 if onevision else CLIP_L_336
    tower = usual if file.get("vision_config") is None else file.section("vision_config").raw
    tower = {"model_type": usual["model_type"]} | tower
    usual_select, usual_layer = ("full", -1) if onevision else ("default", -2)
    select = file.choice("vision_feature_select_strategy", ("default", "full"), usual_select)
    layers = file.get("vision_feature_layer", usual_layer)
    vision = read_vision(file.holding(tower), layers, select == "default", grid=not plain)
    pre = _read_preprocessor(folder)

    # 2 the decoder and what lies between
    tied = file.flag("tie_word_embeddings") | text.flag("tie_word_embeddings")
    decoder = read_text(text, text.get("model_type", "qwen2" if onevision else "llama"), tied)
    file.choice("projector_hidden_act", ("gelu",), "gelu")
    image, video = _media_tokens(file, MEDIA_TOKENS[family])

    # 3 pictures and videos
    tiles = _max_tiles(file.get("vision_aspect_ratio", "anyres_max_9"))
    canvases = ONEVISION_PINPOINTS if onevision else NEXT_PINPOINTS
    canvases = file.get("image_grid_pinpoints") or canvases
    media = MediaConfig(
        **_read_pixels(pre, vision),
        image="anyres" if not plain else "pad" if pre.flag("do_pad") else "crop",
        pinpoints=() if plain else _read_pinpoints(file, canvases, vision),
        merge="flat" if plain else "spatial_unpad",
        max_tiles=tiles if onevision else None,
        several="pad" if onevision else "same",
        pool="bilinear" if onevision else file.choice("spatial_pool_mode", POOLS, "average"),
        stride=2 if onevision else file.number("spatial_pool_stride", most=100, usual=2),
        pool_first=family == "llava_next_video",
        video_newline="one" if onevision else "none",
    )
    biased = file.flag("multimodal_projector_bias", True)
    return ModelConfig(
        text=decoder,
        vision=LlavaConfig(vision, media, "mlp2x_gelu", biased, newline=not plain),
        family=family,
        layout="hf",
        image_token=image,
        video_token=video,
        max_length=_max_length(DECODERS[decoder.kind] | text.raw),
    )


def _read_other(folder: Path, file: Section, other: Other) -> ModelConfig:
    nested = file.get("text_config") is not None  # else the decoder's keys stand beside the tower's
    text = file.section("text_config") if nested else file
    text = text.holding(other.usual | text.raw)
    kind = text.get("model_type", other.decoder)
    if str(kind).startswith(other.family):  # as qwen2_vl_text
        kind = other.decoder
    tied = file.flag("tie_word_embeddings") | text.flag("tie_word_embeddings")
    decoder = read_text(text, kind, tied)
    image, video = _media_tokens(file, other.tokens)
    return ModelConfig(
        text=decoder,
        vision=other.read(file, _read_processors(folder)),
        family=other.family,
        layout="hf",
        image_token=image,
        video_token=video,
        markers=other.markers,
        around=other.around,
        max_length=_max_length(DECODERS[decoder.kind] | text.raw),
    )


def _media_tokens(file: Section, usual: tuple[int, int | None]) -> tuple[int, int]:
    """Ids of a picture's and a video's placeholder, where `usual` knows one of its own for it."""

    def read(kind: str, usual: int) -> int:
        """Under either spelling."""
        keys = [key for key in (f"{kind}_token_index", f"{kind}_token_id") if key in file.raw]
        return file.number(keys[0], least=0) if keys else usual

    image = read("image", usual[0])
    return image, image if usual[1] is None else read("video", usual[1])


def _read_original(folder: Path, file: Section) -> ModelConfig:
    name = str(_architecture(file)).lower()
    kind = re.sub("llava|forcausallm|[^a-z0-9]", "", name) or "llama"
    kind = file.one_of("qwen2" if kind == "qwen" else kind, tuple(DECODERS), f"decoder of {name}")

    # 1 the tower; errors about its values name the checkpoint's own file
    tower = _find_tower(folder, file)
    inner = tower.section("vision_config").raw or tower.raw
    siglip = "siglip" in str(inner.get("model_type"))
    select = file.choice("mm_vision_select_feature", ("patch", "cls_patch"), "patch")
    layers = -2 if siglip else file.get("mm_vision_select_layer")  # SigLIP: all blocks but the last
    merge = str(file.get("mm_patch_merge_type") or "flat")
    vision = read_vision(file.holding(tower.raw), layers, select == "patch", grid=merge != "flat")

    # 2 the decoder; the original Qwen and Mistral classes ignore rope_scaling
    text = file if kind == "llama" else file.holding(file.raw | {"rope_scaling": None})
    decoder = read_text(text, kind, file.flag("tie_word_embeddings"))

    # 3 pictures and videos
    aspect = str(file.get("image_aspect_ratio") or "square")
    tiles, anyres, newline = _max_tiles(aspect), aspect.startswith("anyres"), "unpad" in merge
    pinpoints: tuple[tuple[int, int], ...] = ()
    if anyres:  # written as (width, height), where HF reads the same list as (height, width)
        pairs = _read_pinpoints(file, file.get("image_grid_pinpoints"), vision)
        pinpoints = tuple((h, w) for w, h in pairs)
    mode = file.get("mm_spatial_pool_mode") or ("bilinear" if siglip else "average")
    family = "llava_onevision" if tiles else "llava_next" if anyres else "llava"
    media = MediaConfig(
        **_read_pixels(file.holding({}), vision),
        image="anyres" if anyres else "pad" if aspect == "pad" else "crop",
        pinpoints=pinpoints,
        merge="tiles" if merge == "unires" else merge,
        max_tiles=tiles,
        round_unpad=False,
        several="pad" if tiles else "same",
        pool=file.one_of(mode, POOLS, "mm_spatial_pool_mode"),
        stride=file.number("mm_spatial_pool_stride", most=100, usual=2),
        pool_first=file.get("mm_pooling_position") == "before",
        video_newline=_video_newline(file, tiles is not None) if newline else "none",
    )
    if media.video_newline == "grid":  # LLaVA-Video
        media = replace(media, frames=64, told=file.flag("add_time_instruction"))
    projector = str(file.get("mm_projector_type", "linear"))
    return ModelConfig(
        text=decoder,
        vision=LlavaConfig(vision, media, projector, projector_bias=True, newline=newline),
        family="longva" if merge == "unires" else family,
        layout="original",
        image_token=-200,
        video_token=-200,
        tower=tower.where,
        max_length=_max_length(file.raw),
    )


def _find_tower(folder: Path, file: Section) -> Section:
    """The tower's own config, `where` its weights may be too: a folder or a hub id."""
    name = file.raw["mm_vision_tower"]
    name = name if isinstance(name, str) else ""
    for place in (folder / name, Path(name)):
        if name and os.path.exists(place / "config.json"):
            return Section(read_json(place / "config.json"), str(place))
    for public, config in PUBLIC_TOWERS.items():
        if name == public or Path(name).name == public.split("/")[1]:
            return Section(config, public)
    raise file.fault(
        f"mm_vision_tower {shown(name)} is neither a folder with a config.json nor one of "
        f"{', '.join(PUBLIC_TOWERS)}: put the tower's folder there"
    )


def _video_newline(file: Section, onevision: bool) -> str:
    """mm_newline_position where it is written; else what each family's own demo sets."""
    value = file.get("mm_newline_position") or ("one_token" if onevision else "no_token")
    return NEWLINES[file.one_of(value, tuple(NEWLINES), "mm_newline_position")]


def read_vision(file: Section, layers: Any, drop_cls: bool, grid: bool = False) -> VisionConfig:
    """Tower config from a CLIP/SigLIP config (a full CLIP config holds it under `vision_config`).

    `layers` are hidden-state indices as configs write them (-2: before the last block), one or a
    list; None means -2. `drop_cls` counts for CLIP. `grid`: the features must lie on a map, so
    CLIP's class token may not stay in front of them.
    """
    inner = file.section("vision_config").raw or file.raw
    name = inner.get("model_type") or file.get("model_type")
    name = name.removesuffix("_vision_model") if isinstance(name, str) else name
    kind = file.one_of(name, tuple(TOWERS), "vision tower")
    c = file.holding(TOWERS[kind] | inner)
    count = c.number("num_hidden_layers", most=1000)
    listed = [-2] if layers is None else layers if isinstance(layers, list) else [layers]
    if not listed or not all(type(i) is int and -count - 1 <= i <= count for i in listed):
        raise c.fault(f"vision_feature_layer {shown(layers)} does not fit {count} layers")
    heads, width = c.number("num_attention_heads"), c.number("hidden_size")
    size, patch = (c.number(key, most=10**4) for key in ("image_size", "patch_size"))
    if width % heads or size < patch:
        raise c.fault(f"width {width}, {heads} heads, image {size} and patch {patch} do not fit")
    vision = VisionConfig(
        kind=kind,
        hidden_size=width,
        intermediate_size=c.number("intermediate_size"),
        num_layers=count,
        num_heads=heads,
        image_size=size,
        patch_size=patch,
        layer_norm_eps=c.positive("layer_norm_eps"),
        hidden_act=c.choice("hidden_act", ACTIVATIONS),
        take=tuple(i if i >= 0 else count + 1 + i for i in listed),
        drop_cls=kind == "clip" and drop_cls,
    )
    if vision.grid**2 > CROP_TOKENS:
        raise c.fault(f"image {size} and patch {patch} make over {CROP_TOKENS:,} tokens of a crop")
    if grid and kind == "clip" and not drop_cls:
        raise file.fault("only LLaVA-1.5 can keep CLIP's class token (feature selection)")
    return vision


def _read_preprocessor(folder: Path) -> Section:
    """Image-processor settings: preprocessor_config.json (v4) or processor_config.json (v5)."""
    files = folder / "preprocessor_config.json", folder / "processor_config.json"
    for path in filter(os.path.exists, files):
        raw = read_json(path)
        raw = Section(raw, str(path)).section("image_processor").raw or raw
        if not raw.keys().isdisjoint({"image_mean", "size", "min_pixels", "max_pixels"}):
            return Section(raw, str(folder))
    return Section({}, str(folder))


def _read_processors(folder: Path) -> Section:
    """Image-processor settings, and under `video_processor` those of videos, from a file of their
    own (v4) or processor_config.json (v5)."""
    image, nested = _read_preprocessor(folder), folder / "processor_config.json"
    video = optional_json(folder / "video_preprocessor_config.json")
    video = video or Section(optional_json(nested), str(nested)).section("video_processor").raw
    return image.holding(image.raw | {"video_processor": video})


def _read_pixels(pre: Section, vision: VisionConfig) -> dict[str, Any]:
    """The MediaConfig fields about pixels: processor settings, the tower's own where they lack."""
    siglip, size = vision.kind == "siglip", pre.get("size")
    squash = siglip if size is None else isinstance(size, dict) and "height" in size
    return {
        "size": vision.image_size,
        "resize": "squash" if squash else "crop",
        "mean": pre.colours("image_mean", HALF if siglip else CLIP_MEAN),
        "std": pre.colours("image_std", HALF if siglip else CLIP_STD),
    }


def _read_pinpoints(file: Section, value: Any, vision: VisionConfig) -> tuple[tuple[int, int], ...]:
    """Canvas sizes in pixels, as the file orders a pair (HF: height, width; original: the reverse).

    A list of pairs, the same as a Python literal, or "(1x1),...,(6x6)": all pairs of tile counts
    between the first and the last. Raises ModelError for anything else, for parts of a tile and for
    canvases past the ceilings.
    """
    tile = vision.image_size
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
        raise file.wrong("image_grid_pinpoints", value, f"expected pairs of multiples of {tile}")
    for a, b in value:
        crops = a * b // tile**2
        large = crops > CANVAS_CROPS or a * b > CANVAS_PIXELS
        if large or crops * vision.grid**2 > CANVAS_TOKENS:
            raise file.fault(
                f"image_grid_pinpoints has a canvas of {a} x {b} pixels, {crops:,} crops: zipvl "
                f"makes up to {CANVAS_CROPS} crops, {CANVAS_PIXELS:,} pixels and "
                f"{CANVAS_TOKENS:,} tokens of a picture"
            )
    return tuple((a, b) for a, b in value)


def _is_canvas(pair: Any, tile: int) -> bool:
    return (
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and all(type(side) is int and 0 < side < 10**6 and side % tile == 0 for side in pair)
    )


def _max_tiles(aspect: Any) -> int | None:
    """N of "anyres_max_N", OneVision's mark."""
    found = re.fullmatch(r"anyres_max_([1-9]\d{0,3})", str(aspect))
    return int(found[1]) if found else None


def _max_length(raw: dict[str, Any]) -> int | None:
    """The context a checkpoint was trained for, where the file tells."""
    value = raw.get("tokenizer_model_max_length") or raw.get("max_position_embeddings")
    return value if isinstance(value, int) else None
