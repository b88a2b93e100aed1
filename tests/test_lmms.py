"""zipvl inside lmms-eval: the parts that need none, and slowly the real one, in its environment."""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lab.eval import cli as lab_eval
from lab.eval.lmms_task import TASK, main, write_clip
from lab.eval.tasks import task_items
from zipvl.errors import UsageError
from zipvl.lmms.request import Medium, ended, read
from zipvl.vision.video import Reading

ROOT = Path(__file__).parent.parent
HOME = ROOT / "build" / "lmms"  # an environment that takes minutes to make, and stays
TORCH = "torch==2.13.0"
# Newer filelock has no `_api`, which lmms-eval 0.7.3 imports; torchvision from the index is built
# for another torch than a CPU's, and lmms-eval runs without it.
NEEDS = ("lmms-eval==0.7.3", "filelock<4")


def said(*parts: dict[str, Any], **options: Any) -> Any:
    return read([{"role": "user", "content": list(parts)}], options)


def test_a_request_in_our_words() -> None:
    asked = said(
        {"type": "video", "url": "a.mp4", "start_time": 1.5, "end_time": None},
        {"type": "image", "url": "picture"},
        {"type": "text", "text": "What?"},
        max_new_tokens=16, temperature=0, top_p=1.0, num_beams=1, do_sample=False, until=["</s>"],
    )  # fmt: skip
    assert asked.media == [Medium("video", "a.mp4", 1.5, None), Medium("image", "picture")]
    assert asked.messages == [{"role": "user", "content": [
        {"type": "video"}, {"type": "image"}, {"type": "text", "text": "What?"}]}]  # fmt: skip
    assert (asked.new_tokens, asked.sampling.temperature, asked.until) == (16, 0.0, ("</s>",))


def test_how_to_generate() -> None:
    words = {"type": "text", "text": "What?"}
    assert said(words).new_tokens == 256
    assert said(words, temperature=0.7, do_sample=False).sampling.temperature == 0
    assert said(words, temperature=0.7).sampling.temperature == 0.7
    assert said(words, temperature=0.7, top_p=0.9, top_k=5, seed=3).sampling.seed == 3
    assert said(words, until="Q:").until == ("Q:",)
    for wrong in ({"num_beams": 4}, {"repetition_penalty": 1.1}, {"visual_cot": True}):
        with pytest.raises(UsageError):
            said(words, **wrong)
    with pytest.raises(UsageError, match="audio"):
        said({"type": "audio", "url": "a.wav"})


def test_ends() -> None:
    assert ended("a b Q: c </s>", ("</s>", "Q:")) == "a b "
    assert ended("a b", ("</s>",)) == ended("a b", ()) == "a b"


def test_the_manifest_is_light() -> None:
    """What a run of lmms-eval imports of every package that is installed beside it."""
    code = "import sys, zipvl.lmms; print(sorted({'torch', 'transformers', 'lmms_eval', 'zipvl.cli'} & {*sys.modules}))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert found.stdout.decode().strip() == "[]"


@pytest.mark.skipif(shutil.which("lmms-eval") is not None, reason="lmms-eval is installed here")
def test_without_lmms_eval_it_says_so() -> None:
    words = [sys.executable, "-m", "zipvl.lmms", "--tasks", "videomme"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: lmms-eval is not installed: ")
    assert done.stderr.count("\n") == 1


def test_clips_of_the_task_are_what_lab_eval_shows(tmp_path: Path) -> None:
    item = task_items("all", 5, 3, 7)[2]
    write_clip(tmp_path / "a.mkv", item.video(50))
    frames = np.stack([f for some in Reading(str(tmp_path / "a.mkv"), frames=5) for f in some])
    assert np.array_equal(frames, item.video(50).numpy())


# --- the real one -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def python() -> Path:
    """The Python of an environment with lmms-eval, and zipvl from this checkout."""
    found = HOME / "bin" / "python"
    pip = [str(found), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    if not (HOME / "ready").is_file():
        venv.create(HOME, with_pip=True, clear=True)
        (HOME / "constraints.txt").write_text(TORCH)
        subprocess.run([*pip, TORCH], check=True, timeout=900)
        pinned = ["-c", str(HOME / "constraints.txt")]
        subprocess.run([*pip, *pinned, *NEEDS], check=True, timeout=1500)
        subprocess.run([*pip[:3], "uninstall", "-q", "-y", "torchvision"], check=True, timeout=300)
        (HOME / "ready").touch()
    subprocess.run([*pip, "--no-deps", "-e", str(ROOT)], check=True, timeout=300)
    return found


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    assert main([str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """lab.eval's answers to the same dozen questions."""
    out = tmp_path_factory.mktemp("ours")
    words = ["--method", "zipvl", "--frames", "16", "--samples", "12", "--device", "cpu"]
    assert lab_eval.main([*words, "--dtype", "float32", "--out", str(out)]) == 0
    lines = (out / "answers.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "given" in row]


def evaluated(words: list[str], task: Path, out: Path) -> tuple[float, list[dict], dict, str]:
    """Score, samples, the summary of what was logged, and all that was said."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
                                "HF_HOME": str(out / "hf"), "OPENAI_API_KEY": "x"}  # fmt: skip
    words = [*words, "--tasks", TASK, "--include_path", str(task), "--log_samples"]
    done = subprocess.run([*words, "--output_path", str(out)], cwd=out, env=environment, text=True,
                          capture_output=True, timeout=600, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    [results] = out.rglob("*_results.json")
    [samples] = out.rglob(f"*_samples_{TASK}.jsonl")
    found = json.loads(results.read_text())
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda r: r["doc_id"])
    score = next(v for k, v in found["results"][TASK].items() if k.startswith("right,"))
    return score, rows, found, done.stdout + done.stderr


def same(rows: list[dict], score: float, ours: list[dict[str, Any]]) -> None:
    assert len(rows) == len(ours) == 12
    said = [row["filtered_resps"] for row in rows]
    given = [answer[0] if isinstance(answer, list) else answer for answer in said]
    assert given == [row["given"] for row in ours]
    assert [bool(row["right"]) for row in rows] == [row["ok"] for row in ours]
    assert score == pytest.approx(sum(row["ok"] for row in ours) / 12)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["zipvl.lmms", "lmms_eval"])
@pytest.mark.timeout(3000)
def test_the_score_is_lab_evals(
    python: Path, task: Path, ours: list[dict[str, Any]], module: str, tmp_path: Path
) -> None:
    """Through the launcher, and through lmms-eval's own, which finds the entry point; in batches."""
    batch = "1" if module == "zipvl.lmms" else "5"
    words = [str(python), "-m", module, "--model", "zipvl", "--batch_size", batch, "--model_args",
             "pretrained=demo,method=zipvl,max_frames_num=16,device=cpu,dtype=float32"]  # fmt: skip
    score, rows, found, told = evaluated(words, task, tmp_path)
    same(rows, score, ours)
    assert "of a video 16 frames, evenly spread" in told
    text = json.dumps(found) + told
    assert all(name in text for name in ("avg_kept", "avg_first_token_seconds", "avg_kv_bytes"))
    counts = rows[0]["token_counts"]
    assert (counts[0] if isinstance(counts, list) else counts)["input_tokens"] > 60


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_unknown_options_end_the_run(python: Path, task: Path, tmp_path: Path) -> None:
    words = [str(python), "-m", "zipvl.lmms", "--model", "zipvl", "--tasks", TASK, "--model_args",
             "pretrained=demo,framez=16", "--include_path", str(task)]  # fmt: skip
    done = subprocess.run(words, cwd=tmp_path, text=True, capture_output=True, timeout=300,
                          env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False)  # fmt: skip
    assert "zipvl has no 'framez'" in done.stdout + done.stderr
