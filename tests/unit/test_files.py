"""Local files on their way into an image."""

from __future__ import annotations

import io
import os
import tarfile
import threading
from pathlib import Path
from typing import Any

import pytest

from squall import FilePatternMatcher, _files
from squall.exception import InvalidError, ResourceExhaustedError


def names(data: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return archive.getnames()


def pack(path: Path, *ignore: str) -> list[str]:
    return names(_files.pack_directory(str(path), _files.read_ignore(list(ignore))))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("a.py", "b.txt", "deep/c.py", "deep/d.txt", "deep/er/e.py", "__pycache__/x.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def test_same_files_give_the_same_bytes_whatever_their_times(tree: Path) -> None:
    before = _files.pack_directory(str(tree), _files.read_ignore(None))
    os.utime(tree / "a.py", (1, 1))
    assert _files.pack_directory(str(tree), _files.read_ignore(None)) == before


def test_executable_stays_executable(tree: Path) -> None:
    before = _files.pack_directory(str(tree), _files.read_ignore(None))
    (tree / "a.py").chmod(0o755)
    assert _files.pack_directory(str(tree), _files.read_ignore(None)) != before


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        (["*.py"], ["__pycache__/x.pyc", "b.txt", "deep/c.py", "deep/d.txt", "deep/er/e.py"]),
        (["**/*.py"], ["__pycache__/x.pyc", "b.txt", "deep/d.txt"]),
        (["deep"], ["__pycache__/x.pyc", "a.py", "b.txt"]),
        (["deep/"], ["__pycache__/x.pyc", "a.py", "b.txt"]),
        (["deep/*/e.py", "__pycache__"], ["a.py", "b.txt", "deep/c.py", "deep/d.txt"]),
        (["**", "!b.txt"], ["b.txt"]),
        (["[ab].*", "**/er", "**/__pycache__"], ["deep/c.py", "deep/d.txt"]),
        (["deep/**"], ["__pycache__/x.pyc", "a.py", "b.txt"]),
        (["deep", "!deep/er"], ["__pycache__/x.pyc", "a.py", "b.txt", "deep/er/e.py"]),
    ],
)
def test_patterns_are_those_of_dockerignore(tree: Path, patterns: list[str], left: list[str]) -> None:
    assert pack(tree, *patterns) == left


def test_function_may_say_what_is_ignored(tree: Path) -> None:
    found = names(_files.pack_directory(str(tree), _files.read_ignore(lambda path: path.suffix == ".py")))
    assert found == ["__pycache__/x.pyc", "b.txt", "deep/d.txt"]


def test_matcher_may_say_what_is_ignored_and_what_is_not(tree: Path) -> None:
    wanted = FilePatternMatcher("deep/**/*.py", "b.txt")
    for ignore in (~wanted, lambda path: not wanted(path)):
        found = names(_files.pack_directory(str(tree), _files.read_ignore(ignore)))
        assert found == ["b.txt", "deep/c.py", "deep/er/e.py"]


def test_clutter_of_python_is_left_out_of_its_source(tree: Path) -> None:
    ignore = _files.read_ignore(["b.txt"], python=True)
    assert "__pycache__/x.pyc" not in names(_files.pack_directory(str(tree), ignore))
    ignore = _files.read_ignore(~FilePatternMatcher("**"), python=True)
    assert "__pycache__/x.pyc" not in names(_files.pack_directory(str(tree), ignore))


@pytest.mark.parametrize("ignore", ["*.py", [3], [""], ["/"]])
def test_what_is_no_pattern_is_refused(ignore: object) -> None:
    with pytest.raises(InvalidError, match="ignore"):
        _files.read_ignore(ignore)  # type: ignore[arg-type]


def test_loops_of_links_end(tree: Path) -> None:
    (tree / "deep/back").symlink_to(tree)
    (tree / "self").symlink_to("self")
    assert len(pack(tree)) == 6


def test_names_with_line_breaks_and_bytes_that_are_no_text_travel(tmp_path: Path) -> None:
    for name in (b"new\nline", b"not-\xff-utf8"):
        (tmp_path / os.fsdecode(name)).touch()
    assert sorted(map(os.fsencode, pack(tmp_path))) == [b"new\nline", b"not-\xff-utf8"]


def test_huge_file_is_refused_without_being_read(tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2 << 30)
    with pytest.raises(ResourceExhaustedError, match="500 MiB") as caught:
        pack(tmp_path)
    assert "huge" in caught.value.message


def test_file_that_has_become_a_pipe_is_refused_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pipe").touch()
    real = os.open

    def turn(path: Any, *args: Any) -> int:
        if str(path).endswith("pipe"):
            os.unlink(path)
            os.mkfifo(path)
        return real(path, *args)

    monkeypatch.setattr(os, "open", turn)
    with pytest.raises(InvalidError, match="it is no file any more"):
        pack(tmp_path)


def test_file_that_changes_while_it_is_packed_is_packed_whole_as_it_was_or_is(tree: Path) -> None:
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            for text in ("short", "long" * 50_000):
                (tree / "b.txt").write_text(text)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(50):
            data = _files.pack_directory(str(tree), _files.read_ignore(None))
            with tarfile.open(fileobj=io.BytesIO(data)) as archive:
                found = {member.name: member.size for member in archive}
            assert (len(found), found["deep/d.txt"]) == (6, len("deep/d.txt"))
    finally:
        stop.set()
        thread.join()


def test_missing_files_and_directories_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match="there is no such file"):
        _files.pack_file(str(tmp_path / "none"), "none")
    with pytest.raises(InvalidError, match="it is a directory"):
        _files.pack_file(str(tmp_path), "x")
    with pytest.raises(InvalidError, match="there is no such directory"):
        pack(tmp_path / "none")
