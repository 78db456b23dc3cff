"""Modules of a bundle are compiled once by a child of the zygote, and imported as ever in every other respect."""

from __future__ import annotations

import importlib
import os
import select
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from squall.runner import compiled


@pytest.fixture
def bundle(tmp_path: Path) -> Iterator[Path]:
    hooks, path, modules = list(sys.path_hooks), list(sys.path), set(sys.modules)
    place = tmp_path / "src"
    place.mkdir()
    yield place
    sys.path_hooks[:], sys.path[:] = hooks, path
    for name in set(sys.modules) - modules:
        del sys.modules[name]
    for known in [known for known in sys.path_importer_cache if known.startswith(str(place))]:
        del sys.path_importer_cache[known]
    compiled._codes.clear()
    compiled.used.clear()


def compile_all(compiler: compiled.Compiler, *trees: Path) -> None:
    for tree in trees:
        compiler.begin(os.open(tree, os.O_PATH | os.O_DIRECTORY))
    deadline = time.monotonic() + 60
    while compiler.fd >= 0:
        assert select.select([compiler.fd], [], [], deadline - time.monotonic())[0], "the child says nothing"
        compiler.read()


def load(place: Path, name: str) -> object:
    sys.path.insert(0, str(place))
    importlib.invalidate_caches()
    return importlib.import_module(name)


def test_what_was_compiled_is_imported_without_being_compiled_again(bundle: Path) -> None:
    (bundle / "pkg").mkdir()
    (bundle / "app_one.py").write_text("from pkg import inner\nVALUE = inner.VALUE + 1\n")
    (bundle / "pkg" / "__init__.py").write_text("'''A package.'''\n")
    (bundle / "pkg" / "inner.py").write_text("VALUE = 41\n")
    compile_all(compiled.Compiler(str(bundle)), bundle)
    module = load(bundle, "app_one")
    assert module.VALUE == 42  # type: ignore[attr-defined]
    names = ("app_one.py", "pkg/__init__.py", "pkg/inner.py")
    assert compiled.used == {f"{bundle}/{name}" for name in names}
    assert module.__file__ == f"{bundle}/app_one.py"  # type: ignore[attr-defined]


def test_code_names_the_file_that_the_container_sees(bundle: Path) -> None:
    (bundle / "app_two.py").write_text("def fail():\n    raise RuntimeError('here')\n")
    compile_all(compiled.Compiler(str(bundle)), bundle)
    module = load(bundle, "app_two")
    assert module.fail.__code__.co_filename == f"{bundle}/app_two.py"  # type: ignore[attr-defined]


def test_a_module_that_has_other_bytes_by_now_is_compiled_as_ever(bundle: Path) -> None:
    (bundle / "app_three.py").write_text("VALUE = 1\n")
    compile_all(compiled.Compiler(str(bundle)), bundle)
    (bundle / "app_three.py").write_text("VALUE = 2\n")
    assert load(bundle, "app_three").VALUE == 2  # type: ignore[attr-defined]
    assert not compiled.used


def test_what_does_not_compile_fails_where_it_is_imported_and_stops_nothing_else(bundle: Path) -> None:
    (bundle / "app_bad.py").write_text("def broken(:\n")
    (bundle / "app_nul.py").write_bytes(b"\0")
    (bundle / "app_deep.py").write_text("x = " + "(" * 5000)
    (bundle / "app_good.py").write_text("VALUE = 3\n")
    compile_all(compiled.Compiler(str(bundle)), bundle)
    assert load(bundle, "app_good").VALUE == 3  # type: ignore[attr-defined]
    assert compiled.used == {f"{bundle}/app_good.py"}
    with pytest.raises(SyntaxError, match="invalid syntax"):
        load(bundle, "app_bad")


def test_nothing_is_run_before_it_is_imported(bundle: Path, tmp_path: Path) -> None:
    (bundle / "app_side.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    compile_all(compiled.Compiler(str(bundle)), bundle)
    assert not (tmp_path / "ran").exists()
    load(bundle, "app_side")
    assert (tmp_path / "ran").exists()


def test_links_and_what_is_no_file_are_not_followed(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.py").write_text("VALUE = 4\n")
    (bundle / "app_link.py").symlink_to(tmp_path / "outside.py")
    os.mkfifo(bundle / "app_pipe.py")
    (bundle / "up").symlink_to(tmp_path)
    compile_all(compiled.Compiler(str(bundle)), bundle)
    assert compiled._codes == {}


def test_source_beyond_the_limit_is_left_to_the_containers(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BUNDLE_BYTES", 100)
    (bundle / "a_big.py").write_text("VALUE = 5\n" * 20)
    (bundle / "b_small.py").write_text("VALUE = 6\n")
    compile_all(compiled.Compiler(str(bundle)), bundle)
    assert list(compiled._codes) == [f"{bundle}/b_small.py"]


def test_a_bundle_of_very_many_files_is_compiled_as_far_as_the_limit_goes(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "BUNDLE_ENTRIES", 3)
    for number in range(6):
        (bundle / f"m{number}.py").write_text("VALUE = 7\n")
    compile_all(compiled.Compiler(str(bundle)), bundle)
    assert sorted(compiled._codes) == [f"{bundle}/m{number}.py" for number in range(3)]


def test_a_child_that_says_too_much_is_ended_and_what_came_whole_is_kept(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bundle / "a.py").write_text("VALUE = 8\n")
    (bundle / "b.py").write_text(f"VALUE = {'x' * 200_000!r}\n")
    monkeypatch.setattr(compiled, "RESULT_BYTES", 100_000)
    compiler = compiled.Compiler(str(bundle))
    compile_all(compiler, bundle)
    assert list(compiled._codes) == [f"{bundle}/a.py"]
    assert compiler.fd == -1


def test_bundles_that_come_together_are_compiled_one_after_the_other(bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (bundle / "app.py").write_text("VALUE = 9\n")
    (other / "app.py").write_text("VALUE = 10\n")
    compile_all(compiled.Compiler(str(bundle)), bundle, other)
    assert set(compiled._codes[f"{bundle}/app.py"]) == {b"VALUE = 9\n", b"VALUE = 10\n"}


def test_the_oldest_bundles_are_forgotten_but_not_what_later_ones_share(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for tree, value in ((bundle, 11), (other, 12)):
        (tree / "same.py").write_text("SHARED = True\n")
        (tree / "own.py").write_text(f"VALUE = {value}\n")
    compiler = compiled.Compiler(str(bundle))
    compile_all(compiler, bundle)
    monkeypatch.setattr(compiled, "KEPT_BYTES", compiler._kept[0][0] + 1)
    compile_all(compiler, other)
    assert set(compiled._codes[f"{bundle}/same.py"]) == {b"SHARED = True\n"}
    assert set(compiled._codes[f"{bundle}/own.py"]) == {b"VALUE = 12\n"}


def test_no_child_and_no_descriptor_is_left(bundle: Path) -> None:
    (bundle / "app.py").write_text("VALUE = 13\n")
    compiler = compiled.Compiler(str(bundle))
    tree = os.open(bundle, os.O_PATH | os.O_DIRECTORY)
    compiler.begin(tree)
    pipe, child = compiler.fd, compiler._child
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(tree)
    while compiler.fd >= 0:
        select.select([compiler.fd], [], [], 60)
        compiler.read()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(pipe)
    with pytest.raises(ChildProcessError):
        os.waitpid(child, os.WNOHANG)


def test_what_takes_too_much_memory_is_left_to_the_containers(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "MEMORY_BYTES", 64 << 20)
    (bundle / "a_good.py").write_text("VALUE = 14\n")
    (bundle / "b_wide.py").write_text("VALUE = (" + "-" * 50 + "x,\n" * 150_000 + ")")
    compile_all(compiled.Compiler(str(bundle)), bundle)
    assert list(compiled._codes) == [f"{bundle}/a_good.py"]
