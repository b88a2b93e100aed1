"""read_config on both layouts, on both generations of spellings, and on broken files."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_original
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zipvl.config import ModelConfig
from zipvl.errors import ModelError
from zipvl.model.layouts import read_config

KINDS = [*tiny.FAMILIES, *tiny_original.ORIGINALS]


def write(folder: Path, raw: Any, name: str = "config.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(raw if isinstance(raw, str) else json.dumps(raw))
    return folder


def config_of(oracle: Callable, kind: str) -> dict[str, Any]:
    return json.loads((oracle(kind).folder / "config.json").read_text())


def read(folder: Path, raw: dict[str, Any]) -> ModelConfig:
    return read_config(write(folder, raw))


# family, image, merge, pool, pool_first, video_newline, newline, tied, theta, factor, kv heads
EXPECTED = {
    "llava": ("llava", "crop", "flat", "average", False, "none", False, False, 1e4, 1.0, 4),
    "llava_next": ("llava_next", "anyres", "spatial_unpad", "average", False, "none", True, False, 1e4, 1.0, 4),
    "llava_next_mistral": ("llava_next", "anyres", "spatial_unpad", "average", False, "none", True, False, 1e6, 1.0, 2),
    "llava_next_video": ("llava_next_video", "anyres", "spatial_unpad", "average", True, "none", True, False, 1e4, 2.5, 4),
    "llava_onevision": ("llava_onevision", "anyres", "spatial_unpad", "bilinear", False, "one", True, False, 1e6, 1.0, 2),
    "llava_onevision_tied": ("llava_onevision", "anyres", "spatial_unpad", "bilinear", False, "one", True, True, 1e6, 1.0, 2),
    "original_15": ("llava", "pad", "flat", "average", False, "none", False, False, 1e4, 1.0, 4),
    "original_16": ("llava_next", "anyres", "spatial_unpad", "average", False, "none", True, False, 1e4, 2.0, 4),
    "original_16_mistral": ("llava_next", "anyres", "spatial_unpad", "average", False, "none", True, False, 1e6, 1.0, 2),
    "original_onevision": ("llava_onevision", "anyres", "spatial_unpad", "bilinear", False, "one", True, False, 1e6, 1.0, 2),
    "original_video": ("llava_onevision", "anyres", "spatial_unpad", "bilinear", False, "grid", True, False, 1e6, 1.0, 2),
    "original_longva": ("longva", "anyres", "tiles", "average", False, "none", False, False, 1e9, 1.0, 2),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_values(oracle: Callable, kind: str) -> None:
    config = read_config(oracle(kind).folder)
    text, media = config.text, config.vision.media
    found = (config.family, media.image, media.merge, media.pool, media.pool_first,
             media.video_newline, config.vision.newline, text.tied, text.rope_theta, text.rope_factor,
             text.num_kv_heads)  # fmt: skip
    assert found == EXPECTED[kind]
    siglip = "onevision" in kind or kind == "original_video"
    original = kind.startswith("original")
    assert config.layout == ("original" if original else "hf")
    assert media.round_unpad is not original
    assert media.max_tiles == (9 if siglip else None)
    assert media.several == ("pad" if siglip else "same")
    assert (media.size, media.resize) == ((72, "squash") if siglip else (56, "crop"))
    assert media.mean == pytest.approx([0.5] * 3 if siglip else [0.48145466, 0.4578275, 0.40821073])
    tower = config.vision.tower
    assert tower.take == (3,)  # CLIP: before block 4 of 4; SigLIP: after 3 of 3, or of 4
    assert tower.drop_cls is not siglip
    assert tower.tokens == (25 if siglip else 16)
    assert text.qkv_bias is (text.kind == "qwen2")
    assert text.sliding_window is None
    if original:
        assert (config.image_token, config.video_token) == (-200, -200)
        assert config.tower == str(oracle(kind).folder) + "-tower"
    else:
        ids = oracle(kind).tokenizer
        assert config.image_token == ids.token_to_id("<image>")
        video = ids.token_to_id("<video>")
        assert config.video_token == (config.image_token if video is None else video)


@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_transformers_4_and_5_spellings_read_the_same(
    oracle: Callable, kind: str, tmp_path: Path
) -> None:
    tiny.copy_rest(oracle(kind).folder, tmp_path)
    modern = config_of(oracle, kind)
    old = tiny.as_v4(modern)
    assert "rope_parameters" not in old["text_config"]
    assert "dtype" not in old
    assert len(old["text_config"]) < len(modern["text_config"])  # defaults were left out
    assert read(tmp_path, old) == read_config(oracle(kind).folder)


def test_pinpoint_pairs_are_height_width_in_hf_and_width_height_in_original(
    oracle: Callable,
) -> None:
    hf, original = (read_config(oracle(k).folder) for k in ("llava_next", "original_16"))
    assert hf.vision.media.pinpoints[:2] == ((56, 112), (112, 56))
    assert original.vision.media.pinpoints[:2] == ((112, 56), (56, 112))


def test_pinpoints_as_strings(oracle: Callable, tmp_path: Path) -> None:
    raw = config_of(oracle, "original_16")
    listed = read(tmp_path, raw).vision.media.pinpoints
    literal = str([tuple(p) for p in raw["image_grid_pinpoints"]])
    assert read(tmp_path, raw | {"image_grid_pinpoints": literal}).vision.media.pinpoints == listed
    span = read(tmp_path, raw | {"image_grid_pinpoints": "(1x1),...,(2x3)"}).vision.media.pinpoints
    assert span == ((56, 56), (112, 56), (168, 56), (56, 112), (112, 112), (168, 112))


def test_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    """A config.json with nothing but the architecture, and one with empty sections."""
    for name in ("Llava", "LlavaNext", "LlavaNextVideo", "LlavaOnevision"):
        reference = getattr(transformers, f"{name}Config")()
        arch = {"architectures": [f"{name}ForConditionalGeneration"]}
        config = read(tmp_path, arch | {"text_config": {}})
        text, vision = reference.text_config, reference.vision_config
        assert config.text.kind == text.model_type
        assert config.text.intermediate_size == text.intermediate_size
        assert config.text.num_kv_heads == text.num_key_value_heads
        assert config.text.vocab_size == text.vocab_size
        assert config.vision.tower.image_size == vision.image_size
        assert config.vision.tower.num_layers == vision.num_hidden_layers
        assert config.vision.tower.intermediate_size == vision.intermediate_size
        assert config.vision.tower.hidden_act == vision.hidden_act
        assert config.image_token == reference.image_token_id
        assert config.video_token == getattr(reference, "video_token_id", config.image_token)
        if name != "Llava":
            assert config.vision.media.pinpoints == tuple(
                map(tuple, reference.image_grid_pinpoints)
            )


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_decoder_defaults(kind: str, tmp_path: Path) -> None:
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}
    reference = getattr(transformers, f"{names[kind]}Config")()
    arch = {"architectures": ["LlavaForConditionalGeneration"]}
    text = read(tmp_path, arch | {"text_config": {"model_type": kind}}).text
    assert (text.hidden_size, text.num_layers) == (
        reference.hidden_size,
        reference.num_hidden_layers,
    )
    assert (text.num_heads, text.num_kv_heads) == (
        reference.num_attention_heads, reference.num_key_value_heads)  # fmt: skip
    assert (text.rms_norm_eps, text.vocab_size) == (reference.rms_norm_eps, reference.vocab_size)
    assert text.rope_theta == 1e4  # of transformers 4, whose files leave it out
    assert text.sliding_window == (4096 if kind == "mistral" else None)
    null = read(tmp_path, arch | {"text_config": {"model_type": kind, "sliding_window": None}})
    assert null.text.sliding_window is None


def test_hub_file_of_llava_15(tmp_path: Path) -> None:
    """What llava-hf/llava-1.5-7b-hf writes: four keys of the decoder."""
    raw = {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "ignore_index": -100, "image_token_index": 32000, "torch_dtype": "float16",
        "text_config": {"_name_or_path": "lmsys/vicuna-7b-v1.5", "model_type": "llama",
                        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
                        "vocab_size": 32064},
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024,
                          "intermediate_size": 4096, "num_hidden_layers": 24,
                          "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
                          "projection_dim": 768, "vocab_size": 32000},
    }  # fmt: skip
    config = read(tmp_path, raw)
    assert (config.text.hidden_size, config.text.intermediate_size) == (4096, 11008)
    assert (config.text.num_layers, config.text.num_heads, config.text.head_dim) == (32, 32, 128)
    tower = config.vision.tower
    assert tower.take == (23,)
    assert (tower.grid, tower.tokens, config.max_length) == (24, 576, 4096)


@pytest.mark.parametrize(
    ("change", "theta", "factor"),
    [
        ({"rope_theta": 5e5}, 5e5, 1.0),
        ({"rope_scaling": {"type": "linear", "factor": 2.5}}, 1e4, 2.5),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2}, "rope_theta": 5e5}, 5e5, 2.0),
        ({"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 7e4}}, 7e4, 3.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}}, 7e4, 1.0),
        ({"rope_scaling": None}, 1e4, 1.0),
        ({"factor": 2.0, "type": "linear"}, 1e4, 1.0),  # at the wrong level: no effect in HF either
    ],
)
def test_rope_spellings(change: dict, theta: float, factor: float, tmp_path: Path) -> None:
    arch = {"architectures": ["LlavaNextVideoForConditionalGeneration"]}
    text = read(tmp_path, arch | {"text_config": {"model_type": "llama"} | change}).text
    assert (text.rope_theta, text.rope_factor) == (theta, factor)


def test_feature_layers_and_class_token(oracle: Callable, tmp_path: Path) -> None:
    raw = config_of(oracle, "llava")
    several = read(tmp_path, raw | {"vision_feature_layer": [-2, 1, -1, 0]})
    assert several.vision.tower.take == (3, 1, 4, 0)
    full = read(tmp_path, raw | {"vision_feature_select_strategy": "full"})
    assert not full.vision.tower.drop_cls
    assert full.vision.tower.tokens == 17
    raw = config_of(oracle, "original_15")
    assert read(tmp_path, raw | {"mm_vision_select_feature": "cls_patch"}).vision.tower.tokens == 17


@pytest.mark.parametrize("level", ["top", "text_config"])
def test_tied_at_either_level(oracle: Callable, level: str, tmp_path: Path) -> None:
    raw = config_of(oracle, "llava")
    (raw if level == "top" else raw[level])["tie_word_embeddings"] = True
    assert read(tmp_path, raw).text.tied


def test_pixel_settings(oracle: Callable, tmp_path: Path) -> None:
    raw = config_of(oracle, "llava")
    assert read(tmp_path, raw).vision.media.image == "crop"  # no settings at all
    plain = {"size": 56, "crop_size": 56, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}
    write(tmp_path, plain, "preprocessor_config.json")
    media = read_config(tmp_path).vision.media
    assert (media.resize, media.mean, media.std) == ("crop", (0.1, 0.2, 0.3), (1.0, 1.0, 1.0))
    write(tmp_path, plain | {"do_pad": True}, "preprocessor_config.json")
    assert read_config(tmp_path).vision.media.image == "pad"
    (tmp_path / "preprocessor_config.json").unlink()
    squash = {"size": {"height": 56, "width": 56}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    write(tmp_path, {"patch_size": 14, "image_processor": squash}, "processor_config.json")
    media = read_config(tmp_path).vision.media
    assert (media.resize, media.mean) == ("squash", (0.5, 0.5, 0.5))
    write(tmp_path, {"patch_size": 14, "processor_class": "X"}, "processor_config.json")
    assert read_config(tmp_path).vision.media.resize == "crop"


def test_towers(oracle: Callable, tmp_path: Path) -> None:
    """A public id, a copy of it under any path, a folder inside the checkpoint, SigLIP's 26 of 27."""
    raw = config_of(oracle, "original_15") | {"image_aspect_ratio": "square"}
    clip = read(tmp_path, raw | {"mm_vision_tower": "openai/clip-vit-large-patch14-336"})
    assert (clip.vision.tower.kind, clip.vision.tower.take, clip.vision.tower.tokens) == (
        "clip",
        (23,),
        576,
    )
    assert clip.tower == "openai/clip-vit-large-patch14-336"
    assert clip.vision.media.image == "crop"
    gone = read(tmp_path, raw | {"mm_vision_tower": "/gone/clip-vit-large-patch14-336"})
    assert gone.tower == "openai/clip-vit-large-patch14-336"
    siglip = read(tmp_path, raw | {"mm_vision_tower": "google/siglip-so400m-patch14-384"})
    assert (siglip.vision.tower.kind, siglip.vision.tower.take, siglip.vision.tower.tokens) == (
        "siglip",
        (26,),
        729,
    )
    assert siglip.vision.media.resize == "squash"
    write(tmp_path / "my tower", tiny.CLIP | {"num_hidden_layers": 6})
    inside = read(tmp_path, raw | {"mm_vision_tower": "my tower"})
    assert inside.vision.tower.take == (5,)
    assert inside.tower == str(tmp_path / "my tower")


def test_original_decoder_names(oracle: Callable, tmp_path: Path) -> None:
    raw = config_of(oracle, "original_15") | {"num_key_value_heads": 2}
    names = {"LlavaLlamaForCausalLM": "llama", "LlavaMistralForCausalLM": "mistral",
             "LlavaQwenForCausalLM": "qwen2", "Qwen2ForCausalLM": "qwen2"}  # fmt: skip
    for name, kind in names.items():
        assert read(tmp_path, raw | {"architectures": [name]}).text.kind == kind
    del raw["architectures"]
    for name, kind in {"llava_mistral": "mistral", "llava": "llama", "qwen2": "qwen2"}.items():
        assert read(tmp_path, raw | {"model_type": name}).text.kind == kind


BAD_HF = {
    "negative heads": ("text_config", {"num_attention_heads": -4}, "num_attention_heads is -4"),
    "zero layers": ("text_config", {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    "a billion layers": ("text_config", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
    "huge width": ("text_config", {"hidden_size": 10**40}, "hidden_size"),
    "half a head": ("text_config", {"num_attention_heads": 2.5}, "num_attention_heads is 2.5"),
    "width / heads": ("text_config", {"hidden_size": 66, "head_dim": None}, "do not divide"),
    "heads / kv": ("text_config", {"num_key_value_heads": 3}, "do not divide"),
    "odd head": ("text_config", {"head_dim": 15}, "do not divide"),
    "text number": ("text_config", {"vocab_size": "512"}, "vocab_size is '512'"),
    "boolean": ("text_config", {"intermediate_size": True}, "intermediate_size is True"),
    "rope type": ("text_config", {"rope_parameters": {"rope_type": "yarn"}}, "rope type 'yarn'"),
    "rope factor": ("text_config", {"rope_scaling": {"type": "linear"}, "rope_parameters": None}, "factor"),
    "rope string": ("text_config", {"rope_parameters": "linear"}, "rope_parameters is 'linear'"),
    "decoder": ("text_config", {"model_type": "gemma"}, "decoder 'gemma'"),
    "decoder list": ("text_config", {"model_type": ["llama"]}, "decoder ['llama']"),
    "activation": ("text_config", {"hidden_act": "relu"}, "hidden_act 'relu'"),
    "tower kind": ("vision_config", {"model_type": "dinov2"}, "vision tower 'dinov2'"),
    "tower heads": ("vision_config", {"num_attention_heads": 5}, "do not fit"),
    "patch": ("vision_config", {"patch_size": 57}, "do not fit"),
    "architecture": (None, {"architectures": ["PaliGemmaForConditionalGeneration"]}, "'PaliGemma"),
    "no architecture": (None, {"architectures": [], "model_type": 7}, "architecture 7"),
    "section": (None, {"text_config": [1, 2]}, "text_config is [1, 2]"),
    "layer": (None, {"vision_feature_layer": -9}, "vision_feature_layer -9"),
    "layer word": (None, {"vision_feature_layer": ["last"]}, "vision_feature_layer"),
    "no layers": (None, {"vision_feature_layer": []}, "vision_feature_layer []"),
    "strategy": (None, {"vision_feature_select_strategy": "cls"}, "'cls'"),
    "token": (None, {"image_token_index": "<image>"}, "image_token_index is '<image>'"),
    "projector": (None, {"projector_hidden_act": "relu"}, "projector_hidden_act 'relu'"),
}  # fmt: skip


def refused(folder: Path, sentence: str) -> None:
    """read_config raises one ModelError sentence that names the file and holds `sentence`."""
    with pytest.raises(ModelError) as e:
        read_config(folder)
    text = str(e.value)
    assert sentence in text
    assert str(folder) in text
    assert "\n" not in text
    assert len(text) < 600


@pytest.mark.parametrize("name", BAD_HF)
def test_bad_values(oracle: Callable, name: str, tmp_path: Path) -> None:
    where, change, sentence = BAD_HF[name]
    raw = config_of(oracle, "llava")
    (raw if where is None else raw[where]).update(change)
    refused(write(tmp_path, raw), sentence)


HUGE = "crops: zipvl makes up to 256 crops, 67,108,864 pixels and 262,144 tokens"
BAD_NEXT = {
    "tied": (None, {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', expected true"),
    "tied one": (None, {"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
    "tied text": ("text_config", {"tie_word_embeddings": []}, "tie_word_embeddings is []"),
    "bias": (None, {"multimodal_projector_bias": "true"}, "multimodal_projector_bias is 'true'"),
    "window": ("text_config", {"model_type": "qwen2", "use_sliding_window": "false"},
               "use_sliding_window is 'false'"),
    "canvas": (None, {"image_grid_pinpoints": [[56, 112], [56000, 56000]]}, HUGE),
    "long canvas": (None, {"image_grid_pinpoints": [[56, 56 * 257]]}, HUGE),
    "crop tokens": ("vision_config", {"image_size": 1032, "patch_size": 8}, "tokens of a crop"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_NEXT)
def test_bad_next_values(oracle: Callable, name: str, tmp_path: Path) -> None:
    where, change, sentence = BAD_NEXT[name]
    raw = config_of(oracle, "llava_next")
    (raw if where is None else raw[where]).update(change)
    refused(write(tmp_path, raw), sentence)


@pytest.mark.parametrize(
    ("size", "patch", "crops"), [(2016, 504, 17), (896, 14, 65), (56, 14, 257)]
)
def test_each_ceiling_of_a_canvas(size: int, patch: int, crops: int, tmp_path: Path) -> None:
    """Pixels, tokens, crops: the most that is allowed, and one crop more."""
    raw: dict[str, Any] = {"architectures": ["LlavaNextForConditionalGeneration"]}
    raw |= {"text_config": {}, "vision_config": {"image_size": size, "patch_size": patch}}
    raw |= {"image_grid_pinpoints": [[size, size * crops]]}
    refused(write(tmp_path, raw), HUGE)
    raw |= {"image_grid_pinpoints": [[size, size * (crops - 1)]]}
    assert read(tmp_path, raw).vision.media.pinpoints == ((size, size * (crops - 1)),)


def test_do_pad_is_true_or_false(oracle: Callable, tmp_path: Path) -> None:
    write(tmp_path, config_of(oracle, "llava"))
    write(tmp_path, {"size": 56, "do_pad": "no"}, "preprocessor_config.json")
    refused(tmp_path, "do_pad is 'no'")


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_plain_files_only(oracle: Callable, name: str, tmp_path: Path) -> None:
    """A pipe would hang, a device would fill the memory, and so would a huge file."""
    write(tmp_path, config_of(oracle, "llava"))
    path = tmp_path / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    refused(tmp_path, f"{name} is a folder, a pipe or a device")
    path.unlink()
    path.symlink_to("/dev/zero")
    refused(tmp_path, f"{name} is a folder, a pipe or a device")
    path.unlink()
    path.write_bytes(b"{" + b" " * 2**24)
    refused(tmp_path, "16,777,217 bytes, and zipvl reads 16,777,216")


def test_a_file_that_may_not_be_read(
    oracle: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, config_of(oracle, "llava"))
    monkeypatch.setattr("zipvl.config.os.access", lambda path, mode: False)  # root may read all
    refused(tmp_path, "config.json cannot be read: Permission denied")


def test_a_tower_with_a_name_too_long(oracle: Callable, tmp_path: Path) -> None:
    raw = config_of(oracle, "original_15") | {"mm_vision_tower": "x" * 2000}
    refused(write(tmp_path, raw), "mm_vision_tower 'xxx")


BAD_ORIGINAL = {
    "tied": ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
    "no tower": ({"mm_vision_tower": "/nowhere/eva-clip"}, "'/nowhere/eva-clip'"),
    "null tower": ({"mm_vision_tower": None}, "mm_vision_tower"),
    "decoder": ({"architectures": ["LlavaGemmaForCausalLM"]}, "gemma"),
    "mixture": ({"architectures": ["LlavaMixtralForCausalLM"]}, "mixtral"),
    "pool": ({"mm_spatial_pool_mode": "conv"}, "mm_spatial_pool_mode 'conv'"),
    "stride": ({"mm_spatial_pool_stride": 0}, "mm_spatial_pool_stride is 0"),
    "newline": ({"mm_newline_position": "row"}, "mm_newline_position 'row'"),
    "pinpoints missing": ({"image_grid_pinpoints": None}, "image_grid_pinpoints"),
    "pinpoints word": ({"image_grid_pinpoints": "__import__('os')"}, "image_grid_pinpoints"),
    "pinpoints range": ({"image_grid_pinpoints": "(1x1),...,(99999x99999)"}, "image_grid_pinpoints"),
    "pinpoints deep": ({"image_grid_pinpoints": "(" * 10**4}, "image_grid_pinpoints"),
    "pinpoints triple": ({"image_grid_pinpoints": [[56, 56, 56]]}, "image_grid_pinpoints"),
    "pinpoints part": ({"image_grid_pinpoints": [[56, 100]]}, "multiples of 56"),
    "pinpoints negative": ({"image_grid_pinpoints": [[-56, 56]]}, "image_grid_pinpoints"),
    "class token": ({"mm_vision_select_feature": "cls_patch"}, "class token"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ORIGINAL)
def test_bad_original_values(oracle: Callable, name: str, tmp_path: Path) -> None:
    change, sentence = BAD_ORIGINAL[name]
    refused(write(tmp_path, config_of(oracle, "original_16") | change), sentence)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "not readable JSON"),
        ("{'model_type': 'llava'}", "not readable JSON"),
        ("[" * 10**5, "not readable JSON"),
        ('{"a": 1' + "0" * 5000 + "}", "not readable JSON"),
        ("[1, 2]", "does not hold a JSON object"),
        ("null", "does not hold a JSON object"),
        ('{"model_type": "bert"}', "'bert', which zipvl does not load: it loads LLaVA-1.5"),
        ('{"architectures": {"a": 1}}', "which zipvl does not load"),
        ("version https://git-lfs.github.com/spec/v1", "not readable JSON"),
    ],
)
def test_not_a_config(text: str, sentence: str, tmp_path: Path) -> None:
    refused(write(tmp_path, text), sentence)


def test_no_config_and_not_text(tmp_path: Path) -> None:
    refused(tmp_path, "config.json is missing")
    refused(tmp_path / "nowhere", "config.json is missing")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00{}")
    refused(tmp_path, "not readable JSON")
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    refused(tmp_path, "config.json is a folder")


@pytest.mark.parametrize(
    "settings_",
    [
        {"image_mean": "grey", "size": 56},
        {"image_mean": [0.5, 0.5], "size": 56},
        {"image_std": [0, 0, 0], "size": 56},
        {"image_std": [None] * 3, "size": 56},
    ],
)
def test_bad_pixel_settings(oracle: Callable, settings_: dict, tmp_path: Path) -> None:
    write(tmp_path, config_of(oracle, "llava"))
    write(tmp_path, settings_, "preprocessor_config.json")
    refused(tmp_path, "image_")


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([0, -1, 1, 2, 10**20, "linear", "anyres_max_0", "spatial", "unires", "anyres"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_value_anywhere_is_read_or_refused(
    oracle: Callable, tmp_path: Path, data: st.DataObject
) -> None:
    """One to three keys of a good config take any JSON value: a sound config or a ModelError."""
    kind = data.draw(st.sampled_from(KINDS))
    raw = config_of(oracle, kind)
    for _ in range(data.draw(st.integers(1, 3))):
        part = data.draw(
            st.sampled_from([raw, *(v for v in raw.values() if isinstance(v, dict) and v)])
        )
        part[data.draw(st.sampled_from(sorted(part)))] = data.draw(ODD)
    try:
        config = read(tmp_path, raw)
    except ModelError:
        return
    text, media = config.text, config.vision.media
    for value in (text.hidden_size, text.head_dim, text.vocab_size, config.vision.tower.hidden_size,
                  media.stride, config.vision.tower.grid):  # fmt: skip
        assert type(value) is int
        assert value > 0
    assert type(config.image_token) is type(config.video_token) is int
    assert text.num_heads % text.num_kv_heads == 0
    assert media.image != "anyres" or media.pinpoints
