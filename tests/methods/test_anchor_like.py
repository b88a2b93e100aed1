"""anchor_like: lines, and who sees what."""

from functools import partial

import numpy as np
import pytest
import torch

import zipvl
from zipvl.policies import load_policy
from zipvl.policies.anchor_like import AnchorLike
from zipvl.policy import Plan, View
from zipvl.testing import check_policy
from zipvl.testing.toy import Stretches, Toy

CASES = [("anchor_like", {}, None)]


@pytest.mark.parametrize(("name", "options", "everything"), CASES)
def test_contract(name: str, options: dict, everything: dict | None) -> None:
    check_policy(partial(load_policy, name), everything=everything, **options)


def plainly(medium: list[int], crop: list[int]) -> tuple[np.ndarray, list[int]]:
    """Who sees whom [T, T], and the anchors, token by token."""
    T = len(crop)
    anchors, lines, line = [], [], 0
    for t in range(T):
        text, newline = medium[t] < 0, medium[t] >= 0 and crop[t] < 0
        last = t + 1 == T or medium[t + 1] != medium[t] or crop[t + 1] not in (crop[t], -1)
        lines.append(line)
        if text or newline or last:
            anchors.append(t)
            line += 1
    seen = np.zeros((T, T), dtype=bool)
    for t in range(T):
        for j in range(t + 1):
            seen[t, j] = j in anchors or lines[j] == lines[t]
    return seen, anchors


class Spy(AnchorLike):
    """Looks at its own plan in every layer."""

    def plan(self, view: View) -> Plan:
        plan, origin = super().plan(view), view.notes.origin
        seen, anchors = plainly(origin.medium.tolist(), origin.crop.tolist())
        causal = plan.mask(view.every).numpy() & np.tri(view.length, dtype=bool)
        assert (causal == seen).all()
        assert plan.cache.nonzero()[:, 0].tolist() == anchors
        return plan


@pytest.mark.parametrize("visual", ["none", "all", "some"])
@pytest.mark.parametrize("length", [1, 2, 23, 90])
def test_lines_of_stretches(length: int, visual: str) -> None:
    toy = Toy.build(4, 2)
    got = toy.run(Spy(), [toy.prompt(length, visual), toy.prompt(30)])
    assert got.bytes == [2 * (sum(counts) + 8) * 2 * 8 * 4 for counts in got.prefilled]


def test_rows_and_frames() -> None:
    """Vectors that end a row belong to it; two media in a row are two lines."""
    origin = Stretches(torch.ones(1) > 0)
    medium = [-1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, -1, -1]
    crop = [-1, 0, 0, -1, 0, 0, -1, 0, 0, 1, 1, -1, -1]
    origin.medium, origin.crop = torch.tensor(medium), torch.tensor(crop)
    seen, anchors = plainly(medium, crop)
    assert anchors == [0, 3, 6, 8, 10, 11, 12]
    place = torch.arange(13)

    class Notes:
        pass

    notes = Notes()
    notes.origin = origin
    view = View(0, 1, torch.zeros(1, 13, 2), place, origin.medium >= 0, notes, *[None] * 4)
    plan = AnchorLike().plan(view)
    assert (plan.mask(place).numpy() & np.tri(13, dtype=bool) == seen).all()
    assert seen[5].nonzero()[0].tolist() == [0, 3, 4, 5]


def test_of_a_film_the_frames_ends_stay() -> None:
    engine = zipvl.load(device="cpu")
    inputs = engine.prepare("What comes first?", video=zipvl.demo_clip(), frames=9)
    stats = engine.generate(inputs, "anchor_like", max_new_tokens=2).stats
    text = stats.prompt_tokens - stats.visual_tokens
    assert {layer["cached"] for layer in stats.layers} == {text + 9}  # the last by its vector
    assert stats.attention_work < 0.9
