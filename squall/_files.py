"""Local files on their way into an image: read, filtered, packed as one deterministic tar.

The same files give the same bytes, wherever and whenever packed, so an image's key says what is in it. Links are
followed, but not into a directory that is being read already. A file is read once: what changes meanwhile is packed
as it was or as it is, never half described. Tested in `tests/unit/test_files.py`.
"""

from __future__ import annotations

import fnmatch
import io
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence

from squall.exception import InvalidError, ResourceExhaustedError

LIMIT_BYTES = 500 << 20
LIMIT_FILES = 90_000
"""A little less than a node takes."""
Ignore = Callable[[str], bool]
_CLUTTER = ("**/__pycache__", "**/*.pyc", "**/.git", "**/.venv", "**/.mypy_cache", "**/.pytest_cache", "**/.ruff_cache")
"""Left out of Python source, besides what the caller names."""


def read_ignore(ignore: Sequence[str] | Ignore | None, *, python: bool = False) -> Ignore:
    """A predicate on paths relative to the directory. Patterns are those of `.dockerignore`: `**` spans directories,
    `!` takes back, a pattern without a slash matches at the top."""
    if callable(ignore):
        return ignore
    if isinstance(ignore, (str, bytes)):
        raise InvalidError(f"`ignore={ignore!r:.80}` takes a list of patterns or a function of a path")
    patterns = [*(_CLUTTER if python else ()), *(ignore or ())]
    rules = [(not str(p).startswith("!"), _pattern(p)) for p in patterns]

    def is_ignored(path: str) -> bool:
        verdict = False
        for ignored, pattern in rules:
            if pattern.fullmatch(path):
                verdict = ignored
        return verdict

    return is_ignored


def _pattern(text: object) -> re.Pattern[str]:
    if not isinstance(text, str) or not text.strip("!/ "):
        raise InvalidError(f"`ignore` holds {text!r:.80}, which is no pattern")
    parts = []
    for part in text.removeprefix("!").strip("/ ").split("/"):
        parts.append("(?:.*/)?" if part == "**" else fnmatch.translate(part)[4:-3].replace(".*", "[^/]*") + "/")
    body = "".join(parts)
    body = body[:-1] if body.endswith("/") else f"{body}.*"
    return re.compile(f"{body}(?:/.*)?", re.DOTALL)  # what lies in an ignored directory is ignored


def pack_file(path: str, name: str) -> bytes:
    """A tar that holds one file as `name`."""
    if not os.path.isfile(path):
        what = "it is a directory" if os.path.isdir(path) else "there is no such file"
        raise InvalidError(f"cannot add `{path}` to an image: {what}")
    return _pack([(name, path)], path)


def pack_directory(path: str, ignore: Ignore, *, prefix: str = "") -> bytes:
    """A tar of what lies in a directory, or below `prefix` of the tar."""
    if not os.path.isdir(path):
        what = "it is a file" if os.path.exists(path) else "there is no such directory"
        raise InvalidError(f"cannot add `{path}` to an image: {what}")
    return _pack(_walk(path, "", prefix, ignore, (os.path.realpath(path),)), path)


def _walk(
    directory: str, within: str, prefix: str, ignore: Ignore, above: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise InvalidError(f"cannot read `{directory}`, to be added to an image: {error.strerror}") from None
    for name in names:
        path, inner = os.path.join(directory, name), f"{within}{name}"
        try:
            mode = os.stat(path).st_mode
        except OSError:  # a link to nothing or to itself, or gone meanwhile
            continue
        if stat.S_ISDIR(mode):
            real = os.path.realpath(path)
            if real not in above and not ignore(inner):
                yield from _walk(path, f"{inner}/", prefix, ignore, (*above, real))
        elif stat.S_ISREG(mode) and not ignore(inner):
            yield f"{prefix}{inner}", path


def _pack(files: Sequence[tuple[str, str]] | Iterator[tuple[str, str]], origin: str) -> bytes:
    import tarfile  # costs 10 ms, and only building an image needs it

    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for count, (name, path) in enumerate(files, 1):
            data = _read(path, LIMIT_BYTES - out.tell())
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


def _read(path: str, limit: int) -> bytes | None:
    """A file's bytes, or None when there are more than `limit`; a large one is not even read."""
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size > limit:
                return None
            data = file.read(limit + 1)
    except OSError as error:
        raise InvalidError(f"cannot read `{path}`, to be added to an image: {error.strerror}") from None
    return data if len(data) <= limit else None
