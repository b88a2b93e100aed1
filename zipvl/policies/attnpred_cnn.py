"""AttentionPredictor (arXiv 2502.04077): the same with its network, trained on one's own rows.

Phase: decoding, fetch; all but what foretells the next row is as in attnpred.py.
What leaves: nothing, the cache stays whole and reads shrink.
Source: the authors' code: one small network for all layers and heads, two convolutions of 3 x 3
over rows and blocks (1 to 16 to 32 channels), the mean over the rows, a convolution of 1 x 1.
Deviations: those of attnpred.py; the weights are a reimplementation's, from `python -m
lab.attnpred`, as the authors' are of two other models; no output where fewer than 3 blocks compete
is replaced by ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..model.batch import sent
from ..policy import Notes, check
from .attnpred import AttnPredLast

SHAPES = {
    "conv1.weight": (16, 1, 3, 3), "conv1.bias": (16,),
    "conv2.weight": (32, 16, 3, 3), "conv2.bias": (32,),
    "conv3.weight": (1, 32, 1), "conv3.bias": (1,),
}  # fmt: skip
Weights = Mapping[str, Tensor]


@dataclass(repr=False)
class AttnPredReimpl(AttnPredLast):
    """A step reads 1024 slots, chosen by a network of 4,833 parameters that is in a file."""

    ema: float = field(default=1.0, init=False, repr=False)
    weights: str = ""  # a safetensors file

    def __post_init__(self) -> None:
        super().__post_init__()
        self.network = load(self.weights)

    def foretell(self, history: Tensor, notes: Notes) -> Tensor:
        if "network" not in notes:  # on this device, once a sequence
            notes["network"] = {k: sent(w, history.device) for k, w in self.network.items()}
        return predict(notes["network"], history)


def predict(w: Weights, history: Tensor) -> Tensor:
    """The row [n, blocks] that follows each history [n, rows, blocks]."""
    x = F.conv2d(history[:, None], w["conv1.weight"], w["conv1.bias"], padding=1).relu()
    x = F.conv2d(x, w["conv2.weight"], w["conv2.bias"], padding=1).relu().mean(2)
    return F.conv1d(x, w["conv3.weight"], w["conv3.bias"])[:, 0]  # of [n, 32, blocks]


def load(path: str) -> Weights:
    """The network of a file. Raises ValueError."""
    check(path != "", "weights is missing: train them, `python -m lab.attnpred`, and name the file")
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as e:
        raise ValueError(f"weights is {path!r}, which cannot be read ({e}): name a file") from None
    right = {name: tuple(t.shape) for name, t in found.items()} == SHAPES
    check(right, f"weights is {path!r}: it holds other tensors than lab.attnpred writes")
    check(all(bool(t.isfinite().all()) for t in found.values()), f"weights is {path!r}: not finite")
    return {name: t.float() for name, t in found.items()}
