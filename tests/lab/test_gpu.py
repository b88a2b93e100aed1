"""`make gpu` on a CPU: every kind of row, going on where it stopped, mistakes, the roofline."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest
import torch
from torch import Tensor

from lab.bench.model import Model
from lab.gpu import jobs
from lab.gpu.cli import main, parse
from lab.gpu.jobs import DRY, Bench, curve
from lab.gpu.roofline import Ceilings, allowed, floor, works
from lab.gpu.show import PAPER
from zipvl.linear import Linear
from zipvl.model.batch import Spans

ROOT = Path(__file__).parent.parent.parent
WORDS = ["--dry", "--no-tests", "--out"]
PREFILL = [f"prefill {n} {run}" for n in DRY.lengths for run in jobs.RUNS]


def read(folder: Path) -> dict[str, dict]:
    rows = json.loads((folder / "gpu.json").read_text())["rows"]
    return {row["key"]: row for row in rows}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu") / "new"
    assert main([*WORDS, str(folder)]) == 0
    return folder


def test_every_kind_of_row(done: Path) -> None:
    rows = read(done)
    assert list(rows)[: len(PREFILL)] == PREFILL  # the most important first
    for row in rows.values():
        assert {"bench", "card", "settings"} <= row.keys()
        assert {"seconds", "skipped", "peak", "ask"} & row.keys()
        assert all(s > 0 for s in row.get("seconds", []))
        assert 0 < row.get("share", 0.5) < 1
    for n in DRY.lengths:
        dense, flash = rows[f"prefill {n} dense"], rows[f"prefill {n} dense, FA2"]
        assert dense["attention"] == flash["attention"] == "sdpa"
        assert dense["layers"] == (4 if n <= DRY.whole else 3)
        assert {"rest", "attend"} <= dense["stages"].keys()
        assert dense["over dense, FA2"] > 0
        assert rows[f"prefill {n} fixed 0.5"]["allowed"] > 0.9
    assert rows["prefill 512 fixed 0.3"]["ratio"] == pytest.approx(0.3, abs=0.01)
    longest = rows["prefill 512 dense"]
    assert longest["seconds_all_layers"] > median(longest["seconds"])
    skipped = [key for key, row in rows.items() if "skipped" in row]
    assert skipped == [f"decode 256 x 8 ratio 1, {way}" for way in ("graph", "eager")]
    step = rows["decode 256 x 2 ratio 0.3, eager"]
    weights = Model("tiny", "cpu", torch.float32, "auto", 4).weight_bytes
    assert step["moved"] == weights + 2 * 4 * 2 * 76 * 2 * 16 * 4  # k and v, layers, batch, slots
    assert rows["decode 256 bits"]["moved"] < rows["decode 256 x 1 ratio 1, eager"]["moved"]
    few, many = (rows[f"decode equal memory {ratio}"] for ratio in ("1", "0.3"))
    places = [r["batch"] * (r["slots"] + jobs.ROOM + 2) * 2 * 2 * 2 * 16 * 4 for r in (few, many)]
    assert all(0.9 * DRY.cache < n <= DRY.cache for n in places)
    assert many["over dense"] > 0
    for ratio in ("1", "0.3"):
        asked = rows[f"extend 128 ratio {ratio}"]
        assert asked["of prefill"] == pytest.approx(
            median(asked["ask"]) / asked["prefill"], rel=0.01
        )
    assert rows["memory dense"]["kv_bytes"] > rows["memory fixed 0.3"]["kv_bytes"]


def test_table_and_figures(done: Path) -> None:
    table = (done / "table.md").read_text()
    assert "nan" not in table
    assert "None |" not in table
    assert table.count("| fixed 0.3 |") == len(DRY.lengths) + 1
    assert "- decode 256 x 8 ratio 1, graph | skipped: caches need 0.0" in table
    assert "paper: 2.8x" in table
    assert "| 128 | ratio 0.3 | 64 |" in table
    for name in ("prefill.png", "decode.png"):
        assert (done / name).read_bytes()[:4] == b"\x89PNG"
        assert (done / name).stat().st_size < 60_000
    assert sorted(p.name for p in done.iterdir()) == [
        "decode.png", "gpu.json", "prefill.png", "table.md"
    ]  # fmt: skip
    assert [*PAPER.values()] == sorted(PAPER.values())


@pytest.mark.slow
def test_a_second_run_measures_nothing(done: Path, capsys: pytest.CaptureFixture) -> None:
    before = read(done)
    assert main([*WORDS, str(done)]) == 0
    assert capsys.readouterr().out.count("\n") == 1  # the environment
    assert read(done) == before
    assert main([*WORDS, str(done), "--only", "memory", "--again"]) == 0
    assert capsys.readouterr().out.count("\n") == 3
    assert read(done).keys() == before.keys()


def test_no_time(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([*WORDS, str(tmp_path), "--minutes", "0"]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert "0 minutes are over" in said
    assert said.endswith("memory dense, memory fixed 0.3")
    assert read(tmp_path) == {}


@pytest.mark.slow
def test_what_fails_is_a_row_and_comes_last_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = [*WORDS, str(tmp_path), "--only", "prefill,memory"]
    with monkeypatch.context() as patch:

        def wrong(*_: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 90 GiB")

        patch.setattr(jobs.Schedule, "plan", wrong)
        patch.setattr(jobs, "peak_memory", wrong)
        assert main(words) == 1
    failed = {key for key, row in read(tmp_path).items() if "error" in row}
    assert failed == {"memory dense", "memory fixed 0.3"} | {k for k in PREFILL if "stream" in k}
    assert read(tmp_path)["memory dense"]["error"].startswith("OutOfMemoryError: CUDA out of")
    assert "over dense" in read(tmp_path)["prefill 256 fixed 0.3"]  # the others went on
    assert "rows failed (" in capsys.readouterr().err
    assert "OutOfMemoryError" in (tmp_path / "table.md").read_text()
    path = tmp_path / "gpu.json"
    held = json.loads(path.read_text())
    held["rows"] = [row for row in held["rows"] if row["bench"] != "memory"]  # never tried
    path.write_text(json.dumps(held))
    assert main(words) == 0
    said = [line.split("] ")[1] for line in capsys.readouterr().out.splitlines()]
    assert said[1].startswith("memory dense")
    assert len(said) == 1 + 2 + len(PREFILL)  # a length is measured as a whole
    assert not [row for row in read(tmp_path).values() if "error" in row]


def test_ctrl_c_leaves_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Bench, *_: object) -> Iterator[dict]:
        raise KeyboardInterrupt
        yield {}

    monkeypatch.setattr(Bench, "decode", stop)
    assert main([*WORDS, str(tmp_path)]) == 130
    assert [*read(tmp_path)] == PREFILL
    assert (tmp_path / "table.md").exists()


@pytest.mark.parametrize(("code", "exit"), [(0, 0), (1, 1)])
def test_gpu_tests_are_counted(
    code: int, exit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = f"print('noise', '12 passed, 3 failed, 1 skipped in 9s', sep=chr(10)); raise SystemExit({code})"
    monkeypatch.setattr(jobs, "PYTEST", [sys.executable, "-c", said])
    assert main(["--dry", "--only", "tests", "--out", str(tmp_path)]) == exit
    [row] = read(tmp_path).values()
    assert (row["passed"], row["failed"], row["skipped"]) == (12, 3, 1)
    assert row["tail"][0] == "noise"
    assert ("error" in row) == bool(exit)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "there is no CUDA device here: --dry"),
        (
            ["--only", "prefill,foo"],
            "--only: 'foo': give some of tests, prefill, decode, extend, memory",
        ),
        (["--minutes", "x"], "--minutes"),
    ],
)
def test_mistakes_are_one_sentence(
    words: list[str], said: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_make_gpu_gives_what_the_command_needs() -> None:
    [line] = [x for x in (ROOT / "Makefile").read_text().splitlines() if "lab.gpu" in x]
    assert line.endswith("-m lab.gpu $(if $(DRY),--dry)")
    assert parse([]).out == Path("lab/results/gpu")
    assert parse(["--dry"]).only == ["tests", "prefill", "decode", "extend", "memory"]


def test_few_layers_stand_for_all() -> None:
    """All but the last, which computes one row, keep as much on average as those of the depth."""
    every, few = ([float(x) for x in curve(n, 28).split("/")] for n in (28, 6))
    assert every == sorted(every, reverse=True)
    assert (every[0], every[-1], few[-1]) == (0.576, 0.079, 0.079)
    assert sum(few[:-1]) / 5 == pytest.approx(sum(every[:-1]) / 27, abs=0.005)


@torch.inference_mode()
@pytest.mark.parametrize(("method", "probes"), [("dense", 0), ("fixed:ratio=0.5", 128)])
def test_roofline_counts_what_is_computed(method: str, probes: int) -> None:
    """Against rows that really went through each linear layer and each call of attention."""
    model, T, layers, C, q = Model("tiny", "cpu", torch.float32, "auto", 3), 300, 3, 64, 64
    seen = {"linear": 0, "attention": 0.0}

    def linear(module: Linear, inputs: tuple[Tensor], output: Tensor) -> None:
        seen["linear"] += 2 * len(output) * module.weight.numel()

    def attend(q: Tensor, k: Tensor, v: Tensor, q_spans: Spans, k_spans: Spans) -> Tensor:
        pairs = len(k) if len(q) == 1 else len(k) ** 2 / 2
        seen["attention"] += 4 * q.shape[1] * q.shape[2] * pairs
        return plain(q, k, v, q_spans, k_spans)

    for module in model.decoder.modules():
        if isinstance(module, Linear):
            module.register_forward_hook(linear)
    plain, model.attend = model.attend, attend
    out = model.prefill(torch.zeros(T, dtype=torch.long), method, 4)[1]
    found = works(out.layers, model.config, 4)
    looked = layers * 2 * probes * q * (C + T)
    assert sum(w.probes for w in found) == looked
    assert sum(w.products for w in found) == seen["linear"] - layers * 2 * probes * q * C
    assert sum(w.attention for w in found) == seen["attention"]
    flops = sum(w.products + w.attention + w.probes for w in found)
    case = out.layers, model.config, 4
    assert floor(*case, Ceilings(float("inf"), 1e9)) == pytest.approx(flops / 1e9)
    matrices = sum(p.nbytes for p in model.decoder.parameters() if p.ndim > 1)
    kept, asking = (T, T) if method == "dense" else (T // 2, T // 2)
    hidden = layers * 4 * 4 * T * C
    heads = 4 * 2 * (2 * (asking * q + kept * 32) + (q + kept * 32))  # of the last layer: one row
    cached = layers * 4 * 2 * kept * 32
    assert floor(*case, Ceilings(1e9, float("inf"))) * 1e9 == pytest.approx(
        matrices + hidden + heads + cached
    )


@torch.inference_mode()
def test_what_a_kept_ratio_allows() -> None:
    """All of attention free and no products saved: dense without its attention."""
    model = Model("tiny", "cpu", torch.float32, "auto", 3)
    ids = torch.zeros(400, dtype=torch.long)
    dense, sparse = (model.prefill(ids, m, 4)[1].layers for m in ("dense", "fixed:ratio=0.5"))
    for layer in dense:
        layer.seconds = {"rest": 1.0, "attend": 3.0}
    endless = Ceilings(float("inf"), float("inf"))
    most = allowed(8.0, dense, sparse, model.config, 4, endless)
    pairs = [2 * n**2 / 2 + n for n in (400, 200)]  # two whole layers and one row
    assert most == pytest.approx(1 / (1 - 0.75 * (1 - pairs[1] / pairs[0])))
    assert allowed(8.0, dense, dense, model.config, 4, endless) == 1
