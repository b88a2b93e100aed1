"""A packed batch: sequences one after the other, without padding, and what each row is."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config import TextConfig
from ..engine.cache_quant import Scratch
from .kernels import Spans
from .rope import rope_table


@dataclass(frozen=True)
class Pack:
    """What goes with the hidden states of a packed batch through the layers."""

    spans: Spans
    positions: Tensor  # [sum T] place of each token in its own prompt
    is_visual: Tensor  # [sum T] bool
    cos: Tensor  # [sum T, 1, D/2]
    sin: Tensor
    state: list[dict]  # a policy's own notes, one dict a sequence
    scratch: Scratch  # shared by the caches of all layers
    chunk: int | None = None  # rows at a time where temporaries would grow with T; None: all

    @classmethod
    def build(cls, lengths: list[int], positions: Tensor, is_visual: Tensor, config: TextConfig,
              dtype: torch.dtype) -> "Pack":  # fmt: skip
        cos, sin = rope_table(positions, config, dtype)
        state: list[dict] = [{} for _ in lengths]
        return cls(
            Spans(lengths, positions.device), positions, is_visual, cos, sin, state, Scratch()
        )

    def take(self, rows: Tensor, lengths: list[int]) -> "Pack":
        """The pack of `rows` [sum K''] only; positions stay the original ones."""
        return replace(
            self, spans=Spans(lengths, rows.device), positions=self.positions[rows],
            is_visual=self.is_visual[rows], cos=self.cos[rows], sin=self.sin[rows],
        )  # fmt: skip
