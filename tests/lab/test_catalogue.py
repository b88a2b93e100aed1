"""The tables of methods say what the catalogue says, and what was measured."""

from lab import catalogue
from lab.catalogue import ROOT, between
from zipvl.policies import GROUPS, METHODS


def test_pages_are_those_of_the_catalogue() -> None:
    """`python -m lab.catalogue` corrects them."""
    for name, made in (("README.md", catalogue.with_methods), ("docs/methods.md", catalogue.page)):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert text == made(text)
    shown = [m["group"] for m in catalogue.PAGE.finditer(text)]
    assert shown == list(GROUPS)
    assert all(f"| `{name}`" in text for name in METHODS)
    assert f"\n{len(METHODS)} methods behind one interface" in text


def test_each_method_says_what_and_when() -> None:
    assert catalogue.WHEN.keys() == METHODS.keys()
    ours = next(iter(GROUPS.values()))
    for name in METHODS:
        paper, what = catalogue.told(name)
        assert bool(paper) == (name not in ours)
        assert 10 < len(what) < 120, name


def test_settings_side_by_side() -> None:
    assert between(["ratio=0.1,text=true", "ratio=0.2,text=true"]) == "`ratio=0.1/0.2,text=true`"
    assert between(["a=1,b=2", "a=1,b=3"]) == "`a=1,b=2/3`"
    assert between(["a=1", "a=1,b=3"]) == "`a=1`, `a=1,b=3`"
    assert between(["a=1,b=0", "a=1,b=1", "a=2,b=1"]) == "`a=1,b=0`, `a=1,b=1`, `a=2,b=1`"
    assert between([""]) == ""
