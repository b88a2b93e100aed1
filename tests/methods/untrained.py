"""A network of random numbers in a file, for the tests that make every method."""

import atexit
import shutil
from pathlib import Path
from tempfile import mkdtemp

import torch
from safetensors.torch import save_file

from zipvl.policies.attnpred_cnn import SHAPES

FOLDER = Path(mkdtemp(prefix="zipvl-test-"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
WEIGHTS = FOLDER / "random.safetensors"
NEEDS = {"attnpred_reimpl": {"weights": str(WEIGHTS)}}  # options without which a method is none


def network(seed: int) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(shape, generator=chance) for name, shape in SHAPES.items()}


save_file(network(5), WEIGHTS)
