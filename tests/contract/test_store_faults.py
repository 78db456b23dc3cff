"""What the Store does when its disk is full, its file locked, read-only, damaged, gone or somebody else's."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from squall.exception import ConflictError, Error, ResourceExhaustedError, ServiceError
from squall.server import backends
from squall.server.database import Database
from tests.conftest import wait_until
from tests.stores import Place


@pytest.fixture
def store(tmp_path: Path) -> Place:
    return Place(tmp_path)


def put(key: str, size: int = 1) -> Any:
    def work(connection: Any) -> None:
        from squall.server import tables

        connection.execute(tables.meta.insert(), {"key": key, "value": "x" * size})

    return work


def keys(place: Place) -> set[str]:
    return {row[0] for row in place.execute("SELECT key FROM meta")} - {"schema_version", "store_id"}


async def fill(database: Database) -> list[str]:
    """Write until the disk is full; what was acknowledged."""
    acknowledged: list[str] = []
    for number in range(1000):
        answers = await asyncio.gather(database.write(put(f"k{number}", 50_000)), return_exceptions=True)
        answer: object = answers[0]
        if answer is not None:
            assert isinstance(answer, ResourceExhaustedError)
            assert "squall.db` is full\nhint: free some space" in str(answer)
            return acknowledged
        acknowledged.append(f"k{number}")
    pytest.fail("the disk was never full")


@pytest.mark.root
def test_full_disk_refuses_writes_and_loses_nothing_acknowledged(small_disk: Path) -> None:
    place = Place(small_disk)

    async def body(database: Database) -> list[str]:
        await database.ready()
        acknowledged = await fill(database)
        (small_disk / "filler").unlink()
        await database.write(put("after"))
        return [*acknowledged, "after"]

    acknowledged = place.run(body)
    assert len(acknowledged) > 5
    assert keys(place) == set(acknowledged)
    assert place.execute("PRAGMA integrity_check") == [("ok",)]


@pytest.mark.root
def test_reads_go_on_while_the_disk_is_full(small_disk: Path) -> None:
    async def body(database: Database) -> int:
        await fill(database)
        return await database.read(lambda connection: connection.exec_driver_sql("SELECT 42").scalar_one())

    assert Place(small_disk).run(body) == 42


@pytest.mark.root
def test_records_that_nobody_waits_for_are_kept_until_there_is_room(small_disk: Path) -> None:
    place = Place(small_disk)

    async def body(database: Database) -> None:
        await fill(database)
        for number in range(3):
            database.write_soon(put(f"soon{number}", 50_000))
        with pytest.raises(ResourceExhaustedError):
            await database.write(put("refused", 50_000))
        (small_disk / "filler").unlink()
        here = "SELECT count(*) FROM meta WHERE key LIKE 'soon%'"
        await asyncio.to_thread(wait_until, lambda: place.execute(here) == [(3,)], "the records are written")

    place.run(body)
    assert "refused" not in keys(place)


@contextlib.contextmanager
def locked(place: Place) -> Iterator[None]:
    """Another process has the database."""
    connection = sqlite3.connect(place.path, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield
    finally:
        connection.close()


def test_write_waits_for_a_lock_that_goes(store: Place) -> None:
    async def body(database: Database) -> None:
        await database.ready()
        with locked(store):
            write = asyncio.ensure_future(database.write(put("k")))
            for _ in range(100):  # the loop is not held up
                await asyncio.sleep(0)
            assert not write.done()
        await write

    store.run(body)
    assert keys(store) == {"k"}


def test_write_fails_and_may_be_repeated_when_a_lock_stays(store: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "BUSY_MS", 200)

    async def body(database: Database) -> None:
        await database.ready()
        with locked(store):
            with pytest.raises(ServiceError, match=r"another process has kept `.*squall\.db` locked"):
                await database.write(put("k"))
            await database.read(lambda connection: None)
        await database.write(put("k"))

    store.run(body)
    assert keys(store) == {"k"}


@pytest.mark.root
def test_read_only_store_says_so(store: Place) -> None:
    store.touch()
    subprocess.run(["mount", "--bind", "-o", "ro", store.directory, store.directory], check=True)
    try:
        with pytest.raises(Error, match=r"squall\.db") as refused:
            store.run(lambda database: database.write(put("k")))
    finally:
        subprocess.run(["umount", store.directory], check=True)
    assert "write" in str(refused.value)
    assert keys(store) == set()


def refusal_of(place: Place, words: str) -> None:
    """Both the look before the server begins and the opening refuse it."""

    async def check() -> None:
        place.open().check()

    with pytest.raises(ConflictError, match=words) as refused:
        asyncio.run(check())
    assert "restore it from a backup" in str(refused.value)
    with pytest.raises(ConflictError, match=words):
        place.touch()


def test_garbage_in_place_of_the_database_is_refused_and_left_alone(store: Place) -> None:
    garbage = b"this is no database" * 100
    store.path.write_bytes(garbage)
    refusal_of(store, "is not a database")
    assert store.path.read_bytes() == garbage
    assert sorted(path.name for path in store.directory.iterdir()) == ["squall.db"]


def test_write_to_a_store_that_could_not_be_opened_says_why(store: Place) -> None:
    store.path.write_bytes(b"this is no database" * 100)
    with pytest.raises(ServiceError, match=r"the store is not available: .* is not a database(.|\n)*backup"):
        store.run(lambda database: database.write(put("k")))


def test_database_that_was_deleted_is_not_made_anew(store: Place) -> None:
    store.touch()
    store.path.unlink()
    refusal_of(store, "is gone, and this home had one")
    assert not store.path.exists()


def test_database_that_was_emptied_is_refused(store: Place) -> None:
    store.touch()
    store.path.write_bytes(b"")
    refusal_of(store, "is empty, and this home had one")
    assert store.path.read_bytes() == b""


def test_store_starts_over_when_its_marker_was_moved_away(store: Place) -> None:
    store.touch()
    store.path.unlink()
    (store.directory / "store.json").rename(store.directory / "store.json.old")
    store.run(lambda database: database.write(put("k")))
    assert keys(store) == {"k"}


def test_database_of_another_program_is_refused_and_left_alone(store: Place) -> None:
    with contextlib.closing(sqlite3.connect(store.path)) as connection:
        connection.execute("CREATE TABLE invoices (n)")
    before = store.path.read_bytes()
    refusal_of(store, "is not Squall's: it has the tables invoices")
    assert store.path.read_bytes() == before


def test_store_of_another_home_is_refused(store: Place, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = Place(tmp_path_factory.mktemp("other"))
    store.touch()
    other.touch()
    os.replace(other.path, store.path)
    with pytest.raises(ConflictError, match=r"holds the Store .* that of this home is"):
        store.touch()


def test_damaged_pages_are_found_when_the_store_is_opened(store: Place) -> None:
    async def body(database: Database) -> None:
        await asyncio.gather(*(database.write(put(f"k{number}", 500)) for number in range(200)))

    store.run(body)
    damaged = bytearray(store.path.read_bytes())
    middle = len(damaged) // 2 // 4096 * 4096
    damaged[middle : middle + 8192] = os.urandom(8192)
    store.path.write_bytes(damaged)
    with pytest.raises(ConflictError, match=r"squall.db` is damaged: (.|\n)*backup"):
        store.touch()
    assert store.path.read_bytes() == damaged


def test_store_that_was_not_closed_opens_with_all_that_was_acknowledged(store: Place) -> None:
    program = (
        "import asyncio, os, pathlib\n"
        "from tests.contract.test_store_faults import put\n"
        "from tests.stores import Place\n"
        "async def main():\n"
        f"    database = Place(pathlib.Path({str(store.directory)!r})).open()\n"
        "    await database.write(put('k'))\n"
        "    os.kill(os.getpid(), 9)\n"
        "asyncio.run(main())\n"
    )
    import sys

    subprocess.run([sys.executable, "-c", program], check=False, timeout=60, cwd=Path(__file__).parents[2])
    store.touch()
    assert keys(store) == {"k"}
