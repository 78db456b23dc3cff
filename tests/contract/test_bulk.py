"""Statements for many rows do what as many statements would."""

from __future__ import annotations

from typing import Any

import pytest

from squall.server.bulk import insert_rows, update_rows
from squall.server.database import Database
from tests.stores import Place

CALL = "fc-1"


def container(number: int, **values: Any) -> dict[str, Any]:
    """A row with a value of each type that the tables have."""
    return {
        "container_id": f"co-{number}",
        "function_id": "fu-1",
        "app_id": "ap-1",
        "node_id": "no-1",
        "cpu": 0.5,
        "memory_mib": 128,
        "gpus": 0,
        "requested_at": 1000,
        "reason": None,
        "memory_peak_bytes": None,
        **values,
    }


def put_containers(rows: list[dict[str, Any]]) -> Any:
    def work(connection: Any) -> None:
        from squall.server import tables

        insert_rows(connection, tables.containers, rows)

    return work


def stored(place: Place, columns: str) -> list[Any]:
    return place.execute(f"SELECT {columns} FROM containers ORDER BY container_id")


def test_rows_are_inserted_with_values_of_every_type(place: Place) -> None:
    rows = [container(1, reason="ended"), container(2, cpu=2, memory_peak_bytes=8 << 30), container(3, reason="a\0b ü")]
    place.run(lambda database: database.write(put_containers(rows)))
    assert stored(place, "container_id, cpu, requested_at, reason, memory_peak_bytes") == [
        ("co-1", 0.5, 1000.0, "ended", None),
        ("co-2", 2.0, 1000.0, None, 8 << 30),
        ("co-3", 0.5, 1000.0, "a\ufffdb ü", None),
    ]


def test_bytes_pass_as_they_are(place: Place) -> None:
    values = [bytes(range(256)), b"", b"\0" * 3]
    common: dict[str, Any] = {"workspace": "main", "environment": "main", "keys": "", "created_at": 1, "updated_at": 1}
    rows = [{**common, "name": f"s{n}", "box": memoryview(value) if n % 2 else value} for n, value in enumerate(values)]

    def work(connection: Any) -> None:
        from squall.server import tables

        insert_rows(connection, tables.secrets, rows)

    place.run(lambda database: database.write(work))
    found = place.execute("SELECT box FROM secrets ORDER BY name")
    assert [bytes(row[0]) for row in found] == values


def test_row_that_is_there_already_fails_the_whole_insert(place: Place) -> None:
    async def body(database: Database) -> None:
        await database.write(put_containers([container(1)]))
        with pytest.raises(Exception, match=r"(?i)unique"):
            await database.write(put_containers([container(2), container(1)]))

    place.run(body)
    assert stored(place, "container_id") == [("co-1",)]


def test_rows_are_updated_by_their_key_where_nothing_is_set_yet(place: Place) -> None:
    ends = [
        {"container_id": "co-1", "stopped_at": 5, "reason": "first", "exit_code": 0},
        {"container_id": "co-2", "stopped_at": 6.5, "reason": None, "exit_code": None},
        {"container_id": "co-9", "stopped_at": 7.0, "reason": "is not there", "exit_code": 1},
    ]
    late = [{"container_id": f"co-{n}", "stopped_at": 9.0, "reason": "late", "exit_code": 9} for n in (1, 3)]

    def work(connection: Any) -> None:
        from squall.server import tables

        insert_rows(connection, tables.containers, [container(n, memory_peak_bytes=n) for n in (1, 2, 3)])
        for rows in (ends, late, []):
            update_rows(
                connection, tables.containers, rows, ("container_id",), unset="stopped_at", clear=("memory_peak_bytes",)
            )

    place.run(lambda database: database.write(work))
    assert stored(place, "container_id, stopped_at, reason, exit_code, memory_peak_bytes") == [
        ("co-1", 5.0, "first", 0, None),
        ("co-2", 6.5, None, None, None),
        ("co-3", 9.0, "late", 9, None),
    ]


@pytest.mark.parametrize(("unset", "kept"), [("stopped_at", "first"), ("", "second")])
def test_two_values_for_one_row_are_taken_in_their_order(place: Place, unset: str, kept: str) -> None:
    ends = [{"container_id": "co-1", "stopped_at": 5.0, "reason": word} for word in ("first", "second")]

    def work(connection: Any) -> None:
        from squall.server import tables

        insert_rows(connection, tables.containers, [container(1)])
        update_rows(connection, tables.containers, ends, ("container_id",), unset=unset)

    place.run(lambda database: database.write(work))
    assert stored(place, "reason") == [(kept,)]


def test_there_is_no_limit_of_rows(place: Place) -> None:
    place.run(lambda database: database.write(put_containers([container(n) for n in range(40_000)])))
    assert place.execute("SELECT count(*) FROM containers") == [(40_000,)]
