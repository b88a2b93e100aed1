"""What the tests of single methods share: the whole attention of every layer, plainly, and in float64."""

import numpy as np

from zipvl.policy import Plan, Policy, StepView, View


def attention(view: View) -> np.ndarray:
    """[H, T, T]: one row a query, none of it in the future."""
    q, k = view.q.double().numpy(), view.k.double().numpy()
    H, T, D = q.shape
    out = np.zeros((H, T, T))
    for h in range(H):
        for i in range(T):
            row = k[h * len(k) // H, : i + 1] @ q[h, i] / np.sqrt(D)
            row = np.exp(row - row.max())
            out[h, i, : i + 1] = row / row.sum()
    return out


def step_row(view: StepView) -> np.ndarray:
    """[H, n]: the newest token's attention to all slots."""
    q, k = view.q.double().numpy(), view.k.double().numpy()
    H, D = q.shape
    rows = [k[h * len(k) // H] @ q[h] / np.sqrt(D) for h in range(H)]
    return np.stack([np.exp(r - r.max()) / np.exp(r - r.max()).sum() for r in rows])


def watched(policy: Policy) -> tuple[Policy, list[np.ndarray]]:
    """`policy`, and the attention of each layer (of each sequence) that it will have planned."""
    found: list[np.ndarray] = []
    plan = policy.plan

    def look(view: View) -> Plan:
        found.append(attention(view))
        return plan(view)

    policy.plan = look
    return policy, found
