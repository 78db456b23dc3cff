"""The public door: what `squall` exports, sorted, reachable, and what static tools are told of it."""

from __future__ import annotations

import ast
from pathlib import Path

import squall

INIT = Path(squall.__file__)


def test_all_is_sorted_and_has_no_name_twice() -> None:
    assert list(squall.__all__) == sorted(set(squall.__all__))


def test_every_exported_name_can_be_reached() -> None:
    missing = [name for name in squall.__all__ if not hasattr(squall, name)]
    assert missing == []


def test_static_tools_see_every_exported_name() -> None:
    seen = {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(INIT.read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    submodules = {path.stem for path in INIT.parent.glob("*.py")}
    unseen = [name for name in squall.__all__ if name not in seen | submodules and not name.startswith("__")]
    assert unseen == []


def test_exported_objects_have_a_docstring() -> None:
    bare = [name for name in squall.__all__ if not name.startswith("__") and not getattr(squall, name).__doc__]
    assert bare == []


def test_version_is_the_same_here_and_in_the_package() -> None:
    project = (INIT.parents[1] / "pyproject.toml").read_text()
    assert f'\nversion = "{squall.__version__}"\n' in project
