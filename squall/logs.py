"""Logs: what containers have written and write, of an app, a function or a call, line by line.

Asks the server for page after page and cuts pages into entries; what is found where is the server's business. Tested in
`tests/unit/test_sdk_logs.py` and `tests/integration/test_logs.py`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from typing import Any

from squall._blocking import both, both_generator
from squall.client import Client
from squall.exception import InvalidError, NotFoundError, ServiceError
from squall.protocol.requests import MoreLogs, ReadLogs

PAGE_WAIT_S = 10.0
TICK_S = 1e-6
"""Times of entries are told apart by so much."""
SOURCES = ("stdout", "stderr", "system")
Moment = datetime | timedelta | float | str
"""A point of time: a datetime (without a time zone: local time), a timedelta (so long ago), seconds since 1970, or a
text such as `1h30m` (so long ago) or `2026-03-01T12:00`."""
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


@dataclass(frozen=True)
class LogEntry:
    """One line that a container has written.

    `message` is without its line end; bytes that are no UTF-8 are shown as `\\xff`. `timestamp` is in UTC. `source` is
    `stdout`, `stderr`, or `system` for what Squall itself has to say; a line of more than 64 KiB comes in pieces.
    """

    message: str
    timestamp: datetime
    source: str
    container_id: str
    function: str
    app_id: str

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Piece:
    """Bytes as a page of the server brings them."""

    at: float
    container_id: str
    function: str
    source: str
    data: bytes


@dataclass(frozen=True)
class Page:
    pieces: list[Piece]
    app_id: str
    reader: str
    done: bool
    gap: bool


class Logs:
    """What the containers of an app, a function or a call have written; from their attribute `logs`.

    Output is kept for 30 days and within limits of size, the newest first, also when the app has ended. Lines of one
    stream of a container are in their order.

    Example:

        @app.function()
        def greet(name):
            print("hello", name)

        @app.local_entrypoint()
        def main():
            greet.for_each(["Ada", "Grace"])
            for entry in greet.logs.fetch(search_text="Ada"):
                print(entry.timestamp, entry.source, entry.message)
    """

    def __init__(self, target: Callable[[], Awaitable[tuple[Client, ReadLogs]]]) -> None:
        self._target = target

    @both_generator
    async def fetch(
        self,
        *,
        since: Moment | None = None,
        until: Moment | None = None,
        source: str | None = None,
        search_text: str | None = None,
    ) -> AsyncGenerator[LogEntry, None]:
        """What is kept now, the oldest first.

        - `since`, `until`: a datetime, a timedelta (so long ago), seconds since 1970, or text such as `"1h"`.
        - `source`: only `"stdout"`, `"stderr"` or `"system"`.
        - `search_text`: only lines that hold this text, as it is written.

        Raises InvalidError for a wrong time or source, NotFoundError where there is no such app, function or call.
        """
        async for entry in self._entries(_request(since, until, source, search_text)):
            yield entry

    @both
    async def tail(
        self, entries: int = 100, *, source: str | None = None, search_text: str | None = None
    ) -> list[LogEntry]:
        """The newest `entries` lines, at most 10,000, the oldest of them first."""
        request = _request(None, None, source, search_text)
        request.tail = entries
        return [entry async for entry in self._entries(request)]

    @both_generator
    async def stream(
        self, timeout: float | None = None, *, source: str | None = None, search_text: str | None = None
    ) -> AsyncGenerator[LogEntry, None]:
        """What is kept and then what comes, until nothing more can come: the app has stopped, the call has ended.

        - `timeout`: seconds after which to end in any case.

        A line without an end, such as a prompt, is given when nothing follows it, and its rest as an entry of its own.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        request = _request(None, None, source, search_text)
        request.follow = True
        async for entry in self._entries(request, deadline):
            yield entry

    async def _entries(self, request: ReadLogs, deadline: float | None = None) -> AsyncGenerator[LogEntry, None]:
        client, named = await self._target()
        request = replace(
            request, app=named.app, function=named.function, container_id=named.container_id, call=named.call
        )
        pages = read_pages(client, request, deadline)
        try:
            async for page in pages:
                for entry in entries_of(page):
                    yield entry
        finally:
            await pages.aclose()


async def read_pages(client: Client, request: ReadLogs, deadline: float | None = None) -> AsyncGenerator[Page, None]:
    """Page after page, until the last or the deadline (of the monotonic clock)."""
    page, newest = await _page(client, request), request.since
    try:
        while True:
            newest = max([newest, *(piece.at for piece in page.pieces)])
            yield page
            left = PAGE_WAIT_S if deadline is None else deadline - time.monotonic()
            if page.done or left <= 0:
                break
            try:
                page = await _page(client, MoreLogs(page.reader, min(PAGE_WAIT_S, left)))
            except (ServiceError, NotFoundError):  # another server, which has not this reader but what was kept
                if not request.follow:
                    raise
                page = await _page(client, replace(request, tail=0, since=newest + TICK_S))
    finally:
        if not page.done and client.usable():
            client.link.send(MoreLogs(page.reader, close=True))


async def _page(client: Client, request: Any) -> Page:
    reply, payload = await client.request(request)
    pieces, offset = [], 0
    for at, container_id, function, source, size in reply.data["entries"]:
        pieces.append(Piece(float(at), str(container_id), str(function), str(source), payload[offset : offset + size]))
        offset += size
    data = reply.data
    return Page(pieces, str(data["app_id"]), str(data["reader"]), bool(data["done"]), bool(data["gap"]))


def entries_of(page: Page) -> Iterator[LogEntry]:
    for piece in page.pieces:
        text = piece.data.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8", "backslashreplace")
        at = datetime.fromtimestamp(piece.at, timezone.utc)
        yield LogEntry(text, at, piece.source, piece.container_id, piece.function, page.app_id)


def _request(since: Moment | None, until: Moment | None, source: str | None, search_text: str | None) -> ReadLogs:
    if source is not None and source not in SOURCES:
        raise InvalidError(f"`source` is {source!r:.80}", hint="it is stdout, stderr or system")
    request = ReadLogs(lines=True, source=source or "", search=search_text or "")
    request.since = 0.0 if since is None else moment_of(since)
    request.until = 0.0 if until is None else moment_of(until)
    return request


def moment_of(value: Moment, now: float | None = None) -> float:
    """A point of time in seconds since 1970. Raises InvalidError."""
    now = time.time() if now is None else now
    if isinstance(value, datetime):
        return value.timestamp()
    if isinstance(value, timedelta):
        return now - value.total_seconds()
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str):
        ago = _duration(value.strip())
        if ago is not None:
            return now - ago
        try:
            return datetime.fromisoformat(value.strip().replace("Z", "+00:00")).timestamp()
        except ValueError:
            pass
    raise InvalidError(
        f"{value!r:.80} is no point of time", hint="so long ago, such as `90s`, `1h30m` or `2d`; or `2026-03-01T12:00`"
    )


def _duration(text: str) -> float | None:
    """Seconds of `1h30m`; None for what is no such text."""
    total, digits = 0.0, ""
    for char in text:
        if char.isascii() and (char.isdigit() or char == "."):
            digits += char
        elif char in _UNITS and digits.replace(".", "", 1).isdigit():
            total, digits = total + float(digits) * _UNITS[char], ""
        else:
            return None
    return total if text and not digits else None
