"""What the tests of attnpred_last and attnpred_reimpl share: their rule, told step by step in float64
over lists of rows; and a network of random numbers in a file, for tests of all methods."""

import atexit
import math
import shutil
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import torch
from safetensors.torch import save_file

from zipvl.policies.attnpred import AttnPredLast
from zipvl.policy import Plan, StepView, View

from .looking import attention, step_row

FOLDER = Path(mkdtemp(prefix="zipvl-test-"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)


def random_network(seed: int, scale: float = 0.3) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    shapes = {"conv1": [16, 1, 3, 3], "conv2": [32, 16, 3, 3], "conv3": [1, 32, 1]}
    w = {f"{n}.weight": scale * torch.randn(s, generator=chance) for n, s in shapes.items()}
    return w | {f"{n}.bias": scale * torch.randn(s[0], generator=chance) for n, s in shapes.items()}


WEIGHTS = FOLDER / "random.safetensors"
save_file(random_network(0), WEIGHTS)
NEEDS = {"attnpred_reimpl": {"weights": str(WEIGHTS)}}  # options without which a method is none


def pool(row: np.ndarray) -> list[float]:
    return [max(row[i : i + 16]) for i in range(0, len(row), 16)]


def grouped(rows: np.ndarray, groups: int) -> list[list[float]]:
    """rows [H, n] -> of each key/value head the mean over its query heads' blocks."""
    heads, share = [np.array(pool(row)) for row in rows], len(rows) // groups
    return [list(sum(heads[g * share : (g + 1) * share]) / share) for g in range(groups)]


def laid_out(told: list[list[list[float]]], g: int, n: int) -> np.ndarray:
    """[rows, blocks] of a key/value head with n slots: a row has 0 for blocks newer than itself."""
    return np.array([(row[g] + [0.0] * n)[: math.ceil(n / 16)] for row in told])


def running_mean(history: np.ndarray, ema: float) -> np.ndarray:
    """history [rows, blocks]: each row comes in as the ones before it fade."""
    total, weight = np.zeros(history.shape[1]), 0.0
    for row in history:
        total, weight = (1 - ema) * total + row, (1 - ema) * weight + 1
    return total / weight


class Follows:
    """In front of a method's class: keeps a history of its own, in lists, one prompt at a time, and
    holds every answer of the method against it."""

    def guess(self, history: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def plan(self: AttnPredLast, view: View) -> Plan:
        plan = super().plan(view)  # type: ignore[safe-super]
        assert plan == Plan()
        if view.layer == 0:
            self.told, self.read = {}, []
        rows = attention(view)[:, -64:]  # [H, 64 or T, T]
        told = [grouped(rows[:, i], len(view.k)) for i in range(rows.shape[1])]
        self.told[view.layer] = told
        assert (view.layer in view.notes) == (view.layer >= self.dense)
        if view.layer in view.notes:
            self.check_history(view, told)
        return plan

    def step(self: AttnPredLast, view: StepView) -> Plan:
        n, groups, told = view.length, len(view.k), self.told[view.layer]
        plan, full = super().step(view), step_row(view)  # type: ignore[safe-super]
        assert plan.leave is None
        if view.layer < self.dense:
            assert plan == Plan()
            assert view.layer not in view.notes
            return plan
        if n <= self.budget:
            assert plan.attend is None
            row = full
        else:
            read = [slots.tolist() for slots in plan.attend]
            assert len(read) == groups
            for g, slots in enumerate(read):
                self.check_read(slots, laid_out(told, g, n), n)
            row = full if (n - view.notes.prompt) % self.every == 0 else self.some(full, read)
            self.read.append((view.layer, n, read))
        told.append(grouped(row, groups))
        del told[:-64]
        self.check_history(view, told)
        return plan

    def check_history(self, view: View | StepView, told: list[list[list[float]]]) -> None:
        want = [laid_out(told, g, view.length) for g in range(len(view.k))]
        np.testing.assert_allclose(view.notes[view.layer].numpy(), want, rtol=1e-3, atol=1e-6)

    def some(self, full: np.ndarray, read: list[list[int]]) -> np.ndarray:
        """The rows, where nothing but what was read takes part."""
        out, share = np.zeros_like(full), len(full) // len(read)
        for h, row in enumerate(full):
            mine = read[h // share]
            out[h, mine] = row[mine] / row[mine].sum()
        return out

    def check_read(self: AttnPredLast, slots: list[int], history: np.ndarray, n: int) -> None:
        """Sinks, whole blocks, and from the block on in which the local ones begin, all; as many
        blocks as the budget holds, and none is foretold less than one that is not read."""
        tail = (n - self.local) // 16 * 16
        between = [s for s in slots if self.sinks <= s < tail]
        blocks = sorted({s // 16 for s in between})
        whole = [s for b in blocks for s in range(16 * b, 16 * b + 16)]
        assert slots == [*range(self.sinks), *whole, *range(tail, n)]
        assert self.budget - 16 < len(slots) <= self.budget
        first, last = self.sinks // 16, tail // 16
        guess = self.guess(history[:, first:last])
        assert guess.shape == (last - first,)
        mine = [guess[b - first] for b in blocks]
        others = [guess[b - first] for b in range(first, last) if b not in blocks]
        assert others
        assert min(mine, default=np.inf) >= max(others) - 1e-5 * np.abs(guess).max()
