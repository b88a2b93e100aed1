"""A pretend CUDA device: CPU tensors that say cuda:0, to prove without a GPU what can be proven so.

    with pretend() as card:                     torch.cuda is a stand-in until the block ends
        engine = zipvl.load(device="cuda")      its weights are Fakes, and so is all that they give
    card.waits                                  how often the host waited, by (kind, place in zipvl)

Refused as CUDA refuses it: an operator over tensors of two devices, wrong arguments of attention; a
kernel of our own, an event or a graph on another device than the tensors'; a wait or a copy from the
host while a graph is captured. Refused although CUDA takes it: attention that PyTorch would leave to
its math kernel, which holds all scores. Not seen: races, memory, what kernels really compute, and
what C++ decides by itself: outside of inference_mode it takes a Fake for the CPU tensor that it is.
"""

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from pretend_kernels import FUSED, KERNELS, Refused
from test_graph import Tape, tensors
from torch import Tensor
from torch.overrides import TorchFunctionMode

import zipvl

ZIPVL, CARDS, MIB, CPU = str(Path(zipvl.__file__).parent) + os.sep, 2, 1 << 20, torch.device("cpu")
SCALARS = {  # operators that take a CPU tensor without dimensions for the number it holds
    "add", "sub", "rsub", "mul", "div", "pow", "remainder", "maximum", "minimum", "clamp", "lt", "le",
    "gt", "ge", "eq", "ne", "logical_and", "logical_or", "bitwise_and", "bitwise_or", "lerp", "addcmul", "fill",
}  # fmt: skip
READS = {  # operators whose result, or its size, the host needs
    "item", "_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "argwhere", "masked_select",
    "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount", "isin",
}  # fmt: skip
VALUES = {"index_put", "index_put_", "_index_put_impl_", "masked_fill", "masked_fill_"}
PLACES = VALUES - {"masked_fill", "masked_fill_"} | {"index"}


def demand(true: bool, sentence: str) -> None:
    if not true:
        raise Refused(f"{sentence}, at {place()}")


def place() -> str:
    """The innermost line of zipvl that is being run."""
    frame = sys._getframe()
    while frame and not frame.f_code.co_filename.startswith(ZIPVL):
        frame = frame.f_back
    if not frame:
        return "no line of zipvl"
    code = frame.f_code
    return f"{code.co_filename[len(ZIPVL) :]}:{frame.f_lineno} {code.co_qualname}"


class Fake(Tensor):
    """A CPU tensor that says it lies on the device `home`."""

    card: ClassVar["Card | None"] = None
    inner: Tensor
    home: torch.device
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, home: torch.device) -> "Fake":
        shape = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        with torch.inference_mode(False):  # or no view of a weight, which is not of that mode
            fake = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, **shape)
        fake.inner, fake.home = inner, home
        return fake

    device = property(lambda self: self.home)
    is_cuda = property(lambda self: True)

    def __repr__(self) -> str:
        return f"Fake({list(self.shape)}, {self.dtype}, {self.home})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        demand(cls.card is not None, "an operator outside of pretend()")
        return cls.card.run(func, args, kwargs or {})


def real(x: Tensor) -> Tensor:
    return x.inner if isinstance(x, Fake) else x


def each(change: Callable[[Tensor], Any], x: Any) -> Any:
    """Arguments or results of an operator with their tensors changed."""
    if isinstance(x, Tensor):
        return change(x)
    if type(x) is tuple or type(x) is list:
        return type(x)([each(change, y) for y in x])
    return {name: each(change, y) for name, y in x.items()} if type(x) is dict else x


class Card:
    """Device number `index` of two. An engine is on it, so nothing has to do with the other."""

    def __init__(self, index: int, capability: tuple[int, int]):
        self.home, self.capability = torch.device("cuda", index), capability
        self.current, self.capturing = 0, False
        self.waits: Counter[tuple[str, str]] = Counter()
        self.waited = 0  # ever: events of an earlier count have happened
        self.kernels: Counter[str] = Counter()
        self.pinned: dict[int, Tensor] = {}  # by address; held, so that no other tensor gets it

    def wait(self, kind: str) -> None:
        demand(not self.capturing, f"{kind} in the capture of a graph")
        self.waits[kind, place()] += 1
        self.waited += 1

    def at(self, device: Any = None) -> torch.device:
        """The device that an argument of torch.cuda or of a factory means."""
        index = device if isinstance(device, int | None) else torch.device(device).index
        index = self.current if index is None else index
        demand(index < CARDS, f"invalid device ordinal {index}")
        return torch.device("cuda", index)

    def mine(self, what: str, device: Any = None) -> None:
        here = self.at(device)
        demand(here == self.home, f"{what} on {here}, and the tensors are on {self.home}")

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One operator, some of whose tensors are Fakes."""
        name, known, homes = func._schema.name.removeprefix("aten::"), {}, set()

        def inner(t: Tensor) -> Tensor:
            x = t
            if isinstance(t, Fake):
                x = t.inner
                homes.add(t.home)
            known[id(x)] = t
            return x

        inside, named = each(inner, args), each(inner, kwargs)
        if name == "copy_":
            self.copied(args[1], args[0], kwargs.get("non_blocking") or True in args[2:])
        else:
            demand(len(homes) == 1, "an operator over tensors on two devices")
            strangers = [t for t in known.values() if not isinstance(t, Fake)]
            if strangers or name in PLACES:
                self.admit(name, args, strangers)
            sized = name == "repeat_interleave" and func._overloadname != "self_int"
            if name in READS or (sized and kwargs.get("output_size") is None):
                self.wait(name)
        self.kernels[name] += 1
        try:
            run = partial(KERNELS[name], self.capability) if name in KERNELS else func
            out = run(*inside, **named)
        except Refused as e:
            demand(False, f"{name}: {e}")
        home = homes.pop()  # what was written in place, or is given back, is the Fake it was
        return each(lambda t: known.get(id(t)) if id(t) in known else Fake(t, home), out)

    def admit(self, name: str, args: Any, strangers: list[Tensor]) -> None:
        """What CUDA does with CPU tensors beside its own, and how it finds the places of masks."""
        base, places, value = name.rstrip("_"), [], args[2] if name in VALUES else None
        number = any(value is t for t in strangers) and value.dim() == 0
        if name in PLACES:
            demand(isinstance(args[0], Fake), f"{name} of a CPU tensor by places on {self.home}")
            places = tensors(args[1])
            by_mask = [t.dtype for t in places if isinstance(t, Fake)] == [torch.bool]
            if number and not by_mask:  # else it is masked_fill, which takes numbers
                self.wait("copy to the device")
            elif any(t.dtype == torch.bool for t in places) and not number:
                self.wait("index by a mask")
        for t in strangers:
            if any(t is p for p in places):
                self.wait("places from the host")
            elif base == "where" and t.dim() == 0:
                self.wait("copy to the device")
            else:
                known = t.dim() == 0 and (base in SCALARS or t is value)
                demand(known, f"{name} of tensors on cpu and {self.home}")

    def copied(self, source: Tensor, target: Tensor, non_blocking: bool) -> None:
        """Copies between devices return at once only where pinned memory takes part."""
        up, down = isinstance(target, Fake), isinstance(source, Fake)
        if up == down or not source.numel():
            return
        demand(not (up and self.capturing), "a copy from the host in the capture of a graph")
        if not (non_blocking and self.is_pinned(source if up else target)):
            self.wait("copy to the device" if up else "copy to the host")

    def to(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Tensor.to, which pins what it copies to the host later."""
        given = [*args, *kwargs.values()]
        like = next((t for t in given if isinstance(t, Tensor)), x)
        kind = next((a for a in given if isinstance(a, torch.dtype)), like.dtype)
        device = next(
            (torch.device(a) for a in given if isinstance(a, str | torch.device)), like.device
        )
        device = self.at(device) if device.type == "cuda" else device
        if device == x.device:
            return x.to(kind, copy=kwargs.get("copy", False))
        out, later = real(x).to(kind, copy=True), kwargs.get("non_blocking", False)
        out = Fake(out, device) if device.type == "cuda" else self.pin(out) if later else out
        self.copied(x, out, later)
        return out

    def pin(self, x: Tensor) -> Tensor:
        demand(not isinstance(x, Fake), "only CPU tensors can be pinned")
        out = x.clone()
        return self.pinned.setdefault(out.untyped_storage().data_ptr(), out)

    def is_pinned(self, x: Tensor) -> bool:
        return x.untyped_storage().data_ptr() in self.pinned

    def tolist(self, x: Fake) -> Any:
        self.wait("tolist")
        return x.inner.tolist()

    def numpy(self, x: Fake, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {x.device} device type tensor to numpy, at {place()}")

    def make(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A factory that names CUDA, or pinned memory."""
        pinned, device = kwargs.pop("pin_memory", False), kwargs.pop("device", None)
        out = real(func(*args, **kwargs))
        if pinned:
            return self.pin(out)
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            self.wait("copy to the device")
        return Fake(out, self.at(device))

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        before, self.current = self.current, self.at(device).index
        try:
            yield
        finally:
            self.current = before

    def stream(self, device: Any = None) -> SimpleNamespace:
        return SimpleNamespace(device=self.at(device))

    def synchronize(self, device: Any = None) -> None:
        self.mine("synchronize", device)
        self.wait("synchronize")

    def stand_ins(self) -> dict[str, Any]:
        """Of torch.cuda, by name."""
        some, none = (lambda value: lambda *args, **options: value), lambda *args, **options: None
        return {
            "is_available": some(True), "device_count": some(CARDS), "get_device_capability": some(self.capability),
            "current_device": lambda: self.current, "device": self.device, "synchronize": self.synchronize,
            "current_stream": self.stream, "Stream": self.stream, "Event": lambda **given: Event(self, **given),
            "CUDAGraph": lambda: Graph(self), "graph": lambda graph, **options: graph,
            "reset_peak_memory_stats": none, "empty_cache": none, "max_memory_allocated": some(MIB),
            "memory_allocated": some(MIB), "mem_get_info": some((MIB, MIB)),
        }  # fmt: skip


class Event:
    """Tells the time that lies between it and another, once somebody has waited for both."""

    def __init__(self, card: Card, enable_timing: bool = False):
        self.card, self.timed = card, enable_timing

    def record(self, stream: Any = None) -> None:
        self.card.mine("an event is recorded", (stream or self.card.stream()).device)
        self.time, self.waited = time.perf_counter(), self.card.waited

    def synchronize(self) -> None:
        self.card.wait("event")

    def elapsed_time(self, end: "Event") -> float:
        done = max(self.waited, end.waited) < self.card.waited
        demand(done and self.timed and end.timed, "elapsed_time of events nobody waited for")
        return 1000 * (end.time - self.time)


class Graph(Tape):
    """Tape records, undoes and repeats (test_graph.py)."""

    def __init__(self, card: Card):
        super().__init__()
        self.card = card

    def __enter__(self) -> Any:
        self.card.mine("a graph is captured")
        self.card.kernels["graph"] += 1
        self.card.capturing = True
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.lift_fresh.default:  # the 3 of x[a:b] = 3
            return func(*args)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def __exit__(self, *error: object) -> None:
        self.card.capturing = False
        super().__exit__(*error)


def launches(readable: Callable) -> Callable:
    """A kernel of ours by what it equals; Triton launches on the current device."""

    def launch(*given: Any) -> Any:
        card, some = Fake.card, tensors(given)
        demand(all(isinstance(t, Fake) for t in some), "Triton of a CPU tensor")
        demand(all(t.stride(-1) == 1 for t in some), "Triton of numbers that lie apart")
        card.mine("a Triton kernel is launched")
        card.kernels["triton"] += 1
        return readable(*given)

    return launch


class Doors(TorchFunctionMode):
    """What Python says to PyTorch and C++ would take for a matter of the CPU, or of a real card."""

    def __init__(self, card: Card):
        super().__init__()
        self.card = card
        self.any = {
            "to": card.to, "cpu": lambda x: card.to(x, CPU), "cuda": lambda x, at=None: card.to(x, card.at(at)),
            "pin_memory": card.pin, "is_pinned": card.is_pinned,
        }  # fmt: skip
        self.own = self.any | {
            "tolist": card.tolist, "numpy": card.numpy, "__array__": card.numpy,
            "untyped_storage": lambda x: x.inner.untyped_storage(), "data_ptr": lambda x: x.inner.data_ptr(),
        }  # fmt: skip

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        doors = self.own if args and isinstance(args[0], Fake) else self.any
        if door := doors.get(getattr(func, "__name__", "")):
            return door(*args, **kwargs)
        device = kwargs.get("device")
        if kwargs.get("pin_memory") or (device is not None and torch.device(device).type == "cuda"):
            return self.card.make(func, args, kwargs)
        return func(*args, **kwargs)


@contextmanager
def pretend(index: int = 0, capability: tuple[int, int] = (8, 0), triton: bool = True) -> Iterator[Card]:  # fmt: skip
    """A machine with two cards, on number `index` of which everything is to be; 0 is current."""
    card = Card(index, capability)
    with pytest.MonkeyPatch.context() as patch, Doors(card):
        for name, stand_in in card.stand_ins().items():
            patch.setattr(torch.cuda, name, stand_in)
        for module, functions in FUSED.items():
            ours = SimpleNamespace(**{name: launches(f) for name, f in functions.items()})
            patch.setitem(sys.modules, module, ours if triton else None)
        patch.setattr(Fake, "card", card)
        yield card
