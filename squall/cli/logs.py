"""Printing kept and coming output: `logs` of an app, a function, a container, a call, an image.

One set of options for all of them, one printer. Output is printed as the containers wrote it; with `--search` and
`--tail`, by whole lines. Must never interpret what it prints. Tested in `tests/unit/test_cli_logs.py` and
`tests/acceptance/test_cli.py`.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import click

from squall._blocking import run
from squall._output import Output
from squall.client import Client
from squall.exception import InvalidError
from squall.logs import SOURCES, Page, Piece, moment_of, read_pages
from squall.protocol.messages import LogChunk
from squall.protocol.requests import ReadLogs

TAIL_LIMIT = 10_000

_options = [
    click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until nothing more can come."),
    click.option(
        "-n",
        "--tail",
        type=click.IntRange(0, TAIL_LIMIT),
        default=0,
        help="Only the newest so many lines; 0 means all.",
    ),
    click.option("--since", default="", metavar="TIME", help="Only from then on: 90s, 1h30m, 2d ago, or a date."),
    click.option("--until", default="", metavar="TIME", help="Only up to then."),
    click.option("--search", default="", metavar="TEXT", help="Only lines that hold this text."),
    click.option("--source", type=click.Choice(SOURCES), default=None, help="Only what was written there."),
    click.option("--timestamps", is_flag=True, help="Put the time before each line."),
    click.option("--json", "as_json", is_flag=True, help="One JSON object per line of output."),
]


def log_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of logs; it gets a `Printer` for them as `printer`."""

    @functools.wraps(command)
    def with_printer(
        *args: Any,
        follow: bool,
        tail: int,
        since: str,
        until: str,
        search: str,
        source: str | None,
        timestamps: bool,
        as_json: bool,
        **kwargs: Any,
    ) -> Any:
        request = ReadLogs(follow=follow, tail=tail, search=search, source=source or "", lines=as_json)
        request.since = moment_of(since) if since else 0.0
        request.until = moment_of(until) if until else 0.0
        if until and request.until <= request.since:
            raise InvalidError(f"`--until {until}` is not after `--since {since}`")
        return command(*args, printer=Printer(request, timestamps, as_json), **kwargs)

    for option in reversed(_options):
        with_printer = option(with_printer)
    return with_printer


class Printer:
    """Prints what a request finds, page after page."""

    def __init__(self, request: ReadLogs, timestamps: bool, as_json: bool) -> None:
        self.request = request
        self.as_json = as_json
        self._output = Output(timestamps=timestamps)

    def show(self, client: Client, **named: str) -> None:
        """Print the output of what is named by these fields of the request, until it is over."""
        for name, value in named.items():
            setattr(self.request, name, value)
        try:
            run(self._show(client))
        finally:
            self._output.close()

    async def _show(self, client: Client) -> None:
        async for page in read_pages(client, self.request):
            if page.gap:
                print("some output was deleted before it was read", file=sys.stderr)
            for piece in page.pieces:
                self._print(page, piece)
            sys.stdout.flush()

    def _print(self, page: Page, piece: Piece) -> None:
        if self.as_json:
            fields = {"at": piece.at, "container_id": piece.container_id, "function": piece.function}
            text = piece.data.decode("utf-8", "backslashreplace")
            click.echo(json.dumps({**fields, "stream": piece.source, "text": text}))
            return
        chunk = LogChunk(page.app_id, piece.container_id, piece.function, piece.source, piece.at)
        self._output.log(chunk, piece.data)
