"""The options of logs, and what is printed of strange bytes."""

from __future__ import annotations

import json
from typing import Any

import click
import pytest
from click.testing import CliRunner

from squall.cli.logs import Printer, log_options
from squall.exception import InvalidError
from squall.logs import Page, Piece
from squall.protocol.requests import ReadLogs

STRANGE = b"\x00\xff\x1b[31mred\x1b[0m\xc3\n"


@click.command()
@log_options
def show(printer: Printer) -> Printer:
    return printer


def made(*words: str) -> Printer:
    found: Any = show.main(list(words), standalone_mode=False)
    assert isinstance(found, Printer)
    return found


def test_options_become_a_request() -> None:
    request = made("-f", "-n", "3", "--since", "2026-03-01T00:00Z", "--search", "x", "--source", "stderr").request
    assert (request.follow, request.tail, request.search, request.source) == (True, 3, "x", "stderr")
    assert (request.since, request.until) == (1_772_323_200.0, 0.0)


def test_end_before_the_beginning_is_refused() -> None:
    with pytest.raises(InvalidError, match="is not after"):
        made("--since", "1h", "--until", "2h")


def test_source_that_is_none_is_wrong_usage() -> None:
    assert CliRunner().invoke(show, ["--source", "stdin"]).exit_code == 2


def printed(request: ReadLogs, as_json: bool, *pieces: bytes) -> None:
    printer = Printer(request, False, as_json)
    found = Page([Piece(1.0, "co-1", "f", "stdout", data) for data in pieces], "ap-1", "rd-1", True, False)
    for piece in found.pieces:
        printer._print(found, piece)
    printer._output.close()


def test_strange_bytes_are_printed_as_they_were_written(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    printed(ReadLogs(), False, STRANGE, b"x" * 1_000_000)
    assert capfdbinary.readouterr().out == STRANGE + b"x" * 1_000_000


def test_strange_bytes_are_valid_json(capsys: pytest.CaptureFixture[str]) -> None:
    printed(ReadLogs(), True, STRANGE)
    line = json.loads(capsys.readouterr().out)
    assert line["text"] == "\x00\\xff\x1b[31mred\x1b[0m\\xc3\n"
    assert (line["container_id"], line["function"], line["stream"], line["at"]) == ("co-1", "f", "stdout", 1.0)
