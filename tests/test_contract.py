"""What check_policy says of plans whose parts are more than indices: masks, merges, room, leave."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from zipvl.policy import Plan, Policy, StepView, View
from zipvl.testing import check_policy


class Plans(Policy):
    """Answers what a function of the view says."""

    def __init__(self, plan: Callable[[View], dict[str, Any]]):
        self.answer = plan

    def plan(self, view: View) -> Plan:
        return Plan(**self.answer(view))


class LeavesAll(Policy):
    def step(self, view: StepView) -> Plan:
        return Plan(leave=torch.arange(view.length))


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def last(v: View, into: torch.Tensor, weight: torch.Tensor | None = None) -> dict[str, Any]:
    weight = torch.ones(v.length) if weight is None else weight
    return {"cache": v.every[-1:], "merge": (into, weight)}


FAULTS = [
    (lambda v: {"mask": ones(v.length, v.length)}, "mask is no function"),
    (lambda v: {"mask": lambda rows: ones(v.length, v.length)}, r"mask of 12 rows is .*\[23, 23\]"),
    (lambda v: {"mask": lambda rows: torch.ones(len(rows), v.length)}, "is torch.float32"),
    (lambda v: {"mask": lambda rows: ones(3, len(rows), v.length)}, r"give bool \[12, 23\], "),
    (lambda v: {"mask": lambda rows: rows[:, None] > v.every}, "hides a row from itself"),
    (lambda v: {"mask": lambda rows: rows[:, None] - v.every <= len(rows)}, "other things"),
    (lambda v: last(v, v.every.clone()), "not in plan.cache"),
    (lambda v: last(v, v.every * 0 - 2), "not in plan.cache"),
    (lambda v: last(v, v.every[1:]), r"`into` is \[22\]: give \[23\] or"),
    (lambda v: last(v, v.every.float()), "`into` is torch.float32"),
    (lambda v: last(v, v.every * 0 - 1, torch.ones(3, v.length)), r"`weight` is \[3, 23\]"),
    (lambda v: {"room": 1}, "layer 0 has no place for new token 2: let one `leave`"),
]


@pytest.mark.parametrize(("plan", "said"), FAULTS)
def test_a_fault_is_a_sentence(plan: Callable[[View], dict[str, Any]], said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        check_policy(lambda: Plans(plan))


def test_a_step_leaves_something() -> None:
    with pytest.raises(AssertionError, match=r"layer 0: step\(\) lets all 24 slots leave"):
        check_policy(LeavesAll)


@pytest.mark.parametrize(
    "plan",
    [
        lambda v: {"mask": lambda rows: ones(len(rows), v.length)},
        lambda v: {"mask": lambda rows: ones(len(v.q), len(rows), v.length)},
        lambda v: last(v, v.every * 0 - 1),
        lambda v: last(v, (v.every * 0 + v.length - 1).expand(len(v.k), -1)),
    ],
)
def test_what_is_right_passes(plan: Callable[[View], dict[str, Any]]) -> None:
    check_policy(lambda: Plans(plan))
