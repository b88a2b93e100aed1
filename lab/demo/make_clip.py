"""Makes the bundled clip and picture, and a film; knows the questions that the README asks.

python -m lab.demo.make_clip            # the clip and the picture, into the package
python -m lab.demo.make_clip FILM.mp4   # the film of `make demo`: ten minutes
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import av
import torch
from PIL import Image

from zipvl.engine.load import DEMO
from zipvl.errors import ZipvlError

from ..command import Parser, ended
from .things import Thing
from .world import Clip, Event, render

SIDE, RATE = 384, 16  # pixels, frames a second

CLIP = Clip(
    frames=160,
    events=(
        Event(Thing("star", "red"), 10, 36, (0.40, 0.56, 0.60, 0.46), 0.32, -0.1),
        Event(Thing("7", "blue"), 42, 66, (0.58, 0.42, 0.42, 0.56), 0.34, 0.05),
        Event(Thing("heart", "yellow"), 74, 104, (0.42, 0.45, 0.58, 0.55), 0.31, 0.0),
        Event(Thing("ring", "green"), 112, 142, (0.60, 0.55, 0.44, 0.44), 0.33, 0.1),
    ),
    tile=10,
    pan=(-0.8, -0.6, 0.8, 0.6),
    zoom=0.75,
)
MOON = Event(Thing("moon", "orange"), 0, 1, (0.5, 0.48, 0.5, 0.48), 0.33, 0.1)
PICTURE = Clip(1, (MOON,), tile=16, pan=(0.0, 0.0, 0.0, 0.0), zoom=0.9)
CLIP_QUESTIONS = (
    ("What comes first?", "red star"),
    ("What colour is the heart?", "yellow"),
    ("Which digit is written?", "7"),
    ("How many objects appear?", "4"),
    ("List all objects in order.", "red star, blue 7, yellow heart, green ring"),
)
PICTURE_QUESTIONS = (("What do you see?", "orange moon"), ("Is there a red moon?", "no"))


# Of ten minutes, sixteen scenes; in five of them something is in view for 6 to 15 seconds.
SCENES, SCENE, FILM_RATE, FILM_SIDE = 16, 150, 4, 96
FILM = {
    1: Event(Thing("heart", "red"), 40, 80, (0.42, 0.55, 0.58, 0.45), 0.32, 0.1),
    4: Event(Thing("7", "blue"), 90, 114, (0.55, 0.42, 0.45, 0.55), 0.33, 0.0),
    8: Event(Thing("moon", "yellow"), 20, 80, (0.44, 0.46, 0.56, 0.54), 0.31, -0.1),
    11: Event(Thing("cross", "green"), 60, 90, (0.58, 0.55, 0.46, 0.46), 0.33, 0.1),
    14: Event(Thing("3", "pink"), 30, 75, (0.45, 0.54, 0.55, 0.45), 0.32, 0.0),
}


def film() -> Iterator[torch.Tensor]:
    """The frames of the film, scene by scene. # uint8 [SCENE, FILM_SIDE, FILM_SIDE, 3] each"""
    for number in range(SCENES):
        events = (FILM[number],) if number in FILM else ()
        way = (-0.8, 0.6 - 0.08 * number, 0.8, 0.08 * number - 0.6)
        yield render(Clip(SCENE, events, 2 * number, way, 0.75), FILM_SIDE)


def write_video(scenes: Iterable[torch.Tensor], path: Path, side: int, rate: int) -> None:
    """uint8 [F, side, side, 3] each, as H.264, a key frame a second so that seeking is quick."""
    with av.open(str(path), "w", "mp4") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width = stream.height = side
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "26", "g": str(rate)}
        for frames in scenes:
            for frame in frames.numpy():
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def work(argv: list[str] | None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("film", type=Path, nargs="?")
    path = parser.parse_args(argv).film
    if path:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_video(film(), path, FILM_SIDE, FILM_RATE)
        except OSError as e:
            raise ZipvlError(f"{path} cannot be written: {e.strerror or e}") from e
        return
    write_video([render(CLIP, SIDE)], DEMO / "clip.mp4", SIDE, RATE)
    Image.fromarray(render(PICTURE, SIDE)[0].numpy()).save(DEMO / "picture.png", optimize=True)


def main(argv: list[str] | None = None) -> int:
    return ended(lambda: work(argv))


if __name__ == "__main__":
    sys.exit(main())
