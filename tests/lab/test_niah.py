"""The needle experiment on very long videos."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zipvl
from lab.eval.tasks import needle_items
from lab.experiments import niah
from lab.experiments.cli import main
from lab.experiments.runner import Job
from zipvl.engine.engine import Engine


@pytest.fixture(scope="module")
def engine() -> Engine:
    return zipvl.load(device="cpu", dtype="float32")


def frames_of(item: Any, engine: Engine) -> Tensor:
    return item.video(2 * engine.config.vision.media.size)


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


@pytest.mark.slow
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
