"""The databases a Store can be in: how each is connected, tuned, locked, and what its errors mean.

`Sqlite` is the default and is always there, `Postgres` is asked for by URL. `database.py` owns threads, queues and
groups and asks here for engines and for the meaning of an error: a `Fault` is trouble of the whole Store (full, locked,
gone), which no other write of the group would escape; anything else is the fault of the one write that met it.
SQLAlchemy is imported in functions.
Tested in `tests/contract/test_database.py` and `tests/contract/test_store_faults.py`, over each that is present.
"""

from __future__ import annotations

import abc
import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from squall.exception import ConflictError, Error, InvalidError, ResourceExhaustedError, ServiceError, VersionError
from squall.server.schema import RESTORE_HINT, Marker, check_file, has_deployed_apps, look_over

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
    reconnect_s = 0.0
    """How long a group or a read waits for a database that went away."""

    @abc.abstractmethod
    def check(self) -> None:
        """Refuse what can be refused at once, without loading anything heavy. Changes nothing."""

    @abc.abstractmethod
    def has_deployed_apps(self) -> bool:
        """Whether the Store must be opened before anybody is answered, since apps are to be called again."""

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
    def seal(self, connection: Any, token: str) -> None:
        """Make `token` the last thing of a transaction, for `sealed` to find; where a commit can be lost track of."""

    def sealed(self, connection: Any) -> str:
        """The token of the transaction that was committed last, by whichever server; empty before the first."""
        return ""

    @abc.abstractmethod
    def fault_of(self, error: BaseException) -> Fault | None:
        """What an error of a statement or commit means for the Store; None: it is that write's own."""


def backend_of(url: str, directory: Path) -> Backend:
    """The backend of a `database_url`; the one in the state directory when it is empty."""
    if not url:
        return Sqlite(directory / "squall.db")
    scheme, found, _ = url.partition("://")
    if not found or scheme not in ("postgresql", "postgres"):
        raise InvalidError(
            f"`database_url` begins with `{scheme[:20]}`, which is no database that the Store can be in",
            hint="`postgresql://user:password@host/name`, or nothing for SQLite in the state directory",
        )
    return Postgres(url, Marker(directory))


class Sqlite(Backend):
    """A file in the state directory. Its lock is the server's own, on the directory."""

    kind = "sqlite"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.marker = Marker(path.parent)

    def check(self) -> None:
        self.marker.check_kind(self.kind)
        check_file(self.path, self.marker)

    def has_deployed_apps(self) -> bool:
        return has_deployed_apps(self.path)

    def writer(self) -> Any:
        return self._engine("BEGIN IMMEDIATE", _tune_writer, 1)

    def reader(self, connections: int) -> Any:
        return self._engine("BEGIN", _tune_reader, connections)

    def _engine(self, begin: str, tune: Any, connections: int) -> Any:
        import sqlalchemy as sa

        engine = sa.create_engine(f"sqlite:///{self.path}", pool_size=connections, max_overflow=0)
        sa.event.listen(engine, "connect", tune)
        # The driver's own transactions leave out statements that change the schema, and take the lock too late.
        sa.event.listen(engine, "begin", lambda connection: connection.connection.driver_connection.execute(begin))
        return engine

    def claim(self, connection: Any) -> None:
        look_over(connection.connection.driver_connection, self.path)

    def seal(self, connection: Any, token: str) -> None:
        """A commit of a file is done when it returns, and not otherwise."""

    def fault_of(self, error: BaseException) -> Fault | None:
        found = getattr(error, "orig", None) or error
        if type(found).__module__ != "sqlite3":
            return None
        text = str(found)
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


# ---- PostgreSQL -----------------------------------------------------------------------------------------------------

CLAIM_S = 10.0
"""How long a server that is ending, or was killed, may still hold the database."""
CLAIM_KEY = 0x5_9A11
LOCK_TIMEOUT_MS = BUSY_MS
SERVER_VERSION_MIN = 120_000
POSTGRES_OPTIONS = (
    f"-c lock_timeout={LOCK_TIMEOUT_MS} -c client_encoding=UTF8 -c idle_in_transaction_session_timeout=0"
    " -c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3"
)
"""The keepalives are for the server's side: one that vanished without a word gives its claim up."""
SEAL = "UPDATE meta SET value = %(token)s WHERE key = 'last_group'"


class Postgres(Backend):
    """A database of PostgreSQL, held by one server at a time: its writing connection has an advisory lock, so the
    connection must be PostgreSQL's own, without a pooler that shares it out.

    A commit whose answer was lost is looked up: each group ends with a token in `meta`, and no other session can write
    between the loss and the look, since the lock is ours again by then."""

    kind = "postgresql"
    retries = 20
    reconnect_s = 30.0

    def __init__(self, url: str, marker: Marker) -> None:
        self.url = url
        self.marker = marker
        self.place = place_of(url)

    def check(self) -> None:
        self.marker.check_kind(self.kind)
        if importlib.util.find_spec("psycopg") is None:
            raise InvalidError(
                "`database_url` is of PostgreSQL, whose driver `psycopg` is not installed",
                hint="install it where the server runs: pip install 'squall[postgres]'",
            )

    def has_deployed_apps(self) -> bool:
        return True  # to ask costs as much as to open it

    def writer(self) -> Any:
        return self._engine(1, "SERIALIZABLE", {})

    def reader(self, connections: int) -> Any:
        return self._engine(connections, "REPEATABLE READ", {"postgresql_readonly": True})

    def _engine(self, connections: int, isolation: Any, options: dict[str, Any]) -> Any:
        import sqlalchemy as sa

        try:
            url = sa.make_url(self.url).set(drivername="postgresql+psycopg")
            return sa.create_engine(
                url,
                pool_size=connections,
                max_overflow=0,
                isolation_level=isolation,
                execution_options=options,
                connect_args={
                    "connect_timeout": 5,
                    "tcp_user_timeout": 15_000,
                    "application_name": "squall",
                    "options": POSTGRES_OPTIONS,
                },
            )
        except ImportError as error:
            raise InvalidError(
                f"the driver of PostgreSQL cannot be loaded: {error}", hint="pip install 'squall[postgres]'"
            ) from None
        except (sa.exc.ArgumentError, ValueError):
            raise InvalidError(
                "`database_url` is no URL of a database", hint="`postgresql://user:password@host:5432/name`"
            ) from None

    def claim(self, connection: Any) -> None:
        import sqlalchemy as sa

        with connection.begin():
            self._check_server(connection)
            claim = sa.text("SELECT pg_try_advisory_lock(:key, hashtext(current_schema()))")
            deadline = time.monotonic() + CLAIM_S
            while not connection.execute(claim, {"key": CLAIM_KEY}).scalar_one():
                if time.monotonic() > deadline:
                    raise ConflictError(
                        f"another server is using the database {self.place}",
                        hint="end it, or give each server a database of its own",
                    )
                time.sleep(0.1)

    def _check_server(self, connection: Any) -> None:
        version = int(connection.exec_driver_sql("SHOW server_version_num").scalar_one())
        if version < SERVER_VERSION_MIN:
            raise VersionError(f"the PostgreSQL of {self.place} is older than version 12", hint="use a newer one")
        encoding = connection.exec_driver_sql("SHOW server_encoding").scalar_one()
        if encoding != "UTF8":
            raise ConflictError(
                f"the database {self.place} has the encoding {encoding}", hint="create one with `ENCODING 'UTF8'`"
            )
        names = set(connection.exec_driver_sql(_TABLES).scalars())
        if names and not {"meta", "apps", "calls", "inputs"} <= names:
            raise ConflictError(
                f"the database {self.place} is not Squall's: it has the tables {', '.join(sorted(names))[:200]}",
                hint="give Squall a database of its own",
            )
        if not names and self.marker.path.exists():
            raise ConflictError(
                f"cannot open the Store: the database {self.place} is empty, and this home had a Store there",
                hint=f"{RESTORE_HINT}; {self.marker.start_over}",
            )

    def seal(self, connection: Any, token: str) -> None:
        if not connection.exec_driver_sql(SEAL, {"token": token}).rowcount:
            connection.exec_driver_sql("INSERT INTO meta (key, value) VALUES ('last_group', %s)", (token,))

    def sealed(self, connection: Any) -> str:
        query = "SELECT value FROM meta WHERE key = 'last_group'"
        return str(connection.exec_driver_sql(query).scalar_one_or_none() or "")

    def fault_of(self, error: BaseException) -> Fault | None:
        found = getattr(error, "orig", None) or error
        if not type(found).__module__.startswith("psycopg"):
            return None
        state = str(getattr(found, "sqlstate", None) or "")
        if getattr(error, "connection_invalidated", False) or state in _GONE or state.startswith("08"):
            return self._lost(found)
        if not state and type(found).__name__ in ("OperationalError", "ConnectionTimeout"):
            return self._lost(found)
        if state in ("40001", "40P01"):
            return Fault(self._error(ServiceError, "met another transaction"), again=True)
        for prefix, cls, what, hint in _POSTGRES_FAULTS:
            if state.startswith(prefix):
                return Fault(self._error(cls, what, hint))
        return None

    def _lost(self, found: object) -> Fault:
        said = str(found).strip() or "the connection was lost"
        refused = next((words for words in _REFUSALS if words in said), "")
        hint = "is PostgreSQL running there? The server goes on by itself when it is back"
        if refused:
            hint = "check `database_url`, and that the database and its user were created"
        error = ServiceError(f"cannot reach the database {self.place}: {said.splitlines()[-1][:300]}", hint=hint)
        return Fault(error, lost=not refused)

    def _error(self, cls: type[Error], what: str, hint: str = "trying again is safe") -> Error:
        return cls(f"cannot use the Store: the database {self.place} {what}", hint=hint)


_TABLES = "SELECT tablename FROM pg_tables WHERE schemaname = current_schema()"
_REFUSALS = ("authentication failed", "does not exist", "no pg_hba.conf entry", "no password supplied")
"""Words of a connection that waiting does not help."""
_GONE = {"57P01", "57P02", "57P03", "57P05", "25P03"}
_POSTGRES_FAULTS: list[tuple[str, type[Error], str, str]] = [
    ("53100", ResourceExhaustedError, "has no room on its disk", "free some space there; the server goes on by itself"),
    ("53", ServiceError, "has no connections or memory left", "raise `max_connections`, or look what else uses it"),
    ("25006", ServiceError, "is read-only", "is it a standby? Use the primary"),
    ("55P03", ServiceError, f"has been locked by another session for {BUSY_MS // 1000} s", "trying again is safe"),
    ("57014", ServiceError, "cancelled a statement", "trying again is safe"),
    ("58", ServiceError, "has trouble with its disk", "look into the log of PostgreSQL"),
    ("XX001", ServiceError, "is damaged", RESTORE_HINT),
    ("XX002", ServiceError, "has a damaged index", "`REINDEX DATABASE` makes it anew"),
]


def place_of(url: str) -> str:
    """Where a URL points, without its password."""
    parts = urlsplit(url)
    try:
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        port = ""
    return f"`{parts.path.lstrip('/') or 'postgres'}` at `{parts.hostname or 'its socket'}{port}`"
