"""Sessions in files: the same answers, the size that was said, and every wrong file refused."""

import json
import os
import random
import resource
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from methods.untrained import NEEDS
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from test_session import FEW, FIRST, LAST, LIST, clip, engine, session

import zipvl
from zipvl.engine import film
from zipvl.engine.engine import Engine
from zipvl.errors import ModelError, UsageError, ZipvlError
from zipvl.policies import METHODS, load_policy
from zipvl.policy import Policy

__all__ = ["clip", "engine"]  # fixtures


@pytest.mark.parametrize("method", [m if m in FEW else pytest.param(m, marks=pytest.mark.slow)
                         for m in METHODS if m != "sgl"] + ["zipvl:kv_bits=4/2",
                         "zipvl:summary=8", "kivi:residual=8,group=4"])  # fmt: skip
def test_answers_are_the_same(
    engine: Engine, clip: zipvl.Inputs, method: str, tmp_path: Path
) -> None:
    """Saved in the middle of a talk, which goes on; opened, it is the session before any."""
    one, path = session(engine, clip, method), tmp_path / "a.zipvl"
    first = one.ask(LIST, max_new_tokens=8)
    one.save(path)
    options = NEEDS.get(method)
    two = engine.open_session(path, load_policy(method, **options) if options else None)
    assert two.talk == []
    again = two.ask(LIST, max_new_tokens=8)
    assert again.tokens == first.tokens
    assert again.stats.reused == one.inputs.is_visual.nonzero()[-1] + 1
    assert two.ask(LAST, max_new_tokens=8).tokens == one.ask(LAST, max_new_tokens=8).tokens
    assert again.stats.frames == first.stats.frames
    assert again.stats.ratio == first.stats.ratio
    two.save(tmp_path / "b.zipvl")
    three = engine.open_session(tmp_path / "b.zipvl", two.policy)
    assert three.ask(LIST, max_new_tokens=8).tokens == first.tokens


@pytest.mark.parametrize("method", ["dense", "zipvl", "zipvl-stream"])
def test_its_size_is_what_statistics_say(
    engine: Engine, clip: zipvl.Inputs, method: str, tmp_path: Path
) -> None:
    """Keys and values of what is kept; beside them a position each, and some kilobytes of text."""
    one, path, config = session(engine, clip, method), tmp_path / "a.zipvl", engine.config.text
    one.save(path)
    stats = one.ask(LIST, max_new_tokens=2).stats
    rows, asked = stats.layers, stats.prompt_tokens - stats.reused
    kept = sum(row["cached"] - asked for row in rows)
    held = kept * config.kv_width // config.num_layers * 4  # without room for new tokens
    assert held < path.stat().st_size < held + 4 * kept + 15000
    assert sum(row["kv_bytes"] for row in rows) > held


def test_bits_are_saved_as_bits(engine: Engine, clip: zipvl.Inputs, tmp_path: Path) -> None:
    sizes = []
    for method in ("dense", "zipvl:tau=1,kv_bits=4", "zipvl:tau=1,kv_bits=2"):
        session(engine, clip, method).save(path := tmp_path / "a.zipvl")
        sizes.append(path.stat().st_size - 15000)
    assert sizes[1] < 0.3 * sizes[0] > sizes[2] > 0


def test_the_first_question_may_have_chosen(
    engine: Engine, clip: zipvl.Inputs, tmp_path: Path
) -> None:
    one = session(engine, clip, "zipvl-stream:tau=0.9", "first")
    with pytest.raises(UsageError, match="ask a question first"):
        one.save(tmp_path / "a.zipvl")
    first = one.ask(LIST, max_new_tokens=8)
    one.save(tmp_path / "a.zipvl")
    two = engine.open_session(tmp_path / "a.zipvl")
    assert two.ask(LIST, max_new_tokens=8).tokens == first.tokens
    one.rewind()
    assert two.reuse == "first"
    two.rewind()
    assert two.ask(FIRST, max_new_tokens=8).tokens == one.ask(FIRST, max_new_tokens=8).tokens


@pytest.mark.parametrize("method", ["zipvl:kv_bits=4", "h2o"])
def test_what_cannot_be_parted_is_not_saved(
    engine: Engine, clip: zipvl.Inputs, method: str, tmp_path: Path
) -> None:
    one = session(engine, clip, method, "first")
    one.ask(LIST, max_new_tokens=4)
    with pytest.raises(UsageError, match="reuse media"):
        one.save(tmp_path / "a.zipvl")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="nothing is held"):
        session(engine, clip, method, "none").save(tmp_path / "a.zipvl")


def test_pictures_and_systems_and_nothing_asked(engine: Engine, tmp_path: Path) -> None:
    pictures = [Image.fromarray(np.full((90, 120, 3), shade, np.uint8)) for shade in (40, 200)]
    one = engine.session(pictures, system="Be brief.", method="zipvl", reuse="media")
    one.save(tmp_path / "a.zipvl")
    two = engine.open_session(tmp_path / "a.zipvl")
    assert two.system == "Be brief."
    assert two.ask(FIRST, max_new_tokens=6).tokens == one.ask(FIRST, max_new_tokens=6).tokens
    assert [m.kind for m in two.inputs.media] == ["image", "image"]


def test_media_amid_words_are_not_saved(engine: Engine, clip: zipvl.Inputs, tmp_path: Path) -> None:
    one = session(engine, clip)
    one.ask("What comes first in <video>?", max_new_tokens=2)
    with pytest.raises(UsageError, match="put them first"):
        one.save(tmp_path / "a.zipvl")


def test_without_pixels_nothing_is_read_again(
    engine: Engine, clip: zipvl.Inputs, tmp_path: Path
) -> None:
    one, path = session(engine, clip), tmp_path / "a.zipvl"
    one.save(path)
    two = engine.open_session(path)
    want = two.ask(LIST, max_new_tokens=8)
    with pytest.raises(UsageError, match="holds no pixels"):
        two.ask("What comes first in <video>?")
    two.rewind()
    assert two.ask(LIST, max_new_tokens=8).tokens == want.tokens


class Mine(Policy):
    """A method of somebody's own, which remembers what no file holds."""

    def plan(self, view: zipvl.View) -> zipvl.Plan:
        view.notes["what"] = {(1, "a"): [view.layer, None, 0.5, True], 2: view.positions[:3]}
        return zipvl.Plan()


class Odd(Mine):
    def plan(self, view: zipvl.View) -> zipvl.Plan:
        view.notes["what"] = lambda: 0
        return zipvl.Plan()


def test_methods_of_ones_own_are_named_again(
    engine: Engine, clip: zipvl.Inputs, tmp_path: Path
) -> None:
    path = tmp_path / "a.zipvl"
    one = zipvl.engine.session.Session(engine, clip, Mine(), "media")
    one.save(path)
    with pytest.raises(UsageError, match="method of your own"):
        engine.open_session(path)
    with pytest.raises(UsageError, match=r"saved with Mine\(\), not with Dense"):
        engine.open_session(path, "dense")
    notes = engine.open_session(path, Mine()).held.notes
    assert notes["what"][(1, "a")] == [engine.config.text.num_layers - 1, None, 0.5, True]
    assert notes["what"][2].tolist() == [0, 1, 2]
    odd = zipvl.engine.session.Session(engine, clip, Odd(), "media")
    with pytest.raises(UsageError, match="remembers a function"):
        odd.save(tmp_path / "b.zipvl")
    guided = load_policy("sgl", guide="../x")
    assert film.named(guided) is None  # a path is not taken from a file


# --- files that are none ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(engine: Engine, clip: zipvl.Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("film") / "a.zipvl"
    session(engine, clip, "zipvl:kv_bits=4").save(path)
    return path


def test_every_changed_byte_is_told(engine: Engine, saved: Path, tmp_path: Path) -> None:
    """Bytes anywhere, the header's too; and a file cut anywhere."""
    whole, chance, path = saved.read_bytes(), random.Random(3), tmp_path / "b.zipvl"
    header = int.from_bytes(whole[:8], "little")
    places = [chance.randrange(header) for _ in range(60)]
    places += [chance.randrange(len(whole)) for _ in range(40)]
    for at in places:
        data = bytearray(whole)
        data[at] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        with pytest.raises(ZipvlError) as told:
            engine.open_session(path)
        assert str(path) in str(told.value)
    for at in [0, 7, 8, header // 2, header + 8, len(whole) - 1, *places[:10]]:
        path.write_bytes(whole[:at])
        with pytest.raises(ModelError):
            engine.open_session(path)


def altered(saved: Path, path: Path, tensors: dict | None = None, **changes: object) -> None:
    """The same file with another `about`, and a hash that fits: somebody meant it."""
    with safe_open(saved, "pt") as file:
        about = json.loads(file.metadata()["about"]) | changes
        found = {name: file.get_tensor(name) for name in file.keys()} | (tensors or {})  # noqa: SIM118 - safe_open is no dict
    text = json.dumps(about)
    save_file(found, path, {"about": text, "sha256": film.digest(text, found)})


def test_sizes_that_nothing_has_are_never_counted(
    engine: Engine, saved: Path, tmp_path: Path
) -> None:
    """Their tokens would fill the memory."""
    with safe_open(saved, "pt") as file:
        about = json.loads(file.metadata()["about"])
    for change in (
        {"rows": 10**5, "cols": 10**5},
        {"frames": 10**9},
        {"height": "9"},
        {"width": -1},
    ):
        media = [m | {"geometry": m["geometry"] | change} for m in about["media"]]
        altered(saved, tmp_path / "changed.zipvl", media=media)
        with pytest.raises(ModelError, match="no session that zipvl wrote"):
            engine.open_session(tmp_path / "changed.zipvl")


@pytest.mark.parametrize("changes", [
    {"version": 1}, {"version": None}, {"model": "x"}, {"dtype": "torch.bfloat16"}, {"dtype": 3},
    {"method": None}, {"method": {"name": "dense", "options": {}}}, {"policy": "x"}, {"media": None},
    {"method": {"name": "my.py:Class", "options": {}}}, {"method": {"name": "zipvl", "options": 3}},
    {"method": {"name": "zipvl", "options": {"x": 1}}}, {"method": []},
    {"media": [{"kind": "x"}]}, {"layers": [{}]}, {"layers": 3}, {"prompt": 5}, {"notes": {"x": 1}},
    {"entered": {"tensor": "gone"}}, {"reuse": "all"}, {"media": []},
    {"media": [{"kind": "video", "tokens": 3, "sha256": ""}]}, {"system": "Another one."},
    {"system": 5},
])  # fmt: skip
def test_what_somebody_wrote_is_checked(
    engine: Engine, saved: Path, tmp_path: Path, changes: dict
) -> None:
    path = tmp_path / "b.zipvl"
    altered(saved, path, **changes)
    with pytest.raises(ZipvlError):
        engine.open_session(path)


@pytest.mark.parametrize("tensors", [
    {"ids": torch.zeros(3)}, {"ids": torch.zeros(2, 2).long()}, {"visual": torch.zeros(3).bool()},
    {"layers.0.positions": torch.full((5,), -3, dtype=torch.int32)},
    {"layers.0.keys.0.size": torch.tensor([3, 16])},
    {"layers.0.keys.0.codes": torch.zeros(3, dtype=torch.uint8)},
    {"layers.2.values.tail": torch.zeros(0, 1, 2)}, {"layers.2.values.tail": torch.zeros(0, 2**30, 2**30)},
    {"media.0.times": torch.zeros(2, 2)},
])  # fmt: skip
def test_what_tensors_hold_is_checked(
    engine: Engine, saved: Path, tmp_path: Path, tensors: dict
) -> None:
    path = tmp_path / "b.zipvl"
    altered(saved, path, tensors)
    with pytest.raises(ZipvlError):
        engine.open_session(path).ask(LIST, max_new_tokens=2)


def test_another_model_is_refused(saved: Path, tmp_path: Path) -> None:
    """Of the same shapes; and its own weights in another dtype, or under another template."""
    tiny.build_hf("llava_onevision", tmp_path / "tiny")
    other = zipvl.load(tmp_path / "tiny", device="cpu", dtype="float32")
    with pytest.raises(ModelError, match="another model"):
        other.open_session(saved)
    half = zipvl.load(device="cpu", dtype="bfloat16")
    with pytest.raises(ModelError, match="--dtype"):
        half.open_session(saved)
    template = zipvl.load(device="cpu", dtype="float32", template="vicuna")
    with pytest.raises(ModelError, match="another prompt template"):
        template.open_session(saved)


def test_a_weight_that_changed_is_another_model(tmp_path: Path) -> None:
    """One number of one tensor in the middle: what training does to all of them."""
    folder = tmp_path / "tiny"
    tiny.build_hf("llava", folder)
    before = film.identity(zipvl.load(folder, device="cpu"))
    [file] = folder.glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - safe_open is no dict
    name = next(name for name in tensors if "v_proj" in name)
    flat = tensors[name].flatten()
    flat[len(flat) // 2] += 1
    save_file(tensors, file, {"format": "pt"})
    assert film.identity(zipvl.load(folder, device="cpu")) != before


def test_where_no_film_goes(engine: Engine, clip: zipvl.Inputs, tmp_path: Path) -> None:
    one = session(engine, clip)
    (tmp_path / "b.zipvl").mkdir()
    for name in ("a.txt", "b.zipvl", "gone/a.zipvl"):
        with pytest.raises(UsageError, match=r"name a \.zipvl file"):
            one.save(tmp_path / name)
    for name in ("b.zipvl", "gone.zipvl"):
        with pytest.raises(ModelError):
            engine.open_session(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.zipvl")
    with pytest.raises(ModelError, match="pipe"):
        engine.open_session(tmp_path / "pipe.zipvl")


def test_a_film_that_is_there_survives(
    engine: Engine, clip: zipvl.Inputs, saved: Path, tmp_path: Path
) -> None:
    """Where the disk ends, in the middle of a file."""
    path = tmp_path / "a.zipvl"
    path.write_bytes(saved.read_bytes())

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(ZipvlError, match="too large"):
            session(engine, clip).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == saved.read_bytes()
    assert list(tmp_path.iterdir()) == [path]


def test_an_engine_of_parts_has_no_name(engine: Engine, clip: zipvl.Inputs, tmp_path: Path) -> None:
    bare = Engine(engine.model, engine.chat, engine.backend, engine.attend)
    with pytest.raises(UsageError, match=r"load\(\) made"):
        session(bare, clip).save(tmp_path / "a.zipvl")
