"""The house stays small, and a room for each lesson: its budgets, counted.

Which room may import which is held by import-linter, types by mypy; both stand in pyproject.toml.
"""

import ast
import re

import nbformat
import pytest

from helpers.config import PROJECT_DIR
from helpers.runs.lessons import notebooks

MODULE_LINES, FUNCTION_LINES, README_LINES = 350, 40, 150
# These two only ever go down: to 7,000 lines, and to 60 names at most.
PACKAGE_LINES, NAMES_OF_NOTEBOOKS = 9_311, 60

PACKAGE = PROJECT_DIR / "helpers"
MODULES = sorted(PACKAGE.rglob("*.py"))
ROOMS = sorted(path.parent for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE)


@pytest.fixture(params=MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def module(request):
    return request.param


def lines_of(path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def tree_of(path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(tree) -> list:
    return [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def test_the_package_is_small():
    assert sum(map(lines_of, MODULES)) <= PACKAGE_LINES


def test_a_module_holds_one_idea(module):
    assert lines_of(module) <= MODULE_LINES


def test_functions_are_short(module):
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions(tree_of(module))}
    assert {name: length for name, length in lengths.items() if length > FUNCTION_LINES} == {}


def test_an_import_in_a_function_says_why(module):
    """One is there for speed at start, never to dodge a circle; a comment above it says so."""
    lines = module.read_text(encoding="utf-8").splitlines()
    for function in functions(tree_of(module)):
        inside = [
            node for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        if inside:
            first = min(node.lineno for node in inside)
            around = lines[first - 2] + lines[first - 1]
            assert "#" in around, f"{function.name} imports in line {first} without a reason"


@pytest.mark.parametrize("room", ROOMS, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_room_says_what_it_is_for_and_what_it_imports(room):
    text = " ".join((ast.get_docstring(tree_of(room / "__init__.py")) or "").split())
    assert len(text) > 60 and re.search(r"\bimports?\b", text, flags=re.IGNORECASE)


def names_taken(source: str) -> set[str]:
    """What the code takes from helpers: imported names, and attributes of imported modules."""
    tree, modules, taken = ast.parse(source), {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "helpers":
            for name in node.names:
                full = f"{node.module}.{name.name}"
                path = PROJECT_DIR / full.replace(".", "/")
                if path.with_suffix(".py").exists():
                    modules[name.asname or name.name] = full
                else:
                    taken.add(full)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in modules:
                taken.add(f"{modules[node.value.id]}.{node.attr}")
    return taken


def test_notebooks_take_few_names():
    """What they teach stands in them; helpers gives what is beside the lesson."""
    taken = set()
    for path in notebooks():
        cells = nbformat.read(path, as_version=4).cells
        taken |= names_taken("\n".join(c.source for c in cells if c.cell_type == "code"))
    assert len(taken) <= NAMES_OF_NOTEBOOKS, sorted(taken)


def test_the_readme_is_a_page():
    assert lines_of(PROJECT_DIR / "README.md") <= README_LINES
