"""The Triton kernels against the readable path: interpreted here, compiled for GPUs, run on one.

Triton decides at a kernel's definition whether it will be interpreted, by a variable of the
process. So each of the first two is this file run as a script: `python -m tests.test_fused
interpret`, or `compile bfloat16`.
"""

import importlib
import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zipvl.linear import SwiGLU, rms_norm
from zipvl.model import attention
from zipvl.model.batch import Rotate, Spans

ROOT = Path(__file__).parent.parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton, which is made for Linux"
)
TYPES = (torch.float32, torch.float16, torch.bfloat16)
fused: Any = None  # the modules, from the moment a test wants them
step: Any = None


def load() -> None:
    global fused, step
    fused = importlib.import_module("zipvl.model.fused")
    step = importlib.import_module("zipvl.model.fused_decode")


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is allocated holds NaN: what is left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.ones(1).new_empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# --- comparisons, on any device -----------------------------------------------------------------


def oracle(q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
    """Eq. 5 in float64, a head at a time."""
    R, out = q.shape[1] // k.shape[1], []
    future = torch.arange(len(k), device=q.device) > rows[:, None]
    for h in range(q.shape[1]):
        logits = q[:, h].double() @ k[:, h // R].double().T / math.sqrt(q.shape[2])
        out.append(logits.masked_fill_(future, -math.inf).softmax(1).sum(0))
    return torch.stack(out)


def probes(T: int, P: int, device: str, recent: int = 0) -> Tensor:
    """Sorted rows with gaps, the last `recent` of T among them."""
    early = torch.randperm(T - recent)[: P - recent].sort().values
    return torch.cat((early, torch.arange(T - recent, T))).to(device)


def check_probe(device: str, dtype: torch.dtype, T: int, rows: Tensor, R: int, G: int, D: int,
                slack: float = 1) -> None:  # fmt: skip
    """k is a slice of a longer batch and q of wider rows, as views are in attention.py. `slack`:
    how much less exact a GPU's products and powers are."""
    q = torch.randn(len(rows), R * G + 1, D, device=device).to(dtype)[:, 1:]
    k = (2 * torch.randn(T + 5, G, D + 16, device=device)).to(dtype)[3 : T + 3, :, :D]
    with poisoned():
        mass = fused.probe_mass(q, k, rows)
    assert mass.shape == (R * G, T)
    assert mass.dtype == torch.float32
    want = oracle(q, k, rows)
    torch.testing.assert_close(mass.double(), want, rtol=1e-5 * slack, atol=1e-7 * slack)
    future = torch.arange(T, device=device) > rows.max()
    assert not mass[:, future].any()
    if T <= 4096:  # of the readable path too
        plain = attention.probe_mass(q, k, rows)
        torch.testing.assert_close(mass, plain, rtol=2e-5 * slack, atol=1e-7 * slack)


def close(got: Tensor, want: Tensor) -> None:
    """Equal but for float32's last bits, which now and then turn a rounding to 16 bits."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    if got.dtype != torch.float32:
        assert (got == want).float().mean() > 0.99
    rtol = 5e-6 if got.dtype == torch.float32 else 2 * torch.finfo(got.dtype).eps
    torch.testing.assert_close(got, want, rtol=rtol, atol=1e-7)


def check_norm(device: str, dtype: torch.dtype, n: int, C: int) -> None:
    x, h = torch.randn(2, n, C + 8, device=device).to(dtype)[..., :C].unbind()
    weight = (1 + torch.randn(C, device=device)).to(dtype)
    before = x.clone()
    with poisoned():
        got = fused.rms_norm(x, weight, 1e-6)
        total, normed = fused.add_rms_norm(x, h, weight, 1e-6)
    close(got, rms_norm(x, weight, 1e-6))
    assert torch.equal(total, x + h)
    close(normed, rms_norm(x + h, weight, 1e-6))
    assert torch.equal(x, before)


def check_gate(device: str, dtype: torch.dtype, n: int, F: int) -> None:
    """Halves of one product, and two of their own."""
    both = (4 * torch.randn(n, 2 * F, device=device)).to(dtype)
    for gate, up in (both.chunk(2, dim=-1), both.clone().view(2, n, F).unbind()):
        before = up.clone()
        with torch.no_grad():
            want = SwiGLU()(gate.clone(), up)
        out = fused.swiglu(gate, up)
        assert out.data_ptr() == gate.data_ptr()
        assert torch.equal(up, before)
        close(out, want)


def check_rotate(device: str, dtype: torch.dtype, n: int, heads: int, D: int) -> None:
    """On a card, as often as it takes until the rounding of few numbers is no matter of luck."""
    times = 1 if device == "cpu" else -(-20000 // (n * heads * D))
    errors = [rotated(device, dtype, n, heads, D) for _ in range(times)]
    ours, theirs = (sum(error[i] ** 2 for error in errors) ** 0.5 for i in range(2))
    assert ours <= 1.01 * theirs


def rotated(device: str, dtype: torch.dtype, n: int, heads: int, D: int) -> tuple[float, float]:
    """The kernel's error and the readable path's, both 0 where they have to be the same."""
    x = torch.randn(n, heads + 2, D, device=device).to(dtype)[:, 1:-1]
    angles = torch.rand(n + 1, 1, D // 2, device=device)[1:] * 100
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    with poisoned():
        out = fused.rotate(x, cos, sin)
    want = Rotate()(x, cos, sin)
    assert out.is_contiguous()
    if device == "cpu" and dtype != torch.float32:
        assert torch.equal(out, want)
        return 0.0, 0.0
    exact = Rotate()(x.double(), cos.double(), sin.double())  # a GPU rounds less on the way
    return float((out - exact).norm()), float((want - exact).norm())


def check_step(device: str, dtype: torch.dtype, lengths: list[int], R: int, G: int, D: int,
               room: int = 5, merged: list[int] | None = None) -> None:  # fmt: skip
    """Free places hold NaN. Against float64, a sequence and a head at a time."""
    spans = Spans(lengths, device, room, merged, [2.0 + 3 * b for b in range(len(lengths))])
    q = torch.randn(len(lengths), R * G + 2, D, device=device).to(dtype)[:, 1:-1]
    k, v = (torch.randn(spans.total, G, D, device=device).to(dtype) for _ in range(2))
    for start, n, places in zip(spans.starts, lengths, spans.capacity, strict=True):
        k[start + n : start + places], v[start + n : start + places] = torch.nan, torch.nan
    with poisoned():
        out = step.attend_one(q, k, v, Spans([1] * len(lengths), device), spans)
    assert out.shape == q.shape
    assert out.dtype == dtype
    want = torch.empty_like(out, dtype=torch.float64)
    for b, at in enumerate(spans.slices()):
        for h in range(R * G):
            logits = k[at, h // R].double() @ q[b, h].double() / math.sqrt(D)
            if merged:
                logits[: merged[b]] += math.log(spans.weights[b])
            want[b, h] = logits.softmax(0) @ v[at, h // R].double()
    slack = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert (out.double() - want).norm() < slack * want.norm()


# --- interpreted --------------------------------------------------------------------------------

SHAPES = [  # T, P, R, G, D
    (1, 1, 1, 1, 16),
    (5, 1, 7, 1, 80),
    (64, 64, 1, 2, 64),
    (130, 129, 2, 1, 16),
    (70, 20, 7, 2, 128),
    (150, 70, 4, 1, 80),
    (270, 20, 8, 1, 64),
    (90, 9, 3, 1, 256),
]


STEPS = [  # slots of each sequence, R, G, D
    ([1], 1, 1, 16),
    ([64, 1, 300], 7, 2, 64),
    ([129, 65], 1, 3, 80),
    ([3, 200, 17, 64, 1], 8, 1, 128),
]


def teach_bfloat16() -> None:
    """Triton's interpreter holds bfloat16 as 16-bit integers: its conversion cuts bits off where
    GPUs round, and its product multiplies the integers. Here both are what they should be."""
    from triton.runtime import interpreter

    tl, builder = interpreter.tl, interpreter.InterpreterBuilder
    handle, cast, dot = interpreter.TensorHandle, builder.cast_impl, builder.create_dot

    def rounding(self: Any, x: Any, to: Any) -> Any:
        if (x.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, x, to)
        bits = torch.tensor(x.data).bfloat16().view(torch.int16).numpy()
        return handle(bits.view("uint16"), to.scalar)

    def multiply(self: Any, a: Any, b: Any, *others: Any) -> Any:
        wide = [cast(self, x, tl.float32) if x.dtype == tl.bfloat16 else x for x in (a, b)]
        return dot(self, *wide, *others)

    builder.cast_impl, builder.create_dot = rounding, multiply


def interpret() -> None:
    load()
    teach_bfloat16()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shapes = {torch.float32: SHAPES, torch.float16: SHAPES[::4], torch.bfloat16: SHAPES[1::2]}
    for dtype in TYPES:
        for T, P, *sizes in shapes[dtype]:
            check_probe("cpu", dtype, T, probes(T, P, "cpu", min(P // 2, 40)), *sizes)
        if dtype == torch.bfloat16:
            check_probe("cpu", dtype, 400, torch.arange(100, 170), 2, 1, 16)  # all long past
            check_probe("cpu", dtype, 200, torch.arange(190, 90, -1), 1, 1, 16)  # in any order
        for n, C in ((1, 16), (3, 3584), (2, 5120)):
            check_norm("cpu", dtype, n, C)
        for n, F in ((1, 48), (3, 1501)):
            check_gate("cpu", dtype, n, F)
        for n, heads, D in ((1, 1, 16), (3, 7, 80), (5, 4, 128)):
            check_rotate("cpu", dtype, n, heads, D)
        for lengths, *sizes in STEPS:
            check_step("cpu", dtype, lengths, *sizes)
        check_step("cpu", dtype, [90, 7, 200], 2, 2, 16, merged=[30, 0, 200])
        check_step("cpu", dtype, [130], 3, 1, 80, room=0)
    fused.PROGRAMS = 1  # all tokens in one part
    check_probe("cpu", torch.float16, 300, probes(300, 20, "cpu"), 2, 1, 16)


# --- compiled -----------------------------------------------------------------------------------

MOST_SHARED = {80: 163 << 10, 90: 227 << 10}
POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "int64": "*i64", "int32": "*i32"}
Launch = tuple[Any, dict[str, Any], dict[str, Any]]  # kernel, its arguments, options


def launches(work: Callable[[], object]) -> list[Launch]:
    """What `work` would launch."""
    from triton.runtime.jit import JITFunction

    found: list[Launch] = []

    def note(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **named: Any) -> None:
        assert all(n < 1 << 16 for n in grid[1:])
        given = dict(zip(kernel.arg_names, args, strict=False)) | named
        options = {name: given.pop(name) for name in named if name not in kernel.arg_names}
        found.append((kernel, given, options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", note)
        work()
    return found


def build(launch: Launch, target: int, **more: Any) -> tuple[int, str]:
    """Bytes of shared memory, and what cuobjdump says of the machine code, which needs no GPU."""
    import triton
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, given, options = launch
    types, fixed, facts = {}, {}, {}
    for i, p in enumerate(kernel.params):
        value, free = given[p.name], p.do_not_specialize
        if p.is_constexpr or (type(value) is int and value == 1 and not free):
            types[p.name], fixed[p.name] = "constexpr", value
        elif isinstance(value, Tensor):
            types[p.name] = POINTERS[str(value.dtype).removeprefix("torch.")]
        else:
            types[p.name] = "fp32" if isinstance(value, float) else "i32" if value < 1 << 31 else "i64"  # fmt: skip
        if isinstance(value, Tensor) or (type(value) is int and value % 16 == 0 and not free):
            facts[(i,)] = [["tt.divisibility", 16]]
    facts = {at: fact for at, fact in facts.items() if kernel.params[at[0]].name not in fixed}
    source = ASTSource(kernel, types, fixed, facts)
    made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options | more)
    cubin = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    cubin.write_bytes(made.asm["cubin"])
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    done = subprocess.run(
        [tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    )
    return made.metadata.shared, next(line for line in done.stdout.splitlines() if "STACK:" in line)


def spills(usage: str) -> bool:
    """Whether registers are kept in memory: on the stack, for these kernels use none otherwise."""
    words = dict(word.rsplit(":", 1) for word in usage.split())
    return words["STACK"] != "0" or words["LOCAL"] != "0"


def layer(dtype: torch.dtype, T: int = 65536, H: int = 28, G: int = 4, D: int = 128) -> None:
    """All kernels as a layer of LongVA-7B calls them."""

    def some(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    fused.probe_mass(some(128, H, D), some(T, G, D), some(128, dtype=torch.long))
    x, weight, cos = some(T, H * D), some(H * D), some(T, 1, D // 2)
    fused.rms_norm(x, weight, 1e-6)
    fused.add_rms_norm(x, x, weight, 1e-6)
    fused.swiglu(*some(T, 2 * 18944).chunk(2, dim=-1))
    fused.rotate(some(T, H, D), cos, cos)
    for heads, groups in ((H, G), (40, 40)):
        spans = Spans([T], "meta", 16)
        keys = some(spans.total, groups, D)
        step.attend_one(some(1, heads, D), keys, keys, spans, spans)


def compile_all(dtype: torch.dtype) -> None:
    load()
    wanted = launches(lambda: layer(dtype))
    assert len(wanted) == 7 + 4
    for launch in wanted:
        for target, most in MOST_SHARED.items():
            shared, usage = build(launch, target)
            print(dtype, launch[0].__name__, target, shared, usage)
            assert not spills(usage)
            assert shared < most
    if dtype == torch.bfloat16:  # the check can fail
        assert spills(build(wanted[0], 80, maxnreg=32)[1])


# --- here ---------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("work", ["interpret", *(
    pytest.param(f"compile {dtype}", marks=pytest.mark.slow) for dtype in ("bfloat16", "float32"))])  # fmt: skip
def test_kernels_without_a_gpu(work: str, tmp_path: Path) -> None:
    variables = {"TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    variables["TRITON_INTERPRET"] = str(int(work == "interpret"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_fused", *work.split()], cwd=ROOT, env=os.environ | variables,
        capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]


# --- on a GPU -----------------------------------------------------------------------------------


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES)
def test_probe_scores_on_a_gpu(dtype: torch.dtype) -> None:
    load()
    slack = 3 if dtype == torch.float32 else 20  # tensor cores cut sums off
    for T, P, *sizes in [*SHAPES, (70001, 128, 7, 4, 128), (300000, 64, 7, 2, 128)]:
        check_probe("cuda", dtype, T, probes(T, P, "cuda", min(P // 2, 64)), *sizes, slack=slack)
    check_probe("cuda", dtype, 4000, torch.arange(100, 170, device="cuda"), 2, 1, 16, slack=slack)
    check_probe("cuda", dtype, 4000, torch.randperm(4000)[:300].cuda(), 2, 1, 64, slack=slack)


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES)
def test_rows_on_a_gpu(dtype: torch.dtype) -> None:
    load()
    for n, C in ((1, 16), (70001, 3584), (333, 8192)):
        check_norm("cuda", dtype, n, C)
    for n, F in ((1, 48), (5001, 18944)):
        check_gate("cuda", dtype, n, F)
    for n, heads, D in ((1, 1, 16), (333, 7, 80), (70001, 28, 128), (70001, 4, 128)):
        check_rotate("cuda", dtype, n, heads, D)


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES)
def test_steps_on_a_gpu(dtype: torch.dtype) -> None:
    load()
    for lengths, *sizes in [*STEPS, ([70001], 7, 4, 128), ([9000, 1, 20000, 64] * 2, 1, 40, 128)]:
        check_step("cuda", dtype, lengths, *sizes, room=256)
    check_step("cuda", dtype, [9000, 70, 2000], 7, 4, 128, merged=[300, 0, 2000])


@needs_triton
@pytest.mark.gpu
def test_offsets_past_31_bits_on_a_gpu() -> None:
    """Some 10 GB: keys whose rows lie far apart, and a gate of more than 2^31 numbers."""
    load()
    T, P, D = 70000, 64, 128
    wide = torch.empty(T, 32768, dtype=torch.bfloat16, device="cuda")
    k = wide[:, : 2 * D].normal_().unflatten(1, (2, D))
    q, rows = torch.randn(P, 4, D, device="cuda").bfloat16(), probes(T, P, "cuda", 32)
    want = oracle(q, k, rows)
    torch.testing.assert_close(fused.probe_mass(q, k, rows).double(), want, rtol=2e-4, atol=2e-6)
    gate = wide.normal_()
    up, last = torch.full_like(gate, 0.5), gate[-3:].clone()
    fused.swiglu(gate, up)
    with torch.no_grad():
        close(gate[-3:], SwiGLU()(last, up[-3:]))


if __name__ == "__main__":
    work, *types = sys.argv[1:]
    interpret() if work == "interpret" else compile_all(getattr(torch, types[0]))
