"""The experiments: statistics against known values, resuming, every command on a few samples."""

import json
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from tqdm import tqdm

import zipvl
from lab import records
from lab.demo.checkpoint import write_plain, write_weights
from lab.experiments import (
    clips,
    controls,
    fixed,
    ideas,
    methods,
    probe_study,
    rivals,
    stale,
    stats,
    stays,
    summary,
    tau,
    text,
)
from lab.experiments.cli import EXPERIMENTS, main
from lab.experiments.runner import Job, cell, policy, table
from lab.raw import rounded
from zipvl.engine.engine import Engine
from zipvl.engine.inputs import Inputs
from zipvl.errors import UsageError
from zipvl.model.attention import logit_blocks, probe_mass
from zipvl.model.layouts import read_config
from zipvl.model.vlm import VLM
from zipvl.policies import METHODS
from zipvl.policies.zipvl import ZipVL
from zipvl.policy import Notes, Policy, View
from zipvl.testing import check_policy
from zipvl.testing.toy import Toy

# --- statistics -------------------------------------------------------------------------------


def test_ranks_share_ties() -> None:
    np.testing.assert_array_equal(stats.ranks(np.array([3.0, 1, 3, 7])), [1.5, 0, 1.5, 3])


def test_spearman_by_hand() -> None:
    """Textbook pairs with a tie, and the two extremes."""
    assert stats.spearman([1, 2, 3, 4, 5], [5, 6, 7, 8, 7])["value"] == pytest.approx(0.8207826817)
    x = np.random.default_rng(0).normal(size=40)
    up, down = stats.spearman(x, np.exp(x)), stats.spearman(x, -x)
    assert [up["value"], up["low"], up["high"]] == pytest.approx([1, 1, 1])
    assert down["value"] == pytest.approx(-1)
    loose = stats.spearman(x, np.random.default_rng(1).normal(size=40))
    assert loose["low"] < loose["value"] < loose["high"]


def test_spearman_interval_of_correlated_normals() -> None:
    """Fisher's z gives nearly the same interval for many pairs."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=400)
    got = stats.spearman(x, x + rng.normal(size=400))
    z, half = np.arctanh(got["value"]), 1.96 * np.sqrt(1.06 / 397)
    assert [got["low"], got["high"]] == pytest.approx(np.tanh([z - half, z + half]), abs=0.03)


def test_mean_interval_is_that_of_the_normal_law() -> None:
    values = np.random.default_rng(3).normal(5, 2, size=300)
    got, half = stats.mean(values), 1.96 * values.std() / np.sqrt(300)
    assert got["value"] == pytest.approx(values.mean())
    assert [got["low"], got["high"]] == pytest.approx(
        [values.mean() - half, values.mean() + half], abs=0.04
    )
    assert got == stats.mean(values)
    assert got != stats.mean(values, seed=1)


def test_one_value_has_no_interval() -> None:
    one = stats.mean([2.5])
    assert one["value"] == 2.5
    assert np.isnan(one["low"])
    assert rounded(one) == {"value": 2.5, "low": None, "high": None}
    assert cell(rounded(one)) == "2.5"


def test_share_is_wilsons() -> None:
    """8 of 10: Wilson's interval as Newcombe (1998) prints such cases."""
    got = stats.share([True] * 8 + [False] * 2)
    assert [got["value"], got["low"], got["high"]] == pytest.approx([0.8, 0.4902, 0.9433], abs=1e-4)


def test_frontier_by_hand() -> None:
    rows = [
        {"cost": c, "accuracy": {"value": a}} for c, a in ((3, 0.9), (1, 0.5), (2, 0.4), (4, 0.9))
    ]
    assert [r["cost"] for r in methods.frontier(rows, "cost", methods.accuracy)] == [1, 3]


# --- records that outlive an interruption -----------------------------------------------------


def test_a_second_run_measures_only_what_is_missing(tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []

    def measure(units: list[str], method: str) -> list[dict]:
        asked.extend((u, method) for u in units)
        return [{"x": 1 / 3, "unit_was": u} for u in units]

    def go(units: str, names: str) -> list[dict]:
        return Job("tau", tmp_path).records(units, names, lambda u: u, measure, 2)

    go("abc", "m")
    assert asked == [("a", "m"), ("b", "m"), ("c", "m")]
    asked.clear()
    assert [(r["unit"], r["method"]) for r in go("abcd", "mn")][:3] == [
        ("a", "m"),
        ("a", "n"),
        ("b", "m"),
    ]
    assert asked == [("a", "n"), ("b", "n"), ("c", "m"), ("d", "m"), ("c", "n"), ("d", "n")]
    asked.clear()
    again = go("ab", "n")
    assert not asked
    assert again == [{"unit": u, "method": "n", "x": 0.333333, "unit_was": u} for u in "ab"]


def test_records_of_another_run_are_refused(tmp_path: Path) -> None:
    Job("tau", tmp_path).records(["a"], ["m"], lambda u: u, lambda u, m: [{}])
    with pytest.raises(UsageError, match="other settings"):
        Job("tau", tmp_path, seed=1).records(["a"], ["m"], lambda u: u, lambda u, m: [{}])


@pytest.mark.parametrize("line", ["{", "3", "[]", "{}", '{"unit": "a"}', "null", "\ufffd"])
def test_damaged_lines_are_named(tmp_path: Path, line: str) -> None:
    path, other = tmp_path / "records.jsonl", '{"unit": "a", "method": "m"}\n'
    text = json.dumps(Job("tau", tmp_path).settings()) + "\n" + line + "\n" + other
    path.write_text(text)
    with pytest.raises(UsageError, match="line 2 is damaged: delete that line"):
        Job("tau", tmp_path).records(["a"], ["m"], lambda u: u, lambda u, m: [{}])
    assert path.read_text() == text


@pytest.mark.parametrize("cut", [1, 5, 30, 40])
def test_half_a_line_is_measured_again(tmp_path: Path, cut: int) -> None:
    """Wherever the last write ended, also within the settings."""

    def go() -> list[dict]:
        return Job("tau", tmp_path).records("ab", "m", lambda u: u, lambda u, m: [{"x": 1}])

    found, path = go(), tmp_path / "records.jsonl"
    whole = path.read_bytes()
    for end in (len(whole) - cut, cut):
        path.write_bytes(whole[:end])
        assert go() == found
        assert path.read_bytes() == whole


def test_progress_counts_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And only those that are still to come."""
    counted: dict[int, int] = {}

    class Bar(tqdm):
        def close(self) -> None:
            counted[self.total] = self.n
            super().close()

    monkeypatch.setattr(records, "tqdm", Bar)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    job = Job("tau", tmp_path)
    for units, names in (("abc", "mn"), ("abcd", "mno"), ("abcd", "mno")):
        job.records(units, names, lambda u: u, lambda u, m: [{}] * len(u), 2)
    assert counted == {6: 6, 2 + 6: 8, 0: 0}  # c is asked again along with d


def test_table() -> None:
    rows = [{"a": 1, "b": {"value": 0.5, "low": 0.25, "high": 0.75}}, {"a": "x | y"}]
    assert table(rows, {"a": "A", "b": "B"}).splitlines()[2:] == [
        "| 1 | 0.5 (0.25 to 0.75) |",
        "| x \\| y |  |",
    ]


# --- models -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's layout with two layers and random weights."""
    folder = tmp_path_factory.mktemp("experiments") / "random"
    write_plain(folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    model = VLM(read_config(folder))
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=chance)
            p.copy_(1 + 0.1 * noise if "norm" in name else 0.1 * noise)
    write_weights(model, folder)
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return zipvl.load(folder, device="cpu")


def ids(count: int, seed: int = 0) -> Tensor:
    return torch.randint(7, 500, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "topics", {name: topics[name] for name in ("async", "types", "try")})


# --- text -------------------------------------------------------------------------------------


def test_dense_continuation_is_the_models_own_loss(engine: Engine) -> None:
    tokens = ids(40 + text.TAIL)
    got, _ = text.continuation(engine, tokens, policy("dense"))
    whole = Inputs(tokens, torch.zeros(len(tokens), dtype=torch.bool), [])
    logits = engine.logits(whole, "dense")[-text.TAIL - 1 : -1]
    assert got == pytest.approx(
        nn.functional.cross_entropy(logits, tokens[-text.TAIL :]).item(), abs=1e-5
    )


@torch.inference_mode()
def test_following_at_once_is_decoding_token_by_token(engine: Engine) -> None:
    tokens, n, sparse = ids(300, 1), 9, policy("zipvl:tau=0.8,always=last")
    model = engine.model
    prompt = Inputs(tokens[:-n], torch.zeros(300 - n, dtype=torch.bool), [])
    out = engine.prefill([prompt], sparse, 0, {})
    assert out.layers[0].attended[0] < 300 - n
    got = text.follow(engine, out.caches, tokens[-n:], 300 - n)
    steps = engine.prefill([prompt], sparse, n, {})
    want = [
        model.text.decode(model.text.embed_tokens(tokens[i : i + 1]), torch.tensor([i]), steps.caches,
                          sparse, engine.attend)
        for i in range(300 - n, 300)
    ]  # fmt: skip
    torch.testing.assert_close(got, torch.cat(want), atol=1e-5, rtol=1e-5)


def test_windows_are_apart_and_grow_with_the_samples(engine: Engine) -> None:
    few, many = text.windows(engine, 100, 3, 5), text.windows(engine, 100, 6, 5)
    assert all(torch.equal(a, b) for a, b in zip(few, many, strict=False))
    assert len({tuple(w.tolist()) for w in many}) == 6
    assert all(len(w) == 100 + text.TAIL for w in many)
    with pytest.raises(UsageError, match="lower --samples"):
        text.windows(engine, 100, 10**6, 5)


# --- probes -----------------------------------------------------------------------------------


def some_view(T: int = 90, H: int = 4, G: int = 2, D: int = 8) -> View:
    chance = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(n, T, D, generator=chance) for n in (H, G, G))
    place = torch.arange(T)
    return View(
        1, 3, k, place, place % 3 > 0, Notes(T), lambda rows: q, lambda: v,
        lambda rows: probe_mass(q.transpose(0, 1)[rows], k.transpose(0, 1), rows),
        lambda rows: logit_blocks(q.transpose(0, 1)[rows], k.transpose(0, 1), rows),
    )  # fmt: skip


def test_mass_of_all_rows_is_the_heads_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    view = some_view()
    scores = torch.einsum("htd,hsd->hts", view.q, view.k.repeat_interleave(2, 0)) / 8**0.5
    hidden = torch.ones(90, 90, dtype=torch.bool).triu(1)
    want = scores.masked_fill(hidden, -torch.inf).softmax(-1).mean(0).sum(0)
    for block in (1, 4 * 90 * 17, 10**6):  # one row, 17 rows, all rows at a time
        monkeypatch.setattr(probe_study, "BLOCK", block)
        torch.testing.assert_close(probe_study.all_rows(view), want)


def test_all_rows_find_themselves() -> None:
    all_rows = {
        "all": ZipVL(0.9, recent=90, random=0, always="none"),
        "few": ZipVL(0.9, recent=4, random=4, always="none"),
    }
    watch = probe_study.Study(0.9, all_rows)
    assert watch.plan(some_view()).attend is None
    found = watch.record()
    assert found["all"]["recall"] == 1
    assert found["all"]["error"] == 0
    assert found["few"]["recall"] < 1


# --- ideas and MLPs ---------------------------------------------------------------------------


IDEAS = [c for c in vars(ideas).values() if isinstance(c, type) and c.__module__ == ideas.__name__]


@pytest.mark.slow
@pytest.mark.parametrize("idea", IDEAS, ids=lambda c: c.__name__)
def test_ideas_keep_the_contract(idea: type[Policy]) -> None:
    assert type(policy(f"ideas.py:{idea.__name__}")).__name__ == idea.__name__
    options = {"ratios": "0.5/0.4/0.6"} if idea is ideas.Profile else {}
    check_policy(idea, **options)


def test_profile_keeps_each_layers_share() -> None:
    toy = Toy.build(4, 2)
    tokens, visual = toy.prompt(300, "all")
    visual[-5:] = False
    plans = toy.run(policy("ideas.py:Profile:ratios=0.3/0.5/1.0"), [(tokens, visual)]).seen.plans
    assert [p.attend is None or len(p.attend) for p in plans[:3]] == [90, 150, True]
    same = toy.run(policy("fixed:ratio=0.3"), [(tokens, visual)]).seen.plans[0]
    assert torch.equal(plans[0].attend, same.attend)


def test_rivals_have_the_mean_ratio() -> None:
    found = [{"method": "a", "ratios": [0.2, 0.4]}, {"method": "a", "ratios": [0.4, 0.8]}]
    assert fixed.rivals(found, "a") == ("fixed:ratio=0.450", "ideas.py:Profile:ratios=0.300/0.600")


def test_each_length_has_its_own_rivals(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two lengths together give what each gives alone, and the shares of both sides are equal."""
    monkeypatch.setattr(clips, "ANSWER", 1)
    monkeypatch.setattr(fixed, "TAUS", (0.6,))
    rows = []
    for frames in ((2, 20), (2,), (20,)):
        job = Job("fixed", tmp_path / str(len(rows)), str(folder), 1, frames=frames, device="cpu")
        fixed.run(job)
        rows += json.loads((job.out / "result.json").read_text())["rows"]
    assert rows[:2] == rows[2:]
    assert rows[1]["fixed_kept"] == pytest.approx(rows[1]["adaptive_kept"], abs=0.01)
    assert rows[0]["fixed_kept"] != pytest.approx(rows[1]["fixed_kept"], abs=0.01)


def test_halving_by_hand() -> None:
    """Of four questions dense answers all, zipvl two, zipvl+ three: half the loss."""
    right = {"dense": (1, 1, 1, 1), "zipvl:tau=0.9": (0, 0, 1, 1), "zipvl+:tau=0.9": (1, 0, 1, 1),
             "zipvl:tau=0.5": (0, 0, 0, 0), "zipvl+:tau=0.5": (0, 0, 0, 0)}  # fmt: skip
    found = [{"frames": 16, "unit": str(i), "method": m, "ok": bool(ok)}
             for m, some in right.items() for i, ok in enumerate(some)]  # fmt: skip
    half, none, useful, *whole = stays.halving(found)
    assert [half["frames"], half["tau"], half["questions"]] == [16, "0.9", 4]
    assert [half[k]["value"] for k in HALVES] == [0.5, 0.25, 0.25, 0]
    assert [none[k]["value"] for k in HALVES] == [1, 1, 0, 0.5]
    assert [useful[k] for k in HALVES] == [half[k] for k in HALVES]
    assert whole == [row | {"frames": "all"} for row in (half, none, useful)]


HALVES = ("paper", "plus", "saved", "over_half")


# --- tokens that leave by a curve, summaries ---------------------------------------------------


@pytest.mark.parametrize("rule", controls.RULES)
def test_a_schedule_keeps_the_contract_and_its_curve(rule: str) -> None:
    check_policy(controls.Schedule, {"kept": "1"}, kept="1/0.5/0.2", by=rule)
    toy = Toy.build(4, 2)
    method = controls.Schedule(kept="0.9/0.5/0.2", by=rule, always="last", after=1)
    got = toy.run(method, [toy.prompt(100, "all")])
    assert [len(plan.stream) for plan in got.seen.plans] == [90, 50, 20]
    assert got.prefilled == [[90], [50], [20]]
    if rule == "last":  # those that the last token looks at most
        seen = toy.run(
            controls.Schedule(kept="0.9/0.5/0.2", always="last"), [toy.prompt(100, "all")]
        )
        assert torch.equal(seen.seen.plans[0].stream, got.seen.plans[0].stream)  # before `after`
        assert not torch.equal(seen.seen.plans[1].stream, got.seen.plans[1].stream)


def test_a_replayed_curve_costs_what_the_method_costs() -> None:
    """zipvl-stream's own counts, replayed by mass: the same tokens."""
    toy = Toy.build(4, 2)
    ours = policy("zipvl-stream:tau=0.3,recent=8,random=8")
    got = toy.run(ours, [toy.prompt(150)])
    curve = [len(plan.stream) / 150 for plan in got.seen.plans]
    [*_, again, _, _] = [policy(m) for m in methods.controls(curve, 3)]
    assert again.by == "mass"
    again.recent = again.random = 8
    same = toy.run(again, [toy.prompt(150)])
    for one, other in zip(got.seen.plans, same.seen.plans, strict=True):
        assert torch.equal(one.stream, other.stream)


@torch.inference_mode()
def test_tokens_that_are_gone_are_zipvl_stream(engine: Engine) -> None:
    """The reference that carries all tokens along, on a window with a question and without."""
    [one] = stale.losses(engine, ids(400 + text.TAIL, 7), "zipvl-stream:tau=0.3,recent=9,random=9")
    assert one["gone"] == pytest.approx(one["ours"], abs=1e-4)
    assert 0.5 < one["left"] < 0.9
    assert len({round(one[fate], 4) for fate in stale.FATES}) == len(stale.FATES)


def test_names_of_curves_are_short() -> None:
    long = methods.controls([1.0, 0.9, 0.8, 0.7, 0.6, 0.5], 6)
    assert methods.label(long[0]) == "zipvl-stream's curve, by=random"
    assert methods.family({"method": long[-1]}) == "zipvl-stream's curve, by=random,after=4"
    pyramid = "controls.py:Schedule:kept=1/0.5/0.25/0.125,by=last"
    assert methods.family({"method": pyramid}) == "PyramidDrop's schedule"
    assert methods.family({"method": "snapkv:budget=9,summary=8"}) == "snapkv, summaries"


def test_bytes_that_eviction_alone_needs_by_hand() -> None:
    """Half way, in log KL, between two budgets."""
    rows = [{"method": f"snapkv:budget={n}", "cache": n / 10, "kl": {"value": kl}}
            for n, kl in ((1, 0.4), (3, 0.1), (5, 0.001))]  # fmt: skip
    merged = {"method": "snapkv:budget=1,summary=8", "cache": 0.15, "kl": {"value": 0.2}}
    assert summary.evicting(merged, [*rows, merged]) == pytest.approx(0.2)
    assert summary.evicting(merged | {"kl": {"value": 0.5}}, rows) is None
    assert summary.evicting(rows[0], rows) is None


@torch.inference_mode()
def test_what_follows_a_prompt_sees_summaries(engine: Engine) -> None:
    """All at once what decoding does token by token."""
    tokens, n = ids(120, 5), 6
    prompt = Inputs(tokens[:-n], torch.zeros(120 - n, dtype=torch.bool), [])
    method = policy("snapkv:budget=20,window=4,summary=5")
    out = engine.prefill([prompt], method, 0, {})
    got = text.follow(engine, out.caches, tokens[-n:], 120 - n)
    caches = engine.prefill([prompt], method, n, {}).caches
    for i, token in enumerate(tokens[-n:]):
        x = engine.model.text.embed_tokens(token[None])
        at = torch.tensor([120 - n + i])
        want = engine.model.text.decode(x, at, caches, method, engine.attend)
        torch.testing.assert_close(got[i : i + 1], want, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_text_prompt_has_a_film_and_a_question(engine: Engine) -> None:
    """The film's tokens may leave, the question's stay; dense does not care."""
    tokens = ids(40 + text.TAIL, 6)
    loss = text.continuation(engine, tokens, policy("dense"))[0]
    assert text.continuation(engine, tokens, policy("dense"), 10)[0] == pytest.approx(loss)
    _, out = text.continuation(engine, tokens, policy("zipvl-stream:tau=0.001"), 10)
    assert out.caches[-1].places(0)[-10:, 0].tolist() == list(range(30, 40))
    assert len(out.caches[-1].places(0)) < 20


# --- the commands -----------------------------------------------------------------------------

FEW = {  # instead of the experiment's own methods
    "fill": "zipvl:tau=0.9,zipvl+:tau=0.9,ideas.py:HeadMax:tau=0.9",
    "methods": "zipvl:tau=0.9,zipvl+:tau=0.9,kv_bits=4,examples/tova.py:TOVA:budget=8",
    "rivals": "controls.py:RandomCache:ratio=0.5,hired:ratio=0.5,elastic:ratio=0.5,text=true,tidal",
    "text_rivals": "controls.py:RandomCache:ratio=0.5,sgl:ratio=0.5,h2o:heavy=4,recent=4,tidal:budget=9",
    "stale": "zipvl-stream:tau=0.5",
    "turns": "zipvl-stream:tau=0.9",
    "text_tau": "zipvl:always=last,tau=0.8,zipvl+:always=last,tau=0.8",
    "text_methods": "zipvl:tau=0.975,zipvl-stream,controls.py:Schedule:kept=1/0.8/0.6/0.5/0.5,by=last",
    "summary": "snapkv:budget=4,window=2,snapkv:budget=8,window=2,snapkv:budget=4,window=2,summary=3",
    "text_summary": "h2o:heavy=8,recent=8,h2o:heavy=2,recent=2,h2o:heavy=2,recent=2,summary=4",
}


def test_every_method_of_the_side_by_side_exists() -> None:
    named = [policy(m) for m in (*methods.METHODS, *methods.EXAMPLES, *stays.FILL_METHODS)]
    for m in (*methods.TEXT_METHODS, *methods.controls([1.0, 0.5, 0.3], 3),
              *summary.methods(summary.BUDGETS, 8)):  # fmt: skip
        policy(m)
    for tokens in (265, 512, 4106):
        named += [policy(m) for m in rivals.methods(tokens)]
    names = {type(p).__name__ for p in named} | {"AttnPredReimpl"}  # needs a file of weights
    assert {kind.__name__ for kind in METHODS.values()} <= names


OFTEN = {"tau", "methods", "rivals", "text_rivals", "summary", "turns", "niah", "across"}


@pytest.mark.parametrize(
    "name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in EXPERIMENTS]
)
def test_commands_run(
    name: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """And, of each kind of data, the same seed gives the same JSON."""
    monkeypatch.setattr(clips, "ANSWER", 3 if name == "summary" else 1)
    monkeypatch.setattr(rivals, "ANSWER", 6)
    monkeypatch.setattr(rivals, "QUESTION", 8)
    args = [
        name,
        "-m",
        str(folder),
        "--samples",
        "2",
        "--frames",
        "2,3",
        "--tokens",
        "40",
        "--device",
        "cpu",
    ]
    if name in FEW:
        args += ["--method", FEW[name]]
    results = []
    for run in ("a", "b") if name in ("layers", "text_tau") else ("a",):
        assert main([*args, "--out", str(tmp_path / run)]) == 0, capsys.readouterr().err
        results.append((tmp_path / run / "result.json").read_bytes())
        assert (tmp_path / run / "figure.png").read_bytes()[1:4] == b"PNG"
    assert results[0] == results[-1]
    result = json.loads(results[0])
    assert result["rows"]
    assert result["settings"]["experiment"] == name
    assert (tmp_path / "a" / "table.md").read_text() in capsys.readouterr().out
    where = json.loads((tmp_path / "a" / "run.json").read_text())
    assert {"finished", "processor", "session_seconds"} <= where.keys()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["tau", "--frames", "0"], "--frames: '0'"),
        (["tau", "--samples", "0"], "--samples: '0'"),
        (["tau", "--seed", "-1"], "--seed: '-1': give a whole number from 0 on"),
        (["tau", "--method", "zipvl:tua=1"], "no option 'tua'"),
        (["text_tau", "--tokens", "4,x"], "--tokens: '4,x'"),
    ],
)
def test_mistakes_are_one_sentence(
    args: list[str], said: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(args) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_nothing_that_varies_has_no_correlation_in_the_title() -> None:
    constant = stats.spearman([1, 2, 3], [5, 5, 5])
    assert stays.correlation_title(constant, 3) == ""
    assert "nan" not in stays.correlation_title(constant | {"value": 1.0}, 3)
    some = {"value": 0.5, "low": 0.25, "high": 0.75}
    assert stays.correlation_title(some, 6) == "rank correlation 0.50 (0.25 to 0.75), 6 kinds"


@pytest.mark.parametrize("frames", [(3,), (3, 4), (3, 4, 5)])
def test_tau_draws_no_table_twice(
    frames: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the legends lie above the axes, on no line."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_: drawn.append(self))
    share = {"value": 0.5, "low": 0.4, "high": 0.6}
    table = [{"frames": n, "method": f"zipvl:tau={t}", "kind": "what", "accuracy": share,
              "visual": t, "work": t, "samples": 4} for n in frames for t in (0.5, 1.0)]  # fmt: skip
    swept = {n: [r for r in table if r["frames"] == n] for n in frames}
    tau.figure(Job("tau", tmp_path, frames=frames), swept, table)
    above, below = drawn[0].axes[:2], drawn[0].axes[2:]
    titles = [a.get_title() for a in below if a.get_visible()]
    assert len(set(titles)) == len(titles) == min(2, len(frames))
    drawn[0].canvas.draw()
    for axes in above:
        box = axes.get_legend().get_window_extent()
        assert box.y0 >= axes.get_window_extent().y1 - 1
