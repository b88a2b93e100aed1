"""The benchmark runs, tells the truth about what it moved, and its rival computes the same."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import zipvl
from lab.bench import plot
from lab.bench.benches import ragged
from lab.bench.cli import BENCHES, main, parse
from lab.bench.e2e import PROMPT, random_inputs
from lab.bench.memory import ROOT, alone
from lab.bench.methods import OPTIONS, TOVA, ready
from lab.bench.model import Model
from lab.bench.rival import build_rival
from lab.bench.vlm import random_engine
from lab.command import ended
from zipvl.errors import MediaError, ZipvlError
from zipvl.policies import METHODS, load_policy

COMMON = ["--shape", "tiny", "--dtype", "float32", "--repeats", "2"]


@pytest.mark.parametrize(
    "words",
    [
        ["prefill", "--tokens", "96,130", "--methods", "dense,fixed:ratio=0.3", "--rival"],
        [
            "decode",
            "--tokens",
            "40",
            "--batch",
            "1,3",
            "--ratios",
            "1,0.5",
            "--new",
            "2",
            "--rival",
        ],
        ["projections", "--tokens", "64", "--ratios", "1,0.3", "--clock", "cpu"],
        ["linear"],
        ["decode", "--tokens", "40", "--batch", "1,3", "--new", "2", "--graph"],
    ],
)
def test_every_benchmark(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "new" / "raw.json"
    monkeypatch.setattr(sys, "argv", ["bench.py", *words, *COMMON, "--out", str(out)])
    main()
    report = json.loads(out.read_text())
    table = capsys.readouterr().out.strip().splitlines()
    assert len(table) == len(report["rows"]) > 1
    assert report["machine"]["torch"] == torch.__version__
    for row in report["rows"]:
        assert len(row["seconds"]) == 2
        assert all(value > 0 for value in row["seconds"])
        assert row["run"] not in row["faster_than"]


def run(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    out = tmp_path / "raw.json"
    monkeypatch.setattr(sys, "argv", ["bench.py", *words, *COMMON, "--out", str(out)])
    main()
    return json.loads(out.read_text())["rows"]


def test_stages_from_file_to_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["e2e", "--frames", "2,5", "--methods", "dense,fixed:ratio=0.5", "--new", "3"]
    rows = run(words, tmp_path, monkeypatch)
    assert [(r["frames"], r["tokens"]) for r in rows] == [(2, 72), (2, 72), (5, 84), (5, 84)]
    for row in rows:
        assert list(row["stages"]) == ["read", "resize", "encode", "prefill", "first", "decode"]
        assert all(value > 0 for value in row["stages"].values())
        assert 0.6 < row["covered"] <= 1
        for first, whole in zip(row["first_token"], row["seconds"], strict=True):
            assert 0 < first < whole
        assert row["ratio"] == (1 if row["run"] == "dense" else pytest.approx(0.82, abs=0.1))
        assert row["peak_memory"] > 0


def test_stages_of_a_checkpoint(
    oracle: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, clip = str(oracle("llava_onevision").folder), str(zipvl.demo_clip())
    words = ["e2e", "--model", folder, "--video", clip, "--frames", "3", "--new", "2"]
    [row] = run(words, tmp_path, monkeypatch)
    assert row["tokens"] == len(zipvl.load(folder).prepare(PROMPT, video=clip, frames=3))
    assert (row["video"], row["new"]) == ("clip.mp4", 2)


@pytest.mark.slow
def test_memory_of_a_fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16k tokens of the tiny shape take 64 MB by the formula, far above what a process wavers."""
    words = ["memory", "--tokens", "16384", "--methods", "dense", "--layers", "8"]
    measured, dense, sparse = run(words, tmp_path, monkeypatch)
    model = Model("tiny", "cpu", torch.float32, "auto", 8)
    parts = measured["formula"]
    assert parts["weights"] == model.weight_bytes
    assert parts["caches"] == measured["kv_bytes"]
    assert sum(v for k, v in parts.items() if k != "total") == parts["total"]
    assert 0.7 < measured["over_formula"] < 2
    assert 0.85 < measured["allocated"] / parts["total"] < 1.05
    assert measured["loaded"] < measured["measured"]
    assert sparse["formula"]["caches"] == 28 * 2 * 4 * 128 * 2 * (60_000 + 256)
    assert 15e9 < sparse["formula"]["weights"] < 17e9
    assert sparse["share_of_card"] < dense["share_of_card"] < 1


@pytest.mark.slow
def test_frames_are_shrunk_as_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """160 frames are 71 MB as decoded and 1.5 MB as the tower takes them."""
    [row] = run(["frames", "--frames", "160"], tmp_path, monkeypatch)
    assert row["crops"] == 160 * 56 * 56 * 3
    assert row["file_pixels"] == 160 * 384 * 384 * 3
    assert row["features"] == (row["tokens"] - 64) * 64 * 4
    assert 0 <= row["read"] < row["file_pixels"]  # most of it the decoder's own
    assert row["encode"] < row["file_pixels"]  # all done before: from just below nothing


@torch.inference_mode()
def test_a_random_engine_answers_a_ragged_batch_as_one_by_one() -> None:
    engine = random_engine("tiny", "cpu", torch.float32, "auto", None)
    clip = str(zipvl.demo_clip())
    batch = [random_inputs(engine, clip, frames, {}) for frames in (9, 1, 30)]
    assert len({len(i) for i in batch}) == 3
    for method in ("dense", "zipvl", "fixed:ratio=0.3"):
        together = engine.generate(batch, method, max_new_tokens=6)
        for inputs, answer in zip(batch, together, strict=True):
            assert engine.generate(inputs, method, max_new_tokens=6).tokens == answer.tokens
            assert len(answer.tokens) == 6


def test_batches_of_different_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ragged(100, 4) == [100, 88, 75, 63]
    words = ["batch", "--tokens", "100", "--batch", "1,4", "--ratios", "1,0.5", "--new", "2"]
    rows = run(words, tmp_path, monkeypatch)
    slot = 2 * 2 * 2 * 16 * 4
    weights = Model("tiny", "cpu", torch.float32, "auto", None).weight_bytes
    assert [r["batch"] for r in rows] == [1, 4, 1, 4]
    assert [(r["bytes_per_step"] - weights) // slot for r in rows] == [100, 326, 50, 162]
    for row in rows:
        step = sorted(row["seconds"])
        assert row["tokens_per_second"] == pytest.approx(row["batch"] * 2 / (sum(step) / 2))


def test_decode_with_packed_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs come on top of the full tensors, which are shared, and are read in small batches."""
    words = ["decode", "--tokens", "40", "--batch", "1,6", "--weights", "full,int8", "--new", "2"]
    full, small, _, large = run(words, tmp_path, monkeypatch)
    places = {(1, 40): 2 * 2 * 2 * 16 * 4 * 40, (6, 40): 6 * 2 * 2 * 2 * 16 * 4 * 40}
    model = Model("tiny", "cpu", torch.float32, "auto", None)
    owned = {p.data_ptr() for p in model.decoder.parameters()}
    packed = model.packed("int8")
    assert {p.data_ptr() for p in packed.decoder.parameters()} == owned
    assert packed.lm_head.weight.data_ptr() in owned
    matrices = [p for n, p in model.decoder.named_parameters() if p.ndim > 1]
    codes = sum(p.numel() + 2 * len(p) for p in matrices)  # a byte a weight, a scale a row
    assert [r["packed_bytes"] for r in (full, small, large)] == [0, codes, codes]
    assert full["bytes_per_step"] == model.weight_bytes + places[1, 40]
    rest = model.weight_bytes - sum(p.nbytes for p in matrices)
    assert small["bytes_per_step"] == rest + codes + places[1, 40]
    assert large["bytes_per_step"] == model.weight_bytes + places[6, 40]
    with torch.inference_mode():
        x = model.decoder.norm(torch.randn(1, 64))
        near = torch.nn.functional.cosine_similarity(packed.logits(x), model.logits(x))
    assert 0.999 < near < 1


def test_decode_with_weights_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They replace the layers' weights; the head is the embedding, too, and so stays beside."""
    words = ["decode", "--tokens", "40", "--batch", "6", "--weights", "full,packed", "--new", "2"]
    full, packed = run(words, tmp_path, monkeypatch)
    model = Model("tiny", "cpu", torch.float32, "auto", None)
    assert full["packed_bytes"] == 0
    assert packed["packed_bytes"] == model.lm_head.weight.nbytes
    assert packed["bytes_per_step"] == full["bytes_per_step"]


def test_methods_that_act_at_decode_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """All there are, over as many slots as dense has; their parts are parts of the whole."""
    dense, *others = run(["methods", "--tokens", "200", "--new", "3"], tmp_path, monkeypatch)
    assert (dense["run"], dense["slots"]) == ("dense", 200 + 2 + 3)
    assert dense["times_dense"] == {"attention": "1 (1-1)x", "step": "1 (1-1)x"}
    names = [row["run"].removesuffix(f":{OPTIONS[TOVA]}".format(n=200)) for row in others]
    acting = {name for name in filter(ready, METHODS) if load_policy(name).step is not None}
    assert {name.split(":")[0] for name in names if name != TOVA} >= acting
    assert TOVA in names
    for row in (dense, *others):
        evicts = row["run"].startswith(("streaming", "h2o", TOVA))
        assert 200 <= row["slots"] <= (200 if evicts else 200 + 2 + 3), row["run"]
        assert (sum(row["decide"]) > 0) == (load_policy(row["run"]).step is not None), row["run"]
        assert all(seconds > 0 for seconds in row["leave"])
        parts = zip(*(row[p] for p in ("seconds", "attention", "decide", "leave")), strict=True)
        assert all(s > a > d + leave for s, a, d, leave in parts)
        places = 2 * 2 * 2 * 16 * 4  # k and v, layers, heads, head size, bytes
        if evicts:
            assert row["kv_bytes"] == 201 * places
    assert capsys.readouterr().out.count("x dense") == 2 * (1 + len(others))


def test_one_method_at_decode_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside dense, with the options that it is given; one that does nothing there is no row."""
    words = [
        "methods",
        "--tokens",
        "20,30",
        "--methods",
        "fixed,h2o:heavy=3,recent=4",
        "--new",
        "2",
    ]
    rows = run(words, tmp_path, monkeypatch)
    assert [(r["tokens"], r["run"]) for r in rows] == [
        (n, name) for n in (20, 30) for name in ("dense", "h2o:heavy=3,recent=4")
    ]
    assert [r["slots"] for r in rows] == [24, 7, 34, 7]


@pytest.mark.slow
def test_figures_from_raw_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each figure's file appears; what it draws as a ceiling is dense without attention."""
    pytest.importorskip("matplotlib")
    words = ["prefill", "--tokens", "70,140", "--methods", "dense,fixed:ratio=0.5"]
    rows = run(words, tmp_path, monkeypatch)
    for row in rows:
        if row["run"] == "dense":
            rest = sum(v for k, v in row["share"].items() if k != "attend")
            assert plot.free_attention(row) == pytest.approx(plot.seconds(row) * rest)
    raw = [str(tmp_path / "raw.json")]
    monkeypatch.setattr(sys, "argv", ["plot", *raw, "--out", str(tmp_path / "png")])
    plot.main()
    names = ["prefill_speedup_tiny_float32.png", "prefill_time_tiny_float32.png"]
    assert sorted(p.name for p in (tmp_path / "png").iterdir()) == names
    for words, name in (
        (["decode", "--tokens", "40,80", "--batch", "1,2", "--new", "2"], "decode_context"),
        (["batch", "--tokens", "40", "--batch", "1,2", "--new", "2"], "decode_batch"),
        (["e2e", "--frames", "1", "--new", "2"], "e2e_stages"),
    ):
        run([*words, "--plot", str(tmp_path / name)], tmp_path, monkeypatch)
        [png] = (tmp_path / name).iterdir()
        assert png.name == f"{name}_tiny_float32.png"
        assert png.read_bytes()[:4] == b"\x89PNG"


def test_prefill_rows_say_what_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "raw.json"
    words = ["prefill", "--tokens", "200", "--methods", "dense,fixed:ratio=0.5"]
    monkeypatch.setattr(sys, "argv", ["bench.py", *words, *COMMON, "--out", str(out)])
    main()
    dense, half = json.loads(out.read_text())["rows"]
    assert (dense["ratio"], dense["work"]) == (1, 1)
    assert (half["ratio"], half["work"]) == (0.5, 0.25)
    places = 2 * 2 * 2 * 16 * 4  # k and v, layers, heads, head size, bytes
    assert dense["kv_bytes"] == (200 + 16) * places
    assert half["kv_bytes"] == (100 + 16) * places
    assert sum(half["share"].values()) == pytest.approx(1)


@torch.inference_mode()
def test_the_rival_is_the_same_model() -> None:
    """Otherwise the race would be between two different models."""
    model = Model("tiny", "cpu", torch.float32, "auto", None)
    rival = build_rival(model)
    ids = torch.randint(512, (50,))
    ours = model.prefill(ids, "dense", room=None)[0]
    torch.testing.assert_close(ours, rival(ids[None]).logits[0, -1:], atol=1e-4, rtol=1e-4)
    owned = {p.data_ptr() for p in model.decoder.parameters()}
    assert {p.data_ptr() for p in rival.parameters()} == owned  # no second copy of the weights


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prefill", "--methods", "foo"], "unknown method 'foo'"),
        (["prefill", "--methods", "fixed:ratio=2"], "ratio"),
        (["decode", "--tokens", "0"], "--tokens: '0': give whole numbers above 0"),
        (["decode", "--tokens", "-5"], "--tokens: '-5'"),
        (["decode", "--tokens=-5"], "--tokens: '-5'"),
        (["decode", "--tokens", "abc"], "--tokens: 'abc'"),
        (["decode", "--tokens", "4,"], "--tokens: '4,'"),
        (["decode", "--batch", "1.5"], "--batch"),
        (["decode", "--ratios", "0"], "--ratios: '0': give shares"),
        (["decode", "--ratios", "nan"], "--ratios"),
        (["decode", "--new", "0"], "--new: '0'"),
        (["decode", "--repeats", "0"], "--repeats"),
        (["decode", "--layers", "0"], "--layers"),
        (["decode", "--weights", "int2"], "unknown weights 'int2'"),
        (["decode", "--device", "nowhere"], "device 'nowhere' cannot be used"),
        (["decode", "--attn", "none"], "none"),
        (["e2e", "--frames", "0"], "--frames"),
        ([], "the following arguments are required: bench"),
        (["nothing"], "nothing"),
    ],
)
def test_mistakes_are_one_sentence(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1


def test_a_prompt_of_one_token_at_a_small_ratio() -> None:
    assert main(["decode", "--tokens", "1", "--ratios", "0.1", "--new", "1", *COMMON]) == 0


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (KeyboardInterrupt(), 130, ""),
        (MediaError("no video"), 1, "error: no video\n"),
        (MemoryError("12 GB"), 3, "out of memory while measuring"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 3,
         "out of memory while measuring"),
        (PermissionError(13, "Permission denied", "/out"), 1, "error: /out: Permission denied\n"),
    ],
)  # fmt: skip
def test_how_a_command_ends(
    raised: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> None:
        raise raised

    assert ended(run) == code
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == bool(said)


def test_a_child_that_fails_is_one_sentence() -> None:
    with pytest.raises(ZipvlError, match=r"lab\.bench\.frames 1 no failed: "):
        alone("lab.bench.frames", 1, "no")


@pytest.mark.slow
@pytest.mark.parametrize("words", [["bench.py", "decode", "--tokens", "99999", "--repeats", "99"],
                                   ["-m", "lab.eval"],
                                   ["-m", "lab.experiments", "tau", "--out", "OUT"]])  # fmt: skip
@pytest.mark.parametrize("seconds", [0.15, 0.4, 0.7, 1.0, 6.0])
def test_ctrl_c_at_any_time(words: list[str], seconds: float, tmp_path: Path) -> None:
    """While torch is imported, while the model is made, while it measures."""
    command = [sys.executable, *(w.replace("OUT", str(tmp_path)) for w in words)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True,
                          stdout=subprocess.DEVNULL) as process:  # fmt: skip
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    assert process.returncode in (130, -signal.SIGINT)  # the second: before the first line of ours
    assert "Traceback" not in error or process.returncode == -signal.SIGINT


def test_make_bench_gives_what_the_command_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    [line] = [x for x in (ROOT / "Makefile").read_text().splitlines() if "bench.py" in x]
    assert parse(line.split("bench.py")[1].split()).bench in BENCHES


def test_seconds_are_plain_numbers() -> None:
    """2 and 3, not 2 x 10^0."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure()
    rows = [{"run": "fixed", "tokens": n, "seconds": [s]} for n, s in ((100, 1.5), (200, 4.0))]
    plot.draw_time(axes := figure.subplots(), rows)
    figure.canvas.draw()
    labels = {t.get_text() for t in (*axes.get_yticklabels(), *axes.get_yticklabels(minor=True))}
    assert {"2", "3"} <= labels
    assert not any("10" in label and "^" in label for label in labels)
