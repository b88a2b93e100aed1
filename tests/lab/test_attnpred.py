"""python -m lab.attnpred: what it records, learns and says. A few clips, a few updates."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import zipvl
from lab import attnpred
from lab.attnpred import Answer, Recorder, mean, record, score, train
from lab.eval.tasks import LARGEST, task_items
from zipvl.policies import load_policy
from zipvl.policies.attnpred import AttnPredLast
from zipvl.policies.attnpred_cnn import SHAPES, predict
from zipvl.policy import Plan, StepView
from zipvl.testing.toy import Toy

TINY = ["--frames", "16,24", "--prompts", "2", "--held", "1", "--steps", "3", "--device", "cpu"]


def random_answer(seed: int, steps: int = 6, blocks: int = 9, heads: int = 4) -> Answer:
    """Rows that are a steady one and noise."""
    chance = torch.Generator().manual_seed(seed)
    steady = torch.rand(heads, 1, blocks, generator=chance)
    noise = torch.rand(heads, 64 + steps, blocks, generator=chance)
    return Answer(0.02 * (steady + noise), 16 * (blocks - 1))


def test_the_recorder_forgets_no_row() -> None:
    """The prompt's last 64 rows, and one a step, as the model attended."""
    seen: list[tuple[int, Tensor]] = []

    class Spy(Recorder):
        def step(self, view: StepView) -> attnpred.Plan:
            plan = super().step(view)
            seen.append((view.layer, view.by_group(view.mass())))
            return plan

    toy = Toy.build(4, 2)
    got = toy.run(Spy(dense=0), [toy.prompt(90)], steps=9)  # into the seventh block
    assert toy.run(Recorder(dense=0), [toy.prompt(90)], steps=9).tokens == got.tokens
    for layer in range(3):
        rows = got.notes[0][layer]
        assert rows.shape == (2, 64 + 9, 7)
        assert not rows[:, :70, 6].any()  # the seventh block was not there
        assert rows[:, 70:, 6].any()
        mine = [row for at, row in seen if at == layer]
        for row, kept in zip(mine, rows[:, 64:].unbind(1), strict=True):
            upper = torch.stack([row[:, i : i + 16].amax(1) for i in range(0, row.shape[1], 16)], 1)
            assert (kept[:, : upper.shape[1]] >= upper - 1e-6).all()  # the heads' largest, averaged


def test_an_example_is_what_a_step_knows() -> None:
    answer = random_answer(0)  # 128 tokens of prompt: the ninth block begins with the answer
    history, row = answer.example(2)
    assert torch.equal(history, answer.rows[:, 2:66, 1:7])
    assert torch.equal(row, answer.rows[:, 66, 1:7])
    assert answer.steps == 6


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
    side = min(2 * engine.config.vision.media.size, LARGEST)
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


def test_scores_by_hand() -> None:
    answers = [random_answer(seed) for seed in range(3)]
    rows = [one.example(step)[1] for one in answers for step in range(6)]
    told = iter(rows)
    perfect = score(answers, lambda history: next(told))
    assert perfect["error"] == 0
    best = torch.cat([row.max(1).values / row.sum(1) for row in rows])  # a quarter of 6 is one
    assert perfect["held"] == pytest.approx(best.mean().item(), rel=1e-5)
    nothing = score(answers, lambda history: torch.zeros_like(history[:, 0]))
    assert nothing["error"] == pytest.approx(torch.cat(rows).square().mean().item(), rel=1e-5)
    last = torch.cat([one.rows[:, step + 63, 1:7] for one in answers for step in range(6)])
    want = (torch.cat(rows) - last).square().mean().item()
    assert score(answers, mean(1.0))["error"] == pytest.approx(want, rel=1e-5)


def test_it_learns_and_a_seed_decides() -> None:
    """On rows of a steady part and noise the mean of many is better than the last one."""
    seen, unseen = ([random_answer(s) for s in some] for some in (range(8), range(8, 12)))
    w, log = train(seen, 60, seed=1)
    assert {name: tuple(t.shape) for name, t in w.items()} == SHAPES
    assert [line["step"] for line in log] == list(range(3, 61, 3))
    assert log[-1]["loss"] < 0.3 * log[0]["loss"]
    error = score(unseen, lambda history: predict(w, history))["error"]
    assert error < 0.9 * score(unseen, mean(1.0))["error"]
    again, _ = train(seen, 60, seed=1)
    other, _ = train(seen, 60, seed=2)
    assert all(torch.equal(t, again[name]) for name, t in w.items())
    assert not torch.equal(w["conv1.weight"], other["conv1.weight"])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("one", "two"):
        assert attnpred.main([*TINY, "--out", str(tmp_path / name / "w.safetensors")]) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    first.pop("seconds")
    second.pop("seconds")
    assert first == second
    assert (first["model"], first["frames"], first["prompts"]) == ("demo", [16, 24], 2)
    assert first["examples"] % 16 == 0  # layers x key/value heads
    assert first["examples"] > 0
    for name in ("network", "last", "ema"):
        assert 0 < first[name]["error"] < 1
        assert 0 < first[name]["held"] <= 1
    log = json.loads((tmp_path / "one/w.json").read_text(encoding="utf-8"))
    assert [line["step"] for line in log.pop("training")] == [1, 2, 3]
    assert log == first
    files = [tmp_path / name / "w.safetensors" for name in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()
    policy = load_policy("attnpred_reimpl", weights=str(files[0]))
    assert sum(w.numel() for w in policy.network.values()) == 4833


def test_its_errors_are_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    tries: list[tuple[list[str], str]] = [
        (["--frames", "none"], "give whole numbers above 0"),
        (["--steps", "0"], "give a whole number above 0"),
        (["--model", str(tmp_path / "none")], "none"),
        (["--out", str(file / "w.safetensors")], "file"),
        (["--out", str(tmp_path)], "is a folder: name a file"),
        (["--out", str(tmp_path / "w.json")], "w.json is where the log goes: name a file"),
        (["--seed", "-1"], "--seed: '-1': give a whole number from 0 on, below 2^53"),
        (["--frames", "1", "--prompts", "1", "--held", "1"], "no prompt is long enough"),
    ]
    for argv, says in tries:
        out = [] if "--out" in argv else ["--out", str(tmp_path / "w.safetensors")]
        assert attnpred.main([*TINY, *out, *argv]) != 0
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert says in said
        assert said.count("\n") == 1
    assert not (tmp_path / "w.safetensors").exists()


def test_the_file_that_is_there_beats_the_last_row() -> None:
    file = Path(attnpred.__file__).parent / "results/methods/attnpred.safetensors"
    load_policy("attnpred_reimpl", weights=str(file))
    log = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    assert log["network"]["error"] < log["ema"]["error"] < log["last"]["error"]
