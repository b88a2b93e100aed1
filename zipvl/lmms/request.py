"""What lmms-eval asks, in zipvl's words: messages, media, how to generate, which frames."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from ..engine.inputs import Message
from ..engine.sampler import Sampling
from ..errors import UsageError
from ..vision.video import sample

NEW_TOKENS = 256  # where a task says nothing
ENDS = ("until", "stop_sequences")  # texts at which an answer ends
KNOWN = {"max_new_tokens", "temperature", "top_p", "top_k", "seed", "do_sample", *ENDS}
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1}  # what zipvl has no more of
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
    sampling: Sampling  # without its seed, so that requests can be answered together
    seed: int
    until: tuple[str, ...]


def read(messages: Sequence[dict[str, Any]], options: dict[str, Any], again: int = 0) -> Ask:
    """A chat request: messages of parts with a `type`, and the task's generation_kwargs; `again`:
    how often it was asked before, for a sample of its own. Raises UsageError for what would change
    answers and is not there."""
    media = list(find(messages))
    told = [{"role": m["role"], "content": list(map(plain, m["content"]))} for m in messages]
    for name in sorted(options.keys() - KNOWN - IDLE):
        if name not in NEUTRAL or options[name] not in (None, NEUTRAL[name]):
            asked = f"{name}={options[name]!r:.60}"
            raise UsageError(f"the task asks for {asked}, which zipvl does not have")
    heat = options.get("temperature") or 0.0
    greedy = options.get("do_sample") is False or not heat
    top_p, top_k, seed = (options.get(name) for name in ("top_p", "top_k", "seed"))
    sampling = Sampling(0.0 if greedy else heat, top_p or 1.0, top_k or 0)
    given = (options.get(name) or [] for name in ENDS)
    ends = [end for some in given for end in ([some] if isinstance(some, str) else some) if end]
    most = options.get("max_new_tokens") or NEW_TOKENS
    return Ask(marked(told), media, most, sampling, (seed or 0) + again, tuple(ends))


def find(messages: Sequence[dict[str, Any]]) -> Iterator[Medium]:
    for part in (part for m in messages for part in m["content"]):
        source = part.get("url")
        if part["type"] == "image":
            yield Medium("image", source)
        elif part["type"] == "video" and isinstance(source, dict):  # a clip, as lmms-eval wraps it
            path = source.get("path") or source.get("url")
            yield Medium("video", path, source.get("video_start"), source.get("video_end"))
        elif part["type"] == "video":
            yield Medium("video", source, part.get("start_time"), part.get("end_time"))


def plain(part: dict[str, Any]) -> dict[str, str]:
    """A part as Engine.prepare takes it."""
    if part["type"] not in ("text", "image", "video"):
        raise UsageError(f"the task has {part['type']}, which zipvl cannot hear or see")
    return (
        {"type": "text", "text": part["text"]} if part["type"] == "text" else {"type": part["type"]}
    )


def marked(messages: list[Message]) -> list[Message]:
    """Messages whose text has a marker, `<image>` or `<video>`, for each medium of a kind show
    these there, as LLaVA does; lmms-eval lists them in front, too."""
    parts = [part for m in messages for part in m["content"]]
    text = "".join(part.get("text", "") for part in parts)
    placed = [
        kind for kind in ("image", "video")
        if sum(part["type"] == kind for part in parts) == text.count(f"<{kind}>")
    ]  # fmt: skip
    return [m | {"content": [p for p in m["content"] if p["type"] not in placed]} for m in messages]


def ended(text: str, until: tuple[str, ...]) -> str:
    """`text` up to the first of the texts that end an answer."""
    return text[: min((at for end in until if (at := text.find(end)) >= 0), default=len(text))]


def frame_count(frames: int | None, most: int | None, fps: float | None) -> int | None:
    """`frames` of a video or `most`, which is another name of it. Raises UsageError."""
    for name, value in (("frames", frames), ("max_frames_num", most), ("fps", fps)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
            raise UsageError(f"model_args: {name} is {value!r}: give a number")
    if frames and most and frames != most:
        raise UsageError(f"model_args: frames is {frames}, max_frames_num {most}: give one of them")
    count = most if frames is None else frames
    sample([0.0], count, fps)  # which knows what makes sense
    return count


def frame_rule(count: int | None, fps: float | None, usual: int) -> tuple[int | None, str]:
    """Frames of a video (None: all at `fps`), and the rule in words."""
    if fps is None:
        return count or usual, f"{count or usual} frames, evenly spread"
    rate = f"{fps:g} frame{'' if fps == 1 else 's'} a second"
    return count, rate + (f", at most {count}" if count else "")


def method_text(text: str) -> str:
    """A method as load_policy takes it: lmms-eval leaves the quotes or braces on that keep commas
    together."""
    pairs = ("''", '""', "{}")
    return text[1:-1] if len(text) > 1 and text[0] + text[-1] in pairs else text
