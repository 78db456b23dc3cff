"""What the Store's engine promises: an acknowledged write is on disk, one bad write spoils no other."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

from squall.server.database import Database
from tests.stores import Place


def insert_app(app_id: str) -> Callable[[Any], None]:
    def work(connection: Any) -> None:
        from squall.server import tables

        row = {"app_id": app_id, "name": "n", "state": "running", "detached": False, "created_at": 1.0}
        connection.execute(tables.apps.insert(), row)

    return work


def stored_apps(place: Place) -> set[str]:
    return {row[0] for row in place.execute("select app_id from apps")}


def test_an_acknowledged_write_is_on_disk(place: Place) -> None:
    async def body(database: Database) -> set[str]:
        await database.write(insert_app("ap-1"))
        return stored_apps(place)

    assert place.run(body) == {"ap-1"}


def test_a_write_that_fails_spoils_no_other_of_its_group(place: Place) -> None:
    async def body(database: Database) -> list[Any]:
        writes = [database.write(insert_app(f"ap-{i % 10}")) for i in range(11)]
        return await asyncio.gather(*writes, return_exceptions=True)

    results = place.run(body)
    assert [isinstance(result, Exception) for result in results] == [False] * 10 + [True]
    assert len(stored_apps(place)) == 10


def test_writes_made_before_the_start_are_committed_at_the_close(place: Place) -> None:
    async def body(database: Database) -> None:
        database.write_soon(insert_app("ap-soon"))

    place.run(body)
    assert stored_apps(place) == {"ap-soon"}


def put_notes(connection: Any, notes: list[str]) -> list[str]:
    """A kind of write that is one statement for all its items. A note `bad` cannot be stored."""
    from squall.server import tables

    if "bad" in notes:
        raise ValueError("a bad note")
    connection.execute(tables.meta.insert(), [{"key": note, "value": f"of {len(notes)}"} for note in notes])
    return [f"stored {note}" for note in notes]


def get_notes(connection: Any) -> dict[str, str]:
    from squall.server import tables

    table = tables.meta
    query = table.select().where(table.c.key.not_in(("schema_version", "store_id", "last_group")))
    return {row.key: row.value for row in connection.execute(query)}


def test_writes_of_a_kind_are_one_call_for_all_that_wait(place: Place) -> None:
    async def body(database: Database) -> tuple[list[str], dict[str, str]]:
        answers = await asyncio.gather(*(database.write_item(put_notes, f"n{i}") for i in range(500)))
        return answers, await database.read(get_notes)

    answers, notes = place.run(body)
    assert answers == [f"stored n{i}" for i in range(500)]
    assert len(notes) == 500
    assert set(notes.values()) == {"of 500"}


def test_an_item_that_fails_spoils_no_other_of_its_kind(place: Place) -> None:
    async def body(database: Database) -> tuple[list[Any], dict[str, str]]:
        writes = [database.write_item(put_notes, note) for note in ("n1", "bad", "n2")]
        return await asyncio.gather(*writes, return_exceptions=True), await database.read(get_notes)

    answers, notes = place.run(body)
    assert [str(answer) for answer in answers] == ["stored n1", "a bad note", "stored n2"]
    assert notes == {"n1": "of 1", "n2": "of 1"}


def test_a_read_sees_the_writes_called_before_it(place: Place) -> None:
    async def body(database: Database) -> list[int]:
        counts = []
        for i in range(20):
            database.write_soon(insert_app(f"ap-{i}"))
            counts.append(len(await database.read(list_apps)))
        return counts

    assert place.run(body) == list(range(1, 21))


def list_apps(connection: Any) -> list[str]:
    from squall.server import tables

    return [row.app_id for row in connection.execute(tables.apps.select())]


def test_a_long_read_holds_up_no_write(place: Place) -> None:
    reading, done = threading.Event(), threading.Event()

    def long_look(connection: Any) -> list[str]:
        found = list_apps(connection)
        reading.set()
        assert done.wait(30)
        return found + list_apps(connection)

    async def body(database: Database) -> list[str]:
        await database.write(insert_app("ap-1"))
        look = database.read(long_look)
        await asyncio.to_thread(reading.wait, 30)
        await asyncio.wait_for(database.write(insert_app("ap-2")), 30)
        assert await asyncio.wait_for(database.read_committed(list_apps), 30) == ["ap-1", "ap-2"]
        done.set()
        return await look

    assert place.run(body) == ["ap-1", "ap-1"]


def test_a_read_can_change_nothing(place: Place) -> None:
    async def body(database: Database) -> None:
        await database.write(insert_app("ap-1"))
        with pytest.raises(Exception, match=r"read.?only"):
            await database.read(insert_app("ap-2"))

    place.run(body)
    assert stored_apps(place) == {"ap-1"}


def test_words_that_no_database_takes_are_stored_with_replacements(place: Place) -> None:
    def work(connection: Any) -> str:
        from squall.server import tables

        row = {"app_id": "ap-1", "name": "n", "state": "stopped", "detached": False, "created_at": 1.0}
        connection.execute(tables.apps.insert(), {**row, "reason": "a\0b \ud800 ü"})
        return str(connection.execute(sa.select(tables.apps.c.reason)).scalar_one())

    async def body(database: Database) -> str:
        return await database.write(work)

    assert place.run(body) == "a\ufffdb ? ü"
