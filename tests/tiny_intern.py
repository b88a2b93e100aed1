"""Tiny random checkpoints of InternVL3 and InternVL3.5, and what transformers computes with them.

The layout is that of the public ones: the chat template writes <IMG_CONTEXT> for a picture and <video>
for a video, and the processor puts <img>, a run of <IMG_CONTEXT> and </img> there.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import numpy as np
import tiny
import tokenizers_tiny
import torch
import transformers
from oracles import Frames, HFOracle, Oracle, Pictures
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import GotOcr2ImageProcessorPil, InternVLForConditionalGeneration
from transformers.models.internvl.processing_internvl import InternVLProcessor

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif part['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = (*tiny.QWEN_SPECIAL, "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "patch_size": [14, 14],
}  # fmt: skip
PIXELS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
QWEN3: dict[str, Any] = tiny.QWEN2 | {"model_type": "qwen3", "head_dim": 24}  # 4 x 24 is not 64


@dataclass(frozen=True)
class Intern:
    text: dict[str, Any]
    vision: dict[str, Any]
    file: str  # of the processor's settings
    more: dict[str, Any] = field(default_factory=dict)  # of these


KINDS = {
    "intern3": Intern(
        tiny.QWEN2, TOWER | {"image_size": [56, 56], "attention_bias": True}, "preprocessor_config.json"
    ),
    "intern35": Intern(
        QWEN3,
        TOWER | {"image_size": [84, 84], "use_qk_norm": True, "norm_type": "rms_norm",
                 "use_mean_pooling": False},
        "processor_config.json", {"min_patches": 2, "max_patches": 7, "crop_to_patches": True},
    ),
}  # fmt: skip


def build(kind: str, folder: Path, seed: int = 0, extra: dict[str, Any] | None = None) -> nn.Module:
    """Saves one of KINDS and returns the model; `extra` overrides top-level config keys."""
    made = KINDS[kind]
    ids = tokenizers_tiny.write_qwen_like(folder, WORDS, chat_template=TEMPLATE)
    size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    text = made.text | {"vocab_size": -(-size // 64) * 64, "pad_token_id": 0}
    config = transformers.InternVLConfig(**{
        "vision_config": dict(made.vision), "text_config": text, "image_token_id": ids["<IMG_CONTEXT>"],
        "tie_word_embeddings": False,
    } | (extra or {}))  # fmt: skip
    torch.manual_seed(seed)
    model = InternVLForConditionalGeneration(config).eval()
    tiny.redraw(model)
    for name, p in model.named_parameters():
        if "lambda" in name:  # as drawn, blocks would hardly count
            nn.init.uniform_(p, 0.3, 1.0)
    tiny.quieten(model.lm_head.weight, sorted(ids.values()), size)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    side = made.vision["image_size"][0]
    processor = GotOcr2ImageProcessorPil(
        size={"height": side, "width": side}, **PIXELS, **made.more
    )
    raw = json.loads(processor.to_json_string())
    nested = made.file.startswith("processor")
    tiny.write_json(folder / made.file, {"image_processor": raw} if nested else raw)
    return model


def rendered(content: list[dict[str, str]] | str) -> str:
    """The prompt of one message, by the template itself."""
    template = jinja2.Environment().from_string(TEMPLATE)
    return template.render(
        messages=[{"role": "user", "content": content}], add_generation_prompt=True
    )


class InternOracle(HFOracle):
    """A checkpoint as transformers reads it; the prompt holds the template's own markers."""

    def __init__(self, folder: Path, kind: str) -> None:
        Oracle.__init__(self, folder)
        self.model = InternVLForConditionalGeneration.from_pretrained(folder).eval().float()
        raw = json.loads((folder / KINDS[kind].file).read_text())
        raw = raw.get("image_processor", raw)
        self.processor = GotOcr2ImageProcessorPil(**raw)
        self.words = SimpleNamespace(
            start_image_token="<img>", image_token="<IMG_CONTEXT>", end_image_token="</img>",
            image_seq_length=(self.processor.size["height"] // 28) ** 2,
        )  # fmt: skip

    def cut(self, image: Any) -> Tensor:
        """Crops in transformers' order, the whole picture last."""
        made = self.processor(images=image, crop_to_patches=True, return_tensors="pt")
        assert int(made["num_patches"][0]) == len(made["pixel_values"])
        return made["pixel_values"]

    def pixels(self, images: Pictures) -> list[Tensor]:
        return [self.cut(image).roll(1, 0) for image in images]

    def frames(self, video: np.ndarray) -> Tensor:
        made = self.processor(images=list(video), crop_to_patches=False, return_tensors="pt")
        return made["pixel_values"]

    @torch.no_grad()
    def compute_features(self, images: Pictures, video: Frames) -> list[Tensor]:
        media = [self.cut(image) for image in images]
        media += [] if video is None else [self.frames(video)]
        return [self.model.get_image_features(pixel_values=m).pooler_output.flatten(0, 1)
                for m in media]  # fmt: skip

    def _inputs(self, text: str, images: Pictures, video: Frames) -> dict[str, Tensor]:
        """What InternVLProcessor makes of a prompt; its own class wants torchvision."""
        left, crops = iter(images), list[Tensor]()

        def replaced(found: re.Match) -> str:
            if found[0] == "<video>":
                assert video is not None
                crops.append(self.frames(video))
                given = {"pixel_values_videos": crops[-1][None]}
                return InternVLProcessor.replace_video_token(self.words, given, 0)
            crops.append(self.cut(next(left)))
            given = {"num_patches": [len(crops[-1])]}
            return InternVLProcessor.replace_image_token(self.words, given, 0)

        whole = re.sub("<IMG_CONTEXT>|<video>", replaced, text)
        assert next(left, None) is None
        inputs = {"input_ids": torch.tensor(self.tokenizer.encode(whole).ids)[None]}
        return inputs | ({"pixel_values": torch.cat(crops)} if crops else {})

    def input_ids(self, text: str, images: Pictures = (), video: Frames = None) -> Tensor:
        return self._inputs(text, images, video)["input_ids"][0]
