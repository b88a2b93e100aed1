"""Raw figures: small, one row a line, and each image shown somewhere."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lab import palette
from lab.raw import rounded, write_json

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "lab/results"
FILES = [p for p in RESULTS.rglob("*") if p.is_file() and p.name != "answers.jsonl"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]+\.(?:png|jsonl?|md))\)")
TOTAL, LARGEST = 1_500_000, 150_000  # bytes


def linked() -> set[Path]:
    return {(page.parent / target).resolve() for page in PAGES
            for target in LINK.findall(page.read_text(encoding="utf-8"))
            if "://" not in target}  # fmt: skip


def test_results_are_small() -> None:
    sizes = {p.relative_to(RESULTS).as_posix(): p.stat().st_size for p in FILES}
    assert sum(sizes.values()) <= TOTAL
    large = {name: size for name, size in sizes.items() if size > LARGEST}
    assert not large, f"{large}: python -m lab.palette makes figures smaller"
    assert {p.suffix for p in FILES} == {".json", ".jsonl", ".md", ".png", ".safetensors"}


def test_pages_and_results_agree() -> None:
    found = linked()
    assert len(found) > 20
    assert not [str(p) for p in found if not p.exists()]
    shown = {p for p in found if p.suffix == ".png"}
    assert {p.resolve() for p in FILES if p.suffix == ".png"} <= shown


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if p.suffix == ".json"],
    ids=lambda p: p.relative_to(RESULTS).as_posix(),
)
def test_a_row_is_a_line(path: Path, tmp_path: Path) -> None:
    """And every file is what its writer writes."""
    write_json(tmp_path / "again.json", json.loads(path.read_text(encoding="utf-8")))
    assert path.read_bytes() == (tmp_path / "again.json").read_bytes()


def test_json_is_spread_where_rows_are(tmp_path: Path) -> None:
    rows = [{"a": 1, "list": [{"b": 2}]}, {"a": None}]
    report = {"machine": {"cpu": "é"}, "rows": rows, "none": [], "in": {"rows": rows, "n": [1, 2]}}
    write_json(tmp_path / "new" / "raw.json", report)
    text = (tmp_path / "new/raw.json").read_text(encoding="utf-8")
    assert json.loads(text) == report
    assert len(text.splitlines()) == 2 + 1 + 4 + 1 + (2 + 4 + 1)


def test_rounding() -> None:
    assert rounded({"a": [0.12345678, float("nan"), 3, "x", (True,)]}) == {
        "a": [0.123457, None, 3, "x", [True]]
    }


def test_a_thin_line_keeps_its_colour(tmp_path: Path) -> None:
    """Among thousands of shades of other colours."""
    shades = np.zeros((200, 256, 3), np.uint8)
    shades[..., 0] = np.arange(256)
    shades[..., 1] = np.arange(200)[:, None] // 8
    shades[100, 40:80] = (227, 119, 194)
    Image.fromarray(shades).save(tmp_path / "figure.png")
    palette.shrink(tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as made:
        assert made.mode == "P"
        again = np.asarray(made.convert("RGB")).astype(int)
    assert len(np.unique(again.reshape(-1, 3), axis=0)) <= palette.COLOURS
    assert (again[100, 40:80] == (227, 119, 194)).all()
    assert np.abs(again - shades).max() < 32
