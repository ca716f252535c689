"""The house rules that keep the structure a sum: who may import whom, how light an import is, how long a file may be."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "lorakit"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the inside out. A package may import those further in, and `core.errors`; never one beside it or further out.
LAYERS = [
    {"kernels"},
    {"core"},
    {"methods", "bases", "init", "interop"},
    {"optim", "combine", "data", "models", "theory"},
    {"train", "analysis", "serve"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported_packages(path: Path, source: str) -> set[str]:
    """Give the sub-packages of lorakit that a file imports, also inside functions."""
    parents = path.relative_to(PACKAGE).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*parents[: len(parents) - node.level + 1], *(node.module or "").split("."))
            if base == ("core", "errors"):
                continue
            found |= {base[0]} if base[0] else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lorakit."):
            found.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("lorakit.")}
    return found & LEVEL.keys()


def misplaced(path: Path, source: str) -> list[str]:
    own = path.relative_to(PACKAGE).parts[0]
    if own not in LEVEL:
        return []  # lorakit/*.py put the layers together
    return [p for p in imported_packages(path, source) if p != own and LEVEL[p] >= LEVEL[own]]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_inwards(path: Path) -> None:
    assert misplaced(path, path.read_text()) == []


@pytest.mark.parametrize(
    ("file", "line", "wrong"),
    [
        ("core/x.py", "from ..methods.lora import LoRA", ["methods"]),
        ("core/x.py", "from lorakit.train import run", ["train"]),
        ("methods/x.py", "from ..init import kaiming", ["init"]),
        ("train/x.py", "from ..analysis.report import write_report", ["analysis"]),
        ("train/x.py", "from ..data.order import windows", []),
        ("data/x.py", "def f():\n    from ..models import load", ["models"]),
        ("cli/x.py", "from ..train.run import run", []),
        ("kernels/x.py", "from ..core.errors import UsageError", []),
        ("kernels/x.py", "from ..core.adapter import Base", ["core"]),
    ],
)
def test_the_layering_test_can_fail(file: str, line: str, wrong: list[str]) -> None:
    assert misplaced(PACKAGE / file, line) == wrong


def test_every_package_has_a_layer() -> None:
    assert {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()} <= LEVEL.keys()


HEAVY = [
    "transformers",
    "pydantic",
    "rich",
    "typer",
    "yaml",
    "safetensors",
    "peft",
    "bitsandbytes",
    "triton",
    "matplotlib",
]


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return {name.split(".")[0] for name in out.stdout.split()}


def test_importing_lorakit_brings_torch_and_nothing_heavier() -> None:
    brought = modules_after("import lorakit") - modules_after("import torch")
    assert brought & set(HEAVY) == set()
    assert "lorakit" in brought


def test_the_import_test_can_fail() -> None:
    assert "transformers" in modules_after("import transformers")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_are_short(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{node.name} is too long"


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name in ("core", "methods")], ids=lambda p: p.name)
def test_core_and_methods_do_not_guess_what_an_object_is(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "hasattr", f"line {node.lineno}"
            assert not (node.func.id == "getattr" and len(node.args) == 3), f"line {node.lineno}"


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if p.parent.name in ("methods", "init") and not p.name.startswith("_")],
    ids=lambda p: p.name,
)
def test_each_method_and_init_names_its_paper(path: Path) -> None:
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert re.search(r"https://(arxiv\.org/abs/\d{4}\.\d{4,5}|proceedings\.mlr\.press/|openreview\.net/forum)", doc)


FORBIDDEN = re.compile(
    r"(?<![\w.])torch\.load\b|\bpickle\b(?!d)|\bjoblib\b|yaml\.(?:load|unsafe_load|full_load)\(|trust_remote_code=True|(?<![\w.])eval\("
)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_is_unpickled_or_evaluated(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):  # words in docstrings and messages do no harm
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    assert FORBIDDEN.findall(ast.unparse(tree)) == []


def test_the_unpickling_test_can_fail() -> None:
    for bad in ("torch.load(f)", "import pickle", "yaml.load(s)", "f(trust_remote_code=True)", "eval(s)"):
        assert FORBIDDEN.search(bad)
    assert not FORBIDDEN.search("model.eval()")
