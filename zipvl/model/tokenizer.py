"""The tokenizer of a checkpoint folder, its named tokens and its stop tokens.

tokenizer.json              read as written
tokenizer.model             SentencePiece (original LLaVA-1.5 and 1.6)
vocab.json + merges.txt     Qwen2's byte-level BPE
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ..config import ModelConfig, read_json
from ..errors import ModelError
from .sentencepiece import read_sentencepiece

QWEN2_SPLIT = (  # one digit at a time; transformers models/qwen2/tokenization_qwen2.py
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load_tokenizer(folder: Path, settings: dict[str, Any]) -> Tokenizer:
    """The tokenizer in `folder`; `settings` is its tokenizer_config.json, {} where there is none.

    Raises ModelError naming the file at fault.
    """
    if (folder / "tokenizer.json").exists():
        tok = _from_json(folder / "tokenizer.json")
    elif (folder / "tokenizer.model").exists():
        tok = read_sentencepiece(folder / "tokenizer.model")
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        tok = _from_merges(folder)
    else:
        raise ModelError(
            f"{folder} holds neither tokenizer.json nor tokenizer.model (nor vocab.json with "
            "merges.txt): copy the tokenizer files into it"
        )
    _add_missing(tok, folder, settings)
    return tok


def _from_json(path: Path) -> Tokenizer:
    try:
        tok = Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises no narrower class
        raise ModelError(f"{path} is not a tokenizer ({e}): download the file again") from None
    tok.no_truncation()
    tok.no_padding()
    pre = tok.pre_tokenizer
    if isinstance(pre, pre_tokenizers.Metaspace) and pre.prepend_scheme == "first":
        # Files of legacy=false tokenizers: "▁" only in front of the whole text. LLaVA was trained
        # on chunks between pictures, each with its own "▁" (models.md 4.3: the ids differ).
        tok.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tok.pre_tokenizer = None
    return tok


def _from_merges(folder: Path) -> Tokenizer:
    try:
        vocab, merges = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
        tok = Tokenizer(models.BPE(vocab, merges))
    except Exception as e:  # the library raises no narrower class
        raise ModelError(
            f"{folder / 'vocab.json'} and merges.txt are not a tokenizer ({e}): download them again"
        ) from None
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    return tok


def _add_missing(tok: Tokenizer, folder: Path, settings: dict[str, Any]) -> None:
    """Add the tokens that only tokenizer_config.json or added_tokens.json know, in order of id."""
    plain = optional_json(folder / "added_tokens.json")
    declared = {i: AddedToken(text, special=True, normalized=False) for text, i in plain.items()}
    try:
        for i, record in settings.get("added_tokens_decoder", {}).items():
            declared[int(i)] = AddedToken(**record)
        missing = sorted(declared.keys() - tok.get_added_tokens_decoder().keys())
    except (AttributeError, TypeError, ValueError) as e:
        raise ModelError(f"{folder}: the added tokens are malformed ({e})") from None
    for i in missing:
        text = declared[i].content
        tok.add_tokens([declared[i]])
        if tok.token_to_id(text) != i:
            raise ModelError(
                f"{folder}: added token {text!r} should have id {i} but gets "
                f"{tok.token_to_id(text)}: the tokenizer files do not belong together"
            )


def optional_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, {} where there is no such file."""
    return read_json(path) if path.exists() else {}


def named_tokens(tok: Tokenizer, folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... as text; files hold them as strings or as token records."""
    known = {"bos_token": "<s>", "eos_token": "</s>"}  # what SentencePiece files call them
    named: dict[str, Any] = {k: v for k, v in known.items() if tok.token_to_id(v) is not None}
    named |= optional_json(folder / "special_tokens_map.json") | settings
    named = {k: v for k, v in named.items() if k.endswith("_token")}
    texts = {k: v.get("content") if isinstance(v, dict) else v for k, v in named.items()}
    return {k: v for k, v in texts.items() if isinstance(v, str)}


def bos_ids(tok: Tokenizer, settings: dict[str, Any], tokens: dict[str, str]) -> tuple[int, ...]:
    """What goes in front of a prompt: the BOS where the settings or the post-processor add one."""
    bos = tok.token_to_id(tokens.get("bos_token", ""))
    wanted = settings.get("add_bos_token", bool(tok.encode("").ids))
    return (bos,) if wanted and bos is not None else ()


def stop_ids(
    tok: Tokenizer, folder: Path, config: ModelConfig, tokens: dict[str, str]
) -> frozenset[int]:
    """Every end-of-answer id the folder knows of; ModelError when there is none."""
    raw = read_json(folder / "config.json")
    sources = [raw, raw.get("text_config") or {}, optional_json(folder / "generation_config.json")]
    found: list[Any] = []
    for source in sources:
        eos = source.get("eos_token_id")
        found += eos if isinstance(eos, list) else [eos]
    names = [tokens.get("eos_token", "")]
    if config.text.kind == "qwen2":
        names += ["<|im_end|>", "<|endoftext|>"]
    found += map(tok.token_to_id, names)
    stops = frozenset(i for i in found if type(i) is int and i >= 0)
    if not stops:
        raise ModelError(
            f"{folder} names no end-of-text token: write eos_token_id into generation_config.json"
        )
    return stops
