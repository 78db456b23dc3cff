"""The databases a Store can be in: how each is connected, tuned, locked, and what its errors mean.

`Sqlite` is the default and is always there. `database.py` owns threads, queues and groups and asks here for engines
and for the meaning of an error: a `Fault` is trouble of the whole Store (full, locked, gone), which no other write of
the group would escape; anything else is the fault of the one write that met it. SQLAlchemy is imported in functions.
Tested in `tests/contract/test_database.py` and `tests/contract/test_store_faults.py`, over each that is present.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from squall.exception import Error, ResourceExhaustedError, ServiceError
from squall.server.schema import RESTORE_HINT, Marker, check_file, look_over

BUSY_MS = 10_000
"""How long a write waits for another process that has the database locked, before it fails and can be repeated."""
CACHE_KIB = 32 << 10
WAL_LIMIT_BYTES = 64 << 20
"""The log is cut to this after a checkpoint; a long read or a flood may make it larger meanwhile."""


@dataclass(frozen=True)
class Fault:
    """Trouble of the whole Store. `again`: the group lost a race and may win the next; `lost`: so is the connection."""

    error: Error
    again: bool = False
    lost: bool = False


class Backend(abc.ABC):
    kind: str
    marker: Marker
    retries = 0
    """How often a group is tried again that met a fault with `again`."""

    @abc.abstractmethod
    def check(self) -> None:
        """Refuse what can be refused at once, without loading anything heavy. Changes nothing."""

    @abc.abstractmethod
    def writer(self) -> Any:
        """An engine for the one writing connection."""

    @abc.abstractmethod
    def reader(self, connections: int) -> Any:
        """An engine whose connections see what is committed and can change nothing."""

    @abc.abstractmethod
    def claim(self, connection: Any) -> None:
        """Called with a fresh connection of the writer, outside a transaction: refuse a database in use or damaged."""

    @abc.abstractmethod
    def fault_of(self, error: BaseException) -> Fault | None:
        """What an error of a statement or commit means for the Store; None: it is that write's own."""


class Sqlite(Backend):
    """A file in the state directory. Its lock is the server's own, on the directory."""

    kind = "sqlite"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.marker = Marker(path.parent)

    def check(self) -> None:
        self.marker.check_kind(self.kind)
        check_file(self.path, self.marker)

    def writer(self) -> Any:
        return self._engine("BEGIN IMMEDIATE", _tune_writer, 1)

    def reader(self, connections: int) -> Any:
        return self._engine("BEGIN", _tune_reader, connections)

    def _engine(self, begin: str, tune: Any, connections: int) -> Any:
        import sqlalchemy as sa

        engine = sa.create_engine(f"sqlite:///{self.path}", pool_size=connections, max_overflow=0)
        sa.event.listen(engine, "connect", tune)
        # The driver's own transactions leave out statements that change the schema, and take the lock too late.
        sa.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(begin))
        return engine

    def claim(self, connection: Any) -> None:
        look_over(connection.connection.driver_connection, self.path)

    def fault_of(self, error: BaseException) -> Fault | None:
        text = str(getattr(error, "orig", None) or error)
        for words, cls, what, hint in _SQLITE_FAULTS:
            if words in text:
                return Fault(cls(what.format(path=self.path), hint=hint.format(path=self.path)))
        return None


_SQLITE_FAULTS: list[tuple[str, type[Error], str, str]] = [
    (
        "disk is full",
        ResourceExhaustedError,
        "cannot write to the Store: the disk that holds `{path}` is full",
        "free some space there; the server goes on by itself",
    ),
    (
        "is locked",
        ServiceError,
        f"cannot write to the Store: another process has kept `{{path}}` locked for {BUSY_MS // 1000} s",
        "end whatever else has it open; trying again is safe",
    ),
    (
        "readonly database",
        ServiceError,
        "cannot write to the Store: `{path}` is read-only",
        "is its disk mounted read-only, or the file another user's?",
    ),
    (
        "disk I/O error",
        ServiceError,
        "cannot write to the Store: the disk that holds `{path}` fails, or is full or read-only",
        "look into the kernel's log",
    ),
    (
        "unable to open database file",
        ServiceError,
        "cannot open the Store: `{path}` or its directory cannot be written",
        "the server needs to write both",
    ),
    ("malformed", ServiceError, "cannot use the Store: `{path}` is damaged", RESTORE_HINT),
    ("not a database", ServiceError, "cannot use the Store: `{path}` is not a database any more", RESTORE_HINT),
]


def _tune_writer(connection: Any, record: Any) -> None:
    _tune(
        connection,
        "journal_mode=WAL",
        "synchronous=FULL",
        f"cache_size=-{CACHE_KIB}",
        f"journal_size_limit={WAL_LIMIT_BYTES}",
    )


def _tune_reader(connection: Any, record: Any) -> None:
    _tune(connection, "query_only=ON")


def _tune(connection: Any, *pragmas: str) -> None:
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in (f"busy_timeout={BUSY_MS}", *pragmas):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
