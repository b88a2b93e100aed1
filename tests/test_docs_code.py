"""Names in the documentation exist, and the steps of docs/add_a_method.md are what they say."""

import ast
import json
import re
import shutil
from contextlib import nullcontext
from dataclasses import fields
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import zipvl
from zipvl import ModelError, Plan, StepView, UsageError, View
from zipvl.config import read_json
from zipvl.engine.load import DEMO
from zipvl.model import layouts, vlm, weights
from zipvl.testing import check_policy
from zipvl.vision.family import Family

ROOT = Path(__file__).parent.parent
CLASS = re.compile(r"^class (\w+)", re.M)
ANCHOR = re.compile(r"`([\w/]+\.py):([\w.]+)`")


def names(tree: ast.AST, prefix: str = "") -> set[str]:
    """Dotted names of the functions, classes and methods in a module."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found |= {prefix + node.name} | names(node, f"{prefix}{node.name}.")
    return found


def test_every_part_of_the_interface_is_on_the_page() -> None:
    page = (ROOT / "docs/add_a_method.md").read_text()
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`\n]+)`", page))))
    parts = {f.name for f in fields(Plan)}
    for view in (View, StepView):
        parts |= {n for n in (*dir(view), *view.__dataclass_fields__) if not n.startswith("_")}
    behind = {"project_q", "project_v", "score", "blocks", "sums", "mass_known"}
    assert parts - behind <= named


def test_every_name_in_the_paper_map_exists() -> None:
    for page in ("paper_map.md", "add_a_method.md", "add_a_model.md"):
        anchors = ANCHOR.findall((ROOT / "docs" / page).read_text())
        for path, name in anchors:
            assert name in names(ast.parse((ROOT / path).read_text())), f"{page}: {path}:{name}"
    text = (ROOT / "docs/paper_map.md").read_text()
    rows = [row for row in text.splitlines() if row.startswith("| ")]
    equations = {row.split("|")[1].strip() for row in rows if row.startswith("| Eq. ")}
    assert {f"Eq. {n}" for n in ("1", "2-4", "5", "6", "7", "8", "9")} <= equations
    for row in (r for r in rows if r.count("|") == 5 and not r.startswith("| Paper")):
        assert "`zipvl/" in row.split("|")[3], row
        assert ":test_" in row.split("|")[4], row


def blocks(page: str) -> list[tuple[str, str]]:
    return re.findall(r"```(\w+)\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S)


def patched(source: str, diff: str) -> str:
    """`source` after a diff, which may show a part of it, but one that is there once."""
    lines = diff.splitlines(keepends=True)
    old, new = ("".join(x[1:] for x in lines if x[0] in kept) for kept in (" -", " +"))
    assert source.count(old) == 1, diff
    return source.replace(old, new)


def test_the_diffs_of_add_a_method_lead_to_the_examples() -> None:
    """Each version of a method is checked by the last call that the page shows, and a text behind
    it is what the contract says."""
    found = [*blocks("add_a_method.md"), ("end", "")]
    source, call, versions, faults = "", "", [], []
    for (kind, text), (after, said) in pairwise(found):
        if kind == "text":
            faults.append(" ".join(text.split()))
            continue
        if kind == "diff":
            source = patched(source, text)
        elif "class " in text:
            source, call = text, f"check_policy({re.findall(CLASS, text)[0]})"
        else:
            call = text
        versions.append(source.strip())
        if after == "python" and "class " not in said:
            continue  # this call comes first
        fault = re.escape(" ".join(said.split())) if after == "text" else None
        space: dict = {"check_policy": check_policy}
        exec(source, space)
        with pytest.raises((AssertionError, UsageError), match=fault) if fault else nullcontext():
            exec(call, space)
    assert len(faults) == 3
    for name in ("keynorm", "tova"):
        example = (ROOT / f"examples/{name}.py").read_text()
        assert example.split('"""', 2)[2].strip() in versions, name


def test_the_family_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/add_a_model.md: a checkpoint of its family loads, sees, and answers like its decoder."""
    source, lines = (text for kind, text in blocks("add_a_model.md") if kind == "python")
    (tmp_path / "plain.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(layouts, "OTHERS", dict(layouts.OTHERS))
    monkeypatch.setattr(vlm, "FAMILIES", dict(vlm.FAMILIES))
    monkeypatch.setattr(weights, "FAMILIES", vlm.FAMILIES)
    exec(lines, vars(import_module("plain")) | vars(layouts) | vars(vlm))
    # the demo's decoder, and a layer for pictures of 4 x 4 patches
    folder, raw = tmp_path / "model", read_json(DEMO / "model" / "config.json")
    shutil.copytree(DEMO / "model", folder)
    plain = {"vision_config": {"image_size": 56, "patch_size": 14}}
    kind = {"architectures": ["PlainForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(raw | plain | kind))
    tensors = load_file(folder / "model.safetensors")
    tensors = {k: t for k, t in tensors.items() if k.startswith("language_model.")}
    width = raw["text_config"]["hidden_size"]
    embed = torch.nn.Linear(3 * 14 * 14, width)
    tensors |= {f"model.patch_embed.{k}": t for k, t in embed.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")

    engine = zipvl.load(folder, device="cpu", dtype="float32")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 56, 56, 3), dtype=np.uint8)
    inputs = engine.prepare("What?", images=[Image.fromarray(pixels[0])], video=pixels, frames=3)
    assert [m.tokens for m in inputs.media] == [16, 48]
    [picture, film] = engine.encode(inputs)
    patch = torch.from_numpy(pixels[1, 14:28, 28:42]).permute(2, 0, 1).flatten() / 127.5 - 1
    torch.testing.assert_close(film[16 + 6], embed(patch).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(picture, film[:16])
    assert engine.model.vision.numbers(inputs.media[1].geometry).tolist() == [
        number for number in range(3) for _ in range(16)
    ]
    answer = engine.generate(inputs, method="zipvl", max_new_tokens=4, ignore_eos=True)
    assert len(answer.tokens) == 4
    with pytest.raises(
        UsageError, match="Plain has no tower that tells: use a method that chooses"
    ):
        engine.generate(inputs, method="hired", max_new_tokens=1)
    with pytest.raises(TypeError, match=r"abstract.* spread"):
        type("Half", (type(engine.model.vision),), {"spread": Family.spread})(None, 8)
    (folder / "config.json").write_text(
        json.dumps(raw | kind | {"vision_config": {"image_size": 57, "patch_size": 14}})
    )
    with pytest.raises(
        ModelError, match=r"config.json: image_size 57 is no multiple of patch_size"
    ):
        zipvl.load(folder, device="cpu")
