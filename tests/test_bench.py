"""The benchmark runs, tells the truth about what it moved, and its rival computes the same."""

import json
import sys
from pathlib import Path

import pytest
import torch

import bench
from zipvl.benchmark.model import Model
from zipvl.benchmark.rival import build_rival

COMMON = ["--shape", "tiny", "--dtype", "float32", "--repeats", "2"]


@pytest.mark.parametrize(
    "words",
    [
        ["prefill", "--tokens", "96,130", "--methods", "dense,fixed:ratio=0.3", "--rival"],
        [
            "decode",
            "--tokens",
            "40",
            "--batch",
            "1,3",
            "--ratios",
            "1,0.5",
            "--new",
            "2",
            "--rival",
        ],
        ["projections", "--tokens", "64", "--ratios", "1,0.3", "--clock", "cpu"],
        ["linear"],
    ],
)
def test_every_benchmark(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "new" / "raw.json"
    monkeypatch.setattr(sys, "argv", ["bench.py", *words, *COMMON, "--out", str(out)])
    bench.main()
    report = json.loads(out.read_text())
    table = capsys.readouterr().out.strip().splitlines()
    assert len(table) == len(report["rows"]) > 1
    assert report["machine"]["torch"] == torch.__version__
    for row in report["rows"]:
        assert len(row["seconds"]) == 2
        assert all(value > 0 for value in row["seconds"])
        assert row["run"] not in row["faster_than"]


def test_prefill_rows_say_what_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "raw.json"
    words = ["prefill", "--tokens", "200", "--methods", "dense,fixed:ratio=0.5"]
    monkeypatch.setattr(sys, "argv", ["bench.py", *words, *COMMON, "--out", str(out)])
    bench.main()
    dense, half = json.loads(out.read_text())["rows"]
    assert (dense["ratio"], dense["work"]) == (1, 1)
    assert (half["ratio"], half["work"]) == (0.5, 0.25)
    places = 2 * 2 * 2 * 16 * 4  # k and v, layers, heads, head size, bytes
    assert dense["kv_bytes"] == (200 + 16) * places
    assert half["kv_bytes"] == (100 + 16) * places
    assert sum(half["share"].values()) == pytest.approx(1)


@torch.inference_mode()
def test_the_rival_is_the_same_model() -> None:
    """Otherwise the race would be between two different models."""
    model = Model("tiny", "cpu", torch.float32, "auto", None)
    rival = build_rival(model)
    ids = torch.randint(512, (50,))
    ours = model.prefill(ids, "dense", room=None)[0]
    torch.testing.assert_close(ours, rival(ids[None]).logits[0, -1:], atol=1e-4, rtol=1e-4)
    owned = {p.data_ptr() for p in model.decoder.parameters()}
    assert {p.data_ptr() for p in rival.parameters()} == owned  # no second copy of the weights
