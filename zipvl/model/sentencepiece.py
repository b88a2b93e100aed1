"""`tokenizer.model` (SentencePiece, BPE kind) as a `tokenizers` tokenizer, read without protobuf.

The file is one protobuf message; field numbers are those of sentencepiece_model.proto:
ModelProto {1: piece..., 2: trainer_spec, 3: normalizer_spec}, piece {1: text, 2: score, 3: type}.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from ..errors import ModelError

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # piece types; 1 is an ordinary piece


def read_sentencepiece(path: Path) -> Tokenizer:
    """The tokenizer in `path`: BOS in front, and every stretch of text gets the dummy prefix "▁".

    Raises ModelError when the file is damaged or is not a BPE model with plain normalisation.
    """
    try:
        pieces, kind, charsmap = _parse(path.read_bytes())
    except (OSError, LookupError, ValueError, TypeError, AttributeError, struct.error):
        raise ModelError(f"{path} is not a SentencePiece model: download the file again") from None
    if kind != 2 or charsmap:
        raise ModelError(
            f"{path} is a SentencePiece model that is not plain BPE: save the tokenizer as "
            "tokenizer.json beside it"
        )
    return _build(pieces)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) pairs of one protobuf message."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(data):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}[wire] if wire != 2 else varint()
        if at + size > len(data):
            raise ValueError("the message ends inside a field")
        yield number, data[at : at + size]
        at += size


def _parse(data: bytes) -> tuple[list[tuple[str, float, int]], int, bytes]:
    """(pieces as (text, score, type), model kind (2 = BPE), compiled normalisation rules)."""
    pieces = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            score = struct.unpack("<f", piece.get(2, bytes(4)))[0]
            pieces.append((piece[1].decode(), score, piece.get(3, 1)))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    if not (pieces and trainer and normalizer):
        raise ValueError("the message has no pieces, trainer or normaliser: it is cut short")
    return pieces, trainer.get(3, 1), normalizer.get(2, b"")


def _build(pieces: list[tuple[str, float, int]]) -> Tokenizer:
    vocab = {text: i for i, (text, _, _) in enumerate(pieces)}
    ranked = [
        (-score, -cut, text[:cut], text[cut:])
        for text, score, kind in pieces
        for cut in range(1, len(text))
        if kind == 1 and text[:cut] in vocab and text[cut:] in vocab
    ]
    # SentencePiece merges the best-scored pair, leftmost first. Merges of equal score (runs of
    # spaces) then grow from the left, which is what preferring the longer left part does.
    ranked.sort(key=lambda m: m[:2])
    merges = [(left, right) for _, _, left, right in ranked]
    unknown = next((text for text, _, kind in pieces if kind == UNKNOWN), None)
    has_bytes = any(kind == BYTE for _, _, kind in pieces)
    tok = Tokenizer(
        models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes)
    )
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tok.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tok.add_special_tokens([t for t, _, kind in pieces if kind in (UNKNOWN, CONTROL)])
    tok.add_tokens([AddedToken(t, normalized=False) for t, _, k in pieces if k == USER_DEFINED])
    if "<s>" in vocab:
        tok.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
        )
    return tok
