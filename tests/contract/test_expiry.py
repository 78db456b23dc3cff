"""Results are kept for 7 days: then asking for one says so, and it is deleted, some at a time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from squall.exception import NotFoundError, OutputExpiredError
from squall.protocol.messages import GetOutput
from squall.server import calls, journal, tables
from squall.server.calls import Calls
from squall.server.database import Database
from squall.server.dispatch import Dispatch
from squall.server.journal import Entry, Row
from squall.server.objects import MAIN, Objects
from squall.server.sealing import Seal
from squall.server.timelines import Timelines
from tests.stores import Place

DAY = 86400.0
CALL = "fc-0000000000000001"
COUNT = 50


class Asker:
    """A connection that keeps its answers."""

    scope = MAIN

    def __init__(self) -> None:
        self.answers: list[dict[str, Any]] = []

    def reply(self, number: int, data: dict[str, Any], payload: bytes = b"") -> None:
        self.answers.append(data)


async def with_results(database: Database, directory: Path, days_ago: float) -> Calls:
    """A call whose COUNT inputs ended that long ago; one more has not."""
    ended_at = time.time() - days_ago * DAY
    entry = Entry(CALL, "fu-1", "ap-1", "main", "", "", ended_at, [(idx, b"x") for idx in range(COUNT + 1)], "key", "d")
    rows = [Row(CALL, idx, "ok", "", "", b"result", ended_at) for idx in range(COUNT)]
    await database.write(lambda connection: journal.add(connection, [entry], 1))
    await database.write(lambda connection: journal.finish(connection, rows))
    return Calls(Dispatch(), Objects(database, Seal(directory / "seal.key", "")), database, Timelines())


async def status_of(asked: Calls, idx: int) -> str:
    peer = Asker()
    await asked.get_output(peer, GetOutput(CALL, idx, 0.0))
    [answer] = peer.answers
    return str(answer["item"]["status"]) if answer["ready"] else ""


def test_a_result_is_there_for_seven_days(place: Place, tmp_path: Path) -> None:
    async def body(database: Database) -> None:
        asked = await with_results(database, tmp_path, 6.99)
        await asked.expire(time.time())
        assert await status_of(asked, 3) == "ok"

    place.run(body)


def test_a_result_past_its_seven_days_is_expired_before_and_after_it_is_deleted(place: Place, tmp_path: Path) -> None:
    async def body(database: Database) -> None:
        asked = await with_results(database, tmp_path, 7.01)
        with pytest.raises(OutputExpiredError, match="was kept for 7 days"):
            await status_of(asked, 3)
        await asked.expire(time.time())
        with pytest.raises(OutputExpiredError, match="was kept for 7 days"):
            await status_of(asked, 3)
        assert await status_of(asked, COUNT) == "", "what still waits is kept, however old"

    place.run(body)
    assert place.execute("SELECT count(*) FROM inputs WHERE result IS NOT NULL OR args IS NOT NULL") == [(1,)]
    assert place.execute("SELECT count(*) FROM keys") == [(0,)]


def test_results_are_deleted_in_steps_between_which_others_write(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "EXPIRE_LIMIT", 8)
    left: list[int] = []

    async def body(database: Database) -> None:
        asked = await with_results(database, tmp_path, 8)
        write = database.write

        def noted(work: Any) -> Any:
            def counted(connection: Any) -> Any:
                found = work(connection)
                query = tables.inputs.select().where(tables.inputs.c.result.is_not(None))
                left.append(len(connection.execute(query).all()))
                return found

            return write(counted)

        monkeypatch.setattr(database, "write", noted)
        await asked.expire(time.time())

    place.run(body)
    assert left == [42, 34, 26, 18, 10, 2, 0, 0]


def test_a_call_is_forgotten_after_thirty_days(place: Place, tmp_path: Path) -> None:
    async def body(database: Database) -> None:
        asked = await with_results(database, tmp_path, 30.01)
        await database.write(
            lambda connection: connection.execute(tables.inputs.delete().where(tables.inputs.c.idx == COUNT))
        )
        await asked.expire(time.time())
        with pytest.raises(NotFoundError, match="results are kept for 7 days"):
            await status_of(asked, 3)

    place.run(body)
