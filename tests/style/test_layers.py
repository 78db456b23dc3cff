"""The arrows between modules point down only: STYLE of the house, read from the imports by `ast`."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "squall"

FOUNDATION = {"exception", "config", "_clock", "_observe", "_linux"}
ROOMS = {"runner", "node", "server", "ingress"}
SEAMS = {"protocol", "storage"}
TOP = {"cli", "outages", "partitions", "testing"}
LATE = {"engines.ray", "engines.kubernetes", "dashboard"}

MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def module_name(path: Path) -> str:
    """`node.native` for squall/node/native.py."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def room(module: str) -> str:
    """The room a module lives in; a top-level file that is no foundation is a noun of the SDK."""
    if module in LATE:
        return "late"
    head = module.split(".")[0]
    if head in FOUNDATION:
        return "foundation"
    if head in ROOMS | SEAMS | TOP | {"engines"}:
        return head
    return "dashboard" if head == "dashboard" else "sdk"


def allowed(module: str) -> set[str]:
    """The rooms that `module` may import from."""
    where = room(module)
    base = {"foundation"} | SEAMS
    if where == "foundation":
        return {"foundation"}
    if where in SEAMS:
        return {"foundation", where}
    if where in TOP:
        return base | ROOMS | TOP | {"sdk", "engines", "late", "dashboard"}
    if where in ("late", "dashboard"):
        return base | {"engines", where}
    doors = {"runner.loader": {"sdk"}}.get(module, set())
    return base | {where} | doors | ({"engines"} if where == "server" else set())


def imports(path: Path) -> list[tuple[int, str]]:
    """Every absolute name that a file imports, at any depth, with its line."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(node.lineno, name) for name in names]
    return found


def own(name: str) -> str | None:
    """`node.native` for `squall.node.native.create`; None for what is not Squall's, or is its public door."""
    parts = name.split(".")
    if parts[0] != "squall" or len(parts) == 1:
        return None
    for end in range(len(parts), 1, -1):
        inner = parts[1:end]
        if (PACKAGE.joinpath(*inner).with_suffix(".py")).exists() or PACKAGE.joinpath(*inner, "__init__.py").exists():
            return ".".join(inner)
    return None


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_module_imports_only_from_its_own_level_and_below(path: Path) -> None:
    may = allowed(module_name(path))
    wrong = [
        f"{path.name}:{line} imports `{name}` ({room(target)})"
        for line, name in imports(path)
        if (target := own(name)) is not None and room(target) not in may
    ]
    assert wrong == []


FOREIGN = {
    "foundation": {"tomli"},
    "protocol": {"cloudpickle", "msgspec"},
    "sdk": {"cloudpickle"},
    "runner": {"cloudpickle"},
}
OPTIONAL = {"_output": {"rich"}}
"""What a module of the SDK does without where it is not installed; a container never comes to need it."""


@pytest.mark.parametrize("path", [p for p in MODULES if room(module_name(p)) in FOREIGN], ids=module_name)
def test_module_that_a_container_loads_needs_the_standard_library_only(path: Path) -> None:
    # `typing_extensions` is met under TYPE_CHECKING only: `test_import_weight.py` would see it if it were loaded.
    free = {"squall", "__future__", "tomllib", "typing_extensions"} | set(sys.stdlib_module_names)
    may = FOREIGN[room(module_name(path))] | OPTIONAL.get(module_name(path), set()) | free
    wrong = [f"{path.name}:{line} imports `{name}`" for line, name in imports(path) if name.split(".")[0] not in may]
    assert wrong == []
