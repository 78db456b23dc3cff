"""Container output: kept in append-only segments per app, pushed live to whoever follows.

A record is one line `at container_id function stream length` and then that many raw bytes. A segment that is full is
kept as the older of two, so an app keeps at least SEGMENT_BYTES of its newest output. A reader that falls behind loses
lines and is told how many; nobody else waits for it. The last line may be lost in a crash. Tested in
`tests/unit/test_logs.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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

    def close_app(self, app_id: str) -> None:
        segment = self._open.pop(app_id, None)
        if segment is not None:
            segment.close()

    def close(self) -> None:
        for app_id in list(self._open):
            self.close_app(app_id)

    def read(self, app_id: str, container_id: str = "") -> Iterator[Record]:
        """Kept records of an app in order, oldest first."""
        segment = self._open.get(app_id)
        if segment is not None:
            segment.flush()
        path = self._path(app_id)
        for name in (path.with_suffix(".old"), path):
            for record in _read_segment(name):
                if not container_id or record.container_id == container_id:
                    yield record

    def _path(self, app_id: str) -> Path:
        return self.directory / f"{app_id}.log"


class _Segment:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=1 << 16)
        self._size = self._file.tell()

    def append(self, record: Record) -> None:
        if self._size > SEGMENT_BYTES:
            self._rotate()
        head = f"{record.at:.6f} {record.container_id} {record.function} {record.stream} {len(record.data)}\n"
        self._size += self._file.write(head.encode()) + self._file.write(record.data)

    def _rotate(self) -> None:
        self._file.close()
        self.path.replace(self.path.with_suffix(".old"))
        self._file = self.path.open("ab", buffering=1 << 16)
        self._size = 0

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _read_segment(path: Path) -> Iterator[Record]:
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("rb"))
        except FileNotFoundError:
            return
        while head := file.readline(4096):
            try:
                at, container_id, function, stream, length = head.decode().split()
                data = file.read(int(length))
            except ValueError:
                return  # a crash cut the last record
            yield Record(float(at), container_id, function, stream, data)
