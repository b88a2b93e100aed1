"""Progress bars on stderr, for long videos and prompts; silent unless asked for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Progress:
    """`with progress("encode frames", 64) as step: step(16)`; silent when `show` is False."""

    def __init__(self, show: bool = False):
        self.show = show

    @contextmanager
    def __call__(self, label: str, total: int) -> Iterator[Callable[[int], object]]:
        if not self.show or total < 2:
            yield lambda n: None
            return
        from tqdm import tqdm

        with tqdm(total=total, desc=f"{label:<13}", leave=False, dynamic_ncols=True) as bar:
            yield bar.update
