"""What the journal promises, over SQLite and over the one in memory that the simulator cuts off."""

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


class SqlJournal:
    """The functions of `server.journal`, each in a transaction of its own."""

    def __init__(self, path: Path) -> None:
        self.engine = sa.create_engine(f"sqlite:///{path}")
        tables.metadata.create_all(self.engine)

    def add(self, entries: list[Entry]) -> Any:
        with self.engine.begin() as connection:
            return journal.add(connection, entries, journal.last_seq(connection) + 1)

    def __getattr__(self, name: str) -> Any:
        def ask(*arguments: Any) -> Any:
            with self.engine.begin() as connection:
                return getattr(journal, name)(connection, *arguments)

        return ask


@pytest.fixture(params=["sqlite", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    if request.param == "memory":
        yield MemoryJournal()
        return
    store = SqlJournal(tmp_path / "journal.db")
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


def test_results_and_calls_are_forgotten_in_time(tmp_path: Path) -> None:
    store = SqlJournal(tmp_path / "journal.db")
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
    store.engine.dispose()
