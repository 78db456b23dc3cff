"""`squall function`: functions of running and deployed apps: list, info, calls, logs, stats, autoscaler.

A function is named by its id, the beginning of one, `APP.FUNCTION`, or its name alone where that is enough. Tested in
`tests/acceptance/test_deploy.py`.
"""

from __future__ import annotations

from typing import Any

import click

from squall.cli.apps import FUNCTION_COLUMNS, show_stats
from squall.cli.documents import json_option, print_json
from squall.cli.logs import Printer, log_options
from squall.cli.main import Group, did_you_mean
from squall.cli.manage import NOUNS, ask, connect, print_table
from squall.cli.manage import _field as named_field
from squall.exception import InvalidError, NotFoundError
from squall.protocol.requests import GetFunctionStats, ListObjects, UpdateAutoscaler
from squall.protocol.transport import Link

FUNCTION = click.argument("ref", metavar="FUNCTION")
LIST_LIMIT = 10_000


@click.group(cls=Group)
def function() -> None:
    """Functions: list, info, calls, logs, stats, autoscaler."""


@function.command("list")
@click.option("--app", "app_ref", default="", metavar="APP", help="Only functions of this app.")
@json_option
def function_list(app_ref: str, as_json: bool) -> None:
    """List the functions of apps that run or are deployed."""
    rows = functions(connect(start=True).link, app_ref)
    if as_json:
        print_json(rows)
        return
    print_table(rows, (named_field("APP", "app"), *FUNCTION_COLUMNS), "no functions: no app runs, and none is deployed")


@function.command("info")
@FUNCTION
@json_option
def function_info(ref: str, as_json: bool) -> None:
    """Show a function: what it asks for, and how busy it is."""
    row = find(connect(start=True).link, ref)
    if as_json:
        print_json(row)
        return
    for name, value in row.items():
        if value not in (None, "", [], {}):
            click.echo(f"{name:<12} {_shown(value)}")


@function.command("calls")
@FUNCTION
@json_option
def function_calls(ref: str, as_json: bool) -> None:
    """List the calls of a function that run or wait, and the latest that have ended."""
    link = connect(start=True).link
    row = find(link, ref)
    rows = ask(link, ListObjects("calls", limit=LIST_LIMIT))["rows"]
    rows = [one for one in rows if one.get("function_id") == row["function_id"]]
    if as_json:
        print_json(rows)
        return
    columns = [column for column in NOUNS["call"].columns if column.title not in ("APP", "FUNCTION")]
    print_table(rows, columns, f"no calls of `{row['function']}`")


@function.command("logs")
@FUNCTION
@log_options
def function_logs(ref: str, printer: Printer) -> None:
    """Print what the containers of a function have written, in all versions of its app."""
    client = connect(start=True)
    printer.show(client, function=find(client.link, ref)["function_id"])


@function.command("stats")
@FUNCTION
@click.option("--since", type=click.FloatRange(1), default=3600.0, show_default=True, help="Seconds to look back.")
@json_option
def function_stats(ref: str, since: float, as_json: bool) -> None:
    """Show how the calls of a function went lately."""
    link = connect(start=True).link
    show_stats(ask(link, GetFunctionStats(function_id=find(link, ref)["function_id"], since=since))["rows"], as_json)


@function.group("autoscaler", cls=Group)
def autoscaler() -> None:
    """How many containers a function has: settings, update."""


@autoscaler.command("settings")
@FUNCTION
@json_option
def autoscaler_settings(ref: str, as_json: bool) -> None:
    """Show the settings that hold; `*` marks what was changed since the deploy."""
    link = connect(start=True).link
    _show_settings(ask(link, UpdateAutoscaler(find(link, ref)["function_id"])), as_json)


class _Setting(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases only
    name = "NUMBER|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if str(value) == "none":
            return "none"
        try:
            return float(value)
        except ValueError:
            self.fail(f"`{value}` is neither a number nor `none`", param, ctx)


@autoscaler.command("update")
@FUNCTION
@click.option("--min-containers", type=_Setting(), help="Kept running.")
@click.option("--max-containers", type=_Setting(), help="Never more.")
@click.option("--buffer-containers", type=_Setting(), help="Kept ahead while inputs come.")
@click.option("--scaledown-window", type=_Setting(), help="Seconds a container stays idle before it ends.")
@json_option
def autoscaler_update(ref: str, as_json: bool, **given: Any) -> None:
    """Change settings at once, until the app is deployed again; `none` takes a change back."""
    settings = {name: None if value == "none" else value for name, value in given.items() if value is not None}
    if not settings:
        raise InvalidError("nothing to change was given", hint="for instance `--min-containers 1`")
    link = connect(start=True).link
    _show_settings(ask(link, UpdateAutoscaler(find(link, ref)["function_id"], settings)), as_json)


def _show_settings(data: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(data)
        return
    for name, value in data["settings"].items():
        click.echo(f"{name:<20} {_limit(name, value)}{' *' if name in data['overridden'] else ''}")


def functions(link: Link, app_ref: str = "") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = ask(link, ListObjects("functions", app=app_ref, limit=LIST_LIMIT))["rows"]
    return rows


def find(link: Link, ref: str) -> dict[str, Any]:
    """The one function that `ref` means."""
    rows = functions(link)
    plain = [row for row in rows if not row["variant_of"]]
    found = [row for row in rows if row["function_id"] == ref]
    found = found or [row for row in plain if f"{row['app']}.{row['function']}" == ref]
    found = found or [row for row in plain if row["function"] == ref]
    found = found or [row for row in rows if ref.startswith("fu-") and row["function_id"].startswith(ref)]
    names = [f"{row['app']}.{row['function']}" if "." in ref else str(row["function"]) for row in plain]
    if not found:
        raise NotFoundError(
            f"no function `{ref}`", hint=did_you_mean(ref, names) or "no app runs, and none is deployed"
        )
    if len(found) > 1:
        which = ", ".join(f"`{row['app']}.{row['function']}` ({row['function_id']})" for row in found[:5])
        raise InvalidError(f"`{ref}` means {len(found)} functions", hint=f"which: {which}")
    return found[0]


def _limit(name: str, value: float) -> str:
    return "none" if name == "max_containers" and not value else f"{value:g}"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={_limit(name, one)}" for name, one in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
