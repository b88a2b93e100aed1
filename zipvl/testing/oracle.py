"""The decoder once more, slow and obvious: float64, H heads, full [T, T] masks, nothing gathered.

It follows plans somebody else made and remembers every token's key and value, so it shows what the
engine must compute for these plans. Shares no code with model/. For tests and zipvl.testing.
"""

import math

import torch
from torch import Tensor

from ..model.decoder import Decoder
from ..policy import Plan


class Oracle:
    """One sequence through `decoder`'s weights. Call prefill() once, then step() for each token."""

    def __init__(self, decoder: Decoder):
        self.config = decoder.config
        self.blocks = [_double(dict(block.named_parameters())) for block in decoder.layers]
        self.last = decoder.norm.weight.detach().double()
        self.keys: list[Tensor] = []  # per layer [n, H, D]: all tokens that entered it
        self.values: list[Tensor] = []
        self.held: list[Tensor] = []  # per layer [H, slots]: which of them each head may still see
        self.merged: list[tuple[Tensor, Tensor, float] | None] = []  # summaries k, v [S, H, D] and
        #   what their scores get added

    def prefill(self, x: Tensor, plans: list[Plan], started: Plan | None = None,
                trims: list[dict[int, Tensor]] | None = None,
                turns: Tensor | None = None) -> Tensor:  # fmt: skip
        """Embeddings x [T, C] -> final hidden states [T', C] of the tokens that reach the end.

        `plans` and `trims` are one a layer, `started` is what start() answered; `turns` [3, T] are
        rotary ids, None: places in the prompt, which start() may number anew."""
        x, positions = x.detach().double(), torch.arange(len(x))
        positions = positions if turns is None else turns.T  # [T] or [T, 3]
        heads, first = self.config.num_heads, started or Plan()
        x = x if first.x is None else first.x.double()
        if first.stream is not None:
            anew = first.renumber and turns is None
            entered = torch.arange(len(first.stream)) if anew else first.stream
            x, positions = x[first.stream], positions[entered]
        for layer, (w, plan) in enumerate(zip(self.blocks, plans, strict=True)):
            n = len(x)
            q, k, v = self.project(w, x, positions)
            keep = torch.ones(n, dtype=torch.bool)
            if plan.attend is not None:
                keep = torch.zeros(n, dtype=torch.bool).index_fill(0, plan.attend, True)
            mask = torch.ones(n, n, dtype=torch.bool).tril() & keep  # [T, T]
            mask = mask if plan.mask is None else mask & plan.mask(torch.arange(n))
            o = self.attend(q, k, v, mask.expand(heads, n, n))
            x = self.rest(w, x, fill(o, keep, plan.fill))
            held = torch.arange(n) if plan.cache is None else plan.cache
            self.held.append(self.per_head(held))
            self.merged.append(self.summarise(k, v, self.held[-1], plan.summary))
            if plan.merge is not None:
                into, weight = (self.per_head(x) for x in plan.merge)
                k, v = self.merge(k, into, weight), self.merge(v, into, weight)
            self.keys.append(k)
            self.values.append(v)
            for earlier, slots in (trims[layer] if trims else {}).items():
                self.held[earlier] = self.held[earlier].gather(1, self.per_head(slots))
            if plan.stream is not None:
                x, positions = x[plan.stream], positions[plan.stream]
        return self.norm(x, self.last)

    def step(self, x: Tensor, turn: int, plans: list[Plan]) -> Tensor:
        """One new token with a rotary id, x [1, C] -> [1, C]: of its slots each layer's plan reads
        `attend`, and `leave` of them are let go."""
        x, at = x.detach().double(), torch.tensor([turn])
        for i, (w, plan) in enumerate(zip(self.blocks, plans, strict=True)):
            q, k, v = self.project(w, x, at)
            self.keys[i] = torch.cat((self.keys[i], k))
            self.values[i] = torch.cat((self.values[i], v))
            n, heads = len(self.keys[i]), self.config.num_heads
            held = torch.cat((self.held[i], torch.full((heads, 1), n - 1)), dim=1)
            read = held if plan.attend is None else held.gather(1, self.per_head(plan.attend))
            mask = torch.zeros(heads, 1, n, dtype=torch.bool)
            mask.scatter_(2, read[:, None], True)
            x = self.rest(w, x, self.attend(q, self.keys[i], self.values[i], mask, self.merged[i]))
            self.held[i] = held if plan.leave is None else self.let_go(held, plan.leave)
        return self.norm(x, self.last)

    def merge(self, x: Tensor, into: Tensor, weight: Tensor) -> Tensor:
        """x [n, H, D] where tokens that others join, by head, are weighted means of them all."""
        out = x.clone()
        for h, targets in enumerate(into.tolist()):
            for target in set(targets) - {-1}:
                joins = [t for t, other in enumerate(targets) if other == target]
                w = weight[h, joins].double()
                out[target, h] = (w[:, None] * x[joins, h]).sum(0) / w.sum()
        return out

    def let_go(self, held: Tensor, leave: Tensor) -> Tensor:
        """held [H, n] without the slots `leave`: free places take the last ones that stay."""
        rows, count = [], held.shape[1] - leave.shape[-1]
        for slots, out in zip(held.tolist(), self.per_head(leave).tolist(), strict=True):
            last = [slot for i, slot in enumerate(slots) if i >= count and i not in out]
            rows.append([last.pop(0) if i in out else slots[i] for i in range(count)])
        return torch.tensor(rows)

    def summarise(self, k: Tensor, v: Tensor, held: Tensor,
                  size: int) -> tuple[Tensor, Tensor, float] | None:  # fmt: skip
        """Means of runs of the tokens of k, v [n, H, D] that a head does not hold."""
        gone = [sorted(set(range(len(k))) - set(mine.tolist())) for mine in held]
        count = math.ceil(len(gone[0]) / size) if size else 0
        if not count:
            return None
        means = []
        for x in (k, v):
            heads = [torch.tensor(left).tensor_split(count) for left in gone]
            rows = [[x[run, h].mean(0) for run in runs] for h, runs in enumerate(heads)]
            means.append(torch.stack([torch.stack(row) for row in rows], dim=1))
        return means[0], means[1], math.log(len(gone[0]) / count)

    def correct(self, layer: int, k: Tensor, v: Tensor) -> float:
        """The cache is known to hold k, v [n, G, D], by position, for the tokens it holds: takes
        these, and says how far they are from what the tokens had, as a share of their size."""
        heads, error, size = self.config.num_heads, 0.0, 0.0
        for mine, new in ((self.keys[layer], k), (self.values[layer], v)):
            new = new.double().repeat_interleave(heads // new.shape[1], dim=1)
            for h, held in enumerate(self.held[layer]):
                error += float((mine[held, h] - new[:, h]).square().sum())
                size += float(mine[held, h].square().sum())
                mine[held, h] = new[:, h]
        return math.sqrt(error / size)

    def per_head(self, index: Tensor) -> Tensor:
        """[K] or [G, K] -> [H, K]."""
        heads = self.config.num_heads
        if index.ndim == 1:
            return index.expand(heads, -1)
        return index.repeat_interleave(heads // len(index), dim=0)

    def project(self, w: dict[str, Tensor], x: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, each [n, H, D]."""
        x, out = self.norm(x, w["input_layernorm.weight"]), []
        for name in ("q_proj", "k_proj", "v_proj"):
            y = x @ w[f"self_attn.{name}.weight"].T + w.get(f"self_attn.{name}.bias", 0)
            y = y.unflatten(-1, (-1, self.config.head_dim))
            if name != "v_proj":
                own = w.get(f"self_attn.{name[0]}_norm.weight")
                y = self.rotate(y if own is None else self.norm(y, own), at)
            out.append(y.repeat_interleave(self.config.num_heads // y.shape[1], dim=1))
        return out[0], out[1], out[2]

    def rotate(self, x: Tensor, at: Tensor) -> Tensor:
        """Pairs (i, i + D/2) of x [n, heads, D] as complex numbers, turned by their angle: by `at`
        [n], or where that is [n, 3], so many pairs by each of three."""
        c, half = self.config, self.config.head_dim // 2
        rate = c.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half) / c.rope_factor
        by = at[:, None] if at.ndim == 1 else (
            at.repeat_interleave(torch.tensor(c.rope_sections), dim=1)
        )  # fmt: skip
        turn = torch.exp(1j * by.double()[:, None] * rate)
        y = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat((y.real, y.imag), dim=-1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor,
               merged: tuple[Tensor, Tensor, float] | None = None) -> Tensor:  # fmt: skip
        """q [m, H, D], k, v [n, H, D], mask [H, m, n] -> [m, H * D]; a row that sees nothing: 0."""
        scores = torch.einsum("mhd,nhd->hmn", q, k) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~mask, -torch.inf)
        if merged is not None:  # seen by every row
            more = torch.einsum("mhd,nhd->hmn", q, merged[0]) / math.sqrt(q.shape[-1]) + merged[2]
            scores, v = torch.cat((scores, more), dim=2), torch.cat((v, merged[1]))
        probs = scores.softmax(-1).nan_to_num()
        return torch.einsum("hmn,nhd->mhd", probs, v).flatten(1)

    def rest(self, w: dict[str, Tensor], x: Tensor, o: Tensor) -> Tensor:
        """Output projection, residual, MLP, residual."""
        x = x + o @ w["self_attn.o_proj.weight"].T
        h = self.norm(x, w["post_attention_layernorm.weight"])
        gate, up = h @ w["mlp.gate_proj.weight"].T, h @ w["mlp.up_proj.weight"].T
        return x + (gate * torch.sigmoid(gate) * up) @ w["mlp.down_proj.weight"].T

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return weight * x / (x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt()


def fill(o: Tensor, keep: Tensor, how: str) -> Tensor:
    """What the rows of o [T, .] outside `keep` [T] receive, as Plan.fill says."""
    if how == "own":
        return o
    out, last = torch.zeros_like(o), torch.zeros_like(o[0])
    for t in range(len(o)):
        if keep[t]:
            last = out[t] = o[t]
        elif how == "previous":
            out[t] = last
    return out


def _double(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: w.detach().double() for name, w in weights.items()}
