"""FilePatternMatcher: which files of a directory are meant, by the patterns of a `.dockerignore`.

Owns the meaning of patterns, for `ignore=` of images and for whoever else picks files. Looks at paths as text only,
never at the disk, but for the file of patterns itself. Tested in `tests/unit/test_file_pattern_matcher.py`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from squall.exception import InvalidError

if TYPE_CHECKING:
    from pathlib import Path


class FilePatternMatcher:
    """Says of a path whether patterns as in `.dockerignore` mean it; for the `ignore=` of `Image.add_local_dir`.

    - `*` stands for any text and `?` for one letter, both within one name; `**` for any number of directories; `[a-c]`
      for one of these letters and `[^a-c]` for one that is none of them; a backslash takes the next letter as it is.
    - Patterns begin at the top of the directory: `*.py` means those at the top only, `**/*.py` all.
    - A pattern that means a directory means all that lies in it.
    - `!` before a pattern takes back what earlier ones have meant; the last one that fits decides.

    `~matcher` means exactly what `matcher` does not, such as all but Python files.

    Raises InvalidError for what is no pattern.

    Example:

        matcher = squall.FilePatternMatcher("**/*.py", "!tests")
        assert matcher("pkg/module.py") and not matcher("tests/test_module.py")
        assert (~squall.FilePatternMatcher("**/*.py"))("data.csv")
    """

    def __init__(self, *pattern: str) -> None:
        self._patterns: Sequence[str] = pattern
        self._file = ""
        self._is_inverted = False
        self._rules: list[tuple[bool, re.Pattern[str]]] | None = _rules(pattern)

    @classmethod
    def from_file(cls, file_path: str | Path) -> FilePatternMatcher:
        """Patterns from a file, one a line; blank lines and those that begin with `#` mean nothing.

        It is read when the first path is asked for, so the file need not exist in containers. Raises InvalidError then.

        Example:

            from pathlib import Path

            Path(".dockerignore").write_text("# large\\n**/*.bin\\n")
            image = squall.Image.debian_slim("3.11").add_local_dir(
                "data", "/data", ignore=squall.FilePatternMatcher.from_file(".dockerignore")
            )
        """
        matcher = cls()
        matcher._file, matcher._rules = os.path.abspath(os.fspath(file_path)), None
        return matcher

    def __invert__(self) -> FilePatternMatcher:
        other = FilePatternMatcher()
        other._patterns, other._file, other._rules = self._patterns, self._file, self._rules
        other._is_inverted = not self._is_inverted
        return other

    def __call__(self, file_path: str | Path) -> bool:
        """Whether this path, relative to the directory, is meant."""
        path = os.path.normpath(os.fspath(file_path))
        verdict = False
        for means, pattern in self._read():
            if pattern.fullmatch(path):
                verdict = means
        return verdict != self._is_inverted

    def can_prune_directories(self) -> bool:
        """Whether nothing in a directory that is meant can be otherwise."""
        return not self._is_inverted and all(means for means, _ in self._read())

    def _read(self) -> list[tuple[bool, re.Pattern[str]]]:
        if self._rules is None:
            self._patterns = _lines(self._file)
            self._rules = _rules(self._patterns)
        return self._rules

    def __repr__(self) -> str:
        said = f".from_file({self._file!r})" if self._file else f"({', '.join(map(repr, self._patterns))})"
        return f"{'~' if self._is_inverted else ''}FilePatternMatcher{said}"


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [line.strip() for line in file if not line.startswith("#")]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidError(f"cannot read the patterns in `{path}`: {error}") from None
    return [line for line in lines if line]


def _rules(patterns: Sequence[Any]) -> list[tuple[bool, re.Pattern[str]]]:
    return [(not str(pattern).strip().startswith("!"), _compiled(pattern)) for pattern in patterns]


def _compiled(pattern: object) -> re.Pattern[str]:
    text = pattern.strip().removeprefix("!").strip() if isinstance(pattern, str) else ""
    text = os.path.normpath(text).lstrip("/") if text else ""
    try:
        if text and text != "." and "\0" not in text:
            # What lies in a directory that is meant is meant.
            return re.compile(f"{_translated(text)}(?:/.*)?", re.DOTALL)
        why = ""
    except re.error as error:
        why = f": {error}"
    raise InvalidError(f"`ignore` holds {pattern!r:.80}, which is no pattern{why}")


_TOKEN = re.compile(r"\*\*/?|\*|\?|\\.|\[[!^]?\]?[^\]]*\]|.", re.DOTALL)


def _translated(text: str) -> str:
    """A pattern as a regular expression."""
    parts = []
    for found in _TOKEN.finditer(text):
        token = found[0]
        is_last = found.end() == len(text)
        special = _SPECIAL.get(token[:2] if token.startswith("**") else token)
        if special is not None:
            parts.append(special(is_last))
        elif token.startswith("["):
            if token == "[":
                raise re.error("a `[` has no `]`")
            inner = token[1:-1].replace("\\", "\\\\").replace("[", "\\[")
            parts.append(f"[{'^' + inner[1:] if inner[:1] in '!^' else inner}]")
        else:
            parts.append(re.escape(token[1:] if len(token) > 1 else token))
    return "".join(parts)


_SPECIAL: dict[str, Callable[[bool], str]] = {
    "**": lambda is_last: ".*" if is_last else "(?:.*/)?",
    "*": lambda _: "[^/]*",
    "?": lambda _: "[^/]",
}

NON_PYTHON_FILES = ~FilePatternMatcher("**/*.py")
"""All but Python source."""
