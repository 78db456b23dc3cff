"""The tree itself: sizes, words that do not belong, sleeps, and paths of somebody's machine."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "squall").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
CAP_LINES = 900


def tracked() -> list[Path]:
    """Files under version control; all files where there is none (an unpacked source distribution)."""
    git = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = git.stdout.split("\0") if git.returncode == 0 else [str(p) for p in ROOT.rglob("*") if p.is_file()]
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_is_no_longer_than_the_cap(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= CAP_LINES


def test_no_module_has_a_name_that_says_nothing() -> None:
    empty = {"utils", "util", "helpers", "common", "types", "manager", "misc"}
    assert [str(path) for path in MODULES if path.stem.strip("_") in empty] == []


def test_no_file_names_a_home_of_somebodys_machine() -> None:
    homes = rb"/(home/(?!user\b|me\b|you\b|alice\b)[a-z]\w*|Users/\w+|root/\.\w+)/"
    pattern = re.compile(homes + b"|" + re.escape(bytes(ROOT)) + b"/")
    hits = [str(path.relative_to(ROOT)) for path in tracked() if pattern.search(path.read_bytes())]
    assert hits == []


def test_nothing_is_left_for_later() -> None:
    pattern = re.compile(r"\b(TODO(?!\(#\d+\))|FIXME|XXX)\b|raise NotImplementedError")
    hits = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in MODULES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert hits == []


def sleeps(body: list[ast.stmt]) -> list[int]:
    """Lines of sleeps that are no part of a loop: those in a loop poll for a condition, and nested functions are
    what is tested."""
    found, pending = [], list[ast.AST](body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.While, ast.For, ast.AsyncFor, ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "sleep":
            found.append(node.lineno)
        pending += ast.iter_child_nodes(node)
    return found


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_test_waits_for_a_condition_and_does_not_sleep(path: Path) -> None:
    if path.parent.name == "kernel":
        return
    tests = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test_")
    ]
    assert [line for test in tests for line in sleeps(test.body)] == []
