"""The evaluation command: its items, its statistics, its output."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lab.demo.backgrounds import bundled
from lab.demo.questions import PHRASES
from lab.demo.world import Clip, render
from lab.eval.cli import main
from lab.eval.report import Answer, coloured_table, heat_map, markdown, table, wilson
from lab.eval.tasks import DEPTHS, needle_items, same_answer, task_items, world_items
from zipvl.cli import split_methods
from zipvl.engine.engine import Engine
from zipvl.engine.inputs import Inputs
from zipvl.errors import UsageError


@pytest.mark.parametrize(
    ("text", "methods"),
    [
        ("dense", ["dense"]),
        ("dense,zipvl:tau=0.9", ["dense", "zipvl:tau=0.9"]),
        ("zipvl:tau=0.9,recent=32,fixed:ratio=0.4", ["zipvl:tau=0.9,recent=32", "fixed:ratio=0.4"]),
        ("my.py:Mine:a=1,b=2,dense", ["my.py:Mine:a=1,b=2", "dense"]),
    ],
)
def test_methods_are_told_from_their_options(text: str, methods: list[str]) -> None:
    assert split_methods(text) == methods


@given(st.integers(1, 400), st.data())
def test_wilson_bounds_are_the_shares_just_not_rejected(count: int, data: st.DataObject) -> None:
    """The ends of the interval solve |p - share| = z * standard error of p."""
    right = data.draw(st.integers(0, count))
    low, high = wilson(right, count)
    assert 0 <= low <= right / count + 1e-9
    assert right / count - 1e-9 <= high <= 1
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:
            distance = abs(end - right / count)
            assert math.isclose(distance, 1.96 * math.sqrt(end * (1 - end) / count), abs_tol=1e-9)


def test_world_items_take_the_kinds_in_turn() -> None:
    items = world_items(tuple(PHRASES), 8, 2 * len(PHRASES), seed=1)
    assert [i.group for i in items] == list(PHRASES) * 2
    assert items == world_items(tuple(PHRASES), 8, 2 * len(PHRASES), seed=1)
    assert items != world_items(tuple(PHRASES), 8, 2 * len(PHRASES), seed=2)
    assert all(i.video(16).shape == (8, 16, 16, 3) for i in items[:3])


@pytest.mark.parametrize("frames", [1, 5, 16, 17, 40])
def test_one_needle_at_its_depth(frames: int) -> None:
    for item in needle_items(frames, 5, seed=3):
        assert sum(clip.frames for clip in item.clips) == frames
        bare = [Clip(c.frames, (), c.tile, c.pan, c.zoom) for c in item.clips]
        other = (item.video(32).int() - torch.cat([render(c, 32) for c in bare]).int()).abs()
        shown = (other.amax((1, 2, 3)) > 8).nonzero().flatten().tolist()
        depth = float(item.group.removeprefix("depth ").removesuffix("%")) / 100
        assert shown == [round(depth * (frames - 1))]
        things = [t for c in item.clips for t in c.things]
        assert [str(t) for t in things] == [item.answer]
        assert all(0 <= c.tile < len(bundled()) for c in item.clips)


def test_one_kind_alone_and_unknown_tasks() -> None:
    assert {i.group for i in task_items("digit", 6, 4, 0)} == {"digit"}
    assert len({i.group for i in task_items("niah", 6, 10, 0)}) == len(DEPTHS)
    for frames in (1, 2, 3):  # too short for two objects, so no neighbours to ask for
        assert {"after", "before"}.isdisjoint(i.group for i in task_items("all", frames, 20, 0))
        with pytest.raises(UsageError, match="two objects"):
            task_items("after", frames, 1, 0)
    assert len(task_items("after", 4, 3, 0)) == 3
    with pytest.raises(UsageError, match="niah"):
        task_items("nothing", 6, 4, 0)


@pytest.mark.parametrize(
    ("given", "right", "same"),
    [
        ("red star", "red star", True),
        (" A red star. ", "red star", True),
        ("Yes", "yes", True),
        ("the star", "star", True),
        ("red starfish", "red star", False),
        ("", "no", False),
        ("red star, blue 7", "blue 7, red star", False),
    ],
)
def test_same_answer(given: str, right: str, same: bool) -> None:
    assert same_answer(given, right) is same


def answer(method: str, group: str, ok: bool, frames: int = 8) -> Answer:
    return Answer(method, frames, group, "?", "x", "x" if ok else "y", ok, 0.25, 40, [0.5, 1.0],
                  1000, 0.1, 0.2)  # fmt: skip


def test_table_counts() -> None:
    rows = table([answer("a", "g", True), answer("a", "g", False), answer("a", "h", True)])
    by_group = {r["group"]: r for r in rows}
    assert by_group["all"]["accuracy"] == pytest.approx(2 / 3)
    assert by_group["g"]["accuracy"] == 0.5
    assert by_group["h"]["samples"] == 1
    assert by_group["all"]["hits"] == "101"
    assert by_group["all"]["kept"] == 0.75
    assert by_group["all"]["kept_per_layer"] == [0.5, 1.0]
    text = markdown(rows)
    assert "| 8 | a | 66.7 (" in text
    assert "| 8 | a | 67 | 50 | 100 |" in text


def test_numbers_stand_out_from_their_cells() -> None:
    """Contrast of 4.5 and more, as WCAG asks of text; an empty cell says nothing."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    def luminance(colour: tuple) -> float:
        linear = [((c + 0.055) / 1.055) ** 2.4 if c > 0.04 else c / 12.92 for c in colour[:3]]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    axes = Figure().subplots()
    image = coloured_table(axes, [[*range(101), math.nan]], 100)
    assert len(axes.texts) == 101
    for text in axes.texts:
        cell = luminance(image.cmap(int(text.get_text()) / 100))
        ink = {"white": 1.0, "black": 0.0}[text.get_color()]
        assert (max(cell, ink) + 0.05) / (min(cell, ink) + 0.05) > 4.5


def test_heat_map_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    some = [answer("a", f"depth {d:.0%}", d < 0.5, n) for d in DEPTHS for n in (8, 16)]
    heat_map(table(some), "a", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_same_seed_same_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--method", "dense,zipvl:tau=0.9", "--frames", "2,5", "--samples", "6"]
    for name in ("one", "two"):
        assert main([*options, "--device", "cpu", "--out", str(tmp_path / name)]) == 0
    assert (tmp_path / "one/table.md").read_text() == (tmp_path / "two/table.md").read_text()
    raw = json.loads((tmp_path / "one/results.json").read_text())
    settings, *answers = lines(tmp_path / "one")
    assert settings["suffix"] == ""
    assert len(answers) == 2 * 2 * 6
    assert {a["method"] for a in answers} == {"dense", "zipvl:tau=0.9"}
    whole = [r for r in raw["rows"] if r["group"] == "all"]
    assert all(r["kept"] == 1 for r in whole if r["method"] == "dense")
    assert all("kept" not in r for r in raw["rows"] if r["group"] != "all")
    assert "accuracy" in capsys.readouterr().out


def lines(folder: Path) -> list[dict]:
    return list(map(json.loads, (folder / "answers.jsonl").read_text().splitlines()))


def test_an_interrupted_run_goes_on_where_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C at the sixth answer, half a line written by a harder end, then the same command."""
    asked: list[str] = []
    generate, stop = Engine.generate, 6

    def counted(self: Engine, inputs: Inputs, method: str, max_new_tokens: int) -> object:
        asked.append(method)
        if len(asked) == stop:
            raise KeyboardInterrupt
        return generate(self, inputs, method, max_new_tokens=max_new_tokens)

    monkeypatch.setattr(Engine, "generate", counted)
    options = ["--frames", "2,5", "--samples", "3", "--device", "cpu", "--out"]
    assert main([*options, str(tmp_path / "a")]) == 130
    assert capsys.readouterr().err == ""
    assert len(lines(tmp_path / "a")) == 1 + 5
    with (tmp_path / "a/answers.jsonl").open("a") as file:
        file.write('{"unit": "5/0", "meth')
    assert main([*options, str(tmp_path / "a")]) == 0
    assert len(asked) == stop + 2 * 2 * 3 - 5
    assert main([*options, str(tmp_path / "b")]) == 0
    assert (tmp_path / "a/table.md").read_text() == (tmp_path / "b/table.md").read_text()
    answered = [
        [(a["unit"], a["method"], a["given"]) for a in lines(tmp_path / x)[1:]] for x in "ab"
    ]
    assert answered[0] == answered[1]
    asked.clear()
    assert main([*options, str(tmp_path / "a"), "--samples", "4"]) == 0
    assert len(asked) == 2 * 2
    assert main([*options, str(tmp_path / "a"), "--seed", "1"]) == 2
    assert "other settings: give another --out" in capsys.readouterr().err


def test_needles_end_in_heat_maps(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = ["--task", "niah", "--frames", "4", "--samples", "5", "--out", str(tmp_path)]
    assert main([*out, "--device", "cpu"]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {
        "answers.jsonl", "results.json", "table.md", "niah-dense.png", "niah-zipvl_tau=0.975.png",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--task", "nothing"], "niah"),
        (["--method", "zip"], "zipvl"),
        (["--frames", "four"], "--frames"),
        (["--frames", "0"], "--frames"),
        (["--samples", "0"], "--samples"),
        (["--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_mistakes_are_one_sentence(
    options: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options) in (1, 2)
    err = capsys.readouterr().err
    assert word in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_few_bits_cost_the_demo_model_less_than_two_points(tmp_path: Path) -> None:
    """4 and 2 bits, 220 questions a length: ZipCache against dense, and `zipvl-quant` against the
    same sparse prefill with a cache in full, as that loses counts by itself."""
    methods = ["dense", "zipcache", "zipvl:tau=0.99", "zipvl-quant:tau=0.99"]
    options = ["--frames", "16,64", "--samples", "220", "--out", str(tmp_path)]
    assert main(["--method", ",".join(methods), *options]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    share = {(r["frames"], r["method"]): r["accuracy"] for r in rows if r["group"] == "all"}
    for frames in (16, 64):
        assert share[frames, "dense"] > 0.95
        for full, bits in (methods[:2], methods[2:]):
            assert share[frames, bits] > share[frames, full] - 0.02
