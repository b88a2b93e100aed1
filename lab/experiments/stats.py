"""Intervals for small samples. Everything is seeded: the same numbers give the same intervals."""

from collections.abc import Callable, Sequence

import numpy as np

from ..eval.report import wilson

DRAWS = 4000
Statistic = Callable[[np.ndarray], np.ndarray]


def bootstrap(values: np.ndarray, statistic: Statistic, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval (Efron 1979) of a statistic of the rows of values [n, ...].

    `statistic` maps draws [DRAWS, n, ...] to [DRAWS]. Fewer than two rows: NaN, nothing is known.
    """
    if len(values) < 2:
        return float("nan"), float("nan")
    picks = np.random.default_rng(seed).integers(len(values), size=(DRAWS, len(values)))
    found = statistic(values[picks])
    found = found[~np.isnan(found)]  # draws in which nothing varies have no correlation
    if not len(found):
        return float("nan"), float("nan")
    low, high = np.percentile(found, (2.5, 97.5))
    return float(low), float(high)


def mean(values: Sequence[float] | np.ndarray, seed: int = 0) -> dict[str, float]:
    """Mean with its bootstrap interval over `values`, one a window or question."""
    some = np.asarray(values, dtype=np.float64)
    low, high = bootstrap(some, lambda draws: draws.mean(1), seed)
    return {"value": float(some.mean()), "low": low, "high": high}


def share(hits: Sequence[bool]) -> dict[str, float]:
    """Share of hits with its Wilson interval."""
    low, high = wilson(sum(hits), len(hits))
    return {"value": sum(hits) / max(1, len(hits)), "low": low, "high": high}


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks along the last axis, ties by their mean: [3, 1, 3] -> [1.5, 0, 1.5]."""
    less = (x[..., None, :] < x[..., :, None]).sum(-1)
    equal = (x[..., None, :] == x[..., :, None]).sum(-1)
    return less + (equal - 1) / 2


def pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Correlation along the last axis; NaN where one side is constant."""
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))


def spearman(x: Sequence[float], y: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Rank correlation with its bootstrap interval over pairs (ranked once, then drawn)."""
    pairs = np.stack([ranks(np.asarray(x, float)), ranks(np.asarray(y, float))], 1)  # [n, 2]
    low, high = bootstrap(pairs, lambda d: pearson(d[..., 0], d[..., 1]), seed)
    return {"value": float(pearson(pairs[:, 0], pairs[:, 1])), "low": low, "high": high}
