"""How near the scores of a few probe rows come to those of all rows; both probe experiments use it.

The model runs dense, so that every choice is judged on the same hidden states.
"""

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from zipvl.policies.zipvl import ZipVL, covering
from zipvl.policy import Plan, Policy, View, ask

from . import draw, stats
from .runner import Job, Record

CHOICES = ((64, 64), (64, 0), (0, 64), (128, 0), (0, 128), (32, 32), (16, 16))
BLOCK = 8 << 20  # attention probabilities at a time
MEASURES = ("recall", "covered", "error", "kept")
SHOWN = {  # choices against length, and how the figure calls them
    "64 recent + 64 random": "64 recent + 64 random (paper)",
    "0 recent + 128 random": "128 random",
    "128 recent": "128 recent",
    "sqrt(T)": "half recent, half random, as many as 4 sqrt(T)",
}


def all_rows(view: View) -> Tensor:
    """Mass [T] float32 that tokens receive from every row, mean over heads; never [T, T]."""
    (H, T, D), G = view.q.shape, len(view.k)
    q, k = view.q.float() / math.sqrt(D), view.k.float().mT.contiguous()  # [H, T, D], [G, D, T]
    mass = torch.zeros(T, device=q.device)
    for rows in torch.arange(T, device=q.device).split(max(1, BLOCK // (H * T))):
        start, stop = int(rows[0]), int(rows[-1]) + 1
        block = q[:, start:stop].unflatten(0, (G, -1)).flatten(1, 2)  # [G, H/G rows, D]
        scores = (block @ k[:, :, :stop]).view(H, len(rows), stop)
        scores[:, :, start:].masked_fill_(rows > rows[:, None], -math.inf)
        mass[:stop] += scores.softmax(-1).sum((0, 1)) / H
    return mass


def chosen(view: View, whole: Tensor, method: ZipVL) -> tuple[Tensor, int]:
    """The tokens [p] `method` picks by its probe rows, and its p; `whole` [T] is all_rows()."""
    rows = method.probe(view)
    mass = whole if len(rows) == view.length else view.mass(rows).mean(0)
    kept = ask(method.plan, replace(view, score=lambda rows: mass[None])).attend
    assert kept is not None
    return kept, int(covering(mass, method.tau))


class Study(Policy):
    """Dense; notes for every choice of probes how its set compares with that of all rows.

    recall   share of the all-rows set that is found    covered  all-rows mass of the set found
    error    relative error of p                        kept     p as a share of the tokens
    """

    def __init__(self, tau: float, methods: dict[str, ZipVL]):
        self.methods, self.tau = methods, tau
        self.found: dict[str, list[list[float]]] = {name: [] for name in methods}

    def plan(self, view: View) -> Plan:
        whole = all_rows(view)
        true, p = chosen(view, whole, ZipVL(self.tau, recent=view.length, random=0, always="none"))
        share = whole / whole.sum()
        for name, method in self.methods.items():
            kept, n = chosen(view, whole, method)
            recall = float(torch.isin(true, kept).float().mean())
            covered = float(share[kept].sum())
            self.found[name].append([recall, covered, n / p - 1, n / view.length])
        return Plan()

    def record(self) -> Record:
        """Means over layers, by choice and measure."""
        return {name: dict(zip(MEASURES, np.mean(of, axis=0).tolist(), strict=True))
                for name, of in self.found.items()}  # fmt: skip


def methods(tau: float, length: int, seed: int) -> dict[str, ZipVL]:
    """All choices of probes, and the divisors for the paper's 64 + 64, by name."""
    root = max(2, round(128 * math.sqrt(length / 1024)))  # as many as 128 at 1,024 tokens
    choices = {f"{r} recent + {n} random": (r, n) for r, n in CHOICES}
    choices |= {f"sqrt(T): {root // 2} + {root // 2}": (root // 2, root // 2)}
    made = {
        name: ZipVL(tau, recent=r, random=n, always="none", seed=seed)
        for name, (r, n) in choices.items()
    }
    for d in ("all", "none"):
        made[f"64 + 64, divisor {d}"] = ZipVL(tau, always="none", divisor=d, seed=seed)
    whole = ZipVL(tau, recent=length, random=0, always="none", divisor="none")
    return made | {"all rows, divisor none": whole}


def rows(found: list[Record], key: str) -> list[Record]:
    """A row for each length (under `key`) and choice, with intervals over windows or questions."""
    out = []
    for value in dict.fromkeys(r[key] for r in found):
        mine = [r["choices"] for r in found if r[key] == value]
        for name in mine[0]:
            measures = {m: stats.mean([r[name][m] for r in mine]) for m in MEASURES}
            out.append({key: value, "choice": name, "samples": len(mine)} | measures)
    return out


def columns(key: str) -> dict[str, str]:
    return {
        key: key, "choice": "probes", "samples": "samples",
        "recall": "recall of the all-rows set (95 %)", "covered": "all-rows mass covered (95 %)",
        "error": "relative error of p (95 %)", "kept": "p / T (95 %)",
    }  # fmt: skip


def figure(job: Job, table: list[Record], key: str, title: str) -> None:
    """Recall and error of p at one length; with several, recall and error against length."""
    lengths = list(dict.fromkeys(r[key] for r in table))
    with draw.panels(1, 2, 5.4, 4) as (fig, (left, right)):
        if len(lengths) == 1:
            draw.bars(left, table, "recall", "recall of the all-rows set, % (95 %)")
            draw.bars(right, table, "error", "error of p, % of the all-rows p (95 %)")
            left.set_xlim(min(100 * r["recall"]["low"] for r in table) // 10 * 10, 100)
            right.set_yticklabels([])
        else:
            for name, what in SHOWN.items():
                some = [r for r in table if r["choice"].startswith(name)]
                draw.curve(left, lengths, [r["recall"] for r in some], what, 100)
                draw.curve(right, lengths, [r["error"] for r in some], what, 100)
            for axes, label in ((left, "recall of the all-rows set, % (95 %)"),
                                (right, "error of p, % (95 %)")):  # fmt: skip
                axes.set(xlabel="prompt tokens", ylabel=label, xscale="log")
                axes.set_xticks(lengths, [f"{n:,}" for n in lengths], minor=False)
                axes.minorticks_off()
                axes.legend()
        fig.suptitle(title)
        fig.savefig(job.out / "figure.png")
