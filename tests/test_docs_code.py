"""Names in the documentation exist, and the steps of docs/add_a_method.md are what they say."""

import ast
import re
from pathlib import Path

import pytest

from zipvl import UsageError
from zipvl.testing import check_policy

ROOT = Path(__file__).parent.parent
ANCHOR = re.compile(r"`([\w/]+\.py):([\w.]+)`")


def names(tree: ast.AST, prefix: str = "") -> set[str]:
    """Dotted names of the functions, classes and methods in a module."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found |= {prefix + node.name} | names(node, f"{prefix}{node.name}.")
    return found


def test_every_name_in_the_paper_map_exists() -> None:
    for page in ("paper_map.md", "add_a_method.md"):
        anchors = ANCHOR.findall((ROOT / "docs" / page).read_text())
        for path, name in anchors:
            assert name in names(ast.parse((ROOT / path).read_text())), f"{page}: {path}:{name}"
    text = (ROOT / "docs/paper_map.md").read_text()
    rows = [row for row in text.splitlines() if row.startswith("| ")]
    equations = {row.split("|")[1].strip() for row in rows if row.startswith("| Eq. ")}
    assert {f"Eq. {n}" for n in ("1", "2-4", "5", "6", "7", "8", "9")} <= equations
    for row in (r for r in rows if r.count("|") == 5 and not r.startswith("| Paper")):
        assert "`zipvl/" in row.split("|")[3], row
        assert ":test_" in row.split("|")[4], row


def blocks(page: str) -> list[tuple[str, str]]:
    return re.findall(r"```(\w+)\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S)


def test_the_diffs_of_add_a_method_lead_from_dense_to_the_example() -> None:
    found = blocks("add_a_method.md")
    state = next(text for kind, text in found if kind == "python")
    versions = [state]
    for kind, text in found:
        if kind == "diff":
            lines = text.splitlines(keepends=True)
            assert "".join(x[1:] for x in lines if x[0] in " -") == versions[-1]
            versions.append("".join(x[1:] for x in lines if x[0] in " +"))
    example = (ROOT / "examples/keynorm.py").read_text()
    assert versions[-1].strip() == example.split('"""', 2)[2].strip()

    sentences = [" ".join(text.split()) for kind, text in found if kind == "text"]
    for source, fault in zip(versions, [None, *sentences, None], strict=True):
        space: dict = {}
        exec(source, space)
        if fault is None:
            check_policy(space["KeyNorm"])
        else:
            with pytest.raises((AssertionError, UsageError), match=re.escape(fault)):
                check_policy(space["KeyNorm"])
