"""Two things that the decoder is told apart from answers; nothing of this is in its weights.

  memory   what a middle layer should know at every frame: which thing is in view or came last,
           which one came before it, how many have come; read by linear heads, thrown away
  lookup   where a later layer should look for the next token of an answer: one head at the frames
           that show what was asked for, another at those that come after it

Order and number need the first, all questions about a named thing the second. From answers alone,
a token in a hundred, both are learnt late or not at all.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .sequences import Layer, Scene, Sequences
from .things import KINDS, NAMES
from .world import MOST

BACK = 2  # things that a frame remembers: the latest, and the one before it
HEADS = (0, 2)  # that look frames up by what they show, and by what came before


class Memory(nn.Module):
    """Linear readings of one layer's hidden states, for training only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kind = nn.Linear(width, BACK * len(KINDS))
        self.colour = nn.Linear(width, BACK * len(NAMES))
        self.begun = nn.Linear(width, MOST + 1)

    def forward(self, states: Tensor, batch: Sequences, tokens: int) -> Tensor:
        """Mean loss over the frames of states [B, L, C], read at the last of a frame's `tokens`."""
        frames = batch.rows.shape[1]
        at = states[:, 1 : 1 + tokens * frames].unflatten(1, (frames, tokens))[:, :, -1]
        at = F.rms_norm(at, at.shape[-1:])  # [B, S, C]
        begun = torch.from_numpy(np.stack([scene.begun for scene in batch.scenes]))
        loss = F.cross_entropy(self.begun(at).flatten(0, 1), begun.flatten())
        kinds, colours = (
            torch.from_numpy(np.stack([recent(scene, i) for scene in batch.scenes])) for i in (0, 1)
        )  # int64 [B, S, BACK]
        for head, right in ((self.kind, kinds), (self.colour, colours)):
            said = head(at).unflatten(-1, (BACK, -1))
            for back in range(BACK):
                known = right[..., back] >= 0
                if known.any():
                    loss = loss + F.cross_entropy(said[:, :, back][known], right[..., back][known])
        return loss


def recent(scene: Scene, what: int) -> np.ndarray:
    """Kinds (`what` 0) or colours (1) of the last BACK things at each frame; -1: there was none.

    # int64 [S, BACK]
    """
    names = [(KINDS.index(t.kind), NAMES.index(t.colour))[what] for t in scene.things]
    padded = np.array([-1] * BACK + names)
    return np.stack([padded[scene.begun + BACK - 1 - back] for back in range(BACK)], axis=1)


def lookup(layer: Layer, batch: Sequences, tokens: int) -> Tensor:
    """Mean of -log(share of a head's attention at the right frames), summed over HEADS. # []"""
    begun = torch.from_numpy(np.stack([scene.begun for scene in batch.scenes]))
    latest = begun.repeat_interleave(tokens, 1) - 1  # [B, S tokens]
    group, losses = layer.q.shape[1] // layer.k.shape[1], [torch.zeros(())]
    for by, head in enumerate(HEADS):
        rows, at = (batch.look[:, by] >= 0).nonzero(as_tuple=True)
        if not len(rows):
            continue
        q, k = layer.q[rows, head, at], layer.k[rows, head // group]  # [n, D], [n, L, D]
        logits = torch.einsum("nd,nld->nl", q, k) * q.shape[-1] ** -0.5
        log = (logits + layer.bias[rows, 0, at]).log_softmax(1)[:, 1 : 1 + latest.shape[1]]
        right = latest[rows] == batch.look[rows, by, at][:, None]
        losses.append(-log.masked_fill(~right, -torch.inf).logsumexp(1).mean())
    return torch.stack(losses).sum()
