"""`squall schedule`: the schedules of deployed apps: list, look at, pause, resume, run now.

Tested in `tests/unit/test_cli_schedules.py` and `tests/integration/test_schedules.py`.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import click

from squall.cli.documents import json_option, print_json
from squall.cli.main import Group, did_you_mean
from squall.cli.manage import (
    Column,
    ask,
    complete,
    connect,
    fetch,
    print_table,
    show_list,
)
from squall.exception import InvalidError, NotFoundError
from squall.protocol.requests import ChangeSchedule
from squall.protocol.transport import Link


@click.group(cls=Group)
def schedule() -> None:
    """Schedules of deployed apps: list, look at, pause, resume, run now."""


@schedule.command("list")
@click.option(
    "--app", "app_ref", default="", metavar="APP", help="Only those of this app.", shell_complete=complete("app")
)
@json_option
def schedule_list(app_ref: str, as_json: bool) -> None:
    """List schedules and when they fire next."""
    show_list("schedule", app=app_ref, include_all=False, as_json=as_json)


@schedule.command("info")
@click.argument("schedule_ref", metavar="SCHEDULE", shell_complete=complete("schedule"))
@json_option
def schedule_info(schedule_ref: str, as_json: bool) -> None:
    """Show a schedule's latest firings."""
    row = found(connect(start=True).link, schedule_ref)
    if as_json:
        print_json(row)
        return
    click.echo(f"{row['schedule_id']}  `{row['function']}` of app `{row['app']}`: {row['schedule']}")
    next_at = "paused" if row["paused"] else stamp(row["next_at"])
    click.echo(f"next: {next_at}  fired: {row['fired']}  left out: {row['skipped']}  running: {row['running']}")
    print_table(row["recent"], _FIRINGS, "it has not fired yet")


_FIRINGS = (
    Column("DUE", lambda row: stamp(row["at"])),
    Column("LATE", lambda row: f"{row['fired_at'] - row['at']:.1f} s" if "fired_at" in row else ""),
    Column("MISSED BEFORE", lambda row: str(row["missed"]) if row["missed"] else ""),
    Column("CALL", lambda row: str(row.get("call_id", ""))),
    Column("LEFT OUT", lambda row: str(row.get("skipped", ""))),
)


@schedule.command("pause")
@click.argument("refs", metavar="SCHEDULE...", nargs=-1, required=True, shell_complete=complete("schedule"))
@json_option
def schedule_pause(refs: tuple[str, ...], as_json: bool) -> None:
    """Fire no more until it is resumed."""
    _change(refs, "pause", "is paused", as_json)


@schedule.command("resume")
@click.argument("refs", metavar="SCHEDULE...", nargs=-1, required=True, shell_complete=complete("schedule"))
@json_option
def schedule_resume(refs: tuple[str, ...], as_json: bool) -> None:
    """Go on with the next firing."""
    _change(refs, "resume", "goes on", as_json)


def _change(refs: tuple[str, ...], action: str, done: str, as_json: bool) -> None:
    link = connect(start=True).link
    rows = []
    for ref in refs:
        row = found(link, ref)
        ask(link, ChangeSchedule(row["schedule_id"], action))
        rows.append({**_named(row), "paused": action == "pause"})
        if not as_json:
            click.echo(f"schedule `{row['schedule_id']}` of `{row['function']}` {done}", err=True)
    if as_json:
        print_json(rows)


def _named(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("schedule_id", "app", "function")}


@schedule.command("run")
@click.argument("schedule_ref", metavar="SCHEDULE", shell_complete=complete("schedule"))
@json_option
def schedule_run(schedule_ref: str, as_json: bool) -> None:
    """Make a call now, beside the schedule's own, and print its id."""
    link = connect(start=True).link
    row = found(link, schedule_ref)
    call_id = ask(link, ChangeSchedule(row["schedule_id"], "run"))["call_id"]
    if as_json:
        print_json({**_named(row), "call_id": call_id})
    else:
        click.echo(call_id)


def found(link: Link, word: str) -> dict[str, Any]:
    """The row of a schedule, from its id, the beginning of it, or the name of its function."""
    rows = fetch(link, "schedule")
    hits = [row for row in rows if word in (row["function"], f"{row['app']}.{row['function']}")]
    if not hits and word.startswith("sc-"):
        hits = [row for row in rows if row["schedule_id"].startswith(word)]
    if len(hits) == 1:
        return hits[0]
    if hits:
        ids = ", ".join(f"{row['schedule_id']} of `{row['app']}`" for row in hits[:5])
        raise InvalidError(f"`{word}` means {len(hits)} schedules", hint=f"which: {ids}")
    names = {str(row["function"]) for row in rows}
    raise NotFoundError(f"no schedule `{word}`", hint=did_you_mean(word, names) or "no deployed app has a schedule")


def stamp(at: float | None) -> str:
    """A time for people, on this machine's clock."""
    return "" if at is None else datetime.fromtimestamp(at).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
