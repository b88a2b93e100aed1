"""Trains the network of the method attnpred_reimpl on attention of one's own model.

    python -m lab.attnpred                                  # the bundled demo model, in minutes
    python -m lab.attnpred -m PATH --frames 32 --out mine.safetensors

The model lists what it sees in clips of the demo world, and every step of an answer, in each layer
and key/value head, is an example: the 64 rows before it, as zipvl/policies/attnpred.py pools them,
and its own. The network learns the latter by the squared error. Writes the weights, beside them a
log of the training, and on stdout one line of JSON: on prompts that were held out, the error of the
network, of the last row and of means of the rows, and the share of a row that the best quarter of
its blocks by each holds. Blocks that a step reads anyway, the first and the newest, do not count.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from zipvl.engine.engine import Engine
from zipvl.engine.load import load
from zipvl.engine.run import Run
from zipvl.engine.sampler import Sampling
from zipvl.errors import UsageError
from zipvl.policies.attnpred import BLOCK, ROWS, AttnPredLast, pooled
from zipvl.policies.attnpred_cnn import predict
from zipvl.policy import Notes, Plan, StepView

from .command import Parser, count, counts, ended, seed
from .eval.tasks import LARGEST, Item, task_items
from .raw import rounded, write_json

ANSWER = 32  # new tokens at most
ENDS = 1  # blocks at either end that do not count
HEADS, BATCH = 16, 4  # histories of one step of an answer, and such steps, that one update sees
RATE = 4e-3
MEANS = (0.5, 0.2, 0.1, 0.05, 0.02)  # weights of the newest row: the best one is compared
Foretell = Callable[[Tensor], Tensor]  # histories [N, ROWS, blocks] -> rows [N, blocks]


class Recorder(AttnPredLast):
    """Reads all, and forgets no row."""

    def step(self, view: StepView) -> Plan:
        row = view.by_group(pooled(view.mass()))[:, None]  # [G, 1, blocks]
        old = view.notes[view.layer]
        old = F.pad(old, (0, row.shape[2] - old.shape[2]))
        view.notes[view.layer] = torch.cat((old, row), dim=1)
        return Plan()


@dataclass(frozen=True)
class Answer:
    """The rows of one answer, those of the prompt's end in front."""

    rows: Tensor  # [N, ROWS + steps, blocks], N layers x key/value heads
    prompt: int  # its tokens

    @property
    def steps(self) -> int:
        return self.rows.shape[1] - ROWS

    def example(self, step: int) -> tuple[Tensor, Tensor]:
        """What comes before a step, [N, ROWS, blocks], and its row [N, blocks]."""
        last = (self.prompt + step + 1) // BLOCK - ENDS
        some = self.rows[:, step : step + ROWS + 1, ENDS:last]
        return some[:, :-1], some[:, -1]


def record(engine: Engine, item: Item) -> Answer:
    """What the model looks at while it answers a question."""
    side = min(2 * engine.config.vision.media.size, LARGEST)
    inputs = engine.prepare(item.question, video=item.video(side).numpy(), frames=item.frames)
    run = Run(engine, [inputs], Recorder(dense=0), Sampling())
    for _ in run.steps(ANSWER, ignore_eos=False):
        pass
    notes = run.notes[0]
    rows = [notes[layer] for layer in range(engine.config.text.num_layers)]
    return Answer(torch.cat(rows).cpu().clone(), len(inputs))


def record_all(engine: Engine, items: list[Item]) -> list[Answer]:
    """Those with an example: prompts of 64 tokens and more, answers of two and more."""
    bar = tqdm(items, "record", unit="answer", disable=not sys.stderr.isatty())
    found = [record(engine, item) for item in bar]
    return [one for one in found if one.prompt >= max(ROWS, (2 * ENDS + 2) * BLOCK) and one.steps]


def train(answers: list[Answer], steps: int, seed: int) -> tuple[dict[str, Tensor], list[Any]]:
    """The network's weights, and the mean loss of every twentieth of the steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = {"conv1": nn.Conv2d(1, 16, 3), "conv2": nn.Conv2d(16, 32, 3),
                  "conv3": nn.Conv1d(32, 1, 1)}  # fmt: skip
        network = dict(nn.ModuleDict(layers).named_parameters())
    size = torch.cat([one.rows.square().mean(dim=(1, 2)) for one in answers]).mean().sqrt().item()
    with torch.no_grad():  # numbers far below 1 come in and go out: begin as if they were near it
        network["conv1.weight"].div_(size)
        network["conv3.weight"].mul_(size)
        network["conv3.bias"].mul_(size)
    chance = torch.Generator().manual_seed(seed)
    draw = lambda n: int(torch.randint(n, (), generator=chance))
    optimiser = torch.optim.Adam(network.values(), lr=RATE, eps=1e-12)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    log, losses = [], []
    for number in tqdm(range(1, steps + 1), "train", disable=not sys.stderr.isatty()):
        optimiser.zero_grad()
        loss = torch.zeros(())
        for _ in range(BATCH):
            answer = answers[draw(len(answers))]
            history, row = answer.example(draw(answer.steps))
            some = torch.randperm(len(row), generator=chance)[:HEADS]
            loss = loss + F.mse_loss(predict(network, history[some]), row[some]) / BATCH
        loss.backward()
        optimiser.step()
        rate.step()
        losses.append(loss.item())
        if number % max(1, steps // 20) == 0:
            log.append({"step": number, "loss": sum(losses) / len(losses)})
            losses = []
    return {name: w.detach().clone() for name, w in network.items()}, log


@torch.no_grad()
def score(answers: list[Answer], foretell: Foretell) -> dict[str, float]:
    """The mean squared error over all numbers of all rows; and of what a row sums to, the share in
    the quarter of its blocks that is foretold to be largest, mean over rows."""
    error, held = [], []
    for answer in answers:
        for step in range(answer.steps):
            history, row = answer.example(step)
            guess = foretell(history)
            error.append((guess - row).square().flatten())
            best = guess.topk(max(1, row.shape[1] // 4)).indices
            held.append(row.gather(1, best).sum(1) / row.sum(1).clamp(min=1e-12))
    return {"error": torch.cat(error).mean().item(), "held": torch.cat(held).mean().item()}


def mean(ema: float) -> Foretell:
    """The untrained rule; 1 is the last row."""
    policy = AttnPredLast(ema=ema)
    return lambda history: policy.foretell(history, Notes(0))


def parse(argv: list[str] | None) -> Any:
    parser = Parser(__doc__, "python -m lab.attnpred")
    add = parser.add_argument
    add("-m", "--model", help="folder or hub id (default: the bundled demo model)")
    add("--out", type=Path, default=Path("results/attnpred.safetensors"),
        help="file of the weights (default: %(default)s)")  # fmt: skip
    add("--frames", type=counts, default="64,256",
        help="frames of a clip, comma between (default: %(default)s)")  # fmt: skip
    add("--prompts", type=count, default=40, help="of a frame count, to learn from (default 40)")
    add("--held", type=count, default=10, help="of a frame count, to be held out (default 10)")
    add("--steps", type=count, default=1500, help="updates of the network (default 1500)")
    add("--seed", type=seed, default=0)
    add("--device", default="auto")
    return parser.parse_args(argv)


def work(argv: list[str] | None) -> None:
    a = parse(argv)
    if a.out.is_dir():
        raise UsageError(f"--out {a.out} is a folder: name a file")
    if a.out.suffix == ".json":
        raise UsageError(f"--out {a.out} is where the log goes: name a file, x.safetensors")
    began = time.time()
    a.out.parent.mkdir(parents=True, exist_ok=True)
    engine, learn, held = load(a.model, device=a.device), [], []
    for frames in a.frames:
        items = task_items("list", frames, a.prompts + a.held, a.seed)
        learn += items[: a.prompts]
        held += items[a.prompts :]
    seen, unseen = (record_all(engine, items) for items in (learn, held))
    if not seen or not unseen:
        raise UsageError("no prompt is long enough, or no answer: use more --frames or --prompts")
    network, log = train(seen, a.steps, a.seed)
    ema = min(MEANS, key=lambda weight: score(seen, mean(weight))["error"])
    rules = {"network": lambda x: predict(network, x), "last": mean(1.0), "ema": mean(ema)}
    found = {name: score(unseen, rule) for name, rule in rules.items()}
    a.out.write_bytes(save(network))
    settings = {
        "model": Path(a.model).name if a.model else "demo", "frames": a.frames,
        "prompts": a.prompts, "held": a.held, "steps": a.steps, "seed": a.seed,
        "examples": sum(len(one.rows) * one.steps for one in seen),
    }  # fmt: skip
    result = settings | {"ema_weight": ema} | found
    write_json(a.out.with_suffix(".json"), rounded(result | {"training": log}, 9))
    print(json.dumps(rounded(result | {"seconds": round(time.time() - began)}, 9)))


def main(argv: list[str] | None = None) -> int:
    return ended(lambda: work(argv))


if __name__ == "__main__":
    sys.exit(main())
