"""`squall app`: what became of a deployed app, and going back: info, history, rollback, rollover, stats.

Listing, output and stopping are in `manage`, whose group of commands this extends. Only looking back starts a server
where none runs. Tested in `tests/acceptance/test_deploy.py`.
"""

from __future__ import annotations

import socket
from typing import Any

import click

from squall._deploy import Deployment, user_name
from squall.cli.deploy import told
from squall.cli.documents import json_option, print_json
from squall.cli.manage import (
    Column,
    ago,
    app,
    ask,
    complete,
    connect,
    print_table,
    resolve,
)
from squall.cli.manage import _field as named_field
from squall.protocol.requests import GetApp, GetFunctionStats, ListVersions, RedeployApp

__all__ = ["app"]

APP = click.argument("app_ref", metavar="APP", shell_complete=complete("app"))
STRATEGY = click.option(
    "--strategy",
    type=click.Choice(["rolling", "recreate"]),
    default="rolling",
    show_default=True,
    help="rolling: old containers end what they run. recreate: they have 10 s.",
)


@app.command("info")
@APP
@json_option
def app_info(app_ref: str, as_json: bool) -> None:
    """Show an app: its version, functions and containers. APP is its name or id."""
    client = connect(start=True)
    data = ask(client.link, GetApp(resolve(client.link, "app", app_ref)))
    if as_json:
        print_json(data)
        return
    functions = data.pop("functions")
    for name in ("app_id", "name", "environment", "state", "reason", "version", "tag", "containers"):
        if data.get(name) not in (None, ""):
            click.echo(f"{name:<12} {data[name]}")
    if data.get("deployed_at"):
        dirty = ", with changes" if data["git_dirty"] else ""
        commit = f" at {data['git_commit'][:12]}{dirty}" if data["git_commit"] else ""
        click.echo(f"{'deployed':<12} {ago(data['deployed_at'])} by {data['user']}@{data['host']}{commit}")
    for key, value in sorted(data["labels"].items()):
        click.echo(f"{'label':<12} {key}={value}")
    if isinstance(functions, list):
        print_table(functions, FUNCTION_COLUMNS, "it has no functions")
        show_blocked(functions)


@app.command("history")
@APP
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="Most versions shown.")
@json_option
def app_history(app_ref: str, limit: int, as_json: bool) -> None:
    """List the versions of a deployed app, the newest first. APP is its name or id."""
    client = connect(start=True)
    rows = ask(client.link, ListVersions(resolve(client.link, "app", app_ref), limit=limit))["rows"]
    if as_json:
        print_json(rows)
        return
    columns = [c for c in VERSION_COLUMNS if any(c.show(row) for row in rows)]
    print_table(rows, columns, "it was never deployed")


@app.command("rollback")
@APP
@click.argument("version", type=click.IntRange(1), required=False, metavar="[VERSION]")
@STRATEGY
@json_option
def app_rollback(app_ref: str, version: int | None, strategy: str, as_json: bool) -> None:
    """Go back to an earlier version, by default the one before.

    It becomes a new version with the old definition. APP is a name or id, VERSION a number that `squall app history`
    shows. An app that was stopped comes back.
    """
    _redeploy(app_ref, "rollback", version or 0, strategy, as_json)


@app.command("rollover")
@APP
@STRATEGY
@json_option
def app_rollover(app_ref: str, strategy: str, as_json: bool) -> None:
    """Replace all containers of an app with new ones, and change nothing else. APP is its name or id."""
    _redeploy(app_ref, "rollover", 0, strategy, as_json)


def _redeploy(app_ref: str, kind: str, version: int, strategy: str, as_json: bool) -> None:
    client = connect(start=True)
    ref = resolve(client.link, "app", app_ref)
    message = RedeployApp(ref, kind, version, strategy=strategy, user=user_name(), host=socket.gethostname())
    data = ask(client.link, message, timeout=None)
    if as_json:
        print_json(data)
        return
    for line in told(Deployment.of(app_ref, data)):
        click.echo(line)


@app.command("stats")
@APP
@click.option("--since", type=click.FloatRange(1), default=3600.0, show_default=True, help="Seconds to look back.")
@json_option
def app_stats(app_ref: str, since: float, as_json: bool) -> None:
    """Show how the calls of an app's functions went lately. APP is its name or id."""
    client = connect(start=True)
    rows = ask(client.link, GetFunctionStats(resolve(client.link, "app", app_ref), since=since))["rows"]
    show_stats(rows, as_json)


def show_stats(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json(rows)
    else:
        print_table(rows, STATS_COLUMNS, "no function of it runs")
        show_blocked(rows)


def show_blocked(rows: list[dict[str, Any]]) -> None:
    """What keeps containers of functions from starting, a line each."""
    for row in rows:
        if row.get("blocked"):
            click.echo(f"`{row['function']}` does not start: {row['blocked']}")


def _failed(row: dict[str, Any]) -> str:
    failed = {status: n for status, n in row["counts"].items() if status != "ok"}
    return ", ".join(f"{n} {status}" for status, n in failed.items()) or "0"


def _quantile(title: str, kind: str, name: str) -> Column:
    def show(row: dict[str, Any]) -> str:
        value = row[kind].get(name)
        return "" if value is None else f"{value:.1f} ms"

    return Column(title, show)


def _current(row: dict[str, Any]) -> str:
    return f"{row['version']}{' *' if row['current'] else ''}"


def _made_by(row: dict[str, Any]) -> str:
    return row["kind"] if row["kind"] == "deploy" else f"{row['kind']} of {row['from_version']}"


def _changes(row: dict[str, Any]) -> str:
    changes = row["changes"]
    words = [f"+{name}" for name in changes.get("added", ())] + [f"-{name}" for name in changes.get("removed", ())]
    words += list(changes.get("changed", {}))
    return ", ".join(words[:4]) + (f" and {len(words) - 4} more" if len(words) > 4 else "")


FUNCTION_COLUMNS = (
    named_field("FUNCTION", "function"),
    named_field("ID", "function_id"),
    named_field("KIND", "kind"),
    named_field("CONTAINERS", "containers"),
    named_field("RUNNING", "running"),
    named_field("WAITING", "backlog"),
)
VERSION_COLUMNS = (
    Column("VERSION", _current),
    Column("DEPLOYED", lambda row: ago(row["created_at"])),
    Column("HOW", _made_by),
    named_field("TAG", "tag"),
    Column("COMMIT", lambda row: row["git_commit"][:12] + ("+" if row["git_dirty"] else "")),
    Column("BY", lambda row: f"{row['user']}@{row['host']}" if row["user"] else ""),
    Column("CHANGED", _changes),
)
STATS_COLUMNS = (
    named_field("FUNCTION", "function"),
    Column("OK", lambda row: str(row["counts"].get("ok", 0))),
    Column("FAILED", _failed),
    named_field("RUNNING", "running"),
    named_field("WAITING", "backlog"),
    named_field("CONTAINERS", "containers"),
    _quantile("P50", "latency_ms", "p50"),
    _quantile("P99", "latency_ms", "p99"),
    _quantile("RUNS P50", "execution_ms", "p50"),
)
