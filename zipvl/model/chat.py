"""From a conversation with pictures and videos to token ids, and back to text.

  messages -> template (jinja) -> one string with markers -> runs of ids and media, in order

In the HF layout a marker is a token of the vocabulary; the original layout has none and splits the
text on "<image>" (upstream: LLaVA mm_utils.py, tokenizer_image_token).
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..config import ModelConfig
from ..errors import ModelError, UsageError
from .detokenizer import Detokenizer
from .templates import PromptTemplate, load_template
from .tokenizer import bos_ids, load_tokenizer, named_tokens, optional_json, stop_ids

Part = dict[str, str]  # {"type": "image"} | {"type": "video"} | {"type": "text", "text": ...}
Message = dict[str, Any]  # {"role": "system" | "user" | "assistant", "content": [Part, ...]}


@dataclass(frozen=True)
class Chat:
    """Tokenizer and prompt template of one checkpoint (messages: see `Message` and `Part`)."""

    tokenizer: Tokenizer
    template: PromptTemplate
    markers: dict[str, str]  # kind of medium -> what stands for it in the rendered prompt
    marker_ids: frozenset[int]  # their ids; none in the original layout
    bos: tuple[int, ...]  # in front of every prompt, once
    stop_ids: frozenset[int]
    vocab_size: int  # len(tokenizer) with added tokens: ids from here on must never be sampled
    special_ids: frozenset[int]  # never shown

    @classmethod
    def from_folder(cls, folder: Path, config: ModelConfig, template: str | None = None) -> "Chat":
        """Read the tokenizer and template in `folder`.

        `template`: None for the checkpoint's own (else its family's), the name of a built-in one,
        or a .jinja file. Raises ModelError or UsageError naming the file or argument at fault.
        """
        settings = optional_json(folder / "tokenizer_config.json")
        tok = load_tokenizer(folder, settings)
        tokens = named_tokens(tok, folder, settings)
        markers = _markers(tok, folder, config)
        names = markers.values() if config.layout == "hf" else ()
        added = tok.get_added_tokens_decoder()
        return cls(
            tokenizer=tok,
            template=load_template(folder, config, template, tokens),
            markers=markers,
            marker_ids=frozenset(i for i, token in added.items() if token.content in names),
            bos=bos_ids(tok, settings, tokens),
            stop_ids=stop_ids(tok, folder, config, tokens),
            vocab_size=max(tok.get_vocab().values()) + 1,
            special_ids=frozenset(i for i, token in added.items() if token.special),
        )

    @property
    def template_name(self) -> str:
        """A built-in's name, or the file the template comes from."""
        return self.template.name

    def render(self, messages: list[Message]) -> str:
        """The whole prompt as text, media as markers, up to where the answer starts.

        Raises UsageError for a marker typed as text, ModelError for a template that cannot place
        the media.
        """
        parts = [part for message in messages for part in message["content"]]
        for part in parts:
            found = self._found(part.get("text", ""))
            if found:
                raise UsageError(
                    f"the prompt holds {found[0]} as text, without a picture or video for it: "
                    "give one medium for each marker or leave the marker out"
                )
        wanted = [self.markers[part["type"]] for part in parts if part["type"] != "text"]
        for form in self._forms(messages):
            text = self.template.render(form)
            if self._found(text) == wanted:
                return text
        raise ModelError(
            f"the chat template {self.template_name} does not place every picture and video of "
            "the prompt: choose a built-in template"
        )

    def tokenize(self, messages: list[Message]) -> list[list[int] | str]:
        """Runs of ids with "image" and "video" between them, in order; BOS once where there is one.

        In the HF layout the ids are those of the HF processors before they repeat a placeholder.
        Raises as `render` does.
        """
        text = self.render(messages)
        kinds = [p["type"] for m in messages for p in m["content"] if p["type"] != "text"]
        runs = list(self._runs(text))
        if len(runs) != len(kinds) + 1:
            raise ModelError("the tokenizer joins a media placeholder with text: use another one")
        if runs[0][: len(self.bos)] != list(self.bos):  # else the template wrote it
            runs[0] = [*self.bos, *runs[0]]
        out: list[list[int] | str] = [runs[0]]
        for kind, run in zip(kinds, runs[1:], strict=True):
            out += [kind, run]
        return [item for item in out if item]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, special tokens in it parsed, no BOS added."""
        try:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError):  # lone surrogates: bytes that were no UTF-8
            raise UsageError("the prompt is not valid Unicode text: pass it as UTF-8") from None

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` without special tokens; equal to the detokenizer's pieces joined."""
        stream = self.detokenizer()
        return "".join([*map(stream.push, ids), stream.flush()])

    def detokenizer(self) -> Detokenizer:
        """A fresh one; each answer needs its own."""
        return Detokenizer(self.tokenizer, self.special_ids)

    def _found(self, text: str) -> list[str]:
        return re.findall("|".join(map(re.escape, self.markers.values())), text)

    def _forms(self, messages: list[Message]) -> Iterator[list[Message]]:
        """Ways to hand the conversation to the template, the one HF uses first.

        HF templates write all media of a message before its text. Where that would change the
        order, the message goes in as one text part with the markers already in place.
        """
        flat = [(m["role"], self._flat(m["content"])) for m in messages]
        if self.template.takes_parts():
            if all(self._media_first(m["content"]) for m in messages):
                yield messages
            yield [{"role": r, "content": [{"type": "text", "text": t}]} for r, t in flat]
        else:
            yield [{"role": r, "content": t} for r, t in flat]

    def _media_first(self, parts: list[Part]) -> bool:
        kinds = [part["type"] for part in parts]
        return "text" not in kinds[: len(kinds) - kinds.count("text")]

    def _flat(self, parts: list[Part]) -> str:
        """Content as one string: "<image> <image>\\n" + text, or each marker where its part is."""
        if not self._media_first(parts):
            return "".join(self.markers.get(p["type"]) or p["text"] for p in parts)
        media = " ".join(self.markers[p["type"]] for p in parts if p["type"] != "text")
        return (media + "\n" if media else "") + "".join(p.get("text", "") for p in parts)

    def _runs(self, text: str) -> Iterator[list[int]]:
        """Ids between the markers, one run more than there are markers."""
        if not self.marker_ids:
            yield from map(self.encode, text.split(self.markers["image"]))
            return
        run: list[int] = []
        for i in self.encode(text):
            if i in self.marker_ids:
                yield run
                run = []
            else:
                run.append(i)
        yield run


def _markers(tok: Tokenizer, folder: Path, config: ModelConfig) -> dict[str, str]:
    """What stands for a picture and for a video; the same where a family has no video token."""
    if config.layout == "original":
        return {"image": "<image>", "video": "<image>"}
    videos = config.family in ("llava_next_video", "llava_onevision")
    ids = {
        "image": config.image_token,
        "video": config.video_token if videos else config.image_token,
    }
    added = tok.get_added_tokens_decoder()
    for kind, i in ids.items():
        if i not in added:
            raise ModelError(
                f"{folder}: the tokenizer has no added token with id {i}, which config.json names "
                f"as the {kind} placeholder: the tokenizer belongs to another checkpoint"
            )
    return {kind: added[i].content for kind, i in ids.items()}
