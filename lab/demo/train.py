"""Trains the demo model on two CPU cores in about two hours.

    python -m lab.demo.tiles CACHE                 # background tiles
    python -m lab.demo.train CACHE --out MODEL     # tower, bank of features, decoder

Every stage resumes from what CACHE holds. `--stop N` ends the decoder's stage at step N of the
schedule. Log: CACHE/log.jsonl, a line an evaluation.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

from zipvl.model.layouts import read_config
from zipvl.model.vlm import VLM

from .backgrounds import bundled, gradients, noise
from .bank import Bank, build
from .checkpoint import PATCH, SIDE, tokenizer, write_plain, write_weights
from .optim import initialise, optimisers, update
from .sequences import Sequences, embed, hidden, sequences
from .tower import Heads, pictures

GRID = SIDE // PATCH
TOKENS = 2400  # in one step of the decoder
# Share of the run done -> frames of a clip, drawn evenly; 0 is a picture.
CURRICULUM = (
    (0.15, (0, 1, 2, 3, 4)),
    (0.35, (0, 4, 6, 8)),
    (0.55, (0, 4, 4, 6, 8, 16)),
    (0.65, (4, 8, 8, 16, 16)),
    (1.00, (0, 8, 16, 16, 32, 64, 64)),
)


def log(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    tqdm.write(json.dumps(record))


def train_tower(model: VLM, tiles: Tensor, cache: Path, steps: int) -> None:
    """Stage 1: the tower on single pictures, 64 a step. Saves CACHE/tower.pt."""
    rng, heads = torch.Generator().manual_seed(1), Heads(model.config.vision.hidden_size)
    initialise(model.vision, model.config.vision.num_layers)
    opts, began = optimisers(model.vision, heads), time.time()
    test = pictures(bundled(), 512, SIDE, GRID, torch.Generator().manual_seed(99))
    for step in tqdm(range(steps), desc="tower", mininterval=10):
        batch = pictures(tiles, 64, SIDE, GRID, rng)
        loss, _ = heads(model.vision(batch.pixels), batch)
        update(opts, loss, step, steps)
        if step % 250 == 249:
            with torch.no_grad():
                held_out, right = heads(model.vision(test.pixels), test)
            log(cache / "log.jsonl", {"stage": "tower", "step": step + 1, "loss": held_out.item(),
                                      **right, "seconds": round(time.time() - began)})  # fmt: skip
    torch.save(model.vision.state_dict(), cache / "tower.pt")


def answer_loss(model: VLM, bank: Bank, batch: Sequences) -> tuple[Tensor, Tensor]:
    """Mean loss of the answers' tokens, and which of them are right. # [], bool [tokens]"""
    x = embed(model, bank.features[batch.rows].float(), batch)
    on = batch.target >= 0
    logits = model.lm_head(hidden(model.text, x, batch)[on])
    return F.cross_entropy(logits, batch.target[on]), logits.argmax(1) == batch.target[on]


@torch.no_grad()
def evaluate(model: VLM, bank: Bank, tok: Tokenizer, frames: int, clips: int) -> dict[str, float]:
    """Share of answers all of whose tokens are right, per kind of question, on the bank's clips.

    Right after right tokens is right when greedy, so this equals exact match of greedy answers.
    """
    rng, right = np.random.default_rng(5), dict[str, list[bool]]()
    for _ in range(math.ceil(clips / 16)):
        batch = sequences(bank, tok, 16, max(frames, 1), 11, GRID, rng, frames == 0, 0.0, False)
        flat = answer_loss(model, bank, batch)[1].tolist()
        for row, questions in enumerate(batch.questions):
            for n, q in enumerate(questions, start=1):
                size = int(((batch.part[row] == n) & (batch.target[row] >= 0)).sum())
                answer, flat = flat[:size], flat[size:]
                right.setdefault(q.kind, []).append(all(answer))
    every = [ok for oks in right.values() for ok in oks]
    return {"all": sum(every) / len(every)} | {k: sum(v) / len(v) for k, v in sorted(right.items())}


def train_decoder(model: VLM, bank: Bank, test: Bank, cache: Path, steps: int, stop: int) -> None:
    """Stage 3: projector and decoder on clips from the bank. Saves CACHE/decoder.pt."""
    tok, state, begin, spent = tokenizer(), cache / "decoder.pt", 0, 0.0
    parts = nn.ModuleList([model.projector, model.text, model.lm_head])
    initialise(parts, model.config.text.num_layers)
    assert model.image_newline is not None
    nn.init.normal_(model.image_newline, std=0.5)
    nn.init.normal_(model.text.embed_tokens.weight, std=0.5)
    with torch.no_grad():
        cast(nn.Linear, model.projector[0]).weight /= (
            bank.features[::97].float().square().mean().sqrt()
        )
    model.vision.requires_grad_(False)
    opts = optimisers(parts)
    opts[1].add_param_group({"params": [model.image_newline]})
    if state.exists():
        saved = torch.load(state)
        model.load_state_dict(saved["model"])
        for opt, value in zip(opts, saved["optimisers"], strict=True):
            opt.load_state_dict(value)
        begin, spent = saved["step"], saved["seconds"]
    began, losses = time.time() - spent, []
    for step in tqdm(range(begin, min(steps, stop)), desc="decoder", mininterval=10):
        rng = np.random.default_rng([3, step])
        frames = int(rng.choice(next(f for share, f in CURRICULUM if step < share * steps)))
        length = (36 if frames == 0 else 4 * frames) + 72
        batch = sequences(
            bank, tok, max(8, TOKENS // length), max(frames, 1), 3, GRID, rng, frames == 0
        )
        loss, _ = answer_loss(model, bank, batch)
        update(opts, loss, step, steps)
        losses.append(loss.item())
        if step % 200 == 199:
            record = {"stage": "decoder", "step": step + 1, "loss": float(np.mean(losses[-200:]))}
            for f in (0, 4, 16, 64):
                record[f"{f} frames"] = evaluate(model, test, tok, f, 64)
            log(cache / "log.jsonl", record | {"seconds": round(time.time() - began)})
            torch.save({"model": model.state_dict(), "optimisers": [o.state_dict() for o in opts],
                        "step": step + 1, "seconds": time.time() - began}, state)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tower-steps", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--stop", type=int, default=10**9)
    parser.add_argument("--each", type=int, default=300, help="frames of every thing in the bank")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(2)
    write_plain(args.out)
    model, rng = VLM(read_config(args.out)), torch.Generator().manual_seed(2)
    photos = torch.load(args.cache / "tiles.pt")
    tiles = torch.cat([photos, noise(200, rng), gradients(120, rng)])
    if not (args.cache / "tower.pt").exists():
        train_tower(model, tiles, args.cache, args.tower_steps)
    model.vision.load_state_dict(torch.load(args.cache / "tower.pt"))
    for name, some, each in (("bank.pt", tiles, args.each), ("test.pt", bundled(), args.each // 8)):
        if not (args.cache / name).exists():
            bank = build(model.vision, some, each, SIDE, rng)
            torch.save((bank.features, bank.each, bank.empty), args.cache / name)
    bank, test = (Bank(*torch.load(args.cache / name)) for name in ("bank.pt", "test.pt"))
    train_decoder(model, bank, test, args.cache, args.steps, args.stop)
    write_weights(model, args.out)


if __name__ == "__main__":
    main()
