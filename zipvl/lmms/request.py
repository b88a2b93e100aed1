"""What lmms-eval asks, in zipvl's words: messages, media, and how to generate."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..engine.inputs import Message
from ..engine.sampler import Sampling
from ..errors import UsageError

NEW_TOKENS = 256  # where a task says nothing
KNOWN = {
    "max_new_tokens", "temperature", "top_p", "top_k", "seed", "do_sample", "until", "num_beams",
}  # fmt: skip
IDLE = {"image_aspect_ratio", "skip_special_tokens"}  # switches of other models in many tasks


@dataclass(frozen=True)
class Medium:
    """A picture, or a path to a video and what to take of it."""

    kind: str  # image | video
    source: Any
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class Ask:
    """One request of lmms-eval."""

    messages: list[Message]
    media: list[Medium]  # in order
    new_tokens: int
    sampling: Sampling
    until: tuple[str, ...]


def read(messages: Sequence[dict[str, Any]], options: dict[str, Any]) -> Ask:
    """A chat request: messages of parts with a `type`, and the task's generation_kwargs. Raises
    UsageError for what would change answers and is not there."""
    media = list(find(messages))
    told = [{"role": m["role"], "content": list(map(plain, m["content"]))} for m in messages]
    if unknown := sorted(options.keys() - KNOWN - IDLE):
        raise UsageError(f"the task asks for {unknown[0]}, which zipvl does not have")
    if options.get("num_beams") not in (None, 1):
        raise UsageError(f"the task asks for {options['num_beams']} beams: zipvl has one")
    heat = options.get("temperature") or 0.0
    greedy = options.get("do_sample") is False or not heat
    top_p, top_k, seed = (options.get(name) for name in ("top_p", "top_k", "seed"))
    sampling = Sampling(0.0 if greedy else heat, top_p or 1.0, top_k or 0, seed or 0)
    until = options.get("until") or []
    until = [until] if isinstance(until, str) else until
    most = options.get("max_new_tokens") or NEW_TOKENS
    return Ask(told, media, most, sampling, tuple(filter(None, until)))


def find(messages: Sequence[dict[str, Any]]) -> Iterator[Medium]:
    for part in (part for m in messages for part in m["content"]):
        if part["type"] == "image":
            yield Medium("image", part["url"])
        elif part["type"] == "video":
            yield Medium("video", part["url"], part.get("start_time"), part.get("end_time"))


def plain(part: dict[str, Any]) -> dict[str, str]:
    """A part as Engine.prepare takes it."""
    if part["type"] not in ("text", "image", "video"):
        raise UsageError(f"the task has {part['type']}, which zipvl cannot hear or see")
    return (
        {"type": "text", "text": part["text"]} if part["type"] == "text" else {"type": part["type"]}
    )


def ended(text: str, until: tuple[str, ...]) -> str:
    """`text` up to the first of the texts that end an answer."""
    return text[: min((at for end in until if (at := text.find(end)) >= 0), default=len(text))]
