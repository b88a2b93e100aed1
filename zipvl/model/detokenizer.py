"""New tokens to text as they come, never half a character."""

import codecs

from tokenizers import Tokenizer, decoders


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in of every byte -> the byte (openai/gpt-2 encoder.py)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


BYTES = _byte_alphabet()
BYTE_PIECES = {f"<0x{b:02X}>": bytes([b]) for b in range(256)}


class Detokenizer:
    """Text of one answer, a token at a time, in constant time a token.

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
        if token in self._special:
            return ""
        return self._start(self._text.decode(self._bytes(token)))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character cut short, else ""."""
        return self._start(self._text.decode(b"", final=True))

    def _start(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text

    def _bytes(self, token: int) -> bytes:
        piece = self._tok.id_to_token(token) or ""
        if not self._byte_level:
            return BYTE_PIECES.get(piece) or piece.replace("▁", " ").encode()
        if all(c in BYTES for c in piece):
            return bytes(BYTES[c] for c in piece)
        return piece.encode()  # an added token is written as it reads
