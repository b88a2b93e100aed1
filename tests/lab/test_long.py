"""Very long videos: training clips that look long, the needle experiment, the command."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import zipvl
from lab.demo import long
from lab.demo.bank import EMPTY, Bank
from lab.demo.checkpoint import tokenizer
from lab.demo.sequences import Sequences, hidden, sequences
from lab.eval.tasks import needle_items
from lab.experiments import niah
from lab.experiments.cli import main
from lab.experiments.runner import Job
from zipvl.engine.engine import Engine
from zipvl.model.decoder import Decoder

GRID = long.GRID


@pytest.fixture(scope="module")
def engine() -> Engine:
    return zipvl.load(device="cpu", dtype="float32")


def random_bank(each: int, dim: int = 128) -> Bank:
    chance = torch.Generator().manual_seed(each)
    rows = EMPTY * each + 24 * each
    return Bank(torch.randn(rows, 4, dim, generator=chance).half(), each, 24 * each)


def some_clips(bank: Bank, frames: int, rng: np.random.Generator) -> Sequences:
    return sequences(bank, tokenizer(), 6, frames, 4, GRID, rng, False, 0.0, False, 3, long.KINDS)


# --- clips that look long ---------------------------------------------------------------------


def test_needles_keep_one_frame_of_each_run() -> None:
    rng = np.random.default_rng()
    line = [EMPTY, 3, 3, 3, EMPTY, EMPTY, 7, 5, 5, EMPTY]
    groups = np.array([line, [3] * 10, [EMPTY] * 10])
    seen = set()
    for _ in range(60):
        got = long.needles(groups, rng)
        assert [g for g in got[0] if g != EMPTY] == [3, 7, 5]
        assert ((got == groups) | (got == EMPTY)).all()
        assert (got[1] != EMPTY).sum() == 1
        assert (got[2] == EMPTY).all()
        seen.add(int(np.argmax(got[0] == 3)))
    assert seen == {1, 2, 3}


def test_jumps_grow_and_end_where_asked() -> None:
    rng = np.random.default_rng()
    moved = long.jumps(400, 30, 1e5, rng)
    assert moved.shape == (400, 31)
    assert (np.diff(moved, axis=1) >= 0).all()
    assert moved[:, 0].min() >= 0
    ends = np.log(np.maximum(moved[:, -1], 1)) / np.log(1e5)  # evenly in the logarithm
    assert np.quantile(ends, (0.1, 0.5, 0.9)) == pytest.approx([0.1, 0.5, 0.9], abs=0.12)


def test_crowded_clips_keep_their_questions() -> None:
    rng, bank = np.random.default_rng(), random_bank(2)
    batch = some_clips(bank, 12, rng)
    some = long.crowded(bank, batch, 1.0, rng)
    groups = (some.batch.rows // bank.each).clamp(max=EMPTY)
    for line, before in zip(groups.tolist(), (batch.rows // bank.each).tolist(), strict=True):
        runs = [g for i, g in enumerate(before) if g < EMPTY and g != (before[i - 1] if i else -1)]
        assert [g for g in line if g != EMPTY] == runs
    assert torch.equal(some.batch.ids, batch.ids)
    gaps = some.batch.positions[:, 1 : batch.visual + 2].diff(dim=1)
    assert (gaps >= 1).all()
    inside = gaps[:, : batch.visual - 1].unflatten(1, (12, 4))[:, :, :3]
    assert (inside == 1).all()  # the tokens of a frame stay together
    last = (some.batch.positions - batch.positions).amax(1)
    assert (last <= long.LONGEST).all()
    for b, line in enumerate((groups == EMPTY).tolist()):
        weight, visual = some.weight[b], some.weight[b, 1 : batch.visual].view(12, 4)
        assert weight[0] == 0
        assert (weight[batch.visual :] == 0).all()
        assert (visual[~torch.tensor(line)] == 0).all()
        assert len(visual[torch.tensor(line)].unique()) == 1
        assert 0 <= float(visual.max()) <= math.log(long.CROWD)
    plain = long.crowded(bank, batch, 0.0, rng)
    assert (plain.weight == 0).all()
    assert (plain.batch.positions - batch.positions <= 1).all()


@torch.no_grad()
def test_a_weight_counts_like_copies(engine: Engine) -> None:
    """In one layer, tokens behind a token of weight log n see what n copies of it would be."""
    text = Decoder(replace(engine.config.text, num_layers=1))
    copies = torch.tensor([1, 3, 1, 40, 1, 1, 2, 1])
    x, place = torch.randn(1, 8, text.config.hidden_size), torch.arange(8)[None]

    def packed(times: Tensor) -> Sequences:
        at = place.repeat_interleave(times, 1)
        zero = torch.zeros_like(at)
        return Sequences(zero, zero, at, zero - 1, zero, False, [], 0)

    many = packed(copies)
    want = hidden(text, x.repeat_interleave(copies, 1), many)[0, copies.cumsum(0) - 1]
    got = hidden(text, x, packed(torch.ones_like(copies)), copies.log()[None])[0]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


# --- the command that trains ------------------------------------------------------------------


def test_training_needs_the_tiles(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert long.main([str(tmp_path), "--out", str(tmp_path / "model")]) == 2
    error = capsys.readouterr().err
    assert "lab.demo.tiles" in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_training_stops_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten steps and ten more are twenty at once; the model loads and answers."""
    monkeypatch.setattr(long, "TOKENS", 300)
    chance = torch.Generator().manual_seed(0)
    tiles = torch.randint(0, 255, (4, 3, 128, 128), generator=chance, dtype=torch.uint8)
    weights = []
    for name, stops in (("a", (20,)), ("b", (10, 20))):
        cache, out = tmp_path / name, tmp_path / f"model_{name}"
        cache.mkdir()
        torch.save(tiles, cache / "tiles.pt")
        for stop in stops:
            monkeypatch.setattr(long, "EVERY", 10)
            args = [str(cache), "--out", str(out), "--steps", "40", "--stop", str(stop)]
            assert long.main([*args, "--each", "8"]) == 0
        weights.append(zipvl.load(out, device="cpu").model.state_dict())
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], atol=1e-2, rtol=1e-2)
    engine = zipvl.load(out, device="cpu")
    shown = zipvl.load(device="cpu").model.state_dict()
    assert torch.equal(weights[0]["projector.0.weight"], shown["projector.0.weight"])
    assert len(engine.generate("What do you see?", max_new_tokens=4).tokens) <= 4


# --- the experiment ---------------------------------------------------------------------------


def frames_of(item: object, engine: Engine) -> Tensor:
    return item.video(2 * engine.config.media.size)  # type: ignore[attr-defined]


def test_a_video_watched_in_scenes_is_the_video(engine: Engine, tmp_path: Path) -> None:
    job = Job("niah", tmp_path, loaded=[engine])
    for frames in (1, 16, 37):
        item = needle_items(frames, 3, 1, niah.DEPTHS)[-1]
        got = niah.watch(job, item)
        video = frames_of(item, engine).numpy()
        want = engine.prepare(item.question, video=video, frames=frames)
        assert torch.equal(got.input_ids, want.input_ids)
        assert torch.equal(got.is_visual, want.is_visual)
        torch.testing.assert_close(engine.encode(got)[0], engine.encode(want)[0])
        assert got.media[0].crops.numel() == 0


def test_needles_at_every_depth_and_never_too_many(engine: Engine, tmp_path: Path) -> None:
    job = Job("niah", tmp_path, samples=40, frames=(8, 40000), loaded=[engine])
    items = niah.questions(job)
    assert [sum(u.startswith(f"{n}/") for u in items) for n in job.frames] == [40, 6]
    where = []
    for unit, item in items.items():
        if unit.startswith("40000/"):
            at = [i for i, clip in enumerate(item.clips) if clip.events]
            where.append(16 * at[0] + item.clips[at[0]].events[0].start)
            assert len(at) == 1
    assert where == [round(i / 5 * 39999) for i in range(6)]


def test_rows_by_hand() -> None:
    ok, visual = (1, 1, 0, 1), (0.5, 0.7, 0.6, 0.8)
    found = [{"frames": 64, "method": "m", "ok": bool(a), "visual": [v - 0.1, v + 0.1], "work": v,
              "kv_bytes": 8, "prompt": 100} for a, v in zip(ok, visual, strict=True)]  # fmt: skip
    [row] = niah.rows(found)
    assert row["accuracy"] == pytest.approx(
        {"value": 0.75, "low": 0.3006, "high": 0.9544}, abs=1e-4
    )
    assert row["visual"]["value"] == pytest.approx(0.65)
    assert 0.5 <= row["visual"]["low"] < 0.65 < row["visual"]["high"] <= 0.8
    assert row["by_layer"] == pytest.approx([0.55, 0.75])
    assert row["samples"] == 4


def test_the_same_seed_gives_the_same_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """And a run that was cut off in the middle ends as one that was not."""
    drawn = niah.figure
    monkeypatch.setattr(niah, "figure", lambda *a: drawn(*a) if a[0].out.name == "a" else None)
    args = ["niah", "--frames", "4,20", "--samples", "2", "--device", "cpu", "--out"]
    for name in "ab":
        assert main([*args, str(tmp_path / name)]) == 0, capsys.readouterr().err
        if name == "b":
            lines = (tmp_path / "b" / "records.jsonl").read_text().splitlines(keepends=True)
            assert len(lines) == 1 + 2 * 2 * 3
            (tmp_path / "b" / "records.jsonl").write_text("".join(lines[:6]))
            assert main([*args, str(tmp_path / "b")]) == 0, capsys.readouterr().err
    one, two = ((tmp_path / name / "result.json").read_bytes() for name in "ab")
    assert one == two
    result, where = json.loads(one), json.loads((tmp_path / "a" / "run.json").read_text())
    assert [r["samples"] for r in result["rows"]] == [2] * 6
    assert {r["choice"] for r in result["sets"]} >= {
        "64 recent + 64 random",
        "128 recent + 0 random",
    }
    assert all(s >= 0 for s in where["prefill_seconds"].values())  # 0: under 5 ms
    # All 22 or 86 rows are probed: nothing can be missed.
    mine = [r for r in result["sets"] if r["choice"] == "64 recent + 64 random"]
    assert [r["recall"]["value"] for r in mine] == [1, 1]
