"""The CUDA path without a GPU: on a pretend device (pretend.py) that refuses what CUDA refuses and
counts how often the host waits.

What the device says of single operators is held against a real one where there is a GPU.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_intern
import tiny_qwen
import torch
import torch.nn.functional as F
from PIL import Image
from pretend import Card, Fake, pretend
from pretend_kernels import FUSED, Refused
from test_graph import using
from torch import Tensor

import zipvl
from zipvl import UsageError
from zipvl.engine.engine import Engine
from zipvl.engine.load import pick_device, pick_dtype
from zipvl.engine.run import Run, Step
from zipvl.engine.sampler import Sampling
from zipvl.engine.speed import GraphStep
from zipvl.engine.stats import Recorder
from zipvl.model import backends
from zipvl.model.backends import BACKENDS, pick
from zipvl.model.batch import Spans, sent
from zipvl.model.decoder import Decoder
from zipvl.model.kernels import attend_sdpa
from zipvl.policies import METHODS

ZIPVL = "zipvl:tau=0.9,recent=8,random=8"
SETTINGS = [  # every method, made to leave something out of prompts as short as these
    "dense", ZIPVL, f"{ZIPVL},fill=own",
    "zipvl:tau=0.8,summary=8", "zipvl:tau=0.9,kv_bits=4,interval=2", "zipvl:tau=0.9,kv_bits=4/2,interval=2",
    "zipvl+:tau=0.9,recent=8,random=8", "zipvl-stream", "fixed:ratio=0.4", "random:ratio=0.4", "fastv",
    "fastv:variant=mask", "streaming:sinks=2,window=24", "h2o:heavy=12,recent=12", "snapkv:budget=40",
    "snapkv:budget=40,summary=8", "zipvl-quant:interval=2", "zipcache:interval=2", "kivi:residual=32",
]  # fmt: skip
NEWER = [
    "hired:ratio=0.4", "visionzip_like:dominant=2,contextual=1", "vidcom2_like:ratio=0.5", "pyramiddrop",
    "sparsevlm", "sgl", "minference_ref:vertical=8,slash=8", "flexprefill_ref:block=16,budget=16",
    "anchor_like", "keyformer:every=2", "prefixkv", "elastic", "vlcache:ratio=0.4", "lookm:ratio=0.4",
    "scope:budget=40,answer=2,recent=1", "think:window=16,budget=40", "tidal:budget=24,first=1",
    "attnpred_last:budget=48,sinks=16,local=16,dense=0",
]  # fmt: skip
SOME = (
    "sparsevlm",
    "elastic",
    "anchor_like",
    "tidal:budget=24,first=1",
    "think:window=16,budget=40",
)
SLOW = partial(pytest.param, marks=pytest.mark.slow)
NEW, FEW = 4, 3  # tokens; layers
BEFORE = dict(vars(torch.cuda))
REAL = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    yield
    untouched()


def untouched() -> None:
    now = {} if REAL else vars(torch.cuda)  # a real device changes them itself
    assert [name for name, value in now.items() if BEFORE.get(name, value) is not value] == []
    assert Fake.card is None
    assert not torch._C._len_torch_function_stack()
    assert not torch.utils._python_dispatch._len_torch_dispatch_stack()


@pytest.fixture
def card() -> Iterator[Card]:
    with pretend() as card:
        yield card


@cache
def loaded(device: str, layers: int = 8, **options: Any) -> Engine:
    """The demo model, or its first layers, which are faster, make no sense, and do in float32. Each
    kind of pretend device needs other options."""
    engine = zipvl.load(device=device, **options)
    del engine.model.text.layers[layers:]
    object.__setattr__(engine.config.text, "num_layers", layers)
    return engine


@cache
def frames() -> np.ndarray:
    clip = zipvl.load(device="cpu").prepare("What?", video=str(zipvl.demo_clip()), frames=16)
    return clip.media[0].crops.numpy()


def asked(engine: Engine, count: int = 3) -> list[zipvl.Inputs]:
    """A video, a picture and text alone; then more videos. Of different lengths."""
    picture = Image.fromarray(frames()[3])
    first = [
        engine.prepare("List all objects in order.", video=frames()),
        engine.prepare("What do you see here? " + "And what else? " * 3, images=[picture]),
        engine.prepare("Hello, " + "and " * 40 + "hello."),
    ]
    more = [engine.prepare("What comes first?", video=frames()[:n]) for n in range(14, 9, -1)]
    return (first + more)[:count]


def answers(engine: Engine, method: str, **options: Any) -> list[list[int]]:
    """Tokens of a ragged batch, and of its first prompt alone."""
    options = {"max_new_tokens": NEW, "ignore_eos": True, "method": method} | options
    batch = asked(engine)
    return [
        r.tokens for r in [*engine.generate(batch, **options), engine.generate(batch[0], **options)]
    ]


@cache
def wanted(method: str, layers: int = 8, **options: Any) -> list[list[int]]:
    return answers(loaded("cpu", layers), method, **options)


# --- the device itself --------------------------------------------------------------------------

SAYS: list[tuple[str, Callable[[Tensor, Tensor], Any]]] = [  # of x on CUDA and y on the CPU
    ("refused", lambda x, y: x + y),
    ("refused", lambda x, y: torch.cat([x, y])),
    ("refused", lambda x, y: torch.stack([x[0], y[0]])),
    ("refused", lambda x, y: F.linear(x, y)),
    ("refused", lambda x, y: y[x.long()]),
    ("refused", lambda x, y: x.gather(0, y.long())),
    ("refused", lambda x, y: x.index_select(0, y.long())),
    ("refused", lambda x, y: F.embedding(y.long(), x[:, None])),
    ("refused", lambda x, y: torch.searchsorted(x, y)),
    ("refused", lambda x, y: x.masked_fill(y > 2, 0)),
    ("refused", lambda x, y: x.index_put_((x.long(),), y)),
    ("refused", lambda x, y: x.numpy()),
    ("refused", lambda x, y: np.asarray(x)),
    ("free", lambda x, y: x + y[0]),
    ("free", lambda x, y: torch.where(x > 2, x, 3.0)),
    ("free", lambda x, y: x.masked_fill(x > 2, y[0])),
    ("free", lambda x, y: x.view(2, 3).topk(2).indices.sort().values.cumsum(0)),
    ("free", lambda x, y: x.repeat_interleave(3)),
    ("free", lambda x, y: x.repeat_interleave(x.long(), output_size=15)),
    ("free", lambda x, y: torch.arange(6, device=x.device) + torch.full((6,), 2, device="cuda")),
    ("free", lambda x, y: x.new_zeros(6).copy_(x)),
    ("free", lambda x, y: y.pin_memory().to("cuda", non_blocking=True)),
    ("free", lambda x, y: x.to("cpu", non_blocking=True)),
    ("free", lambda x, y: torch.empty(6, pin_memory=True).copy_(x, non_blocking=True)),
    ("waits", lambda x, y: y.pin_memory().to("cuda")),
    ("waits", lambda x, y: y.to("cuda")),
    ("waits", lambda x, y: y.to(x)),
    ("waits", lambda x, y: torch.where(x > 2, x, y[0])),
    ("waits", lambda x, y: y.cuda()),
    ("waits", lambda x, y: x.copy_(y)),
    ("waits", lambda x, y: x.cpu()),
    ("waits", lambda x, y: torch.tensor([1, 2], device="cuda")),
    ("waits", lambda x, y: x[0].item()),
    ("waits", lambda x, y: int(x.sum())),
    ("waits", lambda x, y: bool((x > 1).any())),
    ("waits", lambda x, y: x.tolist()),
    ("waits", lambda x, y: torch.equal(x, x + 1)),
    ("waits", lambda x, y: x.nonzero()),
    ("waits", lambda x, y: x.unique()),
    ("waits", lambda x, y: x.repeat_interleave(x.long())),
    ("waits", lambda x, y: x[y.long()]),
    ("waits", lambda x, y: x[[0, 2]]),
    ("waits", lambda x, y: x[x > 2]),
    ("waits", lambda x, y: x.__setitem__(x > 2, -x[:3])),
    ("waits", lambda x, y: x.__setitem__(x.long(), 3)),
    ("waits", lambda x, y: x.__setitem__(1, 3)),  # sizes are equal, so it is a copy
    ("free", lambda x, y: x.__setitem__(slice(1, 2), 3)),  # and here a number is filled in
    ("free", lambda x, y: x.__setitem__(x > 2, 3)),
    ("free", lambda x, y: x.__setitem__(x.long(), -x)),
]  # fmt: skip
of_operators = pytest.mark.parametrize(("verdict", "said"), SAYS)


@of_operators
@torch.inference_mode()
def test_operators(card: Card, verdict: str, said: Callable) -> None:
    x = torch.arange(6.0, device="cuda")
    found = "free"
    try:
        said(x, torch.arange(6.0))
        found = "waits" if card.waits else "free"
    except (Refused, TypeError):
        found = "refused"
    assert found == verdict


@pytest.mark.gpu
@of_operators
@torch.inference_mode()
def test_operators_on_a_gpu(verdict: str, said: Callable) -> None:
    """The real thing agrees with the pretended."""
    x, found = torch.arange(6.0, device="cuda"), "free"
    with suppress(RuntimeError, TypeError):
        said(x.clone(), torch.arange(6.0))  # its kernels are loaded, which waits
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            said(x, torch.arange(6.0))
        found = "waits" if any("synchronizing" in str(w.message) for w in heard) else "free"
    except (RuntimeError, TypeError):
        found = "refused"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found == verdict


@torch.inference_mode()
def test_tensors(card: Card) -> None:
    """Numbers are the CPU's, views share memory, what is written in place stays the same tensor."""
    x = sent(torch.arange(6), torch.device("cuda"))
    assert (x.device, x.is_cuda, x.dtype, x.shape) == (
        torch.device("cuda", 0),
        True,
        torch.long,
        (6,),
    )
    assert not card.waits
    row = x.view(2, 3)[1]
    assert row.add_(1) is row
    assert x.tolist() == [0, 1, 2, 4, 5, 6]
    out = x.new_empty(2)
    assert torch.index_select(x, 0, row[:2], out=out) is out
    assert out.tolist() == [5, 6]
    assert x.to(torch.device("cuda"), torch.float32).cpu().dtype == torch.float32
    assert x[:2].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert x.to("cuda:1").device == torch.device("cuda", 1)
    with pytest.raises(Refused, match="tensors on two devices, at no line of zipvl"):
        x.to("cuda:1") + x
    with pytest.raises(Refused, match="invalid device ordinal 2"):
        torch.zeros(1, device="cuda:2")


def test_a_wait_has_a_place(card: Card) -> None:
    edges = Spans([1, 2], "cuda").edges
    with torch.inference_mode():
        assert not card.waits
        zipvl.model.decoder.is_finite(edges.float())
    (kind, place), count = card.waits.popitem()
    assert (kind, count) == ("is_nonzero", 1)
    assert place.startswith("model/decoder.py:")
    assert place.endswith(" is_finite")
    with pytest.raises(TypeError, match=r"can't convert cuda:0 .* numpy"):
        edges.numpy()


@torch.inference_mode()
def test_what_needs_the_right_device() -> None:
    with pretend(index=1):
        stream, x = (
            torch.cuda.current_stream(torch.device("cuda", 1)),
            torch.zeros(2, device="cuda:1"),
        )
        fused = zipvl.engine.speed.import_module("zipvl.model.fused")
        event, late = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        event.record(stream)
        for wrong in (
            event.record, torch.cuda.synchronize, lambda: torch.cuda.graph(torch.cuda.CUDAGraph()).__enter__(),
            lambda: fused.swiglu(x, x), lambda: torch.zeros(2, device="cuda") + x,
        ):  # fmt: skip
            with pytest.raises(Refused):
                wrong()
        with torch.cuda.device(1):
            late.record()
            assert fused.swiglu(x, x).device == torch.zeros(1, device="cuda").device == x.device
            with pytest.raises(Refused, match="nobody waited for"):
                event.elapsed_time(late)
            late.synchronize()
            assert event.elapsed_time(late) >= 0
        assert torch.cuda.current_device() == 0
        with pytest.raises(Refused, match="Triton of a CPU tensor"), torch.cuda.device(1):
            fused.swiglu(x, torch.zeros(2))
        with pytest.raises(Refused, match="lie apart"), torch.cuda.device(1):
            fused.swiglu(x[None].T.expand(2, 2), x[None].T.expand(2, 2))


@torch.inference_mode()
def test_graphs(card: Card) -> None:
    x, graph = torch.ones(3, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x[1:] = 5
        y = x.mul_(2) + torch.arange(3, device="cuda")
    x.fill_(4)
    graph.replay()
    assert (x.tolist(), y.tolist()) == ([8, 10, 10], [8, 11, 12])
    for wrong in (x.tolist, lambda: x.sum().item(), lambda: torch.ones(2).to("cuda"), torch.cuda.synchronize,
                  lambda: x.copy_(torch.ones(3).pin_memory(), non_blocking=True)):  # fmt: skip
        with pytest.raises((Refused, AssertionError)), torch.cuda.graph(torch.cuda.CUDAGraph()):
            wrong()


def test_nothing_stays_of_a_device() -> None:
    """Neither behind a device that fails, nor does PyTorch believe it has started CUDA."""
    with pytest.raises(KeyError), pretend():
        {}[torch.zeros(1, device="cuda")]
    untouched()
    assert torch.cuda.is_available() == REAL
    if not REAL:
        with pytest.raises((AssertionError, RuntimeError), match=r"not compiled|NVIDIA"):
            torch.zeros(1, device="cuda")
    with pretend():
        x = torch.zeros(1, device="cuda")
    with pytest.raises(Refused, match="outside of pretend"):
        x + 1


# --- attention ----------------------------------------------------------------------------------


def heads(
    rows: list[int], slots: list[int], dtype: torch.dtype, H: int = 4, G: int = 2, D: int = 16
) -> Any:
    torch.manual_seed(sum(rows))
    q, k, v = (torch.randn(sum(n), h, D).to(dtype) for n, h in ((rows, H), (slots, G), (slots, G)))
    return q, k, v


@pytest.mark.parametrize(
    ("rows", "slots"),
    [([5, 1, 9], [5, 1, 9]), ([1, 1], [7, 12]), ([3, 2], [8, 2]), ([3], [8]), ([0, 2], [4, 9])],
)
@torch.inference_mode()
def test_flash_attention_is_attention(card: Card, rows: list[int], slots: list[int]) -> None:
    given = heads(rows, slots, torch.bfloat16)
    want = attend_sdpa(*(t.float() for t in given), Spans(rows, "cpu"), Spans(slots, "cpu"))
    fakes = [t.to("cuda") for t in given]
    got = BACKENDS["torch-flash"](*fakes, Spans(rows, "cuda"), Spans(slots, "cuda"))
    assert card.kernels["_flash_attention_forward"] == 1
    torch.testing.assert_close(got.cpu().float(), want, rtol=0.02, atol=0.02)


def edit(position: int, change: Callable[[Any], Any]) -> Callable[[list], list]:
    return lambda args: [change(a) if i == position else a for i, a in enumerate(args)]


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (
            "not of torch.float32",
            lambda args: [a.float() if i < 3 else a for i, a in enumerate(args)],
        ),
        ("not of torch.bfloat16", edit(1, lambda k: k.half())),
        (
            "no heads of 12",
            lambda args: [a[..., :12].contiguous() if i < 3 else a for i, a in enumerate(args)],
        ),
        ("3 query heads for 2", edit(0, lambda q: q[:, :3])),
        ("lie apart", edit(2, lambda v: v.mT.contiguous().mT)),
        ("places are no int32", edit(3, lambda edges: edges.long())),
        ("places are no int32", edit(4, lambda edges: edges.repeat_interleave(2)[::2])),
        ("places of another batch", edit(4, lambda edges: edges[:2])),
        ("wrong lengths", edit(5, lambda most: most - 1)),
        ("wrong lengths", edit(6, lambda most: most - 1)),
        ("on cpu and cuda:0", edit(3, lambda edges: edges.cpu())),
    ],
)
@torch.inference_mode()
def test_flash_attention_refuses(card: Card, message: str, change: Callable[[list], list]) -> None:
    fakes, edges = (
        [t.to("cuda") for t in heads([5, 2], [5, 2], torch.bfloat16)],
        Spans([5, 2], "cuda").edges,
    )
    args = [*fakes, edges, edges.clone(), 5, 5]
    attend = torch.ops.aten._flash_attention_forward
    assert attend(*args, 0.0, True, False)[1].shape == (4, 7)
    with pytest.raises((Refused, RuntimeError), match=message):
        attend(*change(args), 0.0, True, False)


@torch.inference_mode()
def test_sdpa_never_falls_to_the_math_kernel(card: Card) -> None:
    q, k, v = (t[None].transpose(1, 2).to("cuda") for t in heads([6], [6], torch.float32))
    mask = torch.ones(6, 6, dtype=torch.bool, device="cuda")
    attend = F.scaled_dot_product_attention
    for some, options in (((q, k, v), {}), ([t.half() for t in (q, k, v)], {"attn_mask": mask})):
        with pytest.raises(Refused, match=r"math kernel \(torch.float.., 4 heads for 2"):
            attend(*some, enable_gqa=True, **options)
    with pytest.raises(Refused, match="without enable_gqa"):
        attend(q, k, v)
    want = attend(*(t.cpu() for t in (q, k, v)), is_causal=True, enable_gqa=True)
    got = attend(*(t.bfloat16() for t in (q, k, v)), is_causal=True, enable_gqa=True)
    torch.testing.assert_close(got.cpu().float(), want, rtol=0.02, atol=0.02)
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    want = attend(*(t.cpu() for t in (q, k, v, mask)))
    torch.testing.assert_close(attend(q, k, v, mask).cpu(), want)
    with pretend(capability=(7, 5)), pytest.raises(Refused, match="before Ampere"):
        attend(*(t.bfloat16() for t in (q, k, v)))


def test_stand_ins_of_our_kernels_are_all_there(card: Card) -> None:
    """Names and numbers of arguments are those of the modules they stand in for."""
    for module, functions in FUSED.items():
        path = Path(zipvl.__file__).parent / f"model/{module.rpartition('.')[2]}.py"
        defined = path.read_text(encoding="utf-8")
        assert all(f"\ndef {name}(" in defined for name in functions)


# --- answers ------------------------------------------------------------------------------------


def test_every_method_is_here() -> None:
    names = {setting.partition(":")[0] for setting in SETTINGS + NEWER}
    assert names == METHODS.keys() - {"attnpred_reimpl"}  # reads as attnpred_last, by a file


@pytest.mark.parametrize("method", SETTINGS + [m if m in SOME else SLOW(m) for m in NEWER])
def test_float32_answers_are_the_cpu_s(card: Card, method: str) -> None:
    """SDPA, in a ragged batch and alone; decoded by a graph where that can be."""
    engine = loaded("cuda", FEW, dtype="float32")
    assert (engine.backend, engine.model.device) == ("sdpa", torch.device("cuda", 0))
    assert answers(engine, method) == wanted(method, FEW)
    assert bool(card.kernels["graph"]) == GraphStep.repeats(zipvl.load_policy(method))
    assert card.kernels["scaled_dot_product_attention"]
    assert card.kernels["triton"]


ALIKE = (  # to zipvl or snapkv, as far as attention can tell
    "zipvl-quant", "zipcache", "fixed", "random", "streaming", "snapkv:budget=40,summary", "zipvl+",
    "zipvl:tau=0.9,kv_bits=4/2", "zipvl:tau=0.8,summary", "fastv:variant",
)  # fmt: skip


@pytest.mark.parametrize(
    "method",
    [
        SLOW(m) if m.startswith((*ALIKE, f"{ZIPVL},fill", "h2o", "kivi")) or m in NEWER else m
        for m in SETTINGS + NEWER
    ],
)
def test_flash_answers_are_the_cpu_s(card: Card, method: str) -> None:
    """In bfloat16, which this model answers as it does in float32; decoded by FlashAttention, too,
    as no kernel of ours takes its place."""
    engine = loaded("cuda", kernels="plain")
    assert (engine.backend, engine.model.dtype) == ("torch-flash", torch.bfloat16)
    assert answers(engine, method) == wanted(method)
    assert card.kernels["_flash_attention_forward"]


def talk(engine: Engine, method: str, film: Path | None = None) -> list[list[int]]:
    """Two questions of a session, the second again after a rewind, and in a session that was saved."""
    one = engine.session(video=frames(), frames=None, method=method, reuse="media")
    tokens = [one.ask(q, NEW).tokens for q in ("What comes first?", "What comes last?")]
    one.rewind()
    tokens.append(one.fork().ask("What comes last?", NEW).tokens)
    if film:
        one.save(film)
        one = engine.open_session(film)
    return [*tokens, one.ask("What comes last?", NEW).tokens]


@pytest.mark.parametrize(
    "method", [ZIPVL, "h2o:heavy=12,recent=12", SLOW("dense"), SLOW("zipvl-stream"), SLOW("think"),
               SLOW("snapkv:budget=40,summary=8"), SLOW("hired:ratio=0.4"),
               SLOW("zipvl:tau=0.9,kv_bits=4,interval=2")]
)  # fmt: skip
@pytest.mark.parametrize("options", [{}, SLOW({"dtype": "float32"}), SLOW({"kernels": "plain"})])
def test_sessions(card: Card, method: str, options: dict[str, Any], tmp_path: Path) -> None:
    layers = FEW if options.get("dtype") else 8  # bfloat16 answers as float32 where all are there
    got = talk(loaded("cuda", layers, **options), method, tmp_path / "a.zipvl")
    assert got == talk(loaded("cpu", layers), method)
    if not options:
        assert card.kernels["_flash_attention_forward"]


@pytest.mark.parametrize("method", [ZIPVL, "snapkv:budget=40,summary=8"])
@pytest.mark.parametrize(("dtype", "layers"), [SLOW("float32", FEW), ("bfloat16", 8)])
@pytest.mark.parametrize("kernels", ["plain", "auto"])
def test_without_kernels_of_ours(method: str, dtype: str, layers: int, kernels: str) -> None:
    """`--kernels plain`, and a PyTorch without Triton, which has graphs all the same."""
    with pretend(triton=kernels == "plain") as card:
        engine = loaded("cuda", layers, dtype=dtype, kernels=kernels)
        assert engine.step is (Step if kernels == "plain" else GraphStep)
        assert answers(engine, method) == wanted(method, layers)
        assert not card.kernels["triton"]
        assert bool(card.kernels["graph"]) == (kernels == "auto")


@pytest.mark.parametrize("family", ["qwen", "intern"])
def test_other_families(card: Card, family: str, tmp_path: Path) -> None:
    """Rotary ids in three rows, heads that are normed, text between frames; by a graph, too."""
    if family == "qwen":
        tiny_qwen.build("Qwen2_5_VL", tmp_path)
    else:
        tiny_intern.build("intern35", tmp_path)
    both = [zipvl.load(tmp_path, device=d, dtype="float32") for d in ("cuda", "cpu")]
    for method in ("dense", "zipvl:tau=0.8,recent=8,random=8", "hired:ratio=0.5"):
        got, want = (answers(engine, method) for engine in both)
        assert got == want
        assert len({tuple(tokens) for tokens in want}) > 1
    assert card.kernels["graph"]
    inputs = [asked(engine)[0] for engine in both]
    got, want = (engine.logits(i, "zipvl") for engine, i in zip(both, inputs, strict=True))
    torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-4, equal_nan=True)
    if family == "qwen":
        assert all(i.ahead for i in inputs)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.8}, {"temperature": 1.5, "top_k": 5}, {"temperature": 1.0, "top_p": 0.7}],
)
def test_sampling_and_streaming(card: Card, options: dict[str, Any]) -> None:
    """The same seed draws the same tokens."""
    options = options | {"seed": 3}
    engine, method = loaded("cuda", FEW, dtype="float32"), ZIPVL
    tokens = wanted(method, FEW, **options)
    assert answers(engine, method, **options) == tokens
    options |= {"max_new_tokens": NEW, "ignore_eos": True, "method": method}
    assert [p.token for p in engine.stream(asked(engine)[0], **options)] == [*tokens[3], None]


def test_logits(card: Card) -> None:
    engines = loaded("cuda", FEW, dtype="float32"), loaded("cpu", FEW)
    got, want = (engine.logits(asked(engine)[0], "fastv") for engine in engines)
    assert got.device == torch.device("cuda", 0)
    torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("step", [Step, GraphStep])
def test_sequences_leave_a_batch(card: Card, step: type[Step]) -> None:
    """One stops early and two go on; the caches are made again without it."""
    options = {"method": ZIPVL, "max_new_tokens": 6}
    plain = loaded("cpu", FEW)
    free = plain.generate(asked(plain), ignore_eos=True, **options)
    for b in range(3):
        stops = frozenset(free[b].tokens[2:3])
        want, got = (
            using(e, kind, stops).generate(asked(e), **options)
            for e, kind in ((plain, Step), (loaded("cuda", FEW, dtype="float32"), step))
        )
        assert [r.tokens for r in got] == [r.tokens for r in want]
        assert len(want[b].tokens) < 6


def test_long_prompts_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's kernel takes a prompt alone from some length on, FlashAttention all else."""
    monkeypatch.setattr(backends, "LONG", 32)
    with pretend(capability=(9, 0)) as card:
        engine = loaded("cuda", dtype="bfloat16", attn="cudnn")
        for method in ("dense", ZIPVL):
            before = card.kernels.copy()
            assert answers(engine, method) == wanted(method)
            assert (card.kernels - before)["scaled_dot_product_attention"] > 8
            assert (card.kernels - before)["_flash_attention_forward"]


# --- which card, which kind of card -------------------------------------------------------------


@pytest.mark.parametrize("options", [{"dtype": "float32"}, {}, {"kernels": "plain"}])
def test_the_second_card(options: dict[str, Any]) -> None:
    """Events, graphs and kernels of ours go to cuda:1 while cuda:0 is the current device."""
    with pretend(index=1) as card:
        layers = FEW if "dtype" in options else 8
        engine, want = loaded("cuda:1", layers, **options), wanted(ZIPVL, layers)
        assert engine.model.device == torch.device("cuda", 1)
        assert answers(engine, ZIPVL) == want
        pieces = engine.stream(asked(engine)[0], ZIPVL, NEW, ignore_eos=True)
        assert [p.token for p in pieces] == [*want[3], None]
        assert engine.logits(asked(engine)[2], ZIPVL).device == engine.model.device
        assert (
            bool(card.kernels["graph"])
            == bool(card.kernels["triton"])
            == ("kernels" not in options)
        )
        assert card.current == 0


def test_before_ampere() -> None:
    """A T4: float16 by itself, and no attention by the math kernel."""
    with pretend(capability=(7, 5)) as card:
        assert pick_dtype("auto", pick_device("cuda")) == torch.float16
        engine = loaded("cuda", dtype="float16")
        assert (engine.backend, engine.model.dtype) == ("sdpa", torch.float16)
        for method in (ZIPVL, "fastv:variant=mask"):
            assert answers(engine, method) == wanted(method)
        assert not card.kernels["_flash_attention_forward"]
    with pretend():
        assert pick_dtype("auto", pick_device("cuda")) == torch.bfloat16


@pytest.mark.parametrize("D", [20, 100, 264])
@torch.inference_mode()
def test_heads_that_flash_attention_does_not_take(card: Card, D: int) -> None:
    """They are refused by name, or go to SDPA with as many key/value heads as query heads."""
    device = torch.device("cuda")
    for name in ("torch-flash", "cudnn"):
        with pytest.raises(UsageError, match=f"{name}.*head size {D}.*use --attn auto"):
            pick(name, device, torch.bfloat16, D)
    name, attend = pick("auto", device, torch.bfloat16, D)
    assert name == "sdpa"
    given = heads([5, 9], [5, 9], torch.bfloat16, D=D)
    got = attend(*(t.to("cuda") for t in given), *[Spans([5, 9], "cuda")] * 2)
    want = attend(*(t.float() for t in given), *[Spans([5, 9], "cpu")] * 2)
    torch.testing.assert_close(got.cpu().float(), want, rtol=0.02, atol=0.02)


# --- waits --------------------------------------------------------------------------------------


def waits(
    card: Card, engine: Engine, method: str, count: int
) -> tuple[list[Counter], list[Counter]]:
    """Of each layer of a prefill, and of each decode step but the first."""
    marks, steps = [], []
    enter, leave = Decoder.prefill, Recorder.layer

    def entered(*args: Any, **kwargs: Any) -> Any:
        marks.append(card.waits.copy())
        return enter(*args, **kwargs)

    def left(*args: Any) -> None:
        leave(*args)
        marks.append(card.waits.copy())

    run = Run(engine, asked(engine, count), zipvl.load_policy(method), Sampling())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "prefill", entered)
        patch.setattr(Recorder, "layer", left)
        for _ in run.steps(NEW, ignore_eos=True):
            steps.append(card.waits.copy())
    return [[b - a for a, b in pairwise(m)] for m in (marks, steps)]  # type: ignore


def most(counts: list[Counter]) -> int:
    worst = max(counts, key=Counter.total)
    print(worst.total(), dict(worst))  # shown where a test fails
    return worst.total()


DROP = [
    m
    for m in SETTINGS
    if m.startswith("zipvl") and "summary" not in m and "/" not in m and "quant" not in m
]
AIMS = [pytest.param("dense", 1), *(pytest.param(m, 2) for m in DROP)]


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize(("method", "limit"), AIMS)
def test_waits(card: Card, method: str, limit: int, count: int) -> None:
    """A layer waits once or twice for all sequences of a batch, and so does a decode step."""
    layers, steps = waits(card, loaded("cuda", FEW, kernels="plain"), method, count)
    assert len(layers) == FEW
    assert most(steps) <= 2
    assert most(layers) <= limit


@pytest.mark.parametrize(
    ("method", "layer", "step"),
    [
        ("zipvl:tau=0.8,summary=8", 13, 1), ("zipvl:tau=0.9,kv_bits=4/2,interval=2", 17, 64),
        ("fixed:ratio=0.4", 8, 1), ("random:ratio=0.4", 8, 1), ("fastv", 2, 1), ("fastv:variant=mask", 2, 1),
        ("streaming:sinks=2,window=24", 1, 1), ("h2o:heavy=12,recent=12", 2, 1), ("snapkv:budget=40", 2, 1),
        ("snapkv:budget=40,summary=8", 10, 1), ("zipvl-quant:interval=2", 17, 64),
        ("zipcache:interval=2", 14, 55), ("kivi:residual=32", 1, 1),
        # those of pictures wait before layer 0, sgl for its scout
        *map(SLOW, NEWER, (28, 26, 13, 2, 11, 28, 4, 4, 5, 1, 5, 2, 4, 4, 2, 2, 1, 1), [1] * 18),
    ],
)  # fmt: skip
def test_waits_of_others(card: Card, method: str, layer: int, step: int) -> None:
    """Where nobody has looked for fewer yet: of three sequences. These numbers may fall only."""
    layers, steps = waits(card, loaded("cuda", FEW), method, 3)
    assert (most(layers), most(steps)) <= (layer, step)
    assert most(steps) <= step


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["dense", ZIPVL])
def test_a_graph_step_never_waits(
    card: Card, method: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither run as it is, nor captured, nor replayed; its caller waits for the tokens."""
    call, found = GraphStep.__call__, []

    def counted(step: GraphStep, ids: Tensor, positions: Tensor) -> Tensor:
        before = card.waits.total()
        logits = call(step, ids, positions)
        found.append(card.waits.total() - before)
        return logits

    monkeypatch.setattr(GraphStep, "__call__", counted)
    steps = waits(card, loaded("cuda", FEW, dtype=dtype), method, 3)[1]
    assert found == [0] * (NEW - 1)
    assert [step.total() for step in steps] == [1] * (NEW - 1)
    assert card.kernels["graph"] == 1
