"""A picture of a report page, as the README shows one; needs Chromium.

python -m lab.shot PAGE.html OUT.png [--size 1280x800] [--dark] [--layer 3] [--whole]
"""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zipvl.errors import UsageError

from .command import Parser, ended

# No sandbox inside a sandbox, no calls home, and no place in memory that containers lack.
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
)


def browser() -> str | None:
    """Chromium's path, or None where there is none."""
    return (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )


@contextmanager
def opened(page: Path, width: int = 1280, height: int = 800, dark: bool = False) -> Iterator[Any]:
    """A Playwright page that shows the file; no request leaves it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser(), args=list(FLAGS))
        tab = chromium.new_page(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        tab.route(
            "**/*",
            lambda route: (
                route.continue_() if route.request.url.startswith("file:") else route.abort()
            ),
        )
        tab.goto(page.absolute().as_uri())
        yield tab
        chromium.close()


def work(argv: list[str] | None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", default="1280x800")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--layer", type=int, default=-1)
    parser.add_argument("--whole", action="store_true", help="the whole page, not one screen of it")
    a = parser.parse_args(argv)
    if browser() is None:
        raise UsageError("Chromium is not installed: it draws the page")
    width, height = map(int, a.size.split("x"))
    with opened(a.page, width, height, a.dark) as tab:
        tab.evaluate("n => { layer.value = n; draw(); }", a.layer)
        tab.wait_for_timeout(300)  # pictures inside the page are decoded in the background
        tab.screenshot(path=os.fspath(a.out), full_page=a.whole)


def main(argv: list[str] | None = None) -> int:
    return ended(lambda: work(argv))


if __name__ == "__main__":
    sys.exit(main())
