"""A stage of training that may be stopped anywhere and goes on as if it had not been.

Every step draws from a generator made of its own number, so that the step, the weights and the
optimisers are all there is to save. A line of the log is a step; those behind the last state on
disk are taken back when the stage goes on, and written again.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

SAVE = 120.0  # seconds from one state to the next


class Stateful(Protocol):
    """What a state on disk holds: modules and optimisers."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> object: ...


@dataclass(frozen=True)
class Stage:
    """Its state stands in FOLDER/NAME.pt and its log in FOLDER/NAME.jsonl."""

    folder: Path
    name: str
    parts: list[Stateful]
    steps: int

    def run(self, step: Callable[[int], dict[str, Any]], stop: int | None = None,
            save: float = SAVE) -> bool:  # fmt: skip
        """Calls `step` with each number that is left, up to `stop`; what it says goes to the log.

        Returns whether the stage is at its end.
        """
        begin, spent = self.load()
        end = self.steps if stop is None else max(begin, min(stop, self.steps))
        start = saved = time.monotonic()
        with (self.folder / f"{self.name}.jsonl").open("a", encoding="utf-8") as log:
            for number in tqdm(range(begin, end), self.name, self.steps, initial=begin,
                               mininterval=10, smoothing=0.02):  # fmt: skip
                said = step(number)
                seconds = spent + time.monotonic() - start
                record = {"step": number + 1, **said, "seconds": round(seconds, 1)}
                log.write(json.dumps(record) + "\n")
                if number + 1 == end or time.monotonic() - saved >= save:
                    log.flush()
                    self.save(number + 1, seconds)
                    saved = time.monotonic()
        return end == self.steps

    def save(self, step: int, seconds: float) -> None:
        states = [part.state_dict() for part in self.parts]
        fresh = self.folder / f"{self.name}.pt.new"
        torch.save({"parts": states, "step": step, "seconds": seconds}, fresh)
        os.replace(fresh, self.folder / f"{self.name}.pt")  # a stop amid writing loses nothing

    def load(self) -> tuple[int, float]:
        """Puts the state on disk, if there is one, into the parts. Returns steps and seconds."""
        state, log = (self.folder / f"{self.name}.{end}" for end in ("pt", "jsonl"))
        if not state.exists():
            log.unlink(missing_ok=True)
            return 0, 0.0
        saved = torch.load(state)
        for part, value in zip(self.parts, saved["parts"], strict=True):
            part.load_state_dict(value)
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
        log.write_text("".join(lines[: saved["step"]]), encoding="utf-8")
        return saved["step"], saved["seconds"]
