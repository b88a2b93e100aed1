"""The GGUF converter: a tiny file of each kind against Hugging Face's own decoder."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import zipvl
from lab.experiments import text_to_zipvl
from zipvl.engine.inputs import Inputs

HEADS, GROUPS, LAYERS, WIDTH = 4, 2, 2, 32
SPECIAL = ("<|im_start|>", "<|im_end|>")
MERGES = (("a", "b"), ("1", "2"), ("'", "T"), ("Ġ", "ab"))
WORDS = [*sorted(ByteLevel.alphabet()), *("".join(m) for m in MERGES), *SPECIAL]
NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "model.embed_tokens": "token_embd", "model.norm": "output_norm",
    "lm_head": "output",
}  # fmt: skip


def decoder(kind: str, tied: bool) -> LlamaForCausalLM | Qwen2ForCausalLM:
    """Random weights, norms and biases included."""
    config, model = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[kind]
    made = model(config(
        vocab_size=len(WORDS), hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=GROUPS, rms_norm_eps=1e-5,
        max_position_embeddings=512, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )).eval()  # fmt: skip
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.copy_(torch.randn_like(p) * 0.2 + ("norm" in name))
    return made


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows i and i + D/2 of a head side by side, as llama.cpp stores Llama's q and k."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(path: Path, kind: str, model: torch.nn.Module, tied: bool) -> None:
    """A GGUF file of `model`, matrices in 8 bits; the model takes the values that the file holds."""
    file = gguf.GGUFWriter(path, kind)
    file.add_block_count(LAYERS)
    file.add_context_length(512)
    file.add_embedding_length(WIDTH)
    file.add_feed_forward_length(64)
    file.add_head_count(HEADS)
    file.add_head_count_kv(GROUPS)
    file.add_rope_freq_base(5000.0)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("qwen2" if kind == "qwen2" else "smollm")
    file.add_token_list(WORDS)
    file.add_token_types([3 if w in SPECIAL else 1 for w in WORDS])
    file.add_token_merges([" ".join(m) for m in MERGES])
    file.add_bos_token_id(WORDS.index(SPECIAL[0]))
    file.add_eos_token_id(WORDS.index(SPECIAL[1]))
    for name, p in model.named_parameters():
        part, leaf = name.rsplit(".", 1)
        where, _, inner = part.removeprefix("model.layers.").partition(".")
        stored = f"blk.{where}.{NAMES[inner]}" if inner in NAMES else NAMES[part]
        x = p.detach().numpy()
        heads = {"attn_q": HEADS, "attn_k": GROUPS}.get(stored.split(".")[-1])
        swap = kind == "llama" and leaf == "weight" and heads
        if p.ndim == 2:
            q8 = gguf.GGMLQuantizationType.Q8_0
            packed = gguf.quantize(interleaved(x, heads) if swap else x, q8)
            file.add_tensor(f"{stored}.{leaf}", packed, raw_dtype=q8)
            x = gguf.dequantize(gguf.quantize(x, q8), q8)
        else:
            file.add_tensor(f"{stored}.{leaf}", x)
        p.data = torch.from_numpy(x).half().float()
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("qwen2", True), ("qwen2", False)])
def test_logits_are_those_of_the_original(kind: str, tied: bool, tmp_path: Path) -> None:
    model = decoder(kind, tied)
    write(tmp_path / "tiny.gguf", kind, model, tied)
    text_to_zipvl.main(tmp_path / "tiny.gguf", tmp_path / "out")
    engine = zipvl.load(tmp_path / "out", device="cpu", dtype="float32")
    ids = torch.randint(len(WORDS), (50,))
    want = model(ids[None]).logits[0]
    got = engine.logits(Inputs(ids, torch.zeros(50, dtype=torch.bool), []), "dense")
    torch.testing.assert_close(got[:, : len(WORDS)], want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_pieces(kind: str, tmp_path: Path) -> None:
    """Digits stay apart; Qwen2 also knows contractions in capitals, and composes accents."""
    write(tmp_path / "tiny.gguf", kind, decoder(kind, True), True)
    f = text_to_zipvl.fields(gguf.GGUFReader(tmp_path / "tiny.gguf"))
    tok = text_to_zipvl.tokenizer(f)
    assert tok.encode("ab ab 12<|im_end|>").tokens == ["ab", "Ġab", "Ġ", "1", "2", "<|im_end|>"]
    assert tok.encode("b'T").tokens == (["b", "'T"] if kind == "qwen2" else ["b", "'", "T"])
    composed = tok.encode("e\u0301").ids == tok.encode("\u00e9").ids
    assert composed == (kind == "qwen2")
    assert tok.decode(tok.encode("a naïve 漢字 'T").ids) == "a naïve 漢字 'T"
    assert tok.token_to_id("<image>") == len(WORDS)


def test_other_decoders_are_refused(tmp_path: Path) -> None:
    file = gguf.GGUFWriter(tmp_path / "tiny.gguf", "gemma3")
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.close()
    with pytest.raises(SystemExit, match="'gemma3'; llama and qwen2 are supported"):
        text_to_zipvl.main(tmp_path / "tiny.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
