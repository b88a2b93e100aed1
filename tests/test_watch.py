"""Long videos are encoded while they are read: the same features, and never many pixels."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

import zipvl
from zipvl.engine import watch
from zipvl.engine.watch import Watch


@pytest.mark.parametrize("kind", ["llava_onevision", "llava_next_video", "llava"])
@pytest.mark.parametrize("frames", [32, 33, 50])
def test_the_same_features_and_answer(
    oracle: Callable, monkeypatch: pytest.MonkeyPatch, kind: str, frames: int
) -> None:
    engine = zipvl.load(oracle(kind).folder, device="cpu", dtype="float32")
    video = np.random.default_rng().integers(0, 256, (frames, 40, 60, 3), dtype=np.uint8)
    whole = engine.prepare("what", video=video, frames=frames)
    monkeypatch.setattr(watch, "HELD", 32)
    inputs = engine.prepare("what", video=video, frames=frames)
    assert len(whole.media[0].crops) == frames
    assert len(inputs.media[0].crops) == (frames if frames <= 32 else 0)
    assert (inputs.vision_seconds > 0) == (frames > 32)
    assert torch.equal(engine.encode(inputs)[0], engine.encode(whole)[0])
    assert torch.equal(inputs.input_ids, whole.input_ids)
    a, b = (engine.generate(i, max_new_tokens=5, ignore_eos=True) for i in (inputs, whole))
    assert a.tokens == b.tokens
    assert a.stats.seconds["vision"] >= inputs.vision_seconds


def test_frames_in_any_order_and_again(oracle: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader may show a frame twice, and ask for some only."""
    engine = zipvl.load(oracle("llava_onevision").folder, device="cpu", dtype="float32")
    video = np.random.default_rng(1).integers(0, 256, (9, 40, 60, 3), dtype=np.uint8)
    clip = engine.prepare("", video=video[[0, 2, 2, 8]], frames=4).media[0].clip
    assert clip is not None
    order, seen = np.array([[0], [2], [2], [8]]), []
    for held in (100, 4):
        monkeypatch.setattr(watch, "HELD", held)
        looking = Watch(engine.model)
        numbers = [looking(picture).item() for picture in video]
        assert numbers == list(range(9))
        media = looking.media(watch.replace(clip, frames=order))
        seen.append(engine.encode(engine.prepare("", video=media))[0])
    want = engine.encode(engine.prepare("", video=video[[0, 2, 2, 8]], frames=4))[0]
    for got in seen:
        torch.testing.assert_close(got, want)


def test_pixels_do_not_pile_up(oracle: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = zipvl.load(oracle("llava_onevision").folder, device="cpu", dtype="float32")
    monkeypatch.setattr(watch, "HELD", 16)
    most, call = [], Watch.__call__

    def spy(self: Watch, picture: np.ndarray) -> np.ndarray:
        number = call(self, picture)
        most.append(self.waiting)
        return number

    monkeypatch.setattr(Watch, "__call__", spy)
    inputs = engine.prepare("what", video=np.zeros((100, 20, 20, 3), dtype=np.uint8), frames=100)
    assert len(most) == 100
    assert max(most) == 16
    media = inputs.media[0]
    assert media.crops.numel() == media.clip.frames.size == 0
    assert media.features.shape[0] == media.tokens
