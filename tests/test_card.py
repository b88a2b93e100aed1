"""On a real card: every method, and sessions, answer as on a CPU. What test_pretend.py shows by the
pretend device's rules, CUDA shows here; media are drawn, so that no video reader is needed."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_pretend import NEWER, SETTINGS
from torch import Tensor

import zipvl
from lab.demo.backgrounds import bundled
from lab.demo.world import random_clip, render
from zipvl.engine.engine import Engine
from zipvl.model.backends import BACKENDS, usable
from zipvl.model.batch import Spans
from zipvl.model.kernels import attend_sdpa

pytestmark = pytest.mark.gpu
METHODS = [*dict.fromkeys(SETTINGS + NEWER)]
FILM = ["dense", "zipvl:tau=0.9,recent=8,random=8", "zipvl-stream:tau=0.9", "hired:ratio=0.4",
        "snapkv:budget=60,summary=8", "zipvl:tau=0.9,kv_bits=4,interval=2", "h2o:heavy=40,recent=40",
        "think:window=16", "tidal", "zipvl-quant", "fastv"]  # fmt: skip


@cache
def loaded(device: str, **options: Any) -> Engine:
    return zipvl.load(device=device, **options)


@cache
def clip(frames: int, seed: int = 3) -> np.ndarray:
    """uint8 [F, 96, 96, 3] of the demo's world."""
    drawn = random_clip(frames, np.random.default_rng(seed), len(bundled()))
    return render(drawn, 96).numpy()


def answers(engine: Engine, method: str) -> list[list[int]]:
    """Tokens of a ragged batch, and of its first prompt alone."""
    batch = [
        engine.prepare("List all objects in order.", video=clip(24), frames=None),
        engine.prepare("What do you see?", images=[Image.fromarray(clip(24)[9])]),
        engine.prepare("What comes first?", video=clip(13, 5), frames=None),
    ]
    options = {"method": method, "max_new_tokens": 6, "ignore_eos": True}
    found = [*engine.generate(batch, **options), engine.generate(batch[0], **options)]
    return [r.tokens for r in found]


@pytest.mark.parametrize("method", METHODS)
def test_float32_answers_are_the_cpu_s(method: str) -> None:
    """SDPA, fused kernels, and the graph where a method can be decoded by one."""
    want = answers(loaded("cpu", dtype="float32"), method)
    assert answers(loaded("cuda", dtype="float32"), method) == want


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_runs(method: str) -> None:
    """FlashAttention and the graph: the batch's answers are those of each prompt alone, or nearly:
    other kernels round otherwise."""
    first, *_, alone = answers(loaded("cuda"), method)
    assert first[0] == alone[0]


def talk(engine: Engine, method: str, film: Path) -> list[list[int]]:
    """Two questions, the second again after a rewind, in a fork, and in a session from a file."""
    one = engine.session(video=clip(24), frames=None, method=method, reuse="media")
    tokens = [one.ask(q, 6).tokens for q in ("What comes first?", "What comes last?")]
    one.rewind()
    tokens.append(one.fork().ask("What comes last?", 6).tokens)
    one.save(film)
    return [*tokens, engine.open_session(film).ask("What comes last?", 6).tokens]


@pytest.mark.parametrize("method", FILM)
@pytest.mark.parametrize("options", [{"dtype": "float32"}, {}, {"kernels": "plain"}])
def test_sessions(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    """In float32 the CPU's answers; in bfloat16 the same ones after a rewind, a copy and a file."""
    film = tmp_path / "a.zipvl"
    first, last, *again = got = talk(loaded("cuda", **options), method, film)
    assert again == [again[0]] * 2
    assert first
    assert last
    if options.get("dtype"):
        assert got == talk(loaded("cpu", dtype="float32"), method, film)


def test_a_film_of_the_cpu_is_opened_on_the_card(tmp_path: Path) -> None:
    cpu, card = loaded("cpu", dtype="float32"), loaded("cuda", dtype="float32")
    one = cpu.session(video=clip(24), frames=None, method="zipvl", reuse="general")
    one.save(tmp_path / "a.zipvl")
    want = one.ask("What comes last?", 6).tokens
    assert card.open_session(tmp_path / "a.zipvl").ask("What comes last?", 6).tokens == want


CASES = [
    ([7, 1, 300], [64, 900, 300]),
    ([33], [4000]),
    ([0, 5], [40, 2000]),
    ([2, 0, 1], [2, 90, 700]),
]


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "sdpa"])
@pytest.mark.parametrize(("rows", "slots"), CASES)
@pytest.mark.parametrize(("H", "G"), [(28, 4), (8, 8)])
@torch.inference_mode()
def test_rows_that_follow_see_what_is_before_them(
    name: str, rows: Sequence[int], slots: Sequence[int], H: int, G: int
) -> None:
    """Several rows over a cache with room, which holds no numbers (NaN) there; some sequences have
    no row. As attend_sdpa says in float32."""
    if not usable(name, torch.device("cuda"), torch.bfloat16, 128):
        pytest.skip(f"{name} is not usable here")
    room, D, chance = 19, 128, torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=chance).bfloat16()
    q = draw(sum(rows), H, D)
    k, v = (torch.full((sum(slots) + room * len(slots), G, D), torch.nan) for _ in range(2))
    places, asks = Spans([*slots], "cpu", room), Spans([*rows], "cpu")
    for at in places.slices():
        k[at], v[at] = (
            draw(at.stop - at.start, G, D).float(),
            draw(at.stop - at.start, G, D).float(),
        )
    want = attend_sdpa(q.float(), k, v, asks, places)
    card: list[Tensor] = [t.bfloat16().cuda() for t in (q, k, v)]
    got = BACKENDS[name](*card, Spans([*rows], "cuda"), Spans([*slots], "cuda", room))
    torch.testing.assert_close(got.float().cpu(), want, rtol=0.02, atol=0.02)
