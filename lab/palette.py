"""Figures with few colours, a third of the size, for lab/results.

    python -m lab.palette PNG [PNG ...]      # in place

Usual palettes follow the area of a colour and lose a thin line's; here the colours that differ most
from those already chosen come first, and stay exact.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = 64
EXACT = COLOURS // 2  # the rest are shades of antialiased edges, averaged over their neighbours
ROUNDS = 8  # of averaging


def palette(colours: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """At most COLOURS for colours [n, 3], of which `weight` [n] counts. # [m, 3]"""
    chosen = colours[[weight.argmax()]]
    far = distance(colours, chosen)[:, 0]
    while len(chosen) < min(COLOURS, len(colours)):
        chosen = np.concatenate((chosen, colours[[(far * weight).argmax()]]))
        far = np.minimum(far, distance(colours, chosen[-1:])[:, 0])
    for _ in range(ROUNDS):
        nearest = distance(colours, chosen).argmin(1)
        for i in range(EXACT, len(chosen)):
            if (mine := nearest == i).any():
                chosen[i] = np.average(colours[mine], axis=0, weights=weight[mine])
    return chosen.round()


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances of a [n, 3] from b [m, 3]. # [n, m]"""
    return ((a[:, None] - b[None]) ** 2).sum(2)


def shrink(path: Path) -> None:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    found, where, counts = np.unique(
        pixels.reshape(-1, 3), axis=0, return_inverse=True, return_counts=True
    )
    colours = found.astype(float)
    chosen = palette(colours, np.sqrt(counts))
    index = distance(colours, chosen).argmin(1)[where.reshape(-1)]
    made = Image.fromarray(index.reshape(pixels.shape[:2]).astype(np.uint8))
    made.putpalette(chosen.astype(np.uint8).tobytes())
    made.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="PNG")
    for path in parser.parse_args().files:
        shrink(path)


if __name__ == "__main__":
    main()
