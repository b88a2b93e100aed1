"""Clips of a few hundred tokens that a decoder cannot tell from ones of 100,000; see long.py."""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .bank import EMPTY, Bank
from .checkpoint import PATCH, SIDE
from .sequences import Sequences

GRID = SIDE // PATCH
N = (GRID // 2) ** 2  # tokens a frame
LONGEST = 120_000  # tokens
CROWD = 400  # copies; with 256 to 512 tokens a clip this is more than LONGEST


@dataclass(frozen=True)
class Crowded:
    """A batch and how much each of its tokens weighs as a key."""

    batch: Sequences
    weight: Tensor  # [B, L], logarithm of a number of copies


def needles(groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """groups [B, F] of which each run of one thing keeps a single frame, the others are empty."""
    out = np.full_like(groups, EMPTY)
    for line, into in zip(groups, out, strict=True):
        edges = [0, *(np.flatnonzero(np.diff(line)) + 1), len(line)]
        for start, stop in pairwise(edges):
            into[rng.integers(start, stop)] = line[start]
    return out


def jumps(batch: int, frames: int, longest: float, rng: np.random.Generator) -> np.ndarray:
    """How far each frame's position is moved, and in the last column what follows. # [B, F + 1]

    A sequence is stretched by up to `longest`, evenly in the logarithm, at eight random places.
    """
    sizes = rng.dirichlet(np.ones(8), batch) * longest ** rng.random((batch, 1))
    moved = np.zeros((batch, frames + 1))
    np.add.at(moved, (np.arange(batch)[:, None], rng.integers(0, frames + 1, (batch, 8))), sizes)
    return moved.cumsum(1).astype(np.int64)


def crowded(bank: Bank, batch: Sequences, reach: float, rng: np.random.Generator) -> Crowded:
    """`batch` with single-frame needles, stretched to LONGEST ** reach and CROWD ** reach."""
    groups = needles((batch.rows // bank.each).clamp(max=EMPTY).numpy(), rng)
    count, frames = groups.shape
    moved = torch.from_numpy(jumps(count, frames, LONGEST**reach, rng))
    frame = ((torch.arange(batch.ids.shape[1]) - 1) // N).clamp(0, frames)  # of each token
    crowd = torch.from_numpy(CROWD ** (reach * rng.random((count, 1)))).float().log()
    empty = torch.from_numpy(np.pad(groups == EMPTY, ((0, 0), (0, 1))))  # [B, F + 1]
    weight = (crowd * empty)[:, frame]
    weight[:, 0] = 0  # the token before the first frame
    # A row is drawn again for every frame: a needle's would otherwise depend on its run's length.
    batch = replace(batch, rows=bank.rows(groups, rng), positions=batch.positions + moved[:, frame])
    return Crowded(batch, weight)
