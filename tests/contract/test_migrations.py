"""Schemas of the Store: a fresh one and what older releases left become the same thing, or are refused whole."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.operations import Operations

from squall.exception import Error, VersionError
from squall.server import schema, tables
from squall.server.database import Database
from squall.server.migrations import v0001, v0002
from tests.stores import Place

FIRST_RELEASE = """
CREATE TABLE meta (key VARCHAR(64) NOT NULL, value TEXT NOT NULL, PRIMARY KEY (key));
CREATE TABLE apps (app_id VARCHAR(32) NOT NULL, name VARCHAR(64) NOT NULL, state VARCHAR(16) NOT NULL,
    detached BOOLEAN NOT NULL, created_at FLOAT NOT NULL, stopped_at FLOAT, reason TEXT, PRIMARY KEY (app_id));
CREATE INDEX ix_apps_name ON apps (name);
CREATE TABLE functions (function_id VARCHAR(32) NOT NULL, app_id VARCHAR(32) NOT NULL, tag VARCHAR(256) NOT NULL,
    spec TEXT NOT NULL, PRIMARY KEY (function_id));
CREATE INDEX ix_functions_app_id ON functions (app_id);
CREATE TABLE calls (call_id VARCHAR(32) NOT NULL, function_id VARCHAR(32) NOT NULL, app_id VARCHAR(32) NOT NULL,
    created_at FLOAT NOT NULL, PRIMARY KEY (call_id));
CREATE INDEX ix_calls_created_at ON calls (created_at);
CREATE INDEX ix_calls_function_id ON calls (function_id);
CREATE TABLE inputs (call_id VARCHAR(32) NOT NULL, idx INTEGER NOT NULL, args BLOB, args_blob VARCHAR(64),
    status VARCHAR(16), result BLOB, result_blob VARCHAR(64), message TEXT, hint TEXT, finished_at FLOAT,
    PRIMARY KEY (call_id, idx)) WITHOUT ROWID;
CREATE TABLE containers (container_id VARCHAR(32) NOT NULL, function_id VARCHAR(32) NOT NULL,
    app_id VARCHAR(32) NOT NULL, node_id VARCHAR(32) NOT NULL, cpu FLOAT NOT NULL, memory_mib INTEGER NOT NULL,
    gpus INTEGER NOT NULL, requested_at FLOAT NOT NULL, started_at FLOAT, stopped_at FLOAT, exit_code INTEGER,
    reason TEXT, cpu_seconds FLOAT, memory_peak_bytes INTEGER, timeline TEXT, PRIMARY KEY (container_id));
CREATE INDEX ix_containers_app_id ON containers (app_id);
CREATE INDEX ix_containers_function_id ON containers (function_id);
CREATE INDEX ix_containers_requested_at ON containers (requested_at);
INSERT INTO meta VALUES ('schema_version', '1');
INSERT INTO apps VALUES ('ap-1', 'report', 'stopped', 0, 1000.0, 1060.5, 'finished');
INSERT INTO functions VALUES ('fu-1', 'ap-1', 'render', '{"tag": "render"}');
INSERT INTO calls VALUES ('fc-1', 'fu-1', 'ap-1', 1001.0);
INSERT INTO inputs VALUES ('fc-1', 0, x'8001', NULL, 'ok', x'80024b01', NULL, '', '', 1002.0);
INSERT INTO inputs VALUES ('fc-1', 1, x'8002', NULL, NULL, NULL, NULL, NULL, NULL, NULL);
INSERT INTO containers VALUES ('co-1', 'fu-1', 'ap-1', 'no-1', 1.0, 128, 0, 1000.5, 1000.6, 1060.0, 0, 'idle', 0.25,
    8589934592, '{}');
"""
"""What the first release wrote: its statements as SQLite kept them, and rows of an app that ran."""


def first_release(path: Path) -> Path:
    with sqlite3.connect(path) as connection:
        connection.executescript("PRAGMA journal_mode=WAL;" + FIRST_RELEASE)
    connection.close()
    return path


def rows(path: Path, query: str) -> list[Any]:
    connection = sqlite3.connect(path)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def open_store(directory: Path) -> None:
    Place(directory).touch()


def differences(engine: sa.Engine) -> list[Any]:
    with engine.connect() as connection:
        return list(compare_metadata(MigrationContext.configure(connection), tables.metadata))


def test_steps_from_nothing_make_the_schema_of_the_tables(place: Place) -> None:
    engine = place.engine()
    with engine.begin() as connection:
        schema.migrate(connection, 0)
    assert differences(engine) == []
    engine.dispose()


def test_fresh_store_has_the_schema_of_the_tables(place: Place) -> None:
    place.touch()
    engine = place.engine()
    assert differences(engine) == []
    engine.dispose()


def test_comparison_sees_a_column_that_no_step_makes(place: Place) -> None:
    place.touch()
    place.execute("ALTER TABLE apps DROP COLUMN reason")
    engine = place.engine()
    assert [change[0] for change in differences(engine)] == ["add_column"]
    engine.dispose()


def test_older_store_is_migrated_in_any_database(place: Place) -> None:
    engine = place.engine()
    with engine.begin() as connection, Operations.context(MigrationContext.configure(connection)):
        v0001.upgrade()
    place.execute("INSERT INTO meta VALUES ('schema_version', '1')")
    place.touch()
    assert place.execute("SELECT value FROM meta WHERE key = 'schema_version'") == [(str(schema.SCHEMA_VERSION),)]
    assert differences(engine) == []
    engine.dispose()


def test_store_of_the_first_release_is_migrated_to_the_schema_of_the_tables(tmp_path: Path) -> None:
    path = first_release(tmp_path / "squall.db")
    open_store(tmp_path)
    engine = sa.create_engine(f"sqlite:///{path}")
    assert differences(engine) == []
    engine.dispose()
    assert rows(path, "SELECT value FROM meta WHERE key = 'schema_version'") == [(str(schema.SCHEMA_VERSION),)]


def test_migration_keeps_what_the_first_release_stored(tmp_path: Path) -> None:
    path = first_release(tmp_path / "squall.db")
    open_store(tmp_path)
    assert rows(path, "SELECT app_id, name, stopped_at FROM apps") == [("ap-1", "report", 1060.5)]
    assert rows(path, "SELECT idx, args, status, result FROM inputs") == [
        (0, b"\x80\x01", "ok", b"\x80\x02K\x01"),
        (1, b"\x80\x02", None, None),
    ]
    assert rows(path, "SELECT memory_peak_bytes FROM containers") == [(8 << 30,)]


def test_migration_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = first_release(tmp_path / "squall.db")
    before = rows(path, "SELECT name, sql FROM sqlite_master ORDER BY name")

    def upgrade() -> None:
        from alembic import op

        op.add_column("apps", sa.Column("version", sa.Integer))
        op.drop_table("calls")
        op.execute("INSERT INTO calls VALUES ('there is none')")

    monkeypatch.setattr(v0002, "upgrade", upgrade)
    with pytest.raises(Error, match="cannot migrate the Store from schema version 1 to 2"):
        open_store(tmp_path)
    assert rows(path, "SELECT name, sql FROM sqlite_master ORDER BY name") == before
    assert rows(path, "SELECT * FROM calls") == [("fc-1", "fu-1", "ap-1", 1001.0)]


def test_store_of_a_newer_release_is_refused_and_left_alone(tmp_path: Path) -> None:
    open_store(tmp_path)
    path = tmp_path / "squall.db"
    connection = sqlite3.connect(path)
    connection.execute("UPDATE meta SET value = '999' WHERE key = 'schema_version'")
    connection.commit()
    connection.close()
    before = path.read_bytes()
    with pytest.raises(Error, match="schema version 999"):
        open_store(tmp_path)
    assert path.read_bytes() == before


def test_server_says_so_before_it_begins(tmp_path: Path) -> None:
    path = first_release(tmp_path / "squall.db")
    connection = sqlite3.connect(path)
    connection.execute("UPDATE meta SET value = '999'")
    connection.commit()
    connection.close()

    async def main() -> None:
        Database.in_directory(tmp_path, asyncio.get_running_loop()).check()

    with pytest.raises(VersionError, match="999"):
        asyncio.run(main())


def test_schema_check_of_a_current_store_does_not_load_alembic(tmp_path: Path) -> None:
    import subprocess
    import sys

    open_store(tmp_path)
    program = (
        "import asyncio, sys, pathlib\n"
        "from squall.server.database import Database\n"
        "async def main():\n"
        f"    database = Database.in_directory(pathlib.Path({str(tmp_path)!r}), asyncio.get_running_loop())\n"
        "    database.check()\n"
        "    assert 'sqlalchemy' not in sys.modules\n"
        "    await database.write(lambda connection: None)\n"
        "    await database.close()\n"
        "    assert 'alembic' not in sys.modules\n"
        "asyncio.run(main())\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
