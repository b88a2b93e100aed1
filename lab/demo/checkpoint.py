"""The demo model's folder in Hugging Face's LLaVA-OneVision layout: config, tokenizer, weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from zipvl.model.vlm import VLM

from .questions import corpus

SIDE, PATCH, VOCABULARY = 48, 12, 512
SPECIAL = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|im_end|>",
           "<image>", "<video>")  # fmt: skip
END, IMAGE, VIDEO = (SPECIAL.index(t) for t in ("<|im_end|>", "<image>", "<video>"))
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% set media = message['content'] | selectattr('type', 'ne', 'text') | list %}"
    "{% for part in media %}{{ '<' + part['type'] + '>' }}{% endfor %}"
    "{% if media %}{{ '\\n' }}{% endif %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{% if message['role'] == 'assistant' %}{{ '<|im_end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def config() -> dict[str, Any]:
    """config.json: 16 patches a frame, pooled to 4 tokens; 8 decoder layers with GQA."""
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "dtype": "bfloat16",
        "image_token_index": IMAGE,
        "video_token_index": VIDEO,
        "image_grid_pinpoints": [[SIDE, SIDE]],
        "vision_aspect_ratio": "anyres_max_9",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "qwen2",
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
            "eos_token_id": END,
            "bos_token_id": None,
            "pad_token_id": 0,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 128,
            "intermediate_size": 320,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": SIDE,
            "patch_size": PATCH,
            "vision_use_head": False,
        },
    }


def tokenizer() -> Tokenizer:
    """Byte-level BPE: the world's words are one token each, any other text falls back to bytes."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(t, normalized=False, special=True) for t in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(corpus(), trainer)
    return tok


def write_plain(folder: Path) -> None:
    """Everything of the folder but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    half = [0.5, 0.5, 0.5]
    files = {
        "config.json": config(),
        "generation_config.json": {"eos_token_id": END, "pad_token_id": 0, "do_sample": False},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 131072,
        },
        "preprocessor_config.json": {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "processor_class": "LlavaOnevisionProcessor",
            "size": {"height": SIDE, "width": SIDE},
            "image_grid_pinpoints": [[SIDE, SIDE]],
            "image_mean": half,
            "image_std": half,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "do_convert_rgb": True,
            "do_pad": True,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def hf_name(name: str) -> str:
    """The name the hub's OneVision checkpoints give to a parameter of VLM."""
    for ours, theirs in {
        "vision.tower.": "vision_tower.vision_model.",
        "vision.projector.0.": "multi_modal_projector.linear_1.",
        "vision.projector.2.": "multi_modal_projector.linear_2.",
        "vision.newline": "image_newline",
        "text.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
    }.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise KeyError(name)


def write_weights(model: VLM, folder: Path) -> None:
    """model.safetensors in bf16, with the tower's last norm, which Hugging Face expects."""
    width = model.config.vision.tower.hidden_size
    tensors = {hf_name(k): v for k, v in model.state_dict().items()}
    tensors["vision_tower.vision_model.post_layernorm.weight"] = torch.ones(width)
    tensors["vision_tower.vision_model.post_layernorm.bias"] = torch.zeros(width)
    tensors = {k: v.to(torch.bfloat16).contiguous() for k, v in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
