"""What is looked for in kept output is found, whole, once, and page by page."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from squall.exception import InvalidError
from squall.server import logs as logs_module
from squall.server import reading
from squall.server.logs import Limits, Logs, Record
from squall.server.reading import Lines, Page, Query, Reader


def record(at: float, data: bytes, container: str = "co-1", stream: str = "stdout", function: str = "f") -> Record:
    return Record(float(at), container, function, stream, data)


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Logs]:
    monkeypatch.setattr(logs_module, "SEGMENT_BYTES", 400)
    logs = Logs(tmp_path, Limits(app_bytes=1 << 20))
    yield logs
    logs.close()


def read(logs: Logs, *, last: bool = True, **query: object) -> list[Record]:
    reader, found = Reader(Query("ap-1", **query)), []  # type: ignore[arg-type]
    while True:
        page = reader.page(logs.segments("ap-1"), last=last)
        found += page.entries
        if page.at_end:
            return found


def texts(found: list[Record]) -> list[bytes]:
    return [entry.data for entry in found]


def test_everything_is_given_in_its_order_over_all_segments(logs: Logs) -> None:
    for n in range(100):
        logs.append("ap-1", record(n, b"line %d\n" % n))
    assert len(logs.segments("ap-1")) > 5
    assert texts(read(logs)) == [b"line %d\n" % n for n in range(100)]


def test_filters_leave_what_they_name(logs: Logs) -> None:
    logs.append("ap-1", record(1, b"a\n"))
    logs.append("ap-1", record(2, b"b\n", container="co-2"))
    logs.append("ap-1", record(3, b"c\n", stream="stderr"))
    logs.append("ap-1", record(4, b"d\n", function="g"))
    assert texts(read(logs, container_id="co-2")) == [b"b\n"]
    assert texts(read(logs, source="stderr")) == [b"c\n"]
    assert texts(read(logs, function="g")) == [b"d\n"]
    assert texts(read(logs, since=2, until=3)) == [b"b\n", b"c\n"]
    assert texts(read(logs, windows={"co-1": [(0, 1.5), (3.5, math.inf)]})) == [b"a\n", b"d\n"]


def test_search_finds_a_line_that_was_written_in_pieces(logs: Logs) -> None:
    for n, data in enumerate([b"first\nthe nee", b"dle is", b" here\nla", b"st\n"]):
        logs.append("ap-1", record(n, data))
        logs.append("ap-1", record(n, b"needless\n" if n == 2 else b"noise\n", container="co-2"))
    found = read(logs, search=b"needle")
    assert texts(found) == [b"needless\n", b"the needle is here\n"] or texts(found) == [
        b"the needle is here\n",
        b"needless\n",
    ]
    assert next(entry.at for entry in found if b"the" in entry.data) == 0.0, "a line is as old as its beginning"


def test_newest_lines_are_given_in_their_order(logs: Logs) -> None:
    for n in range(100):
        logs.append("ap-1", record(n, b"line %d\n" % n))
    assert texts(read(logs, tail=3)) == [b"line 97\n", b"line 98\n", b"line 99\n"]
    assert texts(read(logs, tail=90)) == [b"line %d\n" % n for n in range(10, 100)]
    assert texts(read(logs, tail=1000)) == [b"line %d\n" % n for n in range(100)]
    assert texts(read(logs, tail=2, search=b"line 1")) == [b"line 18\n", b"line 19\n"]
    assert read(logs, tail=2, search=b"nowhere") == []


def test_newest_lines_and_then_what_comes_are_given_once(logs: Logs) -> None:
    for n in range(10):
        logs.append("ap-1", record(n, b"line %d\n" % n))
    reader = Reader(Query("ap-1", tail=2))
    first = reader.page(logs.segments("ap-1"), last=False)
    logs.append("ap-1", record(10, b"line 10\n"))
    second = reader.page(logs.segments("ap-1"), last=False)
    assert texts(first.entries) + texts(second.entries) == [b"line 8\n", b"line 9\n", b"line 10\n"]


def test_a_prompt_without_an_end_is_given_while_it_waits(logs: Logs) -> None:
    reader = Reader(Query("ap-1", lines=True))
    logs.append("ap-1", record(1, b"name? "))
    assert texts(reader.page(logs.segments("ap-1"), last=False).entries) == [b"name? "]
    logs.append("ap-1", record(2, b"Ada\n"))
    assert texts(reader.page(logs.segments("ap-1"), last=False).entries) == [b"Ada\n"]


def test_a_line_that_may_go_on_is_not_searched_before_its_end(logs: Logs) -> None:
    reader = Reader(Query("ap-1", search=b"needle"))
    logs.append("ap-1", record(1, b"nee"))
    assert reader.page(logs.segments("ap-1"), last=False).entries == []
    logs.append("ap-1", record(2, b"dle\n"))
    assert texts(reader.page(logs.segments("ap-1"), last=False).entries) == [b"needle\n"]


def test_pages_are_bounded_and_nothing_falls_between_them(logs: Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PAGE_ENTRIES", 3)
    for n in range(20):
        logs.append("ap-1", record(n, b"%d a\n%d b\n" % (n, n)))
    reader, pages = Reader(Query("ap-1", lines=True)), list[Page]()
    while not pages or not pages[-1].at_end:
        pages.append(reader.page(logs.segments("ap-1"), last=True))
    assert all(len(page.entries) <= 3 for page in pages)
    assert [line for page in pages for line in texts(page.entries)] == [
        b"%d %s\n" % (n, part) for n in range(20) for part in (b"a", b"b")
    ]


def test_a_page_ends_when_looking_takes_long(logs: Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PAGE_SECONDS", -1.0)
    for n in range(20):
        logs.append("ap-1", record(n, b"hay\n"))
    reader = Reader(Query("ap-1", search=b"needle"))
    assert not reader.page(logs.segments("ap-1"), last=True).at_end
    assert texts(read(logs, search=b"hay")) == [b"hay\n"] * 20
    assert texts(read(logs, tail=3)) == [b"hay\n"] * 3


def test_reader_is_told_what_was_deleted_before_it_came_there(logs: Logs) -> None:
    reader = Reader(Query("ap-1"))
    logs.append("ap-1", record(0, b"first\n"))
    assert reader.page(logs.segments("ap-1"), last=False).gaps == 0
    for n in range(100):
        logs.append("ap-1", record(n, b"line %d\n" % n))
    later = logs.segments("ap-1")[3:]
    page = reader.page(later, last=False)
    assert page.gaps == 1
    assert reader.page(later, last=False).gaps == 0


def test_a_line_of_500_mb_comes_in_pieces_and_takes_no_memory() -> None:
    lines, total, longest = Lines(), 0, 0
    piece = b"x" * (64 << 10)
    for _ in range(8000):
        for found in lines.feed(record(1, piece)):
            total, longest = total + len(found.data), max(longest, len(found.data))
    total += sum(len(found.data) for found in lines.flush())
    assert total == 8000 * len(piece)
    assert longest <= reading.LINE_LIMIT_BYTES


def test_many_unfinished_lines_are_bounded() -> None:
    lines = Lines()
    given_ = sum(len(lines.feed(record(1, b"...", container=f"co-{n}"))) for n in range(2000))
    assert given_ == 2000 - reading.CARRY_LIMIT


@given(st.lists(st.tuples(st.sampled_from(["co-1", "co-2"]), st.binary(max_size=20)), max_size=30))
def test_lines_put_together_are_what_was_written(pieces: list[tuple[str, bytes]]) -> None:
    lines, found = Lines(), list[Record]()
    for n, (container, data) in enumerate(pieces):
        found += lines.feed(record(n, data, container=container))
    assert all(entry.data.endswith(b"\n") and entry.data.count(b"\n") == 1 for entry in found)
    found += lines.flush()
    for container in ("co-1", "co-2"):
        written = b"".join(data for one, data in pieces if one == container)
        assert b"".join(entry.data for entry in found if entry.container_id == container) == written


@pytest.mark.parametrize(
    "query",
    [{"tail": 10_001}, {"tail": -1}, {"source": "stdin"}, {"search": b"x" * 1001}, {"since": math.nan}],
    ids=str,
)
def test_what_asks_for_too_much_or_nonsense_is_refused(query: dict[str, object]) -> None:
    with pytest.raises(InvalidError):
        Reader(Query("ap-1", **query))  # type: ignore[arg-type]
