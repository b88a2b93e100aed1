"""The floor plan: how large the rings are, who imports whom, what one token walks through.

What a reader pays for is files opened and names held in the head, so these are measured; a limit on
the lines of a file is not among them.
"""

import ast
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest

from zipvl import cli

ROOT = Path(__file__).parent.parent
RIVALS = sorted(f"policies/{p.stem}" for p in (ROOT / "zipvl/policies").glob("[a-z]*.py")
                if p.stem != "zipvl")  # fmt: skip
NEW = len(RIVALS) - 7  # since there were seven
RINGS = {  # non-blank lines allowed; a new method may add 60 to its ring, a new family its own file
    "method": (2360, "model/batch model/kernels model/attention model/decoder model/vlm linear "
               "model/cache policy policies/zipvl engine/engine engine/run engine/sampler engine/stats"),
    "doors": (3490, "config model/layouts model/weights model/chat model/sandbox model/tokenizer "
              "vision/family vision/llava vision/encoder vision/source vision/index vision/video "
              "engine/inputs engine/load errors"),
    "families": (500, "vision/internvl vision/qwen"),  # a file each, of those that are no LLaVAs
    "rivals and formats": (890 + 60 * NEW, "policies/__init__ " + " ".join(RIVALS) +
                           " model/quant model/cache_quant model/cache_thin"),
    "sessions": (650, "engine/session engine/film talk"),
    "harness": (285, "lmms/__init__ lmms/__main__ lmms/request lmms/model"),
    "app": (640, "cli report __init__ __main__"),
    "study": (400, "compare page"),
    "serve": (1340, "serve/__init__ serve/app serve/media serve/request serve/routes "
              "serve/worker"),
    "speed": (640, "engine/speed model/backends model/fused model/fused_decode"),
}  # fmt: skip
APART = ("testing", "demo")  # public helpers for methods; data
FLOORS = (  # nobody imports upwards
    {"errors"},
    {"config", "linear", "policy"},
    {"vision"},
    {"model"},
    {"policies", "testing"},
    {"engine"},
    {"report", ""},  # "": the face, zipvl/__init__.py
    {"page"},
    {"compare", "talk"},
    {"cli"},
    {"__main__", "lmms", "serve"},
)
MAX_FUNCTION, MAX_COLUMNS, SMELL = 60, 100, 400
MAX_ENTERED, MAX_NAMES, MAX_METHOD = 31, 16, 70
RING_ROW = re.compile(r"^(\| *([a-z ]+?) *\|[^|]*\|) *[\d,]+ *\| *\d+ *\|$", re.M)
SENTENCE = re.compile(r"method is [\d,]+ lines, the engine [\d,]+")


def modules() -> dict[str, Path]:
    """Dotted name below zipvl -> file; "" is the package itself."""
    found = {}
    for path in sorted((ROOT / "zipvl").rglob("*.py")):
        name = path.relative_to(ROOT / "zipvl").with_suffix("").as_posix().replace("/", ".")
        found[name.removesuffix("__init__").removesuffix(".")] = path
    return found


MODULES = modules()


def code(path: Path) -> int:
    """Lines that are not blank."""
    return sum(bool(line.strip()) for line in path.read_text(encoding="utf-8").splitlines())


def sizes() -> dict[str, tuple[int, int]]:
    """Lines and files of every ring."""
    files = {
        ring: [ROOT / f"zipvl/{f}.py" for f in names.split()] for ring, (_, names) in RINGS.items()
    }
    return {ring: (sum(map(code, paths)), len(paths)) for ring, paths in files.items()}


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, wherever in the file it does."""
    inside = path.relative_to(ROOT).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            home = ".".join(inside[: -node.level]) if node.level else ""
            base = ".".join(filter(None, (home, node.module)))
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "zipvl":
                below = name.removeprefix("zipvl").removeprefix(".")
                found.add(below if below in MODULES else below.rpartition(".")[0])
    return found


# --- size -------------------------------------------------------------------------------------


def test_rings_stay_within_their_budgets(capsys: pytest.CaptureFixture) -> None:
    found = sizes()
    with capsys.disabled():
        print("\n" + ", ".join(f"{ring}: {n} lines in {m} files" for ring, (n, m) in found.items()))
    assert not {r: n for r, (n, _) in found.items() if n > RINGS[r][0]}


def test_every_file_is_in_a_ring() -> None:
    placed = {f for _, names in RINGS.values() for f in names.split()}
    every = {p.relative_to(ROOT / "zipvl").with_suffix("").as_posix() for p in MODULES.values()}
    faces = {f"{folder}/__init__" for folder in ("engine", "model", "vision")}  # empty
    assert every - placed == faces | {f for f in every if f.split("/")[0] in APART}
    assert all(code(ROOT / f"zipvl/{f}.py") == 0 for f in faces)


def test_files_are_no_attics() -> None:
    """Past 400 lines a file holds more than one idea."""
    assert not {name for name, path in MODULES.items() if code(path) > SMELL}


def test_a_method_is_a_page() -> None:
    assert not {name for name in RIVALS if code(ROOT / f"zipvl/{name}.py") > MAX_METHOD}


@pytest.mark.parametrize("folder", ["zipvl", "lab"])
def test_functions_and_lines_are_short(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for i, line in enumerate(text.splitlines(), 1):
            assert len(line) <= MAX_COLUMNS, f"{path}:{i}"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < MAX_FUNCTION, f"{path}:{node.name}"


def with_true_sizes(text: str) -> str:
    """A page with the rings of its table as large as they are."""
    found = sizes()

    def row(m: re.Match) -> str:
        return f"{m[1]} {found[m[2]][0]:,} | {found[m[2]][1]} |" if m[2] in found else m[0]

    method, doors = found["method"][0], found["doors"][0]
    text = SENTENCE.sub(f"method is {method:,} lines, the engine {method + doors:,}", text)
    return RING_ROW.sub(row, text)


def test_the_readme_says_the_sizes() -> None:
    """`python -m tests.test_repo` corrects them."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {m[1] for m in RING_ROW.findall(text)} >= RINGS.keys()
    assert SENTENCE.search(text)
    assert text == with_true_sizes(text)


# --- directions -------------------------------------------------------------------------------


def test_nobody_imports_upwards() -> None:
    floor = {room: n for n, rooms in enumerate(FLOORS) for room in rooms}
    for name, path in MODULES.items():
        here = floor[name.split(".")[0]]
        for other in imports(path):
            up = floor[other.split(".")[0]] > here
            assert not up or name == "", f"{name} imports {other}"  # the face shows everything


def test_the_rules_that_matter_most() -> None:
    assert imports(MODULES["policy"]) == {"errors"}
    assert imports(MODULES["errors"]) == imports(MODULES["linear"]) == set()
    for name, path in MODULES.items():
        if name.startswith("model"):
            assert not [other for other in imports(path) if other.startswith("engine")], name


def test_there_is_no_circle() -> None:
    """Imports inside functions and for type checkers count as well."""
    graph = {name: imports(path) - {name} for name, path in MODULES.items() if name}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above, name])
        if name in graph and name not in done:
            for other in graph[name]:
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_package_does_not_know_the_lab() -> None:
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [m for m in modules if m.split(".")[0] in ("lab", "tests")], path


def test_the_attention_layer_holds_few_names() -> None:
    tree = ast.parse(MODULES["model.attention"].read_text(encoding="utf-8"))
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]
    names = [alias.name for n in nodes for alias in n.names]
    assert 5 < len(names) <= MAX_NAMES, names


# --- one token ---------------------------------------------------------------------------------


def walked(work: Callable[[], object]) -> tuple[set[str], set[str]]:
    """Files and functions of the package that `work` enters; running a module's body is no entry."""
    files, functions = set(), set()

    def note(frame: FrameType, event: str, _: object) -> None:
        where = frame.f_code
        inside = where.co_filename.startswith(str(ROOT / "zipvl")) and where.co_name != "<module>"
        if event == "call" and inside:
            files.add(where.co_filename)
            functions.add(where.co_filename + where.co_qualname)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(before)
    return files, functions


def test_from_the_command_line_to_the_first_token(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The bundled model about the bundled clip."""
    words = ["-p", "List all objects in order.", "--max-new-tokens", "1", "--device", "cpu"]
    for stream in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(io.BytesIO()))
    assert cli.main(words) == 0  # everything is imported
    codes: list[int] = []
    files, functions = walked(lambda: codes.append(cli.main(words)))
    assert codes == [0]
    with capsys.disabled():
        print(f"\nto the first token: {len(files)} files, {len(functions)} functions")
    assert 20 < len(files) <= MAX_ENTERED, sorted(files)
