"""The vision-language model: a family's way from pixels to tokens, and the decoder."""

import torch
from torch import Tensor, nn

from ..config import LlavaConfig, ModelConfig
from ..linear import Linear
from ..vision.family import Family
from ..vision.internvl import InternConfig, InternVL
from ..vision.llava import Llava
from ..vision.qwen import QwenConfig, QwenVL
from .decoder import Decoder

FAMILIES: dict[type, type[Family]] = {  # by the record of config.vision
    LlavaConfig: Llava,
    InternConfig: InternVL,
    QwenConfig: QwenVL,
}


class VLM(nn.Module):
    """Parameter names are those of model/weights.py. Raises ModelError where parts do not fit."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, text = config, config.text
        self.vision = FAMILIES[type(config.vision)](config.vision, text.hidden_size)
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
