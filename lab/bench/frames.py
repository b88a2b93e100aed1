"""Peak memory of reading and of encoding a video against its frames, each in a process of its own.

A run on 16 frames goes first, so that what any video costs (libraries, one batch through the tower)
is not counted; the peak is then taken anew for each stage (Linux only).
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from zipvl.engine.load import demo_clip, load
from zipvl.vision.video import opened

from .e2e import checkpoint_inputs, random_inputs
from .memory import alone, peak
from .model import DTYPES
from .timing import Row
from .vlm import random_engine

FEW = 16  # frames of the warm-up: a batch of the tower
RESIDENT = Path("/proc/self/clear_refs")


def bench_frames(args: argparse.Namespace) -> list[Row]:
    """Bytes that each stage adds at its peak, next to the pixels it was given."""
    words = [
        args.shape,
        args.model or "",
        (args.video or demo_clip()).resolve(),
        args.device,
        args.dtype,
    ]
    return [alone(__name__, frames, *words, args.attn) for frames in args.frames]


@torch.inference_mode()
def measure(frames: int, shape: str, model: str, path: str, device: str, dtype: str,
            attn: str) -> Row:  # fmt: skip
    """One video in this process, which must have done nothing else."""
    if model:
        engine, prepare = load(model, device, dtype, attn), checkpoint_inputs
    else:
        engine = random_engine(shape, device, DTYPES[dtype], attn, None)
        prepare = random_inputs
    engine.encode(prepare(engine, path, FEW, {}))
    RESIDENT.write_text("5")  # the high-water mark starts from what is resident now
    before = peak(engine.model.device)
    inputs = prepare(engine, path, frames, {})
    read = peak(engine.model.device) - before
    RESIDENT.write_text("5")
    [features] = engine.encode(inputs)
    encode = peak(engine.model.device) - before
    with opened(path) as (_, stream):
        source = stream.codec_context.width * stream.codec_context.height * 3
    return {"bench": "frames", "frames": frames, "tokens": len(inputs), "batch": 1,
            "run": Path(model).name or shape, "before": before, "read": read, "encode": encode,
            "crops": frames * engine.config.vision.media.size**2 * 3, "features": features.nbytes,
            "file_pixels": frames * source}  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), *sys.argv[2:])))
