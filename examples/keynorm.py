"""KeyNorm (arXiv 2406.11430): keys of small norm draw most attention, so those stay in the cache.

The method that docs/add_a_method.md builds, one step a section. Try it:
    python generate.py --method examples/keynorm.py:KeyNorm:ratio=0.5 -p "What happens?"
"""

from dataclasses import dataclass

from zipvl import Plan, Policy, View


@dataclass(repr=False)
class KeyNorm(Policy):
    """Prefill is dense; each key/value head caches the `ratio` of tokens with the smallest keys."""

    ratio: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio is {self.ratio}: give the share to keep, above 0 and up to 1")

    def plan(self, view: View) -> Plan:
        count = max(1, round(self.ratio * view.length))
        norms = view.k.norm(dim=-1)  # [G, T]
        smallest = norms.topk(count, largest=False).indices  # [G, K]
        return Plan(cache=smallest.sort().values)
