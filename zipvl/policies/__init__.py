"""The methods by name, and what a text names: `zipvl:tau=0.96`, `my.py:Class:ratio=0.3`."""

import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..policy import Policy, sound
from .anchor_like import AnchorLike
from .attnpred import AttnPredLast
from .attnpred_cnn import AttnPredReimpl
from .elastic import Elastic
from .fastv import FastV
from .flexprefill_ref import FlexPrefillRef
from .h2o import H2O
from .hired import HiRED
from .keyformer import Keyformer
from .kivi import KIVI
from .lookm import LookM
from .minference_ref import MInferenceRef
from .prefixkv import PrefixKV
from .pyramiddrop import PyramidDrop
from .scope import SCOPE
from .sgl import SGL
from .snapkv import SnapKV
from .sparsevlm import SparseVLM
from .stream import ZipVLStream
from .streaming import StreamingLLM
from .think import ThinK
from .tidal import TidalDecode
from .vidcom2_like import VidCom2Like
from .visionzip_like import VisionZipLike
from .vlcache import VLCache
from .zipcache import ZipCache
from .zipvl import Fixed, Random, ZipVL, ZipVLPlus, ZipVLQuant


class Dense(Policy):
    """Every token attends and stays: the baseline."""


METHODS: dict[str, type[Policy]] = {
    "dense": Dense,
    "zipvl": ZipVL,
    "zipvl+": ZipVLPlus,
    "zipvl-stream": ZipVLStream,
    "zipvl-quant": ZipVLQuant,
    "fixed": Fixed,
    "random": Random,
    # before layer 0
    "hired": HiRED,
    "visionzip_like": VisionZipLike,
    "vidcom2_like": VidCom2Like,
    # behind some layer
    "fastv": FastV,
    "pyramiddrop": PyramidDrop,
    "sparsevlm": SparseVLM,
    "sgl": SGL,
    # the pairs of a prefill
    "minference_ref": MInferenceRef,
    "flexprefill_ref": FlexPrefillRef,
    "anchor_like": AnchorLike,
    # what a cache keeps
    "streaming": StreamingLLM,
    "h2o": H2O,
    "snapkv": SnapKV,
    "keyformer": Keyformer,
    "prefixkv": PrefixKV,
    "elastic": Elastic,
    "vlcache": VLCache,
    "lookm": LookM,
    "scope": SCOPE,
    # in fewer bits or channels
    "zipcache": ZipCache,
    "kivi": KIVI,
    "think": ThinK,
    # what a step reads
    "tidal": TidalDecode,
    "attnpred_last": AttnPredLast,
    "attnpred_reimpl": AttnPredReimpl,
}
FLAGS = {"ratio": " (--keep-ratio)", "kv_bits": " (--kv-bits)", "random": " (--probe)"}
SWITCHES = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
MAX_WHOLE = 2**53  # of an option: seeds are multiplied, and generators take 64 bits


def load_policy(method: str | Policy | type[Policy], **options: Any) -> Policy:
    """`zipvl`, `zipvl:tau=0.96,recent=32`, `my.py:Class`, `my.py:Class:tau=0.9`, a class, a Policy.

    `options` override what the text says; those that are None count as not given.
    Raises UsageError that lists the valid names or options.
    """
    chosen = {k: v for k, v in options.items() if v is not None}
    if isinstance(method, Policy):
        if chosen:
            raise UsageError(f"{method} is made: give it {', '.join(chosen)} where you make it")
        return sound(method)
    head, cls, tail = find(method)
    given = dict(parse(item, head) for item in tail.split(",") if item) | chosen
    valid = inspect.signature(cls).parameters
    if unknown := given.keys() - valid.keys():
        option = min(unknown)
        listed = ", ".join(f"{p.name}={p.default}" for p in valid.values()) or "none"
        takers = [m for m, kind in METHODS.items() if option in inspect.signature(kind).parameters]
        others = f"; {', '.join(takers)} have it" if takers else ""
        named = f"{option!r}{FLAGS.get(option, '')}"  # and what the command calls it
        raise UsageError(f"method {head!r} has no option {named}: it takes {listed}{others}")
    try:
        policy = cls(**{name: fit(value, valid[name]) for name, value in given.items()})
    except (TypeError, ValueError) as e:
        raise UsageError(f"method {head!r}: {e}") from None
    except Exception as e:  # a user's own class fails as it likes
        raise UsageError(f"method {head!r} fails when it is made ({type(e).__name__}: {e})") from e
    return sound(policy)


def find(method: str | type[Policy]) -> tuple[str, type[Policy], str]:
    """The name, the class and the options of what load_policy was given. Raises UsageError."""
    if isinstance(method, type) and issubclass(method, Policy):
        return method.__name__, method, ""
    if not isinstance(method, str):
        raise UsageError(f"method is {method!r:.200}: give a name, a Policy or a class of one")
    head, _, tail = method.partition(":")
    if head.endswith(".py"):
        name, _, tail = tail.partition(":")
        return f"{head}:{name}", from_file(Path(head), name), tail
    if head not in METHODS:
        raise UsageError(
            f"unknown method {head!r}: use one of {', '.join(METHODS)}, or my_file.py:Class"
        )
    return head, METHODS[head], tail


def parse(item: str, method: str) -> tuple[str, Any]:
    """`option=value` of the text `method` as a name and a number or text. Raises UsageError."""
    key, equals, value = item.partition("=")
    if not equals:
        hint = "; write two bit widths as 4/2" if item.strip().isdecimal() else ""
        raise UsageError(f"method {method!r}: {item!r} is not of the form option=value{hint}")
    for kind in (int, float):
        try:
            return key.strip(), kind(value)
        except ValueError:
            pass
    return key.strip(), value.strip()


def fit(value: Any, option: inspect.Parameter) -> Any:
    """`value` if it is of the kind of the option's default; a whole number also fits a float, and
    a switch is a word, as the text "False" would count as true. Raises ValueError."""
    name, default = option.name, option.default
    if isinstance(default, bool) or option.annotation in (bool, "bool"):
        if (word := str(value).lower()) not in SWITCHES:
            raise ValueError(f"{name} is {value!r}: give true or false")
        return SWITCHES[word]
    if isinstance(value, int) and abs(value) >= MAX_WHOLE:
        raise ValueError(f"{name} is {value!s:.40}: give a number below 2^53")
    wanted = {int: "a whole number", float: "a number", str: "a name"}.get(type(default))
    if wanted is None or isinstance(value, type(default)):
        return value
    if isinstance(default, float) and isinstance(value, int):
        return float(value)
    raise ValueError(f"{name} is {value!r}: give {wanted}, such as {default}")


def from_file(path: Path, name: str) -> type[Policy]:
    """The method `name` of a user's own file. Raises UsageError."""
    if not path.is_file():
        raise UsageError(
            f"method file {path} does not exist: check the path before the first colon"
        )
    spec = importlib.util.spec_from_file_location(f"zipvl_method_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:  # the user's own file: any mistake in it ends up here
        why = f"{type(e).__name__}: {e}"
        raise UsageError(f"method file {path} cannot be imported ({why}): correct it") from None
    classes = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Policy)]
    found = {c.__name__: c for c in classes if c.__module__ == module.__name__}
    if name not in found:
        known = f"it has {', '.join(found)}" if found else "it has no Policy class"
        if not isinstance(vars(module).get(name, Policy), type):
            known = f"its {name} is {vars(module)[name]!r:.100}, no class made from zipvl.Policy"
        raise UsageError(
            f"method file {path} has no method {name!r}: {known}; write {path}:ClassName"
        )
    return found[name]
