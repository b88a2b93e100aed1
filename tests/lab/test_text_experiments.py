"""Experiments on text decoders: rivals and their differences by hand, several models in a figure."""

import json
from pathlib import Path

import pytest

from lab.experiments import fixed, text_compare


def record(method: str, loss: float, *ratios: float) -> dict:
    work = sum(r * r for r in ratios) / len(ratios)
    return {"method": method, "loss": loss, "ratios": list(ratios), "work": work}


def test_rivals_match_ratio_layers_and_work() -> None:
    name = "zipvl:tau=0.9"
    found = [record(name, 1, 0.2, 0.6), record(name, 1, 0.4, 1.0), record("b", 1, 0.0, 0.0)]
    got = fixed.text_rivals(found, name)
    assert got["fixed"] == "fixed:ratio=0.5500,always=last,fill=zero"
    assert got["profile"] == "ideas.py:Profile:ratios=0.3000/0.8000,always=last,fill=zero"
    again = fixed.text_rivals([record("zipvl+:tau=0.9", 1, 0.3)], "zipvl+:tau=0.9")
    assert again["fixed"] == "fixed:ratio=0.3000,always=last,fill=previous"
    # (0.04 + 0.36 + 0.16 + 1) / 4 = 0.39
    assert got["work"] == f"fixed:ratio={0.39**0.5:.4f},always=last,fill=zero"


def test_gains_are_paired_and_negative_where_adaptive_is_better() -> None:
    others = {"fixed": "f", "profile": "p", "work": "w"}
    losses = {"dense": (1, 3), "a": (1.5, 3.5), "f": (1.75, 3.75), "p": (1.5, 3.5), "w": (1.25, 3)}
    found = [record(m, x, 0.5, 0.7) for m, both in losses.items() for x in both]
    row = fixed.text_row(found, "a", others)
    assert row["windows"] == 2
    assert row["adaptive"]["value"] == pytest.approx(0.5)
    assert row["gain_fixed"] == pytest.approx({"value": -0.25, "low": -0.25, "high": -0.25})
    assert row["gain_profile"]["value"] == 0
    assert [row["gain_work"][k] for k in ("value", "low", "high")] == pytest.approx(
        [0.375, 0.25, 0.5]
    )
    assert row["adaptive_kept"] == pytest.approx(0.6)


def run(folder: Path, model: str, layers: int) -> Path:
    """A finished text_tau run, made up."""
    spread = {"value": 0.2, "low": 0.1, "high": 0.3}
    rows = [{"method": f"{m}:always=last,tau={t}", "work": 0.5, "extra": spread,
             "kept_per_layer": [0.5] * layers}
            for m in ("zipvl", "zipvl+") for t in ("0.9", "0.975")]  # fmt: skip
    settings = {"experiment": "text_tau", "model": model, "samples": 4}
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps({"settings": settings, "rows": rows}))
    return folder


def test_models_of_any_depth_share_a_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(run(tmp_path / name, name, n)) for name, n in (("one", 3), ("two", 5))]
    assert text_compare.main([*folders, str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/figure.png").read_bytes()[1:4] == b"PNG"
    (tmp_path / "one/result.json").write_text('{"settings": []}')
    for args, said in (([*folders, "x"], "one holds no result.json"), (["x"], "give folders")):
        assert text_compare.main(args) != 0
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
