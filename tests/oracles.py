"""What each tiny checkpoint must compute: pixels, ids, features, logits and greedy tokens.

`HFOracle` asks transformers' own class and Pillow processors. `OriginalOracle` wires transformers'
towers and decoders together as the original repositories do, with a short independent restatement of
their image packing. Both take the rendered prompt (after any template): each `<image>` or `<video>`
in it stands for the next picture or the video.
"""

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from tiny import CLIP_PIXELS, SIGLIP_PIXELS
from tiny_original import Parts
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaOnevisionImageProcessorPil,
    SiglipImageProcessorPil,
)

Pictures = Sequence[Image.Image]
Frames = np.ndarray | None  # uint8 [F, H, W, 3]
MARK = re.compile("(<image>|<video>)")


def one(raw: transformers.BatchFeature) -> Tensor:
    """The crops of one picture [n, 3, S, S]."""
    pixels = raw["pixel_values"]
    return pixels.flatten(0, -4) if pixels.ndim > 4 else pixels


class Oracle(ABC):
    """The answers of one checkpoint, in float32 on the CPU."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._last: tuple[list[object], list[Tensor]] = ([], [])  # media and features of one call

    @abstractmethod
    def pixels(self, images: Pictures) -> list[Tensor]:
        """Crops of each picture, [n, 3, S, S] each."""

    @abstractmethod
    def frames(self, video: np.ndarray) -> Tensor:
        """The video's crops, [F, 3, S, S]."""

    @abstractmethod
    def compute_features(self, images: Pictures, video: Frames) -> list[Tensor]:
        """What `features` gives, without remembering it."""

    def features(self, images: Pictures = (), video: Frames = None) -> list[Tensor]:
        """Packed features [N, C] of each picture, then of the video."""
        media, (known, features) = [*images, video], self._last
        if len(media) != len(known) or any(a is not b for a, b in zip(media, known, strict=True)):
            features = self.compute_features(images, video)
            self._last = (media, features)
        return features

    @abstractmethod
    def input_ids(self, text: str, images: Pictures = (), video: Frames = None) -> Tensor:
        """[T], one placeholder a visual token."""

    @abstractmethod
    def logits(self, text: str, images: Pictures = (), video: Frames = None) -> Tensor:
        """[T, V] at every position."""

    @abstractmethod
    def greedy(
        self, text: str, images: Pictures = (), video: Frames = None, count: int = 64
    ) -> list[int]:
        """The next `count` tokens, stop tokens or not."""

    def in_order(self, text: str, images: Pictures, video: Frames) -> list[Tensor | str]:
        """The prompt's stretches of text, and in place of each marker the features it stands for."""
        features = self.features(images, video)
        pictures, clips = iter(features[: len(images)]), iter(features[len(images) :])
        chosen = {"<image>": pictures, "<video>": clips}
        return [next(chosen[s]) if s in chosen else s for s in MARK.split(text)]


class HFOracle(Oracle):
    """A Hugging Face checkpoint, as transformers reads it from the folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        config = json.loads((folder / "config.json").read_text())
        self.kind = config["architectures"][0]
        self.model = getattr(transformers, self.kind).from_pretrained(folder).eval().float()
        self.onevision = "Onevision" in self.kind
        name = "preprocessor_config.json"
        name = name if (folder / name).exists() else "processor_config.json"
        raw = json.loads((folder / name).read_text())
        raw = raw.get("image_processor", raw)
        processor = getattr(transformers, raw.pop("image_processor_type") + "Pil")
        self.processor = processor(**raw)
        self.plain = (SiglipImageProcessorPil(**SIGLIP_PIXELS) if self.onevision
                      else CLIPImageProcessorPil(**CLIP_PIXELS))  # fmt: skip

    def _batch(self, images: Pictures) -> dict[str, Tensor]:
        nested = [list(images)] if self.onevision else list(images)
        return dict(self.processor(images=nested, return_tensors="pt"))

    def pixels(self, images: Pictures) -> list[Tensor]:
        if self.onevision and len(images) > 1:
            return list(self._batch(images)["pixel_values"])
        return [one(self.processor(images=image, return_tensors="pt")) for image in images]

    def frames(self, video: np.ndarray) -> Tensor:
        return one(self.plain(images=list(video), return_tensors="pt"))

    @torch.no_grad()
    def compute_features(self, images: Pictures, video: Frames) -> list[Tensor]:
        out: list[Tensor] = []
        if images:
            out += self.model.get_image_features(**self._batch(images)).pooler_output
        if video is not None:
            clips = self.model.get_video_features(self.frames(video)[None]).pooler_output
            out += [clip.reshape(-1, clip.shape[-1]) for clip in clips]
        return out

    def input_ids(self, text: str, images: Pictures = (), video: Frames = None) -> Tensor:
        features = self.features(images, video)
        marks = iter(MARK.findall(text))
        parts = self.in_order(text, images, video) if features else [text]
        whole = "".join(p if isinstance(p, str) else next(marks) * len(p) for p in parts)
        return torch.tensor(self.tokenizer.encode(whole).ids)

    def _inputs(self, text: str, images: Pictures, video: Frames) -> dict[str, Tensor]:
        inputs = {"input_ids": self.input_ids(text, images, video)[None]}
        if images:
            inputs |= self._batch(images)
        if video is not None:
            inputs["pixel_values_videos"] = self.frames(video)[None]
        return inputs

    @torch.no_grad()
    def logits(self, text: str, images: Pictures = (), video: Frames = None) -> Tensor:
        return self.model(**self._inputs(text, images, video)).logits[0]

    @torch.no_grad()
    def greedy(
        self, text: str, images: Pictures = (), video: Frames = None, count: int = 64
    ) -> list[int]:
        inputs = self._inputs(text, images, video)
        done = self.model.generate(**inputs, do_sample=False, max_new_tokens=count)
        return done[0, inputs["input_ids"].shape[1] :].tolist()


class OriginalOracle(Oracle):
    """An original-layout checkpoint, from the modules it was saved from."""

    def __init__(self, folder: Path, parts: Parts) -> None:
        super().__init__(folder)
        self.parts, self.config = parts, parts.config
        self.clip = parts.tower.config.model_type.startswith("clip")
        self.plain = (CLIPImageProcessorPil(**CLIP_PIXELS) if self.clip
                      else SiglipImageProcessorPil(**SIGLIP_PIXELS))  # fmt: skip
        self.side = parts.tower.config.image_size
        self.aspect = self.config["image_aspect_ratio"] or "square"
        self.merge = self.config.get("mm_patch_merge_type", "flat")
        self.pinpoints = self._pinpoints()  # (width, height)

    def _pinpoints(self) -> list[tuple[int, int]]:
        raw = self.config.get("image_grid_pinpoints", [])
        if raw == "(1x1),...,(6x6)":
            return [(i * self.side, j * self.side) for i in range(1, 7) for j in range(1, 7)]
        return [tuple(p) for p in (json.loads(raw.replace("(", "[").replace(")", "]"))
                                   if isinstance(raw, str) else raw)]  # fmt: skip

    def pixels(self, images: Pictures) -> list[Tensor]:
        several = len(images) > 1 and "max" in self.aspect
        if self.aspect == "pad" or several:
            fill = tuple(int(x * 255) for x in self.plain.image_mean)
            images = [_square(image.convert("RGB"), fill) for image in images]
        elif self.aspect.startswith(
            "anyres"
        ):  # the same cutting as HF's, which reads (height, width)
            grid = [[h, w] for w, h in self.pinpoints]
            tiles = (
                LlavaNextImageProcessorPil(**CLIP_PIXELS, image_grid_pinpoints=grid)
                if self.clip
                else LlavaOnevisionImageProcessorPil(**SIGLIP_PIXELS, image_grid_pinpoints=grid)
            )
            return [one(tiles(images=image, return_tensors="pt")) for image in images]
        return [one(self.plain(images=image, return_tensors="pt")) for image in images]

    def frames(self, video: np.ndarray) -> Tensor:
        return one(self.plain(images=list(video), return_tensors="pt"))

    def _tower(self, pixels: Tensor) -> Tensor:
        """[n, 3, S, S] -> [n, N, C_v]."""
        hidden = self.parts.tower(pixels, output_hidden_states=True).hidden_states[-2]
        return hidden[:, 1:] if self.clip else hidden

    def _pool(self, features: Tensor) -> Tensor:
        """2x2 pooling of each [N, C] map, [n, N', C]."""
        n, count, width = features.shape
        side = math.isqrt(count)
        maps = features.transpose(1, 2).reshape(n, width, side, side)
        mode = self.config.get("mm_spatial_pool_mode", "average")
        if mode == "bilinear":
            maps = F.interpolate(maps, size=[math.ceil(side / 2)] * 2, mode="bilinear")
        else:
            maps = F.max_pool2d(maps, 2) if mode == "max" else F.avg_pool2d(maps, 2)
        return maps.flatten(2).transpose(1, 2)

    @torch.no_grad()
    def compute_features(self, images: Pictures, video: Frames) -> list[Tensor]:
        out = [
            self._pack(self.parts.projector(self._tower(pixels)), image.size)
            for pixels, image in zip(self.pixels(images), images, strict=True)
        ]
        return out if video is None else [*out, self._video(video)]

    def _video(self, video: np.ndarray) -> Tensor:
        features, project = self._tower(self.frames(video)), self.parts.projector
        before = self.config.get("mm_pooling_position") == "before"
        clips = project(self._pool(features)) if before else self._pool(project(features))
        newline, where = self.parts.newline, self.config.get("mm_newline_position")
        if newline is None or where == "no_token":
            return clips.flatten(0, 1)
        if where in ("grid", "frame"):  # after each row of each frame, after each frame
            side = math.isqrt(clips.shape[1]) if where == "grid" else 1
            rows = clips.unflatten(1, (side, -1))
            return torch.cat([rows, newline.expand(*rows.shape[:2], 1, -1)], 2).flatten(0, 2)
        ends = "max" in self.aspect or where == "one_token"
        return torch.cat([clips.flatten(0, 1), newline[None]] if ends else [*clips])

    def _pack(self, crops: Tensor, size: tuple[int, int]) -> Tensor:
        """Crops [n, N, C] of a picture of `size` (width, height) -> its tokens [tokens, C]."""
        if self.merge == "unires":  # without the base crop, tile after tile
            return self._pool(crops[1:]).flatten(0, 1)
        if self.merge == "flat":
            return crops.flatten(0, 1)
        newline, unpad = self.parts.newline, "unpad" in self.merge
        if len(crops) == 1:
            return torch.cat([crops[0], newline[None]]) if unpad else crops[0]
        base, tiles = crops[0], crops[1:]
        side = math.isqrt(len(base))
        cols, rows = self._canvas(size)
        whole = torch.cat(  # rows of tiles side by side: [C, rows * side, cols * side]
            [torch.cat([t.T.reshape(-1, side, side) for t in tiles[r * cols : (r + 1) * cols]], 2)
             for r in range(rows)], 1)  # fmt: skip
        if not unpad:
            return torch.cat([base, whole.flatten(1).T])
        whole = _unpad(whole, size)
        if found := re.fullmatch(r"anyres_max_(\d+)", self.aspect):
            _, h, w = whole.shape
            times = math.sqrt(h * w / (int(found[1]) * side**2))
            if times > 1.1:
                whole = F.interpolate(
                    whole[None], [int(h // times), int(w // times)], mode="bilinear"
                )[0]
        lines = torch.cat([whole, newline[:, None, None].expand(-1, whole.shape[1], 1)], 2)
        return torch.cat([base, lines.flatten(1).T]["nobase" in self.merge :])

    def _canvas(self, size: tuple[int, int]) -> tuple[int, int]:
        """(columns, rows) of tiles: most pixels kept, then least waste, then first in the list."""
        w, h = size

        def rank(canvas: tuple[int, int]) -> tuple[int, int]:
            scale = min(canvas[0] / w, canvas[1] / h)
            kept = min(int(w * scale) * int(h * scale), w * h)
            return kept, -(canvas[0] * canvas[1] - kept)

        best = max(self.pinpoints, key=rank)
        return best[0] // self.side, best[1] // self.side

    def _chunks(self, text: str, images: Pictures, video: Frames) -> list[list[int] | Tensor]:
        """Token ids of each stretch of text, tokenised on its own with one BOS in all, and features."""
        out: list[list[int] | Tensor] = []
        for i, part in enumerate(self.in_order(text, images, video)):
            keep_start = i == 0
            out.append(part if isinstance(part, Tensor) else
                       self.tokenizer.encode(part, add_special_tokens=keep_start).ids)  # fmt: skip
        return out

    def input_ids(self, text: str, images: Pictures = (), video: Frames = None) -> Tensor:
        chunks = self._chunks(text, images, video)
        return torch.cat([torch.full((len(c),), -200) if isinstance(c, Tensor) else
                          torch.tensor(c, dtype=torch.long) for c in chunks])  # fmt: skip

    def _embeds(self, text: str, images: Pictures, video: Frames) -> Tensor:
        table: nn.Embedding = self.parts.llm.get_input_embeddings()
        chunks = self._chunks(text, images, video)
        return torch.cat([c if isinstance(c, Tensor) else table(torch.tensor(c, dtype=torch.long))
                          for c in chunks])[None]  # fmt: skip

    @torch.no_grad()
    def logits(self, text: str, images: Pictures = (), video: Frames = None) -> Tensor:
        return self.parts.llm(inputs_embeds=self._embeds(text, images, video)).logits[0]

    @torch.no_grad()
    def greedy(
        self, text: str, images: Pictures = (), video: Frames = None, count: int = 64
    ) -> list[int]:
        embeds = self._embeds(text, images, video)
        done = self.parts.llm.generate(
            inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            do_sample=False, max_new_tokens=count, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return done[0].tolist()


def _square(image: Image.Image, fill: tuple[int, ...]) -> Image.Image:
    w, h = image.size
    side = max(w, h)
    out = Image.new("RGB", (side, side), fill)
    out.paste(image, ((side - w) // 2, (side - h) // 2))
    return out


def _unpad(whole: Tensor, size: tuple[int, int]) -> Tensor:
    """Cuts [C, H, W] back to what the picture of `size` (width, height) covers, sides truncated."""
    (w, h), (height, width) = size, whole.shape[1:]
    if w / h > width / height:
        pad = (height - int(h * (width / w))) // 2
        return whole[:, pad : height - pad]
    pad = (width - int(w * (height / h))) // 2
    return whole[:, :, pad : width - pad]
