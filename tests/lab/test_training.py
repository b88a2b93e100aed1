"""How the demo model was trained: small models, no bundled weights."""

from pathlib import Path

import numpy as np
import pytest
import torch

import zipvl
from lab.demo import checkpoint
from lab.demo.bank import Bank, build, group
from lab.demo.optim import orthogonal
from lab.demo.sequences import Sequences, embed, hidden, sequences
from lab.demo.things import NAMES, Thing
from lab.demo.tower import Heads, pictures
from zipvl.model.layouts import read_config
from zipvl.model.vlm import VLM
from zipvl.vision.image import plan

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
    bank = Bank(torch.randn(rows, GRID * GRID, fresh.config.vision.hidden_size).half(), 2, 48)
    return bank, sequences(
        bank, checkpoint.tokenizer(), 3, frames, 4, GRID, rng, picture, chats, False
    )


@torch.no_grad()
@pytest.mark.parametrize(("frames", "picture"), [(5, False), (1, True)])
@pytest.mark.parametrize("chats", [0.0, 1.0])
def test_shared_prefix_equals_one_question_alone(
    fresh: VLM, frames: int, picture: bool, chats: float
) -> None:
    bank, batch = batch_of(fresh, frames, picture, chats)
    x = embed(fresh, bank.features[batch.rows].float(), batch)
    together = hidden(fresh.text, x, batch)
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
    geometry = plan(checkpoint.SIDE, checkpoint.SIDE, fresh.config.media, True) if picture else None
    shown = features[0].expand(len(crops), -1, -1)
    monkeypatch.setattr(fresh.vision, "forward", lambda pixels: shown)
    wanted = fresh.encode(crops, geometry)
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


def test_bank_rows_belong_to_their_group(fresh: VLM) -> None:
    bank = Bank(torch.zeros(144 * 3 + 5, 1, 1), 3, 5)
    rng, groups = np.random.default_rng(), np.array([[0, 7, 143, 144]] * 50)
    rows = bank.rows(groups, rng)
    assert (rows[:, 3] >= 432).all()
    assert (rows[:, 3] < 437).all()
    assert (rows[:, :3] // 3 == torch.tensor([0, 7, 143])).all()
    assert group(Thing("9", NAMES[-1])) == 143
    tiles = torch.randint(0, 255, (4, 3, 128, 128)).byte()
    built = build(fresh.vision, tiles, 1, checkpoint.SIDE, torch.Generator().manual_seed(0))
    assert built.features.shape == (144 + 24, GRID * GRID, 128)


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
    assert (batch.kind[:8] == -1).all()
    loss, right = Heads(128)(torch.randn(64, GRID * GRID, 128), batch)
    assert loss.isfinite()
    assert right.keys() == {"kind", "colour", "covered"}


def test_orthogonal_evens_out_singular_values() -> None:
    for shape in ((3, 16, 40), (2, 40, 16)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert values.min() > 0.3
        assert values.max() < 1.6
