"""The shape of the package: imports point down, light commands stay light, the paper map holds."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "star_elastic"
# Each may import what stands before it, and itself.
RANKS = (
    "errors", "paths", "strict", "recent", "progress", "signals", "widths", "amounts", "axes",
    "cost", "checkpoint", "companions", "latency", "families", "manifest", "stored", "placement",
    "quant", "importance", "nesting", "router", "train", "generate", "evaluate", "bars",
    "terminal", "demo", "commands", "cli",
)  # fmt: skip
LAZY_FACADE = PACKAGE / "__init__.py"


def layer_of(parts: tuple[str, ...]) -> str:
    """The layer of a module given by its path inside the package."""
    layer = parts[0].removesuffix(".py")
    assert layer in RANKS, f"star_elastic/{layer} has no rank; add it to RANKS"
    return layer


def imported_modules(file: Path) -> set[str]:
    """Full dotted names of everything a file imports, at the top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write imports in full"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.name))
def test_imports_point_down(file):
    for name in imported_modules(file):
        top, *rest = name.split(".")
        assert top not in {"recipes", "tests", "benchmarks"}, f"{file.name} imports {name}"
        if top == "star_elastic" and rest and file != LAZY_FACADE:
            here = layer_of(file.relative_to(PACKAGE).parts)
            there = layer_of(tuple(rest))
            assert RANKS.index(there) <= RANKS.index(here), f"{here} imports {name}, which is below"


@pytest.mark.parametrize("file", sorted((ROOT / "tests").rglob("*.py")), ids=lambda f: f.name)
def test_tests_share_what_lies_in_support_files(file):
    for name in imported_modules(file):
        assert not any(part.startswith("test_") for part in name.split(".")[:-1]), name


@pytest.mark.parametrize(
    "code",
    [
        "import star_elastic.axes",
        "import star_elastic.cost.amounts",
        "import star_elastic.cost.count",
        "import star_elastic.cost.latency",
        "import star_elastic.architectures",
        "import star_elastic.widths",
        "import star_elastic.cli; sys.argv = ['star-elastic', '--help']; star_elastic.cli.main()",
    ],
)
def test_no_tensor_library_is_loaded(code):
    watch = (
        "import atexit, os, sys\n"
        "heavy = lambda: {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "atexit.register(lambda: heavy() and (print(heavy(), file=sys.stderr), os._exit(9)))\n"
    )
    command = [sys.executable, "-W", "error", "-c", watch + code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# The paper map


def entries() -> list[str]:
    """Every `path.py:name` of the paper map."""
    text = (ROOT / "docs" / "paper_map.md").read_text(encoding="utf-8")
    return re.findall(r"`([\w/.]+\.py:[\w.]+)`", text)


def defined(body: list[ast.stmt], name: str) -> list[ast.stmt] | None:
    """The body of the function or class `name`, or None."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return node.body
    return None


@pytest.mark.parametrize("entry", sorted(set(entries())))
def test_the_paper_map_resolves(entry):
    path, _, dotted = entry.partition(":")
    assert (ROOT / path).is_file(), f"{path} does not exist"
    body: list[ast.stmt] | None = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
    for name in dotted.split("."):
        body = defined(body, name)
        assert body is not None, f"{path} defines no {dotted}"


def test_the_paper_map_leaves_no_row_open():
    rows = re.findall(r"^\|(?!-| formula)(.+)\|$", (ROOT / "docs/paper_map.md").read_text(), re.M)
    assert len(rows) >= 30
    for row in rows:
        assert re.search(r"`[\w/.]+\.py:[\w.]+`", row), f"no code named in: {row}"
