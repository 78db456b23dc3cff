"""Compiling an image's packages: what is compiled runs, comes from the cache the second time, and never fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from squall.runner import bytecode


@pytest.fixture
def site(tmp_path: Path) -> Path:
    package = tmp_path / "site-packages/package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("VALUE = 42\n")
    (package / "broken.py").write_text("def (\n")
    (package / "latin.py").write_bytes(b"VALUE = '\xff'\n")
    return tmp_path / "site-packages"


def run(site: Path, cache: Path) -> None:
    bytecode.compile_all(list(bytecode.sources([str(site)])), str(cache))


def compiled(site: Path) -> list[str]:
    return sorted(path.name.split(".")[0] for path in site.rglob("*.pyc"))


def test_what_compiles_is_compiled_and_the_rest_left(site: Path, tmp_path: Path) -> None:
    run(site, tmp_path / "cache")
    assert compiled(site) == ["__init__"]


def test_compiled_module_is_imported_without_its_source_being_looked_at(site: Path, tmp_path: Path) -> None:
    run(site, tmp_path / "cache")
    (site / "package/__init__.py").write_text("VALUE = 43\n")
    program = f"import sys; sys.path.insert(0, {str(site)!r}); import package; print(package.VALUE)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "42\n"


def test_second_time_comes_from_the_cache(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(site, tmp_path / "cache")
    for path in site.rglob("*.pyc"):
        path.unlink()
    (site / "package/broken.py").unlink()
    (site / "package/latin.py").unlink()
    monkeypatch.setattr(bytecode, "_compile", lambda *_: pytest.fail("it was compiled again"))
    run(site, tmp_path / "cache")
    assert compiled(site) == ["__init__"]


def test_what_is_compiled_already_is_passed_over(site: Path, tmp_path: Path) -> None:
    run(site, tmp_path / "cache")
    assert sorted(Path(source).name for source, _ in bytecode.sources([str(site)])) == ["broken.py", "latin.py"]
