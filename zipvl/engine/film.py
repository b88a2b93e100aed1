"""A session in a file, FILE.zipvl: what the caches hold of system prompt and media.

It is a safetensors file: tensors `ids` and `visual` [n], `layers.N.*` as each cache saves itself,
`notes.*` as far as a method left some, `media.N.*` of the frames; and a JSON text, `about`, of all
that is no tensor, the hash of the checkpoint among it, with a hash of all of it. That tells damage;
it is no signature. Pixels and features are not in it: who opens one cannot prefill again.
"""

import copy
import hashlib
import inspect
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..config import check_file
from ..errors import ModelError, UsageError, ZipvlError, memory_errors
from ..model.cache import Cache, restore_as
from ..model.layouts import CANVAS_CROPS
from ..model.weights import fingerprint, open_safetensors
from ..policies import METHODS, load_policy
from ..policy import Notes, Policy
from ..vision.family import Geometry, Media
from ..vision.source import MAX_SIDE
from ..vision.video import MAX_FRAMES, Clip
from .inputs import Inputs, Shown
from .run import ROOM, Runtime
from .stats import LayerStats

VERSION = 2
CLIP = ("fps", "duration", "span", "total", "decoder", "warning")  # of a Clip, beside its frames


@dataclass
class Held:
    """What caches hold: the beginning of a prompt."""

    ids: Tensor  # [n]
    read: int  # of these, so many are the system prompt and the media
    caches: list[Cache]
    notes: Notes
    layers: list[LayerStats]  # of the prefill that made them

    def common(self, ids: Tensor) -> int:
        """How many tokens it has in common with the beginning of a prompt, but for its last one."""
        n = min(len(self.ids), len(ids) - 1)
        differ = (self.ids[:n] != ids[:n]).nonzero()
        return int(differ[0]) if len(differ) else n

    def cut(self, n: int) -> bool:
        """Leaves the first n tokens, and nothing of what a broken step left, if caches can do so;
        else they are of no use any more."""
        self.ids = self.ids[:n]
        return all(cache.cut(self.notes.at(n)) for cache in self.caches)

    def copy(self) -> "Held":
        notes = copy.copy(self.notes)
        notes.update(copy.deepcopy(dict(notes)))
        return replace(self, caches=[cache.copy() for cache in self.caches], notes=notes)


@dataclass
class Film:
    """What a session has read, and how."""

    inputs: Inputs  # a prompt with the media
    policy: Policy
    reuse: str
    system: str | None
    held: Held


def save(engine: Runtime, film: Film, path: str | os.PathLike) -> None:
    """Writes what was read; the talk is not in it. Raises UsageError, ZipvlError."""
    target, held, n = checked(path), film.held, film.held.read
    tensors: dict[str, Tensor] = {"ids": held.ids[:n], "visual": film.inputs.is_visual[:n]}
    for i, cache in enumerate(held.caches):
        if (parts := cache.saved(held.notes.at(n))) is None:
            raise UsageError(
                f"what {film.policy} holds cannot be parted from the first question: make the "
                "session with reuse media to save it"
            )
        tensors |= {f"layers.{i}.{name}": t for name, t in parts.items()}
    notes = held.notes
    about = {
        "version": VERSION,
        "model": identity(engine),
        "dtype": str(engine.model.dtype),
        "method": named(film.policy),
        "policy": repr(film.policy),
        "reuse": film.reuse,
        "system": film.system,
        "layers": [asdict(layer) for layer in held.layers],
        "prompt": [notes.prompt, notes.new, notes.ahead],
        "notes": plain([*notes.items()], "notes", tensors),
        "entered": plain(notes.entered, "entered", tensors),
        "media": [described(m, f"media.{i}", tensors) for i, m in enumerate(film.inputs.media)],
    }
    tensors = apart({name: t.cpu() for name, t in tensors.items()})
    text = json.dumps(about, sort_keys=True)
    header = {"about": text, "sha256": digest(text, tensors)}
    place = Path(os.path.realpath(target))  # a link stays one
    fresh = place.with_name(f".zipvl-session-{os.getpid()}")
    try:
        save_file(tensors, fresh, header)
        os.replace(fresh, place)  # a film that was there stays until the new one is whole
    except (OSError, SafetensorError) as e:
        raise ZipvlError(f"{path} cannot be written: {getattr(e, 'strerror', None) or e}") from None
    finally:
        fresh.unlink(missing_ok=True)


def load(engine: Runtime, path: str | os.PathLike, method: str | Policy | None = None) -> Film:
    """What save() wrote. Raises ModelError, UsageError."""
    path = Path(path)
    if not os.path.exists(path):
        raise ModelError(f"{path} does not exist: name a file that a session was saved to")
    check_file(path)
    with open_safetensors(path) as file:
        header = file.metadata() or {}
        about = agreed(engine, path, header)
        policy = chosen(path, about, method)
        with memory_errors(torch.device("cpu"), f"reading {path}", "save it with fewer --frames"):
            names = file.keys()  # no dict: it has to be asked
            tensors = {name: file.get_tensor(name).clone() for name in names}
    if header.get("sha256") != digest(header["about"], tensors):
        raise ModelError(f"{path} is damaged, or was changed: save it again")
    try:
        return rebuilt(engine, about, tensors, policy)
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as e:
        raise ModelError(f"{path} is no session that zipvl wrote ({e!s:.200})") from None


def checked(path: str | os.PathLike) -> Path:
    """Where a film goes: only a film is ever replaced."""
    target = Path(path)
    odd = os.path.exists(target) and not os.path.isfile(target)
    if odd or target.suffix != ".zipvl" or not os.access(target.parent, os.W_OK):
        raise UsageError(
            f"{target} cannot be written: name a .zipvl file in a folder you may write to"
        )
    return target


def agreed(engine: Runtime, path: Path, header: dict[str, str]) -> dict[str, Any]:
    """`about`, if it is of this version, and of this model in this dtype."""
    try:
        about = json.loads(header["about"])
        version, model, dtype = (about[key] for key in ("version", "model", "dtype"))
    except (LookupError, TypeError, ValueError, RecursionError):
        raise ModelError(f"{path} is no session that zipvl wrote") from None
    if version != VERSION:
        raise ModelError(
            f"{path} is a session of version {version!s:.20}, and this zipvl reads {VERSION}: save "
            "it again"
        )
    if model != identity(engine):
        raise ModelError(f"{path} was saved with another model: open it with that one")
    if dtype != str(engine.model.dtype):
        name = str(dtype).removeprefix("torch.")
        raise ModelError(f"{path} was saved in {name:.20}: load the model with that --dtype")
    return about


def rebuilt(engine: Runtime, about: dict[str, Any], tensors: dict[str, Tensor],
            policy: Policy) -> Film:  # fmt: skip
    """What is in a file whose hash is right."""
    device, config = engine.model.device, engine.config.text
    ids, visual = tensors["ids"], tensors["visual"]
    if ids.dtype != torch.int64 or visual.dtype != torch.bool or not ids.shape == visual.shape:
        raise ValueError("its tokens are none")
    media = [medium(one, f"media.{i}", tensors) for i, one in enumerate(about["media"])]
    if any(engine.model.vision.count(m.geometry) != m.tokens for m in media):
        raise ValueError("its media have other tokens")
    inputs = Inputs(ids, visual, media, reported=True)
    prompt, new, ahead = about["prompt"]
    notes = Notes(prompt, new)
    notes.ahead = int(ahead)
    notes.entered = unplain(about["entered"], tensors, device)
    notes.update(unplain(about["notes"], tensors, device))
    notes.origin = Shown(inputs, engine.model)
    caches = []
    for i in range(config.num_layers):
        prefix = f"layers.{i}."
        parts = {
            name.removeprefix(prefix): t if name.endswith(("merged", "size")) else t.to(device)
            for name, t in tensors.items()
            if name.startswith(prefix)
        }
        cache = restore_as(policy.storage, ROOM)(parts)
        k, v, spans = cache.read()  # of the right shape, or no session
        [at] = spans.slices()
        right = [at.stop - at.start, config.num_kv_heads, config.head_dim]
        places = cache.places(0)
        inside = bool(((places >= 0) & (places < len(ids))).all())
        if list(k[at].shape) != right or list(v[at].shape) != right or not inside:
            raise ValueError(f"layer {i} does not fit the model")
        caches.append(cache)
    layers = [LayerStats(**layer) for layer in about["layers"]]
    held = Held(ids, len(ids), caches, notes, layers)
    return Film(inputs, policy, about["reuse"], about["system"], held)


def identity(engine: Runtime) -> str:
    if engine.source is None:
        raise UsageError("sessions are saved and opened with an engine that load() made")
    return fingerprint(engine.source, engine.config)


def digest(text: str, tensors: dict[str, Tensor]) -> str:
    """sha256 of `about` and of all tensors: names, kinds, shapes, numbers."""
    found = hashlib.sha256(text.encode())
    for name, t in sorted(tensors.items()):
        found.update(f"{name} {t.dtype} {list(t.shape)}".encode())
        found.update(t.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous ones, each in memory of its own: the format wants that."""
    homes = Counter(t.untyped_storage().data_ptr() for t in tensors.values())
    shared = {home for home, count in homes.items() if count > 1}
    return {
        name: t.clone() if t.untyped_storage().data_ptr() in shared else t.contiguous()
        for name, t in tensors.items()
    }


# --- what is no tensor ----------------------------------------------------------------------------


def named(policy: Policy) -> dict[str, Any] | None:
    """The name and options of a built-in method; None for others, and where an option is a path."""
    names = {kind: name for name, kind in METHODS.items()}
    takes = inspect.signature(type(policy)).parameters
    if type(policy) not in names or not all(hasattr(policy, option) for option in takes):
        return None
    given = {option: getattr(policy, option) for option in takes}
    if any(isinstance(x, str) and not re.fullmatch(r"\w*|\d[\d./:]*", x) for x in given.values()):
        return None
    return {"name": names[type(policy)], "options": given}


def chosen(path: Path, about: dict[str, Any], method: str | Policy | None) -> Policy:
    """The method of a file: a built-in one it names, or the caller's, which must be the same."""
    known = about.get("method")
    try:
        if method is None and known is not None:
            given = known["options"].items()  # JSON has no tuples
            options = {name: tuple(x) if isinstance(x, list) else x for name, x in given}
            policy = load_policy(METHODS[known["name"]], **options)
        elif method is not None:
            policy = load_policy(method)
        else:
            raise UsageError(f"{path} was saved with a method of your own: name it, too")
    except (LookupError, TypeError, AttributeError):
        raise ModelError(f"{path} is no session that zipvl wrote") from None
    if repr(policy) != about.get("policy"):
        raise UsageError(f"{path} was saved with {about.get('policy')!s:.200}, not with {policy}")
    return policy


def described(m: Media, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A medium without its pixels; the hash is of what the model saw of it."""
    seen = m.sha256 if m.features is None else digest(m.kind, {"": m.features.cpu()})
    about = {"kind": m.kind, "tokens": m.tokens, "sha256": seen, "geometry": asdict(m.geometry)}
    if m.clip is None:
        return about
    tensors[f"{name}.indices"] = torch.tensor(m.clip.indices, dtype=torch.long)
    tensors[f"{name}.times"] = torch.tensor(m.clip.times, dtype=torch.double)
    return about | {"clip": {key: getattr(m.clip, key) for key in CLIP}}


def medium(about: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> Media:
    none, clip = np.empty((0, 0, 0, 3), np.uint8), None
    if "clip" in about:
        numbers = tensors[f"{name}.indices"].flatten()
        times = tensors[f"{name}.times"].view(len(numbers))  # as many, or no session
        clip = Clip(none, tuple(numbers.tolist()), tuple(times.tolist()), **about["clip"])
    crops = torch.from_numpy(none)
    geometry = Geometry(**about["geometry"])
    sizes = (geometry.height, geometry.width, geometry.rows * geometry.cols, geometry.frames)
    limits = (MAX_SIDE, MAX_SIDE, CANVAS_CROPS, MAX_FRAMES)
    if not all(type(n) is int and 0 <= n <= most for n, most in zip(sizes, limits, strict=True)):
        raise ValueError(f"no medium has {sizes}")  # its tokens will be counted
    return Media(about["kind"], crops, geometry, about["tokens"], clip, sha256=about["sha256"])


def plain(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """What a method remembers, as JSON; tensors are put aside under `name`."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        key = f"{name}.{sum(other.startswith(name) for other in tensors)}"
        tensors[key] = value
        return {"tensor": key}
    if isinstance(value, tuple | list):
        return {type(value).__name__: [plain(x, name, tensors) for x in value]}
    if isinstance(value, dict):
        return {"dict": [plain(pair, name, tensors) for pair in value.items()]}
    raise UsageError(f"the method remembers a {type(value).__name__}, which no session file holds")


def unplain(value: Any, tensors: dict[str, Tensor], device: torch.device) -> Any:
    if not isinstance(value, dict):
        return value
    [(kind, inside)] = value.items()
    if kind == "tensor":
        return tensors[inside].to(device)
    parts: Iterator[Any] = (unplain(x, tensors, device) for x in inside)
    return {"tuple": tuple, "list": list, "dict": dict}[kind](parts)
