"""What a client may ask: the body of a chat completion, read and refused field by field.

    bytes -> parse -> Ask: messages with places for media, links to the media, options

Nothing is opened here and nothing is computed. A request may lower a ceiling of the server (Limits)
and never raise it. What would change the answer and is not honoured is a Refusal that names it.
"""

import hashlib
import json
import math
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from ..errors import ZipvlError, printable

STRUCTURE = 2**20  # brackets and commas of a body: each may become an object of 100 bytes
DIGITS = 20  # of a whole number
TEXT = 2**22  # characters of all messages (model/chat.py, PROMPT_SIZE)
STOPS, STOP_LENGTH = 4, 256  # how many, and characters of each
ROLES = ("system", "user", "assistant")
KINDS = {"image_url": "image", "video_url": "video"}

# What says nothing about the answer, whatever it holds.
HARMLESS = {"user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"}
# What would change the answer, but for these values, as JSON writes them; null is always one.
NEUTRAL = {
    "n": ("1",),
    "best_of": ("1",),
    "logprobs": ("false",),
    "top_logprobs": ("0",),
    "presence_penalty": ("0", "0.0"),
    "frequency_penalty": ("0", "0.0"),
    "repetition_penalty": ("1", "1.0"),
    "min_p": ("0", "0.0"),
    "logit_bias": ("{}",),
    "response_format": ('{"type": "text"}',),
    "modalities": ('["text"]',),
    "tools": ("[]",),
    "functions": ("[]",),
    "tool_choice": ('"none"', '"auto"'),
    "store": ("false",),
    "mm_processor_kwargs": ("{}",),
    "chat_template_kwargs": ("{}",),
}


class Refusal(ZipvlError):
    """An answer other than the one that was asked for: an HTTP status and OpenAI's error object."""

    def __init__(
        self, status: int, text: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(text)
        self.status, self.reason = status, code
        self.param = printable(param)[:200] if param else None

    def error(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        said = {"message": str(self), "type": kind, "param": self.param, "code": self.reason}
        return {"error": said}


@dataclass(frozen=True)
class Limits:
    """Ceilings of the server, of one request each."""

    body: int = 64 * 2**20  # bytes
    parts: int = 256  # messages and parts of their contents
    media: int = 32 * 2**20  # bytes in data: URLs, decoded
    pixels: int = 2**25  # of a picture, or of a frame as the video's header says
    frames: int = 128  # of all videos
    visual: int = 32768  # tokens of all media
    context: int = 32768  # tokens of the prompt and the answer
    answer: int = 1024  # new tokens


@dataclass(frozen=True)
class Link:
    """A medium that a part of a message points to."""

    kind: str  # image | video
    url: str
    where: str  # the field it stands in, as in messages[0].content[1].image_url


@dataclass(frozen=True)
class Ask:
    """A request that makes sense so far."""

    messages: list[dict[str, Any]]  # as Engine.prepare takes them
    links: list[Link]  # in the order of their places
    frames: int | None = None  # of each video: at most so many; None: as the server has it
    fps: float | None = None
    rate: str = ""  # the field that has fps
    max_new_tokens: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stream: bool = False
    usage: bool = False  # of a stream: whether a last chunk has it

    @property
    def system(self) -> str:
        """A hash of its system messages."""
        said = json.dumps([m["content"] for m in self.messages if m["role"] == "system"])
        return hashlib.sha256(said.encode()).hexdigest()


def refuse(where: str, fault: str) -> NoReturn:
    raise Refusal(400, f"{where} {fault}", where)


def shown(value: object) -> str:
    """A value for a message; what holds others by its kind alone."""
    names = {"dict": "an object", "list": "a list"}
    return names.get(type(value).__name__) or f"{value!r:.60}"


def parse(body: bytes, limits: Limits, model: str) -> Ask:
    """The request that `body` is. Raises Refusal: 400, or 404 for another model's name."""
    try:
        return read(read_json(body), limits, model)
    except RecursionError:
        raise Refusal(400, "the body nests too deeply") from None


def read(raw: Any, limits: Limits, model: str) -> Ask:
    if not isinstance(raw, dict):
        raise Refusal(400, f"the body is {shown(raw)}: send a JSON object")
    raw = given(raw)
    for name, value in raw.items():
        if name in NEUTRAL and json.dumps(value) not in NEUTRAL[name]:
            refuse(name, f"is {shown(value)}, which this server does not honour: leave it out")
        if name not in HONOURED | HARMLESS | NEUTRAL.keys():
            refuse(name, "is not known to this server: leave it out")
    if text(raw.get("model"), "model") != model:
        asked = raw["model"]
        raise Refusal(
            404, f"the model {asked!r:.80} does not exist here: ask for {model!r}", "model",
            "model_not_found",
        )  # fmt: skip
    return options(raw, read_messages(raw.get("messages"), rates(raw, limits), limits), limits)


HONOURED = {
    "model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k",
    "seed", "stop", "stream", "stream_options", "media_io_kwargs",
}  # fmt: skip


# --- JSON -------------------------------------------------------------------------------------


def read_json(body: bytes) -> Any:
    """`body` as JSON without what JSON does not have: NaN, infinite or endless numbers, a key
    twice. Raises Refusal."""
    if sum(map(body.count, (b"[", b"{", b","))) > STRUCTURE:
        raise Refusal(400, f"the body has more than {STRUCTURE} brackets and commas: send less")
    try:
        return json.loads(
            body.decode(), parse_constant=no_number, parse_int=whole, parse_float=finite,
            object_pairs_hook=once,
        )  # fmt: skip
    except UnicodeDecodeError:
        raise Refusal(400, "the body is not UTF-8") from None
    except ValueError as e:
        raise Refusal(400, f"the body is not valid JSON: {e}") from None


def no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number")


def whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a number has more than {DIGITS} digits")
    return int(digits)


def finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError(f"{digits:.40} is too large a number")
    return number


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r:.80} comes twice")
        found[key] = value
    return found


# --- fields -----------------------------------------------------------------------------------


def given(raw: dict[str, Any]) -> dict[str, Any]:
    """An object without its nulls, which mean the same as nothing."""
    return {key: value for key, value in raw.items() if value is not None}


def text(value: object, field: str) -> str:
    if not isinstance(value, str):
        refuse(field, f"is {shown(value)}: give text" if value is not None else "is missing")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        refuse(field, "is not valid Unicode text: half of a surrogate pair is no character")
    return value


def section(value: object, field: str, known: set[str]) -> dict[str, Any]:
    """An object with `known` keys only; none: {}."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        refuse(field, f"is {shown(value)}: give an object")
    raw = given(value)
    for key in raw.keys() - known:
        refuse(f"{field}.{key}", "is not known to this server: leave it out")
    return raw


def number(raw: dict[str, Any], name: str, usual: Any, low: float, high: float,
           field: str = "") -> Any:  # fmt: skip
    """The number raw[name] from `low` to `high`, whole where the usual one is."""
    value, field = raw.get(name, usual), field or name
    kinds = (float, int) if isinstance(usual, float) else (int,)
    if name in raw and (type(value) not in kinds or not low <= value <= high):
        kind = "number" if isinstance(usual, float) else "whole number"
        reach = "on" if high == math.inf else f"to {high:g}"
        refuse(field, f"is {shown(value)}: give a {kind} from {low:g} {reach}")
    return value


def switch(raw: dict[str, Any], name: str, field: str = "") -> bool:
    value = raw.get(name, False)
    if not isinstance(value, bool):
        refuse(field or name, f"is {shown(value)}: give true or false")
    return value


def options(raw: dict[str, Any], ask: Ask, limits: Limits) -> Ask:
    """`ask` with what the request says of the answer."""
    stream = switch(raw, "stream")
    extra = section(raw.get("stream_options"), "stream_options", {"include_usage"})
    if "stream_options" in raw and not stream:
        refuse("stream_options", "goes with stream: true only")
    names = ("max_tokens", "max_completion_tokens")  # one and the same, the old name and the new
    lengths = {number(raw, n, limits.answer, 1, math.inf) for n in names if n in raw}
    if len(lengths) > 1:
        refuse(names[0], "and max_completion_tokens differ: give one of them")
    return replace(
        ask,
        max_new_tokens=min([limits.answer, *lengths]),
        temperature=float(number(raw, "temperature", 0.0, 0, 100)),
        top_p=float(number(raw, "top_p", 1.0, 1e-9, 1)),
        top_k=number(raw, "top_k", 0, 0, 2**31),
        seed=number(raw, "seed", 0, -(2**63), 2**63 - 1),
        stop=read_stop(raw.get("stop")),
        stream=stream,
        usage=switch(extra, "include_usage", "stream_options.include_usage"),
    )


def read_stop(value: object) -> tuple[str, ...]:
    stops = value if isinstance(value, list) else [value] if value is not None else []
    if len(stops) > STOPS:
        refuse("stop", f"has {len(stops)} texts: give at most {STOPS}")
    for stop in stops:
        if not 0 < (length := len(text(stop, "stop"))) <= STOP_LENGTH:
            refuse("stop", f"has {length} characters: give 1 to {STOP_LENGTH}")
    return tuple(stops)


# --- messages ---------------------------------------------------------------------------------

RATES = {"num_frames": "frames", "nframe": "frames", "fps": "fps"}


@dataclass
class Rates:
    """How all videos of a request are sampled, and the field that says so."""

    most: int  # frames
    found: dict[str, Any] = field(default_factory=dict)  # frames, fps
    fields: dict[str, str] = field(default_factory=dict)

    def take(self, raw: dict[str, Any], where: str) -> None:
        """What an object says of it, which counts for every video."""
        for key in sorted(raw.keys() & RATES.keys()):
            name, place = RATES[key], f"{where}.{key}"
            if name == "fps":
                value = number(raw, key, 1.0, 1e-9, 1000, place)
            else:
                value = number(raw, key, 1, 1, self.most, place)
            if self.found.setdefault(name, value) != value:
                refuse(place, f"differs from {self.fields[name]}: videos of a request share it")
            self.fields.setdefault(name, place)


def rates(raw: dict[str, Any], limits: Limits) -> Rates:
    """What media_io_kwargs says."""
    found = Rates(limits.frames)
    usual = section(raw.get("media_io_kwargs"), "media_io_kwargs", {"video"})
    video = section(usual.get("video"), "media_io_kwargs.video", {"num_frames", "fps"})
    found.take(video, "media_io_kwargs.video")
    return found


def read_messages(value: object, rates: Rates, limits: Limits) -> Ask:
    """Messages, links, and how videos are sampled."""
    if not isinstance(value, list) or not value:
        refuse("messages", f"is {shown(value)}: give a list of messages")
    count = len(value)  # before anything is made of them
    for message in value:
        content = message.get("content") if isinstance(message, dict) else None
        count += len(content) if isinstance(content, list) else 0
    if count > limits.parts:
        refuse("messages", f"has {count} messages and parts: at most {limits.parts} are allowed")
    messages, links = [], list[Link]()
    for i, message in enumerate(value):
        raw = section(message, f"messages[{i}]", {"role", "content"})
        role, content = raw.get("role"), raw.get("content")
        if role not in ROLES:
            refuse(f"messages[{i}].role", f"is {shown(role)}: give one of {', '.join(ROLES)}")
        where = f"messages[{i}].content"
        if isinstance(content, list):
            named = [(f"{where}[{j}]", part) for j, part in enumerate(content)]
            parts = [read_part(part, place, role, links, rates) for place, part in named]
        else:
            parts = [{"type": "text", "text": text(content, where)}]
        messages.append({"role": role, "content": parts})
    if (size := sum(len(p.get("text", "")) for m in messages for p in m["content"])) > TEXT:
        refuse("messages", f"has {size} characters of text: at most {TEXT} are allowed")
    found, fields = rates.found, rates.fields
    return Ask(messages, links, found.get("frames"), found.get("fps"), fields.get("fps", ""))


def read_part(part: object, where: str, role: str, links: list[Link],
              rates: Rates) -> dict[str, str]:  # fmt: skip
    """A part as the engine takes it; its medium goes to `links`, how it is sampled to `rates`."""
    if isinstance(part, str):
        return {"type": "text", "text": text(part, where)}
    raw = section(part, where, {"type", "text", "uuid", *KINDS})
    named = [key for key in ("text", *KINDS) if key in raw]
    kind = named[0] if named else ""
    if len(named) != 1 or raw.get("type", kind) != kind:
        refuse(where, f"is no part: give a type and what it names, {', '.join(['text', *KINDS])}")
    if kind == "text":
        return {"type": "text", "text": text(raw["text"], f"{where}.text")}
    if role != "user":
        refuse(where, f"is in a message from the {role}: media belong to the user's")
    where = f"{where}.{kind}"
    link = {"url": raw[kind]} if isinstance(raw[kind], str) else raw[kind]
    link = section(link, where, {"url"} | ({"detail"} if kind == "image_url" else RATES.keys()))
    if link.get("detail", "auto") != "auto":
        refuse(f"{where}.detail", f"is {shown(link['detail'])}: only auto is honoured")
    links.append(Link(KINDS[kind], text(link.get("url"), f"{where}.url"), where))
    rates.take(link, where)
    return {"type": KINDS[kind]}
