"""Looking at what exists and ending it: `squall app`, `squall container`, `squall trace`.

Every listing is described once, in `NOUNS`: what is asked of the server and which columns people see; with `--json`
programs get the server's rows as they are, and the same keys of what is ended. Names, ids and beginnings of ids are
accepted alike. Data goes to stdout, the rest to stderr. Only looking back (`app list --all`, `app logs`) starts a
server where none runs. Tested in `tests/unit/test_cli_manage.py` and `tests/acceptance/test_cli.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click

from squall import config
from squall.cli.documents import json_option, print_json, tell
from squall.cli.exec import ANSWER_SECONDS, CapturedExec, Exec, exec_json_option, told, wants_pty
from squall.cli.logs import Printer, log_options
from squall.cli.main import Group, did_you_mean
from squall.client import Client
from squall.exception import InvalidError, NotFoundError, ServiceError
from squall.protocol.messages import Message, StopApp, StopContainer
from squall.protocol.requests import GetApp, GetTrace, ListObjects
from squall.protocol.transport import Link

LIST_LIMIT = 1000
GRACE_SECONDS = 10.0


def connect(*, start: bool = False) -> Client:
    """A connection to the running server; ServiceError where there is none, unless one shall `start`."""
    return Client.connect(autostart=start)


def ask(link: Link, message: Message, timeout: float | None = ANSWER_SECONDS) -> dict[str, Any]:
    """The data of the server's answer."""
    reply, _ = link.request(message).wait(timeout)
    return reply.data


# ---- tables -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    title: str
    show: Callable[[dict[str, Any]], str]


def _field(title: str, key: str) -> Column:
    return Column(title, lambda row: str(row.get(key, "") if row.get(key) is not None else ""))


def _age(title: str, key: str) -> Column:
    return Column(title, lambda row: ago(float(row.get(key) or 0)))


def ago(at: float, now: float | None = None) -> str:
    """`3 min ago`, from seconds since 1970; empty for 0."""
    if not at:
        return ""
    seconds = max(0.0, (time.time() if now is None else now) - at)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{int(seconds // size)} {unit} ago"
    return f"{int(seconds)} s ago"


def date(at: Any) -> str:
    """`2026-11-22 09:30`, from seconds since 1970, in the time zone of this machine; empty for none."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(float(at))) if at else ""


def until(at: float | None, now: float | None = None) -> str:
    """`in 3 min`, from seconds since 1970; empty for None."""
    if at is None:
        return ""
    seconds = max(0.0, at - (time.time() if now is None else now))
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"in {int(seconds // size)} {unit}"
    return f"in {int(seconds)} s"


def size_of(size_bytes: int) -> str:
    """`213 MiB`, from bytes."""
    return f"{size_bytes / (1 << 20):.0f} MiB" if size_bytes >= 1 << 20 else f"{size_bytes >> 10} KiB"


def last_title(row: dict[str, Any]) -> str:
    """What the last layer of an image was made by."""
    layers = row.get("layers") or [{}]
    return str(layers[-1].get("title", ""))[:60]


def cells(text: str) -> str:
    """Text for one cell: a name or a reason may hold anything, but must not move the cursor or break the table."""
    return "".join(c if c.isprintable() else " " for c in text)


def print_table(rows: Sequence[dict[str, Any]], columns: Sequence[Column], empty: str) -> None:
    """Rows for people; where there are none, `empty` says so on stderr."""
    if not rows:
        click.echo(empty, err=True)
        return
    lines = [[column.title for column in columns], *([cells(c.show(row)) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


@dataclass(frozen=True)
class Noun:
    """What `list` asks for and shows."""

    kind: str
    empty: str
    columns: tuple[Column, ...]


NOUNS = {
    "app": Noun(
        "apps",
        "no apps (`--all` includes those that have stopped)",
        (
            _field("APP", "app_id"),
            _field("NAME", "name"),
            _field("STATE", "state"),
            _field("VERSION", "version"),
            _field("CONTAINERS", "containers"),
            Column("NEXT FIRING", lambda row: until(row.get("next_firing_at"))),
            _age("CREATED", "created_at"),
            _age("STOPPED", "stopped_at"),
            _field("REASON", "reason"),
        ),
    ),
    "image": Noun(
        "images",
        "no images were built here",
        (
            _field("IMAGE", "image_id"),
            _field("STATE", "state"),
            Column("SIZE", lambda row: size_of(int(row.get("size_bytes") or 0))),
            Column("STEPS", lambda row: str(row.get("steps", ""))),
            Column("IN USE", lambda row: "yes" if row.get("in_use") else ""),
            _age("CREATED", "created_at"),
            _age("USED", "used_at"),
            Column("LAST STEP", lambda row: last_title(row)),
        ),
    ),
    "call": Noun(
        "calls",
        "no calls",
        (
            _field("CALL", "call_id"),
            _field("APP", "app"),
            _field("FUNCTION", "function"),
            _field("KIND", "kind"),
            _field("STATE", "state"),
            _field("INPUTS", "inputs"),
            _field("FAILED", "failed"),
            _age("STARTED", "started_at"),
            _age("ENDED", "ended_at"),
        ),
    ),
    "schedule": Noun(
        "schedules",
        "no schedules (`squall deploy` an app with `schedule=` functions)",
        (
            _field("SCHEDULE", "schedule_id"),
            _field("APP", "app"),
            _field("FUNCTION", "function"),
            _field("WHEN", "schedule"),
            Column("NEXT", lambda row: "paused" if row.get("paused") else until(row.get("next_at"))),
            _age("LAST", "last_at"),
            _field("FIRED", "fired"),
            _field("LEFT OUT", "skipped"),
            _field("RUNNING", "running"),
        ),
    ),
    "container": Noun(
        "containers",
        "no containers (`--all` includes those that have ended)",
        (
            _field("CONTAINER", "container_id"),
            _field("APP", "app"),
            _field("FUNCTION", "function"),
            _field("STATE", "state"),
            _field("RUNNING", "running"),
            _age("STARTED", "started_at"),
            _age("STOPPED", "stopped_at"),
            _field("REASON", "reason"),
        ),
    ),
}


def fetch(link: Link, noun: str, *, app: str = "", include_all: bool = False) -> list[dict[str, Any]]:
    data = ask(link, ListObjects(NOUNS[noun].kind, app=app, all=include_all, limit=LIST_LIMIT))
    rows: list[dict[str, Any]] = data.get("rows", [])
    return rows


PAST = {"app": "squall.db", "call": "squall.db", "image": "images/*"}
"""Where, in a home's state, what outlives its server is seen without one."""


def _has_past(noun: str) -> bool:
    """Whether an earlier server of this home may have left some."""
    return noun in PAST and any(config.load().state_dir.glob(PAST[noun]))


def show_list(noun: str, *, app: str, include_all: bool, as_json: bool) -> None:
    empty = NOUNS[noun].empty
    try:
        client = connect(start=include_all and _has_past(noun))
    except ServiceError:
        if config.load().server:
            raise
        rows = []  # nothing runs
        empty = "no server is running (`--all` starts one, to see what it keeps)" if _has_past(noun) else empty
    else:
        rows = fetch(client.link, noun, app=app, include_all=include_all)
        client.close()
    if as_json:
        print_json(rows)
        return
    columns = [c for c in NOUNS[noun].columns if any(c.show(row) for row in rows)]
    print_table(rows, columns, empty)


def resolve(link: Link, noun: str, word: str) -> str:
    """The id (or name) that the server knows, from an id, the beginning of one, or a name."""
    return chosen(fetch(link, noun, include_all=True), noun, word)


def chosen(rows: Sequence[dict[str, Any]], noun: str, word: str) -> str:
    """As `resolve`, of these rows."""
    ids = [str(row[f"{noun}_id"]) for row in rows]
    names = [str(row["name"]) for row in rows if row.get("name")]
    if word in ids or word in names:
        return word
    begun = [found for found in ids if found.startswith(word)]
    if len(begun) == 1:
        return begun[0]
    if begun:
        raise InvalidError(
            f"`{word}` is the beginning of {len(begun)} {noun} ids", hint=f"which: {', '.join(begun[:5])}"
        )
    hint = did_you_mean(word, set(names) or set(ids)) or f"this server has had no {noun} yet"
    raise NotFoundError(f"no {noun} `{word}`", hint=hint)


def complete(noun: str) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """Tab completion of ids and names of what exists."""

    def find(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
        try:
            client = connect()
            rows = fetch(client.link, noun)
            client.close()
        except Exception:  # a completion that fails completes nothing; it must not write into the command line
            return []
        words = {str(row.get(key)) for row in rows for key in ("name", f"{noun}_id") if row.get(key)}
        return sorted(word for word in words if word.startswith(incomplete))

    return find


# ---- app ----------------------------------------------------------------------------------------------------------


@click.group(cls=Group)
def app() -> None:
    """Apps: list, info, history, logs, stats, rollback, rollover, stop."""


@app.command("list")
@click.option("--all", "include_all", is_flag=True, help="Include apps that have stopped.")
@json_option
def app_list(include_all: bool, as_json: bool) -> None:
    """List apps."""
    show_list("app", app="", include_all=include_all, as_json=as_json)


@app.command("logs")
@click.argument("app_ref", metavar="APP", shell_complete=complete("app"))
@click.option("--function", "function_ref", default="", metavar="FUNCTION", help="Only what this function wrote.")
@log_options
def app_logs(app_ref: str, function_ref: str, printer: Printer) -> None:
    """Print what the containers of an app have written. APP is its name or id."""
    client = connect(start=True)  # the output of ended apps is kept longer than servers run
    printer.show(client, app=resolve(client.link, "app", app_ref), function=function_ref)


@app.command("stop")
@click.argument("app_ref", metavar="APP", shell_complete=complete("app"))
@json_option
def app_stop(app_ref: str, as_json: bool) -> None:
    """Stop an app: cancel its inputs, end its containers. APP is its name or id."""
    client = connect()
    ref = resolve(client.link, "app", app_ref)
    facts = ask(client.link, GetApp(ref)) if as_json else {}
    ask(client.link, StopApp(ref, reason="`squall app stop`"))
    row = {key: facts.get(key) for key in ("app_id", "name", "environment")}
    tell(as_json, {**row, "state": "stopped"}, f"app `{ref}` is stopped")


# ---- container ----------------------------------------------------------------------------------------------------


@click.group(cls=Group)
def container() -> None:
    """Containers: list, follow, look inside, stop."""


@container.command("list")
@click.option("--app", "app_ref", default="", metavar="APP", help="Only containers of this app.")
@click.option("--all", "include_all", is_flag=True, help="Include containers that have ended.")
@json_option
def container_list(app_ref: str, include_all: bool, as_json: bool) -> None:
    """List containers."""
    show_list("container", app=app_ref, include_all=include_all, as_json=as_json)


@container.command("logs")
@click.argument("container_id", metavar="CONTAINER", shell_complete=complete("container"))
@log_options
def container_logs(container_id: str, printer: Printer) -> None:
    """Print what a container has written."""
    client = connect()
    printer.show(client, container_id=resolve(client.link, "container", container_id))


@container.command("stop")
@click.argument("container_ids", metavar="CONTAINER...", nargs=-1, required=True, shell_complete=complete("container"))
@click.option(
    "--grace",
    type=click.FloatRange(0, 3600),
    default=GRACE_SECONDS,
    show_default=True,
    help="Seconds for running inputs to end; 0 means at once.",
)
@json_option
def container_stop(container_ids: tuple[str, ...], grace: float, as_json: bool) -> None:
    """Stop containers; their unfinished inputs go to others."""
    client = connect()
    stopped = []
    for word in container_ids:
        rows = fetch(client.link, "container", include_all=True)
        found = chosen(rows, "container", word)
        ask(client.link, StopContainer(found, grace=grace, reason="`squall container stop`"))
        row = next(row for row in rows if row["container_id"] == found)
        state = "exited" if row["state"] == "exited" else "draining"
        stopped.append({**{key: row[key] for key in ("container_id", "app_id", "app", "function")}, "state": state})
        if not as_json:
            click.echo(f"container `{found}` is stopping", err=True)
    if as_json:
        print_json(stopped)


@container.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--pty/--no-pty", default=None, help="Give it a terminal; by default when this is one.")
@click.option("-w", "--workdir", default="", help="Directory to run it in.")
@exec_json_option
@click.argument("container_id", metavar="CONTAINER", shell_complete=complete("container"))
@click.argument("argv", metavar="[--] COMMAND...", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_context
def container_exec(
    ctx: click.Context, container_id: str, argv: tuple[str, ...], pty: bool | None, workdir: str, as_json: bool
) -> None:
    """Run a command in a running container; the exit code is the command's."""
    client = connect()
    found = resolve(client.link, "container", container_id)
    words = list(argv[1:] if argv[0] == "--" else argv)
    if not words:
        raise click.UsageError("missing COMMAND after `--`")
    kind = CapturedExec if as_json else Exec
    job = kind(client.link, found, words, pty=wants_pty(pty, as_json), workdir=workdir)
    ctx.exit(told(job, job.run()))


# ---- trace --------------------------------------------------------------------------------------------------------

BAR_WIDTH = 40


@click.command()
@click.argument("call", metavar="[CALL]", default="")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="Most inputs shown of a call.")
@json_option
def trace(call: str, limit: int, as_json: bool) -> None:
    """Show where the time of a call went. CALL is a call or input id; without one, the latest."""
    client = connect()
    data = ask(client.link, GetTrace(call, limit=limit))
    if as_json:
        print_json(data)
        return
    click.echo(f"{data.get('call_id')}  `{data.get('function')}`  {float(data.get('total_ms') or 0):.1f} ms in all")
    inputs = data.get("inputs", [])
    for entry in inputs:
        click.echo("\n".join(["", *waterfall(entry)]))
    more = int(data.get("num_inputs") or len(inputs)) - len(inputs)
    if more > 0:
        click.echo(f"\n{more} more inputs; `--limit` shows more", err=True)


def waterfall(entry: dict[str, Any]) -> list[str]:
    """The spans of one input as bars on one scale, each with its parts below."""
    spans = entry.get("spans", [])
    attempts = int(entry.get("attempts") or entry.get("attempt", 0) + 1)
    again = f", {attempts} attempts" if attempts > 1 else ""
    if not spans:
        return [f"input {entry.get('idx')}: {entry.get('status')}{again}"]
    begin, end = float(spans[0]["start"]), float(spans[-1]["end"])
    scale = BAR_WIDTH / max(end - begin, 1e-9)
    lines = [f"input {entry.get('idx')}: {entry.get('status')}{again}, {1000 * (end - begin):.1f} ms"]
    for span in spans:
        left = int((span["start"] - begin) * scale)
        width = max(1, round((span["end"] - begin) * scale) - left)
        bar = f"{' ' * min(left, BAR_WIDTH - 1)}{'█' * width}"[:BAR_WIDTH]
        took = 1000 * (span["end"] - span["start"])
        lines.append(f"  {span['name']:<12}{took:>9.1f} ms  {bar:<{BAR_WIDTH}}  {span.get('note', '')}".rstrip())
        parts = span.get("parts") or {}
        lines += [f"    {name:<22}{float(ms):>7.1f}" for name, ms in parts.items()]
    lines += [f"  {cells(str(event))}" for event in entry.get("events", [])]
    return lines
