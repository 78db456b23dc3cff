"""Where a function's source is, and what of it a container gets: a module alone, or the whole package it is in.

Owns the source bundle: tars that are the same bytes for the same files, so that their digests name them and only what
has changed is sent. What a `.squallignore` beside a package names stays out. Must never import the module it looks at,
nor send anything. Tested in `tests/unit/test_source.py`.
"""

from __future__ import annotations

import io
import os
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from squall.exception import InvalidError, ResourceExhaustedError

if TYPE_CHECKING:
    from squall._files import Filter

IGNORE_FILE = ".squallignore"
BUNDLE_LIMIT_BYTES = 256 << 20
BUNDLE_LIMIT_FILES = 20_000
WARN_BYTES = 16 << 20
"""A package above this is worth a word: its data may have come along by mistake."""
PART_BYTES = 1 << 20
"""Parts are about as large, and a bundle below this has one."""
PART_LIMIT_BYTES = 16 << 20
PART_ODDS = 4
"""Once it is as large, every so many files a part ends."""
PURPOSE = "part of your app's source"
_IGNORED = frozenset(
    {
        "__pycache__",
        ".git",
        ".hg",
        ".svn",
        ".venv",
        ".mypy_cache",
        ".ruff_cache",
        ".pytest_cache",
        ".ipynb_checkpoints",
        "node_modules",
    }
)


def checked_module_name(stem: str, path: str) -> str:
    """The import name of a script; a script may not hide a module that Python, or Squall, needs itself."""
    loaded = sys.modules.get(stem)
    taken = stem in sys.stdlib_module_names or (
        loaded is not None and os.path.abspath(getattr(loaded, "__file__", None) or "") != path
    )
    if taken or stem == "squall":
        raise InvalidError(f"cannot run `{path}`: `{stem}` is the name of another module", hint="rename the file")
    if "." in stem:
        raise InvalidError(f"cannot run `{path}`: a dot in its name cannot be imported", hint="rename the file")
    return stem


@dataclass(frozen=True)
class Origin:
    """Where a module can be found: its import name in the container, and what of the disk must go there.

    `root` is the directory that becomes `/src` and `entry` what of it is sent, a file or a package's directory. An
    empty `entry` means that the image has the module already. `module` is empty where no source file exists.
    """

    module: str = ""
    root: str = ""
    entry: str = ""
    is_main: bool = False


def origin_of(module_name: str) -> Origin:
    """Where the module a function was defined in comes from."""
    module = sys.modules.get(module_name)
    file = getattr(module, "__file__", None)
    is_main = module_name == "__main__"
    if is_main:
        spec = getattr(module, "__spec__", None)
        if spec is not None and spec.name and file:  # python -m pkg.mod
            module_name = spec.name
        elif file:
            module_name = os.path.splitext(os.path.basename(file))[0]
    if module is None or not file or not os.path.isfile(file):
        return Origin()
    path = os.path.abspath(file)
    if _is_installed(path):
        return Origin(module_name, is_main=is_main)
    if not path.endswith(".py"):
        return Origin()
    top = module_name.partition(".")[0]
    if "." not in module_name and os.path.basename(path) != "__init__.py":
        if is_main:
            checked_module_name(module_name, path)
        return Origin(module_name, os.path.dirname(path), os.path.basename(path), is_main)
    depth = module_name.count(".") + (1 if os.path.basename(path) == "__init__.py" else 0)
    root = path
    for _ in range(depth + 1):
        root = os.path.dirname(root)
    return Origin(module_name, root, top, is_main)


def _is_installed(path: str) -> bool:
    """Whether `path` belongs to the Python environment, which every container on `Image.host()` sees."""
    return any(path.startswith(os.path.join(os.path.abspath(prefix), "lib") + os.sep) for prefix in _PREFIXES)


_PREFIXES = (sys.prefix, sys.base_prefix)


# ---- bundles ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bundle:
    """A module's or package's source as tars: one, or several that together are it."""

    parts: list[bytes]
    warning: str = ""


_File = tuple[str, bytes, int]
"""Name in the bundle, content, mode."""


def make_bundle(origin: Origin) -> Bundle:
    """The source of a module or package: the same bytes for the same files, wherever and whenever made."""
    files: list[_File] = []
    total, largest = 0, (0, "")
    for name, path in _files_of(origin):
        data = _read_source(origin, path)
        total += len(data) + 1024
        files.append((name, data, 0o755 if os.access(path, os.X_OK) else 0o644))
        if total > BUNDLE_LIMIT_BYTES or len(files) > BUNDLE_LIMIT_FILES:
            raise _too_large(origin, path)
        largest = max(largest, (len(data), name))
    parts = [_tar(part) for part in _cut(files)]
    return Bundle(parts, _warning(origin, total, *largest) if total > WARN_BYTES else "")


def _cut(files: list[_File]) -> Iterator[list[_File]]:
    """Parts of a bundle. They end where a file's name says so, and not only where their size would: an edit changes the
    part it is in, while those after it stay what they were and need not be sent again."""
    part: list[_File] = []
    size = 0
    for file in files:
        ends = size >= PART_BYTES and zlib.crc32(file[0].encode()) % PART_ODDS == 0
        if part and (ends or size + len(file[1]) > PART_LIMIT_BYTES):
            yield part
            part, size = [], 0
        part.append(file)
        size += len(file[1]) + 1024
    yield part


def _tar(files: list[_File]) -> bytes:
    import tarfile  # costs 10 ms, and only starting an app needs it

    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data, mode in files:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), mode
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _warning(origin: Origin, total: int, size: int, name: str) -> str:
    return (
        f"the source in `{os.path.join(origin.root, origin.entry)}` is {total >> 20} MiB, of which `{name}` is "
        f"{size >> 20} MiB; a `{IGNORE_FILE}` beside it says what to leave out"
    )


def _files_of(origin: Origin) -> Iterator[tuple[str, str]]:
    """Name in the bundle and path of each file, sorted; links are followed, a link to a parent is not."""
    from squall._files import walk

    start = os.path.join(origin.root, origin.entry)
    if os.path.isfile(start):
        yield origin.entry, start
        return
    yield from walk(start, f"{origin.entry}/", _ignore_of(origin.root), PURPOSE, (os.path.realpath(start),))


def _ignore_of(root: str) -> Filter:
    """What stays out: clutter, and what the ignore file beside a package names; its patterns begin at its directory."""
    from squall._files import Filter, read_ignore
    from squall.file_pattern_matcher import FilePatternMatcher

    path = os.path.join(root, IGNORE_FILE)
    if not os.path.isfile(path):
        return Filter(_is_clutter, _is_clutter)
    named = read_ignore(FilePatternMatcher.from_file(path))
    return Filter(
        lambda name: _is_clutter(name) or named.is_ignored(name),
        lambda name: _is_clutter(name) or named.is_pruned(name),
    )


def _is_clutter(name: str) -> bool:
    last = name.rpartition("/")[2]
    return last in _IGNORED or last.endswith((".pyc", ".pyo"))


def _read_source(origin: Origin, path: str) -> bytes:
    from squall._files import read_regular

    hint = "make it readable, or leave the source out with `include_source=False`"
    data = read_regular(path, BUNDLE_LIMIT_BYTES, PURPOSE, hint)
    if data is None:
        raise _too_large(origin, path)
    return data


def _too_large(origin: Origin, at: str) -> ResourceExhaustedError:
    path = os.path.join(origin.root, origin.entry)
    return ResourceExhaustedError(
        f"the source in `{path}` is more than {BUNDLE_LIMIT_BYTES >> 20} MiB or {BUNDLE_LIMIT_FILES} files; "
        f"`{at}` is where it was given up",
        hint=f"keep data out of the package's directory, or name it in a `{IGNORE_FILE}` beside the package",
    )
