"""Where a function's source is found, and the bundle that is made of it."""

from __future__ import annotations

import io
import os
import sys
import tarfile
from pathlib import Path

import pytest

from squall import _source
from squall._session import import_ref
from squall._source import IGNORE_FILE, Origin, make_bundle, origin_of
from squall.exception import ResourceExhaustedError
from tests.unit.conftest import SCRIPT

pytestmark = pytest.mark.usefixtures("keep_imports")


def names_in(parts: list[bytes]) -> list[str]:
    names: list[str] = []
    for part in parts:
        with tarfile.open(fileobj=io.BytesIO(part)) as archive:
            names += archive.getnames()
    return names


# ---- origins


def test_module_alone_is_sent_alone(tmp_path: Path) -> None:
    (tmp_path / "alone_ref.py").write_text(SCRIPT)
    (tmp_path / "secrets_beside_it.txt").write_text("not sent")
    import_ref(str(tmp_path / "alone_ref.py"))
    origin = origin_of("alone_ref")
    assert origin == Origin("alone_ref", str(tmp_path), "alone_ref.py")
    assert names_in(make_bundle(origin).parts) == ["alone_ref.py"]


def test_module_in_a_package_is_sent_with_its_whole_top_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("top_ref/__init__.py", "top_ref/sub/__init__.py", "top_ref/sub/mod.py", "top_ref/data.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    import_ref("top_ref.sub.mod", as_module=True)
    origin = origin_of("top_ref.sub.mod")
    assert origin == Origin("top_ref.sub.mod", str(tmp_path), "top_ref")
    assert origin_of("top_ref") == Origin("top_ref", str(tmp_path), "top_ref")
    assert names_in(make_bundle(origin).parts) == [
        "top_ref/__init__.py",
        "top_ref/data.json",
        "top_ref/sub/__init__.py",
        "top_ref/sub/mod.py",
    ]


def test_installed_module_needs_no_source() -> None:
    assert origin_of("pytest") == Origin("pytest")


def test_module_without_a_file_goes_by_value() -> None:
    import types

    sys.modules["made_up_ref"] = types.ModuleType("made_up_ref")
    assert origin_of("made_up_ref") == Origin()
    assert origin_of("not_imported_ref") == Origin()


# ---- bundles


def write_tree(root: Path) -> Path:
    package = root / "tree_ref"
    (package / "__pycache__").mkdir(parents=True)
    (package / ".git").mkdir()
    (package / "inner").mkdir()
    for name in ("__init__.py", "b.py", "a.py", "__pycache__/a.pyc", ".git/config", "old.pyc", "inner/new\nline.txt"):
        (package / name).write_text(name)
    return package


def test_bundle_is_the_same_for_the_same_files_whenever_made(tmp_path: Path) -> None:
    write_tree(tmp_path / "one")
    write_tree(tmp_path / "two")
    os.utime(tmp_path / "two" / "tree_ref" / "a.py", (1, 1))
    one = make_bundle(Origin("tree_ref", str(tmp_path / "one"), "tree_ref"))
    assert one == make_bundle(Origin("tree_ref", str(tmp_path / "two"), "tree_ref"))
    assert names_in(one.parts) == [
        f"tree_ref/{name}" for name in ("__init__.py", "a.py", "b.py", "inner/new\nline.txt")
    ]


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    package = write_tree(tmp_path)
    (package / "inner" / "up").symlink_to(package)
    (package / "inner" / "nowhere").symlink_to("/does/not/exist")
    (package / "linked.py").symlink_to(package / "a.py")
    os.mkfifo(package / "pipe")
    names = names_in(make_bundle(Origin("tree_ref", str(tmp_path), "tree_ref")).parts)
    assert "tree_ref/linked.py" in names
    assert not [name for name in names if "up/" in name or "nowhere" in name or "pipe" in name]


def test_bundle_above_its_limit_is_refused_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(tmp_path)
    origin = Origin("tree_ref", str(tmp_path), "tree_ref")
    monkeypatch.setattr(_source, "BUNDLE_LIMIT_FILES", 2)
    with pytest.raises(ResourceExhaustedError, match=r"tree_ref.*2 files"):
        make_bundle(origin)


def test_an_ignore_file_beside_a_package_says_what_stays_out(tmp_path: Path) -> None:
    package = write_tree(tmp_path)
    (package / "data").mkdir()
    (package / "data" / "large.bin").write_bytes(b"x")
    (tmp_path / IGNORE_FILE).write_text("# not for containers\ntree_ref/data\n**/b.py\n")
    names = names_in(make_bundle(Origin("tree_ref", str(tmp_path), "tree_ref")).parts)
    assert names == [f"tree_ref/{name}" for name in ("__init__.py", "a.py", "inner/new\nline.txt")]


def test_an_edit_changes_one_part_of_a_large_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_source, "PART_BYTES", 8 << 10)
    package = tmp_path / "wide_ref"
    package.mkdir()
    for number in range(200):
        (package / f"file{number:03}.py").write_text(f"# {number}\n" * 100)
    origin = Origin("wide_ref", str(tmp_path), "wide_ref")
    before = make_bundle(origin).parts
    assert len(before) > 10
    (package / "file100.py").write_text("longer than it was\n" * 300)
    (package / "file100b.py").write_text("new")
    after = make_bundle(origin).parts
    assert len(set(after) - set(before)) <= 2
    assert names_in(after) == [f"wide_ref/{path.name}" for path in sorted(package.iterdir())]


def test_a_large_package_is_worth_a_word_that_names_its_largest_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = write_tree(tmp_path)
    origin = Origin("tree_ref", str(tmp_path), "tree_ref")
    assert make_bundle(origin).warning == ""
    monkeypatch.setattr(_source, "WARN_BYTES", 2 << 20)
    (package / "weights.bin").write_bytes(bytes(3 << 20))
    warning = make_bundle(origin).warning
    assert "is 3 MiB, of which `tree_ref/weights.bin` is 3 MiB" in warning
    assert IGNORE_FILE in warning
