"""The tables of methods in README.md and docs/methods.md, from the catalogue and what was measured.

python -m lab.catalogue     writes both; a test compares them
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from zipvl.policies import GROUPS, METHODS

from .experiments.rivals import BUDGETS, GRID, budget, label

ROOT = Path(__file__).parent.parent
MEASURED = ROOT / "lab/results/methods"
HEAD = re.compile(
    r"^(?P<name>.+?) \(arXiv (?P<paper>\d{4}\.\d{5})\): (?P<what>.*?)(?:\.\s|\.?$)", re.S
)
README = re.compile(r"(<!-- methods -->\n).*?(<!-- /methods -->)", re.S)
PAGE = re.compile(r"(<!-- figures: (?P<group>[^>]+?) -->\n).*?(<!-- /figures -->)", re.S)
WHEN = {
    "dense": "What all others are held against.",
    "zipvl": "To reproduce the paper, and where attention is most of the work.",
    "zipvl-stream": "Long films: all work and all bytes shrink.",
    "zipvl+": "As zipvl where its losses matter: the missing outputs are what costs it most.",
    "zipvl-quant": "The paper's version 1: bytes at zipvl's prefill.",
    "fixed": "The paper's ablation; a known cost.",
    "random": "What any score must beat.",
    "hired": "Pictures cut into tiles, on a model whose tower has a class token.",
    "visionzip_like": "A fixed number of tokens a picture, whatever is asked.",
    "vidcom2_like": "Films of any length: it needs neither pixels nor attention.",
    "fastv": "The plainest way to halve a prefill; it trusts one layer and the last token.",
    "pyramiddrop": "As FastV with three cuts: more depth, less trust in each.",
    "sparsevlm": "Questions that name what they ask for.",
    "sgl": "A small model of the family is at hand; without one, an upper bound for such scores.",
    "minference_ref": "To study the pattern; below 10,000 tokens it leaves little out.",
    "flexprefill_ref": "To study budgets by head and block beside budgets by layer and token.",
    "anchor_like": "To see what lines alone carry in a model that was not trained to use them.",
    "streaming": "The floor that any choice must beat, and endless text.",
    "h2o": "Long answers from a fixed cache, at the price of all rows' scores.",
    "snapkv": "The first choice where prefills are fast enough and caches too large.",
    "keyformer": "H2O where early favourites crowd the cache; its answers depend on a seed.",
    "prefixkv": "One budget for all layers together; `text=true` unless the letter is wanted.",
    "elastic": "As PrefixKV with merging in place of unequal layers; `text=true` as well.",
    "vlcache": "Pictures before a question: budgets by layer from the question's rows alone.",
    "lookm": "Pictures with much text, all of which stays.",
    "scope": "Answers of thousands of tokens.",
    "zipcache": "The smallest cache that loses nothing here.",
    "kivi": "No scores at all, at any prefill kernel.",
    "think": "On top of SnapKV, where key channels are what is left to save.",
    "tidal": "Decoding behind prompts so long that reading the cache is what takes the time.",
    "attnpred_last": "The baseline for any predictor of attention, and nearly as good.",
    "attnpred_reimpl": "A network of 4,833 numbers, trained by `python -m lab.attnpred`.",
}


CONTROLS = {
    "controls.py:Schedule": "random tokens leave for good",
    "controls.py:RandomCache": "random tokens stay cached",
}


def told(name: str) -> tuple[str, str]:
    """The number of a method's paper ("" for ours) and what it does, from its docstring."""
    kind = METHODS[name]
    text = sys.modules[kind.__module__].__doc__ or ""
    if kind in GROUPS[next(iter(GROUPS))].values():
        return "", (kind.__doc__ or "").splitlines()[0].rstrip(".")
    found = HEAD.match(text.replace("\n", " "))
    assert found, f"{kind.__module__}: begin the docstring with NAME (arXiv NUMBER): what it does."
    return found["paper"], found["what"]


def link(name: str) -> str:
    paper, _ = told(name)
    return f"`{name}` ([{paper}](https://arxiv.org/abs/{paper}))" if paper else f"`{name}`"


def readme() -> str:
    """A row for each method of this project, and for each group of others."""
    ours, *others = GROUPS.items()
    rows = [f"| `{name}` | {told(name)[1]} |" for name in ours[1]]
    rows += [f"| {title} | {', '.join(map(link, group))} |" for title, group in others]
    return "\n".join(["| name | what it does |", "|---|---|", *rows]) + "\n"


def measured(kind: str) -> tuple[int, dict[str, Any]]:
    """Tokens of the prompt, and the rows of a side-by-side by method."""
    result = json.loads((MEASURED / kind / "result.json").read_text(encoding="utf-8"))
    tokens = result.get("prompt", result["settings"]["tokens"][0])
    return tokens, {row["method"]: row for row in result["rows"]}


def settings(name: str, tokens: int) -> list[list[str]]:
    """The settings of a method in the side-by-side, three (or one) of each template."""
    found = []
    plain = all("{" not in s for s in GRID.get(name, ()))
    for s in GRID.get(name, ()):
        some = list(dict.fromkeys(s.format(**budget(share, tokens)) for share in BUDGETS))
        found.append([f"{name}:{one}" for one in some])
    if plain and found:
        found = [[one for some in found for one in some]]
    return found or [[name]]


def figures(names: list[str]) -> str:
    """A row for each template of each method: three settings side by side."""
    (length, clips), (words, text) = measured("clips"), measured("text")
    head = "| method | settings | lists and counts right, % | prefill work, % | cache, % "
    lines = [head + "| text: nats lost | cache, % |", "|---" * 7 + "|"]
    for name in dict.fromkeys(("dense", *names, *CONTROLS)):
        for some, other in zip(settings(name, length), settings(name, words), strict=True):
            seen = [clips[label(m)] for m in some if label(m) in clips]
            read = [text[label(m)] for m in other if label(m) in text]
            shown = [m.removeprefix(name).removeprefix(":") for m in some]
            cells = [
                CONTROLS.get(name, f"`{name}`"),
                " / ".join(f"{s:.0%}" for s in BUDGETS) if name in CONTROLS else between(shown),
                across(seen, lambda r: f"{100 * r['accuracy']['value']:.0f}"),
                across(seen, lambda r: f"{100 * r['prefill']:.0f}"),
                across(seen, lambda r: f"{100 * r['kv_bytes']:.0f}"),
                across(read, lambda r: f"{r['extra']['value']:.2f}"),
                across(read, lambda r: f"{100 * r['kv_bytes']:.0f}"),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def between(shown: list[str]) -> str:
    """Settings that differ in one number, as `ratio=0.1 / 0.2 / 0.4`."""
    if len(shown) < 2:
        return f"`{shown[0]}`" if shown[0] else ""
    parts = [re.split(r"(?<==)([^,=]+)", one) for one in shown]
    columns = [list(dict.fromkeys(column)) for column in zip(*parts, strict=False)]
    whole = all(len(column) in (1, len(shown)) for column in columns)
    if not whole or len({len(part) for part in parts}) > 1 or "/" in shown[0]:
        return ", ".join(f"`{one}`" for one in shown)
    return f"`{''.join('/'.join(column) for column in columns)}`"


def described(names: list[str]) -> str:
    what = {name: told(name)[1] for name in names}
    rows = [f"| {link(n)} | {what[n][0].upper()}{what[n][1:]}. {WHEN[n]} |" for n in names]
    return "\n".join(["| method | what it does; when |", "|---|---|", *rows]) + "\n"


def page(text: str) -> str:
    """docs/methods.md with the tables that belong into it."""

    def group(m: re.Match) -> str:
        names = list(GROUPS[m["group"]])
        return f"{m[1]}\n{described(names)}\n{figures(names)}\n{m[3]}"

    return PAGE.sub(group, text)


def with_methods(text: str) -> str:
    """README.md with the catalogue."""
    return README.sub(lambda m: m[1] + readme() + m[2], text)


def across(rows: list[Any], show: Any) -> str:
    """One number where all are the same."""
    shown = [show(row) for row in rows]
    return shown[0] if len(set(shown)) == 1 else " / ".join(shown)


if __name__ == "__main__":
    for name, made in (("README.md", with_methods), ("docs/methods.md", page)):
        path = ROOT / name
        path.write_text(made(path.read_text(encoding="utf-8")), encoding="utf-8")
