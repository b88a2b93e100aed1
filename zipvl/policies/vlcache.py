"""VL-Cache (arXiv 2410.23317): what a layer caches follows from how sparse the question's
attention is in it. A reimplementation, as no code is published.

Rows behind the last visual token score: column sums, mean over heads. A layer's density is the
share of what these rows can see that receives 1 % or more of its row's largest, mean over heads;
the budget, `ratio` of the prompt in the mean over layers, is divided in proportion, each layer
between 1 % and all of the prompt. What is cut off there goes to nobody, so that sparse layers give
tokens away even at ratio 1.
Phase: the cache, once behind a dense prefill: shares are known behind the last layer only, until
then memory holds all of the prompt. Nothing leaves while decoding.
What leaves: keys and values, the same tokens for all heads; the newest never, a tenth of the
budget, as many in each layer.
Source: the paper; there is no official code, the steps were held against EffiVLM-Bench's.
Deviations: the newest tokens are part of a layer's share (that code gives them a tenth of each
share beforehand); without text behind the media the last 32 rows score; `text` keeps all text,
which the letter lets leave.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..policy import Notes, Plan, Policy, View, check

LARGE, LEAST, NEWEST, FEW = 0.01, 0.01, 0.1, 32


@dataclass(repr=False)
class VLCache(Policy):
    """A tenth of the cache stays in the mean over layers, the paper's headline."""

    ratio: float = 0.1
    text: bool = False

    def __post_init__(self) -> None:
        check(0 < self.ratio <= 1, f"ratio is {self.ratio}: give the share to keep, up to 1")

    def plan(self, view: View) -> Plan:
        rows, T = behind(view, FEW), view.length
        score = view.k.new_zeros(T, dtype=torch.float32)
        large = torch.zeros((), dtype=torch.int64, device=score.device)
        for _, _, logits in view.logits(rows):  # [h, b, T]
            least = logits.amax(-1, keepdim=True) + math.log(LARGE)
            large += (logits >= least).sum()
            score += logits.softmax(-1).sum((0, 1))
        newest = view.every >= T - max(1, round(NEWEST * self.ratio * T))
        always = newest | (~view.is_visual & self.text)
        view.notes[view.layer] = score.masked_fill(always, torch.inf), large, always.sum()
        view.notes["layers"] = view.num_layers
        return Plan()

    def trim(self, layer: int, notes: Notes) -> dict[int, Tensor] | None:
        L, n = notes["layers"], notes.prompt
        if layer + 1 < L:
            return None
        numbers = torch.stack([torch.stack(notes[i][1:]) for i in range(L)]).tolist()
        total, slots = sum(large for large, _ in numbers), {}
        for i, (large, always) in enumerate(numbers):
            share = min(1.0, max(LEAST, large / total * self.ratio * L))
            count = max(always, round(share * n))
            slots[i] = notes[i][0].topk(count).indices.sort().values
        return slots


def behind(view: View, few: int) -> Tensor:
    """[P] the rows behind the last visual token; where there are none, the last `few`."""
    if "behind" not in view.notes:  # one wait a prompt
        first = int(torch.where(view.is_visual, view.every + 1, 0).max())
        view.notes["behind"] = view.every[first if 0 < first < view.length else -few :]
    return view.notes["behind"]
