"""Every error a user can meet: one sentence that says what was wrong, where, and what to do."""

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

REFUSAL = re.compile(
    r"not enough memory|can't allocate memory|DefaultCPUAllocator|MPS backend out of memory"
)


class ZipvlError(Exception):
    """Base of all errors raised on purpose; the command line prints it and exits with `code`."""

    code = 1


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


DAMAGED = (  # what NaN and infinite numbers mean, and what helps
    "are NaN or infinite: with float16 use --dtype bfloat16 or float32; with those, the weights "
    "are damaged"
)


@contextmanager
def memory_errors(device: "torch.device", doing: str, advice: str) -> Iterator[None]:
    """Turns an allocator's refusal while `doing` something into OutOfMemory with `advice`."""
    import torch  # here: the command line needs the errors before it needs torch

    try:
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
