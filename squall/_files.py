"""Local files on their way into an image: read, filtered, packed as one deterministic tar.

The same files give the same bytes, wherever and whenever packed, so an image's key says what is in it. Links are
followed, but not into a directory that is being read already. A file is read once: what changes meanwhile is packed
as it was or as it is, never half described. Tested in `tests/unit/test_files.py`.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from squall.exception import InvalidError, ResourceExhaustedError
from squall.file_pattern_matcher import FilePatternMatcher

LIMIT_BYTES = 500 << 20
LIMIT_FILES = 90_000
"""A little less than a node takes."""
Ignore = Callable[[Any], bool]
_CLUTTER = ("**/__pycache__", "**/*.pyc", "**/.git", "**/.venv", "**/.mypy_cache", "**/.pytest_cache", "**/.ruff_cache")
"""Left out of Python source, besides what the caller names."""


@dataclass(frozen=True)
class Filter:
    """What is left out of a directory, by paths relative to it."""

    is_ignored: Callable[[str], bool]
    is_pruned: Callable[[str], bool]
    """Of a directory: whether nothing in it is wanted."""


def read_ignore(ignore: Sequence[str] | Ignore | None, *, python: bool = False) -> Filter:
    """From patterns, a matcher, or a function of the path (a `pathlib.Path`) of a file."""
    if isinstance(ignore, (str, bytes)):
        raise InvalidError(f"`ignore={ignore!r:.80}` takes a list of patterns or a function of a path")
    clutter = FilePatternMatcher(*(_CLUTTER if python else ()))
    if isinstance(ignore, FilePatternMatcher):
        matcher = ignore
    elif callable(ignore):
        return _of_function(ignore, clutter)
    else:
        matcher, clutter = FilePatternMatcher(*(_CLUTTER if python else ()), *(ignore or ())), FilePatternMatcher()
    return Filter(
        lambda path: matcher(path) or clutter(path),
        lambda path: (matcher.can_prune_directories() and matcher(path)) or clutter(path),
    )


def _of_function(ignore: Ignore, clutter: FilePatternMatcher) -> Filter:
    from pathlib import Path  # costs 10 ms, and few programs need it

    return Filter(lambda path: ignore(Path(path)) or clutter(path), clutter)


def pack_file(path: str, name: str) -> bytes:
    """A tar that holds one file as `name`."""
    if not os.path.isfile(path):
        what = "it is a directory" if os.path.isdir(path) else "there is no such file"
        raise InvalidError(f"cannot add `{path}` to an image: {what}")
    return _pack([(name, path)], path)


def pack_directory(path: str, ignore: Filter, *, prefix: str = "") -> bytes:
    """A tar of what lies in a directory, or below `prefix` of the tar."""
    if not os.path.isdir(path):
        what = "it is a file" if os.path.exists(path) else "there is no such directory"
        raise InvalidError(f"cannot add `{path}` to an image: {what}")
    found = walk(path, "", ignore, IMAGE, (os.path.realpath(path),))
    return _pack(((f"{prefix}{inner}", file) for inner, file in found), path)


IMAGE = "to be added to an image"
"""What files are read for, as errors say it."""


def walk(
    directory: str, within: str, ignore: Filter, purpose: str, above: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    """Name, `within` a bundle, and path of each file in a directory, sorted. Links are followed; those to what is
    `above`, real paths, are not."""
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise InvalidError(f"cannot read `{directory}`, {purpose}: {error.strerror}") from None
    for name in names:
        path, inner = os.path.join(directory, name), f"{within}{name}"
        try:
            mode = os.stat(path).st_mode
        except OSError:  # a link to nothing or to itself, or gone meanwhile
            continue
        if stat.S_ISDIR(mode):
            real = os.path.realpath(path)
            if real not in above and not ignore.is_pruned(inner):
                yield from walk(path, f"{inner}/", ignore, purpose, (*above, real))
        elif stat.S_ISREG(mode) and not ignore.is_ignored(inner):
            yield inner, path


def _pack(files: Sequence[tuple[str, str]] | Iterator[tuple[str, str]], origin: str) -> bytes:
    import tarfile  # costs 10 ms, and only building an image needs it

    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for count, (name, path) in enumerate(files, 1):
            data = read_regular(path, LIMIT_BYTES - out.tell(), IMAGE)
            if data is None or count > LIMIT_FILES:
                raise ResourceExhaustedError(
                    f"`{origin}` is more than {LIMIT_BYTES >> 20} MiB or {LIMIT_FILES} files, too much for an image; "
                    f"`{path}` is where it was given up",
                    hint="leave large files out with `ignore=[...]`, and fetch them with `run_commands`",
                )
            info = tarfile.TarInfo(os.fsencode(name).decode("utf-8", "surrogateescape"))
            info.size = len(data)
            info.mode = 0o755 if os.access(path, os.X_OK) else 0o644
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def read_regular(path: str, limit: int, purpose: str, hint: str = "") -> bytes | None:
    """A file's bytes, or None when there are more than `limit`; a large one is not even read."""
    try:
        # Not blocking, in case the file has become a pipe since it was listed.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError(None, "it is no file any more")
            if status.st_size > limit:
                return None
            data = file.read(limit + 1)
    except OSError as error:
        raise InvalidError(f"cannot read `{path}`, {purpose}: {error.strerror}", hint=hint) from None
    return data if len(data) <= limit else None
