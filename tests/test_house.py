"""The house stands as docs/design.md draws it: the imports between modules, the size of each, and where tests meet."""

from __future__ import annotations

import ast
import functools
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import ROOT

MODULES = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
TESTS = {path.stem: path for path in sorted((ROOT / "tests").glob("*.py"))}

# The house map of docs/design.md: a module imports only modules that stand further down.
ORDER = re.findall(r"^\| `(\w+)\.py` \|", (ROOT / "docs" / "design.md").read_text(), re.MULTILINE)
PREFIXES = ("command", "contract", "guard", "server", "store", "wire")
# The seam to the stores, and the rights of a client. notifyd.py puts the house together.
KNOWN_TO_THE_CORE = {"store", "guard_identity"}

MOST_LINES, FEWEST_LINES = 500, 100
# Why a module is larger, or has a single reader and is smaller.
REASONS = {
    "store_redis_queue": "The operations that wait have rules of their own.",
    "store_redis_bookmarks": "The counterpart of store_sqlite_bookmarks.",
    "schemas": "Every message of the protocol in one place.",
}

# Words of clauses that stand for a noun. In the field's best code they are 2 to 5 of each 1,000 words.
CLAUSE_WORDS = {"what", "whatever", "who", "whom", "whoever", "whose", "which"}
MOST_IN_CODE, MOST_IN_DOCS = 6, 12


@functools.cache
def imports(path: Path, *, for_types: bool = False) -> set[str]:
    """Return the names of the modules that a module imports, also inside its functions."""
    return set(_imports(ast.parse(path.read_text()), for_types))


def _imports(tree: ast.AST, for_types: bool) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif for_types or not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield from _imports(node, for_types)


def lines(name: str) -> int:
    return len(MODULES[name].read_text().splitlines())


def test_every_module_has_a_place() -> None:
    """A module that is added or renamed takes its place in the house map."""
    assert sorted(ORDER) == sorted(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    """No two modules import each other at run time, and each can be read with those below it alone."""
    known = imports(MODULES[name]) & set(MODULES)
    above = set(ORDER[: ORDER.index(name)])
    assert not known & above


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith(PREFIXES) and name != "notifyd"])
def test_the_core_imports_only_the_core(name: str) -> None:
    """It knows no guard, no server, no wire and no particular store, only two seams to them."""
    outside = {other for other in imports(MODULES[name]) if other in MODULES and other.startswith(PREFIXES)}
    assert outside <= KNOWN_TO_THE_CORE


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("wire")])
def test_the_wire_knows_nothing_of_the_hub(name: str) -> None:
    """It imports, of the core, the seams to connections, compression, frames of the log, messages and errors."""
    outside = {one for one in imports(MODULES[name], for_types=True) & set(MODULES) if not one.startswith("wire")}
    assert outside <= {"connection", "streams", "deflate", "log", "schemas", "errors"}


@pytest.mark.parametrize("name", sorted(KNOWN_TO_THE_CORE))
def test_the_seams_of_the_core_know_no_client(name: str) -> None:
    """They import none, even for annotations: a store knows its Node, and the rights are a value."""
    assert not imports(MODULES[name], for_types=True) & {"hub", "admission", "clients", "connection"}


def test_a_module_of_an_odd_size_has_a_reason() -> None:
    """A large one hides a concept, and a small one with a single reader is a page of that reader's."""
    known = {name: imports(path, for_types=True) for name, path in MODULES.items()}
    readers = {name: [other for other in MODULES if name in known[other]] for name in MODULES}
    large = {name for name in MODULES if lines(name) > MOST_LINES}
    small = {name for name in MODULES if lines(name) < FEWEST_LINES and len(readers[name]) == 1}
    assert large | small == set(REASONS)


def comments_and_docstrings(path: Path) -> Iterator[str]:
    source = path.read_text()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def prose_of_page(path: Path) -> str:
    """Return the text without code and without the addresses of links."""
    text = re.sub(r"(?ms)^\s*(```|~~~).*?^\s*\1\s*$", "", path.read_text())
    return re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`\n]*`", "", text))


def clause_words(texts: Iterator[str]) -> float:
    """Return how many of each 1,000 words are such words."""
    words = re.findall(r"[a-z']+", " ".join(texts).lower())
    return 1000 * sum(word in CLAUSE_WORDS for word in words) / len(words)


def test_the_code_names_its_subjects() -> None:
    """Comments and docstrings have nouns in the place of clauses."""
    files = [*ROOT.glob("*.py"), *(ROOT / "deploy").glob("*.py")]
    assert clause_words(text for path in files for text in comments_and_docstrings(path)) < MOST_IN_CODE


def test_the_pages_name_their_subjects() -> None:
    """The README and docs/ have nouns in the place of clauses."""
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert clause_words(map(prose_of_page, files)) < MOST_IN_DOCS


@pytest.mark.parametrize("name", TESTS)
def test_no_module_imports_a_test_module(name: str) -> None:
    """Helpers of several test modules stand in a module without tests."""
    assert not [other for other in imports(TESTS[name]) if other.startswith("test_")]


def test_each_process_collects_the_same_tests(request: pytest.FixtureRequest) -> None:
    """No name of a test depends on the time. The workers of a run compare the names, but collect at about one time."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "--collect-only", "-q"]
    collected = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    assert {item.nodeid for item in request.session.items} <= set(collected.splitlines())


@pytest.mark.slow
def test_the_tests_of_ctrl_c_hold_where_the_run_ignores_it() -> None:
    """The tests of Ctrl+C pass in `make test &` of a shell without job control, which ignores SIGINT."""
    start = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv(sys.executable, sys.argv[1:])"
    )
    tests = ["tests/test_clients.py", "-k", "python_ends_quietly_at_ctrl_c", "-n", "0", "-p", "no:cacheprovider"]
    command = [sys.executable, "-c", start, sys.executable, "-m", "pytest", *tests]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout
