"""Weights from safetensors files into a model, each tensor read once, straight to its place.

Checkpoints spell the same tensor in five ways (old and new transformers, transformers 5 without
`vision_model.`, the original code, a tower's own repository); one small table makes them one:

    vision.*  projector.{0,2}.*  image_newline  text.{embed_tokens,layers.N,norm}.*  lm_head.weight
"""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..errors import ModelError
from .shards import read_tensors
from .vlm import VLM

SPELLINGS: list[tuple[str, str]] = [  # tried in order: tower names hold `layers.N` too
    (r"(?:.*\.)?vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?(.+)", r"vision.\1"),
    (r"(?:.*\.)?mm_projector\.(weight|bias)", r"projector.0.\1"),
    (r"(?:.*\.)?mm_projector\.(.+)", r"projector.\1"),
    (r"(?:.*\.)?multi_modal_projector\.linear_1\.(.+)", r"projector.0.\1"),
    (r"(?:.*\.)?multi_modal_projector\.linear_2\.(.+)", r"projector.2.\1"),
    (r"(?:.*\.)?image_newline", r"image_newline"),
    (r"(?:.*\.)?lm_head\.weight", r"lm_head.weight"),
    (r"(?:.*\.)?(embed_tokens\.weight|layers\.\d+\..+|norm\.weight)", r"text.\1"),
]
TOWER_SPELLINGS = [(r"(?:vision_model\.)?(.+)", r"vision.\1")]
# Saved by some versions, used by none: old buffers, the tower's last norm and its pooling head.
UNUSED = r".*(rotary_emb\.inv_freq|embeddings\.position_ids)|vision\.(post_layernorm|head)\..*"


def load_weights(
    config: ModelConfig, folder: Path, device: torch.device, dtype: torch.dtype
) -> VLM:
    """The model of `config` with the weights of `folder` on `device` in `dtype`.

    Peak memory is the model plus one tensor. Raises ModelError that lists missing, unexpected and
    mis-shaped names.
    """
    with torch.device("meta"):
        model = VLM(config)
    missing = {name: p.shape for name, p in model.named_parameters()}
    unexpected: list[str] = []
    misshaped: list[str] = []
    for name, tensor in read_tensors(folder, SPELLINGS):
        if name == "lm_head.weight" and config.text.tied:
            continue
        if name not in missing:
            if not ignorable(name, config):
                unexpected.append(name)
        elif tensor.shape != missing[name]:
            misshaped.append(
                f"{name} is {list(tensor.shape)}, config says {list(missing.pop(name))}"
            )
        else:
            place(model, name, tensor, device, dtype)
            missing.pop(name)
    fill_tower(model, missing, misshaped, config, folder, device, dtype)
    if "lm_head.weight" in missing and "text.embed_tokens.weight" not in missing:
        missing.pop("lm_head.weight")  # no head in the files means a tied one, whatever config says
        model.lm_head.weight = model.text.embed_tokens.weight
    report(folder, sorted(missing), unexpected, misshaped)
    return model.eval().requires_grad_(False)


def ignorable(name: str, config: ModelConfig) -> bool:
    """Tensors that a checkpoint may hold and the model does not use."""
    block = re.match(r"vision\.encoder\.layers\.(\d+)\.", name)
    if block and int(block[1]) >= max(config.vision.take):
        return True
    return name == "image_newline" or re.fullmatch(UNUSED, name) is not None


def place(model: VLM, name: str, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> None:
    """Makes `tensor` the parameter `name`, in memory of its own (not the file's)."""
    path, _, leaf = name.rpartition(".")
    own = torch.empty(tensor.shape, dtype=dtype, device=device)
    parameter = nn.Parameter(own.copy_(tensor), requires_grad=False)
    setattr(model.get_submodule(path), leaf, parameter)
    if name == "text.embed_tokens.weight" and model.config.text.tied:
        model.lm_head.weight = parameter


def fill_tower(model: VLM, missing: dict, misshaped: list[str], config: ModelConfig, folder: Path,
               device: torch.device, dtype: torch.dtype) -> None:  # fmt: skip
    """Reads what the checkpoint lacks of the tower from the folder that the config names."""
    wanted = [name for name in missing if name.startswith("vision.")]
    if not wanted or config.tower is None:
        return
    for name, tensor in read_tensors(tower_folder(config.tower, folder), TOWER_SPELLINGS):
        if name not in wanted or name not in missing:
            continue
        if tensor.shape != missing[name]:
            misshaped.append(f"{name} is {list(tensor.shape)}, config says {list(missing[name])}")
        else:
            place(model, name, tensor, device, dtype)
        missing.pop(name)


def tower_folder(tower: str, folder: Path) -> Path:
    if Path(tower).is_dir():
        return Path(tower)
    from .hub import fetch  # a hub id, when the hub can be reached or has it cached

    try:
        return fetch(tower)
    except ModelError as e:
        raise ModelError(
            f"{folder} holds no vision tower and names {tower!r} for it: {e}; or put that folder "
            "inside the checkpoint and write its name into config.json as mm_vision_tower"
        ) from None


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
