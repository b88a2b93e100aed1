"""Profiles for PrefixKV: what the command writes, and that the method reads it."""

import json
from pathlib import Path

import pytest

import zipvl
from lab.calibrate import main
from lab.eval.tasks import LARGEST, task_items


def test_a_profile_is_the_mean_of_what_prompts_find(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "deeper" / "p.json"
    words = ["--ratio", "0.3", "--frames", "8", "--samples", "3", "--seed", "5", "--device", "cpu"]
    assert main([str(out), *words]) == 0
    said = json.loads(out.read_text())
    assert {k: said[k] for k in ("format", "version", "ratio", "model", "frames", "samples", "seed")} == {
        "format": "zipvl-prefixkv", "version": 1, "ratio": 0.3, "model": "demo", "frames": 8,
        "samples": 3, "seed": 5,
    }  # fmt: skip
    assert capsys.readouterr().out.startswith(f"{out}: 0.")
    engine, kept = zipvl.load(device="cpu"), []
    side = min(2 * engine.config.vision.media.size, LARGEST)
    for item in task_items("all", 8, 3, 5):
        inputs = engine.prepare(item.question, video=item.video(side).numpy(), frames=8)
        stats = engine.generate(inputs, "prefixkv:ratio=0.3", max_new_tokens=1).stats
        kept.append([layer["cached"] / len(inputs) for layer in stats.layers])
    assert said["shares"] == pytest.approx(
        [sum(layer) / 3 for layer in zip(*kept, strict=True)], abs=1e-6
    )
    assert sum(said["shares"]) / 8 == pytest.approx(0.3, abs=0.01)
    # and the method keeps these shares of another prompt
    stats = engine.generate(inputs, f"prefixkv:ratio=0.3,profile={out}", max_new_tokens=1).stats
    want = [max(2, round(share * len(inputs))) for share in said["shares"]]
    assert [layer["cached"] for layer in stats.layers] == want


@pytest.mark.parametrize(
    ("words", "says", "code"),
    [
        (["--ratio", "0"], "error: method 'prefixkv': ratio is 0.0: give the share to keep", 2),
        (["--ratio", "x"], "argument --ratio: invalid float value: 'x': --help lists all", 2),
        (["--samples", "0"], "give a whole number above 0", 2),
        (["--model", "/nowhere/at/all"], "error: ", 1),
    ],
)
def test_mistakes_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture, words: list[str], says: str, code: int
) -> None:
    assert main([str(tmp_path / "p.json"), *words]) == code
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert not (tmp_path / "p.json").exists()
