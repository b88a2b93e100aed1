"""Running out of memory, said with numbers and a way out."""

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import OutOfMemory

REFUSAL = re.compile(
    r"not enough memory|can't allocate memory|DefaultCPUAllocator|MPS backend out of memory"
)


@contextmanager
def memory_errors(device: torch.device, doing: str, advice: str) -> Iterator[None]:
    """Turns an allocator's refusal while `doing` something into OutOfMemory with `advice`."""
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


def numbers(device: torch.device, refusal: str) -> str:
    """How much was asked for and how much there is, as far as the allocator tells."""
    asked = re.search(r"allocate ([\d.]+ ?\w*)", refusal)
    parts = [f"asked for {asked[1].strip()}" if asked else "the allocator gave no size"]
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        parts.append(f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free now")
    return ", ".join(parts)
