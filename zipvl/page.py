"""A run as one HTML page that needs nothing else: what was asked, answered, kept and spent.

This file gathers what there is to see as plain JSON; page.html, which it goes into, draws it. What
each layer kept is learnt in a prefill of its own behind the timed run, so that no figure of the run
pays for being watched.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import platform
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from . import __version__
from .engine.engine import Engine
from .engine.inputs import Inputs
from .errors import ZipvlError
from .policy import Plan, Policy, View
from .report import Trial, agreement
from .vision.family import Family, Geometry, Media
from .vision.video import Reading

MOST = 1000  # frames of a video on the page, spread evenly
SHEET, ACROSS = 24, 6  # frames on a sheet of pictures, and in its rows
SIDE = 96  # pixels of a frame's longer side
BINS = 240  # bars of what the last token looked at


class Watched(Policy):
    """A method that runs as it does, and what it chose."""

    def __init__(self, method: Policy, layers: int, tokens: int):
        self.method, self.start, self.trim = method, method.start, method.trim
        self.storage = method.storage
        self.attended, self.cached = np.zeros((2, layers, tokens), dtype=bool)
        self.looked = np.zeros(tokens)  # attention of the last token, mean over layers and heads

    def plan(self, view: View) -> Plan:
        plan, at = self.method.plan(view), view.notes.original(view.positions).cpu().numpy()
        chosen = slice(None) if plan.attend is None else plan.attend.cpu().numpy()
        self.attended[view.layer, at[chosen]] = True
        last = torch.tensor([view.length - 1])
        self.looked[at] += view.mass(last).mean(0).cpu().numpy() / view.num_layers
        return plan


@torch.inference_mode()
def watch(engine: Engine, inputs: Inputs, policy: Policy, new: int) -> Watched:
    """What `policy` keeps of `inputs` where at most `new` tokens follow."""
    seen = Watched(policy, engine.config.text.num_layers, len(inputs))
    notes = engine.take_notes([inputs], policy, new)
    out = engine.prefill([inputs], seen, 1, {}, notes, ends=True)
    for row, cache in zip(seen.cached, out.caches, strict=True):
        kept = notes[0].original(cache.places(0))  # of several heads' choices the union
        row[kept.flatten().cpu().numpy()] = True
    return seen


# --- where tokens lie -----------------------------------------------------------------------------


@dataclass
class Panel:
    """Pictures of one size with a grid of tokens each: a video's frames, a picture, its tiles."""

    title: str
    tokens: np.ndarray  # int64 [n, rows, cols], places in the prompt; -1: none
    box: tuple[
        float, float, float, float
    ]  # where the grid lies on the picture: y, x, height, width
    shown: np.ndarray  # int64 [n], which frames of all these are
    labels: list[str]  # of all
    pictures: list[Image.Image]  # [n], or none
    frame: np.ndarray  # int64 [m], of each token of all
    place: np.ndarray  # int64 [m], and where in the prompt it is


def places(medium: Media, family: Family) -> np.ndarray:
    """Which surface each token shows and where, [tokens, 3]: a frame's number, or 0 for a picture
    and 1 for its tiles; y and x as shares of its sides. NaN: a newline.

    The merging code itself says so: it is run on features that hold their own places.
    """
    geometry, sides = medium.geometry, family.grid(medium.geometry)
    y, x = torch.meshgrid(*[(torch.arange(side) + 0.5) / side for side in sides], indexing="ij")
    where = torch.stack([y, x]).flatten(1).T  # [N, 2]
    nowhere = torch.full((3,), torch.nan)
    if geometry.frames:
        number = torch.arange(geometry.frames).float()[:, None, None].expand(-1, len(where), 1)
        there = torch.cat([number, where.expand(geometry.frames, -1, 2)], dim=-1)  # [F, N, 3]
        return family.spread(there, geometry, nowhere).numpy()
    spots = [torch.cat([torch.zeros(len(where), 1), where], -1)]
    for tile in range(geometry.crops - 1):
        corner = torch.tensor(divmod(tile, geometry.cols))
        inside = (where + corner) / torch.tensor([geometry.rows, geometry.cols])
        spots.append(torch.cat([torch.ones(len(where), 1), inside], -1))
    return family.spread(torch.stack(spots), geometry, nowhere).numpy()


def panels(inputs: Inputs, family: Family, videos: list[Reading | None]) -> list[Panel]:
    """All media of a prompt. `videos` are read again for those whose pixels are gone."""
    out, visual, begin = [], inputs.is_visual.nonzero()[:, 0].numpy(), 0
    readings = iter(videos)
    for number, medium in enumerate(inputs.media, start=1):
        mine, begin = visual[begin : begin + medium.tokens], begin + medium.tokens
        spots = places(medium, family)
        crops = medium.crops.numpy()
        if medium.clip:
            # where two frames share tokens, the first stands for both
            known = ~np.isnan(spots[:, 0])
            frames, spots[known, 0] = np.unique(spots[known, 0], return_inverse=True)
            frames, reading = frames.astype(int), next(readings, None)
            shown = np.linspace(0, len(frames) - 1, min(MOST, len(frames)), dtype=int)
            count = len(medium.clip.times)
            some = "" if len(shown) == count else f", {len(shown)} shown"
            title = f"Video {number}: {count} frames{some}"
            times = [medium.clip.times[i] for i in frames]
            labels = [f"{t // 60:.0f}:{t % 60:04.1f}" for t in times]
            whole = len(crops) > 0
            pictures = [crops[i] for i in frames[shown] if whole] or again(
                reading, frames[shown], family, medium.geometry
            )
            out.append(panel(title, spots, mine, shown, labels, pictures))
        else:
            rows, cols = medium.geometry.rows, medium.geometry.cols
            for surface, title in ((0, "whole"), (1, f"{rows} x {cols} tiles")):
                if (spots[:, 0] == surface).any():
                    picture = crops[0] if surface == 0 else (
                        crops[1:].reshape(rows, cols, *crops.shape[1:]).swapaxes(1, 2)
                        .reshape(rows * crops.shape[1], cols * crops.shape[2], 3)
                    )  # fmt: skip
                    spots_here = spots - np.array([surface, 0, 0])
                    name = f"Picture {number}, {title}"
                    out.append(panel(name, spots_here, mine, np.array([0]), [title], [picture]))
    return out


def panel(title: str, spots: np.ndarray, mine: np.ndarray, shown: np.ndarray, labels: list[str],
          pictures: list[np.ndarray]) -> Panel:  # fmt: skip
    """The surfaces `shown`, of tokens at `spots` [n, 3] and places `mine` [n] in the prompt."""
    here = np.isin(spots[:, 0], shown)
    surface, (ys, y), (xs, x) = (
        np.searchsorted(shown, spots[here, 0]),
        *(np.unique(spots[here, i].round(4), return_inverse=True) for i in (1, 2)),
    )
    tokens = np.full((len(shown), len(ys), len(xs)), -1)
    tokens[surface, y, x] = mine[here]
    high, wide = (
        float(side[-1] - side[0]) / (len(side) - 1) if len(side) > 1 else 1.0 for side in (ys, xs)
    )
    box = (float(ys[0]) - high / 2, float(xs[0]) - wide / 2, high * len(ys), wide * len(xs))
    small = [Image.fromarray(picture) for picture in pictures]
    for picture in small:
        picture.thumbnail((SIDE, SIDE) if len(small) > 1 else (6 * SIDE, 6 * SIDE))
    known = (spots[:, 0] >= 0) & (spots[:, 0] < len(labels))
    frame, place = spots[known, 0].astype(int), mine[known]
    return Panel(title, tokens, box, shown, labels, small, frame, place)


def looks(p: Panel, looked: np.ndarray) -> dict[str, Any]:
    """Bars of the attention that each of a panel's frames gets, and where most of it goes."""
    mass = np.bincount(p.frame, looked[p.place], len(p.labels))
    starts = np.linspace(0, len(mass), min(BINS, len(mass)), endpoint=False).astype(int)
    return {
        "total": float(f"{mass.sum():.4f}"),
        "bins": [float(f"{m:.3g}") for m in np.add.reduceat(mass, starts)],
        "labels": [p.labels[i] for i in starts],
        "sheets": (np.searchsorted(p.shown, starts) // SHEET).tolist(),
        "top": [p.labels[i] for i in sorted(np.argsort(-mass)[:3])],
    }


def again(reading: Reading | None, shown: np.ndarray, family: Family,
          geometry: Geometry) -> list[np.ndarray]:  # fmt: skip
    """The frames number `shown` of a video as the tower saw them, small, read once more; none where
    it is no file."""
    small: dict[int, np.ndarray] = {}
    wanted = set(shown.tolist())
    for frames in reading or ():
        small.clear()
        for number, frame in enumerate(frames):
            if number in wanted:
                picture = Image.fromarray(family.fit(frame, geometry))
                picture.thumbnail((SIDE, SIDE))
                small[number] = np.asarray(picture)
    return [small[i] for i in sorted(small)] if len(small) == len(shown) else []


def sheets(pictures: list[Image.Image]) -> list[str]:
    """The pictures as data URIs, SHEET of them on each, ACROSS side by side."""
    out = []
    for start in range(0, len(pictures), SHEET):
        some = pictures[start : start + SHEET]
        wide, high = some[0].size
        across = min(ACROSS, len(some))
        sheet = Image.new("RGB", (wide * across, high * math.ceil(len(some) / across)))
        for i, picture in enumerate(some):
            sheet.paste(picture, (i % across * wide, i // across * high))
        data = io.BytesIO()
        sheet.save(data, "WEBP", quality=70)
        out.append("data:image/webp;base64," + base64.b64encode(data.getvalue()).decode())
    return out


# --- the page -------------------------------------------------------------------------------------


def method(trial: Trial, seen: Watched, first: Trial, shown: list[Panel]) -> dict[str, Any]:
    """One method's part of the page."""
    assert trial.result is not None
    assert first.result is not None
    stats = trial.result.stats
    chose = not seen.attended.all()
    kept = seen.attended if chose else seen.cached
    cells = np.concatenate([p.tokens.flatten() for p in shown]) if shown else np.zeros(0, int)
    bits = np.packbits(kept[:, cells] & (cells >= 0), axis=1, bitorder="little")
    return {
        "name": trial.method,
        "settings": stats.method,
        "answer": trial.result.text,
        "agrees": agreement(trial, first.result),
        "all": bool(kept.all()),
        "what": "took part in attention" if chose else "stay in the cache",
        "bits": [base64.b64encode(row.tobytes()).decode() for row in bits],
        "share": [float(f"{row.mean():.4f}") for row in kept],
        "looks": [looks(p, seen.looked) for p in shown],
        "seconds": {k: round(v, 4) for k, v in stats.seconds.items()},
        "rate": round(stats.decode_rate, 1),
        "kept": round(stats.ratio, 4),
        "work": round(stats.prefill_work, 4),
        "bytes": stats.kv_bytes,
        "dense": stats.kv_bytes_dense,
        "peak": stats.peak_memory,
    }


def content(engine: Engine, inputs: Inputs, question: str, trials: list[Trial],
            policies: list[Policy], videos: list[Reading | None], new: int,
            settings: dict[str, str]) -> dict[str, Any]:  # fmt: skip
    """All that the page shows. `policies` made the trials, of at most `new` tokens."""
    shown = panels(inputs, engine.model.vision, videos)
    done = [trial for trial in trials if trial.result and trial.result.stats.layers]
    parts = []
    for trial, policy in zip(trials, policies, strict=False):
        if trial not in done:
            parts.append({"name": trial.method, "fault": trial.fault or "interrupted"})
            continue
        parts.append(method(trial, watch(engine, inputs, policy, new), done[0], shown))
    return {
        "question": question,
        "tokens": len(inputs),
        "visual": int(inputs.is_visual.sum()),
        "layers": engine.config.text.num_layers,
        "methods": parts,
        "panels": [
            {
                "title": p.title,
                "shape": p.tokens.shape,
                "box": [round(v, 4) for v in p.box],
                "labels": [p.labels[i] for i in p.shown],
                "size": p.pictures[0].size if p.pictures else (SIDE, SIDE),
                "sheets": sheets(p.pictures),
            }
            for p in shown
        ],
        "sheet": (SHEET, ACROSS),
        "warnings": inputs.warnings,
        "settings": settings
        | {
            "model": f"{engine.config.family} ({engine.config.layout} layout)",
            "machine": f"{engine.model.dtype} on {engine.model.device}, {engine.backend}".replace(
                "torch.", ""
            ),
            "versions": f"zipvl {__version__}, torch {torch.__version__}, "
            f"Python {platform.python_version()}",
            "made": time.strftime("%Y-%m-%d %H:%M"),
        },
    }


def write_page(path: Path, page: dict[str, Any]) -> None:
    """Puts content() into page.html. A page that was there stays until the new one is whole.

    Raises ZipvlError where it cannot be written.
    """
    data = json.dumps(page).replace("<", "\\u003c")  # no text can end the script that holds it
    text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    place = Path(os.path.realpath(path))  # a link stays one
    fresh = place.with_name(f".zipvl-report-{os.getpid()}")
    try:
        fresh.write_text(text.replace("{}/*DATA*/", data), encoding="utf-8")
        os.replace(fresh, place)
    except OSError as e:
        raise ZipvlError(f"{path} cannot be written: {e.strerror or e}") from e
    finally:
        with suppress(OSError):
            fresh.unlink()
