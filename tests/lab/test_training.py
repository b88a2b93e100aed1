"""How the demo model was trained: small models, no bundled weights."""

import hashlib
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import zipvl
from lab.demo import checkpoint, train
from lab.demo import sequences as training
from lab.demo.bank import EMPTY, HARD, RARE, Bank, build, group
from lab.demo.memory import BACK, Memory, recent
from lab.demo.optim import orthogonal
from lab.demo.resume import Stage
from lab.demo.sequences import Scene, Sequences, embed, layers, scene, sequences, some_frames
from lab.demo.things import NAMES, Thing
from lab.demo.tower import Heads, pictures
from zipvl.model.decoder import Decoder
from zipvl.model.layouts import read_config
from zipvl.model.vlm import VLM

GRID = checkpoint.SIDE // checkpoint.PATCH


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    folder = tmp_path_factory.mktemp("demo")
    checkpoint.write_plain(folder)
    model = VLM(read_config(folder))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


def test_written_weights_are_read_again(fresh: VLM, tmp_path: Path) -> None:
    checkpoint.write_plain(tmp_path)
    checkpoint.write_weights(fresh, tmp_path)
    again = zipvl.load(tmp_path, device="cpu", dtype="float32").model
    for name, p in fresh.named_parameters():
        assert torch.equal(again.get_parameter(name), p.bfloat16().float()), name


def batch_of(fresh: VLM, frames: int, picture: bool, chats: float) -> tuple[Bank, Sequences]:
    rng, rows = np.random.default_rng(), 144 * 2 + 48
    bank = Bank(torch.randn(rows, GRID * GRID, fresh.config.vision.tower.hidden_size).half(), 2, 48)
    scenes = [scene(frames, frames, rng) for _ in range(3)]
    return bank, sequences(
        bank, checkpoint.tokenizer(), scenes, 4, GRID, rng, picture, chats, False
    )


@torch.no_grad()
@pytest.mark.parametrize(("frames", "picture"), [(5, False), (1, True)])
@pytest.mark.parametrize("chats", [0.0, 1.0])
def test_shared_prefix_equals_one_question_alone(
    fresh: VLM, frames: int, picture: bool, chats: float
) -> None:
    bank, batch = batch_of(fresh, frames, picture, chats)
    x = embed(fresh, bank.features[batch.rows].float(), batch)
    together = layers(fresh.text, x, batch)[-1].states
    for row in range(len(batch.ids)):
        for question in range(int(batch.part[row].max()) + 1):
            mine = (batch.part[row] == 0) | (batch.part[row] == question)
            alone = fresh.text(x[row][mine], [int(mine.sum())])
            assert torch.allclose(together[row][mine], alone, atol=1e-4)
            assert batch.positions[row][mine].tolist() == list(range(int(mine.sum())))


@torch.no_grad()
@pytest.mark.parametrize("picture", [False, True])
def test_training_packs_features_as_the_model_does(
    fresh: VLM, picture: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = 1 if picture else 6
    bank, batch = batch_of(fresh, frames, picture, 0.0)
    features = bank.features[batch.rows].float()
    crops = torch.zeros(2 if picture else frames, GRID, GRID, 3, dtype=torch.uint8)
    side = checkpoint.SIDE
    geometry = fresh.vision.plan(side, side, frames=0 if picture else frames)
    shown = features[0].expand(len(crops), -1, -1)
    monkeypatch.setattr(fresh.vision.tower, "forward", lambda pixels: shown)
    wanted = fresh.vision.encode(crops, geometry)
    found = embed(fresh, features, batch)[0, 1 : 1 + batch.visual]
    assert torch.allclose(found, wanted, atol=1e-5)


def test_answers_are_the_targets(fresh: VLM) -> None:
    _, batch = batch_of(fresh, 6, False, 0.0)
    tok = checkpoint.tokenizer()
    for row, questions in enumerate(batch.questions):
        for n, q in enumerate(questions, start=1):
            mine = batch.part[row] == n
            target = batch.target[row][mine & (batch.target[row] >= 0)].tolist()
            assert tok.decode(target) == q.answer
            assert target[-1] == checkpoint.END
            said = tok.decode(batch.ids[row][mine].tolist()).removesuffix(q.answer)
            assert said.rstrip("?.").lower() == q.text.rstrip("?.").lower()


# --- long clips of which some frames stand for all ----------------------------------------------


def events_of(drawn: list[list[tuple[int, int]]], monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on `drawn` holds the events of every scene that is not of needles."""
    spans = training.spans
    monkeypatch.setattr(training, "spans", lambda *a: drawn.append(spans(*a)) or drawn[-1])


@pytest.mark.parametrize(("frames", "shown"), [(1, 1), (16, 16), (64, 33), (100, 40), (8000, 36)])
def test_scenes_say_what_is_in_view(
    frames: int, shown: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, drawn = np.random.default_rng(), list[list[tuple[int, int]]]()
    events_of(drawn, monkeypatch)
    for _ in range(30):
        some = scene(frames, shown, rng)
        assert len(some.at) == shown
        assert (np.diff(some.at) > 0).all()
        assert some.stands_for.sum() == pytest.approx(frames)
        edges = {0, frames - 1, *(e for start, stop in drawn[-1] for e in (start, stop - 1))}
        assert edges <= set(some.at.tolist())
        for at, begun, view, hard, which in zip(
            some.at, some.begun, some.in_view, some.hard, some.groups, strict=True
        ):
            here = [t for t, (a, b) in zip(some.things, drawn[-1], strict=True) if a <= at < b]
            assert begun == sum(start <= at for start, _ in drawn[-1])
            assert view == bool(here)
            assert which == (group(here[0]) if here else HARD if hard else EMPTY)


def test_needles_are_in_view_once() -> None:
    rng = np.random.default_rng()
    for _ in range(30):
        some = scene(500, 40, rng, needles=True)
        assert some.in_view.sum() == len(some.things)
        assert (some.stands_for[some.in_view] == 1).all()


def test_frames_of_a_run_stand_for_the_run() -> None:
    rng, edges = np.random.default_rng(), np.array([0, 1, 3, 40, 900, 903])
    at, stands_for, hard = some_frames(edges, 24, rng)
    for start, stop in pairwise(edges):
        mine = (at >= start) & (at < stop)
        assert stands_for[mine].sum() == pytest.approx(stop - start)
        assert stands_for[mine][0] == stands_for[mine][-1] == 1
        assert not hard[mine][0]
        assert not hard[mine][-1]
        assert hard[mine].sum() <= 1
    long = hard & (at >= 40) & (at < 900)  # 858 frames within: that some are hard is certain
    assert stands_for[long].tolist() == [pytest.approx(858 / RARE)]


def test_positions_and_weights_are_those_of_the_whole_clip(fresh: VLM) -> None:
    rng = np.random.default_rng()
    scenes = [scene(frames, 40, rng) for frames in (60, 700, 5000)]
    bank = Bank(torch.zeros(144 * 2 + 48, 1, 1), 2, 48)
    batch = sequences(bank, checkpoint.tokenizer(), scenes, 2, GRID, rng, False, 0.0, False)
    for row, some in enumerate(scenes):
        frames = batch.positions[row, 1:161].view(40, 4)
        assert frames[:, 0].tolist() == (1 + 4 * some.at).tolist()
        assert (frames.diff(dim=1) == 1).all()
        assert batch.positions[row, 161:164].tolist() == [4 * some.frames + n for n in (1, 2, 3)]
        counts = batch.weight[row].exp()
        assert counts[1:161].sum() == pytest.approx(4 * some.frames, rel=1e-4)
        assert (counts[161:] == 1).all()
        assert counts[0] == 1


@torch.no_grad()
def test_a_weight_counts_like_copies(fresh: VLM) -> None:
    """In one layer, tokens behind a token of weight log n see what n copies of it would be."""
    text = Decoder(replace(fresh.config.text, num_layers=1))
    copies = torch.tensor([1, 3, 1, 40, 1, 1, 2, 1])
    x, place = torch.randn(1, 8, text.config.hidden_size), torch.arange(8)[None]

    def packed(times: torch.Tensor, weight: torch.Tensor) -> Sequences:
        at = place.repeat_interleave(times, 1)
        zero = torch.zeros_like(at)
        return Sequences(zero, zero, at, zero - 1, zero, weight, zero, False, [], [], 0)

    many = packed(copies, torch.zeros(1, int(copies.sum())))
    want = layers(text, x.repeat_interleave(copies, 1), many)[-1].states[0, copies.cumsum(0) - 1]
    got = layers(text, x, packed(torch.ones_like(copies), copies.log()[None]))[-1].states[0]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


# --- what the decoder is asked to remember --------------------------------------------------------


def test_memory_is_read_at_the_last_token_of_a_frame(fresh: VLM) -> None:
    _, batch = batch_of(fresh, 6, False, 0.0)
    states = torch.randn(*batch.ids.shape, 128, requires_grad=True)
    Memory(128)(states, batch, 4).backward()
    assert states.grad is not None
    read = states.grad.abs().amax((0, 2)).nonzero().flatten().tolist()
    assert read == [4, 8, 12, 16, 20, 24]


def test_memory_is_the_latest_thing_and_the_one_before() -> None:
    things = (Thing("star", "red"), Thing("7", "blue"), Thing("ring", "pink"))
    begun = np.array([0, 1, 1, 2, 3])
    some = Scene(things, 5, np.arange(5), np.ones(5), begun, begun > 0, begun < 0)
    star, seven, ring = (training.group(t) // len(NAMES) for t in things)
    assert recent(some, 0).tolist() == [
        [-1, -1], [star, -1], [star, -1], [seven, star], [ring, seven]
    ]  # fmt: skip
    colours = [NAMES.index(c) for c in ("red", "blue", "pink")]
    assert recent(some, 1)[-1].tolist() == [colours[2], colours[1]]
    assert BACK == 2


# --- stopped and resumed --------------------------------------------------------------------------


def toy(folder: Path, until: int | None = None, steps: int = 12) -> tuple[Stage, Any, torch.Tensor]:
    """A stage that trains a line; its step number `until` is Ctrl-C."""
    torch.manual_seed(0)
    line = torch.nn.Linear(3, 1)
    opt = torch.optim.AdamW(line.parameters(), 0.1)

    def step(number: int) -> dict[str, Any]:
        if number == until:
            raise KeyboardInterrupt
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(number))
        loss = (line(x) - x.sum(1, keepdim=True)).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        return {"loss": loss.item()}

    return Stage(folder, "toy", [line, opt], steps), step, line.weight


def test_a_stage_that_was_cut_off_ends_as_one_that_was_not(tmp_path: Path) -> None:
    logs, weights = [], []
    for name, cuts in (("whole", ()), ("cut", (0, 5, 9))):
        folder = tmp_path / name
        folder.mkdir()
        for cut in cuts:
            stage, step, _ = toy(folder)
            stage.run(step, stop=max(0, cut - 2))  # what is on disk is two steps older
            stage, step, _ = toy(folder, cut)
            with pytest.raises(KeyboardInterrupt):
                stage.run(step, save=1e9)
        stage, step, weight = toy(folder)
        assert stage.run(step)
        assert stage.run(step)  # at its end: nothing is left to do
        lines = (folder / "toy.jsonl").read_text().splitlines()
        logs.append(
            [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
        )
        weights.append(weight)
    assert torch.equal(*weights)
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[0]] == list(range(1, 13))


@pytest.mark.slow
def test_the_command_stopped_in_every_stage_gives_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(train, "TESTS", ((4, 4), (100, 36)))
    chance = torch.Generator().manual_seed(0)
    tiles = torch.randint(0, 255, (4, 3, 128, 128), generator=chance, dtype=torch.uint8)
    files = []
    for name, stops in (("whole", ()), ("cut", (2, 5))):
        cache = tmp_path / name
        cache.mkdir()
        torch.save(tiles, cache / "tiles.pt")
        arguments = ["--cache", str(cache), "--tower-steps", "3", "--steps", "6", "--each", "1"]
        for stop in stops:
            assert train.main([*arguments, "--stop", str(stop)]) == 0
        assert train.main(arguments) == 0, capsys.readouterr().err
        folder = cache / "seed-1"
        files.append((folder / "model.safetensors").read_bytes())
        log = [json.loads(line) for line in (folder / "decoder.jsonl").read_text().splitlines()]
        assert [line.get("step") for line in log] == [1, 2, 3, 4, 5, 6, None]
        assert log[-1]["sha256"] == hashlib.sha256(files[-1]).hexdigest()
        assert log[5].keys() >= {"loss", "memory", "frames", "4 frames", "100 frames"}
    assert files[0] == files[1]
    assert len(zipvl.load(folder, device="cpu").generate("What?", max_new_tokens=2).tokens) <= 2
    assert train.main([*arguments, "--seed", "2"]) == 0
    assert (cache / "seed-2/model.safetensors").read_bytes() != files[1]


@pytest.mark.slow
def test_bank_rows_belong_to_their_group(fresh: VLM) -> None:
    bank = Bank(torch.zeros(144 * 3 + 5 + 2, 1, 1), 3, 5)
    rng, groups = np.random.default_rng(), np.array([[0, 7, 143, EMPTY, HARD]] * 50)
    rows = bank.rows(groups, rng)
    assert set(rows[:, 4].tolist()) == {437, 438}
    assert (rows[:, 3] >= 432).all()
    assert (rows[:, 3] < 437).all()
    assert (rows[:, :3] // 3 == torch.tensor([0, 7, 143])).all()
    assert group(Thing("9", NAMES[-1])) == 143
    tiles = torch.randint(0, 255, (4, 3, 128, 128)).byte()
    covered, rng = torch.nn.Linear(128, 1), torch.Generator().manual_seed(0)
    built = build(fresh.vision.tower, covered, tiles, 1, checkpoint.SIDE, rng, clutter=True)
    assert built.features.shape == (144 + 24 + 2, GRID * GRID, 128)
    surest = covered(built.features.float()).amax(dim=(1, 2))
    assert surest[-2:].min() > surest[144:-2].quantile(0.9)


def test_tower_labels_name_what_is_drawn(fresh: VLM) -> None:
    """Patches labelled as covered differ between two draws over one background; empty ones do not."""
    tiles, side = torch.zeros(1, 3, 128, 128).byte(), checkpoint.SIDE
    batch = pictures(tiles, 64, side, GRID, torch.Generator().manual_seed(1))
    patches = torch.nn.functional.avg_pool2d(
        (batch.pixels + 1).abs().amax(1), side // GRID
    ).flatten(1)
    dark = batch.colour == NAMES.index("black")  # its outline is white, but may miss a patch
    assert patches[(batch.covered == 1) & ~dark].min() > 0.05
    assert patches[batch.covered == 0].max() < 0.2
    assert (batch.kind[:24] == -1).all()
    loss, right = Heads(128)(torch.randn(64, GRID * GRID, 128), batch)
    assert loss.isfinite()
    assert right.keys() == {"kind", "colour", "covered"}


def test_orthogonal_evens_out_singular_values() -> None:
    for shape in ((3, 16, 40), (2, 40, 16)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert values.min() > 0.3
        assert values.max() < 1.6
