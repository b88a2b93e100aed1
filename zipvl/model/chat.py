"""From a conversation with pictures and videos to token ids, and back to text.

  messages -> template (jinja) -> one string with markers -> runs of ids and media, in order

In the HF layout a marker is a token of the vocabulary; the original layout has none and splits the
text on "<image>" (upstream: LLaVA mm_utils.py, tokenizer_image_token).

The template is the checkpoint's own jinja file, or the built-in one of its family. It sees
`messages` (role, content), the tokenizer's special tokens and `add_generation_prompt`, as
transformers passes them. Built-in ones take content as one string.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..config import ModelConfig, optional_json, read_bytes, shown
from ..errors import ModelError, OutOfMemory, UsageError
from .sandbox import TEMPLATE_SOURCE, Meter, Overrun
from .tokenizer import Detokenizer, bos_ids, load_tokenizer, named_tokens, stop_ids

PROMPT_SIZE = 2**22  # characters of a prompt: tokenising them takes seconds and 200 bytes each
Part = dict[str, str]  # {"type": "image"} | {"type": "video"} | {"type": "text", "text": ...}
Message = dict[str, Any]  # {"role": "system" | "user" | "assistant", "content": [Part, ...]}


@dataclass(frozen=True)
class Chat:
    """Tokenizer and prompt template of one checkpoint (messages: see `Message` and `Part`)."""

    tokenizer: Tokenizer
    template: "PromptTemplate"
    markers: dict[str, str]  # kind of medium -> what stands for it in the rendered prompt
    marks: dict[str, str]  # and what for each run of its tokens: mostly the same
    marker_ids: frozenset[int]  # ids of these; none in the original layout
    around: tuple[str, str]  # what stands around a marker in a text without parts
    bos: tuple[int, ...]  # in front of every prompt, once
    stop_ids: frozenset[int]
    vocab_size: int  # len(tokenizer) with added tokens: ids from here on must never be sampled
    special_ids: frozenset[int]  # never shown

    @classmethod
    def from_folder(cls, folder: Path, config: ModelConfig, template: str | None = None) -> "Chat":
        """Read the tokenizer and template in `folder`.

        `template`: None for the checkpoint's own (else its family's), the name of a built-in one,
        or a .jinja file. Raises ModelError or UsageError naming the file or argument at fault: a
        template that cannot put any question is told here, before media are read.
        """
        settings = optional_json(folder / "tokenizer_config.json")
        tok = load_tokenizer(folder, settings)
        tokens = named_tokens(tok, folder, settings)
        ids = _marker_ids(tok, folder, config)
        added = tok.get_added_tokens_decoder()
        marks = {kind: added[i].content for kind, i in ids.items()}
        marks = marks or {"image": "<image>", "video": "<image>"}
        chat = cls(
            tokenizer=tok,
            template=load_template(folder, config, template, tokens),
            markers=marks | config.markers,
            marks=marks,
            marker_ids=frozenset(ids.values()),
            around=config.around,
            bos=bos_ids(tok, settings, tokens),
            stop_ids=stop_ids(tok, folder, config, tokens),
            vocab_size=max(tok.get_vocab().values()) + 1,
            special_ids=frozenset(i for i, token in added.items() if token.special),
        )
        question = {"type": "text", "text": "probe"}
        try:
            chat.render([{"role": "user", "content": [question]}])
        except Overrun:
            raise
        except ModelError:  # it may want a picture
            chat.render([{"role": "user", "content": [{"type": "image"}, question]}])
        return chat

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
            if found := self._found(part.get("text", "")):
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

    def tokenize(self, messages: list[Message],
                 placed: Sequence[Sequence[str | int]] | None = None,
                 ) -> list[list[int] | str]:  # fmt: skip
        """Runs of ids with "image" and "video" between them, in order; BOS once where there is one.

        `placed` says of each medium what stands for it (vision/family.py): its kind is given once
        for each run of visual tokens. In the HF layout the ids are those of the HF processors
        before they repeat a placeholder. Raises as `render` does.
        """
        text = self.render(messages)
        media = [p["type"] for m in messages for p in m["content"] if p["type"] != "text"]
        placed = [[1] for _ in media] if placed is None else placed
        kinds, parts = [], re.split(self._pattern, text)
        for i, (kind, one) in enumerate(zip(media, placed, strict=True)):
            mark = self.marks[kind]
            parts[i] += "".join(mark if isinstance(part, int) else part for part in one)
            kinds += [kind for part in one if isinstance(part, int)]
        runs = self._runs("".join(parts))
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
        if len(text) > PROMPT_SIZE:
            raise UsageError(
                f"the prompt has {len(text):,} characters, and {PROMPT_SIZE:,} may be: shorten it, "
                "or choose another template if that made it so long"
            )
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

    @property
    def _pattern(self) -> str:
        return "|".join(map(re.escape, {*self.markers.values(), *self.marks.values()}))

    def _found(self, text: str) -> list[str]:
        return re.findall(self._pattern, text)

    def _forms(self, messages: list[Message]) -> Iterator[list[Message]]:
        """Ways to hand the conversation to the template, the one HF uses first.

        Many HF templates write all media of a message before its text. Where that would change the
        order, the message goes in as one text part with the markers already in place.
        """
        parts = self.template.takes_parts
        first = all(self._media_first(m["content"]) for m in messages)
        if parts and (first or self.template.keeps_order):
            yield messages
        texts = [self._flat(m["content"]) for m in messages]
        contents: list[Any] = [[{"type": "text", "text": t}] for t in texts] if parts else texts
        yield [{"role": m["role"], "content": c} for m, c in zip(messages, contents, strict=True)]

    def _media_first(self, parts: list[Part]) -> bool:
        kinds = [part["type"] for part in parts]
        return "text" not in kinds[: len(kinds) - kinds.count("text")]

    def _flat(self, parts: list[Part]) -> str:
        """Content as one string: "<image> <image>\\n" + text, or each marker where its part is."""
        shown = {kind: marker.join(self.around) for kind, marker in self.markers.items()}
        if not self._media_first(parts):
            return "".join(shown.get(p["type"]) or p["text"] for p in parts)
        media = " ".join(shown[p["type"]] for p in parts if p["type"] != "text")
        return (media + "\n" if media else "") + "".join(p.get("text", "") for p in parts)

    def _runs(self, text: str) -> list[list[int]]:
        """Ids between the markers, one run more than there are markers."""
        if not self.marker_ids:
            return [self.encode(run) for run in text.split(self.marks["image"])]
        runs: list[list[int]] = [[]]
        for i in self.encode(text):
            if i in self.marker_ids:
                runs.append([])
            else:
                runs[-1].append(i)
        return runs


def _marker_ids(tok: Tokenizer, folder: Path, config: ModelConfig) -> dict[str, int]:
    """Ids of the markers, {} in the original layout."""
    if config.layout == "original":
        return {}
    ids = {"image": config.image_token, "video": config.video_token}
    added = tok.get_added_tokens_decoder()
    for kind, i in ids.items():
        if i not in added:
            raise ModelError(
                f"{folder}: the tokenizer has no added token with id {i}, which config.json names "
                f"as the {kind} placeholder: the tokenizer belongs to another checkpoint"
            )
    return ids


@dataclass(frozen=True)
class PromptTemplate:
    """A compiled template. `name` is a built-in's name or the file it comes from."""

    name: str
    source: Callable[..., str]
    tokens: dict[str, str]  # bos_token, eos_token, ... of the tokenizer

    def render(self, messages: list[dict[str, Any]]) -> str:
        """The prompt up to where the answer starts.

        Raises ModelError when the template fails, Overrun when it passes a ceiling, OutOfMemory.
        """
        try:
            return self.source(messages=messages, add_generation_prompt=True, **self.tokens)
        except MemoryError:
            raise OutOfMemory(f"out of memory in the chat template {self.name}") from None
        except Exception as e:  # a template is a foreign program: anything can come out of it
            kind = Overrun if isinstance(e, Overrun) else ModelError
            raise kind(
                f"the chat template {self.name} fails on this conversation ({e!s:.200}): "
                f"choose another template ({', '.join(BUILT_IN)})"
            ) from None

    @cached_property
    def takes_parts(self) -> bool:
        """Whether content may be a list of parts; many templates insert it as a string."""
        part = {"type": "text", "text": "probe"}
        try:
            text = self.render([{"role": "user", "content": [part]}])
        except Overrun:
            raise
        except ModelError:
            return False
        return "probe" in text and "'text'" not in text

    @cached_property
    def keeps_order(self) -> bool:
        """Whether it writes parts where they are, not media first."""
        words = [{"type": "text", "text": text} for text in ("probe", "again")]
        content = [words[0], {"type": "image"}, words[1]]
        try:
            text = self.render([{"role": "user", "content": content}])
        except Overrun:
            raise
        except ModelError:
            return False
        return bool(text.partition("probe")[2].partition("again")[0].strip())


def load_template(
    folder: Path, config: ModelConfig, choice: str | None, tokens: dict[str, str]
) -> PromptTemplate:
    """The template `choice` names (built-in or .jinja file); None: the checkpoint's, else built-in.

    Raises UsageError for an unknown choice, ModelError for a template that does not compile.
    """
    name, source = _named(choice) if choice is not None else _shipped(folder, config)
    try:
        return PromptTemplate(name, Meter().compiled(source), tokens)
    except MemoryError:
        raise OutOfMemory(f"out of memory in the chat template {name}") from None
    except Exception as e:  # also from Python's compiler: a template may nest too deeply for it
        raise ModelError(
            f"the chat template {name} is not valid jinja ({e!s:.200}): choose another template "
            f"({', '.join(BUILT_IN)})"
        ) from None


def _named(choice: str) -> tuple[str, str]:
    if not isinstance(choice, str | os.PathLike):
        raise UsageError(f"template is {choice!r:.60}: give a name or a .jinja file")
    if choice in BUILT_IN:
        return choice, BUILT_IN[choice]
    try:
        return choice, _read_template(Path(choice))
    except (ModelError, ValueError):
        raise UsageError(
            f"template {choice!r} is neither built in ({', '.join(BUILT_IN)}) nor a readable file"
        ) from None


def _shipped(folder: Path, config: ModelConfig) -> tuple[str, str]:
    own = folder / "chat_template.jinja"
    if os.path.exists(own):
        try:
            return str(own), _read_template(own)
        except ValueError as e:
            raise ModelError(f"{own} is not readable ({e}): download the file again") from None
    for file in ("chat_template.json", "tokenizer_config.json"):
        found = optional_json(folder / file).get("chat_template")
        if isinstance(found, list):  # several named templates: "default" answers, others use tools
            named = {str(t.get("name")): t for t in found if isinstance(t, dict)}
            found = found if len(named) < len(found) else named.get("default", {}).get("template")
        if isinstance(found, str):
            return str(folder / file), found
        if found is not None:
            raise ModelError(
                f"{folder / file}: chat_template is {shown(found)}, expected text or a list of "
                "templates with a name each"
            )
    name = _default(config)
    return name, BUILT_IN[name]


def _read_template(path: Path) -> str:
    """Text of a template file. Raises ModelError, ValueError."""
    return read_bytes(path, 4 * TEMPLATE_SOURCE).decode()


def _default(config: ModelConfig) -> str:
    """The built-in template a family was trained with."""
    by_family = {"llava": "vicuna", "llava_next": "llava_v1"} if config.layout == "hf" else {}
    by_decoder = {"mistral": "mistral_instruct", "qwen2": "qwen_1_5", "qwen3": "qwen_1_5"}
    return by_decoder.get(config.text.kind) or by_family.get(config.family, "vicuna_v1")


# The built-in templates.

POLITE = (
    "A chat between a curious {0} and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the {0}'s questions. "
)


def _vicuna(system: str) -> str:
    """A space ends a question, </s> an answer (LLaVA conversation.py, SeparatorStyle.TWO)."""
    return (
        "{% if messages[0].role == 'system' %}{{ messages[0].content }} "
        "{% else %}" + system + "{% endif %}"
        "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} "
        "{% elif m.role == 'assistant' %}ASSISTANT: {{ m.content }}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )


def _chatml(system: str, after: str = "\n") -> str:
    """<|im_start|>role, the text, <|im_end|> and `after` (conversation.py, CHATML and MPT)."""
    return (
        "{% if messages[0].role != 'system' %}"
        "<|im_start|>system\n" + system + "<|im_end|>" + after + "{% endif %}"
        "{% for m in messages %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>" + after + "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


BUILT_IN = {
    "vicuna_v1": _vicuna(POLITE.format("user")),  # LLaVA-1.5, 1.6 and NeXT-Video as trained
    "llava_v1": _vicuna(POLITE.format("human")),  # what the original command line picks for "v1"
    "vicuna": _vicuna(""),  # LLaVA-1.5 in the HF layout: no system prompt
    "mistral_instruct": (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] "
        "{% if loop.index0 == 1 and messages[0].role == 'system' %}"
        "<<SYS>>\n{{ messages[0].content }}\n<</SYS>>\n\n{% endif %}{{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content }} </s>{% endif %}{% endfor %}"
    ),
    "qwen_1_5": _chatml("You are a helpful assistant."),  # OneVision, LongVA
    "qwen_2_5": _chatml("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "chatml_direct": _chatml("Answer the questions.", after=""),
}
