"""From a checkpoint's name to an Engine: device, dtype, weights, tokenizer, attention backend."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..errors import ModelError, UsageError, memory_errors
from ..model.backends import pick
from ..model.chat import Chat
from ..model.layouts import read_config
from ..model.weights import Progress, find_checkpoint, load_weights, silent
from .engine import Engine
from .inputs import HELD, Inputs
from .run import Runtime, Step
from .speed import GraphStep, check_kind, fuse, pack_weights

DEMO = Path(__file__).parent.parent / "demo"


def load(
    model: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    attn: str = "auto",
    template: str | None = None,
    show_progress: bool | Progress = False,
    weights: str = "full",
    kernels: str = "auto",
) -> Engine:
    """An Engine with the checkpoint `model` (folder or hub id; None: the bundled demo model).

    `dtype` auto is bfloat16 on CUDA, float16 before Ampere, bfloat16 on CPUs with matrix units for
    it, else float32. `attn` forces an attention backend, `template` a prompt template (a built-in
    name or a .jinja file).
    `show_progress`: bars on stderr, or what shows progress instead (Engine).
    `weights` packed lays them out for a CPU's products; int8 or int4 adds copies for decoding.
    `kernels` plain leaves out what auto takes on CUDA: fused kernels and a graph for decoding.
    Raises ModelError, UsageError.
    """
    folder = find_checkpoint(DEMO / "model" if model is None else model)
    config = read_config(folder)
    place = pick_device(device)
    kind = pick_dtype(dtype, place)
    if kernels not in ("auto", "plain"):
        raise UsageError(f"unknown kernels {kernels!r}: use auto or plain")
    if weights != "full":
        check_kind(weights, place, kind)
    backend, attend = pick(str(attn), place, kind, config.text.head_dim)
    chat = Chat.from_folder(folder, config, template)
    progress = show_progress if callable(show_progress) else bar if show_progress else silent
    with memory_errors(place, "loading the weights", "give a smaller --dtype or another --device"):
        vlm = load_weights(config, folder, place, kind, progress)
        if weights != "full":
            pack_weights(vlm, weights)
    fast = place.type == "cuda" and kernels == "auto"
    if fast:
        with suppress(ImportError):  # no Triton: as plain
            fuse(vlm.text)
    if chat.vocab_size > config.text.vocab_size:
        raise ModelError(
            f"{folder}: the tokenizer has {chat.vocab_size} entries, the embedding only "
            f"{config.text.vocab_size}: tokenizer and weights belong to different models"
        )
    name = str(kind).removeprefix("torch.")
    beside = {"device": str(place), "dtype": name, "show_progress": progress, "kernels": kernels}
    guides = Guides(str(model or "demo"), beside)
    return Engine(vlm, chat, backend, attend, progress, GraphStep if fast else Step, guides, folder)


@dataclass
class Guides:
    """Models in which the scout of a method answers first (policy.py), each loaded once."""

    model: str  # what the engine itself was loaded from
    options: dict[str, Any]  # and how
    loaded: dict[str, Runtime] = field(default_factory=dict)

    def __call__(self, guide: str, first: Runtime, inputs: list[Inputs]
                 ) -> tuple[Runtime, list[Inputs]]:  # fmt: skip
        """The guide's engine, and the inputs of `first` with media that it has not encoded. Raises
        UsageError where it would see other tokens, or no pixels."""
        fresh = {id(m): replace(m, features=None) for i in inputs for m in i.media}
        if not all(len(m.crops) for m in fresh.values()):
            raise UsageError(
                f"the guide {guide} has to see the pixels itself, and a video of more than {HELD} "
                f"frames keeps none: use at most --frames {HELD}, or the method without a guide"
            )
        if guide not in self.loaded:
            with torch.inference_mode(False):
                engine = load(guide, **self.options)
            if differs := [what for what, of in ALIKE.items() if of(engine) != of(first)]:
                raise UsageError(
                    f"the guide {guide} and the model {self.model} differ in {differs[0]}: a guide "
                    "needs the same tokens of text and media, use a smaller model of the family"
                )
            self.loaded[guide] = engine
        asked = [replace(i, media=[fresh[id(m)] for m in i.media]) for i in inputs]
        return self.loaded[guide], asked


ALIKE: dict[str, Callable[[Runtime], Any]] = {  # what makes tokens of a prompt and its media
    "vocabulary": lambda engine: engine.chat.tokenizer.get_vocab(),
    "size, cut and tokens of pictures": lambda engine: engine.model.vision.cuts,
}


@contextmanager
def bar(label: str, total: int) -> Iterator[Callable[[int], object]]:
    """A bar on stderr, where there is more than one step."""
    with tqdm(
        total=total, desc=f"{label:<13}", leave=False, dynamic_ncols=True, disable=total < 2
    ) as shown:
        yield shown.update


def pick_device(device: str) -> torch.device:
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as e:
        why = str(e).splitlines()[0].partition(". ")[0]
        raise UsageError(f"device {device!r} cannot be used: {why:.100}") from None


def has_matrix_units() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AMX); elsewhere it is emulated."""
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(probe and probe())


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            return torch.float16  # bfloat16 would be emulated
        half = device.type == "cuda" or (device.type == "cpu" and has_matrix_units())
        return torch.bfloat16 if half else torch.float32
    names = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    names |= {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if not isinstance(dtype, str) or dtype not in names:
        raise UsageError(f"unknown dtype {dtype!r}: use auto, {', '.join(names)}")
    return names[dtype]


def demo_clip() -> Path:
    """The bundled clip that the demo model knows to answer about."""
    return DEMO / "clip.mp4"
