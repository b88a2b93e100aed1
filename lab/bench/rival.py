"""transformers' model of the same shape on the very same tensors, with its DynamicCache."""

from collections.abc import Callable

import torch

from .model import Model


def build_rival(model: Model) -> torch.nn.Module:
    """transformers' class with our tensors as its parameters: no second copy of the weights."""
    import transformers

    c, name = model.config, {"qwen2": "Qwen2", "llama": "Llama"}[model.config.kind]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads, rms_norm_eps=c.rms_norm_eps, rope_theta=c.rope_theta,
        tie_word_embeddings=True, max_position_embeddings=1 << 20, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device("meta"):
        rival = getattr(transformers, f"{name}ForCausalLM")(config)
    ours = {f"model.{name}": p for name, p in model.decoder.named_parameters()}
    rival.load_state_dict(ours | {"lm_head.weight": model.lm_head.weight}, assign=True)
    rival.model.rotary_emb = type(rival.model.rotary_emb)(config).to(model.device)
    return rival.eval().requires_grad_(False)


def rival_prefill(rival: torch.nn.Module, ids: torch.Tensor) -> Callable[[], object]:
    return lambda: rival(ids[None], use_cache=True, logits_to_keep=1)


def rival_steps(
    model: Model, rival: torch.nn.Module, ids: torch.Tensor, tokens: int, new: int
) -> Callable[[], object]:
    """The same steps over a DynamicCache of random keys and values."""
    from transformers import DynamicCache

    cache = DynamicCache(config=rival.config)  # type: ignore[arg-type]
    for layer, own in enumerate(model.caches([tokens] * len(ids), 0)):
        k, v = (
            t.unflatten(0, (len(ids), tokens)).transpose(1, 2).contiguous() for t in (own.k, own.v)
        )
        cache.update(k, v, layer)

    def work() -> None:
        token = ids[:, None]
        for _ in range(new):
            logits = rival(token, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1].argmax(-1)[:, None]

    return work
