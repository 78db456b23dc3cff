"""`squall call`: the calls of this server: list, result, output, graph, cancel.

A result is the value that your code returned, shown as Python shows it; a type that is not installed here cannot be.
Tested in `tests/unit/test_cli_calls.py` and `tests/acceptance/test_cli.py`.
"""

from __future__ import annotations

from typing import Any

import click

from squall._output_json import json_fields
from squall.call import FunctionCall
from squall.cli.documents import json_option, print_json
from squall.cli.failures import Exits, UserError
from squall.cli.logs import Printer, log_options
from squall.cli.main import Group
from squall.cli.manage import ask, cells, connect, date, show_list
from squall.exception import Error, InvalidError, OutputTimeoutError
from squall.protocol.messages import CancelCall, GetCall
from squall.protocol.requests import GetCallGraph

NOT_THERE = 3
"""Exit code of a result that is not there in time."""


@click.group(cls=Group)
def call() -> None:
    """Calls: list, result, output, graph, cancel."""


@call.command("list")
@json_option
def call_list(as_json: bool) -> None:
    """List the calls that run or wait, and the latest that have ended. Spawned ones are kept for 7 days, others are
    remembered while the server runs."""
    show_list("call", app="", include_all=True, as_json=as_json)


@call.command("info")
@click.argument("call_id", metavar="CALL")
@json_option
def call_info(call_id: str, as_json: bool) -> None:
    """Show how far a spawned call is."""
    client = connect(start=True)
    data = ask(client.link, GetCall(checked(call_id)))
    if as_json:
        print_json(data)
        return
    for name, value in data.items():
        if value not in (None, ""):
            click.echo(f"{name:<12} {date(value) if name == 'created_at' else _shown(value)}")


@call.command("get")
@click.argument("call_id", metavar="CALL")
@click.option("--index", type=click.IntRange(0), default=0, show_default=True, help="Which input of a spawn_map.")
@click.option(
    "--timeout", type=click.FloatRange(0), default=None, help="Seconds to wait; by default until it is there."
)
@json_option
def call_get(call_id: str, index: int, timeout: float | None, as_json: bool) -> None:
    """Print the result of a spawned call; exits with 1 when it failed, with 3 when it is not there in time."""
    found: FunctionCall[Any] = FunctionCall.from_id(checked(call_id))
    try:
        value = found.get(timeout, index=index)
    except OutputTimeoutError as error:
        raise Exits(error, NOT_THERE) from None
    except Error:
        raise
    except Exception as error:
        raise UserError(error) from None
    if as_json:
        print_json({"call_id": call_id, "index": index, "status": "ok", **json_fields(value)})
    else:
        click.echo(value if isinstance(value, str) else repr(value))


@call.command("logs")
@click.argument("call_id", metavar="CALL")
@log_options
def call_logs(call_id: str, printer: Printer) -> None:
    """Print what was written while a call ran, where it ran. CALL is the id of a call or of an input."""
    printer.show(connect(start=True), call=call_id)


@call.command("graph")
@click.argument("call_id", metavar="CALL")
@json_option
def call_graph(call_id: str, as_json: bool) -> None:
    """Show what the inputs of a spawned call have called, and so on down, as far as it is remembered."""
    data = ask(connect(start=True).link, GetCallGraph(checked(call_id)))
    if as_json:
        print_json(data)
        return
    for line in graph_lines(data["inputs"]):
        click.echo(line)
    if data["truncated"]:
        click.echo("there is more than is shown", err=True)


def graph_lines(inputs: list[dict[str, Any]]) -> list[str]:
    """A line for each input, below the one that called it and further to the right."""
    below: dict[str, list[dict[str, Any]]] = {}
    known = {row["input_id"] for row in inputs}
    for row in inputs:
        below.setdefault(row["parent"] if row["parent"] in known else "", []).append(row)
    lines: list[str] = []
    pending = [(row, 0) for row in reversed(below.get("", []))]
    while pending:
        row, depth = pending.pop()
        lines.append(
            f"{'  ' * depth}{cells(row['function'])}  {row['status']}  {row['input_id']}  {row['container_id']}"
        )
        pending += [(one, depth + 1) for one in reversed(below.pop(row["input_id"], []))]
    return [line.rstrip() for line in lines]


@call.command("cancel")
@click.argument("call_ids", metavar="CALL...", nargs=-1, required=True)
@click.option("--terminate", is_flag=True, help="Kill the containers it runs in, instead of asking.")
@json_option
def call_cancel(call_ids: tuple[str, ...], terminate: bool, as_json: bool) -> None:
    """Cancel the inputs of calls that have not ended."""
    client = connect(start=True)
    rows = []
    for call_id in call_ids:
        data = ask(client.link, CancelCall(checked(call_id), [], terminate))
        rows.append({"call_id": call_id, "cancelled": int(data["cancelled"])})
        if not as_json:
            click.echo(f"call `{call_id}`: {int(data['cancelled'])} inputs cancelled", err=True)
    if as_json:
        print_json(rows)


def checked(call_id: str) -> str:
    """The id of a call. Raises InvalidError."""
    if not call_id.startswith("fc-"):
        raise InvalidError(f"`{call_id[:80]}` is no id of a call", hint="such an id looks like `fc-5f2c19d04be87a36`")
    return call_id


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items())
    return str(value)
