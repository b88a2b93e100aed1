"""Long videos are encoded while they are read: the same features, and never many pixels."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pytest
import torch

import zipvl
from zipvl.engine import inputs as engine_inputs
from zipvl.engine.inputs import FrameBuffer
from zipvl.vision.video import Reading


@pytest.mark.parametrize("kind", ["llava_onevision", "llava_next_video", "llava"])
@pytest.mark.parametrize("frames", [32, 33, 50])
def test_the_same_features_and_answer(
    oracle: Callable, monkeypatch: pytest.MonkeyPatch, kind: str, frames: int
) -> None:
    engine = zipvl.load(oracle(kind).folder, device="cpu", dtype="float32")
    video = np.random.default_rng().integers(0, 256, (frames, 40, 60, 3), dtype=np.uint8)
    whole = engine.prepare("what", video=video, frames=frames)
    monkeypatch.setattr(engine_inputs, "HELD", 32)
    inputs = engine.prepare("what", video=video, frames=frames)
    assert len(whole.media[0].crops) == frames
    assert len(inputs.media[0].crops) == (frames if frames <= 32 else 0)
    assert (inputs.vision_seconds > 0) == (frames > 32)
    assert torch.equal(engine.encode(inputs)[0], engine.encode(whole)[0])
    assert torch.equal(inputs.input_ids, whole.input_ids)
    a, b = (engine.generate(i, max_new_tokens=5, ignore_eos=True) for i in (inputs, whole))
    assert a.tokens == b.tokens
    assert a.stats.seconds["vision"] >= inputs.vision_seconds


def test_frames_again(oracle: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a first attempt at a damaged file gave is forgotten, and no frame comes twice."""
    engine = zipvl.load(oracle("llava_onevision").folder, device="cpu", dtype="float32")
    video = np.random.default_rng(1).integers(0, 256, (6, 40, 60, 3), dtype=np.uint8)
    want = engine.encode(engine.prepare("", video=video, frames=8))[0]
    for held in (100, 4):
        monkeypatch.setattr(engine_inputs, "HELD", held)
        reading = Reading(video, frames=8)
        buffer = FrameBuffer(engine.model.vision, reading)
        buffer.fill(iter(video[::-1]))
        for frames in reading:
            buffer.fill(frames)
        media = buffer.media()
        assert (media.features is None) == (held == 100)
        torch.testing.assert_close(engine.encode(engine.prepare("", video=media))[0], want)


def test_pixels_do_not_pile_up(oracle: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = zipvl.load(oracle("llava_onevision").folder, device="cpu", dtype="float32")
    monkeypatch.setattr(engine_inputs, "HELD", 16)
    most, fill = [], FrameBuffer.fill

    def spy(self: FrameBuffer, frames: Iterable[np.ndarray]) -> None:
        def watched() -> Iterator[np.ndarray]:
            for frame in frames:
                yield frame
                most.append(self.waiting)

        fill(self, watched())

    monkeypatch.setattr(FrameBuffer, "fill", spy)
    inputs = engine.prepare("what", video=np.zeros((100, 20, 20, 3), dtype=np.uint8), frames=100)
    assert len(most) == 100
    assert max(most) == 16
    media = inputs.media[0]
    assert media.crops.numel() == media.clip.frames.size == 0
    assert media.features.shape[0] == media.tokens


def test_warnings_and_rates_reach_the_prompt(oracle: Callable) -> None:
    """`fps` alone is never cut; with `frames` it may be, and a sentence says so."""
    engine = zipvl.load(oracle("llava_onevision").folder, device="cpu", dtype="float32")
    path = str(zipvl.demo_clip())  # 160 frames, 16 a second
    inputs = engine.prepare("what", video=path, fps=8)
    assert (len(inputs.media[0].clip.indices), inputs.warnings) == (80, [])
    inputs = engine.prepare("what", video=path, frames=4, fps=8)
    assert len(inputs.media[0].clip.indices) == 4
    [warning] = inputs.warnings
    assert "8 frames a second" in warning
    assert "are 80: 4 were taken" in warning
    inputs = engine.prepare("what", video=path, frames=3, start=9.9, end=9.95)
    [warning] = inputs.warnings
    assert "3 frames of" in warning
    assert "only 1 are there" in warning
    vision = engine.model.vision
    assert inputs.media[0].tokens == vision.count(vision.plan(9, 9, frames=1))
