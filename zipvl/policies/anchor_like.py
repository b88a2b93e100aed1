"""anchor_like, after AnchorCoder (arXiv 2411.06680): a line is read through the token that ends it.

AnchorCoder is trained to gather each line of code in one anchor token. Here a line is a row of a
picture or a frame, where vectors end them, else a crop or a frame; its anchor is its last token. A
visual token attends to its own line and to the anchors before it; text attends to anchors.
Phase: prefill, as a mask (no faster), and the cache. What leaves: visual tokens but the anchors.
Source: the paper's account of token-wise anchors; it reports no model that sees.
Deviations, and so the name: nothing is trained, so nothing taught the anchors to gather a line;
every text token is an anchor; no layer reads another layer's anchors.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ..policy import Plan, Policy, View


@dataclass(repr=False)
class AnchorLike(Policy):
    """No options: the model's own rows and frames are the lines."""

    def plan(self, view: View) -> Plan:
        origin, places = view.notes.origin, view.positions.long()
        medium, crop = origin.medium[places], origin.crop[places]
        other = (medium.diff() != 0) | ((crop.diff() != 0) & (crop[1:] >= 0))  # what comes next
        anchor = ~view.is_visual | (crop < 0) | F.pad(other, (0, 1), value=True)  # [T]
        line = anchor.long().cumsum(0) - anchor.long()  # of each token, as many as ended before it

        def mask(rows: Tensor) -> Tensor:
            return anchor | (line[rows, None] == line)

        return Plan(mask=mask, cache=anchor)
