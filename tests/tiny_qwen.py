"""Tiny Qwen2-VL and Qwen2.5-VL checkpoints, and what transformers makes of pictures and videos.

torchvision is not there, so transformers has no video processor here: the oracle cuts each frame by
the picture processor, with a video's range of sizes, and puts frames two by two itself.
"""

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Qwen2VLImageProcessorPil

START, END, IMAGE, VIDEO = (f"<|{name}|>" for name in (
    "vision_start", "vision_end", "image_pad", "video_pad"))  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% else %}"
    f"{START}{{{{ '{IMAGE}' if p.type == 'image' else '{VIDEO}' }}}}{END}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)  # what the hub's writes of the same parts
TEXT: dict[str, Any] = {
    **tiny.SMALL, "num_key_value_heads": 2, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
TOWERS: dict[str, dict[str, Any]] = {
    "Qwen2_5_VL": {
        "depth": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
        "out_hidden_size": 64, "window_size": 56, "fullatt_block_indexes": [2],
    },
    "Qwen2VL": {"depth": 3, "embed_dim": 32, "mlp_ratio": 2, "num_heads": 2, "hidden_size": 64},
}  # fmt: skip
KINDS = tuple(TOWERS)
PICTURE = {"shortest_edge": 4 * 784, "longest_edge": 40 * 784}
FRAME = {"shortest_edge": 2 * 784, "longest_edge": 9 * 784}
MARK = re.compile("(" + "|".join(map(re.escape, (IMAGE, VIDEO))) + ")")
Media = Sequence[Image.Image | tuple[np.ndarray, float]]  # pictures; frames and how long they last


def build(kind: str, folder: Path, seed: int = 0, tied: bool = False,
          tower: dict[str, Any] | None = None) -> nn.Module:  # fmt: skip
    """Saves a checkpoint as transformers 5 writes it, and returns the model."""
    added = (START, END, IMAGE, VIDEO)
    ids, size = tiny.write_tokenizer(folder, "qwen2", added, TEMPLATE)
    config = getattr(transformers, f"{kind}Config")(
        text_config=TEXT | {"vocab_size": -(-size // 64) * 64, "tie_word_embeddings": tied},
        vision_config=TOWERS[kind] | (tower or {}), tie_word_embeddings=tied,
        image_token_id=ids[IMAGE], video_token_id=ids[VIDEO],
        vision_start_token_id=ids[START], vision_end_token_id=ids[END],
    )  # fmt: skip
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    tiny.redraw(model)
    tiny.quieten(model.lm_head.weight, sorted(ids.values()), size)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    pixels = json.loads(Qwen2VLImageProcessorPil(size=PICTURE).to_json_string())
    tiny.write_json(folder / "preprocessor_config.json", pixels)
    tiny.write_json(folder / "video_preprocessor_config.json", {"size": FRAME})
    return model


class Oracle:
    """A checkpoint as transformers reads it, in float32 on the CPU."""

    def __init__(self, kind: str, folder: Path):
        self.kind, self.folder = kind, folder
        made = getattr(transformers, f"{kind}ForConditionalGeneration")
        self.model = made.from_pretrained(folder).eval().float()
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.picture = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.frame = Qwen2VLImageProcessorPil(size=FRAME)

    def pixels(self, medium: Any) -> tuple[Tensor, Tensor]:
        """Patches [N, numbers] block by block, and the grid [3] they lie on."""
        if isinstance(medium, Image.Image):
            out = self.picture(images=medium, return_tensors="pt")
            return out["pixel_values"], out["image_grid_thw"][0]
        frames = [self.frame(images=Image.fromarray(f), return_tensors="pt") for f in medium[0]]
        frames += frames[-1:] * (len(frames) % 2)
        each = [f["pixel_values"].unflatten(1, (3, 2, -1)) for f in frames]
        pairs = [torch.stack((a[:, :, 0], b[:, :, 0]), 2).flatten(1)
                 for a, b in zip(each[::2], each[1::2], strict=True)]  # fmt: skip
        _, rows, cols = frames[0]["image_grid_thw"][0].tolist()
        return torch.cat(pairs), torch.tensor([len(pairs), rows, cols])

    def given(self, text: str, media: Media) -> dict[str, Any]:
        """What the model takes of a rendered prompt."""
        out: dict[str, Any] = {}
        pieces, seconds = MARK.split(text), []  # every other one is a mark
        for i, medium in enumerate(media):
            patches, grid = self.pixels(medium)
            pieces[2 * i + 1] *= int(grid.prod()) // 4
            names = ("pixel_values", "image_grid_thw")
            if not isinstance(medium, Image.Image):
                names = ("pixel_values_videos", "video_grid_thw")
                seconds.append(2 * medium[1] / len(medium[0]))
            for name, value in zip(names, (patches, grid[None]), strict=True):
                out[name] = torch.cat((out[name], value)) if name in out else value
        ids = self.tokenizer.encode("".join(pieces), add_special_tokens=False).ids
        out["input_ids"] = torch.tensor([ids])
        image, video = (out["input_ids"] == t for t in self.tokens)
        out["mm_token_type_ids"] = image + 2 * video
        if seconds and self.kind == "Qwen2_5_VL":
            out["second_per_grid_ts"] = torch.tensor(seconds)
        return out

    @property
    def tokens(self) -> tuple[int, int]:
        return self.model.config.image_token_id, self.model.config.video_token_id

    def turns(self, given: dict[str, Any]) -> Tensor:
        """Rotary ids [3, T]: of each medium transformers' own, of text the next ones behind the
        largest so far."""
        grids = [iter(given.get(f"{kind}_grid_thw", ())) for kind in ("image", "video")]
        seconds, parts, at = iter(given.get("second_per_grid_ts", ())), [], 0
        pace = getattr(self.model.config.vision_config, "tokens_per_second", None)
        for kind, some in itertools.groupby(given["mm_token_type_ids"][0].tolist()):
            n, step = len(list(some)), 1.0
            if kind == 0:
                parts.append(torch.arange(n).expand(3, n) + at)
            else:
                if kind == 2 and pace:
                    step = pace * next(seconds)
                cut = self.model.model.get_vision_position_ids
                parts.append(cut(at, next(grids[kind - 1]), 1, 2, step))
            at = int(parts[-1].max()) + 1
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def features(self, given: dict[str, Any]) -> list[Tensor]:
        """Tokens [n, C] of pictures, then of videos."""
        out = []
        for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            if pixels in given:
                get = getattr(self.model, f"get_{kind}_features")
                out += get(given[pixels], given[f"{kind}_grid_thw"]).pooler_output
        return out

    @torch.no_grad()
    def logits(self, given: dict[str, Any]) -> Tensor:
        """[T, V]."""
        return self.model(**given, position_ids=self.turns(given)[:, None]).logits[0]

    @torch.no_grad()
    def greedy(self, given: dict[str, Any], count: int = 64) -> list[int]:
        turns = self.turns(given)
        out = self.model(**given, position_ids=turns[:, None], use_cache=True)
        new: list[int] = []
        while True:
            new.append(int(out.logits[0, -1].argmax()))
            if len(new) == count:
                return new
            at = int(turns.max()) + len(new)
            out = self.model(
                input_ids=torch.tensor([new[-1:]]), position_ids=torch.full((3, 1, 1), at),
                past_key_values=out.past_key_values, use_cache=True,
            )  # fmt: skip
