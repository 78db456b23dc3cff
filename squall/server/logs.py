"""Container output: kept in append-only segments per app, pushed live to whoever follows.

A record is one line `at container_id function stream length` and then that many raw bytes. A segment that is full is
kept as the older of two, so an app keeps at least SEGMENT_BYTES of its newest output. A reader that falls behind loses
lines and is told how many; nobody else waits for it. The last line may be lost in a crash. Tested in
`tests/unit/test_logs.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

SEGMENT_BYTES = 32 << 20


@dataclass(frozen=True)
class Record:
    at: float
    container_id: str
    function: str
    stream: str
    data: bytes


class Logs:
    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.directory = directory
        self._open: dict[str, _Segment] = {}

    def append(self, app_id: str, record: Record) -> None:
        segment = self._open.get(app_id)
        if segment is None:
            segment = self._open[app_id] = _Segment(self._path(app_id))
        segment.append(record)

    def flush(self) -> None:
        for segment in self._open.values():
            segment.flush()

    def prune(self, older_than: float) -> None:
        """Delete the output of apps that wrote nothing since that moment (seconds of the wall clock)."""
        for path in self.directory.iterdir():
            if path.stem not in self._open and path.stat().st_mtime < older_than:
                path.unlink(missing_ok=True)

    def close_app(self, app_id: str) -> None:
        segment = self._open.pop(app_id, None)
        if segment is not None:
            segment.close()

    def remove(self, app_id: str) -> None:
        """Delete all that is kept of one."""
        self.close_app(app_id)
        for path in (self._path(app_id), self._path(app_id).with_suffix(".old")):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        for app_id in list(self._open):
            self.close_app(app_id)

    def read(self, app_id: str, container_id: str = "") -> Iterator[Record]:
        """Kept records of an app in order, oldest first."""
        for record in self.snapshot(app_id).records():
            if container_id in ("", record.container_id):
                yield record

    def snapshot(self, app_id: str, since: int = 0) -> Snapshot:
        """What is kept now, from the `end` of an earlier snapshot on; to be read in another thread if one likes."""
        segment = self._open.get(app_id)
        if segment is not None:
            segment.flush()
        path = self._path(app_id)
        return Snapshot([path.with_suffix(".old"), path], since, None if segment is None else segment.begin)

    def written(self, app_id: str) -> int:
        """The `end` that a snapshot of a running app would have now."""
        segment = self._open.get(app_id)
        return 0 if segment is None else segment.end

    def _path(self, app_id: str) -> Path:
        return self.directory / f"{app_id}.log"


class _Segment:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=1 << 16)
        self._size = self._file.tell()
        self.begin = path.with_suffix(".old").stat().st_size if path.with_suffix(".old").exists() else 0
        """How much was written before what is in this file."""

    @property
    def end(self) -> int:
        return self.begin + self._size

    def append(self, record: Record) -> None:
        if self._size > SEGMENT_BYTES:
            self._rotate()
        head = f"{record.at:.6f} {record.container_id} {record.function} {record.stream} {len(record.data)}\n"
        self._size += self._file.write(head.encode()) + self._file.write(record.data)

    def _rotate(self) -> None:
        self._file.close()
        self.begin += self._size
        self.path.replace(self.path.with_suffix(".old"))
        self._file = self.path.open("ab", buffering=1 << 16)
        self._size = 0

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Snapshot:
    """An app's output up to `end`. The files are open already, so a rotation meanwhile takes nothing away."""

    def __init__(self, paths: list[Path], since: int, newest_begin: int | None) -> None:
        self._files: list[tuple[BinaryIO, int, int]] = []
        found = [path.open("rb") for path in paths if path.exists()]
        sizes = [os.fstat(file.fileno()).st_size for file in found]
        begin = 0 if newest_begin is None else newest_begin - sum(sizes[:-1])
        for file, size in zip(found, sizes, strict=True):
            self._files.append((file, max(0, since - begin), size))
            begin += size
        self.end = max(begin, since)
        """How much the app has written in all."""

    def records(self) -> Iterator[Record]:
        """Once only."""
        try:
            for file, offset, size in self._files:
                file.seek(offset)
                yield from _read_records(file, size)
        finally:
            for file, _, _ in self._files:
                file.close()


def _read_records(file: BinaryIO, end: int) -> Iterator[Record]:
    while file.tell() < end and (head := file.readline(4096)):
        try:
            at, container_id, function, stream, length = head.decode().split()
            data = file.read(int(length))
        except ValueError:
            return  # a crash cut the last record
        if len(data) < int(length):
            return
        yield Record(float(at), container_id, function, stream, data)
