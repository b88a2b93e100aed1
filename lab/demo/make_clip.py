"""Makes the bundled clip and picture, and knows the questions their README asks.

python -m lab.demo.make_clip
"""

from pathlib import Path

import av
import torch
from PIL import Image

from zipvl.engine.load import DEMO

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


def write_video(frames: torch.Tensor, path: Path) -> None:
    """uint8 [F, H, W, 3] as H.264, a key frame a second so that seeking is quick."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.options = {"crf": "26", "g": str(RATE)}
        for frame in frames.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def main() -> None:
    write_video(render(CLIP, SIDE), DEMO / "clip.mp4")
    Image.fromarray(render(PICTURE, SIDE)[0].numpy()).save(DEMO / "picture.png", optimize=True)


if __name__ == "__main__":
    main()
