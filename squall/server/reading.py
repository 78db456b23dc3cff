"""Reading kept output: which records are wanted, their lines, and pages of them.

A reader is made by one request and asked for page after page by others: a client takes what it can, and nothing piles
up here or there. It runs in a thread of the executor, a page at a time, bounded in bytes, entries and time, and gives
way to the loop all the while. The files of `logs` may be written to and deleted meanwhile. Tested in
`tests/unit/test_reading.py`.
"""

from __future__ import annotations

import bisect
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from squall.exception import InvalidError
from squall.server.logs import Cursor, Record, Segment, modified, records_of

PAGE_BYTES = 1 << 20
PAGE_ENTRIES = 5000
PAGE_SECONDS = 0.5
"""A page is given, with what was found so far, when looking took this long."""
LINE_LIMIT_BYTES = 64 << 10
"""A line that is longer comes in pieces."""
CARRY_LIMIT = 512
"""Streams whose last line may be unfinished at a time; of more, the oldest is taken as it is."""
TAIL_LIMIT = 10_000
TAIL_LIMIT_BYTES = 32 << 20
SEARCH_LIMIT = 1000
BUSY_S = 0.001
"""A reader works this long, then lets other threads have the interpreter for REST_S: the loop must not wait for it."""
REST_S = 0.0005
RECORDS_BETWEEN_LOOKS = 64
"""Looks at the clock; records are at most 64 KiB, most of them a line."""
CLOCK_SLACK_S = 7200.0
"""A segment is left out by its time only when it is this far off: clocks are set."""
Windows = dict[str, list[tuple[float, float]]]
"""Container id -> times in which its output is wanted, in their order."""


@dataclass
class Query:
    """What is wanted; empty or None means all."""

    app_id: str
    function: str = ""
    container_id: str = ""
    windows: Windows | None = None
    since: float = 0.0
    until: float = math.inf
    search: bytes = b""
    source: str = ""
    tail: int = 0
    lines: bool = False
    """Whole lines, instead of pieces as they were written."""

    def check(self) -> None:
        if len(self.search) > SEARCH_LIMIT:
            raise InvalidError(f"a search for {len(self.search)} bytes: the limit is {SEARCH_LIMIT}")
        if not 0 <= self.tail <= TAIL_LIMIT:
            raise InvalidError(f"the newest {self.tail} lines are asked for: the limit is {TAIL_LIMIT}")
        if self.source not in ("", "stdout", "stderr", "system"):
            raise InvalidError(f"`{self.source[:40]}` is no source", hint="stdout, stderr or system")
        if math.isnan(self.since) or math.isnan(self.until):
            raise InvalidError("a time is not a number")
        self.lines = self.lines or bool(self.search or self.tail)

    def wants(self, record: Record) -> bool:
        return (
            self.since <= record.at <= self.until
            and self.source in ("", record.stream)
            and self.function in ("", record.function)
            and self.container_id in ("", record.container_id)
            and (self.windows is None or is_within(self.windows, record))
        )


def is_within(windows: Windows, record: Record) -> bool:
    times = windows.get(record.container_id)
    if not times:
        return False
    place = bisect.bisect_right(times, (record.at, math.inf)) - 1
    # Windows of one container overlap where it runs several inputs at a time, so an earlier one may be the longer.
    return any(record.at <= end for _, end in times[max(0, place - 1000) : place + 1])


@dataclass
class Page:
    entries: list[Record] = field(default_factory=list)
    size: int = 0
    at_end: bool = False
    """There is no more at the moment."""
    gaps: int = 0

    def take(self, entries: deque[Record]) -> None:
        while entries and not self.is_full:
            record = entries.popleft()
            self.entries.append(record)
            self.size += len(record.data)

    @property
    def is_full(self) -> bool:
        return self.size >= PAGE_BYTES or len(self.entries) >= PAGE_ENTRIES


class Reader:
    """One look through an app's output. Its methods run in one thread at a time."""

    def __init__(self, query: Query) -> None:
        query.check()
        self.query = query
        self._cursor = Cursor()
        self._lines = Lines(query.search)
        self._tail = Tail(query.tail) if query.tail else None
        """What was found of the newest lines; None once they are found, and where all are wanted."""
        self._rest: deque[Record] = deque()
        """Entries for which the page before had no room."""
        self._rested_at = 0.0

    def page(self, segments: list[Segment], *, last: bool) -> Page:
        """What follows. `last`: nothing more will be written, so a line without an end is given as it is."""
        self._rested_at = time.perf_counter()
        until = self._rested_at + PAGE_SECONDS
        page = Page()
        if self._tail is not None and not self._find_tail(self._tail, segments, until):
            return page
        page.take(self._rest)
        rest, is_wanted, entries = self._rest, self.query.wants, self._entries
        for record in () if page.is_full else self._records(segments):
            if is_wanted(record):
                rest.extend(entries(record))
                page.take(rest)
            if page.is_full or self._rested_at > until:
                return self._told(page)
        if not page.is_full:
            # A prompt, which has no end, is to be seen while it waits; but half a line says nothing of what it holds.
            self._rest.extend(self._lines.flush() if last or not self.query.search else ())
            page.take(self._rest)
            page.at_end = not self._rest
        return self._told(page)

    def _told(self, page: Page) -> Page:
        page.gaps, self._cursor.gaps = self._cursor.gaps, 0
        return page

    def _entries(self, record: Record) -> Sequence[Record]:
        return self._lines.feed(record) if self.query.lines else (record,)

    def _records(self, segments: list[Segment]) -> Iterator[Record]:
        """All records from the cursor on; it is behind each when that is given."""
        cursor = self._cursor
        for segment in self._ahead(segments):
            if segment.number != cursor.number:
                cursor.number, cursor.offset = segment.number, 0
            for count, (record, following) in enumerate(records_of(segment.path, cursor.offset)):
                cursor.offset = following
                yield record
                if not count % RECORDS_BETWEEN_LOOKS and time.perf_counter() - self._rested_at > BUSY_S:
                    time.sleep(REST_S)
                    self._rested_at = time.perf_counter()

    def _ahead(self, segments: list[Segment]) -> list[Segment]:
        if self._cursor.number < 0:
            early = self.query.since - CLOCK_SLACK_S
            return [segment for segment in segments if modified(segment.path) >= early]
        ahead = [segment for segment in segments if segment.number >= self._cursor.number]
        if ahead and ahead[0].number > self._cursor.number + 1:
            self._cursor.gaps += 1
        return ahead

    def _find_tail(self, tail: Tail, segments: list[Segment], until: float) -> bool:
        """Look for the newest lines in the newest segment, then in four times as many; whether they are found."""
        if self._cursor.number < 0 and segments:
            self._begin_tail(tail, segments)
        for record in self._records(segments):
            if self.query.wants(record):
                tail.add(self._entries(record))
            if self._rested_at > until:
                return False
        if not tail.is_full and tail.reach < len(segments):
            tail.reach *= 4
            self._begin_tail(tail, segments)
            return False
        self._rest.extend(tail.lines)
        self._tail = None
        return True

    def _begin_tail(self, tail: Tail, segments: list[Segment]) -> None:
        tail.clear()
        self._lines = Lines(self.query.search)
        first = segments[max(0, len(segments) - tail.reach)]
        self._cursor = Cursor(first.number)


class Tail:
    """The newest lines, within their number and a size."""

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self.reach = 1
        """How many of the newest segments are looked at."""
        self.lines: deque[Record] = deque()
        self._size = 0

    @property
    def is_full(self) -> bool:
        return len(self.lines) >= self.wanted or self._size >= TAIL_LIMIT_BYTES // 2

    def add(self, lines: Iterable[Record]) -> None:
        for line in lines:
            self.lines.append(line)
            self._size += len(line.data)
            while len(self.lines) > self.wanted or self._size > TAIL_LIMIT_BYTES:
                self._size -= len(self.lines.popleft().data)

    def clear(self) -> None:
        self.lines.clear()
        self._size = 0


class Lines:
    """Puts the pieces that a container wrote together to lines, and keeps those that hold `search`."""

    def __init__(self, search: bytes = b"") -> None:
        self._search = search
        self._begun: dict[tuple[str, str], Record] = {}
        """Container and stream -> a line that has no end yet."""

    def feed(self, record: Record) -> Sequence[Record]:
        key = (record.container_id, record.stream)
        begun = self._begun.pop(key, None)
        data = record.data
        if begun is None and data.endswith(b"\n"):
            if self._search and self._search not in data:
                return ()
            if data.count(b"\n") == 1 and len(data) <= LINE_LIMIT_BYTES:
                return (record,)
        at = record.at
        if begun is not None:
            data, at = begun.data + data, begun.at
        found, begin = [], 0
        while begin < len(data):
            end = data.find(b"\n", begin, begin + LINE_LIMIT_BYTES) + 1
            if not end and len(data) - begin < LINE_LIMIT_BYTES:
                self._begun[key] = record._replace(at=at, data=data[begin:])
                break
            end = end or begin + LINE_LIMIT_BYTES
            found.append(record._replace(at=at, data=data[begin:end]))
            begin, at = end, record.at
        if len(self._begun) > CARRY_LIMIT:
            found.append(self._begun.pop(next(iter(self._begun))))
        return self._kept(found)

    def flush(self) -> Sequence[Record]:
        """The lines without an end, as they are."""
        begun, self._begun = list(self._begun.values()), {}
        return self._kept(begun)

    def _kept(self, lines: list[Record]) -> list[Record]:
        return [line for line in lines if self._search in line.data] if self._search else lines
