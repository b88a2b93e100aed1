"""`--compile`: compiled rows equal plain ones, and a step that can be replayed equals the ordinary one.

There was no GPU where this was written. What a CUDA graph does, repeating recorded kernels on
recorded addresses and nothing else, is done here by `Tape` with PyTorch's operations on a CPU.
"""

import copy
import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import zipvl
from zipvl import UsageError
from zipvl.engine.engine import Engine, Step
from zipvl.engine.speed import GraphStep, StaticStep, attend_masked, compiled
from zipvl.linear import FEW, SwiGLU
from zipvl.model.batch import Rotate, Spans
from zipvl.model.decoder import rms_norm
from zipvl.model.kernels import BACKENDS, attend_sdpa
from zipvl.policies import Dense

rotate, gated = Rotate(), SwiGLU()

ROOT = Path(__file__).parent.parent
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
        waits = bool(masks) or name in WAITS
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
    # one step of each batch runs as it is, all others are replayed; who stops at the first token or
    # the last does not leave a smaller batch to decode
    steps = min(max(lengths), NEW - 1)
    batches = 1 + sum(0 < n < steps for n in lengths)
    assert tapes[-1].replays == NEW - 2
    assert sum(t.replays for t in tapes[:-1]) == steps - batches
    assert all(len(t.ops) > 50 for t in tapes)


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
            spans.grow()


def test_methods_that_change_their_cache_are_refused(oracle: Callable) -> None:
    engine = using(zipvl.load(oracle("llava").folder, device="cpu"), StaticStep)
    for method, what in {
        "h2o": "H2O drops cached tokens",
        "streaming": "StreamingLLM drops cached tokens",
        "zipvl-quant": "ZipVLQuant quantises its cache",
        "fixed:kv_bits=4": "Fixed quantises its cache",
        "kivi": "KIVI quantises its cache",
    }.items():
        with pytest.raises(UsageError, match=f"{what} while decoding.*leave out --compile"):
            engine.generate("Hello", method=method)
        assert using(engine, Step).generate("Hello", method=method, max_new_tokens=2).tokens
    for method in (*SAME, "zipvl+", "random", Dense()):
        StaticStep.check(zipvl.load_policy(method))


# --- compiled rows ------------------------------------------------------------------------------


def close(got: Tensor, want: Tensor) -> None:
    """Within rounding: what one order of float32 operations differs from another, then one cast."""
    step = {torch.float32: 1e-6, torch.bfloat16: 2**-7}[want.dtype]
    torch.testing.assert_close(got.float(), want.float(), rtol=step, atol=4 * step)


@pytest.mark.slow
@torch.inference_mode()
def test_one_compiled_function() -> None:
    """The short form of the next test: compiling the first function takes longest."""
    turn = compiled(rotate)
    for rows in (FEW, FEW + 1, FEW + 300):
        with torch.compiler.set_stance("default" if rows == FEW + 1 else "fail_on_recompile"):
            q, (cos, sin) = torch.randn(rows, 3, 16), torch.randn(2, rows, 1, 8)
            got, want = turn(q, cos, sin), rotate(q, cos, sin)
            close(got, want)
            assert rows > FEW or torch.equal(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_compiled_rows_equal_plain_ones_at_any_length(dtype: torch.dtype) -> None:
    """Compiled once: what follows has other lengths and must not compile again."""
    norm, turn, gate = (compiled(f) for f in (rms_norm, rotate, gated))

    def both(rows: int) -> None:
        x, w = torch.randn(rows, 48, dtype=dtype), torch.rand(48, dtype=dtype)
        close(norm(x, w, 1e-6), rms_norm(x, w, 1e-6))
        q, (cos, sin) = (
            torch.randn(rows, 3, 16, dtype=dtype),
            torch.randn(2, rows, 1, 8, dtype=dtype),
        )
        close(turn(q, cos, sin), rotate(q, cos, sin))
        a, b = torch.randn(2, rows, 96, dtype=dtype)
        close(gate(a.clone(), b), gated(a, b))

    both(FEW + 1)
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows in (1, FEW, FEW + 2, FEW + 777, 4 * FEW):
            both(rows)


def test_gradients_go_the_plain_way() -> None:
    double, calls = compiled(lambda x: calls.append(1) or x * 2), []
    x = torch.randn(FEW + 5, 3, requires_grad=True)
    double(x).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2))
    assert calls == [1]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dense", "fixed:ratio=0.4"])
def test_a_compiled_engine_answers_as_a_plain_one(oracle: Callable, method: str) -> None:
    folder = oracle("llava_onevision_tied").folder
    torch.compiler.reset()
    plain, fast = (zipvl.load(folder, device="cpu", compile=c) for c in (False, True))
    assert fast.step is Step  # graphs are for CUDA
    plain.chunk = fast.chunk = FEW + 50
    text = plain.prepare("Tell me more about " + "this and that " * FEW)
    assert len(text) > 2 * FEW
    with torch.compiler.set_stance("fail_on_recompile"):  # loading has compiled what is needed
        a, b = plain.logits(text, method), fast.logits(text, method)
    assert 0 < (a - b).abs().max() < 1e-4
    options = {"method": method, "max_new_tokens": 12, "ignore_eos": True}
    assert fast.generate(text, **options).tokens == plain.generate(text, **options).tokens


def test_a_machine_that_cannot_compile_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        try:
            raise FileNotFoundError("cl is not found.\nand a long story")
        except FileNotFoundError as e:
            raise RuntimeError("backend='inductor' raised:") from e

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UsageError) as caught:
        zipvl.load(device="cpu", compile=True)
    assert str(caught.value).startswith("--compile cannot be used here (cl is not found.): install")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_without_a_compiler(tmp_path: Path) -> None:
    """The real thing: a compiler that does not exist, and nothing compiled earlier to fall back on."""
    missing = {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "generate.py", "-p", "Hello", "--compile", "-q", "--device", "cpu"],
        cwd=ROOT, env=os.environ | missing, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: --compile cannot be used here")
    assert done.stderr.count("\n") == 1


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
def test_compiled_rows_on_a_gpu(oracle: Callable) -> None:
    folder = oracle("llava_onevision_tied").folder
    plain, fast = (
        zipvl.load(folder, device="cuda", dtype="float32", compile=c) for c in (False, True)
    )
    assert fast.step is GraphStep
    text = "Tell me more about " + "this and that " * FEW
    a, b = plain.logits(text), fast.logits(text)
    assert (a - b).norm() / a.norm() < 1e-4
