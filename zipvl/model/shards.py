"""Safetensors files of a checkpoint folder: which ones, whether to trust them, their tensors."""

import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import read_json, shown
from ..errors import ModelError


def canonical(name: str, spellings: list[tuple[str, str]]) -> str:
    """The one name that this package uses for the tensor a file calls `name`."""
    for pattern, replacement in spellings:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return name


def read_tensors(folder: Path, spellings: list[tuple[str, str]]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder's safetensors files as (canonical name, tensor), one at a time.

    A tensor is a view of the mapped file: copy it before asking for the next.
    """
    seen: dict[str, str] = {}
    for path in weight_files(folder):
        with open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no dict
                known = canonical(name, spellings)
                if known in seen:
                    raise ModelError(f"{path} holds {name} a second time (first in {seen[known]})")
                seen[known] = path.name
                yield known, file.get_tensor(name)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, else all there are."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ModelError(f"{index} has no weight_map: download the file again")
        shards = sorted({inside(index, name) for name in names.values()})
        if gone := [path.name for path in shards if not path.is_file()]:
            raise ModelError(f"{index} names shards that are missing: {', '.join(gone[:10])}")
        return shards
    if files := sorted(path for path in folder.glob("*.safetensors") if path.is_file()):
        return files
    pickles = [p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt*"))]
    hint = f" (only {pickles[0]}, a pickle, which can run code)" if pickles else ""
    raise ModelError(
        f"{folder} holds no .safetensors file{hint}: get a safetensors revision of the checkpoint, "
        "or convert it on a machine you trust"
    )


def inside(index: Path, name: object) -> Path:
    """The shard `name` of an index, which must be a plain file name of the index's own folder."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,200}\.safetensors", name, re.A):
        raise ModelError(
            f"{index} names {shown(name)}, which is not a .safetensors file of its own folder"
        )
    path = index.parent / name
    home = index.parent.resolve()
    if home.parent.name == "snapshots":  # a hub cache keeps files in blobs/ and links to them
        home = home.parent.parent
    if path.exists() and not path.resolve().is_relative_to(home):
        raise ModelError(
            f"{path} is a link that leads out of the checkpoint's folder: copy the file"
        )
    return path


def open_safetensors(path: Path) -> safe_open:
    """safe_open with the usual wrong files named for what they are."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except OSError as e:
        raise ModelError(f"{path} cannot be read: {e.strerror}") from None
    except SafetensorError as e:
        with path.open("rb") as file:
            start = file.read(64)
        if start.startswith(b"version https://git-lfs"):
            hint = "it is a git-lfs pointer, not the weights: run `git lfs pull` in that folder"
        elif not start:
            hint = "it is empty: download it again"
        elif start.lstrip()[:1] == b"<":
            hint = "it is an HTML page, not the weights: download it again"
        else:
            hint = f"{e}: download it again"
        raise ModelError(f"{path} is not a readable safetensors file: {hint}") from None
