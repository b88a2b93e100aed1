"""Step 2 of the attention layer: how much attention tokens receive from a few probe rows."""

import math

import torch
from torch import Tensor

SCORE_BYTES = 64 << 20  # one block of probe rows x heads x tokens in float32


def probe_mass(q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
    """Eq. 5 on probe rows: attention that each token receives from them, [H, T] float32.

    q [P, H, D] are the queries at `rows` [P]; k [T, G, D]. Exact causal softmax of float32 logits,
    one key/value head and as many rows at a time as fit SCORE_BYTES: O(P T) work, never [T, T].
    """
    P, H, D = q.shape
    T, G = k.shape[:2]
    index = torch.arange(T, device=q.device)
    mass = torch.zeros(G, H // G, T, dtype=torch.float32, device=q.device)
    blocks = torch.arange(P, device=q.device).split(max(1, SCORE_BYTES // (4 * H // G * T)))
    for g in range(G):
        columns = k[:, g].float().T / math.sqrt(D)  # [D, T]
        for block in blocks:
            queries = q[block].unflatten(1, (G, -1))[:, g].transpose(0, 1).float()  # [H/G, b, D]
            scores = (queries.flatten(0, 1) @ columns).unflatten(0, (-1, len(block)))
            future = index > rows[block, None]  # [b, T]
            mass[g] += scores.masked_fill_(future, -math.inf).softmax(dim=-1).sum(1)
    return mass.flatten(0, 1)


def count_seen(rows: Tensor, length: int) -> Tensor:
    """[T]: how many of the sorted probe `rows` see each token, the nnz of Eq. 7 on probe rows."""
    index = torch.arange(length, device=rows.device)
    return len(rows) - torch.searchsorted(rows, index)
