"""What a prefill does: no row that nobody uses, and every multiply-add counted."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import zipvl
from zipvl.engine.stats import Recorder, dense_work
from zipvl.model import attention
from zipvl.model.batch import Batch, Spans
from zipvl.model.decoder import Prefilled
from zipvl.model.kernels import attend_sdpa
from zipvl.policies import load_policy
from zipvl.policy import Policy
from zipvl.testing.toy import Toy

METHODS = [
    "dense", "zipvl:tau=0.7,recent=8,random=8", "zipvl:tau=0.7,always=none", "zipvl+:tau=0.5",
    "zipvl:tau=0.5,always=last,fill=own", "zipvl-stream:tau=0.8,recent=8,random=8",
    "zipvl-stream:tau=0.8,always=last,first=1", "random:ratio=0.3,always=none,fill=previous",
    "fastv:after=1,ratio=0.3", "snapkv:budget=20,window=4", "h2o:heavy=5,recent=4", "kivi",
    "zipvl-quant:tau=0.7,interval=3",
]  # fmt: skip


def batch_of(toy: Toy, lengths: list[int]) -> tuple[Tensor, Batch]:
    prompts = [toy.prompt(n) for n in lengths]
    x = toy.decoder.embed_tokens(torch.cat([ids for ids, _ in prompts]))
    at, visual = torch.cat([torch.arange(n) for n in lengths]), torch.cat([v for _, v in prompts])
    return x, Batch.build(lengths, at, visual, toy.decoder.config, x.dtype)


def prefill(toy: Toy, policy: Policy, lengths: list[int], ends: bool) -> Prefilled:
    x, batch = batch_of(toy, lengths)
    return toy.decoder.prefill(x, batch, policy, attend_sdpa, room=2, ends=ends)


@pytest.mark.parametrize("lengths", [[150], [40, 1, 150, 40], [33, 33]])
@pytest.mark.parametrize("method", METHODS)
@torch.inference_mode()
def test_the_last_tokens_alone_are_what_all_rows_give(method: str, lengths: list[int]) -> None:
    toy = Toy.build(4, 2)
    whole = prefill(toy, load_policy(method), lengths, False)
    alone = prefill(toy, load_policy(method), lengths, True)
    last = whole.batch.spans.ends
    torch.testing.assert_close(alone.hidden, whole.hidden[last], rtol=1e-4, atol=1e-5)
    assert torch.equal(alone.batch.positions, whole.batch.positions[last])
    assert alone.batch.spans.lengths == [1] * len(lengths)
    for one, other in zip(alone.caches, whole.caches, strict=True):
        for b in range(len(lengths)):
            assert all(map(torch.equal, one.view(b), other.view(b)))


@torch.inference_mode()
def test_the_last_layer_computes_one_row_a_sequence() -> None:
    toy, rows = Toy.build(4, 2, layers=2), []
    for block in toy.decoder.blocks():
        for part in (block.self_attn.q_proj, block.self_attn.o_proj, block.mlp):
            part.register_forward_hook(lambda _, x, out: rows.append(len(out)))
    prefill(toy, Policy(), [30, 20], True)
    assert rows == [50, 50, 50, 2, 2, 2]


class Counter:
    """An attention kernel that counts its query-key pairs and computes nothing."""

    def __init__(self) -> None:
        self.pairs = 0.0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, rows: Spans, slots: Spans) -> Tensor:
        for m, n in zip(rows.lengths, slots.lengths, strict=True):
            self.pairs += m * n / (2 if m == n > 1 else 1)
        return torch.zeros_like(q)

    def kept(self, q: Tensor, k: Tensor, v: Tensor, kept: Tensor, more: None) -> Tensor:
        self.pairs += len(q) * len(kept) / 2
        return torch.zeros_like(q)


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("method", METHODS)
@torch.inference_mode()
def test_work_is_what_was_multiplied(
    method: str, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every matrix product of the prefill as PyTorch counts it, and the pairs of the kernel."""
    toy, lengths, kernel = Toy.build(4, 2), [150, 61], Counter()
    monkeypatch.setattr(attention, "attend_kept", kernel.kept)
    config, watch = toy.decoder.config, Recorder(torch.device("cpu"), toy.decoder.config)
    x, batch = batch_of(toy, lengths)
    lone = {torch.ops.aten.mv: lambda weight, x, out_shape=None: 2 * weight[0] * weight[1]}
    with FlopCounterMode(display=False, custom_mapping=lone) as products:
        toy.decoder.prefill(x, batch, load_policy(method), kernel, 2, None, watch, ends)
    work = sum(sum(layer.work) for layer in watch.layers)
    attention_work = 2 * config.num_heads * config.head_dim * kernel.pairs
    assert work == products.get_total_flops() / 2 + attention_work
    dense = sum(dense_work(config, n, ends) for n in lengths)
    assert (work == dense) == (method in ("dense", "kivi"))


def test_statistics_say_the_share() -> None:
    engine = zipvl.load(device="cpu")
    inputs = engine.prepare("List all objects in order.", video=zipvl.demo_clip())
    share = {}
    for method in ("dense", "zipvl", "zipvl-stream", "h2o"):
        stats = engine.generate(inputs, method, max_new_tokens=1).stats
        share[method] = stats.to_dict()["prefill_work"]
    assert share["dense"] == 1 < share["h2o"]
    assert share["zipvl-stream"] < share["zipvl"]
