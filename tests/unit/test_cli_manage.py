"""Listings, resolving of ids and names, and the waterfall of a trace."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from squall.cli import main, manage
from squall.exception import InvalidError, NotFoundError
from squall.protocol.messages import Reply, decode, encode
from squall.protocol.requests import ListObjects
from squall.protocol.transport import FrameReader, Link

ROWS = [
    {"app_id": "ap-11aa", "name": "hello", "state": "running"},
    {"app_id": "ap-11bb", "name": "train", "state": "stopped"},
    {"app_id": "ap-22cc", "name": "hello", "state": "stopped"},
]


def answer(sock: socket.socket, rows: list[dict[str, Any]]) -> None:
    """Answer every request on this end with these rows, until the other end closes."""
    reader = FrameReader()
    with sock:
        while data := sock.recv(65536):
            for header, _ in reader.feed(data):
                message = decode(header)
                assert isinstance(message, ListObjects)
                sock.sendall(encode(Reply({"rows": rows}, re=message.id)))


@pytest.fixture
def link() -> Iterator[Link]:
    """A link to something that knows ROWS."""
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=answer, args=(theirs, ROWS))
    thread.start()
    found = Link(ours, lambda message, payload: None)
    yield found
    found.close()
    thread.join(timeout=5)


@pytest.mark.parametrize(("word", "found"), [("ap-11aa", "ap-11aa"), ("train", "train"), ("ap-2", "ap-22cc")])
def test_app_is_found_by_id_name_and_beginning_of_an_id(link: Link, word: str, found: str) -> None:
    assert manage.resolve(link, "app", word) == found


def test_beginning_of_several_ids_is_refused_with_all_of_them(link: Link) -> None:
    with pytest.raises(InvalidError, match="beginning of 2 app ids") as caught:
        manage.resolve(link, "app", "ap-11")
    assert "ap-11aa, ap-11bb" in caught.value.hint


def test_mistyped_name_is_answered_with_the_one_meant(link: Link) -> None:
    with pytest.raises(NotFoundError, match="no app `helo`") as caught:
        manage.resolve(link, "app", "helo")
    assert "did you mean `hello`?" in caught.value.hint


def test_table_is_aligned_and_says_when_it_is_empty(capsys: pytest.CaptureFixture[str]) -> None:
    columns = manage.NOUNS["app"].columns[:3]
    manage.print_table(ROWS[:2], columns, "no apps")
    assert capsys.readouterr().out == "APP      NAME   STATE\nap-11aa  hello  running\nap-11bb  train  stopped\n"
    manage.print_table([], columns, "no apps")
    assert capsys.readouterr() == ("", "no apps\n")


def test_text_of_a_row_cannot_move_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    manage.print_table([{"name": "a\x1b[2J\nb"}], [manage.NOUNS["app"].columns[1]], "")
    assert capsys.readouterr().out == "NAME\na [2J b\n"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s ago"), (119, "119 s ago"), (120, "2 min ago"), (7200, "2 h ago"), (200_000, "2 d ago"), (-5, "0 s ago")],
)
def test_age_is_said_in_the_unit_that_fits(seconds: float, said: str) -> None:
    assert manage.ago(1000.0, now=1000.0 + seconds) == said
    assert manage.ago(0) == ""


def test_listing_of_a_server_that_cannot_be_reached_is_an_error(
    home: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SQUALL_SERVER", "http://127.0.0.1:9")
    monkeypatch.setenv("SQUALL_TOKEN_ID", "tk-1")
    monkeypatch.setenv("SQUALL_TOKEN_SECRET", "ts-1")
    assert main.execute(["app", "list"]) == 1
    out, err = capsys.readouterr()
    assert (out, "cannot connect to the server at `http://127.0.0.1:9`" in err) == ("", True)


def test_listing_without_a_server_is_empty_and_starts_none(home: Any, capsys: pytest.CaptureFixture[str]) -> None:
    manage.show_list("app", app="", include_all=True, as_json=True)
    assert json.loads(capsys.readouterr().out) == []
    assert list(home.iterdir()) == []


def span(name: str, start: float, end: float, **more: Any) -> dict[str, Any]:
    return {"name": name, "start": start, "end": end, **more}


def test_waterfall_places_each_span_on_one_scale_with_its_parts() -> None:
    spans = [
        span("submit", 100.0, 100.010, note="caller to server"),
        span("container", 100.010, 100.030, parts={"fork": 12.0, "pivot": 8.0}),
        span("run", 100.030, 100.040),
    ]
    lines = manage.waterfall({"idx": 0, "status": "ok", "attempts": 2, "spans": spans})
    assert lines[0] == "input 0: ok, 2 attempts, 40.0 ms"
    assert lines[1].startswith("  submit           10.0 ms  ██████████ ")
    assert lines[1].endswith("caller to server")
    assert lines[2].index("█") == lines[1].index("█") + 10
    assert lines[3].split() == ["fork", "12.0"]
    assert lines[-1].startswith("  run              10.0 ms  ")


def test_waterfall_of_an_input_without_spans_is_its_status() -> None:
    assert manage.waterfall({"idx": 3, "status": "cancelled"}) == ["input 3: cancelled"]


def test_span_that_took_no_time_is_still_seen() -> None:
    lines = manage.waterfall({"idx": 0, "status": "ok", "spans": [span("run", 1.0, 1.0), span("return", 1.0, 2.0)]})
    assert "█" in lines[1]
