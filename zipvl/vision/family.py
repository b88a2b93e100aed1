"""A family of models: how pictures and videos become the decoder's tokens.

    cut      pixels to crops of the size that the tower takes       plan, then cut or fit
    count    how many visual tokens they become                     count
    encode   crops to features, features to tokens                  encode = features + join
    place    what stands in the prompt for them, and their angles   place, turn

vision/llava.py has the LLaVAs; each other family is a file of its own (docs/add_a_model.md).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import UsageError
from .video import Clip

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
Placed = list[str | int]  # what stands for a medium: text, and runs of so many visual tokens


@dataclass(frozen=True)
class Geometry:
    """What counting and merging must know of a picture or video: its size in pixels, and how it is
    cut."""

    height: int
    width: int
    rows: int = 0  # of tiles, 0 x 0 if plain
    cols: int = 0
    padded: bool = False  # to a square, and then one crop
    frames: int = 0  # of a video; 0: a picture

    @property
    def crops(self) -> int:
        """The frames of a video; of a picture, the whole and its tiles."""
        return self.frames or 1 + self.rows * self.cols


@dataclass
class Media:
    """One picture or video, cut to crops, not yet encoded."""

    kind: str  # image | video
    crops: Tensor  # uint8 [n, h, w, 3]; none of a long video (engine.inputs.FrameBuffer)
    geometry: Geometry
    tokens: int
    clip: Clip | None = None  # which frames a video gave; its pixels are `crops`
    features: Tensor | None = None  # [tokens, C] once encoded, so that a second question is cheaper
    received: Tensor | None = None  # [tokens, 2] once a method asked (PromptView.received)
    sha256: str = ""  # of its features, where a session's file stands for them and the pixels


class Family(nn.Module, ABC):
    """A tower with all that stands between pixels and the decoder.

    F crops, N patches of a crop, C the decoder's width.
    """

    spellings: ClassVar[list[tuple[str, str]]]  # of its tensors in files (model/weights.py)
    cuts: Any  # equal for two models that cut and count alike
    frames = 32  # of a video, where nobody says how many

    @abstractmethod
    def plan(self, height: int, width: int, alone: bool = True, frames: int = 0) -> Geometry:
        """How a picture of this size is cut, `alone` in its prompt or not, or a video of so many
        frames. Raises MediaError for shapes that the family does not take."""

    @abstractmethod
    def cut(self, image: Image.Image, geometry: Geometry) -> np.ndarray:
        """A picture's crops, uint8 [F, h, w, 3]."""

    @abstractmethod
    def fit(self, frame: np.ndarray, geometry: Geometry) -> np.ndarray:
        """A video's frame, uint8 [H, W, 3] -> [h, w, 3]."""

    @abstractmethod
    def features(self, crops: Tensor, geometry: Geometry) -> Tensor:
        """Some crops of a medium, uint8 [n, h, w, 3] -> what join() takes of them, [n', N', C]."""

    @abstractmethod
    def join(self, features: Tensor, geometry: Geometry) -> Tensor:
        """The features of all its crops -> its tokens [tokens, C]."""

    def place(self, medium: Media) -> Placed:
        """What stands in the prompt where a template puts a medium."""
        return [medium.tokens]

    def turn(self, medium: Media) -> Tensor | None:
        """Rotary ids [3, tokens] of a medium's tokens, from the place of the first one on; None:
        they are its tokens' places, as those of text are."""
        return None

    @abstractmethod
    def grid(self, geometry: Geometry) -> tuple[int, int]:
        """Rows and columns of patches of each crop."""

    @abstractmethod
    def spread(self, x: Tensor, geometry: Geometry, nowhere: Tensor) -> Tensor:
        """Numbers of patches x [F, N, c] as the medium's tokens have them, [tokens, c]: the mean of
        the patches that make one, `nowhere` [c] of vectors that end a row or a frame."""

    def looked(self, crops: Tensor, geometry: Geometry) -> Tensor:
        """Attention that the patches of some crops receive in the tower, [n, N, 2] float32. Raises
        UsageError where a family has none to give."""
        raise UsageError(
            f"the method reads what patches receive in the vision tower, and {type(self).__name__} "
            "has no tower that tells: use a method that chooses in the decoder"
        )

    def unused(self, name: str) -> bool:
        """Whether files may hold this tensor, which the model does without."""
        return False

    # what follows from these

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def patches(self, geometry: Geometry) -> int:
        """N."""
        rows, cols = self.grid(geometry)
        return rows * cols

    def count(self, geometry: Geometry) -> int:
        """Visual tokens of a medium: as many as spread() gives. Of a video it is asked about a few
        frames, for every two more add as many. (On tensors without memory PyTorch would import its
        compiler for this, a second of every start.)"""
        few = min(geometry.frames, 2 - geometry.frames % 2)  # 1 or 2; 0 of a picture
        least, more = (self._tokens(replace(geometry, frames=n)) for n in (few, few and few + 2))
        return least + (geometry.frames - few) // 2 * (more - least)

    def _tokens(self, geometry: Geometry) -> int:
        x = torch.zeros(geometry.crops, self.patches(geometry), 1)
        return len(self.spread(x, geometry, x[0, 0]))

    def encode(self, crops: Tensor, geometry: Geometry, batch: int = 16,
               progress: Callable[[int], object] | None = None) -> Tensor:  # fmt: skip
        """Tokens [tokens, C] of a medium's crops, so many in the tower at a time."""
        parts = []
        for some in crops.split(batch):
            parts.append(self.features(some, geometry))
            if progress:
                progress(len(some))
        return self.join(torch.cat(parts), geometry)

    def received(self, crops: Tensor, geometry: Geometry, batch: int = 4) -> Tensor:
        """What the patches of encode()'s tokens receive in the tower, [tokens, 2] float32; -inf of
        vectors that end a row or a frame."""
        x = torch.cat([self.looked(some, geometry) for some in crops.split(batch)])
        return self.spread(x, geometry, x.new_full((2,), -torch.inf))

    def numbers(self, geometry: Geometry) -> Tensor:
        """Which of the crops encode()'s tokens show, [tokens] int64; -1: newlines.

        Tiles have a row and a column each: where tokens of two are shrunk to one, these mean
        something half-way."""
        cols = geometry.frames or max(1, geometry.cols)
        tile = torch.arange(geometry.crops) - 1  # a whole picture becomes row -1, the last column
        x = torch.stack((tile // cols, tile % cols), -1).float()[:, None]  # [F, 1, 2]
        x = x.expand(-1, self.patches(geometry), 2)
        row, col = self.spread(x, geometry, torch.tensor([-1.0, cols - 2])).round().long().T
        return 1 + row * cols + col


def normalise(crops: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype,
              device: torch.device) -> Tensor:  # fmt: skip
    """uint8 [n, h, w, 3] -> [n, 3, h, w] in `dtype` on `device`; the arithmetic is fp32."""
    of, by = (torch.tensor(x, device=device) for x in (mean, std))
    return ((crops.to(device).float() / 255 - of) / by).permute(0, 3, 1, 2).to(dtype)
