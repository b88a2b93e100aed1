"""vidcom2_like, after VidCom2 (arXiv 2505.14454): frames that are unlike the video keep more.

Of the projected features, the half of the channels that varies least counts, scaled to length 1. A
token is like a centre by the sum of five Gaussians of its distance to it, of variances 2^-3 to 2^1.
A frame whose tokens are less like the video's centre than those of others gets a larger share than
`ratio`; in a frame those tokens stay that are least like the centres of the video and the frame.

Phase: before layer 0, so prefill and the caches of all layers. No pixels, no attention.
What leaves: visual tokens; vectors that end a row or a frame stay, and so does text.
Source: the authors' repository and vLLM's version of it, which trues the sum of the shares up to
`ratio` of the video by the same likeness, as is done here.
Deviations, and so the name: original positions, where the authors count what enters; a picture's
crops, where it has several, are treated as frames.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..policy import Plan, Policy, PromptView, check

VARIANCES = [2.0**n for n in range(-3, 2)]


@dataclass(repr=False)
class VidCom2Like(Policy):
    """A quarter of a video's tokens, the authors' main setting."""

    ratio: float = 0.25
    temperature: float = 0.01  # of the softmax over frames: small numbers favour the oddest alone

    def __post_init__(self) -> None:
        check(0 < self.ratio <= 1, f"ratio is {self.ratio}: give the share to keep, up to 1")
        check(self.temperature > 0, f"temperature is {self.temperature}: give a number above 0")

    def start(self, prompt: PromptView) -> Plan:
        kept = ~prompt.is_visual | (prompt.notes.origin.crop < 0)
        for frames in prompt.crops():
            tokens = torch.cat(frames)
            kept[tokens] = self.choose(prompt.x[tokens].float(), [len(f) for f in frames if len(f)])
        kept[-1:] = True  # makes the first answer token, were it visual
        return Plan(stream=kept)

    def choose(self, x: Tensor, sizes: list[int]) -> Tensor:
        """Mask [n] of those tokens x [n, C] of frames of such `sizes` that stay."""
        steady = x.var(0, unbiased=False).topk(max(1, x.shape[1] // 2), largest=False).indices
        x = F.normalize(x[:, steady], dim=-1)
        video = alike(x, x.mean(0))  # [n]
        odd = -video - torch.cat([alike(part, part.mean(0)) for part in x.split(sizes)])
        share = torch.stack([-part.mean() for part in video.split(sizes)]) / self.temperature
        share = share.softmax(0)  # [frames]
        share = (self.ratio * (1 + share - share.mean())).clamp(max=1)
        counts = (share * torch.tensor(sizes, device=x.device)).round().clamp(min=1).int().tolist()
        kept = torch.zeros_like(odd, dtype=torch.bool)
        for part, mine, count in zip(odd.split(sizes), kept.split(sizes), counts, strict=True):
            mine.index_fill_(0, part.topk(count).indices, True)
        more = max(len(sizes), int(self.ratio * len(x))) - sum(counts)
        come = odd.masked_fill(kept, -torch.inf).topk(max(0, more)).indices
        gone = (-odd).masked_fill(~kept, -torch.inf).topk(max(0, -more)).indices
        return kept.index_fill(0, come, True).index_fill(0, gone, False)


def alike(x: Tensor, centre: Tensor) -> Tensor:
    """[n] likeness of x [n, C] to centre [C]."""
    distance = (x - centre).square().sum(-1)
    return torch.stack([(-distance / (2 * v)).exp() for v in VARIANCES]).sum(0)
