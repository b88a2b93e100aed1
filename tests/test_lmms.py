"""zipvl inside lmms-eval: the parts that need none, and slowly the real one, in its environment."""

import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lab.eval import cli as lab_eval
from lab.eval.lmms_task import TASK, main, write_clip
from lab.eval.tasks import task_items
from zipvl.engine.load import DEMO
from zipvl.errors import MediaError, UsageError
from zipvl.lmms import __main__ as launcher
from zipvl.lmms.request import Medium, ended, frame_count, frame_rule, method_text, read
from zipvl.vision.video import Reading

ROOT = Path(__file__).parent.parent
HOME = ROOT / "build" / "lmms"  # an environment that takes minutes to make, and stays
TORCH = "torch==2.13.0"
# Newer filelock has no `_api`, which lmms-eval 0.7.3 imports; torchvision from the index is built
# for another torch than a CPU's, and lmms-eval runs without it.
NEEDS = ("lmms-eval==0.7.3", "filelock<4")
METHOD = "zipvl:tau=0.9,recent=32"  # one that errs: equal answers say more


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
    drawn = said(words, temperature=0.7, top_p=0.9, top_k=5, seed=3)
    assert (drawn.sampling.top_p, drawn.sampling.top_k, drawn.seed) == (0.9, 5, 3)
    assert read([], {"seed": 3}, again=2).seed == 5
    assert said(words, until="Q:").until == ("Q:",)
    assert said(words, until=["", "Q:"], stop_sequences=["###"], repetition_penalty=1.0).until == (
        "Q:",
        "###",
    )
    for wrong in ({"num_beams": 4}, {"repetition_penalty": 1.1}, {"visual_cot": True}):
        with pytest.raises(UsageError, match=min(wrong)):
            said(words, **wrong)
    with pytest.raises(UsageError, match="audio"):
        said({"type": "audio", "url": "a.wav"})


def test_a_clip_of_a_video() -> None:
    wrapped = {"type": "video", "path": "a.mp4", "video_start": 2.0, "video_end": 4.5}
    [medium] = said({"type": "video", "url": wrapped}).media
    assert medium == Medium("video", "a.mp4", 2.0, 4.5)


def test_markers_in_the_text_place_the_media() -> None:
    images, text = [{"type": "image", "url": "a"}] * 2, "<image> or <image>?"
    asked = said(*images, {"type": "text", "text": text})
    assert asked.messages[0]["content"] == [{"type": "text", "text": text}]
    assert len(asked.media) == 2
    asked = said(*images, {"type": "text", "text": "What is <image>?"})
    assert len(asked.messages[0]["content"]) == 3  # which the engine refuses, with both numbers


def test_the_frame_rule() -> None:
    assert frame_rule(None, None, 32) == (32, "32 frames, evenly spread")
    assert frame_count(None, 64, None) == frame_count(64, 64, None) == 64
    assert frame_rule(64, None, 32) == (64, "64 frames, evenly spread")
    assert frame_rule(None, 0.5, 32) == (None, "0.5 frames a second")
    assert frame_rule(128, 1, 32) == (128, "1 frame a second, at most 128")
    for wrong in (
        (16, 32, None),
        ("all", None, None),
        (True, None, None),
        (0, None, None),
        (None, None, 0),
    ):
        with pytest.raises(UsageError, match=r"frames|fps"):
            frame_count(*wrong)


@pytest.mark.parametrize(
    "text", ["{zipvl:tau=0.9,recent=32}", "'zipvl:tau=0.9,recent=32'", '"zipvl:tau=0.9,recent=32"']
)
def test_a_method_with_commas(text: str) -> None:
    assert method_text(text) == "zipvl:tau=0.9,recent=32"
    assert method_text("zipvl:tau=0.9") == "zipvl:tau=0.9"


def test_ends() -> None:
    assert ended("a b Q: c </s>", ("</s>", "Q:")) == "a b "
    assert ended("a b", ("</s>",)) == ended("a b", ()) == "a b"


def test_the_manifest_is_light() -> None:
    """What a run of lmms-eval imports of every package that is installed beside it."""
    code = "import sys, zipvl.lmms; print(sorted({'torch', 'transformers', 'lmms_eval', 'zipvl.cli'} & {*sys.modules}))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert found.stdout.decode().strip() == "[]"


def test_without_lmms_eval_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(launcher, "find_spec", {"lmms_eval": None}.__getitem__)
    assert launcher.main() == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: lmms-eval is not installed: ")
    assert err.count("\n") == 1


def test_clips_of_the_task_are_what_lab_eval_shows(tmp_path: Path) -> None:
    item = task_items("all", 5, 3, 7)[2]
    write_clip(tmp_path / "a.mkv", item.video(50))
    frames = np.stack([f for some in Reading(str(tmp_path / "a.mkv"), frames=5) for f in some])
    assert np.array_equal(frames, item.video(50).numpy())


# --- the model class, in a harness of a few lines ------------------------------------------------


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of the model class, with what it imports of lmms-eval; `logged` is what it logs."""

    class Base:
        def __init__(self) -> None:
            self.task_dict: dict[str, Any] = {}

        def clean(self) -> None:
            pass

    def messages(messages: list[dict]) -> SimpleNamespace:
        told = [
            SimpleNamespace(role=m["role"], content=[SimpleNamespace(**p) for p in m["content"]])
            for m in messages
        ]
        return SimpleNamespace(messages=told)

    logged: list[tuple] = []
    result = lambda text, counts: SimpleNamespace(text=text, token_counts=counts)
    parts = {
        "api.instance": {"GenerationResult": result, "Instance": object, "TokenCounts": lambda *n: n},
        "api.model": {"lmms": Base},
        "models.model_utils.gen_metrics": {"log_metrics": lambda *what: logged.append(what)},
        "protocol": {"ChatMessages": messages},
    }  # fmt: skip
    for name, found in parts.items():
        module = ModuleType(f"lmms_eval.{name}")
        vars(module).update(found)
        monkeypatch.setitem(sys.modules, f"lmms_eval.{name}", module)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    module = import_module("zipvl.lmms.model")
    yield SimpleNamespace(make=module.ZipvlModel, logged=logged)
    del sys.modules["zipvl.lmms.model"]


Q = (
    ("clip", "What comes first?", "red star"), ("clip", "Which digit is written?", "7"),
    ("picture", "What do you see?", "orange moon"), ("clip", "How many objects appear?", "4"),
    ("clip", "What colour is the heart?", "yellow"),
)  # fmt: skip


def requests(asked: Sequence[tuple[str, str, str]], **options: Any) -> list[SimpleNamespace]:
    """As lmms-eval makes them of a task without messages of its own."""

    def to_messages(doc: tuple[str, str, str]) -> list[dict]:
        kind = "video" if doc[0] == "clip" else "image"
        url = str(DEMO / f"{doc[0]}.{'mp4' if kind == 'video' else 'png'}")
        content = [{"type": kind, "url": url}, {"type": "text", "text": doc[1]}]
        return [{"role": "user", "content": content}]

    told = {"max_new_tokens": 20, "until": ["\n\n"]} | options
    return [SimpleNamespace(args=("", to_messages, told, i, "t", "s")) for i in range(len(asked))]


def harness(model: Any, **options: Any) -> Any:
    made = model.make(
        pretrained="demo", device="cpu", **{"method": "dense", "frames": 24} | options
    )
    made.task_dict["t"] = {"s": Q}
    return made


@pytest.mark.parametrize("batch", [1, 3])
def test_answers_in_order_and_a_video_is_read_once_in_a_row(
    model: Any, batch: int, capsys: pytest.CaptureFixture
) -> None:
    lm = harness(model, batch_size=str(batch))
    assert (
        "zipvl: demo, Dense(); of a video 24 frames, evenly spread; float32 on cpu"
        in capsys.readouterr().err
    )
    read, encoded = [], []
    prepare, encode = lm.engine.prepare, lm.engine.model.vision.encode
    lm.engine.prepare = lambda *what: (read.append(what[2:3]), prepare(*what))[1]
    lm.engine.model.vision.encode = lambda *what, **more: (
        encoded.append(len(what[0])),
        encode(*what, **more),
    )[1]
    found = lm.generate_until(requests(Q))
    assert [r.text for r in found] == [answer for *_, answer in Q]
    assert [r.token_counts[1] for r in found] == [2, 1, 2, 1, 1]
    clips = [what for what in read if what and isinstance(what[0], str)]
    # One by one the picture comes between; in threes it is in the batch with the clip.
    assert len(clips) == (2 if batch == 1 else 1)
    assert encoded.count(24) == len(clips)
    [(seconds, tokens, _, extra)] = model.logged
    assert (tokens, extra["total_requests"]) == (7, 5)
    assert 0 < extra["prefill_seconds"] < extra["first_token_seconds"] < seconds
    assert extra["kept"] == 1.0
    assert (
        min(
            extra[k]
            for k in ("video_seconds", "vision_seconds", "decode_tokens_per_second", "kv_bytes")
        )
        > 0
    )
    lm.clean()
    assert not hasattr(lm, "engine")


def test_a_question_asked_again_is_another_sample(model: Any) -> None:
    lm = harness(model, batch_size=4)
    [request] = requests(Q[3:4], temperature=50.0, do_sample=True, max_new_tokens=6)
    request.args = (*request.args[:3], 3, "t", "s")
    texts = [r.text for r in lm.generate_until([request] * 4)]
    assert len({*texts}) == 4
    assert [r.text for r in lm.generate_until([request] * 4)] == texts


def test_what_fails_ends_the_run(model: Any) -> None:
    lm = harness(model)
    lm.task_dict["t"] = {"s": (("absent", "What?", ""),)}
    with pytest.raises(MediaError, match="absent"):
        lm.generate_until(requests([("absent", "What?", "")]))
    for nothing in (lm.loglikelihood, lm.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="zipvl answers"):
            nothing([])


def test_a_video_longer_than_zipvl_holds(model: Any) -> None:
    lm = harness(model, frames=140)
    assert [r.text for r in lm.generate_until(requests(Q[:2]))] == ["red star", "7"]


@pytest.mark.parametrize(("wrong", "sentence"), [
    ({"framez": 4}, "no 'framez'.*it takes pretrained"),
    ({"recent": 4}, "belong to its name"),
    ({"batch_size": "auto"}, "--batch_size is 'auto'"),
    ({"max_frames_num": 4}, "frames is 24, max_frames_num 4"),
    ({"method": "zipvl:tua=1"}, "no option 'tua'"),
    ({"fps": "one"}, "fps is 'one'"),
])  # fmt: skip
def test_what_is_wrong_is_named(model: Any, wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        harness(model, **wrong)


def test_one_process(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="one process"):
        harness(model)


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
    words = ["--method", METHOD, "--frames", "16", "--samples", "12", "--device", "cpu"]
    assert lab_eval.main([*words, "--dtype", "float32", "--out", str(out)]) == 0
    lines = (out / "answers.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "given" in row]


def evaluated(
    words: list[str], task: Path, out: Path, **more: str
) -> tuple[float, list[dict], dict, str]:
    """Score, samples, the summary of what was logged, and all that was said."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
                                "HF_HOME": str(out / "hf"), "OPENAI_API_KEY": "x"} | more  # fmt: skip
    words = [*words, "--tasks", TASK, "--include_path", str(task), "--log_samples"]
    done = subprocess.run([*words, "--output_path", str(out)], cwd=out, env=environment, text=True,
                          capture_output=True, timeout=600, check=False)  # fmt: skip
    told = done.stdout + done.stderr
    found = [*out.rglob("*_results.json"), *out.rglob(f"*_samples_{TASK}.jsonl")]
    assert (done.returncode, len(found)) == (0, 2), told[-6000:]  # it is 0 after an error, too
    results = json.loads(found[0].read_text())
    rows = sorted(map(json.loads, found[1].read_text().splitlines()), key=lambda r: r["doc_id"])
    score = next(v for k, v in results["results"][TASK].items() if k.startswith("right,"))
    return score, rows, results, told


def same(rows: list[dict], score: float, ours: list[dict[str, Any]]) -> None:
    assert len(rows) == len(ours) == 12
    said = [row["filtered_resps"] for row in rows]
    given = [answer[0] if isinstance(answer, list) else answer for answer in said]
    assert given == [row["given"] for row in ours]
    assert [bool(row["right"]) for row in rows] == [row["ok"] for row in ours]
    assert score == pytest.approx(sum(row["ok"] for row in ours) / 12)


@pytest.mark.slow
@pytest.mark.parametrize(("module", "batch"), [("zipvl.lmms", "1"), ("lmms_eval", "5")])
@pytest.mark.timeout(3000)
def test_the_score_is_lab_evals(
    python: Path, task: Path, ours: list[dict[str, Any]], module: str, batch: str, tmp_path: Path
) -> None:
    """Through the launcher, beside a plugin that fails before ours, and through lmms-eval's own,
    which finds the entry point; in batches."""
    broken = tmp_path / "plugins" / "broken-1.dist-info"
    broken.mkdir(parents=True)
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (broken / "entry_points.txt").write_text(
        "[lmms_eval.models]\nbroken = no_such_module:manifest\n"
    )
    more = {"PYTHONPATH": str(broken.parent)} if module == "zipvl.lmms" else {}
    words = [str(python), "-m", module, "--model", "zipvl", "--batch_size", batch, "--model_args",
             f"pretrained=demo,method='{METHOD}',max_frames_num=16,device=cpu,dtype=float32"]  # fmt: skip
    score, rows, found, told = evaluated(words, task, tmp_path, **more)
    same(rows, score, ours)
    assert ("No module named 'no_such_module'" in told) == bool(more)
    assert told.count("of a video 16 frames, evenly spread") == 1
    logged = found["throughput"]
    assert logged["avg_kept"] == pytest.approx(
        sum(sum(r["ratios"]) / len(r["ratios"]) for r in ours) / 12, abs=1e-3
    )
    assert logged["avg_prompt_tokens"] == sum(r["prompt_tokens"] for r in ours) / 12
    for name in ("first_token_seconds", "prefill_seconds", "decode_tokens_per_second", "kv_bytes"):
        assert logged[f"avg_{name}"] > 0
    counts = rows[0]["token_counts"]
    assert (counts[0] if isinstance(counts, list) else counts)["input_tokens"] > 60


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_servers_score_is_lab_evals(
    python: Path, task: Path, ours: list[dict[str, Any]], tmp_path: Path
) -> None:
    """lmms-eval's own model `openai` asks the server, which takes every question alone."""
    pytest.importorskip("zipvl.serve.routes", reason="needs pip install 'zipvl[serve]'")
    serve = [sys.executable, "-m", "zipvl", "serve", "--port", "0", "--media-root", str(task), "--method", METHOD,
             "--reuse", "none", "--device", "cpu", "--dtype", "float32"]  # fmt: skip
    with subprocess.Popen(serve, cwd=ROOT, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            url = server.stderr.readline().split()[-1]
            words = [str(python), "-m", "lmms_eval", "--model", "openai", "--batch_size", "1", "--model_args",
                     f"model=zipvl-demo,base_url={url},pass_video_url=True,max_frames_num=16,num_concurrent=1"]  # fmt: skip
            score, rows, _, told = evaluated(words, task, tmp_path)
        finally:
            server.terminate()
    same(rows, score, ours)
    assert "LMMS_EVAL_REQUEST_FAILED" not in told


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_unknown_options_end_the_run(python: Path, task: Path, tmp_path: Path) -> None:
    words = [str(python), "-m", "zipvl.lmms", "--model", "zipvl", "--tasks", TASK, "--model_args",
             "pretrained=demo,framez=16", "--include_path", str(task)]  # fmt: skip
    done = subprocess.run(words, cwd=tmp_path, text=True, capture_output=True, timeout=300,
                          env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False)  # fmt: skip
    assert "zipvl has no 'framez'" in done.stdout + done.stderr
