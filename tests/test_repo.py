"""The repository itself: what its pages promise, what it needs, what it never does (its floor plan:
test_house.py)."""

import ast
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

import zipvl
from tests import test_house
from zipvl.model.chat import BUILT_IN

ROOT = Path(__file__).parent.parent
MAKERS = {  # scripts with needs of their own: those of the bundled demo read caches they wrote
    "lab/bench/llama_cpp.py": "gguf",
    "lab/experiments/text_to_zipvl.py": "gguf",
    "lab/demo/make_clip.py": "av",
    "lab/demo/tiles.py": "av",
    "lab/eval/lmms_task.py": "av",
    "lab/demo/resume.py": "torch.load",
    "lab/demo/train.py": "torch.load",
    "zipvl/lmms/model.py": "lmms_eval",
    "zipvl/model/fused.py": "triton",
    "zipvl/model/fused_decode.py": "triton",
    "zipvl/serve/routes.py": "starlette",
}
OPTIONAL = (
    "av", "decord", "gguf", "matplotlib", "transformers", "flash_attn", "huggingface_hub", "playwright",
    "triton", "lmms_eval", "starlette", "uvicorn",
)  # fmt: skip
ROW = re.compile(r"^(\|\s*\[?`?([\w/]+\.py)`?(?:\]\([^)]*\))?\s*\|\s*)(\d+)(\s*\|)", re.M)
MARK = re.compile(r"<!-- run( slow)? -->\s*```(\w*)\n(.*?)```", re.S)


def tracked() -> list[Path]:
    """Files under version control; without it, all but hidden and built ones."""
    git = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if git.returncode == 0 and git.stdout:
        found = [ROOT / name for name in git.stdout.decode().split("\0") if name]
        return [path for path in found if path.is_file()]
    hidden = re.compile(r"/(\.(?!ci)|build/|dist/|__pycache__|[^/]+\.egg-info)")
    return [
        p for p in ROOT.rglob("*") if p.is_file() and not hidden.search(f"/{p.relative_to(ROOT)}")
    ]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


FILES = tracked()
SOURCES = [
    p for p in FILES
    if p.suffix == ".py" and name(p).startswith(("zipvl/", "lab/", "generate.py", "bench.py"))
]  # fmt: skip
PAGES = [p for p in FILES if p.suffix == ".md" and name(p).split("/")[0] not in ("tests", "zipvl")]


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def functions(path: Path) -> list[ast.FunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


# --- what the code never does -----------------------------------------------------------------


def test_every_argument_is_annotated() -> None:
    bare = []
    for path in SOURCES:
        for f in functions(path):
            if any("triton.jit" in ast.unparse(d) for d in f.decorator_list):
                continue  # which reads annotations as types of its own
            given = [
                *f.args.posonlyargs,
                *f.args.args,
                *f.args.kwonlyargs,
                f.args.vararg,
                f.args.kwarg,
            ]
            bare += [f"{name(path)}:{f.name}({a.arg})" for a in given
                     if a and a.annotation is None and a.arg not in ("self", "cls")]  # fmt: skip
            bare += (
                [f"{name(path)}:{f.name} ->"] if f.returns is None and f.name != "__init__" else []
            )
    assert not bare


def test_nothing_is_unpickled_or_executed() -> None:
    """A checkpoint is data: no call that could run code from it."""
    unsafe = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{name(path)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                assert not unsafe & {a.name.split(".")[0] for a in node.names}, where
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in unsafe, where
                assert not (node.module == "torch" and "load" in {a.name for a in node.names}), (
                    where
                )
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "os.system"), where
                assert called != "torch.load" or MAKERS.get(name(path)) == called, where
                options = {k.arg for k in node.keywords}
                assert not options & {"allow_pickle", "trust_remote_code"}, where


def test_no_place_of_ours_is_in_the_files() -> None:
    """Paths of one machine, and hosts that installers must choose for themselves."""
    ours = re.compile(
        r"(?<![\w.])/(?:work|home/\w|root|Users|mnt|scratch)/"
        r"|py[p]i\.(?:org|python)|python[h]osted|download\.py[t]orch|--(?:extra-)?index[-]url"
        r"|ana[c]onda\.org"
    )
    found = []
    for path in FILES:
        if path.suffix in (".py", ".md", ".toml", ".txt", ".cff", ".json", "") and path != Path(
            __file__
        ):
            text = path.read_bytes().decode("utf-8", errors="ignore")
            found += [f"{name(path)}: {m[0]}" for m in ours.finditer(text)]
    assert not found


IMPORT_ALL = """
import importlib, pkgutil, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[1].split(","):
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocker())
import torch, lab, zipvl
names = {m.name for p in (lab, zipvl) for m in pkgutil.walk_packages(p.__path__, p.__name__ + ".")}
for name in names - set(sys.argv[2].split(",")):
    importlib.import_module(name)
import generate, bench
assert not torch.cuda.is_initialized()
print(len(names))
"""


def test_every_module_imports_without_the_optional_packages() -> None:
    makers = ",".join(p[:-3].replace("/", ".") for p, why in MAKERS.items() if why in OPTIONAL)
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, ",".join(OPTIONAL), makers], cwd=ROOT, capture_output=True,
        text=True, timeout=120, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 30


# --- versions ---------------------------------------------------------------------------------


def test_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == zipvl.__version__
    log = (ROOT / "CHANGELOG.md").read_text()
    assert "## Unreleased" in log or f"## {zipvl.__version__}" in log
    assert f"version: {zipvl.__version__}" in (ROOT / "CITATION.cff").read_text().replace('"', "")


def test_constraints_pin_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.M)
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.match(r"[\w.-]+", d)[0] for d in wanted}
    names.remove("triton")  # each PyTorch for CUDA brings its own
    assert {n.lower().replace("_", "-") for n in names} <= {
        p.lower().replace("_", "-") for p in pinned
    }


def test_public_names() -> None:
    assert sorted(zipvl.__all__) == list(zipvl.__all__)
    assert all(hasattr(zipvl, n) for n in zipvl.__all__)


# --- what the pages promise -------------------------------------------------------------------


def dotted(tree: ast.AST, prefix: str = "") -> set[str]:
    """Functions, classes, their members, and constants of a module."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found |= {prefix + node.name} | dotted(node, f"{prefix}{node.name}.")
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        found |= {prefix + t.id for t in targets if isinstance(t, ast.Name)}
    return found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_and_anchors_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{name(page)} links to {target}"
    for path in re.findall(r"(?<![\w/.-])((?:zipvl|lab|tests|docs|examples)/[\w./-]*\w)", text):
        assert (ROOT / path).exists(), f"{name(page)} names {path}"
    for module in re.findall(r"python -m ((?:zipvl|lab)[\w.]*)", text):
        assert importlib.util.find_spec(module), f"{name(page)} names {module}"
    for path, anchor in re.findall(r"([\w/]+\.py):([A-Za-z_][\w.]*\w)", text):
        if (ROOT / path).exists():
            known = dotted(ast.parse((ROOT / path).read_text(encoding="utf-8")))
            assert anchor in known, f"{name(page)} names {path}:{anchor}"


def with_true_counts(text: str) -> str:
    """`text` with the lines of every file in a table of lines, blank ones left out, as they are."""
    return ROW.sub(lambda m: f"{m[1]}{test_house.code(ROOT / m[2])}{m[4]}", text)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_line_counts_are_true(page: Path) -> None:
    """`python -m tests.test_repo` corrects them."""
    text = page.read_text(encoding="utf-8")
    assert ROW.findall(text) == ROW.findall(with_true_counts(text))
    assert ROW.search(text) or name(page) != "README.md"


def commands(text: str) -> list[list[str]]:
    """The generate.py command lines of a page as arguments, comments and pipes cut off."""
    found = []
    for line in re.findall(r"python generate\.py([^`\n]*)", text):
        words = shlex.split(line, comments=True)
        found.append(words[: words.index("|")] if "|" in words else words)
    return found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_use_options_that_exist(page: Path) -> None:
    sys.path.insert(0, str(ROOT))
    try:
        from zipvl.cli import build_parser
    finally:
        sys.path.pop(0)
    text = page.read_text(encoding="utf-8")
    for words in commands(text):
        args = build_parser().parse_args(words)  # raises SystemExit for an unknown option
        if args.method and not args.method.startswith("my_file.py"):
            zipvl.load_policy(args.method, tau=args.tau, ratio=args.keep_ratio)
        assert args.template is None or args.template in BUILT_IN
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    for named in re.findall(r"(?:^|`)make ((?:\w+ ?)+)", text, re.M):
        assert set(named.split()) <= targets, f"{name(page)}: make {named}"


BLOCKS = [
    pytest.param(kind, body, id=f"{name(page)}-{i}", marks=[pytest.mark.slow] if slow else [])
    for page in PAGES
    for i, (slow, kind, body) in enumerate(MARK.findall(page.read_text(encoding="utf-8")))
]


@pytest.mark.parametrize(("kind", "body"), BLOCKS)
def test_commands_of_the_pages_run(kind: str, body: str) -> None:
    """Blocks after `<!-- run -->` (or `<!-- run slow -->`), word for word, from the root."""
    here = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = (
        [sys.executable, "-c", body]
        if kind == "python"
        else ["bash", "-euo", "pipefail", "-c", body]
    )
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PATH": here}, capture_output=True,
                          text=True, stdin=subprocess.DEVNULL, timeout=280, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


@pytest.mark.slow
def test_the_wheel_holds_everything(tmp_path: Path) -> None:
    for path in FILES:
        copy = tmp_path / "source" / name(path)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", str(tmp_path), str(tmp_path / "source")], check=True, timeout=200)
    [wheel] = tmp_path.glob("*.whl")
    inside = zipfile.ZipFile(wheel).namelist()
    assert {name(p) for p in FILES if name(p).startswith("zipvl/")} <= {*inside}
    assert not [n for n in inside if n.split("/")[0] in ("tests", "docs", "lab", "examples")]


def test_ceilings_are_where_the_page_says() -> None:
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[A-Z].*?) \| (.*?) \| zipvl/(\S+)\.py", page, re.M)
    assert len(rows) > 15
    for names, number, home in rows:
        module = import_module(f"zipvl.{home.replace('/', '.')}")
        powers = [2 ** int(n) for n in re.findall(r"2\^(\d+)(?!\.)\b", number)]
        for name in re.findall(r"`(\w+)`", names):
            value = getattr(module, name)
            shown = (
                {f"{value:,}", f"{value:g}", str(value)} if not isinstance(value, tuple) else set()
            )
            assert value in powers or any(s in number for s in shown), f"{name} is {value}"


if __name__ == "__main__":
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(test_house.with_true_sizes(with_true_counts(text)), encoding="utf-8")
