"""Decoders side by side, and what a kept share means for speed by multiply-adds alone."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lab.experiments import across, implied, runner
from lab.experiments.runner import Job, Record
from zipvl.engine.stats import dense_work
from zipvl.errors import UsageError

PAGES = Path(__file__).parent.parent.parent / "docs"
METHODS = (
    "zipvl:tau=0.9",
    "zipvl:tau=0.975",
    "zipvl:tau=0.975,always=last",
    "zipvl-stream:tau=0.7",
)


def record(method: str, loss: float, *ratios: float) -> Record:
    return {"method": method, "unit": "0", "loss": loss, "ratios": list(ratios),
            "prefill": sum(ratios) / 2, "kv_bytes": 1000 * sum(ratios)}  # fmt: skip


def test_measures_by_hand() -> None:
    found = [record("dense", 2, 1, 1), record("dense", 3, 1, 1),
             record("a", 2.5, 0.9, 0.3), record("a", 3.1, 0.7, 0.1)]  # fmt: skip
    dense, row = across.measures(found)
    assert dense["extra"]["value"] == 0
    assert row["extra"]["value"] == pytest.approx(0.3)
    assert (row["kept"], row["layers"]) == (pytest.approx(0.5), [0.8, 0.2])
    assert row["spread"] == [0.4, 0.6]
    assert (row["most"], row["least"], row["cache"]) == pytest.approx((0.8, 0.2, 0.5))


def test_points_of_the_sweeps() -> None:
    assert [across.name(m) for m in METHODS] == ["zipvl", "zipvl", None, "zipvl-stream"]
    assert across.name("dense") is None
    assert all(f"{name}:tau={t}" in across.METHODS for name, t in across.SHOWN.items())


def test_decoders_of_any_depth_are_one_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made-up records of two of them: one JSON, a table and a figure."""

    def records(job: Job, methods: list[str], question: int) -> list[Record]:
        depth = 3 if "one" in job.settings()["model"] else 5
        return [record(m, loss, *[0.5] * depth) for m in methods for loss in (2.0, 2.5)]

    device = SimpleNamespace(model=SimpleNamespace(device=torch.device("cpu")))
    monkeypatch.setattr(runner, "load", lambda *_, **__: device)
    monkeypatch.setattr(across, "records", records)
    job = Job("across", tmp_path, "some/one,other/two", 2, methods=METHODS)
    across.run(job)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["settings"]["model"] == "one,two"
    shapes = {row["model"]: len(row["layers"]) for row in result["rows"]}
    assert shapes == {"one": 3, "two": 5}
    assert len(result["rows"]) == 2 * (1 + len(METHODS))
    assert (tmp_path / "figure.png").read_bytes()[1:4] == b"PNG"
    for model in (None, "a/one,b/one"):
        with pytest.raises(UsageError, match="decoders of different names"):
            across.run(replace(job, model=model))


def test_keeping_all_is_dense_and_its_probes() -> None:
    n, probes = 4096, implied.QWEN.num_layers * implied.probes(implied.QWEN, 4096)
    for form in (implied.paper, implied.stream):
        assert form(implied.QWEN, n, 1) == dense_work(implied.QWEN, n, False) + probes


@pytest.mark.parametrize("share", [0.05, 0.247, 0.795, 1.0])
def test_the_mean_share_is_the_one_asked_for(share: float) -> None:
    each = implied.each_layer(28, share)
    assert sum(each ** (i + 1) for i in range(28)) / 28 == pytest.approx(share)


def test_the_paper_s_own_speed_is_implied() -> None:
    """2.6 times at 200,000 tokens (its figure 6), at the 42.1 % of its video ablation."""
    gain = dense_work(implied.QWEN, 200000, False) / implied.paper(implied.QWEN, 200000, 0.421)
    assert gain == pytest.approx(2.6, abs=0.05)


@pytest.mark.parametrize(
    ("page", "lines"),
    [("architectures.md", implied.rows()), ("cross_attention.md", implied.parts())],
)
def test_pages_hold_the_computed_tables(page: str, lines: list[str]) -> None:
    text = (PAGES / page).read_text(encoding="utf-8")
    assert "\n".join(lines) in text
