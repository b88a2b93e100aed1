"""Settings and fixtures of the whole suite: tiny checkpoints, each built once, when first asked for."""

import gc
import os
import signal
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ["OMP_NUM_THREADS"] = "1"  # one thread a test process, and its children

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

gc.disable()  # until all is collected: importing makes millions of objects that stay
sys.dont_write_bytecode = False  # else every process compiles the package anew
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_configure() -> None:
    """A shell's background job ignores Ctrl-C, and so would the commands that tests interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # no later collection looks at modules and tests again
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _float32() -> Iterator[None]:
    """Parity is proven in float32, also on CPUs where `--dtype auto` means bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zipvl.engine.load.has_matrix_units", lambda: False)
        yield


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """oracle("llava_next") -> the Oracle of that tiny checkpoint; its `folder` holds the files.

    Names: tiny.FAMILIES (Hugging Face layout) and tiny_original.ORIGINALS. Treat the folders as
    read-only: every test of the run shares them.
    """

    @cache
    def build(kind: str) -> object:
        import oracles  # here, so that a run without these tests needs no transformers
        import tiny
        import tiny_original

        folder: Path = tmp_path_factory.mktemp("tiny") / kind
        if kind in tiny_original.ORIGINALS:
            parts = tiny_original.build_original(kind, folder)
            return oracles.OriginalOracle(folder, parts)
        tiny.build_hf(kind, folder)
        return oracles.HFOracle(folder)

    return build
