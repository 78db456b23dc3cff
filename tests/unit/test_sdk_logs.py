"""Entries of logs as the SDK gives them, and the times that may be named."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

import squall
from squall import FunctionCall
from squall.exception import InvalidError
from squall.logs import moment_of
from squall.protocol.messages import Reply
from squall.protocol.requests import MoreLogs, ReadLogs
from tests.unit.conftest import Peer

NOW = 1_700_000_000.0


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("90s", NOW - 90),
        ("1h30m", NOW - 5400),
        ("2d", NOW - 172_800),
        ("0.5h", NOW - 1800),
        (timedelta(minutes=1), NOW - 60),
        (datetime(2026, 3, 1, tzinfo=timezone.utc), 1_772_323_200.0),
        ("2026-03-01T00:00Z", 1_772_323_200.0),
        ("2026-03-01T01:00+01:00", 1_772_323_200.0),
        (12.5, 12.5),
    ],
)
def test_time_is_understood(value: Any, found: float) -> None:
    assert moment_of(value, NOW) == found


@pytest.mark.parametrize("value", ["", "1", "h", "1x", "yesterday", "1h-", "٣h", "1.2.3h", True, None, b"1h"])
def test_what_is_no_time_is_told_with_what_is(value: Any) -> None:
    with pytest.raises(InvalidError, match="is no point of time"):
        moment_of(value, NOW)


def page(*pieces: tuple[float, bytes], done: bool, gap: bool = False) -> tuple[dict[str, Any], bytes]:
    rows = [[at, "co-1", "f", "stdout", len(data)] for at, data in pieces]
    return {"entries": rows, "done": done, "gap": gap, "reader": "rd-1", "app_id": "ap-1"}, b"".join(
        data for _, data in pieces
    )


@pytest.fixture
def pages(peer: Peer) -> list[tuple[dict[str, Any], bytes]]:
    """What the peer answers, page after page."""
    left: list[tuple[dict[str, Any], bytes]] = []

    def answer(message: Any, payload: bytes) -> None:
        if getattr(message, "close", False):
            return
        data, body = left.pop(0)
        peer.send(Reply(data, re=message.id), body)

    peer.answers[ReadLogs] = peer.answers[MoreLogs] = answer
    return left


def test_pages_become_lines(peer: Peer, pages: list[tuple[dict[str, Any], bytes]]) -> None:
    pages += [page((1.0, b"one\n"), (2.0, b"two\r\n"), done=False), page((3.0, b"\xff\x00\x1b[31m"), done=True)]
    found = list(FunctionCall.from_id("fc-1").logs.fetch())
    assert [entry.message for entry in found] == ["one", "two", "\\xff\x00\x1b[31m"]
    assert found[0].timestamp == datetime(1970, 1, 1, 0, 0, 1, tzinfo=timezone.utc)
    assert (found[0].source, found[0].function, found[0].container_id, found[0].app_id) == (
        "stdout",
        "f",
        "co-1",
        "ap-1",
    )


def test_request_says_what_is_wanted(peer: Peer, pages: list[tuple[dict[str, Any], bytes]]) -> None:
    app = squall.App("named")
    pages += [page(done=True), page(done=True)]
    list(app.logs.fetch(since=5.0, until=6.0, source="stderr", search_text="x"))
    app.logs.tail(7)
    first, second = peer.of(ReadLogs)
    assert (first.app, first.since, first.until, first.source, first.search) == ("named", 5.0, 6.0, "stderr", "x")
    assert (first.lines, first.follow, second.tail) == (True, False, 7)


def test_leaving_a_stream_early_gives_its_reader_back(peer: Peer, pages: list[tuple[dict[str, Any], bytes]]) -> None:
    pages += [page((1.0, b"one\n"), done=False)]
    for entry in FunctionCall.from_id("fc-1").logs.stream():
        assert entry.message == "one"
        break
    peer.client.put_blob(b"so that all before has arrived")
    assert [message.close for message in peer.of(MoreLogs)] == [True]


def test_app_without_a_name_has_logs_while_it_runs_only() -> None:
    with pytest.raises(InvalidError, match="without a name"):
        squall.App().logs.tail()
