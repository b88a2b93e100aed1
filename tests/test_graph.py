"""A step that can be replayed equals the ordinary one; fused kernels are in their places.

What a CUDA graph does, repeating recorded kernels on recorded addresses and nothing else, is done on
a CPU by `Tape` with PyTorch's operations.
"""

import copy
import dataclasses
import sys
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import zipvl
from zipvl.engine.engine import Engine
from zipvl.engine.run import Step
from zipvl.engine.speed import FusedNorm, GraphStep, StaticStep, attend_masked, fuse
from zipvl.linear import SwiGLU, rms_norm
from zipvl.model.attention import probe_mass
from zipvl.model.backends import BACKENDS, usable
from zipvl.model.batch import Rotate, Spans
from zipvl.model.kernels import attend_sdpa
from zipvl.policies import Dense

SAME = [
    "dense",
    "zipvl:tau=0.9,always=last",
    "fixed:ratio=0.3",
    "fastv:ratio=0.5",
    "snapkv:budget=40",
]
FAMILIES = ["llava", "llava_onevision_tied"]  # with 4 and with 2 key/value heads for 4 heads
NEW = 14


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


WAITS = {  # operations that read tensors back into Python, or send numbers to the device
    "item", "_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "unique_dim",
    "_unique2", "masked_select", "repeat_interleave", "resolve_conj", "resolve_neg", "lift_fresh",
}  # fmt: skip


class Tape(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph: records operations, undoes what they did, repeats them.

    Numbers and addresses are those of the recording, so a step that depends on anything that is not
    in a tensor repeats a mistake; one that reads a tensor back into Python, or makes one of Python
    numbers, is refused.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple] = []
        self.undo: list[tuple[Tensor, Tensor]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket._qualified_op_name.removeprefix("aten::"), kwargs or {}
        masks = name in ("index", "index_put_") and [
            t for t in tensors(args[1]) if t.dtype == torch.bool
        ]
        waits = bool(masks) or (name in WAITS and kwargs.get("output_size") is None)
        assert not waits, f"{name} waits for the device"
        if func._schema.is_mutable:
            written = zip(func._schema.arguments, args, strict=False)
            written = [x for a, x in written if a.alias_info and a.alias_info.is_write]
            self.undo += [(t, t.clone()) for t in tensors(written)]
        out = func(*args, **kwargs)
        self.ops.append((func, args, kwargs, out))
        return out

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for tensor, before in reversed(self.undo):
            tensor.copy_(before)

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.ops:
            new = func(*args, **kwargs)
            for old, x in zip(tensors(out), tensors(new), strict=True):
                if old.data_ptr() != x.data_ptr():  # not a view, and not written in place
                    old.copy_(x)


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Every graph that is recorded from now on."""
    made: list[Tape] = []

    class Listed(Tape):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Listed)
    monkeypatch.setattr(torch.cuda, "graph", lambda tape: tape)
    return made


def using(engine: Engine, step: type[Step], stops: frozenset[int] = frozenset()) -> Engine:
    other = copy.copy(engine)
    other.step, other.chat = step, dataclasses.replace(engine.chat, stop_ids=stops)
    return other


def prompts(engine: Engine, count: int) -> list[zipvl.Inputs]:
    """Random pictures with questions of different lengths."""
    texts = ["What?", "Say what you see here, and why.", "Name it: " + "and then " * 12, "Count."]
    return [engine.prepare(text, images=[picture()]) for text in texts[:count]]


def picture() -> Any:
    from PIL import Image

    return Image.fromarray(torch.randint(0, 256, (70, 90, 3), dtype=torch.uint8).numpy())


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x[0].item(),
        lambda x: x.tolist(),
        lambda x: int(x.max()),
        lambda x: bool((x > 1).all()),
        lambda x: torch.equal(x, x),
        lambda x: x[x > 1],
        lambda x: x.nonzero(),
        lambda x: x.masked_fill_(x > 1, 0)[x > 0],
        lambda x: x.numpy(),
        lambda x: x.unique(),
        lambda x: torch.tensor([1, 2]),
    ],
)
@torch.inference_mode()
def test_the_tape_refuses_what_a_graph_cannot_hold(look: Callable) -> None:
    x = torch.tensor([1, 2, 3])
    with pytest.raises(AssertionError, match="waits for the device"), Tape():
        look(x)
    assert x.tolist() == [1, 2, 3]


@torch.inference_mode()
def test_the_tape_undoes_and_repeats() -> None:
    x, tape = torch.tensor([1.0, 2.0]), Tape()
    with tape:
        y = x.mul_(3).view(2, 1) + torch.arange(2)
    assert x.tolist() == [1, 2]
    x.fill_(5)
    tape.replay()
    assert (x.tolist(), y.tolist()) == ([15, 15], [[15, 16], [15, 16]])
    tape.replay()
    assert (x.tolist(), y.tolist()) == ([45, 45], [[45, 46], [45, 46]])


# --- the static step ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", SAME)
def test_static_and_replayed_steps_answer_as_the_ordinary_one(
    oracle: Callable, family: str, method: str, tapes: list[Tape]
) -> None:
    """Alone and in a ragged batch of which one sequence stops halfway."""
    engine = zipvl.load(oracle(family).folder, device="cpu")
    batch = prompts(engine, 4)
    options = {"method": method, "max_new_tokens": NEW}
    free = using(engine, Step).generate(batch, **options)
    stop = frozenset(free[1].tokens[5:6])
    wanted = using(engine, Step, stop).generate(batch, **options)
    lengths = {len(r.tokens) for r in wanted}
    assert len({tuple(r.tokens) for r in wanted}) > 2
    assert len(lengths) > 1
    for step in (StaticStep, GraphStep):
        got = using(engine, step, stop).generate(batch, **options)
        assert [r.tokens for r in got] == [r.tokens for r in wanted]
        alone = using(engine, step).generate(batch[2], **options)
        assert alone.tokens == free[2].tokens
    assert tapes[-1].replays == NEW - 2  # one step runs as it is, all others are replayed
    assert len(tapes) == recordings([len(r.tokens) for r in wanted]) + 1
    assert all(len(t.ops) > 50 for t in tapes)


def recordings(lengths: list[int]) -> int:
    """Graphs of a batch whose sequences make so many tokens: its first step runs as it is, and so
    does the first one after those that stopped have left, which is when half of it have."""
    rows, steps, made = len(lengths), 0, 0
    for step in range(NEW - 1):
        live = sum(n > step for n in lengths)
        if 2 * live <= rows:
            rows, steps = live, 0
        steps += live > 0
        made += live > 0 and steps == 2
    return made


def test_recordings_are_counted() -> None:
    assert [recordings(n) for n in ([14, 14], [14, 5], [14, 9, 9, 9], [14, 14, 14, 3])] == [
        1,
        2,
        2,
        1,
    ]


@torch.inference_mode()
def test_steps_differ_in_no_shape_and_no_number(oracle: Callable) -> None:
    """Two recordings of the static step, many tokens apart, are the same but for what tensors hold."""
    engine = zipvl.load(oracle("llava_onevision_tied").folder, device="cpu")
    batch = prompts(engine, 3)
    policy = zipvl.load_policy("fixed:ratio=0.4")

    def outline(x: Any) -> Any:
        return (x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x

    def recordings(kind: type[Step]) -> list[list]:
        out = engine.prefill(batch, policy, 30, {})
        step, found = kind(engine.model, out.caches, out.batch.notes, policy, engine.attend), []
        for n in range(20):
            ids = torch.randint(3, 60, (3,))
            at = torch.tensor([len(i) for i in batch]) + n
            if n % 9:
                step(ids, at)
            else:
                with Loose() as tape:
                    step(ids, at)
                found.append([(f, tree_map(outline, (a, k, o))) for f, a, k, o in tape.ops])
        return found

    first, second, third = recordings(StaticStep)
    assert first == second == third
    one, two, _ = recordings(Step)
    assert one != two


class Loose(Tape):
    """A tape that lets everything pass and undoes nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.ops.append((func, args, kwargs, out))
        return out


@torch.inference_mode()
def test_masked_attention_equals_the_slices() -> None:
    """Ragged caches at every filling, with one head group and several."""
    for heads, groups in ((4, 4), (6, 2), (5, 1)):
        lengths, room = [3, 17, 1], 4
        spans = Spans(lengths, "cpu", room)
        k, v = torch.randn(2, spans.total, groups, 8)
        for _ in range(room):
            q, rows = torch.randn(3, heads, 8), Spans([1] * 3, "cpu")
            want = attend_sdpa(q, k, v, rows, spans)
            torch.testing.assert_close(attend_masked(q, k, v, rows, spans), want)
            spans.grow(Spans([1] * len(spans), spans.used.device))


def test_methods_that_change_their_cache_decode_step_by_step(
    oracle: Callable, tapes: list[Tape]
) -> None:
    engine = zipvl.load(oracle("llava").folder, device="cpu")
    for method in ("h2o", "streaming", "zipvl-quant", "fixed:kv_bits=4", "kivi", "dense"):
        free, graph = (
            using(engine, s).generate("Hello", method=method, max_new_tokens=5, ignore_eos=True)
            for s in (Step, GraphStep)
        )
        assert graph.tokens == free.tokens
        assert len(tapes) == (method == "dense")
    for method in (*SAME, "zipvl+", "random", Dense()):
        assert StaticStep.repeats(zipvl.load_policy(method))


# --- fused kernels ------------------------------------------------------------------------------


def test_fused_kernels_take_the_places_of_plain_ones(
    oracle: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the plain functions under the kernels' names: tests/test_fused.py has the kernels."""
    calls: Counter[str] = Counter()

    def counted(name: str, function: Callable) -> Callable:
        def call(*args: Any) -> Any:
            calls[name] += 1
            return function(*args)

        return call

    kernels = {
        "rms_norm": rms_norm,
        "add_rms_norm": lambda x, h, weight, eps: (x + h, rms_norm(x + h, weight, eps)),
        "rotate": Rotate(),
        "swiglu": SwiGLU(),
        "probe_mass": probe_mass,
    }
    stand_in = SimpleNamespace(**{n: counted(n, f) for n, f in kernels.items()})
    monkeypatch.setitem(sys.modules, "zipvl.model.fused", stand_in)
    folder = oracle("llava_onevision_tied").folder
    plain, fused = (zipvl.load(folder, device="cpu") for _ in range(2))
    fuse(fused.model.text)
    batch = prompts(plain, 3)
    options = {"method": "zipvl:tau=0.9,always=last", "max_new_tokens": 6, "ignore_eos": True}
    want, got = (e.generate(batch, **options) for e in (plain, fused))
    assert [r.tokens for r in got] == [r.tokens for r in want]
    assert calls.keys() == kernels.keys()
    layers = plain.config.text.num_layers
    assert calls["add_rms_norm"] == calls["swiglu"] == 6 * layers
    assert calls["probe_mass"] == 3 * layers


# --- on a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("method", SAME)
@pytest.mark.parametrize("attn", ["sdpa", "torch-flash"])
def test_graphs_decode_as_the_ordinary_step(oracle: Callable, method: str, attn: str) -> None:
    """A real capture: float32 through masked SDPA token by token; FlashAttention in bfloat16 by its
    logits, because bfloat16 has ties."""
    dtype = "float32" if attn == "sdpa" else "bfloat16"
    folder = oracle("llava_onevision_tied").folder
    engine = zipvl.load(folder, device="cuda", dtype=dtype, attn=attn)
    batch = prompts(engine, 3)
    if attn == "sdpa":
        options = {"method": method, "max_new_tokens": NEW, "ignore_eos": True}
        for asked in (batch, batch[:1]):
            want, got = (using(engine, s).generate(asked, **options) for s in (Step, GraphStep))
            assert [r.tokens for r in got] == [r.tokens for r in want]
    policy, ids = zipvl.load_policy(method), torch.randint(3, 60, (NEW, 3), device="cuda")
    with torch.inference_mode():
        for kind in (Step, GraphStep):
            out = engine.prefill(batch, policy, NEW, {})
            attend = BACKENDS[engine.backend]
            step = kind(engine.model, out.caches, out.batch.notes, policy, attend)
            at = torch.tensor([len(i) for i in batch], device="cuda")
            logits = torch.stack([step(row, at + n).clone() for n, row in enumerate(ids)])
            want = logits if kind is Step else want
    assert (logits - want).norm() / want.norm() < {"sdpa": 1e-4, "torch-flash": 0.03}[attn]


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["dense", "zipvl:tau=0.9", "zipvl-stream:tau=0.5"])
def test_fused_kernels_answer_as_plain_ones(oracle: Callable, method: str) -> None:
    folder = oracle("llava_onevision_tied").folder
    plain, fast = (
        zipvl.load(folder, device="cuda", dtype="float32", kernels=k) for k in ("plain", "auto")
    )
    assert (plain.step, fast.step) == (Step, GraphStep)
    assert isinstance(fast.model.text.norm, FusedNorm)
    text = "Tell me more about " + "this and that " * 300
    a, b = plain.logits(text, method), fast.logits(text, method)
    same = ~(a.isnan() | b.isnan())
    assert same.any()
    assert (a - b)[same].norm() / a[same].norm() < 1e-4
    batch = prompts(plain, 3)
    options = {"method": method, "max_new_tokens": NEW, "ignore_eos": True}
    want, got = (e.generate(batch, **options) for e in (plain, fast))
    assert [r.tokens for r in got] == [r.tokens for r in want]


@pytest.mark.gpu
@pytest.mark.parametrize("T", [16384, 20001, 33000])
def test_cudnn_equals_flash_attention_at_long_prompts(T: int) -> None:
    """Padded to rounded lengths; poisoned memory behind the tensors must not matter."""
    if not usable("cudnn", torch.device("cuda"), torch.bfloat16, 128):
        pytest.skip("cuDNN's kernel is taken on Hopper alone")
    torch.full((1 << 28,), torch.nan, device="cuda")  # what the allocator hands out next
    q, k, v = (torch.randn(T, n, 128, device="cuda", dtype=torch.bfloat16) for n in (28, 4, 4))
    spans = Spans([T], "cuda")
    want, got = (BACKENDS[n](q, k, v, spans, spans) for n in ("torch-flash", "cudnn"))
    assert got.isfinite().all()
    assert (got.float() - want.float()).norm() / want.float().norm() < 0.01
