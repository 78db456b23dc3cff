"""The Store in PostgreSQL when PostgreSQL goes away, is shared, or is not what it should be."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.abc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from squall.exception import ConflictError, InvalidError, ServiceError
from squall.server import backends, journal
from squall.server.backends import Postgres
from squall.server.database import Database
from tests.conftest import wait_until
from tests.stores import Cluster, Place, find_postgres

TERMINATE = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'squall'"


@pytest.fixture
def store(cluster: Cluster, tmp_path: Path) -> Place:
    return Place(tmp_path, cluster.create())


@pytest.fixture
def own_cluster() -> Iterator[Cluster]:
    """A PostgreSQL that the test may stop."""
    binaries = find_postgres()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    cluster = Cluster(binaries, {"listen_addresses": "''"})
    try:
        yield cluster
    finally:
        cluster.remove()


def count_up(connection: Any) -> int:
    """A write that must not be done twice."""
    row = connection.execute(sa.text("UPDATE meta SET value = value::int + 1 WHERE key = 'n' RETURNING value")).first()
    if row is None:
        connection.execute(sa.text("INSERT INTO meta (key, value) VALUES ('n', '1')"))
    return int(row[0]) if row else 1


def read_count(connection: Any) -> int:
    return int(connection.execute(sa.text("SELECT value FROM meta WHERE key = 'n'")).scalar_one())


def test_writes_go_on_and_are_done_once_when_connections_break(store: Place) -> None:
    async def body(database: Database) -> tuple[list[int], int]:
        await database.write(lambda connection: None)
        done: list[int] = []
        for _ in range(15):
            writes = [asyncio.ensure_future(database.write(count_up)) for _ in range(40)]
            await asyncio.to_thread(store.execute, TERMINATE)
            done += await asyncio.gather(*writes)
        return done, await database.read(read_count)

    done, count = store.run(body)
    assert done == list(range(1, 601))
    assert count == 600


def test_writes_and_reads_wait_for_a_restart(own_cluster: Cluster, tmp_path: Path) -> None:
    store = Place(tmp_path, own_cluster.create())

    async def body(database: Database) -> tuple[list[int], int]:
        first = await database.write(count_up)
        await database.read(read_count)
        await asyncio.to_thread(own_cluster.stop, "immediate")
        later = [asyncio.ensure_future(database.write(count_up)) for _ in range(5)]
        look = asyncio.ensure_future(database.read_committed(read_count))
        await asyncio.to_thread(own_cluster.start)
        return [first, *await asyncio.gather(*later)], await look

    done, seen = store.run(body)
    assert done == [1, 2, 3, 4, 5, 6]
    assert 1 <= seen <= 6


def test_writes_fail_and_may_be_repeated_when_it_stays_away(
    own_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Postgres, "reconnect_s", 0.5)
    store = Place(tmp_path, own_cluster.create())

    async def body(database: Database) -> int:
        await database.write(count_up)
        await asyncio.to_thread(own_cluster.stop)
        with pytest.raises(ServiceError, match="cannot reach the database `store0`"):
            await database.write(count_up)
        await asyncio.to_thread(own_cluster.start)
        return await database.write(count_up)

    assert store.run(body) == 2


def test_commit_whose_answer_was_lost_is_not_done_again(store: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    import psycopg

    make = Postgres.writer
    broken: list[bool] = []

    def writer(self: Postgres) -> Any:
        engine = make(self)
        commit = engine.dialect.do_commit

        def commit_and_break(connection: Any) -> None:
            commit(connection)
            if armed and not broken:
                broken.append(True)
                connection.driver_connection.close()
                raise psycopg.OperationalError("server closed the connection unexpectedly")

        engine.dialect.do_commit = commit_and_break
        return engine

    armed: list[bool] = []
    monkeypatch.setattr(Postgres, "writer", writer)

    async def body(database: Database) -> tuple[int, int]:
        await database.write(lambda connection: None)
        armed.append(True)
        return await database.write(count_up), await database.read(read_count)

    assert store.run(body) == (1, 1)
    assert broken


def test_second_server_on_a_database_is_refused(
    store: Place, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "CLAIM_S", 0.3)
    other = Place(tmp_path_factory.mktemp("other"), store.url)

    async def body(database: Database) -> None:
        await database.ready()
        second = other.open()
        with pytest.raises(ConflictError, match="another server is using the database"):
            await second.ready()
        await second.close()

    store.run(body)
    other.touch()  # the first has ended


def test_server_that_lost_its_database_to_another_writes_no_more(
    store: Place, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "CLAIM_S", 0.2)
    other = Place(tmp_path_factory.mktemp("other"), store.url)

    async def body(first: Database) -> None:
        await first.write(count_up)
        monkeypatch.setattr(first, "_connect_within", refuse_once(first))
        await asyncio.to_thread(store.execute, TERMINATE)
        with pytest.raises(ServiceError):
            await first.write(count_up)
        second = other.open()
        assert await second.write(count_up) == 2
        await second.close()
        with pytest.raises(ConflictError, match="another server has written"):
            await first.write(count_up)

    store.run(body)
    assert store.execute("SELECT value FROM meta WHERE key = 'n'") == [("2",)]


def refuse_once(database: Database) -> Any:
    """The first time as if the network were away still."""
    connect, calls = database._connect_within, iter((True,))

    def connect_within(seconds: float) -> None:
        if next(calls, False):
            raise ServiceError("cannot reach the database")
        connect(seconds)

    return connect_within


def test_lost_race_is_run_again(store: Place) -> None:
    async def body(database: Database) -> int:
        await database.write(count_up)
        with store.engine().connect() as rival:
            rival = rival.execution_options(isolation_level="SERIALIZABLE")
            rival.exec_driver_sql("UPDATE meta SET value = '100' WHERE key = 'n'")
            write = asyncio.ensure_future(database.write(count_up))
            blocked = "SELECT 1 FROM pg_stat_activity WHERE application_name = 'squall' AND wait_event_type = 'Lock'"
            await asyncio.to_thread(wait_until, lambda: store.execute(blocked), "the write waits for the rival")
            rival.commit()
            return await write

    assert store.run(body) == 101


def test_lock_of_another_session_fails_a_write_that_may_be_repeated(
    store: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "POSTGRES_OPTIONS", "-c lock_timeout=200")

    async def body(database: Database) -> int:
        await database.write(count_up)
        with store.engine().begin() as rival:
            rival.exec_driver_sql("LOCK TABLE meta")
            with pytest.raises(ServiceError, match="locked by another session"):
                await database.write(count_up)
        return await database.write(count_up)

    assert store.run(body) == 2


def test_empty_database_where_a_store_was_is_refused(store: Place, cluster: Cluster) -> None:
    store.touch()
    store.url = cluster.create()
    with pytest.raises(ConflictError, match="is empty, and this home had a Store there"):
        store.touch()
    assert store.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'") == []


def test_database_of_another_home_is_refused(
    store: Place, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store.touch()
    other = Place(tmp_path_factory.mktemp("other"), cluster.create())
    other.touch()
    store.url = other.url
    with pytest.raises(ConflictError, match="holds the Store"):
        store.touch()


def test_database_of_something_else_is_refused_and_left_alone(store: Place) -> None:
    store.execute("CREATE TABLE invoices (n int)")
    with pytest.raises(ConflictError, match="is not Squall's: it has the tables invoices"):
        store.touch()
    assert store.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'") == [("invoices",)]


def test_sqlite_in_place_of_the_postgresql_that_was_is_refused(store: Place) -> None:
    store.touch()
    store.url = ""
    with pytest.raises(ConflictError, match="is in PostgreSQL"):
        store.touch()
    assert not store.path.exists()


def test_missing_driver_says_what_to_install(store: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "psycopg", raising=False)
    monkeypatch.setattr(sys, "meta_path", [NothingInstalled()])
    with pytest.raises(InvalidError, match=r"hint: .*pip install 'squall\[postgres\]'"):
        backends.backend_of(store.url, store.directory).check()


class NothingInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: object, target: object = None) -> None:
        return None


@dataclasses.dataclass(frozen=True)
class Wrong:
    url: str
    words: str


@pytest.mark.parametrize(
    "wrong",
    [
        Wrong("mysql://u@h/d", "begins with `mysql`"),
        Wrong("squall.db", "begins with `squall.db`"),
        Wrong("postgresql://u:hidden@h:none/d", "is no URL of a database"),
    ],
    ids=lambda wrong: wrong.url,
)
def test_url_that_names_no_database_is_refused_without_showing_a_password(wrong: Wrong, tmp_path: Path) -> None:
    async def body(database: Database) -> None:
        await database.ready()

    with pytest.raises(InvalidError, match=wrong.words) as refused:
        Place(tmp_path, wrong.url).run(body)
    assert "hidden" not in str(refused.value)


def test_password_is_in_no_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Postgres, "reconnect_s", 0.0)
    with pytest.raises(ServiceError, match=r"cannot reach the database `jobs` at `127\.0\.0\.1:1`") as refused:
        Place(tmp_path, "postgresql://squall:hidden@127.0.0.1:1/jobs").touch()
    assert "hidden" not in str(refused.value)


def test_ended_inputs_are_looked_up_by_their_index_whatever_the_statistics_say(
    store: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[str] = []

    def explain(connection: Any) -> None:
        execute = connection.exec_driver_sql

        def explained(statement: str, parameters: Any) -> None:
            plans.append("\n".join(execute("EXPLAIN " + statement, parameters).scalars()))

        with monkeypatch.context() as patch:
            patch.setattr(connection, "exec_driver_sql", explained, raising=False)
            journal.finish(connection, [journal.Row("fc-1", idx, "ok", "", "", b"1", 1.0) for idx in range(500)])

    def put(connection: Any, idxs: range) -> None:
        entry = journal.Entry("fc-1", "fu-1", "ap-1", "main", "", "", 1.0, [(idx, b"x") for idx in idxs])
        journal.add(connection, [entry], idxs.start + 1)

    async def body(database: Database) -> None:
        await database.write(lambda connection: put(connection, range(1)))
        await asyncio.to_thread(store.execute, "ANALYZE inputs")  # which shall know of one
        await database.write(lambda connection: put(connection, range(1, 5000)))
        await database.write(explain)

    store.run(body)
    assert "uq_inputs_of_call" in plans[0]
    assert "ix_inputs_unfinished" not in plans[0]
    assert "Seq Scan" not in plans[0]
