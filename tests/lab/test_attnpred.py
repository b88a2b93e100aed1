"""What trains attnpred_reimpl: what it records, how it is scored, what the command writes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import zipvl
from lab import attnpred
from lab.attnpred import Answer, main, mean, record, score, train
from lab.eval.tasks import LARGEST, task_items
from zipvl import load_policy
from zipvl.policies.attnpred import AttnPredLast
from zipvl.policies.attnpred_cnn import predict
from zipvl.policy import Plan, StepView

TINY = ["--frames", "64", "--prompts", "1", "--held", "1", "--steps", "3", "--device", "cpu"]


class Sees(AttnPredLast):
    """Reads all, and keeps what a method with a block of sinks and of local slots would see."""

    def step(self, view: StepView) -> Plan:
        last = (view.length - 16) // 16
        before = view.notes[view.layer][:, :, 1:last].clone()
        plan = super().step(view)
        seen = self.__dict__.setdefault("seen", [])
        seen.append((view.layer, before, view.notes[view.layer][:, -1, 1:last].clone()))
        return plan


def test_examples_are_what_a_step_sees() -> None:
    """Among them one whose last blocks are newer than its oldest rows."""
    engine, [item] = zipvl.load(device="cpu", dtype="float32"), task_items("list", 64, 1, 3)
    answer = record(engine, item)
    side = min(2 * engine.config.media.size, LARGEST)
    inputs = engine.prepare(item.question, video=item.video(side).numpy(), frames=64)
    assert answer.prompt == len(inputs)
    spy = Sees(budget=10**6, dense=0)
    engine.generate(inputs, spy, max_new_tokens=attnpred.ANSWER)
    layers = engine.config.text.num_layers
    assert answer.steps > 1
    assert len(spy.seen) == layers * answer.steps
    for step in range(answer.steps):
        mine = spy.seen[layers * step : layers * step + layers]
        assert [layer for layer, *_ in mine] == list(range(layers))
        history, row = answer.example(step)
        assert history.shape == (layers * engine.config.text.num_kv_heads, 64, row.shape[1])
        torch.testing.assert_close(history, torch.cat([before for _, before, _ in mine]))
        torch.testing.assert_close(row, torch.cat([after for *_, after in mine]))


def made(steps: int, seed: int, prompt: int = 130) -> Answer:
    blocks = -(-(prompt + steps) // 16)
    rows = torch.rand(3, 64 + steps, blocks, generator=torch.Generator().manual_seed(seed))
    return Answer(rows, prompt)


def test_scores_are_means_over_all_rows() -> None:
    answers, error, held = [made(2, 0), made(5, 1, 200)], [], []
    for one in answers:
        for step in range(one.steps):
            last = (one.prompt + step + 1) // 16 - 1  # the newest block is read anyway
            for rows in one.rows.double().numpy():
                row, guess = rows[64 + step, 1:last], rows[63 + step, 1:last]
                error += [(a - b) ** 2 for a, b in zip(row, guess, strict=True)]
                best = sorted(range(len(row)), key=lambda i: -guess[i])[: len(row) // 4]
                held.append(sum(row[i] for i in best) / sum(row))
    found = score(answers, mean(1.0))
    assert found["error"] == pytest.approx(sum(error) / len(error), rel=1e-4)
    assert found["held"] == pytest.approx(sum(held) / len(held), rel=1e-4)


def test_training_finds_what_rows_have_in_common() -> None:
    """Each row repeats the one before but for noise, about which the last row alone is wrong."""
    same = made(4, 2)
    still = same.rows[:, :1].expand(-1, 68, -1)
    noisy = [Answer(still + 0.6 * made(4, seed).rows, 130) for seed in range(4)]
    network, log = train(noisy, 160, 0)
    assert [entry["step"] for entry in log] == list(range(8, 161, 8))
    assert log[-1]["loss"] < log[0]["loss"] / 2
    unseen = [replace(noisy[0], rows=still + 0.6 * made(4, 9).rows)]
    assert score(unseen, lambda x: predict(network, x))["error"] < score(unseen, mean(1.0))["error"]


def test_the_same_seed_trains_the_same_network(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    files = {}
    for name, seed in (("a/one", "5"), ("two", "5"), ("other", "6")):
        out = tmp_path / f"{name}.safetensors"
        assert main([*TINY, "--seed", seed, "--out", str(out)]) == 0
        files[name] = out.read_bytes(), out.with_suffix(".json").read_bytes()
        load_policy("attnpred_reimpl", weights=str(out))
    assert files["a/one"] == files["two"]
    assert files["other"][0] != files["two"][0]
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    log = json.loads(files["other"][1])
    assert len(log.pop("training")) == 3
    assert said[2].pop("seconds") >= 0
    assert said[2] == log
    assert {k: log[k] for k in ("model", "frames", "prompts", "held", "steps", "seed")} == {
        "model": "demo", "frames": [64], "prompts": 1, "held": 1, "steps": 3, "seed": 6,
    }  # fmt: skip
    for rule in ("network", "last", "ema"):
        assert log[rule]["error"] > 0
        assert 0 < log[rule]["held"] < 1
    assert log["ema_weight"] in attnpred.MEANS


@pytest.mark.parametrize(
    ("words", "says", "code"),
    [
        (["--out", "w.json"], "--out is 'w.json': name a file, something.safetensors", 2),
        (["--out", "."], "--out is '.': name a file, something.safetensors", 2),
        (["--out", "folder.safetensors"], "--out is 'folder.safetensors': name a file", 2),
        (["--out", "file/w.safetensors"], "error: file: ", 1),
        (["--seed", "-1"], "--seed is -1: give a whole number from 0 on, below 2^53", 2),
        (["--seed", str(2**53)], f"--seed is {2**53}: give a whole number from 0 on", 2),
        (["--steps", "0"], "'0': give a whole number above 0", 2),
        (["--frames", "64,x"], "'64,x': give whole numbers above 0, as in 16,64", 2),
        (["--model", "/nowhere/at/all"], "error: ", 1),
        (["--frames", "1"], "no prompt is long enough, or no answer: use more --frames", 2),
    ],
)
def test_mistakes_are_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    words: list[str],
    says: str,
    code: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.safetensors").mkdir()
    Path("file").touch()
    assert main([*TINY, *words]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert err.count("\n") == 1
    assert not [
        p for p in Path().rglob("*") if p.suffix in (".safetensors", ".json") and p.is_file()
    ]
