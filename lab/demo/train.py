"""Trains the demo model from nothing, tower and decoder, in under two hours on one CPU core.

    python -m lab.demo.train              # all of it; started again, it goes on where it was
    python -m lab.demo.train --seed 2     # another decoder on the same tower

Everything goes to `--cache` (build/demo): background tiles, the tower, the bank of its features,
and for each seed the decoder's state, its log with a line a step, and the finished checkpoint.
The same seed gives the same weights on the same kind of CPU, stopped in between or not.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from zipvl.model.layouts import read_config
from zipvl.model.vlm import VLM
from zipvl.vision.llava import Llava

from ..command import Parser, ended, seed
from .backgrounds import bundled, gradients, noise
from .bank import Bank, build
from .checkpoint import PATCH, SIDE, tokenizer, write_plain, write_weights
from .memory import Memory, lookup
from .optim import initialise, optimisers, update
from .resume import Stage
from .sequences import Scene, Sequences, embed, layers, scene, sequences
from .tower import Heads, pictures

GRID = SIDE // PATCH
N = (GRID // 2) ** 2  # tokens a frame
TOKENS = 2400  # in one step of the decoder
REMEMBERS, LOOKS_UP = 3, 4  # the layer whose memory is read, and the one that looks things up
TOLD = 0.3  # how much these two count in the loss
LONG, LONGEST = -1, 8192  # frames of a long clip: 64 to LONGEST, evenly in the logarithm
SHOWN = (36, 48)  # frames that stand for all of a long clip: from .. to
NEEDLES = 0.3  # share of long clips whose things are in view for one frame
# Share of the run done -> frames of a clip, drawn evenly; 0 is a picture.
CURRICULUM = (
    (0.05, (0, 1, 2, 3, 4)),
    (0.15, (0, 4, 6, 8, 8)),
    (0.50, (0, 2, 4, 8, 16, 16, 32, 32, 48, LONG, LONG, LONG, LONG, LONG)),
    (1.00, (0, 2, 4, 8, 16, 16, 32, 48, 64, 128, LONG, LONG, LONG, LONG, LONG)),
)
TESTS = ((16, 16), (64, 64), (256, 40), (1024, 40))  # frames, and how many are shown
EVERY = 250  # steps from one test to the next


def train_tower(model: VLM, heads: Heads, some: Tensor, cache: Path, steps: int,
                stop: int | None) -> bool:  # fmt: skip
    """Stage 1: the tower on single pictures, 64 a step. Returns whether it is at its end."""
    tower = cast(Llava, model.vision).tower
    initialise(tower, model.config.vision.tower.num_layers)
    opts = optimisers(tower, heads)

    def step(number: int) -> dict[str, Any]:
        rng = torch.Generator().manual_seed(1_000_000 + number)
        batch = pictures(some, 64, SIDE, GRID, rng, clutter=True)
        loss, _ = heads(tower(batch.pixels), batch)
        update(opts, loss, number, steps)
        said: dict[str, Any] = {"loss": round(loss.item(), 4)}
        if (number + 1) % EVERY == 0 or number + 1 == steps:
            test = pictures(bundled(), 512, SIDE, GRID, torch.Generator().manual_seed(99))
            with torch.no_grad():
                held_out, right = heads(tower(test.pixels), test)
            said |= {"held_out": held_out.item(), **right}
        return said

    return Stage(cache, "tower", [tower, heads, *opts], steps).run(step, stop)


def loss_and_right(model: VLM, bank: Bank, batch: Sequences,
                   memory: Memory | None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Mean loss of the answers' tokens, that of memory and lookups, and which tokens are right.

    # [], [2], bool [tokens]
    """
    x = embed(model, bank.features[batch.rows].float(), batch)
    done, on = layers(model.text, x, batch), batch.target >= 0
    logits, told = model.lm_head(done[-1].states[on]), torch.zeros(2)
    if memory is not None and not batch.picture:
        remembered = memory(done[REMEMBERS].states, batch, N)
        told = torch.stack([remembered, lookup(done[LOOKS_UP], batch, N)])
    loss = F.cross_entropy(logits, batch.target[on])
    return loss, told, logits.argmax(1) == batch.target[on]


def clips(frames: int, done: float, rng: np.random.Generator) -> list[Scene]:
    """A step's clips of `frames`, where a share `done` of the run is over."""
    if frames != LONG:
        length = (36 if frames == 0 else N * frames) + 80
        one = max(1, frames)
        return [scene(one, one, rng) for _ in range(max(4, TOKENS // length))]
    shown, out = int(rng.integers(SHOWN[0], SHOWN[1] + 1)), []
    for _ in range(TOKENS // (N * shown + 80)):
        most = (LONGEST / 64) ** min(1.0, done / 0.6)
        long = int(64 * most ** rng.random())
        out.append(scene(long, shown, rng, needles=bool(rng.random() < NEEDLES)))
    return out


@torch.no_grad()
def evaluate(model: VLM, bank: Bank, tok: Tokenizer, frames: int, shown: int) -> dict[str, float]:
    """Share of answers all of whose tokens are right, per kind of question, on the bank's clips.

    Right after right tokens is right when greedy, so this equals exact match of greedy answers.
    """
    rng, right = np.random.default_rng(5), dict[str, list[bool]]()
    for _ in range(6):
        scenes = [scene(frames, shown, rng) for _ in range(8)]
        batch = sequences(bank, tok, scenes, 11, GRID, rng, chats=0.0, drill=False)
        flat = loss_and_right(model, bank, batch, None)[2].tolist()
        for row, questions in enumerate(batch.questions):
            for n, q in enumerate(questions, start=1):
                size = int(((batch.part[row] == n) & (batch.target[row] >= 0)).sum())
                answer, flat = flat[:size], flat[size:]
                right.setdefault(q.kind, []).append(all(answer))
    kinds = {kind: sum(oks) / len(oks) for kind, oks in sorted(right.items())}
    return {k: round(v, 3) for k, v in {"all": sum(kinds.values()) / len(kinds), **kinds}.items()}


def train_decoder(model: VLM, bank: Bank, test: Bank, folder: Path, seed: int, steps: int,
                  stop: int | None) -> bool:  # fmt: skip
    """Stage 3: projector and decoder on clips from the bank. Returns whether it is at its end."""
    tok, memory = tokenizer(), Memory(model.config.text.hidden_size)
    eyes = cast(Llava, model.vision)
    parts = nn.ModuleList([eyes.projector, model.text, model.lm_head])
    initialise(parts, model.config.text.num_layers)
    assert eyes.newline is not None
    nn.init.normal_(eyes.newline, std=0.5)
    nn.init.normal_(model.text.embed_tokens.weight, std=0.5)
    with torch.no_grad():
        cast(nn.Linear, eyes.projector[0]).weight /= (
            bank.features[::97].float().square().mean().sqrt()
        )
    eyes.tower.requires_grad_(False)
    opts = optimisers(parts, memory)
    opts[1].add_param_group({"params": [eyes.newline]})

    def step(number: int) -> dict[str, Any]:
        rng = np.random.default_rng([seed, number])
        frames = int(rng.choice(next(f for share, f in CURRICULUM if number < share * steps)))
        scenes = clips(frames, number / steps, rng)
        batch = sequences(bank, tok, scenes, 3, GRID, rng, picture=frames == 0)
        loss, told, _ = loss_and_right(model, bank, batch, memory)
        update(opts, loss + TOLD * told.sum(), number, steps)
        said: dict[str, Any] = {"frames": frames, "loss": round(loss.item(), 4)}
        said |= {k: round(v, 4) for k, v in zip(("memory", "lookup"), told.tolist(), strict=True)}
        if (number + 1) % EVERY == 0 or number + 1 == steps:
            said |= {f"{f} frames": evaluate(model, test, tok, f, some) for f, some in TESTS}
        return said

    return Stage(folder, "decoder", [model, memory, *opts], steps).run(step, stop)


def banks(model: VLM, heads: Heads, some: Tensor, cache: Path,
          each: int) -> tuple[Bank, Bank]:  # fmt: skip
    """Stage 2: features for training and for looks at the progress, over tiles set apart."""
    rng, out = torch.Generator().manual_seed(2), []
    for name, tile, frames in (("bank", some, each), ("test", bundled(), max(1, each // 8))):
        path = cache / f"{name}.pt"
        if not path.exists():
            clutter = name == "bank"
            tower = cast(Llava, model.vision).tower
            bank = build(tower, heads.covered, tile, frames, SIDE, rng, clutter)
            torch.save((bank.features, bank.each, bank.empty), path)
        out.append(Bank(*torch.load(path)))
    return out[0], out[1]


def release(model: VLM, folder: Path) -> None:
    """Writes the weights, and their hash behind the decoder's log."""
    write_weights(model, folder)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    with (folder / "decoder.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps({"released": "model.safetensors", "sha256": digest}) + "\n")
    print(f"{folder / 'model.safetensors'}: sha256 {digest}")


def work(argv: list[str] | None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--cache", type=Path, default=Path("build/demo"))
    parser.add_argument("--seed", type=seed, default=1, help="of the decoder (default 1)")
    parser.add_argument("--tower-steps", type=int, default=7500)
    parser.add_argument("--steps", type=int, default=5000, help="of the decoder")
    parser.add_argument("--stop", type=int, help="end this stage at that step for now")
    parser.add_argument("--each", type=int, default=300, help="frames of every thing in the bank")
    a = parser.parse_args(argv)
    folder = a.cache / f"seed-{a.seed}"
    write_plain(folder)
    torch.set_num_threads(1)  # two seeds run side by side; no result depends on how many cores
    torch.manual_seed(0)
    if not (a.cache / "tiles.pt").exists():
        from . import tiles  # needs PyAV, which training does not

        torch.save(tiles.make(a.cache)[0], a.cache / "tiles.pt")
    model, rng = VLM(read_config(folder)), torch.Generator().manual_seed(3)
    photos = torch.load(a.cache / "tiles.pt")
    some = torch.cat([photos, noise(200, rng), gradients(120, rng)])
    heads = Heads(model.config.vision.tower.hidden_size)
    if not train_tower(model, heads, some, a.cache, a.tower_steps, a.stop):
        return
    bank, test = banks(model, heads, some, a.cache, a.each)
    torch.manual_seed(a.seed)
    if train_decoder(model, bank, test, folder, a.seed, a.steps, a.stop):
        release(model, folder)


def main(argv: list[str] | None = None) -> int:
    return ended(lambda: work(argv))


if __name__ == "__main__":
    sys.exit(main())
