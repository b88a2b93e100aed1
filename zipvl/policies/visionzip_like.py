"""visionzip_like, after VisionZip (arXiv 2412.04467): heavy tokens, and a few for all the others.

In each crop or frame the `dominant` tokens enter that received most attention in the last block of
the vision tower used. Of the others, `contextual` ones at an even stride enter as well, and each of
the rest joins the one of them that it resembles most: what enters is the mean of all that joined.

Phase: before layer 0, so prefill and the caches of all layers.
What leaves: visual tokens, and all vectors that end a row. Text stays.
Source: the authors' repository, for LLaVA-1.5.
Deviations, and so the name: tokens are alike by the cosine of their projected features and are
merged behind the projector, where the authors compare the tower's keys and merge before it; a plain
mean, where their code adds the mean of the others to the chosen one; the class token itself, one of
their dominant ones, does not enter; a tower without one votes with all its patches; original
positions (`renumber` counts those that enter, as the authors do).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..policy import Plan, Policy, PromptView, check


@dataclass(repr=False)
class VisionZipLike(Policy):
    """54 and 10 tokens of each crop, the smallest of the authors' settings."""

    dominant: int = 54
    contextual: int = 10
    renumber: bool = False

    def __post_init__(self) -> None:
        check(self.dominant >= 0, f"dominant is {self.dominant}: give 0 or more")
        check(self.contextual >= 0, f"contextual is {self.contextual}: give 0 or more")
        check(self.dominant + self.contextual >= 1, "dominant and contextual are 0: keep a token")

    def start(self, prompt: PromptView) -> Plan:
        received, x = prompt.notes.origin.received[:, 1], prompt.x.clone()
        kept = ~prompt.is_visual
        kept[-1:] = True  # makes the first answer token, were it visual
        for tokens in (crop for crops in prompt.crops() for crop in crops):
            order = tokens[received[tokens].argsort(descending=True)]
            best, rest = order[: self.dominant], order[self.dominant :].sort().values
            stride = max(1, len(rest) // max(1, self.contextual))
            chosen = torch.arange(0, len(rest), stride, device=x.device)[: self.contextual]
            if len(chosen):
                x[rest[chosen]] = gathered(x[rest], chosen)
            kept.index_fill_(0, torch.cat((best, rest[chosen])), True)
        return Plan(stream=kept, x=x, renumber=self.renumber)


def gathered(x: Tensor, chosen: Tensor) -> Tensor:
    """[c, C]: for each of the `chosen` rows of x [n, C] the mean of those that resemble it most."""
    unit = F.normalize(x.float(), dim=-1)
    alike = unit @ unit[chosen].T  # [n, c]
    alike[chosen] = 2 * torch.eye(len(chosen), device=x.device)  # itself, were two the same
    number = torch.arange(len(chosen), device=x.device)
    joins = (alike.argmax(1, keepdim=True) == number).float()  # [n, c]
    return ((joins.T @ x.float()) / joins.sum(0)[:, None]).to(x.dtype)
