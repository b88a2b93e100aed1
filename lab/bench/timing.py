"""Timing that survives noisy machines: interleaved repeats, medians, ratios within a repeat."""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def cpu_seconds() -> float:
    return time.process_time() / torch.get_num_threads()


CLOCKS = {  # `cpu` is what a shared machine can still tell: work done, not time waited
    "wall": time.perf_counter,
    "cpu": cpu_seconds,
}


def timed(device: torch.device, clock: str, work: Callable[[], object]) -> float:
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    sync()
    start = CLOCKS[clock]()
    work()
    sync()
    return CLOCKS[clock]() - start


Row = dict[str, Any]
Factory = Callable[[], Callable[[], object]]  # untimed set-up that returns the work to time


def interleaved(
    device: torch.device, clock: str, runs: dict[str, Factory], repeats: int
) -> dict[str, list[float]]:
    """Seconds of each run, round robin, after one warm-up each."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, factory in runs.items():
            spent = timed(device, clock, factory())
            print(
                f"  {turn or 'warm-up':>7}  {name:<28} {spent:9.3f} s", file=sys.stderr, flush=True
            )
            if turn:
                seconds[name].append(spent)
    return seconds


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def versus(seconds: dict[str, list[float]], base: str, name: str) -> str:
    return spread([b / s for b, s in zip(seconds[base], seconds[name], strict=True)]) + "x"


def read_bandwidth(device: torch.device, clock: str) -> float:
    """Bytes a second at which the machine reads memory: the fastest of a few large sums."""
    x = torch.ones(128 << 20, device=device)  # 512 MiB
    return x.nbytes / min(timed(device, clock, x.sum) for _ in range(8))


def product_peak(device: torch.device, dtype: torch.dtype, clock: str) -> float:
    """FLOP a second of the machine's fastest large matrix product, in `dtype` or float32."""
    rows, width = 8192 if device.type == "cuda" else 512, 4096

    def peak(kind: torch.dtype) -> float:
        x, w = (torch.ones(n, width, dtype=kind, device=device) for n in (rows, width))
        return 2 * rows * width**2 / min(timed(device, clock, lambda: x @ w.T) for _ in range(4))

    return max(peak(kind) for kind in {dtype, torch.float32})


def ratios(seconds: dict[str, list[float]], name: str) -> dict:
    """Speed-up of this run over the others of the same repeat."""
    return {"faster_than": {base: versus(seconds, base, name) for base in seconds if base != name}}


def machine(args: argparse.Namespace) -> dict:
    cuda = torch.cuda.get_device_name() if args.device.startswith("cuda") else None
    names = [line.split(":")[1].strip() for line in cpu_lines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(), "threads": torch.get_num_threads(),
        "gpu": cuda, "torch": torch.__version__, "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"), "seed": 0, "command": " ".join(sys.argv),
    }  # fmt: skip


def cpu_lines() -> list[str]:
    info = Path("/proc/cpuinfo")
    return info.read_text().splitlines() if info.exists() else []
