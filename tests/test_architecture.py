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
# Rooms of one line are siblings: each may import itself and what stands in the lines before.
LAYERS = (
    {"bundled", "errors", "progress", "recent", "tables"},
    {"files", "strict", "signals"},
    {"axes"},
    {"architectures", "quant", "nesting", "cost"},
    {"checkpoints", "data"},
    {"models", "importance", "router", "export"},
    {"rewrite", "generate"},
    {"measure"},
    {"train", "evaluate"},
    {"report"},
    {"demo"},
    {"cli", "families", "manifest", "widths"},
)
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}
LAZY_FACADE = PACKAGE / "__init__.py"


def room_of(parts: tuple[str, ...]) -> str:
    """The room of a module given by its path inside the package."""
    room = parts[0].removesuffix(".py")
    assert room in RANK, f"star_elastic/{room} is in no layer; add it to LAYERS"
    return room


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
    """Neither up nor to a sibling."""
    for name in imported_modules(file):
        top, *rest = name.split(".")
        assert top not in {"recipes", "tests", "benchmarks"}, f"{file.name} imports {name}"
        if top == "star_elastic" and rest and file != LAZY_FACADE:
            here = room_of(file.relative_to(PACKAGE).parts)
            there = room_of(tuple(rest))
            assert here == there or RANK[there] < RANK[here], f"{here} imports {name}"


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
        "import star_elastic.axes.widths",
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


def named_files() -> list[tuple[str, str]]:
    """Every file of code that a page names, as (page, path); of the page on tests folders, too."""
    tests = ROOT / "tests" / "README.md"
    named = set()
    for page in (ROOT / "README.md", tests, *(ROOT / "docs").glob("*.md")):
        ending = r"\.py|/" if page == tests else r"\.py"
        paths = re.findall(rf"`([\w./]+?(?:{ending}))(?::[\w.]+)?`", page.read_text("utf-8"))
        named |= {(str(page.relative_to(ROOT)), path) for path in paths}
    return sorted(named)


@pytest.mark.parametrize(("page", "path"), named_files())
def test_pages_name_files_that_there_are(page, path):
    """From the root, the package or the tests on; a file of an architecture by its name alone."""
    places = (ROOT, ROOT / "star_elastic", ROOT / "tests", ROOT / "star_elastic" / "architectures")
    assert any((place / path).exists() for place in places), f"{page}: there is no {path}"


def test_the_paper_map_leaves_no_row_open():
    rows = re.findall(r"^\|(?!-| formula)(.+)\|$", (ROOT / "docs/paper_map.md").read_text(), re.M)
    assert len(rows) >= 30
    for row in rows:
        assert re.search(r"`[\w/.]+\.py:[\w.]+`", row), f"no code named in: {row}"
