"""The tokenizer of a checkpoint folder, its named tokens and its stop tokens, and ids to text.

tokenizer.json              read as written
tokenizer.model             SentencePiece (original LLaVA-1.5 and 1.6), read without protobuf
vocab.json + merges.txt     Qwen2's byte-level BPE
"""

import codecs
import os
import re
import struct
from collections.abc import Iterator
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from ..config import ModelConfig, check_file, optional_json, read_bytes, read_json
from ..errors import ModelError

TOKENIZER_BYTES, PIECES_BYTES = 2**25, 2**22  # of tokenizer.json; of tokenizer.model
PIECES, PIECE_LENGTH, MERGES = 2**18, 2**8, 2**20  # characters of one; ways to join two
ADDED = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
HALF = re.compile("[\ud800-\udfff]")  # of a UTF-16 pair: no text that a tokenizer takes
QWEN2_SPLIT = (  # one digit at a time; transformers models/qwen2/tokenization_qwen2.py
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# SentencePiece's spaces: each is "▁", and one stands in front of every stretch of text.
DUMMY_PREFIX = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def load_tokenizer(folder: Path, settings: dict[str, Any]) -> Tokenizer:
    """The tokenizer in `folder`; `settings` is its tokenizer_config.json, {} where there is none.

    Raises ModelError naming the file at fault.
    """
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
    as_json, as_pieces, *as_merges = (os.path.exists(folder / name) for name in names)
    if as_json:
        tok = _from_json(folder / "tokenizer.json")
    elif as_pieces:
        tok = read_sentencepiece(folder / "tokenizer.model")
    elif all(as_merges):
        tok = _from_merges(folder)
    else:
        raise ModelError(
            f"{folder} holds neither tokenizer.json nor tokenizer.model (nor vocab.json with "
            "merges.txt): copy the tokenizer files into it"
        )
    _add_missing(tok, folder, settings)
    return tok


def _from_json(path: Path) -> Tokenizer:
    check_file(path, TOKENIZER_BYTES)
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
        tok.normalizer = DUMMY_PREFIX
        tok.pre_tokenizer = None
    return tok


def _from_merges(folder: Path) -> Tokenizer:
    for name in ("vocab.json", "merges.txt"):
        check_file(folder / name, TOKENIZER_BYTES)
    try:
        vocab, merges = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
        tok = Tokenizer(models.BPE(vocab, merges))
    except Exception as e:  # the library raises no narrower class
        raise ModelError(
            f"{folder / 'vocab.json'} and merges.txt are not a tokenizer ({e}): download them again"
        ) from None
    tok.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    tok.decoder = decoders.ByteLevel()
    return tok


def _add_missing(tok: Tokenizer, folder: Path, settings: dict[str, Any]) -> None:
    """Add the tokens that only tokenizer_config.json or added_tokens.json know, in order of id."""
    plain = optional_json(folder / "added_tokens.json")
    try:
        declared = {i: AddedToken(t, special=True, normalized=False) for t, i in plain.items()}
        for i, record in settings.get("added_tokens_decoder", {}).items():
            known = {k: v for k, v in record.items() if k in ADDED}
            declared[int(i)] = AddedToken(**known)
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


def named_tokens(tok: Tokenizer, folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... as text; files hold them as strings or as token records."""
    known = {"bos_token": "<s>", "eos_token": "</s>"}  # what SentencePiece files call them
    named: dict[str, Any] = {k: v for k, v in known.items() if tok.token_to_id(v) is not None}
    named |= optional_json(folder / "special_tokens_map.json") | settings
    texts = {k: v.get("content") if isinstance(v, dict) else v for k, v in named.items()}
    return {
        k: v for k, v in texts.items()
        if k.endswith("_token") and isinstance(v, str) and not HALF.search(v)
    }  # fmt: skip


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
    sources = [raw, raw.get("text_config"), optional_json(folder / "generation_config.json")]
    found: list[Any] = []
    for source in (s for s in sources if isinstance(s, dict)):
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


# SentencePiece. The file is one protobuf message; field numbers are those of
# sentencepiece_model.proto: ModelProto {1: piece..., 2: trainer_spec, 3: normalizer_spec},
# piece {1: text, 2: score, 3: type}.
PIECE, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # types of a piece


def read_sentencepiece(path: Path) -> Tokenizer:
    """The tokenizer in `path`: BOS in front, and every stretch of text gets the dummy prefix "▁".

    Raises ModelError when the file is damaged or is not a BPE model with plain normalisation.
    """
    data = read_bytes(path, PIECES_BYTES)
    try:
        pieces, kind, charsmap = _parse_model(data)
        if kind == 2 and not charsmap:
            return _from_pieces(pieces)
    except (LookupError, ValueError, TypeError, AttributeError, struct.error):
        raise ModelError(f"{path} is not a SentencePiece model: download the file again") from None
    raise ModelError(
        f"{path} is a SentencePiece model that is not plain BPE: save the tokenizer as "
        "tokenizer.json beside it"
    )


def _protobuf(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) pairs of one protobuf message."""
    stream = BytesIO(data)

    def varint() -> int:
        value = 0
        for shift in range(0, 70, 7):  # 64 bits at most
            (byte,) = stream.read(1)
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a number without end")

    while stream.tell() < len(data):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}[wire] if wire != 2 else varint()
        value = stream.read(min(size, len(data)))
        if len(value) < size:
            raise ValueError("the message ends inside a field")
        yield number, value


def _parse_model(data: bytes) -> tuple[list[tuple[str, float, int]], int, bytes]:
    """(pieces as (text, score, type), model kind (2 = BPE), compiled normalisation rules)."""
    found: dict[int, list[dict[int, Any]]] = {1: [], 2: [{}], 3: [{}]}
    for number, value in _protobuf(data):
        if number in found:
            found[number].append(dict(_protobuf(value)))
            if len(found[number]) > PIECES:
                raise ValueError("too many pieces")
    trainer, normalizer = found[2][-1], found[3][-1]
    if not (found[1] and trainer and normalizer):
        raise ValueError("the message has no pieces, trainer or normaliser: it is cut short")
    pieces = []
    for piece in found[1]:
        (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
        pieces.append((piece[1].decode(), score, piece.get(3, PIECE)))
    return pieces, trainer.get(3, 1), normalizer.get(2, b"")


def _from_pieces(pieces: list[tuple[str, float, int]]) -> Tokenizer:
    vocab = {text: i for i, (text, _, _) in enumerate(pieces)}
    if len(vocab) < len(pieces) or max(map(len, vocab)) > PIECE_LENGTH:
        raise ValueError("a piece stands there twice or is no word")
    pairs = (
        (-score, -cut, (text[:cut], text[cut:]))
        for text, score, kind in pieces
        for cut in range(1, len(text))
        if kind == PIECE and text[:cut] in vocab and text[cut:] in vocab
    )
    ranked = list(islice(pairs, MERGES + 1))
    if len(ranked) > MERGES:
        raise ValueError("too many ways to join pieces")
    # SentencePiece merges the best-scored pair, leftmost first. Merges of equal score (runs of
    # spaces) then grow from the left, which is what preferring the longer left part does.
    merges = [pair for _, _, pair in sorted(ranked, key=lambda m: m[:2])]
    unknown = next((text for text, _, kind in pieces if kind == UNKNOWN), None)
    has_bytes = any(kind == BYTE for _, _, kind in pieces)
    tok = Tokenizer(
        models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes)
    )
    tok.normalizer = DUMMY_PREFIX
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tok.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tok.add_special_tokens([t for t, _, kind in pieces if kind in (UNKNOWN, CONTROL)])
    tok.add_tokens([AddedToken(t, normalized=False) for t, _, k in pieces if k == USER_DEFINED])
    if "<s>" in vocab:
        tok.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
        )
    return tok


# GPT-2's printable stand-in of every byte -> the byte (openai/gpt-2 encoder.py).
BYTE_OF_LETTER = {chr(b): b for b in [*range(33, 127), *range(161, 173), *range(174, 256)]}
OTHERS = sorted({*range(256)} - {*BYTE_OF_LETTER.values()})
BYTE_OF_LETTER |= {chr(256 + i): b for i, b in enumerate(OTHERS)}
BYTE_OF_PIECE = {f"<0x{b:02X}>": bytes([b]) for b in range(256)}


class Detokenizer:
    """Text of one answer as its tokens come, never half a character, in constant time a token.

    Tokens become bytes and bytes become text, so a character split over tokens waits for its last
    byte, and what is no UTF-8 becomes U+FFFD. Special tokens are left out.
    """

    def __init__(self, tok: Tokenizer, special: frozenset[int]) -> None:
        self._tok, self._special = tok, special
        self._byte_level = isinstance(tok.decoder, decoders.ByteLevel)
        self._strip = not self._byte_level  # the dummy prefix: one space, at the very start only
        self._text = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that `token` completes, "" when there are none yet."""
        data = b"" if token in self._special else self._bytes(token)
        if self._strip and data:
            self._strip, data = False, data.removeprefix(b" ")
        return self._text.decode(data)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character cut short, else ""."""
        return self._text.decode(b"", final=True)

    def _bytes(self, token: int) -> bytes:
        piece = self._tok.id_to_token(token) or ""
        if not self._byte_level:
            return BYTE_OF_PIECE.get(piece) or piece.replace("▁", " ").encode()
        if all(c in BYTE_OF_LETTER for c in piece):
            return bytes(BYTE_OF_LETTER[c] for c in piece)
        return piece.encode()  # an added token is written as it reads
