"""Complete toy tokenizer folders for tests: fewer than 600 tokens, made in milliseconds.

Both kinds load with `tokenizers`, with zipvl and with transformers' PreTrainedTokenizerFast.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

CORPUS = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    "USER: What is shown in this image? ASSISTANT: The image shows a red car on the street. "
    "Describe the video in detail.\nWhat happens in the video? A man opens the door and waves. "
    "system You are a helpful assistant. user What colour is the cat? assistant The cat is black. "
    "[INST] How many people are there? [/INST] There are three people, two dogs and 14 birds.\n"
)
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% elif part['type'] == 'video' %}<video>{% endif %}{% endfor %}"
    "{% if message['content'][0]['type'] != 'text' %}{{ '\n' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)  # images, then text, as the OneVision checkpoints have it
VICUNA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% elif part['type'] == 'video' %}<video>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] + ' ' }}"
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)  # as the LLaVA-1.5 and NeXT-Video checkpoints have it


def _trained(
    tok: Tokenizer, alphabet: list[str], merges: int
) -> tuple[list[str], list[tuple[str, str]]]:
    """(characters, merges) of BPE on CORPUS. The trainer breaks ties in order, so runs agree."""
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + 60 + merges, initial_alphabet=alphabet, show_progress=False
    )
    tok.train_from_iterator(CORPUS.splitlines(), trainer)
    model = json.loads(tok.to_str())["model"]
    learned = [tuple(m) for m in model["merges"][:merges]]
    kept = [t for t, _ in sorted(model["vocab"].items(), key=lambda x: x[1]) if len(t) == 1]
    return kept, learned


def _finish(
    folder: Path,
    tok: Tokenizer,
    added: Sequence[str],
    start_id: int | None,
    config: dict,
    template: str | None,
) -> dict[str, int]:
    """Add `added` (from `start_id` on, over unreachable fillers), write the folder, return all ids."""
    if start_id is not None:
        free = start_id - tok.get_vocab_size()
        assert free >= 0, (
            f"start_id {start_id} is below the {tok.get_vocab_size()} tokens there are"
        )
        tok.add_tokens([f"<filler_{i}>" for i in range(free)])
    tok.add_special_tokens(list(added))
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        **config,
        **({"chat_template": template} if template else {}),
    }
    if "<pad>" in added:
        config["pad_token"] = "<pad>"
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    ids = {t: tok.token_to_id(t) for t in added}
    return ids | {t: tok.token_to_id(t) for t in ("<s>", "</s>") if tok.token_to_id(t) is not None}


def write_llama_like(
    folder: Path,
    added: Sequence[str] = ("<image>", "<pad>"),
    start_id: int | None = None,
    chat_template: str | None = None,
) -> dict[str, int]:
    """SentencePiece-like BPE: <unk> <s> </s>, 256 byte pieces, dummy prefix, BOS in front.

    Returns {token: id} of `added`, <s> and </s>. About 430 tokens before `added`.
    """
    spaced = Tokenizer(models.BPE())
    spaced.pre_tokenizer = pre_tokenizers.Metaspace()
    chars, merges = _trained(spaced, ["▁"], 110)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *chars]
    pieces += [a + b for a, b in merges]
    vocab = {t: i for i, t in enumerate(dict.fromkeys(pieces))}
    tok = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tok.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tok.add_special_tokens(["<unk>", "<s>", "</s>"])
    tok.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config |= {"add_bos_token": True, "legacy": True}
    return _finish(folder, tok, added, start_id, config, chat_template)


def write_qwen_like(
    folder: Path,
    added: Sequence[str] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"),
    start_id: int | None = None,
    chat_template: str | None = None,
) -> dict[str, int]:
    """Byte-level BPE with Qwen2's split: no BOS, no dummy prefix. Returns {token: id} of `added`.

    About 370 tokens before `added`.
    """
    raw = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    steps = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    raw.pre_tokenizer = steps
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    _, merges = _trained(raw, alphabet, 110)
    vocab = {t: i for i, t in enumerate(dict.fromkeys([*alphabet, *(a + b for a, b in merges)]))}
    tok = Tokenizer(models.BPE(vocab, merges))
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = steps
    tok.decoder = decoders.ByteLevel()
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False}
    return _finish(folder, tok, added, start_id, config, chat_template)
