"""Trains a model that finds one frame among 25,000: 100,000 tokens, in minutes on two cores.

    python -m lab.demo.tiles CACHE             # background tiles
    python -m lab.demo.long CACHE --out MODEL     # resumes from CACHE when started again

Tower, projector and newline are those of the bundled demo model and stay as they are; two decoder
layers are trained on top, only to name an object that one frame shows. Sequences have a few
hundred tokens and are made to look like 100,000 in two ways:

  positions  skip at random between frames, up to LONGEST (position-skip training, "PoSE",
             Zhu et al. 2309.10400)
  crowds     a token of an empty frame counts like up to CROWD of it: log(count) is added to its
             logits, which is what so many copies of its key and value would do to the softmax

Nothing of this is in the weights' layout: the product is a plain checkpoint, run as any other.
"""

import json
import math
import sys
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from zipvl.engine.load import DEMO, load
from zipvl.errors import UsageError
from zipvl.model.layouts import read_config
from zipvl.model.vlm import VLM
from zipvl.vision.merge import pool_frames

from ..command import Parser, ended
from .backgrounds import bundled, gradients, noise
from .bank import EMPTY, Bank, build
from .checkpoint import PATCH, SIDE, tokenizer, write_plain, write_weights
from .optim import initialise, optimisers, update
from .sequences import Sequences, hidden, sequences
from .train import log

LAYERS, HEADS, GROUPS, THETA = 2, 2, 1, 1e8
TOKENS = 4000  # in one step
EVERY = 100  # steps, the progress is looked at and saved
KINDS = ("what", "digit", "colour", "object")
# Share of the run done -> frames of a clip, share of the logarithm of LONGEST and CROWD reached.
CURRICULUM = ((0.10, (4, 8, 16), 0.0), (0.25, (16, 32), 0.5), (1.0, (32, 64, 128), 1.0))
GRID = SIDE // PATCH
N = (GRID // 2) ** 2  # tokens a frame
LONGEST = 120_000  # tokens
CROWD = 400  # copies; with 256 to 512 tokens a clip this is more than LONGEST


# --- clips of a few hundred tokens that a decoder cannot tell from 100,000 ------------------------


@dataclass(frozen=True)
class Crowded:
    """A batch and how much each of its tokens weighs as a key."""

    batch: Sequences
    weight: Tensor  # [B, L], logarithm of a number of copies


def needles(groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """groups [B, F] of which each run of one thing keeps a single frame, the others are empty."""
    out = np.full_like(groups, EMPTY)
    for line, into in zip(groups, out, strict=True):
        edges = [0, *(np.flatnonzero(np.diff(line)) + 1), len(line)]
        for start, stop in pairwise(edges):
            into[rng.integers(start, stop)] = line[start]
    return out


def jumps(batch: int, frames: int, longest: float, rng: np.random.Generator) -> np.ndarray:
    """How far each frame's position is moved, and in the last column what follows. # [B, F + 1]

    A sequence is stretched by up to `longest`, evenly in the logarithm, at eight random places.
    """
    sizes = rng.dirichlet(np.ones(8), batch) * longest ** rng.random((batch, 1))
    moved = np.zeros((batch, frames + 1))
    np.add.at(moved, (np.arange(batch)[:, None], rng.integers(0, frames + 1, (batch, 8))), sizes)
    return moved.cumsum(1).astype(np.int64)


def crowded(bank: Bank, batch: Sequences, reach: float, rng: np.random.Generator) -> Crowded:
    """`batch` with single-frame needles, stretched to LONGEST ** reach and CROWD ** reach."""
    groups = needles((batch.rows // bank.each).clamp(max=EMPTY).numpy(), rng)
    count, frames = groups.shape
    moved = torch.from_numpy(jumps(count, frames, LONGEST**reach, rng))
    frame = ((torch.arange(batch.ids.shape[1]) - 1) // N).clamp(0, frames)  # of each token
    crowd = torch.from_numpy(CROWD ** (reach * rng.random((count, 1)))).float().log()
    empty = torch.from_numpy(np.pad(groups == EMPTY, ((0, 0), (0, 1))))  # [B, F + 1]
    weight = (crowd * empty)[:, frame]
    weight[:, 0] = 0  # the token before the first frame
    # A row is drawn again for every frame: a needle's would otherwise depend on its run's length.
    batch = replace(batch, rows=bank.rows(groups, rng), positions=batch.positions + moved[:, frame])
    return Crowded(batch, weight)


# --- training -------------------------------------------------------------------------------------


def answer_loss(model: VLM, bank: Bank, some: Crowded) -> tuple[Tensor, Tensor]:
    """Mean loss of the answers' tokens, and which of them are right. # [], bool [tokens]"""
    batch, newline = some.batch, model.image_newline
    assert newline is not None
    x, on = model.text.embed_tokens(batch.ids), batch.target >= 0
    frames = bank.features[batch.rows].float().flatten(1, 2)
    visual = torch.cat([frames, newline.expand(len(x), 1, -1)], dim=1)
    x = torch.cat([x[:, :1], visual, x[:, 1 + batch.visual :]], dim=1)
    logits = model.lm_head(hidden(model.text, x, batch, some.weight)[on])
    return F.cross_entropy(logits, batch.target[on]), logits.argmax(1) == batch.target[on]


@torch.no_grad()
def pooled(model: VLM, bank: Bank) -> Bank:
    """The bank as the decoder sees it, projected and pooled: features float16 [rows, N, C]."""
    media, parts = model.config.media, []
    for some in bank.features.split(4096):
        parts.append(pool_frames(model.projector(some.float()), media, GRID).half())
    return Bank(torch.cat(parts), bank.each, bank.empty)


def banks(model: VLM, cache: Path, each: int) -> tuple[Bank, Bank]:
    """For training and for looking at the progress, over tiles set apart; kept in CACHE."""
    tiles, rng, out = cache / "tiles.pt", torch.Generator().manual_seed(2), []
    if not tiles.exists():
        raise UsageError(f"{tiles} is missing: run python -m lab.demo.tiles {cache} first")
    photos = torch.load(tiles)
    some = torch.cat([photos, noise(200, rng), gradients(120, rng)])
    for name, backs, count in (("train", some, each), ("test", bundled(), max(1, each // 8))):
        path = cache / f"long_{name}.pt"
        if not path.exists():
            made = pooled(model, build(model.vision, backs, count, SIDE, rng))
            torch.save((made.features, made.each, made.empty), path)
        out.append(Bank(*torch.load(path)))
    return out[0], out[1]


def fresh(out: Path) -> VLM:
    """The long model untrained, in fp32, and everything of its folder but the weights."""
    write_plain(out)
    path = out / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw["text_config"] |= {
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
        "max_position_embeddings": 131072,
    }  # fmt: skip
    path.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    torch.manual_seed(0)
    model, demo = VLM(read_config(out)), load(DEMO / "model", "cpu", "float32").model
    initialise(model.text, LAYERS)
    known = {k: v for k, v in demo.state_dict().items() if not k.startswith("text.layers.")}
    model.load_state_dict(known, strict=False)
    return model.requires_grad_(False)


@torch.no_grad()
def found(model: VLM, bank: Bank, frames: int, reach: float, clips: int = 64) -> float:
    """Share of lone needles of which both words are right."""
    rng, right, asked, tok = np.random.default_rng(5), 0, 0, tokenizer()
    for _ in range(clips // 16):
        batch = sequences(bank, tok, 16, frames, 1, GRID, rng, False, 0.0, False, 1, KINDS[:1])
        some = crowded(bank, batch, reach, rng)
        rows = (some.batch.target >= 0).nonzero()[:, 0]
        wrong = rows[~answer_loss(model, bank, some)[1]]
        asked += len(rows.unique())
        right += len(rows.unique()) - len(wrong.unique())
    return right / asked


def train(model: VLM, bank: Bank, test: Bank, cache: Path, steps: int, stop: int) -> None:
    """The decoder on crowded clips. Saves CACHE/long.pt now and then."""
    tok, state, begin, spent = tokenizer(), cache / "long.pt", 0, 0.0
    parts = nn.ModuleList([model.text, model.lm_head]).requires_grad_(True)
    opts = optimisers(parts)
    if state.exists():
        saved = torch.load(state)
        model.load_state_dict(saved["model"])
        for opt, value in zip(opts, saved["optimisers"], strict=True):
            opt.load_state_dict(value)
        begin, spent = saved["step"], saved["seconds"]
    began, losses = time.time() - spent, []
    for step in tqdm(range(begin, min(steps, stop)), desc="decoder", mininterval=10):
        rng = np.random.default_rng([4, step])
        some, reach = next(c[1:] for c in CURRICULUM if step < c[0] * steps)
        frames = int(rng.choice(some))
        clips = math.ceil(TOKENS / (N * frames + 40))
        batch = sequences(bank, tok, clips, frames, 4, GRID, rng, False, 0.0, False, 3, KINDS)
        loss, _ = answer_loss(model, bank, crowded(bank, batch, reach, rng))
        update(opts, loss, step, steps)
        losses.append(loss.item())
        if step % EVERY == EVERY - 1 or step + 1 == steps:
            seen = {f"{f} frames, reach {r}": found(model, test, f, r)
                    for f, r in ((16, 0.0), (128, 0.0), (64, 1.0))}  # fmt: skip
            log(cache / "long.jsonl", {"step": step + 1, "loss": float(np.mean(losses[-EVERY:])),
                                       **seen, "seconds": round(time.time() - began)})  # fmt: skip
            torch.save({"model": model.state_dict(), "optimisers": [o.state_dict() for o in opts],
                        "step": step + 1, "seconds": time.time() - began}, state)  # fmt: skip


def work(argv: list[str] | None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--stop", type=int, default=10**9, help="end at this step for now")
    parser.add_argument("--each", type=int, default=300, help="frames of every thing in the bank")
    args = parser.parse_args(argv)
    torch.set_num_threads(2)
    model = fresh(args.out)
    train(model, *banks(model, args.cache, args.each), args.cache, args.steps, args.stop)
    write_weights(model, args.out)


def main(argv: list[str] | None = None) -> int:
    return ended(lambda: work(argv))


if __name__ == "__main__":
    sys.exit(main())
