"""Container output as it is kept: append-only segments per app, within limits of days, bytes and free disk.

A record is one line `at container_id function stream length` and then that many raw bytes. A segment that is full is
closed and the next one begun; the oldest are deleted when an app, or all together, have more than they may, and when
the disk has less room than is left to others. What cannot be written is dropped, counted and told of once there is room
again: output never fills a disk and never fails a call. A crash may lose the last records and cut one off, which
ends its segment: an earlier life's segment is never appended to. Who reads is `reading`. Tested in
`tests/unit/test_logs.py`.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from squall._observe import Logger, count

log = Logger("server")

SEGMENT_BYTES = 8 << 20
BUFFER_BYTES = 64 << 10
ROOM_CHECK_BYTES = 1 << 20
"""How much is written between two looks at the room on the disk."""
ROOM_RETRY_S = 1.0
HEAD_LIMIT_BYTES = 4096
NOBODY = "-"
"""Stands for no container and no function in a record's head."""


class Record(NamedTuple):
    at: float
    container_id: str
    function: str
    stream: str
    """`stdout`, `stderr`, or `system` for what the platform has to say."""
    data: bytes


@dataclass(frozen=True)
class Limits:
    """What may be kept."""

    days: float = 30.0
    app_bytes: int = 256 << 20
    total_bytes: int = 4 << 30
    free_bytes: int = 256 << 20
    """Room on the disk that is left to others."""


@dataclass(frozen=True)
class Segment:
    """One file of an app's output; `number` counts them, over all lives of the server."""

    number: int
    path: Path


@dataclass
class _Closed:
    app_id: str
    path: Path
    size: int


class Logs:
    def __init__(self, directory: Path, limits: Limits | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.directory = directory
        self.limits = limits or Limits()
        self._open: dict[str, _Writer] = {}
        self._closed: deque[_Closed] = deque()
        """The oldest first."""
        self._kept: dict[str, int] = {}
        """App id -> bytes of its closed segments."""
        self._total = 0
        self._unchecked = ROOM_CHECK_BYTES
        """Bytes written since the room on the disk was looked at."""
        self._full_until = 0.0
        self._lost: dict[str, int] = {}
        """App id -> bytes that were dropped and not told of yet."""
        self._wakers: dict[str, list[Callable[[], None]]] = {}
        _adopt_older_files(directory)
        self._load()

    def _load(self) -> None:
        found = []
        for path in self.directory.glob("*/*.log"):
            status = path.stat()
            found.append((status.st_mtime, _Closed(path.parent.name, path, status.st_size)))
        for _, closed in sorted(found, key=lambda pair: (pair[0], pair[1].path)):
            self._add_closed(closed)

    def _add_closed(self, closed: _Closed) -> None:
        self._closed.append(closed)
        self._kept[closed.app_id] = self._kept.get(closed.app_id, 0) + closed.size
        self._total += closed.size

    # -- writing

    def append(self, app_id: str, record: Record) -> None:
        if not self._has_room(record):
            self._drop(app_id, record)
            return
        if app_id in self._lost:
            self._tell_lost(app_id, record)
        if not self._write(app_id, record):
            self._drop(app_id, record)
        for wake in self._wakers.pop(app_id, ()):
            wake()

    def _write(self, app_id: str, record: Record) -> bool:
        try:
            writer = self._open.get(app_id)
            if writer is None:
                writer = self._open[app_id] = _Writer(self._next_path(app_id))
            elif writer.size > SEGMENT_BYTES:
                self._close(app_id)
                writer = self._open[app_id] = _Writer(self._next_path(app_id))
                self._shrink(app_id)
            writer.append(record)
        except OSError as error:
            self._full(record.at, str(error))
            return False
        self._unchecked += len(record.data)
        return True

    def _has_room(self, record: Record) -> bool:
        if record.at < self._full_until < record.at + 2 * ROOM_RETRY_S:  # else the clock was set back
            return False
        if self._unchecked < ROOM_CHECK_BYTES:
            return True
        self._unchecked = 0
        while (free := shutil.disk_usage(self.directory).free) < self.limits.free_bytes:
            if not self._closed:
                self._full(
                    record.at, f"{free >> 20} MiB are free, {self.limits.free_bytes >> 20} MiB are left to others"
                )
                return False
            self._remove_oldest()
        return True

    def _full(self, at: float, reason: str) -> None:
        if not self._lost:
            log.error("output of containers cannot be kept and is dropped", reason=reason)
        self._full_until = at + ROOM_RETRY_S
        self._unchecked = ROOM_CHECK_BYTES

    def _drop(self, app_id: str, record: Record) -> None:
        self._lost[app_id] = self._lost.get(app_id, 0) + len(record.data)
        count("log_bytes_dropped", len(record.data))

    def _tell_lost(self, app_id: str, record: Record) -> None:
        text = f"[{self._lost[app_id]} bytes of output were not kept: the disk was full]\n"
        if self._write(app_id, Record(record.at, record.container_id, record.function, "system", text.encode())):
            del self._lost[app_id]

    def flush(self) -> None:
        """Write out what is buffered. Raises nothing: what a full disk does not take is counted."""
        for app_id in self._open:
            self.flush_app(app_id)

    def flush_app(self, app_id: str) -> None:
        writer = self._open.get(app_id)
        if writer is None:
            return
        waiting = writer.waiting
        try:
            writer.flush()
        except OSError as error:
            self._lost[app_id] = self._lost.get(app_id, 0) + waiting
            count("log_bytes_dropped", waiting)
            log.error("output of containers cannot be kept and is dropped", reason=str(error))

    def close_app(self, app_id: str) -> None:
        if app_id in self._open:
            self._close(app_id)
            self._shrink(app_id)
        self._lost.pop(app_id, None)
        for wake in self._wakers.pop(app_id, ()):
            wake()

    def _close(self, app_id: str) -> None:
        self.flush_app(app_id)
        writer = self._open.pop(app_id)
        writer.close()
        self._add_closed(_Closed(app_id, writer.path, writer.size))

    def close(self) -> None:
        for app_id in list(self._open):
            self.close_app(app_id)

    def _next_path(self, app_id: str) -> Path:
        directory = self.directory / app_id
        directory.mkdir(exist_ok=True, mode=0o700)
        numbers = [int(path.stem) for path in directory.glob("*.log") if path.stem.isdigit()]
        return directory / f"{max(numbers, default=-1) + 1:010d}.log"

    # -- retention

    def _shrink(self, app_id: str) -> None:
        while self._kept.get(app_id, 0) > self.limits.app_bytes:
            self._remove(next(closed for closed in self._closed if closed.app_id == app_id))
        while self._total > self.limits.total_bytes and self._closed:
            self._remove_oldest()

    def prune(self, now: float) -> None:
        """Delete segments that were last written to longer ago than output is kept (seconds of the wall clock)."""
        older_than = now - self.limits.days * 86400
        for closed in list(self._closed):
            if modified(closed.path) < older_than:
                self._remove(closed)

    def _remove_oldest(self) -> None:
        self._remove(self._closed[0])

    def _remove(self, closed: _Closed) -> None:
        closed.path.unlink(missing_ok=True)
        self._closed.remove(closed)
        self._total -= closed.size
        self._kept[closed.app_id] -= closed.size
        if self._kept[closed.app_id] <= 0 and closed.app_id not in self._open:
            del self._kept[closed.app_id]
            shutil.rmtree(closed.path.parent, ignore_errors=True)

    def remove(self, app_id: str) -> None:
        """Delete all that is kept of one."""
        self.close_app(app_id)
        for closed in [closed for closed in self._closed if closed.app_id == app_id]:
            self._remove(closed)

    # -- for readers

    def segments(self, app_id: str) -> list[Segment]:
        """What is kept of an app, the oldest first; all that was appended is in these files now."""
        self.flush_app(app_id)
        paths = sorted((self.directory / app_id).glob("*.log"))
        return [Segment(int(path.stem), path) for path in paths if path.stem.isdigit()]

    def wake_on_append(self, app_id: str, wake: Callable[[], None]) -> None:
        """Call `wake` once, when more comes or the app is closed. Taken back by `forget_waker`."""
        self._wakers.setdefault(app_id, []).append(wake)

    def forget_waker(self, app_id: str, wake: Callable[[], None]) -> None:
        wakers = self._wakers.get(app_id, [])
        if wake in wakers:
            wakers.remove(wake)
        if not wakers:
            self._wakers.pop(app_id, None)

    def usage(self) -> tuple[int, int]:
        """Bytes kept, and files."""
        open_bytes = sum(writer.size for writer in self._open.values())
        return self._total + open_bytes, len(self._closed) + len(self._open)


class _Writer:
    """The segment that is written to. What a full disk took by half is taken back, so that records stay whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._written = os.fstat(self._fd).st_size
        self._parts: list[bytes] = []
        self.waiting = 0

    @property
    def size(self) -> int:
        return self._written + self.waiting

    def append(self, record: Record) -> None:
        head = (
            f"{record.at:.6f} {record.container_id or NOBODY} {record.function or NOBODY} {record.stream} "
            f"{len(record.data)}\n"
        ).encode()
        self._parts += (head, record.data)
        self.waiting += len(head) + len(record.data)
        if self.waiting >= BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        data, self._parts, self.waiting = b"".join(self._parts), [], 0
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError:
            os.ftruncate(self._fd, self._written)
            raise
        self._written += len(data)

    def close(self) -> None:
        os.close(self._fd)


@dataclass
class Cursor:
    """How far a reader has come: all before `offset` of segment `number`, and all segments before it."""

    number: int = -1
    offset: int = 0
    gaps: int = 0
    """Segments that were deleted before they were read."""


def records_of(path: Path, offset: int = 0) -> Iterator[tuple[Record, int]]:
    """The whole records of a segment from `offset` on, each with where the next one begins. A segment is read at once:
    there may be a hundred thousand records in it."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:  # deleted meanwhile: it was the oldest
        return
    begin, names = 0, dict[bytes, str]()
    while end := data.find(b"\n", begin, begin + HEAD_LIMIT_BYTES) + 1:
        try:
            at, container_id, function, stream, length = data[begin : end - 1].split()
            begin = end + int(length)
            record = Record(
                float(at),
                names.get(container_id) or _name_in(names, container_id),
                names.get(function) or _name_in(names, function),
                names.get(stream) or _name_in(names, stream),
                data[end:begin],
            )
        except ValueError:
            return  # a crash cut the last record
        if begin > len(data):
            return
        yield record, offset + begin


def _name_in(names: dict[bytes, str], word: bytes) -> str:
    name = "" if word == NOBODY.encode() else word.decode()
    names[word] = name
    return name


def modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _adopt_older_files(directory: Path) -> None:
    """The first release kept two files an app, the older as `.old`, side by side."""
    for number, suffix in enumerate((".old", ".log")):
        for path in directory.glob(f"*{suffix}"):
            if path.is_file():
                (directory / path.stem).mkdir(exist_ok=True, mode=0o700)
                path.replace(directory / path.stem / f"{number:010d}.log")
