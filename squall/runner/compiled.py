"""Compiles the modules of a source bundle once, so that no container forked from this zygote has to.

A container's files are its own and gone with it, so each would compile its user's modules anew: 1 to 2 ms for each
hundred lines in a fresh fork. A child of the zygote compiles them instead, while nobody asks for a container; the
zygote keeps the code objects, and every container forked later inherits them. No line of a module is *run* by either.
A module whose bytes are not those that were compiled is loaded as ever, and so is one that does not compile.

Owns that child: what it may read, take and say is bounded, and whatever goes wrong with it is a reason to go without.
Standard library only. Tested in `tests/unit/test_compiled.py`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.machinery as machinery
import io
import marshal
import os
import resource
import signal
import sys
import warnings
from collections.abc import Iterator
from types import CodeType

from squall import _linux

BUNDLE_BYTES = 1 << 20
"""Of source in a bundle. Modules near its top come first, as they are the ones that are imported most."""
BUNDLE_ENTRIES = 4096
RESULT_BYTES = 16 << 20
CPU_SECONDS = 20
MEMORY_BYTES = 1 << 30
"""Beside what it shares with the zygote."""
KEPT_BYTES = 8 << 20
"""Of all bundles together, before the ones that were compiled first are forgotten: each MiB that a zygote has makes a
fork of it 0.2 ms dearer."""

_codes: dict[str, dict[bytes, CodeType]] = {}
"""Path of a module in a container -> its source -> the code."""
used: set[str] = set()
"""Paths of the modules that were imported without being compiled."""


# ---- in containers ----------------------------------------------------------------------------------------------


class _Loader(machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType | None:
        path = self.get_filename(fullname)
        known = _codes.get(path)
        if known is not None:
            with contextlib.suppress(OSError):
                code = known.get(self.get_data(path))
                if code is not None:
                    used.add(path)
                    return code
        return super().get_code(fullname)


_LOADERS = (
    (machinery.ExtensionFileLoader, machinery.EXTENSION_SUFFIXES),
    (_Loader, machinery.SOURCE_SUFFIXES),
    (machinery.SourcelessFileLoader, machinery.BYTECODE_SUFFIXES),
)


def _serve_imports_of(place: str) -> None:
    """Have everything below `place` found as ever, and loaded with what is compiled already."""

    def hook(path: str) -> machinery.FileFinder:
        if path != place and not path.startswith(place + "/"):
            raise ImportError(f"`{path}` is not of a source bundle", path=path)
        return machinery.FileFinder(path, *_LOADERS)

    sys.path_hooks.insert(0, hook)


# ---- in the zygote ----------------------------------------------------------------------------------------------


class Compiler:
    """One bundle at a time. `fd` is readable while there is something to `read`; -1: nothing is under way."""

    def __init__(self, place: str) -> None:
        self.place = place
        """Where containers see their bundle."""
        self.fd = -1
        self._child = 0
        self._data = bytearray()
        self._waiting: list[int] = []
        self._kept: list[tuple[int, list[tuple[str, bytes]]]] = []
        """Of each bundle, the oldest first: how much it takes, and its modules."""

    def begin(self, tree: int) -> None:
        """Compile the bundle whose directory the descriptor `tree` is, which is closed here, after those before it."""
        self._waiting.append(tree)
        self._go_on()

    def _go_on(self) -> None:
        while self._waiting and self.fd < 0:
            self._start(self._waiting.pop(0))

    def _start(self, tree: int) -> None:
        self.fd, out = os.pipe()
        self._data.clear()
        try:
            self._child = os.fork()
            if self._child == 0:
                _be_child(tree, self.place, out)
        except OSError:  # too many processes: containers compile for themselves
            os.close(self.fd)
            self.fd = -1
        finally:
            os.close(tree)
            os.close(out)

    def read(self) -> None:
        """Take in what the child has sent; to be called when `fd` is readable."""
        data = os.read(self.fd, 1 << 20)
        self._data += data
        if data and len(self._data) <= RESULT_BYTES:
            return
        os.kill(self._child, signal.SIGKILL)
        os.waitpid(self._child, 0)
        os.close(self.fd)
        self.fd = -1
        self._keep()
        self._go_on()

    def _keep(self) -> None:
        if not self._kept:
            _serve_imports_of(self.place)
        modules = []
        stream = io.BytesIO(self._data)
        with contextlib.suppress(EOFError, ValueError):  # its last words, when it was killed for what it took
            while True:
                path, source, code = marshal.load(stream)
                _codes.setdefault(path, {})[source] = code
                modules.append((path, source))
        self._kept.append((len(self._data), modules))
        self._data = bytearray()
        while sum(size for size, _ in self._kept) > KEPT_BYTES:
            self._forget(self._kept.pop(0)[1])
        gc.freeze()

    def _forget(self, modules: list[tuple[str, bytes]]) -> None:
        kept = {module for _, modules in self._kept for module in modules}
        for path, source in modules:
            if (path, source) not in kept:
                _codes[path].pop(source, None)


def _be_child(tree: int, place: str, out: int) -> None:
    try:
        _linux.set_parent_death_signal(signal.SIGKILL)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
        warnings.simplefilter("ignore")  # whoever wrote the module sees them in the program that sent it
        with os.fdopen(out, "wb") as stream:
            for path, source in _sources(tree):
                full = f"{place}/{path}"
                with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
                    stream.write(marshal.dumps((full, source, compile(source, full, "exec", dont_inherit=True))))
    finally:
        os._exit(0)


def _sources(tree: int) -> Iterator[tuple[str, bytes]]:
    """The modules below a directory, level by level, as far as they go into the limits. Follows no link."""
    left, entries = BUNDLE_BYTES, 0
    level = [""]
    while level:
        below: list[str] = []
        for directory in level:
            for name, is_directory in _entries(tree, directory):
                entries += 1
                if entries > BUNDLE_ENTRIES:
                    return
                path = f"{directory}/{name}" if directory else name
                if is_directory:
                    below.append(path)
                elif name.endswith(".py"):
                    source = _read(tree, path, left)
                    left -= len(source)
                    if source:
                        yield path, source
        level = below


def _entries(tree: int, directory: str) -> list[tuple[str, bool]]:
    try:
        fd = os.open(directory or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=tree)
    except OSError:
        return []
    try:
        with os.scandir(fd) as found:
            return sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in found)
    finally:
        os.close(fd)


def _read(tree: int, path: str, limit: int) -> bytes:
    """A module's source; nothing when it is longer than `limit`."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=tree)
    except OSError:
        return b""
    with os.fdopen(fd, "rb") as file:
        data = file.read(limit + 1)
    return data if len(data) <= limit else b""
