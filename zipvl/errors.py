"""Every error a user can meet: one sentence that says what was wrong, where, and what to do."""

import gc
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

REFUSAL = re.compile(
    r"not enough memory|can't allocate memory|DefaultCPUAllocator|MPS backend out of memory"
)


def printable(text: str, keep: str = "") -> str:
    """`text` with the control characters, which names of files may hold, as their codes, but those
    of `keep`."""
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


LONGEST = 2000  # characters of a message


class ZipvlError(Exception):
    """Base of all errors raised on purpose; the command line prints it and exits with `code`.

    One line that a terminal shows as it is, and not endless, whatever a file put into `text`.
    """

    code = 1

    def __init__(self, text: object = "") -> None:
        line = printable(str(text))
        half = LONGEST // 2
        super().__init__(line if len(line) <= LONGEST else f"{line[:half]} ... {line[-half:]}")


class ModelError(ZipvlError):
    """A checkpoint that cannot be used: config, weights, tokenizer, or the numbers it computes."""


class MediaError(ZipvlError):
    """A picture or video that cannot be read."""


class UsageError(ZipvlError):
    """An argument that makes no sense: unknown method, option out of range, stray marker."""

    code = 2


class OutOfMemory(ZipvlError):
    """The device ran out of memory; the message says how much was needed and what to lower."""

    code = 3


GROUPS = (  # where control groups are, of version 2 and 1: their limit and what they use
    ("/sys/fs/cgroup", "memory.max", "memory.current"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
DAMAGED = (  # what NaN and infinite numbers mean, and what helps
    "are NaN or infinite: with float16 use --dtype bfloat16 or float32; with those, the weights "
    "are damaged"
)


@contextmanager
def memory_errors(device: "torch.device", doing: str, advice: str, need: int = 0) -> Iterator[None]:
    """Turns an allocator's refusal while `doing` something into OutOfMemory with `advice`. On a CPU
    also says so beforehand where at least `need` bytes are needed and are not there: a kernel that
    runs out of memory ends the process without a word. A CUDA device is the current one meanwhile:
    what PyTorch does not launch itself, kernels of our own and graphs, goes there."""
    import torch  # here: the command line needs the errors before it needs torch

    if device.type == "cpu" and need > (free := available()):
        sizes = f"at least {need / 2**30:.1f} GiB are needed, {free / 2**30:.1f} GiB are free"
        raise OutOfMemory(f"out of memory before {doing} ({sizes}): {advice}")
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield
    except (torch.OutOfMemoryError, MemoryError) as e:
        refusal = str(e)
    except RuntimeError as e:
        if not REFUSAL.search(str(e)):
            raise
        refusal = str(e)
    else:
        return
    gc.collect()  # the failed call's tensors, so that the next request finds room
    if device.type == "cuda":
        torch.cuda.empty_cache()
    raise OutOfMemory(f"out of memory while {doing} ({numbers(device, refusal)}): {advice}")


def numbers(device: "torch.device", refusal: str) -> str:
    """How much was asked for and how much there is, as far as the allocator tells."""
    import torch

    asked = re.search(r"allocate ([\d.]+ ?\w*)", refusal)
    parts = [f"asked for {asked[1].strip()}" if asked else "the allocator gave no size"]
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        parts.append(f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free now")
    return ", ".join(parts)


def available() -> int:
    """Bytes that this process may still take: of the machine, of its control group (Linux), of its
    own limit; a huge number where nobody tells."""
    free = [sys.maxsize]
    with suppress(OSError, LookupError, ValueError):
        free.append(1024 * int(re.findall(r"MemAvailable: *(\d+)", read("/proc/meminfo"))[0]))
    homes = [""]
    with suppress(OSError, LookupError):
        homes += re.findall(r"^\d+:(?:memory)?:(.*)$", read("/proc/self/cgroup"), re.M)
    for home, (base, limit, used) in product(homes, GROUPS):
        with suppress(OSError, LookupError, ValueError):  # no such group, or "max": no limit
            stat = read(f"{base}{home}/memory.stat")
            cached = int(re.findall(r"^(?:total_)?inactive_file (\d+)", stat, re.M)[-1])
            taken = int(read(f"{base}{home}/{used}")) - cached
            free.append(int(read(f"{base}{home}/{limit}")) - taken)
    with suppress(ImportError, OSError, LookupError, ValueError):
        import resource

        most = resource.getrlimit(resource.RLIMIT_AS)[0]
        if most != resource.RLIM_INFINITY:
            pages = int(read("/proc/self/statm").split()[0])
            free.append(most - pages * resource.getpagesize())
    return max(0, min(free))


def read(path: str) -> str:
    return Path(path).read_text(encoding="ascii")
