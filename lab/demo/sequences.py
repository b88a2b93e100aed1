"""Training sequences: one clip, several questions that all see the clip but not each other.

  <|user|> frames newline \\n | question <|assistant|> answer <|im_end|> | question ..
           shared prefix      |  each part continues at the prefix's end, and attends to the
                              |  prefix and to itself only

So one pass over the clip's tokens serves many questions. A part of the sequences are plain
conversations instead, each turn seeing the earlier ones.
"""

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from zipvl.model.batch import Rotate, rope_table
from zipvl.model.decoder import Block, Decoder, RMSNorm
from zipvl.model.vlm import VLM
from zipvl.vision.merge import pool_frames

from .bank import EMPTY, Bank, group
from .checkpoint import END, SPECIAL
from .questions import Question, ask, careless
from .world import MOST, some_things, spans

# Asked once more each in training: finding an object by its shape is learnt last.
DRILL = (("after",), ("before",), ("after",), ("before",), ("colour",), ("list",))
USER, ASSISTANT = SPECIAL.index("<|user|>"), SPECIAL.index("<|assistant|>")


@dataclass(frozen=True)
class Sequences:
    """A batch of B sequences of L tokens, each with `visual` visual tokens after the first."""

    ids: Tensor  # int64 [B, L]; visual tokens and padding hold 0
    part: Tensor  # int64 [B, L]: 0 prefix, then the number of the question, -1 padding
    positions: Tensor  # int64 [B, L]
    target: Tensor  # int64 [B, L]: the next token where it belongs to an answer, else -1
    rows: Tensor  # int64 [B, F], rows of the bank
    picture: bool
    questions: list[list[Question]]
    visual: int


def things_of_frames(frames: int, most: int, rng: np.random.Generator) -> tuple[tuple, np.ndarray]:
    """The things of a random clip and the bank's group of every frame."""
    top = max(1, min(most, frames // 2))
    count = 0 if rng.random() < 0.03 else int(rng.integers(1, top + 1))
    things, groups = tuple(some_things(count, rng)), np.full(frames, EMPTY)
    for thing, (start, stop) in zip(things, spans(frames, count, rng), strict=True):
        groups[start:stop] = group(thing)
    return things, groups


def sequences(bank: Bank, tok: Tokenizer, batch: int, frames: int, asked: int, grid: int,
              rng: np.random.Generator, picture: bool = False, chats: float = 0.1,
              drill: bool = True, most: int = MOST,
              kinds: tuple[str, ...] = ()) -> Sequences:  # fmt: skip
    """Random sequences of `frames` frames (a picture: one, unpooled, as OneVision packs it).

    `most` things a clip; `asked` questions of all kinds or of `kinds`, and the `drill`.
    """
    visual = grid * grid + grid * (grid + 1) if picture else frames * (grid // 2) ** 2 + 1
    line = tok.encode("\n").ids
    every, rows, asked_of = [], [], []
    for _ in range(batch):
        things, groups = things_of_frames(frames, most, rng)
        questions = ask(things, asked, rng, kinds)
        for some in DRILL if drill else ():
            questions += ask(things, 1, rng, some)
        chat = rng.random() < chats
        ids, part, target = [USER] + [0] * visual + line, [0] * (visual + 2), [-1] * (visual + 2)
        positions = list(range(len(ids)))
        for n, q in enumerate(questions, start=1):
            lead = (
                ([USER] if chat and n > 1 else [])
                + tok.encode(careless(q.text, rng)).ids
                + [ASSISTANT]
            )
            answer = [*tok.encode(q.answer).ids, END]
            begin = len(ids) if chat else visual + 2
            ids += lead + answer
            positions += range(begin, begin + len(lead) + len(answer))
            part += [0 if chat else n] * (len(lead) + len(answer))
            target += [-1] * (len(lead) - 1) + answer + [-1]
        every.append((ids, part, positions, target))
        rows.append(bank.rows(groups, rng))
        asked_of.append(questions)
    longest = max(len(ids) for ids, *_ in every)

    def stack(i: int, fill: int) -> Tensor:
        return torch.tensor([row[i] + [fill] * (longest - len(row[i])) for row in every])

    tables = stack(0, 0), stack(1, -1), stack(2, 0), stack(3, -1)
    return Sequences(*tables, torch.stack(rows), picture, asked_of, visual)


def embed(model: VLM, features: Tensor, batch: Sequences) -> Tensor:
    """Input embeddings [B, L, C]; `features` [B, F, N, C_v] are the tower's."""
    x = model.text.embed_tokens(batch.ids)
    b, f, grid = *features.shape[:2], model.config.vision.grid
    projected = model.projector(features.flatten(0, 1))  # [B F, N, C]
    newline = model.image_newline
    assert newline is not None
    if batch.picture:
        rows = projected.unflatten(1, (grid, grid))
        rows = torch.cat([rows, newline.expand(b, grid, 1, -1)], dim=2).flatten(1, 2)
        visual = torch.cat([projected, rows], dim=1)
    else:
        pooled = pool_frames(projected, model.config.media, grid).unflatten(0, (b, f)).flatten(1, 2)
        visual = torch.cat([pooled, newline.expand(b, 1, -1)], dim=1)
    return torch.cat([x[:, :1], visual, x[:, 1 + batch.visual :]], dim=1)


def hidden(text: Decoder, x: Tensor, batch: Sequences, weight: Tensor | None = None) -> Tensor:
    """Hidden states [B, L, C]: Decoder.forward with the mask and positions of shared prefixes.

    `weight` [B, L] is added to every logit of a key: log 5 makes a token count like five of it.
    """
    b, length, width = x.shape
    order = torch.arange(length)
    same = batch.part[:, None, :] == batch.part[:, :, None]
    mask = (same | (batch.part[:, None, :] == 0)) & (order[None, :] <= order[:, None])
    bias = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)[:, None]  # [B, 1, L, L]
    bias = bias if weight is None else bias + weight[:, None, None]
    config = text.config
    rotate = Rotate()
    cos, sin = rope_table(batch.positions.flatten(), config, x.dtype)

    def norm(layer: RMSNorm, x: Tensor) -> Tensor:
        return F.rms_norm(x, (width,), layer.weight, layer.eps)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(0, (b, length)).transpose(1, 2)  # [B, heads, L, D]

    x = x.flatten(0, 1)
    for block in cast(list[Block], text.layers):
        h, at = norm(block.input_layernorm, x), block.self_attn
        projections = (at.q_proj, at.k_proj, at.v_proj)
        q, k, v = (p(h).unflatten(-1, (-1, config.head_dim)) for p in projections)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(heads(q), heads(k), heads(v), bias, enable_gqa=True)
        x = x + at.o_proj(y.transpose(1, 2).flatten(0, 1).flatten(1))
        h, mlp = norm(block.post_attention_layernorm, x), block.mlp
        x = x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))
    return norm(text.norm, x).unflatten(0, (b, length))
