"""Ends of spawned inputs, as they are read for many who ask at once, over each database."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from squall.server import journal
from squall.server.database import Database
from squall.server.journal import Entry, Payload, Row, Wanted
from squall.server.outputs import BATCH_LIMIT, Outputs
from tests.stores import Place


def fill(connection: Any) -> None:
    """Two calls with many inputs, and many with one, of which all but the last have ended; one of another workspace."""
    calls = [("fc-many", range(200), "main"), ("fc-more", range(3), "main"), ("fc-theirs", range(1), "other")]
    calls += [(f"fc-{number}", range(1), "main") for number in range(50)]
    seq, ends = 1, []
    for call_id, idxs, workspace in calls:
        items: list[tuple[int, Payload]] = [(idx, b"x") for idx in idxs]
        journal.add(connection, [Entry(call_id, "fu-1", "ap-1", workspace, "", "", 1.0, items)], seq)
        seq += len(items)
        ends += [Row(call_id, idx, "ok", "", "", f"{call_id} {idx}".encode(), 2.0) for idx in idxs]
    journal.finish(connection, ends[:-1])


def said(row: Any) -> Any:
    return row if row is None or row is False else row.result


def test_each_who_asks_gets_what_was_asked_for(place: Place) -> None:
    asked = [("fc-many", idx, "main") for idx in range(0, 200, 3)] + [("fc-more", 2, "main"), ("fc-more", 2, "main")]
    asked += [(f"fc-{number}", 0, "main") for number in range(49)] + [("fc-theirs", 0, "other")]

    async def body(database: Database) -> list[Any]:
        await database.write(fill)
        outputs = Outputs(database)
        assert len(asked) > BATCH_LIMIT
        return await asyncio.gather(*(outputs.find(Wanted(*one)) for one in asked))

    assert [said(row) for row in place.run(body)] == [f"{call_id} {idx}".encode() for call_id, idx, _ in asked]


def test_what_is_not_there_or_is_anothers_or_has_not_ended_is_told_apart(place: Place) -> None:
    async def body(database: Database) -> list[Any]:
        await database.write(fill)
        outputs = Outputs(database)
        asked = [("fc-many", 200, "main"), ("fc-none", 0, "main"), ("fc-theirs", 0, "main"), ("fc-49", 0, "main")]
        return await asyncio.gather(*(outputs.find(Wanted(*one)) for one in asked))

    missing, none, theirs, running = place.run(body)
    assert (missing, none, theirs) == (None, False, False)
    assert (running.status, running.result) == (None, None)


def test_who_is_gone_keeps_nobody_waiting_and_a_store_that_fails_is_told_of(place: Place) -> None:
    async def body(database: Database) -> None:
        await database.write(fill)
        outputs = Outputs(database)
        gone, stays = (outputs.find(Wanted("fc-0", 0, "main")) for _ in range(2))
        gone.cancel()
        assert said(await stays) == b"fc-0 0"
        await database.write(lambda connection: connection.exec_driver_sql("DROP TABLE inputs"))
        with pytest.raises(Exception, match="inputs"):
            await outputs.find(Wanted("fc-0", 0, "main"))
        with pytest.raises(Exception, match="inputs"):
            await asyncio.wait_for(outputs.find(Wanted("fc-1", 0, "main")), 20)

    place.run(body)
