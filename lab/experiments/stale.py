"""Why a token that is gone does less harm than one that stays behind without its update.

The tokens that zipvl-stream leaves out of each layer, five fates for them, everything else alike:

    gone      no later layer sees them (zipvl-stream itself)
    zero      they stay, receive nothing from attention, run their MLPs: the paper's form, for good
    previous  they stay and receive the output of the nearest earlier token that is left (zipvl+)
    frozen    they stay as they were when they were left out: keys and values of later layers are
              projected from that state
    cached    as frozen, but only what follows the prompt sees them
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from zipvl.engine.engine import Engine
from zipvl.model.attention import nearest_earlier
from zipvl.model.batch import Batch
from zipvl.model.cache import Cache, Kept, LayerCache
from zipvl.model.kernels import attend_kept
from zipvl.testing.toy import Watch

from . import clips, draw, stats
from .runner import Job, Record, policy
from .text import TAIL, continuation, follow, windows

METHODS = ("zipvl-stream:tau=0.7", "zipvl-stream:tau=0.97")
FATES = ("gone", "zero", "previous", "frozen", "cached")
QUESTION = 256  # of a prompt, the last tokens that stay
COLUMNS = {
    "method": "method", "fate": "what is left out is", "windows": "windows",
    "extra": "extra loss, nats (95 %)", "left": "tokens left, last layer",
}  # fmt: skip


def left_after(watch: Watch, length: int) -> list[Tensor]:
    """Places of the tokens that every layer of a watched run let go on."""
    alive, out = torch.arange(length), []
    for plan in watch.plans:
        alive = alive if plan.stream is None else alive[plan.stream.cpu()]
        out.append(alive)
    return out


@torch.inference_mode()
def prefill(engine: Engine, ids: Tensor, alive: list[Tensor],
            fate: str) -> tuple[Tensor, list[Cache]]:  # fmt: skip
    """The last hidden state [1, C] and the caches of a prompt ids [T], all of whose tokens are
    carried through all layers as `fate` says once they are not `alive`."""
    model, device = engine.model.text, engine.model.device
    places = torch.arange(len(ids), device=device)
    x = model.embed_tokens(ids.to(device))
    caches: list[Cache] = []
    batch = Batch.build([len(ids)], places, places < 0, model.config, x.dtype)
    for block, some in zip(model.blocks(), alive, strict=True):
        layer, live = block.self_attn, some.to(device)
        h = block.input_layernorm(x)
        q, k = layer.queries(h, batch), layer.keys(h, batch)
        v = layer.heads(layer.v_proj(h))
        seen = live if fate in ("gone", "cached") else places
        o = layer.o_proj(attend_kept(q, k[seen], v[seen], seen).flatten(1))
        if fate == "previous":
            nearest_earlier(o[live].clone(), live, o)
        elif fate == "zero":
            o = torch.zeros_like(o).index_copy(0, live, o[live])
        new = block.feed_forward(x, o)
        x = x.index_copy(0, live, new[live]) if fate in ("frozen", "cached") else new
        held = live if fate == "gone" else places
        caches.append(LayerCache([Kept(k[held], v[held], held.int())], 0))
    return model.norm(x[-1:]), caches


@torch.inference_mode()
def losses(engine: Engine, ids: Tensor, method: str) -> list[Record]:
    """Dense loss and that of every fate on a window."""
    tail = ids[-TAIL:].to(engine.model.device)
    watch = Watch(policy(method))
    ours, _ = continuation(engine, ids, watch, QUESTION)
    alive = left_after(watch, len(ids) - TAIL)
    record: Record = {"left": len(alive[-1]) / (len(ids) - TAIL), "ours": ours}
    for fate in FATES:
        last, caches = prefill(engine, ids[:-TAIL], alive, fate)
        hidden = torch.cat((last, follow(engine, caches, tail[:-1], len(ids) - TAIL)))
        loss = torch.nn.functional.cross_entropy(engine.model.logits(hidden), tail)
        record[fate] = float(loss)
    return [record]


def run(job: Job) -> None:
    engine = job.engine
    some = windows(engine, job.tokens[0], job.samples, job.seed)

    def measure(ids: Any, method: str) -> list[Record]:
        if method == "dense":
            return [{"loss": continuation(engine, ids, policy(method))[0]}]
        return losses(engine, ids, method)

    methods = ("dense", *(job.methods or METHODS))
    found = job.records(map(str, range(job.samples)), methods, lambda u: some[int(u[0])], measure)
    dense = {r["unit"]: r["loss"] for r in found if r["method"] == "dense"}
    rows = [
        {"method": method, "fate": fate, "windows": len(mine), "left": clips.average(mine, "left"),
         "extra": stats.mean([r[fate] - dense[r["unit"]] for r in mine])}
        for (method,), mine in clips.grouped(found, "method").items() if method != "dense"
        for fate in FATES
    ]  # fmt: skip
    job.finish(rows, COLUMNS)
    with draw.panels(1, 1, 6.4) as (fig, axes):
        for i, fate in enumerate(FATES):
            mine = [r for r in rows if r["fate"] == fate]
            place = [n + 0.15 * (i - 2) for n in range(len(mine))]
            draw.curve(axes, place, [r["extra"] for r in mine], fate, lw=0)
        names = [r["method"] for r in rows if r["fate"] == FATES[0]]
        axes.set_xticks(np.arange(len(names)), names)
        axes.set(ylabel="extra loss, nats a token (95 %)", yscale="symlog")
        axes.legend(title="what is left out is", loc="center left", bbox_to_anchor=(1, 0.5))
        fig.suptitle(f"{job.settings()['model']}, {job.samples} windows of {job.tokens[0]} tokens")
        fig.savefig(job.out / "figure.png")
