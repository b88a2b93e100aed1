"""A checkpoint's folder from what the user wrote: a local path first, else a hub id."""

import re
from pathlib import Path

from ..errors import ModelError

WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt"]


def resolve(model: str | Path) -> Path:
    """The local folder of `model`; "owner/name" is fetched from the hub if it is no path."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
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
