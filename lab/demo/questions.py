"""Questions about a clip of the demo world and their exact answers."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .things import COLOURS, DIGITS, KINDS, NAMES, SHAPES, Thing

PHRASES = {
    "what": ("Which object appears?", "What do you see?", "What is shown?", "Name the object.",
             "What is it?", "What is in the picture?", "Describe the picture."),
    "colour": ("What colour is the {a}?", "Which colour does the {a} have?",
               "The {a} is of what colour?", "What color is the {a}?"),
    "object": ("Which object is {c}?", "What is {c}?", "Name the {c} object."),
    "first": ("What comes first?", "Which object appears first?", "What is the first object?",
              "What do you see first?"),
    "last": ("What comes last?", "Which object appears last?", "What is the last object?",
             "What do you see last?"),
    "after": ("What comes right after the {a}?", "Which object follows the {a}?",
              "What comes after the {a}?", "What appears after the {a}?"),
    "before": ("What comes right before the {a}?", "What comes before the {a}?",
               "Which object appears before the {a}?"),
    "count": ("How many objects appear?", "How many objects are there?", "Count the objects.",
              "How many objects do you see?"),
    "digit": ("Which digit is written?", "What number is written?", "Which number appears?",
              "Read the number."),
    "list": ("List all objects in order.", "Which objects appear, in order?",
             "Name all objects in order.", "What happens in the video?", "What happens?",
             "Describe the video.", "What do you see?", "What is shown?"),
    "yesno": ("Is there {t}?", "Does {t} appear?", "Do you see {t}?", "Can you see {t}?"),
}  # fmt: skip
# How often a guess among the answers that fit the question's form is right.
CHANCE = {
    "what": 1 / (len(KINDS) * len(NAMES)),
    "colour": 1 / len(NAMES),
    "object": 1 / len(KINDS),
    "first": 1 / (len(KINDS) * len(NAMES)),
    "last": 1 / (len(KINDS) * len(NAMES)),
    "after": 1 / (len(KINDS) * len(NAMES)),
    "before": 1 / (len(KINDS) * len(NAMES)),
    "count": 1 / 5,
    "digit": 1 / len(DIGITS),
    "list": 1 / (len(KINDS) * len(NAMES)),
    "yesno": 1 / 2,
}


@dataclass(frozen=True)
class Question:
    """A question with its one right answer; `kind` is a key of PHRASES."""

    kind: str
    text: str
    answer: str


Maker = Callable[[], tuple[str, Thing | None]]  # draws an answer and the thing its question names


def with_article(thing: Thing) -> str:
    """an orange star"""
    return f"{'an' if thing.colour == 'orange' else 'a'} {thing}"


def _missing(things: tuple[Thing, ...], rng: np.random.Generator) -> Thing:
    """A thing that does not appear, often with the shape or the colour of one that does."""
    style = rng.integers(3)
    while True:
        kind, colour = str(rng.choice(KINDS)), str(rng.choice(NAMES))
        if things and style == 0:
            kind = things[rng.integers(len(things))].kind
        if things and style == 1:
            colour = things[rng.integers(len(things))].colour
        if Thing(kind, colour) not in things:
            return Thing(kind, colour)


def _answers(things: tuple[Thing, ...], rng: np.random.Generator) -> dict[str, Maker]:
    """A maker for each kind of question that makes sense here."""
    n, colours = len(things), [t.colour for t in things]
    digits = [t for t in things if t.is_digit]
    lone = [t for t in things if colours.count(t.colour) == 1]
    pick = lambda some: some[rng.integers(len(some))]

    def after() -> tuple[str, Thing]:
        i = rng.integers(n - 1)
        return str(things[i + 1]), things[i]

    def before() -> tuple[str, Thing]:
        i = rng.integers(1, n)
        return str(things[i - 1]), things[i]

    def yesno() -> tuple[str, Thing]:
        if n and rng.random() < 0.5:
            return "yes", pick(things)
        return "no", _missing(things, rng)

    def about(thing: Thing, answer: str) -> tuple[str, Thing]:
        return getattr(thing, answer), thing

    makers: dict[str, tuple[bool, Maker]] = {
        "what": (n == 1, lambda: (str(things[0]), None)),
        "colour": (n > 0, lambda: about(pick(things), "colour")),
        "object": (bool(lone), lambda: about(pick(lone), "kind")),
        "first": (n > 0, lambda: (str(things[0]), None)),
        "last": (n > 0, lambda: (str(things[-1]), None)),
        "after": (n > 1, after),
        "before": (n > 1, before),
        "count": (True, lambda: (str(n), None)),
        "digit": (len(digits) == 1, lambda: (digits[0].kind, None)),
        "list": (True, lambda: (", ".join(map(str, things)) or "nothing", None)),
        "yesno": (True, yesno),
    }
    return {kind: make for kind, (fits, make) in makers.items() if fits}


def ask(things: tuple[Thing, ...], count: int, rng: np.random.Generator,
        kinds: tuple[str, ...] = ()) -> list[Question]:  # fmt: skip
    """Up to `count` questions about a clip's things, each of another kind (of `kinds`)."""
    makers = _answers(things, rng)
    usable = [kind for kind in makers if not kinds or kind in kinds]
    out = []
    for kind in rng.permutation(usable)[:count]:
        answer, thing = makers[kind]()
        text = str(rng.choice(PHRASES[kind]))
        if thing is not None:
            text = text.format(a=thing.kind, c=thing.colour, t=with_article(thing))
        out.append(Question(str(kind), text, answer))
    return out


def careless(text: str, rng: np.random.Generator) -> str:
    """A question as people type: now and then without its capital or its question mark."""
    if rng.random() < 0.15:
        text = text[0].lower() + text[1:]
    return text[:-1] if rng.random() < 0.15 else text


def corpus() -> list[str]:
    """Every phrase and every name: what the tokenizer is made from."""
    names = [f"{colour} {kind}" for colour in COLOURS for kind in SHAPES + DIGITS]
    phrases = [p.format(a=kind, c=c, t=with_article(Thing(kind, c))) for group in PHRASES.values()
               for p in group for kind in KINDS for c in COLOURS]  # fmt: skip
    words = [*COLOURS, *SHAPES, *DIGITS, "yes", "no", "nothing"] * 9
    lists = [", ".join(names[i::7]) for i in range(7)]
    return [*phrases, *(p[0].lower() + p[1:] for p in phrases), *names, *lists, *words]
