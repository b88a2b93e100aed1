"""Training sequences: one clip, several questions that all see the clip but not each other.

  <|user|> frames newline \\n | question <|assistant|> answer <|im_end|> | question ..
           shared prefix      |  each part continues at the prefix's end, and attends to the
                              |  prefix and to itself only

So one pass over the clip's tokens serves many questions. A part of the sequences are plain
conversations instead, each turn seeing the earlier ones.

Of a long clip a few frames stand for all, so that thousands cost as much as forty. They are at
their true positions (position-skip training, "PoSE", Zhu et al. 2309.10400), and a frame that
stands for n counts n times: log n is added to the logits of its keys, which is what n copies of
its keys and values would do to the softmax. The edges of every event are always there.
"""

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from zipvl.model.batch import Rotate, rope_table
from zipvl.model.decoder import Block, Decoder, RMSNorm
from zipvl.model.vlm import VLM
from zipvl.vision.llava import Llava, pool_frames

from .bank import EMPTY, HARD, RARE, Bank, group
from .checkpoint import END, SPECIAL
from .questions import Question, ask, careless
from .things import Thing
from .world import MOST, some_things, spans

# Asked once more each in training: finding an object by its shape is learnt last.
DRILL = (("after",), ("before",), ("after",), ("before",), ("colour",), ("list",))
USER, ASSISTANT = SPECIAL.index("<|user|>"), SPECIAL.index("<|assistant|>")


@dataclass(frozen=True)
class Scene:
    """A clip of `frames` frames as training sees it: S of them."""

    things: tuple[Thing, ...]
    frames: int
    at: np.ndarray  # int64 [S], rising: which frames are there
    stands_for: np.ndarray  # [S], how many frames each counts as; `frames` together
    begun: np.ndarray  # int64 [S], how many things have come, the one in view included
    in_view: np.ndarray  # bool [S]
    hard: np.ndarray  # bool [S], which frames look, if empty, as if a thing were there

    @property
    def groups(self) -> np.ndarray:
        """The bank's group of each frame."""
        shown = np.array([EMPTY, *map(group, self.things)])
        return np.where(self.in_view, shown[self.begun], np.where(self.hard, HARD, EMPTY))


def scene(frames: int, shown: int, rng: np.random.Generator, most: int = MOST,
          needles: bool = False) -> Scene:  # fmt: skip
    """A random clip of which `shown` frames are there: all, or at least 6 `most` + 3.

    `needles`: every thing is in view for one frame.
    """
    count = 0 if rng.random() < 0.03 else int(rng.integers(1, max(1, min(most, frames // 2)) + 1))
    events = spans(frames, count, rng)
    if needles:
        starts = sorted(rng.choice(frames, count, replace=False).tolist())
        events = [(start, start + 1) for start in starts]
    edges = np.unique([0, *(edge for event in events for edge in event), frames])
    at, stands_for, hard = np.arange(frames), np.ones(frames), np.zeros(frames, bool)
    if shown < frames:
        at, stands_for, hard = some_frames(edges, shown, rng)
    begun = np.searchsorted([start for start, _ in events], at, "right")
    in_view = begun > np.searchsorted([stop for _, stop in events], at, "right")
    return Scene(tuple(some_things(count, rng)), frames, at, stands_for, begun, in_view, hard)


def some_frames(edges: np.ndarray, shown: int, rng: np.random.Generator
                ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Frames that stand for all of 0 .. edges[-1] - 1, for how many each, and which of them are
    hard ones. # all [shown]

    The first and the last frame between two neighbouring edges stand for themselves. Those between
    them share what they leave evenly; at least one is there. Where there are more, one of them may
    stand for the hard frames that so many frames hold.
    """
    inner: list[tuple[int, int]] = []
    kept: list[int] = []
    for start, stop in pairwise(edges):
        kept += sorted({start, stop - 1})
        if stop - start > 2:
            inner.append((start + 1, stop - 1))
            kept.append(rng.integers(start + 1, stop - 1))
    left = np.setdiff1d(rng.choice(edges[-1], min(3 * shown, edges[-1]), replace=False), kept)
    more = rng.permutation(left)[: shown - len(kept)]
    at = np.sort([*kept, *more])
    stands_for, hard = np.ones(shown), np.zeros(shown, bool)
    for start, stop in inner:
        (these,) = ((at >= start) & (at < stop)).nonzero()
        stands_for[these] = (stop - start) / len(these)
        expected = (stop - start) / RARE
        if len(these) > 1 and rng.random() < expected:
            one, expected = rng.choice(these), max(1.0, expected)
            stands_for[these] = (stop - start - expected) / (len(these) - 1)
            stands_for[one], hard[one] = expected, True
    return at, stands_for, hard


@dataclass(frozen=True)
class Sequences:
    """A batch of B sequences of L tokens, each with `visual` visual tokens after the first."""

    ids: Tensor  # int64 [B, L]; visual tokens and padding hold 0
    part: Tensor  # int64 [B, L]: 0 prefix, then the number of the question, -1 padding
    positions: Tensor  # int64 [B, L]
    target: Tensor  # int64 [B, L]: the next token where it belongs to an answer, else -1
    rows: Tensor  # int64 [B, S], rows of the bank
    weight: Tensor  # float32 [B, L]: log of the number of tokens that each one counts as
    look: Tensor  # int64 [B, 2, L]: the thing whose frames hold the next token, or -1; see source()
    picture: bool
    scenes: list[Scene]
    questions: list[list[Question]]
    visual: int


def source(question: Question, things: tuple[Thing, ...]) -> tuple[int, int]:
    """In which frames an answer stands: how they are found (0: by what they show, 1: by what came
    before), and the number of their thing, the first one of a list; -1: in none.

    What came before X stands in the frames of X, which remember it.
    """
    names, kinds = [str(thing) for thing in things], [thing.kind for thing in things]
    words = re.findall(r"\w+", f"{question.text} {question.answer}")
    if question.kind in ("first", "last", "after", "list"):
        return 1, names.index(question.answer.split(", ")[0])
    if question.kind == "before":
        return 0, names.index(question.answer) + 1
    return 0, next((i for i, kind in enumerate(kinds) if kind in words), -1)


def sequences(bank: Bank, tok: Tokenizer, scenes: list[Scene], asked: int, grid: int,
              rng: np.random.Generator, picture: bool = False, chats: float = 0.1,
              drill: bool = True, kinds: tuple[str, ...] = ()) -> Sequences:  # fmt: skip
    """Random sequences about `scenes` with S frames each (a picture: one, unpooled, as OneVision
    packs it).

    `asked` questions of all kinds or of `kinds`, and the `drill`, about each.
    """
    each = (grid // 2) ** 2
    visual = grid * grid + grid * (grid + 1) if picture else len(scenes[0].at) * each + 1
    line = tok.encode("\n").ids
    comma = tok.encode(",").ids[0]
    every: list[tuple[list, ...]] = []
    rows, asked_of = [], []
    for some in scenes:
        questions = ask(some.things, asked, rng, kinds)
        for kind in DRILL if drill else ():
            questions += ask(some.things, 1, rng, kind)
        chat = rng.random() < chats
        ids, part, target = [USER] + [0] * visual + line, [0] * (visual + 2), [-1] * (visual + 2)
        positions, weight = list(range(visual + 2)), [0.0] * (visual + 2)
        if not picture:
            places = 1 + some.at[:, None] * each + np.arange(each)
            end = 1 + some.frames * each
            positions = [0, *places.flatten().tolist(), end, end + 1]
            weight = [0.0, *np.log(some.stands_for).repeat(each).tolist(), 0.0, 0.0]
        look = np.full((2, visual + 2), -1)
        for n, q in enumerate(questions, start=1):
            lead = (
                ([USER] if chat and n > 1 else [])
                + tok.encode(careless(q.text, rng)).ids
                + [ASSISTANT]
            )
            answer = [*tok.encode(q.answer).ids, END]
            begin = (positions[-1] if chat else positions[visual + 1]) + 1
            ids += lead + answer
            positions += range(begin, begin + len(lead) + len(answer))
            part += [0 if chat else n] * (len(lead) + len(answer))
            target += [-1] * (len(lead) - 1) + answer + [-1]
            weight += [0.0] * (len(lead) + len(answer))
            more = np.full((2, len(lead) + len(answer)), -1)
            if some.things and q.kind != "count":
                by, thing = source(q, some.things)
                said = np.cumsum([token == comma for token in answer])  # each token of the answer
                more[by, len(lead) - 1 : -2] = np.where(thing < 0, -1, thing + said[:-1])
            look = np.concatenate([look, more], axis=1)
        every.append((ids, part, positions, target, weight, *look.tolist()))
        rows.append(bank.rows(some.groups, rng))
        asked_of.append(questions)
    longest = max(len(ids) for ids, *_ in every)

    def stack(i: int, fill: float) -> Tensor:
        return torch.tensor([row[i] + [fill] * (longest - len(row[i])) for row in every])

    tables = stack(0, 0), stack(1, -1), stack(2, 0), stack(3, -1), torch.stack(rows)
    looks = torch.stack([stack(5, -1), stack(6, -1)], dim=1)
    return Sequences(*tables, stack(4, 0.0), looks, picture, scenes, asked_of, visual)


def embed(model: VLM, features: Tensor, batch: Sequences) -> Tensor:
    """Input embeddings [B, L, C]; `features` [B, S, N, C_v] are the tower's."""
    x = model.text.embed_tokens(batch.ids)
    b, f, grid = *features.shape[:2], model.config.vision.tower.grid
    eyes = cast(Llava, model.vision)
    projected, newline = eyes.projector(features.flatten(0, 1)), eyes.newline  # [B S, N, C]
    assert newline is not None
    if batch.picture:
        rows = projected.unflatten(1, (grid, grid))
        rows = torch.cat([rows, newline.expand(b, grid, 1, -1)], dim=2).flatten(1, 2)
        visual = torch.cat([projected, rows], dim=1)
    else:
        pooled = pool_frames(projected, eyes.media, grid).unflatten(0, (b, f)).flatten(1, 2)
        visual = torch.cat([pooled, newline.expand(b, 1, -1)], dim=1)
    return torch.cat([x[:, :1], visual, x[:, 1 + batch.visual :]], dim=1)


@dataclass(frozen=True)
class Layer:
    """What a layer did: its queries and keys, turned, and the states behind it."""

    q: Tensor  # [B, heads, L, D]
    k: Tensor  # [B, KV heads, L, D]
    bias: Tensor  # [B, 1, L, L], on the logits
    states: Tensor  # [B, L, C], normed behind the last layer


def layers(text: Decoder, x: Tensor, batch: Sequences) -> list[Layer]:
    """Decoder.forward with the mask, the positions and the weights of shared prefixes."""
    b, length, width = x.shape
    order = torch.arange(length)
    same = batch.part[:, None, :] == batch.part[:, :, None]
    mask = (same | (batch.part[:, None, :] == 0)) & (order[None, :] <= order[:, None])
    bias = batch.weight[:, None, :].masked_fill(~mask, -torch.inf)[:, None]  # [B, 1, L, L]
    config = text.config
    rotate = Rotate()
    cos, sin = rope_table(batch.positions.flatten(), config, x.dtype)

    def norm(layer: RMSNorm, x: Tensor) -> Tensor:
        return F.rms_norm(x, (width,), layer.weight, layer.eps)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(0, (b, length)).transpose(1, 2)  # [B, heads, L, D]

    x, done = x.flatten(0, 1), list[Layer]()
    for block in cast(list[Block], text.layers):
        h, at = norm(block.input_layernorm, x), block.self_attn
        projections = (at.q_proj, at.k_proj, at.v_proj)
        q, k, v = (p(h).unflatten(-1, (-1, config.head_dim)) for p in projections)
        q, k, v = heads(rotate(q, cos, sin)), heads(rotate(k, cos, sin)), heads(v)
        y = F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=True)
        x = x + at.o_proj(y.transpose(1, 2).flatten(0, 1).flatten(1))
        h, mlp = norm(block.post_attention_layernorm, x), block.mlp
        x = x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))
        last = len(done) + 1 == config.num_layers
        out = norm(text.norm, x) if last else x
        done.append(Layer(q, k, bias, out.unflatten(0, (b, length))))
    return done
