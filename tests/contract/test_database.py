"""What the Store's engine promises: an acknowledged write is on disk, one bad write spoils no other."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from squall.exception import ServiceError
from squall.server.database import Database

T = TypeVar("T")


def with_database(tmp_path: Path, body: Callable[[Database], Awaitable[T]]) -> T:
    async def main() -> T:
        database = Database.in_directory(tmp_path, asyncio.get_running_loop())
        try:
            return await body(database)
        finally:
            await database.close()

    return asyncio.run(main())


def insert_app(app_id: str) -> Callable[[Any], None]:
    def work(connection: Any) -> None:
        from squall.server import tables

        row = {"app_id": app_id, "name": "n", "state": "running", "detached": False, "created_at": 1.0}
        connection.execute(tables.apps.insert(), row)

    return work


def stored_apps(tmp_path: Path) -> set[str]:
    with sqlite3.connect(tmp_path / "squall.db") as connection:
        return {row[0] for row in connection.execute("select app_id from apps")}


def test_an_acknowledged_write_is_on_disk(tmp_path: Path) -> None:
    async def body(database: Database) -> set[str]:
        await database.write(insert_app("ap-1"))
        return stored_apps(tmp_path)

    assert with_database(tmp_path, body) == {"ap-1"}


def test_a_write_that_fails_spoils_no_other_of_its_group(tmp_path: Path) -> None:
    async def body(database: Database) -> list[Any]:
        writes = [database.write(insert_app(f"ap-{i % 10}")) for i in range(11)]
        return await asyncio.gather(*writes, return_exceptions=True)

    results = with_database(tmp_path, body)
    assert [isinstance(result, Exception) for result in results] == [False] * 10 + [True]
    assert len(stored_apps(tmp_path)) == 10


def test_writes_made_before_the_start_are_committed_at_the_close(tmp_path: Path) -> None:
    async def body(database: Database) -> None:
        database.write_soon(insert_app("ap-soon"))

    with_database(tmp_path, body)
    assert stored_apps(tmp_path) == {"ap-soon"}


def test_a_garbage_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    garbage = b"this is no database" * 100
    (tmp_path / "squall.db").write_bytes(garbage)

    async def body(database: Database) -> None:
        await database.write(insert_app("ap-1"))

    with pytest.raises(ServiceError, match="not a database"):
        with_database(tmp_path, body)
    assert (tmp_path / "squall.db").read_bytes() == garbage


def test_a_store_of_another_schema_is_refused(tmp_path: Path) -> None:
    async def nothing(database: Database) -> None:
        await database.write(lambda connection: None)

    with_database(tmp_path, nothing)
    with sqlite3.connect(tmp_path / "squall.db") as connection:
        connection.execute("update meta set value = '999'")
    with pytest.raises(ServiceError, match="schema version 999"):
        with_database(tmp_path, nothing)
