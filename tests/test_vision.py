"""Towers, projector, pooling and packing equal transformers' on tiny random models; counts are golden."""

import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_image import NEXT, ONEVISION, clip, ours, picture, siglip
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaNextConfig,
    LlavaNextModel,
    LlavaNextVideoConfig,
    LlavaNextVideoModel,
    LlavaOnevisionConfig,
    LlavaOnevisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.llava_next.modeling_llava_next import unpad_image

from zipvl.config import LlavaConfig, MediaConfig, VisionConfig
from zipvl.errors import ModelError
from zipvl.model.layouts import HALF, NEXT_PINPOINTS, ONEVISION_PINPOINTS
from zipvl.vision.encoder import VisionTower, projector
from zipvl.vision.family import CLIP_MEAN, CLIP_STD, Geometry
from zipvl.vision.llava import (
    Llava,
    merge_image,
    merge_video,
    plan,
    pool_frames,
)

BODY = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "patch_size": 14}
TEXT = {"model_type": "llama", "hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": 40}  # fmt: skip
NEXT_MEDIA = clip("anyres", pinpoints=NEXT, merge="spatial_unpad", pool="average")
ONEVISION_MEDIA = siglip(
    "anyres", pinpoints=ONEVISION, merge="spatial_unpad", max_tiles=9, several="pad",
    pool="bilinear", video_newline="one",
)  # fmt: skip


def tower_config(kind: str, size: int, layers: int, take: tuple[int, ...]) -> VisionConfig:
    act, eps = ("quick_gelu", 1e-5) if kind == "clip" else ("gelu_pytorch_tanh", 1e-6)
    return VisionConfig(kind, 32, 64, layers, 4, size, 14, eps, act, take, kind == "clip")


CLIP = tower_config("clip", 56, 4, (3,))
SIGLIP = tower_config("siglip", 72, 3, (3,))


@cache
def family(media: MediaConfig, vision: VisionConfig) -> Llava:
    with torch.device("meta"):
        return Llava(LlavaConfig(vision, media, "linear", True, newline=True), 8)


def redrawn(module: nn.Module) -> nn.Module:
    """The usual init (std .02) hides errors: everything comes out flat."""
    for p in module.parameters():
        p.data = torch.randn_like(p) * 0.15 if p.ndim > 1 else p.data + torch.randn_like(p) * 0.05
    return module.eval()


def copy_of(hf: nn.Module, config: VisionConfig) -> VisionTower:
    tower, named = VisionTower(config), hf.state_dict()
    named = {name.removeprefix("vision_model."): t for name, t in named.items()}
    tower.load_state_dict({name: named[name] for name in tower.state_dict()})
    return tower


@torch.no_grad()
def features(model: nn.Module, config: VisionConfig, pixels: torch.Tensor) -> torch.Tensor:
    """Our tower and projector with the weights of a Hugging Face LLaVA model: [n, N, C]."""
    project = projector("mlp2x_gelu", 32, 48, True)
    named = model.multi_modal_projector.state_dict()
    project.load_state_dict({
        name.replace("linear_1", "0").replace("linear_2", "2"): t for name, t in named.items()
    })  # fmt: skip
    return project(copy_of(model.vision_tower, config)(pixels))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("grid", [4, 5])
@pytest.mark.parametrize("take", [(3,), (4,), (0,), (1, 3), (3, 2)])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_towers_equal_transformers(kind, take, grid):
    size = 14 * grid + 2 * (kind == "siglip")
    shape = dict(BODY, num_hidden_layers=4, image_size=size)
    hf = redrawn(
        CLIPVisionModel(CLIPVisionConfig(**shape))
        if kind == "clip"
        else SiglipVisionModel(SiglipVisionConfig(**shape, vision_use_head=False))
    )
    config, pixels = tower_config(kind, size, 4, take), torch.randn(3, 3, size, size)
    tower = copy_of(hf, config)
    with torch.no_grad():
        states = hf(pixels, output_hidden_states=True).hidden_states
        expected = torch.cat([states[i] for i in take], dim=-1)
        found = tower(pixels)
    close(found, expected[:, 1:] if kind == "clip" else expected)
    assert found.shape == (3, config.tokens, 32 * len(take))
    assert len(tower.encoder.layers) == max(take)


def test_every_weight_of_a_tower_learns():
    for config in (CLIP, SIGLIP):
        tower = redrawn(VisionTower(config))
        tower(torch.randn(2, 3, config.image_size, config.image_size)).square().sum().backward()
        for name, p in tower.named_parameters():
            # the softmax does not see a bias common to all keys
            assert name.endswith("k_proj.bias") or p.grad.abs().max() > 0, name


def test_the_class_token_stays_on_request():
    config = VisionConfig("clip", 32, 64, 4, 4, 56, 14, 1e-5, "gelu", (3,), False)
    assert VisionTower(config)(torch.randn(1, 3, 56, 56)).shape == (1, config.tokens, 32)
    media = clip("crop", pool="average")
    with pytest.raises(ModelError, match="17 features"):
        pool_frames(torch.randn(2, 17, 8), media, 4)


def test_projectors():
    x = torch.randn(5, 32)
    two = projector("mlp2x_gelu", 32, 48, True)
    assert list(two.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    hidden = x @ two[0].weight.T + two[0].bias
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    torch.testing.assert_close(two(x), hidden @ two[2].weight.T + two[2].bias)
    assert list(projector("mlp3x_gelu", 32, 48, False).state_dict()) == [
        "0.weight", "2.weight", "4.weight"
    ]  # fmt: skip
    assert list(projector("linear", 32, 48, True).state_dict()) == ["0.weight", "0.bias"]
    assert projector("identity", 32, 32, True)(x) is x
    for kind, width in [("resampler", 48), ("mlp0x_gelu", 48), ("identity", 48)]:
        with pytest.raises(ModelError, match=kind):
            projector(kind, 32, width, True)


@pytest.fixture(scope="module")
def next_model():
    vision = dict(BODY, model_type="clip_vision_model", num_hidden_layers=4, image_size=56)
    pinpoints = [list(p) for p in NEXT]
    config = {"vision_config": vision, "text_config": TEXT, "image_grid_pinpoints": pinpoints}
    return redrawn(LlavaNextModel(LlavaNextConfig(**config, image_token_index=32)))


@pytest.fixture(scope="module")
def onevision_model():
    vision = dict(BODY, model_type="siglip_vision_model", num_hidden_layers=3, image_size=72,
                  vision_use_head=False)  # fmt: skip
    pinpoints = [list(p) for p in ONEVISION]
    config = {"vision_config": vision, "text_config": TEXT, "image_grid_pinpoints": pinpoints}
    return redrawn(LlavaOnevisionModel(LlavaOnevisionConfig(**config)))


def packed(model, image, media, config, alone=True) -> torch.Tensor:
    geometry = plan(image.height, image.width, media, alone)
    found = features(model, config, ours(image, media, alone))
    tokens = merge_image(found, geometry, media, config.grid, model.image_newline)
    assert len(tokens) == family(media, config).count(geometry)
    return tokens


@torch.no_grad()
def expected(model, image, media, alone=True) -> torch.Tensor:
    pixels, sizes = ours(image, media, alone)[None], torch.tensor([[image.height, image.width]])
    kwargs = {} if alone else {"batch_num_images": torch.tensor([2])}
    return model.get_image_features(pixels, sizes, **kwargs).pooler_output[0]


@pytest.mark.parametrize(
    ("size", "count"),
    [((100, 75), 70), ((40, 40), 36), ((300, 60), 42), ((61, 200), 76), ((1, 50), None),
     ((1, 3000), 20), ((640, 480), None)],
)  # fmt: skip
def test_next_pictures_equal_transformers(next_model, size, count):
    image = picture(*size)
    tokens = packed(next_model, image, NEXT_MEDIA, CLIP)
    close(tokens, expected(next_model, image, NEXT_MEDIA))
    assert count in (None, len(tokens))


@pytest.mark.parametrize(
    ("size", "count"),
    [((60, 60), 55), ((100, 75), 113), ((400, 300), 259), ((430, 430), 265), ((50, 400), 145),
     ((1, 1), None), ((431, 200), None)],
)  # fmt: skip
def test_onevision_pictures_equal_transformers(onevision_model, size, count):
    image = picture(*size)
    tokens = packed(onevision_model, image, ONEVISION_MEDIA, SIGLIP)
    close(tokens, expected(onevision_model, image, ONEVISION_MEDIA))
    assert count in (None, len(tokens))
    one_of_two = packed(onevision_model, image, ONEVISION_MEDIA, SIGLIP, alone=False)
    close(one_of_two, expected(onevision_model, image, ONEVISION_MEDIA, alone=False))
    assert len(one_of_two) == 26


@torch.no_grad()
def test_onevision_video_equals_transformers(onevision_model):
    pixels = torch.randn(4, 3, 72, 72)
    pooled = pool_frames(features(onevision_model, SIGLIP, pixels), ONEVISION_MEDIA, 5)
    tokens = merge_video(pooled, ONEVISION_MEDIA, onevision_model.image_newline)
    close(tokens, onevision_model.get_video_features(pixels[None]).pooler_output[0])
    assert len(tokens) == family(ONEVISION_MEDIA, SIGLIP).count(Geometry(9, 9, frames=4)) == 37


@torch.no_grad()
@pytest.mark.parametrize("mode", ["average", "max"])
def test_next_video_pools_before_the_projector(mode):
    vision = dict(BODY, model_type="clip_vision_model", num_hidden_layers=4, image_size=70)
    config = LlavaNextVideoConfig(
        vision_config=vision, text_config=TEXT, image_token_index=33, video_token_index=32,
        spatial_pool_mode=mode,
    )  # fmt: skip
    model = redrawn(LlavaNextVideoModel(config))
    media, pixels = clip("anyres", pool=mode), torch.randn(5, 3, 70, 70)
    raw = copy_of(model.vision_tower, tower_config("clip", 70, 4, (3,)))(pixels)
    pooled = pool_frames(raw, media, 5)
    assert pooled.shape == (5, 4, 32)
    tokens = merge_video(model.multi_modal_projector(pooled), media, None)
    close(
        tokens, torch.cat(list(model.get_video_features(pixels[None]).pooler_output)).flatten(0, -2)
    )


@pytest.mark.parametrize("grid", [4, 5, 27])
@pytest.mark.parametrize("stride", [2, 3, 4])
def test_pooling_one_window_at_a_time(grid, stride):
    frames = torch.randn(2, grid * grid, 3)
    maps = frames.view(2, grid, grid, 3)
    for mode, reduce in [("average", torch.Tensor.mean), ("max", torch.Tensor.amax)]:
        found = pool_frames(frames, clip("crop", pool=mode, stride=stride), grid)
        windows = [
            reduce(maps[:, i : i + stride, j : j + stride], dim=(1, 2))
            for i in range(0, grid - stride + 1, stride)
            for j in range(0, grid - stride + 1, stride)
        ]
        torch.testing.assert_close(found, torch.stack(windows, dim=1))
    found = pool_frames(frames, clip("crop", pool="bilinear", stride=stride), grid)
    assert found.shape[1] == math.ceil(grid / stride) ** 2
    assert pool_frames(frames, clip("crop"), grid) is frames


def test_pooling_that_cannot_be_is_one_sentence():
    for media in (clip("crop", pool="conv"), clip("crop", pool="average", stride=5)):
        with pytest.raises(ModelError, match=r"conv|stride 5"):
            pool_frames(torch.randn(1, 16, 3), media, 4)


def test_video_newlines():
    frames, newline = torch.arange(8.0).view(2, 4, 1), torch.tensor([-1.0])
    for where, row in [
        ("none", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("one", [0, 1, 2, 3, 4, 5, 6, 7, -1]),
        ("frame", [0, 1, 2, 3, -1, 4, 5, 6, 7, -1]),
        ("grid", [0, 1, -1, 2, 3, -1, 4, 5, -1, 6, 7, -1]),
    ]:
        assert (
            merge_video(frames, clip("crop", video_newline=where), newline).flatten().tolist()
            == row
        )


def test_merging_without_newlines_or_base():
    """One tile row of two 2x2 tiles, numbered; the original's spatial, nobase, flat and unires."""
    crops = torch.arange(12.0).view(3, 4, 1)
    geometry, newline = Geometry(10, 20, 1, 2), torch.tensor([-1.0])
    merged = [4, 5, 8, 9, 6, 7, 10, 11]
    for merge, row in [
        ("spatial", [0, 1, 2, 3, *merged]),
        ("spatial_nobase", merged),
        ("spatial_unpad_nobase", [4, 5, 8, 9, -1, 6, 7, 10, 11, -1]),
        ("flat", list(range(12))),
        ("tiles", [5.5, 9.5]),
    ]:
        media = clip("anyres", merge=merge, pool="average")
        assert merge_image(crops, geometry, media, 2, newline).flatten().tolist() == row
    lone = merge_image(crops[:1], Geometry(9, 9), clip("crop"), 2, newline)
    assert lone.flatten().tolist() == [0, 1, 2, 3]


def test_longva_pools_every_tile_of_its_own():
    media = clip("anyres", merge="tiles", pool="average")
    crops = torch.randn(7, 16, 3)
    found = merge_image(crops, Geometry(5, 5, 2, 3), media, 4, None)
    maps = crops[1:].transpose(1, 2).view(6, 3, 4, 4)
    torch.testing.assert_close(
        found, F.avg_pool2d(maps, 2).flatten(2).transpose(1, 2).reshape(-1, 3)
    )


def real(kind: str) -> tuple[MediaConfig, VisionConfig]:
    """The released models' numbers."""
    if kind == "onevision":
        media = MediaConfig(
            384, "squash", HALF, HALF, "anyres", tuple((h, w) for h, w in ONEVISION_PINPOINTS),
            "spatial_unpad", 9, several="pad", pool="bilinear", video_newline="one",
        )  # fmt: skip
        return media, VisionConfig(
            "siglip", 1152, 4304, 26, 16, 384, 14, 1e-6, "gelu", (26,), False
        )
    pinpoints = [(h, w) for h, w in NEXT_PINPOINTS]
    if kind == "longva":  # 200 canvases of up to 49 tiles, written (width, height)
        sides = [(a, b) for a in range(1, 50) for b in range(1, 50) if 1 < a * b <= 49]
        pinpoints = [(336 * h, 336 * w) for w, h in sides]
        assert len(pinpoints) == 200
    merge = "tiles" if kind == "longva" else "spatial_unpad"
    media = MediaConfig(
        336, "crop", CLIP_MEAN, CLIP_STD, "anyres", tuple(pinpoints), merge, pool="average",
        round_unpad=kind != "original",
    )  # fmt: skip
    return media, VisionConfig("clip", 1024, 4096, 24, 16, 336, 14, 1e-5, "gelu", (23,), True)


@pytest.mark.parametrize(
    ("kind", "counts"),
    [
        ("next", {(336, 336): 1176, (640, 480): 2340, (1024, 899): 2634, (1920, 1080): 1948,
                  (672, 672): 2928, (1000, 300): 2182, (300, 1000): 2232}),
        ("onevision", {(384, 384): 1485, (100, 100): 1485, (640, 480): 2929, (1024, 899): 6551,
                       (1920, 1080): 7269, (2304, 2304): 7371}),
        ("longva", {(300, 300): 288, (640, 480): 576, (1024, 899): 1728, (1280, 720): 1728,
                    (1920, 1080): 3456, (4000, 3000): 6912}),
    ],
)  # fmt: skip
def test_counts_of_the_released_models(kind, counts):
    media, vision = real(kind)
    for (width, height), count in counts.items():
        assert family(media, vision).count(plan(height, width, media, True)) == count
    if kind == "onevision":
        assert family(media, vision).count(plan(9, 900, media, False)) == 730
    frames = family(media, vision).plan(9, 9, frames=8)
    assert family(media, vision).count(frames) == (8 * 196 + 1 if kind == "onevision" else 8 * 144)


def test_unpadding_rounds_as_each_layout_does():
    """1225 x 2352 is one of the few sizes at which the two differ: 26 against 24 columns kept."""
    (hf, vision), (original, _) = real("next"), real("original")
    geometry = plan(2352, 1225, hf, True)
    counts = [family(media, vision).count(geometry) for media in (hf, original)]
    assert counts == [576 + 48 * 27, 576 + 48 * 25]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3000), st.integers(1, 3000), st.booleans(),
    st.sampled_from(["next", "onevision", "longva", "original"]),
)  # fmt: skip
def test_counts_are_the_packed_lengths(width, height, alone, kind):
    media, vision = real(kind)
    geometry = plan(height, width, media, alone)
    features = torch.arange(geometry.crops * vision.tokens).float().view(-1, vision.tokens, 1)
    tokens = merge_image(features, geometry, media, vision.grid, torch.tensor([-1.0]))
    assert len(tokens) == family(media, vision).count(geometry)
    if kind == "next":  # what is kept of the tiles is what transformers keeps
        side = vision.grid
        maps = features[1:, :, 0].view(geometry.rows, geometry.cols, side, side)
        kept = unpad_image(
            maps.transpose(1, 2).reshape(1, geometry.rows * side, -1), (height, width)
        )
        rows = F.pad(kept[0], (0, 1), value=-1).flatten()
        assert torch.equal(tokens[:, 0], torch.cat([features[0, :, 0], rows]))
