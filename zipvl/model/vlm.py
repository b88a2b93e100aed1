"""The vision-language model: tower, projector and decoder, and how pictures become its tokens."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..linear import Linear
from ..vision.encoder import VisionTower, projector
from ..vision.image import Geometry, normalise
from ..vision.merge import merge_image, merge_video, pool_frames
from .decoder import Decoder


class VLM(nn.Module):
    """LLaVA-1.5, NeXT, NeXT-Video, OneVision or LongVA; parameter names as in model/weights.py."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        text, vision = config.text, config.vision
        width = vision.hidden_size * len(vision.take)
        self.vision = VisionTower(vision)
        self.projector = projector(config.projector, width, text.hidden_size, config.projector_bias)
        self.image_newline = nn.Parameter(torch.zeros(text.hidden_size)) if config.newline else None
        self.text = Decoder(text)
        self.lm_head = Linear(text.hidden_size, text.vocab_size, bias=False)
        if text.tied:
            self.lm_head.weight = self.text.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    def features(self, crops: Tensor, pool: bool) -> Tensor:
        """Projected features [n, N, C] of uint8 crops [n, S, S, 3]; `pool` them as video frames."""
        media, grid = self.config.media, self.config.vision.grid
        x = self.vision(normalise(crops, media, self.dtype, self.device))  # [n, N, C_v]
        if pool and media.pool_first:
            return self.projector(pool_frames(x, media, grid))
        x = self.projector(x)
        return pool_frames(x, media, grid) if pool else x

    def encode(self, crops: Tensor, geometry: Geometry | None, batch: int = 16,
               progress: Callable[[int], object] | None = None) -> Tensor:  # fmt: skip
        """Tokens [tokens, C] of one picture (with its geometry) or one video (None).

        Crops [n, S, S, 3] uint8 go through the tower `batch` at a time; of a video only the pooled
        features stay.
        """
        parts = []
        for some in crops.split(batch):
            parts.append(self.features(some, pool=geometry is None))
            if progress:
                progress(len(some))
        return self.merge(torch.cat(parts), geometry, self.image_newline)

    def merge(self, x: Tensor, geometry: Geometry | None, newline: Tensor | None) -> Tensor:
        """Tokens [tokens, C] of a picture's features x [n, N, C], or of a video's pooled ones."""
        media = self.config.media
        if geometry is None:
            return merge_video(x, media, newline)
        return merge_image(x, geometry, media, self.config.vision.grid, newline)

    def received(self, crops: Tensor, geometry: Geometry | None, batch: int = 4) -> Tensor:
        """What the patches of encode()'s tokens receive in the tower, [tokens, 2] float32, pooled
        and merged as their features are; -inf of newlines."""
        media, device = self.config.media, self.device
        pixels = (normalise(some, media, self.dtype, device) for some in crops.split(batch))
        x = torch.cat([self.vision.received(some) for some in pixels])  # [n, N, 2]
        return self.spread(x, geometry, x.new_full((2,), -torch.inf))

    def numbers(self, count: int, geometry: Geometry | None) -> Tensor:
        """Which of so many crops or frames encode()'s tokens show, [tokens] int64; -1: newlines.

        Tiles have a row and a column each: where tokens of two are shrunk to one, these mean
        something half-way."""
        cols = count if geometry is None else max(1, geometry.cols)
        tile = torch.arange(count) - 1  # the whole picture becomes row -1, the last column
        x = torch.stack((tile // cols, tile % cols), -1).float()[:, None]  # [n, 1, 2]
        x = x.expand(-1, self.config.vision.tokens, 2)
        row, col = self.spread(x, geometry, torch.tensor([-1.0, cols - 2])).round().long().T
        return 1 + row * cols + col

    def spread(self, x: Tensor, geometry: Geometry | None, newline: Tensor) -> Tensor:
        """Numbers of patches x [n, N, c] as encode()'s tokens have them, [tokens, c]."""
        if geometry is None:
            x = pool_frames(x, self.config.media, self.config.vision.grid)
        return self.merge(x, geometry, newline)

    def embed(self, input_ids: Tensor, is_visual: Tensor, features: list[Tensor]) -> Tensor:
        """Embeddings [T, C]: text from the table, visual tokens from `features`, in order."""
        x = torch.empty(
            len(input_ids), self.config.text.hidden_size, dtype=self.dtype, device=self.device
        )
        x[~is_visual] = self.text.embed_tokens(input_ids[~is_visual])
        if features:
            x[is_visual] = torch.cat(features).to(x.dtype)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [..., V]."""
        return self.lm_head(hidden).float()
