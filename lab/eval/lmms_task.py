"""Questions of this evaluation as a task of lmms-eval: the same score from the other harness.

    python -m lab.eval.lmms_task FOLDER [--frames 16] [--samples 12] [--seed 0]
    python -m zipvl.lmms --model zipvl --model_args pretrained=demo --tasks zipvl_demo \\
        --include_path FOLDER --batch_size 1      # in lmms-eval's environment, docs/evaluate.md

The clips are written without loss (FFV1), so that both harnesses show the model the same pixels.
"""

import inspect
import json
from fractions import Fraction
from pathlib import Path

import av
import torch

from ..command import Parser, count, ended, seed
from .tasks import Item, same_answer, task_items

RATE = 4  # frames a second
SIDE = 96  # pixels, as lab.eval draws them for the bundled model
TASK = "zipvl_demo"
YAML = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {questions}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 20, temperature: 0, do_sample: false}}
process_results: !function utils.results
metric_list:
  - {{metric: right, aggregation: mean, higher_is_better: true}}
metadata: [{{version: 0.0}}]
"""
UTILS = """\
from pathlib import Path

HERE = Path(__file__).resolve().parent


def visual(doc):
    return [str(HERE / doc["video"])]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def results(doc, results):
    return {{"right": float(same_answer(results[0], doc["answer"]))}}


{same_answer}"""


def write_clip(path: Path, frames: torch.Tensor) -> None:
    """uint8 [F, h, w, 3] as a video that gives the same numbers back."""
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=Fraction(RATE))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "bgr0"
        for frame in frames.numpy():
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(stream.encode(picture.reformat(format="bgr0")))
        container.mux(stream.encode())


def write(folder: Path, items: list[Item], side: int) -> None:
    """Clips, questions, and the two files that make a task of them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, item in enumerate(items):
        name = f"{number:03}.mkv"
        write_clip(folder / name, item.video(side))
        row = {"id": number, "video": name, "question": item.question, "answer": item.answer}
        lines.append(json.dumps(row) + "\n")
    questions = folder.resolve() / "questions.jsonl"
    questions.write_text("".join(lines), encoding="utf-8")
    yaml = YAML.format(task=TASK, questions=json.dumps(str(questions)))
    (folder / f"{TASK}.yaml").write_text(yaml, encoding="utf-8")
    source = UTILS.format(same_answer=inspect.getsource(same_answer))
    (folder / "utils.py").write_text(source, encoding="utf-8")


def work(argv: list[str] | None) -> None:
    parser = Parser(__doc__, "python -m lab.eval.lmms_task")
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER")
    add("--frames", type=count, default=16, help="of a clip (default: %(default)s)")
    add("--samples", type=count, default=12, help="questions (default: %(default)s)")
    add("--seed", type=seed, default=0)
    add("--side", type=count, default=SIDE, help="of a frame, pixels (default: %(default)s)")
    a = parser.parse_args(argv)
    write(a.folder, task_items("all", a.frames, a.samples, a.seed), a.side)


def main(argv: list[str] | None = None) -> int:
    return ended(lambda: work(argv))


if __name__ == "__main__":
    raise SystemExit(main())
