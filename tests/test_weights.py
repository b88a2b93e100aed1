"""Loading weights: every spelling to the same tensors, bad files to one sentence, little memory."""

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from oracles import HFOracle
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import zipvl
from zipvl.errors import LONGEST, ModelError
from zipvl.model.layouts import read_config
from zipvl.model.vlm import VLM
from zipvl.model.weights import SPELLINGS, load_weights, read_tensors

CPU = torch.device("cpu")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def load(folder: Path) -> VLM:
    return load_weights(read_config(folder), folder, CPU, torch.float32)


def same(a: VLM, b: VLM) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def refused(folder: Path, *parts: str) -> str:
    """Loading raises one ModelError sentence that names the folder and holds `parts`."""
    with pytest.raises(ModelError) as e:
        load(folder)
    text = str(e.value)
    assert "\n" not in text
    for part in (str(folder), *parts):
        assert part in text, text
    return text


def edited(source: Path, target: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of the checkpoint in `source` with its tensors changed in place."""
    tiny.copy_rest(source, target)
    tensors = load_file(source / WEIGHTS)
    change(tensors)
    tiny.save({k: t.contiguous() for k, t in tensors.items()}, target / WEIGHTS)
    return target


@pytest.fixture
def sharded(oracle: Callable, tmp_path: Path) -> Path:
    tiny.shard(oracle("llava").folder, tmp_path / "sharded")
    return tmp_path / "sharded"


@pytest.mark.parametrize("spelling", tiny.SPELLINGS)
@pytest.mark.parametrize("kind", ["llava", "llava_next", "llava_onevision", "llava_onevision_tied"])
def test_every_spelling_loads_the_same(
    oracle: Callable, kind: str, spelling: str, tmp_path: Path
) -> None:
    source = oracle(kind).folder
    tiny.respell(source, tmp_path, spelling)
    names = load_file(tmp_path / WEIGHTS).keys()
    assert spelling == "bare" or names != load_file(source / WEIGHTS).keys()
    model = load(tmp_path)
    assert same(model, load(source))
    own = oracle(kind).model.state_dict()  # the values are transformers' own, not merely alike
    assert torch.equal(model.lm_head.weight, own["lm_head.weight"])
    assert torch.equal(model.text.norm.weight, own["model.language_model.norm.weight"])
    assert torch.equal(
        model.vision.projector[2].weight, own["model.multi_modal_projector.linear_2.weight"]
    )
    tower = {
        k.removeprefix("model.vision_tower."): t for k, t in own.items() if "vision_tower" in k
    }
    for name, tensor in model.vision.tower.state_dict().items():
        assert torch.equal(tensor, tower[name])


@pytest.mark.parametrize("spelling", ["old", "4.52", "new"])
def test_spellings_are_ones_that_transformers_knows(
    oracle: Callable, spelling: str, tmp_path: Path
) -> None:
    tiny.respell(oracle("llava_next").folder, tmp_path, spelling)
    image = Image.fromarray(np.full((50, 80, 3), 90, dtype=np.uint8))
    asked = "USER: <image>\nHi ASSISTANT:", [image]
    assert torch.equal(HFOracle(tmp_path).logits(*asked), oracle("llava_next").logits(*asked))


def test_shards_load_as_one_file(oracle: Callable, sharded: Path) -> None:
    assert len(list(sharded.glob("*.safetensors"))) == 3
    assert same(load(sharded), load(oracle("llava").folder))


def test_shards_of_a_hub_cache_are_links(oracle: Callable, sharded: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(sharded.iterdir())):
        path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(i))
    assert same(load(snapshot), load(oracle("llava").folder))


def test_tied_models_share_one_tensor(oracle: Callable, tmp_path: Path) -> None:
    folder = oracle("llava_onevision_tied").folder
    assert not any("lm_head" in name for name in load_file(folder / WEIGHTS))
    model = load(folder)
    assert model.lm_head.weight is model.text.embed_tokens.weight
    with_head = edited(
        folder,
        tmp_path / "head",
        lambda t: t.update({"language_model.lm_head.weight": torch.zeros(384, 64)}),
    )
    assert same(load(with_head), model)  # config says tied: a stale head in the file is not read
    untied = edited(
        oracle("llava").folder, tmp_path / "none", lambda t: t.pop("language_model.lm_head.weight")
    )
    model = load(untied)  # no head in the file: tied, whatever config says
    assert model.lm_head.weight is model.text.embed_tokens.weight


def test_dtype_is_the_one_asked_for(oracle: Callable, tmp_path: Path) -> None:
    source = oracle("llava").folder
    half = edited(source, tmp_path, lambda t: t.update({k: v.half() for k, v in t.items()}))
    assert {p.dtype for p in load(half).parameters()} == {torch.float32}
    model = load_weights(read_config(source), source, CPU, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.lm_head.weight, load(source).lm_head.weight.bfloat16())


def test_weights_outlive_their_file(oracle: Callable, tmp_path: Path) -> None:
    """Nothing of the model is a view of the mapped file."""
    folder = edited(oracle("llava").folder, tmp_path, lambda t: None)
    model = load(folder)
    with (folder / WEIGHTS).open("r+b") as file:
        file.write(b"\0" * (folder / WEIGHTS).stat().st_size)
    assert same(model, load(oracle("llava").folder))


def test_missing_unexpected_and_misshaped_are_listed_by_name(
    oracle: Callable, tmp_path: Path
) -> None:
    def change(t: dict[str, Tensor]) -> None:
        t.pop("language_model.model.layers.1.mlp.up_proj.weight")
        t.pop("vision_tower.encoder.layers.0.layer_norm1.bias")
        t["language_model.model.layers.0.mlp.experts.weight"] = torch.zeros(2)
        t["multi_modal_projector.linear_1.weight"] = torch.zeros(64, 48)

    text = refused(
        edited(oracle("llava").folder, tmp_path, change),
        "missing (2): text.layers.1.mlp.up_proj.weight, vision.tower.encoder.layers.0.layer_norm1.bias",
        "unexpected (1): text.layers.0.mlp.experts.weight",
        "wrong shape (1): vision.projector.0.weight is [64, 48], config says [64, 32]",
    )
    assert "lm_head" not in text


def test_names_in_messages_are_one_line_and_not_endless(oracle: Callable, tmp_path: Path) -> None:
    def change(t: dict[str, Tensor]) -> None:
        t["\x1b[2J\n\u202e"] = torch.zeros(2)
        t["z" * 10_000] = torch.zeros(2)

    text = refused(edited(oracle("llava").folder, tmp_path, change), "unexpected (2): ")
    assert r"\x1b[2J\n\u202e, zz" in text
    assert text.isprintable()
    assert len(text) < LONGEST + 10


def test_a_long_list_is_cut_at_ten(oracle: Callable, tmp_path: Path) -> None:
    def change(t: dict[str, Tensor]) -> None:
        for name in [n for n in t if "language_model.model.layers" in n]:
            t.pop(name)

    text = refused(edited(oracle("llava").folder, tmp_path, change), "missing (27): ", ", ...")
    assert len(re.findall(r"text\.layers\.", text)) == 10


def test_what_nobody_uses_is_ignored(oracle: Callable, tmp_path: Path) -> None:
    def change(t: dict[str, Tensor]) -> None:
        t["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        t["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
        t["vision_tower.encoder.layers.7.mlp.fc1.bias"] = torch.ones(64)  # a tower with more blocks
        t["vision_tower.head.probe"] = torch.ones(1, 1, 32)
        t["image_newline"] = torch.ones(64)  # llava-next-interleave has one it does not use

    source = oracle("llava").folder
    assert same(load(edited(source, tmp_path, change)), load(source))


def test_the_tower_of_a_second_folder(oracle: Callable, tmp_path: Path) -> None:
    """Original LLaVA-1.5: the tower's own repository fills what the checkpoint lacks, no more."""
    source = oracle("original_15")
    wanted = {
        k.removeprefix("vision_model."): v for k, v in source.parts.tower.state_dict().items()
    }
    for name, tensor in load(source.folder).vision.tower.state_dict().items():
        assert torch.equal(tensor, wanted[name])

    def tune(t: dict[str, Tensor]) -> None:  # one tensor tuned in the checkpoint itself
        t["model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias"] = torch.full((32,), 7.0)

    tuned = load(edited(source.folder, tmp_path / "tuned", tune)).vision.tower.state_dict()
    assert torch.equal(tuned.pop("pre_layrnorm.bias"), torch.full((32,), 7.0))
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in tuned.items())


def test_a_tower_that_cannot_be_had(oracle: Callable, tmp_path: Path) -> None:
    tiny.respell(oracle("original_15").folder, tmp_path / "a", "bare")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    tower = tmp_path / "a" / "tower"
    tower.mkdir()
    (tower / "config.json").write_text(json.dumps(tiny.CLIP))
    tiny.write_json(tmp_path / "a" / "config.json", config | {"mm_vision_tower": "tower"})
    refused(tmp_path / "a", "tower holds no .safetensors file")
    (tower / "pytorch_model.bin").write_bytes(b"PK")
    refused(tmp_path / "a", "pytorch_model.bin")
    tiny.save({"vision_model.pre_layrnorm.bias": torch.ones(3)}, tower / WEIGHTS)
    refused(tmp_path / "a", "wrong shape (1): vision.tower.pre_layrnorm.bias is [3]", "missing (")
    public = "openai/clip-vit-large-patch14-336"
    tiny.write_json(tmp_path / "a" / "config.json", config | {"mm_vision_tower": public})
    refused(tmp_path / "a", "holds no vision tower", public)


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4976698672\n",
            "git lfs pull",
        ),
        (b"", "is empty"),
        (b"<!DOCTYPE html><html><head><title>Not found</title></head></html>", "HTML page"),
        (b"\n <html>", "HTML page"),
        (b"\x80\x02}q\x00(X\x05\x00\x00\x00modelq\x01", "not a readable safetensors file"),
        (struct.pack("<Q", 10**9) + b"{}", "not a readable safetensors file"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "not a readable safetensors file"),
        (struct.pack("<Q", 2) + b"[]", "not a readable safetensors file"),
        (struct.pack("<Q", 2) + b"{}" + b"tail", "not a readable safetensors file"),
        (struct.pack("<Q", 2) + b"{}", "missing ("),
    ],
)
def test_files_that_are_no_weights(
    oracle: Callable, content: bytes, hint: str, tmp_path: Path
) -> None:
    tiny.copy_rest(oracle("llava").folder, tmp_path)
    (tmp_path / WEIGHTS).write_bytes(content)
    refused(tmp_path, hint)


@pytest.mark.parametrize(
    "kind",
    [torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.complex64,
     torch.float8_e8m0fnu],
)  # fmt: skip
def test_weights_that_are_no_numbers(oracle: Callable, kind: torch.dtype, tmp_path: Path) -> None:
    """Cast, they would answer nothing, in silence."""

    def change(t: dict[str, Tensor]) -> None:
        t["language_model.model.norm.weight"] = torch.ones(64).to(kind)

    name = str(kind).removeprefix("torch.")
    folder = edited(oracle("llava").folder, tmp_path, change)
    refused(folder, f"text.norm.weight as {name}: quantised checkpoints are not supported")


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_other_floats_load(oracle: Callable, kind: torch.dtype, tmp_path: Path) -> None:
    want = torch.arange(64) / 64 + 0.5

    def change(t: dict[str, Tensor]) -> None:
        t["language_model.model.norm.weight"] = want.to(kind)

    model = load(edited(oracle("llava").folder, tmp_path, change))
    assert torch.equal(model.text.norm.weight, want.to(kind).float())


def test_packed_weights_are_named_first(oracle: Callable, tmp_path: Path) -> None:
    def change(t: dict[str, Tensor]) -> None:
        name = "language_model.model.layers.0.mlp.up_proj.weight"
        t[name] = torch.zeros(t[name].numel() // 2, 1, dtype=torch.uint8)

    refused(edited(oracle("llava").folder, tmp_path, change), "quantised checkpoints")


def header_of(count: int, size: int) -> bytes:
    """A file of empty tensors with long or short names."""
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    raw = json.dumps({f"t{i:0{size}}": entry for i in range(count)}).encode()
    return struct.pack("<Q", len(raw)) + raw


def test_endless_headers(oracle: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.copy_rest(oracle("llava").folder, tmp_path)
    (tmp_path / WEIGHTS).write_bytes(header_of(50, 10**5))
    refused(tmp_path, "header of over 4,194,304 bytes")
    monkeypatch.setattr("zipvl.model.weights.TENSORS", 100)
    (tmp_path / WEIGHTS).write_bytes(header_of(60, 5))
    refused(tmp_path, "missing (")
    (tmp_path / "other.safetensors").write_bytes(header_of(60, 6))
    refused(tmp_path, "more than 100 tensors")


def test_weights_that_may_not_be_read(
    oracle: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = edited(oracle("llava").folder, tmp_path, lambda t: None)
    config = read_config(folder)
    monkeypatch.setattr("zipvl.config.os.access", lambda path, mode: False)  # root may read all
    with pytest.raises(ModelError, match=r"safetensors cannot be read: Permission denied"):
        load_weights(config, folder, CPU, torch.float32)


@pytest.mark.parametrize("name", [WEIGHTS, INDEX])
def test_plain_files_only(oracle: Callable, tmp_path: Path, name: str) -> None:
    folder = edited(oracle("llava").folder, tmp_path, lambda t: None)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refused(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    refused(folder)


def test_progress_counts_every_tensor(oracle: Callable) -> None:
    said: list[object] = []

    @contextmanager
    def progress(label: str, total: int) -> Iterator[Callable[[int], object]]:
        said.append((label, total))
        yield said.append

    source = oracle("original_15").folder  # half of it in the tower's folder
    model = load_weights(read_config(source), source, CPU, torch.float32, progress)
    count = len(list(model.parameters()))
    assert said == [("load weights", count), *[1] * count]


def test_folders_without_weights(oracle: Callable, tmp_path: Path) -> None:
    tiny.copy_rest(oracle("llava").folder, tmp_path)
    refused(tmp_path, "holds no .safetensors file")
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"PK\x03\x04")
    refused(tmp_path, "holds no .safetensors file", "pytorch_model-00001-of-00002.bin", "pickle")
    (tmp_path / WEIGHTS).mkdir()
    refused(tmp_path)


def test_a_cut_file(oracle: Callable, tmp_path: Path) -> None:
    tiny.copy_rest(oracle("llava").folder, tmp_path)
    whole = (oracle("llava").folder / WEIGHTS).read_bytes()
    for size in (7, 8, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / WEIGHTS).write_bytes(whole[:size])
        refused(tmp_path, "not a readable safetensors file", "download it again")


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/outside.safetensors", "a/../../outside.safetensors",
     "sub/model.safetensors", "..\\outside.safetensors", "C:\\outside.safetensors", "", ".", "..",
     "model.bin", "model.safetensors\n", "model.safetensors\0", None, 7, ["model.safetensors"], {},
     "x" * 300 + ".safetensors", "http://example.org/model.safetensors"],
)  # fmt: skip
def test_index_entries_must_stay_in_the_folder(sharded: Path, name: object) -> None:
    good = next(sharded.glob("*.safetensors"))
    (sharded.parent / "outside.safetensors").write_bytes(good.read_bytes())
    (sharded / "sub").mkdir()
    (sharded / "sub" / WEIGHTS).write_bytes(good.read_bytes())
    raw = json.loads((sharded / INDEX).read_text())
    raw["weight_map"][next(iter(raw["weight_map"]))] = name
    (sharded / INDEX).write_text(json.dumps(raw))
    refused(sharded, INDEX)


def test_a_shard_that_links_outside(sharded: Path) -> None:
    first = sorted(sharded.glob("*.safetensors"))[0]
    outside = sharded.parent / "outside.safetensors"
    first.rename(outside)
    first.symlink_to(outside)
    refused(sharded, "link", first.name)
    first.unlink()
    first.symlink_to(first)  # a loop
    refused(sharded, first.name)


def test_missing_shards_and_bad_indexes(sharded: Path) -> None:
    files = sorted(sharded.glob("*.safetensors"))
    files[1].unlink()
    text = refused(sharded, INDEX, files[1].name)
    assert files[0].name not in text
    for content in ("", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "<html>"):
        (sharded / INDEX).write_text(content)
        refused(sharded, INDEX)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    first, second, _ = sorted(sharded.glob("*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    tiny.save(load_file(second) | {name: tensor}, second)
    refused(sharded, second.name, first.name, "second time")


def test_the_same_tensor_under_two_spellings(oracle: Callable, tmp_path: Path) -> None:
    def change(t: dict[str, Tensor]) -> None:
        t["lm_head.weight"] = torch.zeros(448, 64)

    refused(edited(oracle("llava").folder, tmp_path, change), "lm_head.weight", "second time")


def test_nan_weights_stop_the_run_at_the_first_logits(oracle: Callable, tmp_path: Path) -> None:
    def change(t: dict[str, Tensor]) -> None:
        t["language_model.model.layers.2.mlp.down_proj.weight"][3, 5] = torch.nan

    folder = edited(oracle("llava").folder, tmp_path, change)
    engine = zipvl.load(folder, device="cpu", dtype="float32")
    for method in ("dense", "zipvl"):
        with pytest.raises(ModelError, match="first logits are NaN or infinite"):
            engine.generate("Hi", method=method, max_new_tokens=2)


def test_a_vocabulary_larger_than_the_embedding(oracle: Callable, tmp_path: Path) -> None:
    def change(t: dict[str, Tensor]) -> None:
        for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
            t[name] = t[name][:300].clone()

    folder = edited(oracle("llava").folder, tmp_path, change)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = 300
    tiny.write_json(folder / "config.json", config)
    with pytest.raises(ModelError, match="tokenizer has 417 entries, the embedding only 300"):
        zipvl.load(folder, device="cpu", dtype="float32")


ANY = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
NUMBER = st.integers(-2, 40) | st.sampled_from([2**31, 2**63, 2**64, 10**30])
DTYPES = st.sampled_from(
    ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL", "C64",
     "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "F6_E2M3", "F6_E3M2", "Q4"]
)  # fmt: skip
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": DTYPES | ANY,
        "shape": st.lists(NUMBER, max_size=3) | ANY,
        "data_offsets": st.lists(NUMBER, min_size=2, max_size=2) | ANY,
        "more": ANY,
    },
)
NAMES = st.sampled_from(["lm_head.weight", "norm.weight", "__metadata__", "", "model.norm.weight"])
HEADERS = st.dictionaries(NAMES | st.text(max_size=5), ENTRY | ANY, max_size=4).map(json.dumps)


def read_all(folder: Path) -> None:
    """Reads every tensor, or meets a ModelError that names the file; anything else is a failure."""
    try:
        for _, tensor in read_tensors(folder, SPELLINGS):
            tensor.clone()
    except ModelError as e:
        if str(folder) not in str(e):
            raise AssertionError(str(e)) from e


@settings(max_examples=150, deadline=1000, suppress_health_check=list(HealthCheck))
@given(header=HEADERS, size=NUMBER | st.none(), data=st.integers(0, 40))
@example(header="[" * 10**5, size=None, data=0)
@example(header='{"a":{"dtype":"F4","shape":[4],"data_offsets":[0,2]}}', size=None, data=2)
@example(header='{"a":{"dtype":"F8_E8M0","shape":[4],"data_offsets":[0,4]}}', size=None, data=4)
@example(header='{"a":{"dtype":"U64","shape":[1],"data_offsets":[0,8]}}', size=None, data=8)
def test_any_header_is_read_or_refused(
    tmp_path: Path, header: str, size: int | None, data: int
) -> None:
    raw = header.encode()
    length = len(raw) if size is None else size
    (tmp_path / WEIGHTS).write_bytes(struct.pack("<Q", length % 2**64) + raw + bytes(data))
    read_all(tmp_path)


@settings(max_examples=150, deadline=1000, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_damage_is_read_or_refused(
    oracle: Callable, tmp_path: Path, data: st.DataObject
) -> None:
    """Bytes of a good file's header changed, the file cut or longer."""
    raw = bytearray((oracle("llava").folder / WEIGHTS).read_bytes()[: 2**15])
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / WEIGHTS).write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    read_all(tmp_path)


MEASURE = """
import json, sys
from pathlib import Path
import torch
from zipvl.model.layouts import read_config
from zipvl.model import weights

def anonymous():
    rows = dict(line.split(":") for line in open("/proc/self/status"))
    return int(rows["RssAnon"].split()[0]) * 1024

def watched(*args):
    global peak
    place(*args)
    peak = max(peak, anonymous())

def load(folder, dtype):
    folder = Path(folder)
    return weights.load_weights(read_config(folder), folder, torch.device("cpu"), dtype)

place, weights.place, peak = weights.place, watched, 0
small, large = sys.argv[1:]
for dtype in (torch.float32, torch.bfloat16):
    load(small, dtype)  # whatever torch sets up once
    before, peak = anonymous(), 0
    model = load(large, dtype)
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    print(json.dumps([peak - before, sum(sizes), max(sizes)]))
    del model
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_loading_takes_the_model_and_one_tensor(oracle: Callable, tmp_path: Path) -> None:
    """Memory of its own (the mapped file is the page cache's), from a float32 file."""
    small = oracle("llava").folder
    tiny.copy_rest(small, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"] |= {"hidden_size": 256, "intermediate_size": 16384, "head_dim": 64}
    tiny.write_json(tmp_path / "config.json", config)
    with torch.device("meta"):
        shapes = {k: p.shape for k, p in VLM(read_config(tmp_path)).named_parameters()}
    tiny.save({old_name(k): torch.ones(s) for k, s in shapes.items()}, tmp_path / WEIGHTS)
    command = [sys.executable, "-c", MEASURE, str(small), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows[0][1] == 2 * rows[1][1] > 150e6  # the model in float32, then in bfloat16
    for peak, model, largest in rows:
        assert model * 0.9 < peak < model + largest + 8e6


def old_name(name: str) -> str:
    for ours, theirs in (("vision.tower.", "vision_tower.vision_model."), ("text.", "language_model.model."),
                         ("vision.projector.0", "multi_modal_projector.linear_1"),
                         ("vision.projector.2", "multi_modal_projector.linear_2")):  # fmt: skip
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return "language_model." + name
