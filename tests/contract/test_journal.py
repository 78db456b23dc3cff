"""What the journal promises, over each database that is present and over the one in memory that the simulator cuts
off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from squall.exception import ConflictError, InvalidError
from squall.outages import MemoryJournal
from squall.server import journal, tables
from squall.server.journal import Added, Entry, Note, Row, Wanted
from tests.stores import Place


class SqlJournal:
    """The functions of `server.journal`, each in a transaction of its own."""

    def __init__(self, place: Place) -> None:
        self.engine = place.engine()
        tables.metadata.create_all(self.engine)

    def add(self, entries: list[Entry]) -> Any:
        with self.engine.begin() as connection:
            return journal.add(connection, entries, journal.last_seq(connection) + 1)

    def __getattr__(self, name: str) -> Any:
        def ask(*arguments: Any) -> Any:
            with self.engine.begin() as connection:
                return getattr(journal, name)(connection, *arguments)

        return ask


@pytest.fixture
def sql(place: Place) -> Iterator[Any]:
    store = SqlJournal(place)
    yield store
    store.engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    if request.param == "memory":
        yield MemoryJournal()
        return
    url = request.getfixturevalue("cluster").create() if request.param == "postgresql" else ""
    store = SqlJournal(Place(tmp_path, url))
    yield store
    store.engine.dispose()


def entry(call_id: str, *idxs: int, function_id: str = "fu-1", key: str = "", digest: str = "") -> Entry:
    items: list[tuple[int, Any]] = [(idx, b"%d" % idx) for idx in idxs]
    return Entry(call_id, function_id, "ap-1", "main", "", "", 1000.0, items, key, digest)


def ended(call_id: str, idx: int, status: Any = "ok", data: bytes = b"r") -> Row:
    return Row(call_id, idx, status, "", "", data, 1001.0)


def waiting(store: Any, after: int = 0, limit: int = 100) -> list[tuple[str, int]]:
    return [(kept.call_id, kept.idx) for kept in store.window(after, limit).inputs]


def test_inputs_are_numbered_in_their_order(store: Any) -> None:
    first, second = store.add([entry("fc-a", 0, 1), entry("fc-b", 7)])
    assert (first.seq, [idx for idx, _ in first.items], second.seq) == (1, [0, 1], 3)
    [third] = store.add([entry("fc-a", 2)])
    assert third.seq == 4
    assert waiting(store) == [("fc-a", 0), ("fc-a", 1), ("fc-b", 7), ("fc-a", 2)]


def test_repeating_a_submit_adds_nothing(store: Any) -> None:
    store.add([entry("fc-a", 0, 1)])
    [again] = store.add([entry("fc-a", 1, 2)])
    assert again.items == [(2, b"2")]
    once, twice = store.add([entry("fc-b", 0), entry("fc-b", 0)])
    assert (len(once.items), len(twice.items)) == (1, 0)
    assert len(waiting(store)) == 4


def test_a_call_belongs_to_one_function(store: Any) -> None:
    store.add([entry("fc-a", 0)])
    [refused, fine] = store.add([entry("fc-a", 1, function_id="fu-2"), entry("fc-c", 0)])
    assert isinstance(refused, InvalidError) and isinstance(fine, Added)


def test_the_first_end_wins(store: Any) -> None:
    store.add([entry("fc-a", 0, 1)])
    store.finish([ended("fc-a", 0, "ok", b"first")])
    store.finish([ended("fc-a", 0, "error", b"second"), ended("fc-a", 1)])
    assert waiting(store) == []
    if isinstance(store, SqlJournal):
        [row] = store.find_outputs([Wanted("fc-a", 0, "main")])
        assert (row.status, row.result) == ("ok", b"first")
        assert store.payloads([1]) == {1: b""}
    else:
        assert store.lines["fc-a", 0].end == ended("fc-a", 0, "ok", b"first")


def test_what_was_tried_is_remembered_until_the_end(store: Any) -> None:
    store.add([entry("fc-a", 0)])
    store.note([Note("fc-a", 0, 2, 1, 1, 1234.5)])
    [kept] = store.window(0, 10).inputs
    assert kept[3:] == (2, 1, 1, 1234.5, False)


def test_a_window_goes_on_where_the_last_one_ended(store: Any) -> None:
    store.add([entry("fc-a", *range(10))])
    store.finish([ended("fc-a", 4)])
    first = store.window(0, 5)
    assert [kept.idx for kept in first.inputs] == [0, 1, 2, 3, 5]
    assert waiting(store, first.inputs[-1].seq, 5) == [("fc-a", idx) for idx in (6, 7, 8, 9)]
    assert first.calls["fc-a"].function_id == "fu-1"


def test_arguments_are_found_by_number(store: Any) -> None:
    store.add([entry("fc-a", 5, 6), Entry("fc-b", "fu-1", "ap-1", "main", "", "", 1.0, [(0, "d" * 64)])])
    assert store.payloads([2, 1, 3, 99]) == {1: b"5", 2: b"6", 3: "d" * 64}


def test_a_cancelled_call_says_so_and_takes_no_more(store: Any) -> None:
    store.add([entry("fc-a", 0, 1)])
    store.finish([ended("fc-a", 0)])
    assert store.cancel("fc-a", None, "main", 1002.0) == 1
    assert store.window(0, 10).calls["fc-a"].cancelled
    [refused] = store.add([entry("fc-a", 2)])
    assert isinstance(refused, ConflictError)


def test_cancelled_inputs_say_so_and_others_do_not(store: Any) -> None:
    store.add([entry("fc-a", 0, 1, 2)])
    assert store.cancel("fc-a", [1, 9], "main", 1002.0) == 1
    assert [kept.cancelled for kept in store.window(0, 10).inputs] == [False, True, False]


def test_a_call_of_another_workspace_cannot_be_cancelled(store: Any) -> None:
    store.add([entry("fc-a", 0)])
    assert store.cancel("fc-a", None, "theirs", 1002.0) is None
    assert store.cancel("fc-none", None, "main", 1002.0) is None
    assert not store.window(0, 10).calls["fc-a"].cancelled


def test_one_key_names_one_call(store: Any) -> None:
    first, again = store.add([entry("fc-a", 0, key="k", digest="d"), entry("fc-b", 0, key="k", digest="d")])
    assert (first.call_id, again.call_id, again.items) == ("fc-a", "fc-a", [])
    [other] = store.add([entry("fc-c", 0, key="k", digest="e")])
    assert isinstance(other, ConflictError)
    [elsewhere] = store.add([entry("fc-d", 0, key="k", digest="e", function_id="fu-2")])
    assert elsewhere.call_id == "fc-d"
    [repeated] = store.add([entry("fc-a", 0, key="k", digest="d")])
    assert (repeated.call_id, repeated.items) == ("fc-a", [])


def ends(store: Any, call_id: str, count: int) -> list[str]:
    """How the first `count` inputs of a call ended, and why."""
    if isinstance(store, MemoryJournal):
        found = [store.lines[call_id, idx].end for idx in range(count)]
        return ["" if row is None else f"{row.status} {row.message}".strip() for row in found]
    rows = store.find_outputs([Wanted(call_id, idx, "main") for idx in range(count)])
    return [f"{row.status or ''} {row.message or ''}".strip() for row in rows]


CANCELLED = f"cancelled {journal.CANCELLED}"


def test_a_cancelled_call_is_tidied_some_inputs_at_a_time(store: Any) -> None:
    store.add([entry("fc-a", *range(7)), entry("fc-b", 0)])
    store.finish([ended("fc-a", 1)])
    assert store.tidy("fc-a", -1, 3, ()) is None, "it is not cancelled"
    assert store.cancel("fc-a", None, "main", 1002.0, False) == 0
    assert store.tidy("fc-a", -1, 3, ()) == 2
    assert ends(store, "fc-a", 4) == [CANCELLED, "ok", CANCELLED, ""]
    assert store.tidy("fc-a", 2, 3, ()) == 5
    assert store.tidy("fc-a", 5, 3, ()) is None
    assert ends(store, "fc-a", 7)[3:] == [CANCELLED] * 4
    assert waiting(store) == [("fc-b", 0)]


def test_what_still_runs_is_spared_and_ends_by_itself(store: Any) -> None:
    store.add([entry("fc-a", *range(6))])
    store.cancel("fc-a", None, "main", 1002.0, False)
    assert store.tidy("fc-a", -1, 6, (0, 3, 99)) == 5
    assert waiting(store) == [("fc-a", 0), ("fc-a", 3)]
    store.finish([ended("fc-a", 3), ended("fc-a", 4)])
    assert ends(store, "fc-a", 6) == ["", CANCELLED, CANCELLED, "ok", CANCELLED, CANCELLED]


def test_thousands_of_inputs_can_be_spared(store: Any) -> None:
    store.add([entry("fc-a", *range(3000))])
    store.mark("fc-a", "its function was stopped", 1002.0)
    assert store.tidy("fc-a", -1, 5000, frozenset(range(2999))) is None
    assert ends(store, "fc-a", 3000)[2998:] == ["", "cancelled its function was stopped"]


def test_what_was_said_first_of_a_cancel_stays(store: Any) -> None:
    store.add([entry("fc-a", 0), entry("fc-b", 0)])
    assert store.mark("fc-a", "its function was stopped", 1002.0) == "its function was stopped"
    store.cancel("fc-a", None, "main", 1003.0, False)
    assert store.mark("fc-a", "again", 1004.0) == "its function was stopped"
    store.tidy("fc-a", -1, 10, ())
    assert ends(store, "fc-a", 1) == ["cancelled its function was stopped"]
    assert not store.window(0, 10).calls["fc-b"].cancelled


def test_an_input_of_a_cancelled_call_is_shown_as_cancelled_before_it_has_a_row(sql: Any) -> None:
    sql.add([entry("fc-a", 0, 1), entry("fc-b", 0)])
    sql.finish([ended("fc-a", 0)])
    sql.mark("fc-a", "its function was stopped", 1002.0)
    shown = [(row.call_id, row.status) for row in sql.find_inputs(["fc-a", "fc-b"], 10)]
    assert shown == [("fc-a", "ok"), ("fc-a", "cancelled"), ("fc-b", None)]
    [row] = sql.find_outputs([Wanted("fc-a", 1, "main")])
    assert (row.cancel_reason, row.status) == ("its function was stopped", None)


def test_results_and_calls_are_forgotten_in_time(sql: Any) -> None:
    store = sql
    store.add([entry("fc-a", 0, 1), entry("fc-b", 0)])
    store.finish([ended("fc-a", 0), ended("fc-a", 1)])
    days = 86400.0
    assert store.expire(1001.0 + 6.9 * days, 10) == 0
    assert store.expire(1001.0 + 7.1 * days, 1) == 1
    while store.expire(1001.0 + 7.1 * days, 1):
        pass
    assert store.count_inputs("fc-a") == {"expired": 2}
    while store.expire(1001.0 + 31 * days, 1):
        pass
    assert store.find_call("fc-a", "main") is None
    assert store.find_call("fc-b", "main") is not None and waiting(store) == [("fc-b", 0)]


def test_each_step_of_forgetting_changes_no_more_than_it_may(sql: Any) -> None:
    sql.add([entry("fc-a", *range(20)), *(entry(f"fc-k{n}", 0, key=f"k{n}", digest="d") for n in range(20))])
    sql.finish([ended("fc-a", idx) for idx in range(20)])
    late = 1001.0 + 7.1 * 86400.0

    def left() -> tuple[int, int]:
        with sql.engine.connect() as connection:
            keys = connection.execute(sa.select(sa.func.count()).select_from(tables.keys)).scalar_one()
        return sql.count_inputs("fc-a").get("ok", 0), keys

    seen = [left()]
    while sql.expire(late, 6):
        seen.append(left())
    assert seen == [(20, 20), (14, 14), (8, 8), (2, 2), (0, 0)]


def rows_read(sql: Any) -> int:
    """Of `inputs` in PostgreSQL so far."""
    with sql.engine.begin() as connection:
        connection.exec_driver_sql("SELECT pg_stat_force_next_flush()")
        query = "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_user_tables WHERE relname = 'inputs'"
        return int(connection.exec_driver_sql(query).scalar_one())


def test_a_step_reads_no_more_than_it_changes_though_statistics_are_of_an_empty_table(sql: Any) -> None:
    if sql.engine.dialect.name == "sqlite":
        pytest.skip("SQLite has no statistics unless it is asked for them")
    with sql.engine.begin() as connection:
        connection.exec_driver_sql("ANALYZE")
    sql.add([entry("fc-a", *range(20_000))])
    sql.mark("fc-a", journal.CANCELLED, 1002.0)
    before = rows_read(sql)
    assert sql.tidy("fc-a", 4999, 100, ()) == 5099
    assert rows_read(sql) - before < 1000
    sql.tidy("fc-a", -1, 20_000, ())
    before = rows_read(sql)
    assert sql.expire(1002.0 + 8 * 86400.0, 100) == 100
    assert rows_read(sql) - before < 1000


def plan_of(sql: Any, text: str) -> str:
    with sql.engine.begin() as connection:
        if sql.engine.dialect.name == "sqlite":
            return str([row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}")])
        connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
        return str([row[0] for row in connection.exec_driver_sql(f"EXPLAIN {text}")])


def test_forgetting_looks_at_what_is_to_go_and_at_nothing_else(sql: Any) -> None:
    kept = "SELECT seq FROM inputs WHERE status IS NOT NULL AND status <> 'expired' AND finished_at < 5 "
    assert "ix_inputs_kept" in plan_of(sql, kept + "ORDER BY finished_at LIMIT 10")
    expired = "SELECT seq FROM inputs WHERE status = 'expired' AND finished_at < 5 "
    assert "ix_inputs_expired" in plan_of(sql, expired + "ORDER BY finished_at LIMIT 10")
