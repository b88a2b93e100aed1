"""Step 2 of the attention layer: how much attention tokens receive from a few probe rows."""

import math

import torch
from torch import Tensor

SCORE_BYTES = 64 << 20  # one block of probe rows x heads x tokens in float32


def probe_mass(q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
    """Eq. 5 on probe rows: attention that each token receives from them, [H, T] float32.

    q [P, H, D] are the queries at `rows` [P]; k [T, G, D]. Exact causal softmax in float32, as many
    rows at a time as fit SCORE_BYTES: O(P T) work, never a [T, T] tensor.
    """
    P, H, D = q.shape
    T, G = k.shape[:2]
    index = torch.arange(T, device=q.device)
    columns = k.permute(1, 2, 0)  # [G, D, T]
    mass = torch.zeros(H, T, dtype=torch.float32, device=q.device)
    for block in torch.arange(P, device=q.device).split(max(1, SCORE_BYTES // (4 * H * T))):
        scores = q[block].transpose(0, 1).reshape(G, -1, D) @ columns  # [G, H/G * b, T]
        scores = scores.float().unflatten(1, (H // G, len(block))) / math.sqrt(D)  # [G, H/G, b, T]
        future = index > rows[block, None]  # [b, T]
        probs = scores.masked_fill_(future, -math.inf).softmax(dim=-1)
        mass += probs.sum(2).flatten(0, 1)
    return mass


def count_seen(rows: Tensor, length: int) -> Tensor:
    """[T]: how many of the sorted probe `rows` see each token, the nnz of Eq. 7 on probe rows."""
    index = torch.arange(length, device=rows.device)
    return len(rows) - torch.searchsorted(rows, index)
