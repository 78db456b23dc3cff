"""Which schema a Store has, whether it is ours, and how it becomes today's: created, migrated or refused.

The version is the row `schema_version` of `meta`, in every Store of every release. Looking at it costs one plain query
and loads neither SQLAlchemy's tables nor Alembic: those are for who makes or changes a Store. A Store that is newer
than the code, of somebody else, damaged, or missing where one was, is refused and left as it is; never is a fresh one
put in its place. That there was one is known from the marker file beside it.
Tested in `tests/contract/test_migrations.py` and `tests/contract/test_store_faults.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from squall.exception import ConflictError, Error, VersionError

SCHEMA_VERSION = 2
MARKER = "store.json"
HEADER = b"SQLite format 3\x00"
CHECK_STEPS = 20_000_000
"""Of SQLite's machine, about two seconds: how long a database is looked over for damage when it is opened."""
RESTORE_HINT = "restore it from a backup"


class Marker:
    """The file that says that this state directory has a Store, and which one."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / MARKER

    def read(self) -> dict[str, str]:
        """What it says; nothing when there is no Store yet."""
        try:
            said = json.loads(self.path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise ConflictError(f"cannot read `{self.path}`: {error}", hint=self.start_over) from None
        return {str(key): str(value) for key, value in said.items()} if isinstance(said, dict) else {}

    def write(self, kind: str, store_id: str) -> None:
        if self.read() == (said := {"kind": kind, "store_id": store_id}):
            return
        fresh = self.path.with_suffix(".new")
        with fresh.open("w") as file:
            json.dump(said, file)
            file.flush()
            os.fsync(file.fileno())
        fresh.rename(self.path)
        directory = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    @property
    def start_over(self) -> str:
        return f"to start over with an empty Store, move `{self.path}` away"

    def check_kind(self, kind: str) -> None:
        """A home goes on with the database that it began with, or says so."""
        said = self.read().get("kind", kind)
        if said != kind:
            was = "PostgreSQL" if said == "postgresql" else "SQLite"
            raise ConflictError(
                f"the Store of this home is in {was} (so says `{self.path}`) and another database was asked for",
                hint=f"set `database_url` as it was, or, {self.start_over}",
            )

    def check_store(self, kind: str, store_id: str) -> None:
        """The database is the one that was here before."""
        said = self.read().get("store_id", store_id)
        if said != store_id:
            raise ConflictError(
                f"the database holds the Store `{store_id}`, that of this home is `{said}`",
                hint=f"{RESTORE_HINT}; to go on with the one found, move `{self.path}` away",
            )


# ---- a file of SQLite, before anything is opened for writing --------------------------------------------------------


def check_file(path: Path, marker: Marker) -> None:
    """Refuse a database file that is gone, not ours, newer than this release, or damaged. Changes nothing.

    Reads the version only, in some milliseconds, so that a server can say this before it begins."""
    size = path.stat().st_size if path.exists() else 0
    if size == 0:
        if marker.path.exists():
            what = "is empty" if path.exists() else "is gone"
            raise ConflictError(
                f"cannot open the Store: `{path}` {what}, and this home had one",
                hint=f"{RESTORE_HINT}; {marker.start_over}",
            )
        return
    with path.open("rb") as file:
        if file.read(len(HEADER)) != HEADER:
            raise _foreign(path, marker, "is not a database of SQLite")
    _check_contents(path, marker)


def _foreign(path: Path, marker: Marker, what: str) -> ConflictError:
    return ConflictError(
        f"cannot open the Store: `{path}` {what}",
        hint=f"{RESTORE_HINT}; to start over, move it and `{marker.path.name}` beside it away",
    )


def _check_contents(path: Path, marker: Marker) -> None:
    import sqlite3

    try:
        # Not `mode=ro`: a Store that was not closed has to be recovered from its log first, which is a change.
        with contextlib.closing(sqlite3.connect(path, timeout=2.0)) as connection:
            tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if not tables:
                return  # made by a server that ended before its first commit
            if not {"meta", "apps", "calls", "inputs"} <= tables:
                raise _foreign(path, marker, f"is not Squall's: it has the tables {', '.join(sorted(tables))[:200]}")
            check_version(connection.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchone())
    except sqlite3.OperationalError as error:
        if "locked" not in str(error):  # somebody is at it for a moment: the opening waits longer
            raise ConflictError(f"cannot open the Store `{path}`: {error}", hint=_access_hint(path)) from None
    except sqlite3.DatabaseError as error:
        raise _foreign(path, marker, f"is damaged: {error}") from None


def has_deployed_apps(path: Path) -> bool:
    """Whether a database file has apps that were deployed, without loading what opens it. In doubt it has."""
    import sqlite3

    if not path.exists() or not path.stat().st_size:
        return False
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=2.0)) as connection:
            return connection.execute("SELECT 1 FROM apps WHERE deployed LIMIT 1").fetchone() is not None
    except sqlite3.Error as error:
        return "no such" not in str(error)  # of a release without deployed apps


def _access_hint(path: Path) -> str:
    return f"the server needs to write the file and its directory `{path.parent}`, on a disk with room"


def check_version(row: Any) -> int:
    """The version of a Store. Raises VersionError for one this release does not know."""
    try:
        found = int(row[0])
    except (TypeError, ValueError):
        raise VersionError(f"the Store has no schema version ({row!r})", hint=RESTORE_HINT) from None
    if found > SCHEMA_VERSION:
        raise VersionError(
            f"the Store has schema version {found}, made by a newer release; this one knows up to {SCHEMA_VERSION}",
            hint="install the newer release again, or restore the backup made before it",
        )
    return found


def look_over(connection: Any, path: Path) -> None:
    """Look for damage in an open database of `sqlite3`, for a bounded time. Raises ConflictError."""
    import sqlite3

    steps = iter(range(CHECK_STEPS // 10_000))
    connection.set_progress_handler(lambda: next(steps, None) is None, 10_000)
    try:
        found = [str(row[0]) for row in connection.execute("PRAGMA quick_check(3)")]
    except sqlite3.OperationalError as error:
        if "interrupted" in str(error):
            return  # larger than can be looked over now: reading it will tell
        raise
    except sqlite3.DatabaseError as error:
        found = [str(error)]
    finally:
        connection.set_progress_handler(None, 0)
    if found != ["ok"]:
        raise ConflictError(
            f"cannot open the Store: `{path}` is damaged: {'; '.join(found)[:300]}", hint=f"{RESTORE_HINT}; {SALVAGE}"
        )


SALVAGE = "`sqlite3 squall.db .recover` gets out what can still be read"


# ---- an open database, in the transaction of its opening ---------------------------------------------------------


def prepare(connection: Any, new_store_id: str) -> str:
    """Make an empty database a Store and an older one today's; the Store's id."""
    import sqlalchemy as sa

    if not sa.inspect(connection).has_table("meta"):
        create(connection, new_store_id)
        return new_store_id
    found = check_version(
        connection.execute(sa.text("SELECT value FROM meta WHERE key = 'schema_version'")).one_or_none()
    )
    if found < SCHEMA_VERSION:
        migrate(connection, found)
    return _store_id(connection, new_store_id)


def create(connection: Any, store_id: str) -> None:
    from squall.server import tables

    tables.metadata.create_all(connection)
    rows = {"schema_version": str(SCHEMA_VERSION), "store_id": store_id}
    connection.execute(tables.meta.insert(), [{"key": key, "value": value} for key, value in rows.items()])


def migrate(connection: Any, found: int) -> None:
    """Take the steps after `found`. Whoever calls this owns the transaction, so all are taken or none."""
    import importlib

    import sqlalchemy as sa
    from alembic.migration import MigrationContext
    from alembic.operations import Operations

    with Operations.context(MigrationContext.configure(connection)):
        for version in range(found + 1, SCHEMA_VERSION + 1):
            try:
                importlib.import_module(f"squall.server.migrations.v{version:04}").upgrade()
            except sa.exc.SQLAlchemyError as error:
                raise Error(
                    f"cannot migrate the Store from schema version {found} to {version}: {error}",
                    hint="it was left as it was; the earlier release still opens it",
                ) from error
    row = {"version": str(SCHEMA_VERSION)}
    connection.execute(sa.text("UPDATE meta SET value = :version WHERE key = 'schema_version'"), row)


def _store_id(connection: Any, new_store_id: str) -> str:
    """Stores of the first release have none."""
    import sqlalchemy as sa

    row = connection.execute(sa.text("SELECT value FROM meta WHERE key = 'store_id'")).one_or_none()
    if row is not None:
        return str(row[0])
    connection.execute(sa.text("INSERT INTO meta (key, value) VALUES ('store_id', :id)"), {"id": new_store_id})
    return new_store_id
