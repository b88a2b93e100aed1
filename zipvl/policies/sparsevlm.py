"""SparseVLM (arXiv 2410.04417): words that look like the picture say, in some layers, what stays.

Raters are words of the question, chosen once by input embeddings: the softmax of visual times text
embeddings over the text, averaged over visual tokens; words above the mean rate. Behind the layers
of `cuts`, those visual tokens go on that get most attention from the raters' rows, a mean over rows
and over the `heads` heads that look most at visual tokens from there. A cut is LAYER:SHARE of the
prompt's visual tokens. Layers count from 0 in a model of `of` layers, and lie in proportion in one
of another depth; of=0: where they are named.

Phase: prefill of the layers behind a cut, and their caches.
What leaves: visual tokens. Text stays.
Source: the authors' repository, as of version 2: nothing is recycled, original positions.
Deviations: version 2 also divides logits by a bias of rotation alone, which is left out; raters are
sought in all text where none is behind the last visual token, and where no word is above the mean
all of them rate.
"""

import re
from dataclasses import dataclass

import torch

from ..policy import Plan, Policy, PromptView, View, check

CUTS = re.compile(r"\d+:\d*\.?\d+(/\d+:\d*\.?\d+)*")


@dataclass(repr=False)
class SparseVLM(Policy):
    """300, 200 and 110 of 576 after layers 2, 6 and 15 of 32: the setting called 192 tokens."""

    cuts: str = "2:0.5208/6:0.3472/15:0.191"
    heads: int = 14
    of: int = 32

    def __post_init__(self) -> None:
        right = isinstance(self.cuts, str) and CUTS.fullmatch(self.cuts)
        check(bool(right), f"cuts is {self.cuts!r}: write LAYER:SHARE/LAYER:SHARE, as 2:0.5/6:0.3")
        layers, shares = zip(*self.pairs(), strict=True)
        falls = list(layers) == sorted(layers) and list(shares) == sorted(shares)[::-1]
        check(falls and shares[0] <= 1, f"cuts is {self.cuts!r}: give later layers less, from 1 on")
        check(self.heads >= 1, f"heads is {self.heads}: give 1 or more")
        check(self.of >= 0, f"of is {self.of}: give the layers of a model, or 0")

    def pairs(self) -> list[tuple[int, float]]:
        """Layers and the shares that go on behind them."""
        pairs = (cut.split(":") for cut in self.cuts.split("/"))
        return [(int(layer), float(share)) for layer, share in pairs]

    def start(self, prompt: PromptView) -> Plan:
        visual, raters = (some.nonzero()[:, 0] for some in (prompt.is_visual, ~prompt.is_visual))
        if len(visual) and len(raters):
            behind, x = raters[raters > visual[-1]], prompt.x.float()
            text = behind if len(behind) else raters
            rating = (x[visual] @ x[text].T).softmax(-1).mean(0)
            best = text[rating > rating.mean()]
            raters = best if len(best) else text
        prompt.notes["visual"], prompt.notes["raters"] = len(visual), raters.int()
        return Plan()

    def plan(self, view: View) -> Plan:
        depth, raters = view.num_layers, view.notes["raters"]
        cuts = {n * depth // (self.of or depth): share for n, share in self.pairs()}
        if view.layer not in cuts or not view.notes["visual"] or not len(raters):
            return Plan()
        mass = view.mass(torch.searchsorted(view.positions, raters))  # all text is still here
        looks = (mass * view.is_visual).sum(1)  # [H]
        score = mass[looks.topk(min(self.heads, len(mass))).indices].mean(0)
        count = round(cuts[view.layer] * view.notes["visual"])
        best = score.masked_fill(~view.is_visual, -torch.inf).topk(count).indices
        kept = (~view.is_visual).index_fill(0, best, True)
        kept[-1:] = True  # makes the first answer token, were it visual
        return Plan(stream=kept)
