"""From a checkpoint's name to its folder, its safetensors files, and each tensor in its place.

Each tensor is read once, straight to where it stays. Checkpoints spell the same tensor in five ways
(old and new transformers, transformers 5 without `vision_model.`, the original code, a tower's own
repository); one small table makes them one:

    vision.*  text.{embed_tokens,layers.N,norm}.*  lm_head.weight
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..config import JSON_BYTES, ModelConfig, check_file, read_bytes, read_json, shown
from ..errors import ModelError, UsageError
from ..vision.family import Family
from .vlm import FAMILIES, VLM

WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt"]  # of a hub repository
SPELLINGS: list[tuple[str, str]] = [  # behind the family's: tower names hold `layers.N` too
    (r"(?:.*\.)?lm_head\.weight", r"lm_head.weight"),
    (r"(?:.*\.)?(embed_tokens\.weight|layers\.\d+\..+|norm\.weight)", r"text.\1"),
]
TOWER_SPELLINGS = [(r"(?:vision_model\.)?(.+)", r"vision.tower.\1")]
SAMPLE = 1024  # numbers of each tensor in a fingerprint
HEADER_BYTES, TENSORS = 2**22, 2**16  # of one safetensors file; in a whole checkpoint
NUMBERS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
           torch.float8_e5m2)  # fmt: skip
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]  # label, total
UNUSED = r".*rotary_emb\.inv_freq"  # saved by some versions, used by none


def find_checkpoint(model: str | Path) -> Path:
    """The local folder of `model`; "owner/name" is fetched from the hub if it is no path."""
    if not isinstance(model, str | os.PathLike):
        raise UsageError(f"model is a {type(model).__name__}: give a folder or a hub id")
    path = Path(model).expanduser()
    if os.path.isdir(path):
        return path
    if os.path.exists(path):
        raise ModelError(f"{path} is a file: give the checkpoint's folder")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):
        return fetch(str(model))
    raise ModelError(f"model {str(model)!r} is neither a folder nor a hub id like owner/name")


def fetch(repo: str) -> Path:
    """Folder of a hub repository's safetensors and text files, from the cache or the network."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ModelError(
            f"{repo} is no local folder, and fetching it needs the huggingface_hub package"
        ) from None
    try:
        return Path(snapshot_download(repo, allow_patterns=WANTED))
    except Exception as e:  # the library raises its own, requests' and urllib's errors
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise ModelError(
            f"{repo} is no local folder and cannot be fetched from the hub: {reason}"
        ) from None


def silent(label: str, total: int) -> AbstractContextManager[Callable[[int], object]]:
    """Progress that nobody sees."""
    return nullcontext(int)


def load_weights(
    config: ModelConfig,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress = silent,
) -> VLM:
    """The model of `config` with the weights of `folder` on `device` in `dtype`.

    What the files lack of the tower comes from the folder that the config names for it. Peak memory
    is the model plus one tensor. `progress` counts tensors. Raises ModelError that lists missing,
    unexpected and mis-shaped names.
    """
    with torch.device("meta"):
        try:
            model = VLM(config)
        except ModelError as e:  # which knows the value, but not whose it is
            raise ModelError(f"{folder / 'config.json'}: {e}") from None
    missing = {name: p.shape for name, p in model.named_parameters()}
    misshaped: list[str] = []

    def fill(source: Path, spellings: list[tuple[str, str]]) -> list[str]:
        """Puts what is missing and `source` holds in its place; the names of all the rest."""
        rest = []
        for name, tensor in read_tensors(source, spellings):
            shape = missing.pop(name, None)
            if shape is None:
                rest.append(name)
            elif tensor.dtype not in NUMBERS:
                kind = str(tensor.dtype).removeprefix("torch.")
                raise ModelError(
                    f"{source} holds {name} as {kind}: quantised checkpoints are not supported, "
                    "get one in bfloat16, float16 or float32"
                )
            elif tensor.shape == shape:
                place(model, name, tensor, device, dtype)
                step(1)
            else:
                misshaped.append(f"{name} is {list(tensor.shape)}, config says {list(shape)}")
        return rest

    with progress("load weights", len(missing)) as step:
        names = fill(folder, names_of(model.vision))
        unexpected = [name for name in names if not ignorable(name, model)]
        if config.tower is not None and any(name.startswith("vision.tower.") for name in missing):
            fill(tower_folder(config.tower, folder), TOWER_SPELLINGS)
    tied = config.text.tied or "lm_head.weight" in missing  # no head in the files means a tied one
    if tied and "text.embed_tokens.weight" not in missing:
        missing.pop("lm_head.weight", None)
        model.lm_head.weight = model.text.embed_tokens.weight
    report(folder, sorted(missing), unexpected, misshaped)
    return model.eval().requires_grad_(False)


def fingerprint(folder: Path, config: ModelConfig) -> str:
    """sha256 of a checkpoint's config.json and, of each tensor, of its name, form and some numbers
    from its middle: quick, and different for any two models that were trained apart."""
    found = hashlib.sha256(read_bytes(folder / "config.json", JSON_BYTES))
    places = [(folder, names_of(FAMILIES[type(config.vision)]))]
    if config.tower is not None:
        places.append((tower_folder(config.tower, folder), TOWER_SPELLINGS))
    for place, spellings in places:
        for name, tensor in read_tensors(place, spellings):
            flat = tensor.flatten()
            some = flat[len(flat) // 2 :][:SAMPLE]
            found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            found.update(some.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def names_of(family: Family | type[Family]) -> list[tuple[str, str]]:
    """The spellings of a whole checkpoint."""
    return family.spellings + SPELLINGS


def ignorable(name: str, model: VLM) -> bool:
    """Tensors that a checkpoint may hold and the model does not use."""
    if name == "lm_head.weight" and model.config.text.tied:
        return True
    return re.fullmatch(UNUSED, name) is not None or model.vision.unused(name)


def place(model: VLM, name: str, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> None:
    """Makes `tensor` the parameter `name`, in memory of its own (not the file's)."""
    path, _, leaf = name.rpartition(".")
    own = torch.empty(tensor.shape, dtype=dtype, device=device)
    parameter = nn.Parameter(own.copy_(tensor), requires_grad=False)
    setattr(model.get_submodule(path), leaf, parameter)


def report(folder: Path, missing: list[str], unexpected: list[str], misshaped: list[str]) -> None:
    """Raises one ModelError that names up to ten tensors of each kind of fault."""
    faults = {"missing": missing, "unexpected": unexpected, "wrong shape": misshaped}
    listed = [
        f"{kind} ({len(names)}): {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"
        for kind, names in faults.items()
        if names
    ]
    if listed:
        raise ModelError(f"the weights in {folder} do not fit its config.json: {'; '.join(listed)}")


def tower_folder(tower: str, folder: Path) -> Path:
    if os.path.isdir(tower):
        return Path(tower)
    try:
        return fetch(tower)  # a hub id, when the hub can be reached or has it cached
    except ModelError as e:
        raise ModelError(
            f"{folder} holds no vision tower and names {tower!r} for it: {e}; or put that folder "
            "inside the checkpoint and write its name into config.json as mm_vision_tower"
        ) from None


def read_tensors(folder: Path, spellings: list[tuple[str, str]]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder's safetensors files as (canonical name, tensor), one at a time.

    A tensor is a view of the mapped file: copy it before asking for the next.
    """
    seen: dict[str, str] = {}
    for path in weight_files(folder):
        with open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no dict
                known = canonical(name, spellings)
                if len(seen) == TENSORS:
                    raise ModelError(f"{folder} holds more than {TENSORS:,} tensors: no such model")
                if known in seen:
                    raise ModelError(f"{path} holds {name} a second time (first in {seen[known]})")
                seen[known] = path.name
                yield known, file.get_tensor(name)


def canonical(name: str, spellings: list[tuple[str, str]]) -> str:
    """The one name that this package uses for the tensor a file calls `name`."""
    for pattern, replacement in spellings:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return name


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, else all there are."""
    index = folder / "model.safetensors.index.json"
    if os.path.exists(index):
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
    check_file(path)
    with path.open("rb") as file:
        start = file.read(64)
    if HEADER_BYTES < int.from_bytes(start[:8], "little") < path.stat().st_size:
        raise ModelError(f"{path} has a header of over {HEADER_BYTES:,} bytes: no such model")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except OSError as e:
        raise ModelError(f"{path} cannot be read: {e.strerror or e}") from None
    except SafetensorError as e:
        if start.startswith(b"version https://git-lfs"):
            hint = "it is a git-lfs pointer, not the weights: run `git lfs pull` in that folder"
        elif not start:
            hint = "it is empty: download it again"
        elif start.lstrip()[:1] == b"<":
            hint = "it is an HTML page, not the weights: download it again"
        else:
            hint = f"{e}: download it again"
        raise ModelError(f"{path} is not a readable safetensors file: {hint}") from None
