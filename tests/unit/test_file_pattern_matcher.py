"""What patterns mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from squall import FilePatternMatcher
from squall.exception import InvalidError
from squall.file_pattern_matcher import NON_PYTHON_FILES


@pytest.mark.parametrize(
    ("patterns", "path", "means"),
    [
        (["*.py"], "a.py", True),
        (["*.py"], "deep/a.py", False),
        (["**/*.py"], "a.py", True),
        (["**/*.py"], "very/deep/a.py", True),
        (["**"], ".hidden/x", True),
        (["deep"], "deep/er/file", True),
        (["deep/"], "deep/file", True),
        (["/deep"], "deep/file", True),
        (["./deep/../other"], "other", True),
        (["deep"], "deeper", False),
        (["deep/**"], "deep/er/file", True),
        (["a/**/z"], "a/z", True),
        (["a/**/z"], "a/b/c/z", True),
        (["a/**/z"], "ab/z", False),
        (["a?c"], "abc", True),
        (["a?c"], "a/c", False),
        (["a*c"], "a/c", False),
        (["[a-c].txt"], "b.txt", True),
        (["[^a-c].txt"], "b.txt", False),
        (["[!a-c].txt"], "d.txt", True),
        ([r"\*.py"], "*.py", True),
        ([r"\*.py"], "a.py", False),
        (["a.b"], "axb", False),
        (["a(b)+{c}|$"], "a(b)+{c}|$", True),
        (["*", "!keep.txt"], "keep.txt", False),
        (["*", "!keep", "keep/not"], "keep/this", False),
        (["*", "!keep", "keep/not"], "keep/not/this", True),
        (["new*"], "new\nline", True),
        (["  spaced  "], "spaced", True),
        ([], "anything", False),
    ],
)
def test_pattern_means(patterns: list[str], path: str, means: bool) -> None:
    matcher = FilePatternMatcher(*patterns)
    assert matcher(path) is matcher(Path(path)) is means
    assert (~matcher)(path) is not means
    assert (~~matcher)(path) is means


@pytest.mark.parametrize("pattern", ["", "!", "/", ".", "[a", "a\0b", "[z-a]", 3, None])
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(InvalidError, match="which is no pattern"):
        FilePatternMatcher(pattern)


def test_patterns_come_from_a_file_when_they_are_first_needed(tmp_path: Path) -> None:
    file = tmp_path / "ignored"
    matcher = FilePatternMatcher.from_file(file)
    file.write_text("# a comment\n\n*.bin\n!small.bin\r\n")
    assert matcher("large.bin")
    assert not (~matcher)("large.bin")
    assert not matcher("small.bin")


def test_missing_file_of_patterns_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match="no-such-file"):
        FilePatternMatcher.from_file(tmp_path / "no-such-file")("a")


def test_directories_are_pruned_only_where_nothing_in_them_can_be_meant_otherwise() -> None:
    assert FilePatternMatcher("deep").can_prune_directories()
    assert not FilePatternMatcher("deep", "!deep/file").can_prune_directories()
    assert not (~FilePatternMatcher("deep")).can_prune_directories()


def test_all_but_python_source_has_a_name() -> None:
    assert NON_PYTHON_FILES("data.csv")
    assert not NON_PYTHON_FILES("deep/module.py")


def test_matcher_can_be_read() -> None:
    assert repr(~FilePatternMatcher("*.py", "!a.py")) == "~FilePatternMatcher('*.py', '!a.py')"
