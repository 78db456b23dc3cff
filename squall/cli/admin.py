"""The machine and its server: `squall doctor`, `status`, `down`, `completion`.

`doctor` asks each part of the node whether it can work here and tells why not and what to install; it changes nothing
and needs no server. This and `squall.testing` are the only places that know several rooms exist at once. Tested in
`tests/unit/test_cli_admin.py` and `tests/acceptance/test_cli.py`.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from squall import config
from squall.cli.documents import json_option, print_json, tell
from squall.cli.manage import ago, ask
from squall.client import Client
from squall.engines.provider import end_agent
from squall.exception import Error, ServiceError
from squall.protocol.requests import GetServer, ListObjects, StopServer

DOWN_SECONDS = 75.0
"""More than the exit hooks of classes have."""
LOW_DISK_BYTES = 1 << 30

# ---- doctor -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One thing looked at. `status`: `ok`, `missing` (something will not work), `note` (worth knowing)."""

    name: str
    status: str
    detail: str


@dataclass(frozen=True)
class Diagnosis:
    runtime: str
    """The runtime that would be used; empty when none works."""
    checks: list[Check]


@click.command()
@json_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Say what works on this machine, what does not, why, and what to install."""
    diagnosis = diagnose(config.load())
    if as_json:
        print_json(asdict(diagnosis))
    else:
        for check in diagnosis.checks:
            click.echo(f"{_MARKS[check.status]} {check.name:<18} {check.detail}")
        click.echo()
        click.echo(_verdict(diagnosis.runtime))
    ctx.exit(0 if diagnosis.runtime else 1)


_MARKS = {"ok": "✓", "missing": "✗", "note": "·"}


def _verdict(runtime: str) -> str:
    if not runtime:
        return "Functions cannot run on this machine; see ✗ above."
    if runtime == "process":
        return "Functions run as plain processes, WITHOUT ISOLATION: they see your files. See ✗ above for containers."
    return f"Functions run in containers of the `{runtime}` runtime."


def diagnose(settings: config.Config) -> Diagnosis:
    native = _problems("squall.node.native", "NativeRuntime")
    network = _problems("squall.node.network", "Network")
    process = _problems("squall.node.runtime", "ProcessRuntime")
    checks = [
        Check("python", "ok", f"{platform.python_version()} at {sys.executable}"),
        Check("system", "ok", f"{platform.system()} {platform.release()}, {os.cpu_count()} cores"),
        _home_check(settings),
        *_checks("native runtime", native, "containers with namespaces, limits and filters"),
        *_checks("network", network, "containers reach the internet"),
        *_checks("process runtime", process, "plain processes, without isolation"),
        _gpu_check(),
    ]
    return Diagnosis(_choose(settings.runtime, {"native": native, "process": process}), checks)


def _choose(wanted: str, problems: dict[str, list[str]]) -> str:
    """The runtime the agent would take: the one asked for, else the first that works."""
    names = [wanted] if wanted != "auto" else list(problems)
    return next((name for name in names if not problems[name]), "")


def _problems(module: str, name: str) -> list[str]:
    """What the class says stands in its way here. A part that cannot even be imported has that problem."""
    import importlib

    try:
        found: list[str] = getattr(importlib.import_module(module), name).problems()
    except (ImportError, OSError) as error:
        return [f"cannot be loaded: {error}"]
    return found


def _checks(name: str, problems: list[str], works: str) -> list[Check]:
    if not problems:
        return [Check(name, "ok", works)]
    return [Check(name, "missing", problem) for problem in problems]


def _home_check(settings: config.Config) -> Check:
    place = settings.home
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        return Check("home", "missing", f"`{settings.home}` cannot be written: set SQUALL_HOME to another directory")
    free = shutil.disk_usage(place).free
    status = "ok" if free > LOW_DISK_BYTES else "note"
    return Check("home", status, f"{settings.home}, {free / (1 << 30):.1f} GiB free")


def _gpu_check() -> Check:
    if not Path("/proc/driver/nvidia").exists():
        return Check("gpu", "note", "no NVIDIA driver is loaded")
    try:
        import pynvml
    except ImportError:
        return Check("gpu", "missing", "an NVIDIA driver is loaded, its library is not: pip install 'squall[gpu]'")
    try:
        pynvml.nvmlInit()
        return Check("gpu", "ok", f"{pynvml.nvmlDeviceGetCount()} device(s)")
    except pynvml.NVMLError as error:
        return Check("gpu", "missing", f"the NVIDIA driver does not answer: {error}")


# ---- status, down -------------------------------------------------------------------------------------------------


def here(settings: config.Config) -> Client | None:
    """A connection to the server of this home, whatever server the profile names; None where none runs."""
    try:
        return Client.connect(autostart=False, config=replace(settings, server="", environment="main"))
    except ServiceError:
        return None


@click.command()
@json_option
def status(as_json: bool) -> None:
    """Show whether a server runs, for this home or where the profile says, and what it has."""
    settings = config.load()
    facts: dict[str, Any] = {"server": settings.server} if settings.server else {"home": str(settings.home)}
    facts["running"] = False
    client = Client.connect(autostart=False) if settings.server else here(settings)
    if client is not None:
        rows = {kind: _rows(client, kind) for kind in ("nodes", "apps", "containers")}
        facts.update(ask(client.link, GetServer()), running=True, nodes=rows["nodes"])
        facts.update(apps=len(rows["apps"]), containers=len(rows["containers"]))
        client.close()
    if as_json:
        print_json(facts)
        return
    for line in status_lines(facts):
        click.echo(line)


def status_lines(facts: dict[str, Any]) -> list[str]:
    """What `squall status` says, a line a fact."""
    if not facts["running"]:
        return [f"home        {facts['home']}", "server      not running (`squall run` or `squall up` starts one)"]
    state = "ending" if facts["draining"] else "running"
    kind = "stays" if facts["stays"] else "ends when nobody uses it"
    lines = [
        f"home        {facts['home']}",
        f"server      {state}, {facts['server_id']}, version {facts['version']}, pid {facts['pid']}, {kind}",
        f"since       {ago(facts['started_at'])}",
        f"listens     {facts['listens']}" if facts["listens"] else "",
        f"workspace   {facts['workspace']}, environment {facts['environment']}",
        *(f"node        {_node_line(node)}" for node in facts["nodes"]),
        f"silent      {facts['silent']} client(s) that do not answer: stopped, or busy" if facts.get("silent") else "",
        f"away        {facts['away']} client(s) whose connection broke" if facts.get("away") else "",
        f"apps        {facts['apps']}",
        f"containers  {facts['containers']}",
    ]
    return [line for line in lines if line]


def _rows(client: Client, kind: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = ask(client.link, ListObjects(kind, limit=1000)).get("rows", [])
    return rows


def _node_line(node: dict[str, Any]) -> str:
    parts = [str(node.get("node_id", "")), str(node.get("hostname", "")), f"runtime {node.get('runtime', '')}"]
    if node.get("health", "up") != "up":
        since = f" {ago(node['since'])}" if node.get("since") else ""
        parts.append(f"{node['health']}{since}: {node.get('reason', '')}")
    return ", ".join(part for part in parts if part)


@click.command()
@click.option("--now", is_flag=True, help="Do not wait for running inputs.")
@click.option("--grace", type=click.FloatRange(0, 86_400), help="Seconds to wait for them; else as the settings say.")
@json_option
def down(now: bool, grace: float | None, as_json: bool) -> None:
    """Stop the server of this home, whatever server the profile names. Harmless when none runs.

    One of `squall up` starts nothing more and lets running inputs end first; apps stop, containers end.
    """
    settings = config.load()
    client = here(settings)
    if client is None:
        (settings.run_dir / "stays").unlink(missing_ok=True)
        had_agent = end_agent(settings)
        waited = "; its containers, which waited for another, were ended" if had_agent else ""
        document = {"home": str(settings.home), "running": False, "stopped": False, "ended_containers": had_agent}
        tell(as_json, document, f"no server is running{waited}")
        return
    seconds = 0.0 if now else -1.0 if grace is None else grace
    try:
        ask(client.link, StopServer("`squall down`", seconds))
    except ServiceError:
        if not client.link.closed:
            raise
    wait_gone(client, settings, DOWN_SECONDS + (settings.drain_timeout if seconds < 0 else seconds))
    tell(as_json, {"home": str(settings.home), "running": False, "stopped": True}, "the server has stopped")


def wait_gone(client: Client, settings: config.Config, seconds: float) -> None:
    """Wait until the server that was asked to end has ended."""
    path = settings.socket_path
    deadline = time.monotonic() + seconds
    while not (client.link.closed and not path.exists()):
        if time.monotonic() > deadline:
            raise ServiceError(
                f"the server was asked to stop and has not within {seconds:g} s",
                hint=f"its log is `{settings.state_dir / 'server.log'}`; `squall down --now` does not wait for inputs",
            )
        time.sleep(0.02)
    client.close()


# ---- completion ---------------------------------------------------------------------------------------------------


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that makes SHELL complete squall's commands, names and ids.

    For bash: `squall completion bash > ~/.local/share/bash-completion/completions/squall`. For zsh: `squall completion
    zsh > ~/.squall.zsh`, and `. ~/.squall.zsh` in `~/.zshrc`. For fish: `squall completion fish >
    ~/.config/fish/completions/squall.fish`.
    """
    from click.shell_completion import get_completion_class

    from squall.cli.main import cli

    found = get_completion_class(shell)
    if found is None:
        raise Error(f"no completion for `{shell}`")
    click.echo(found(cli, {}, "squall", "_SQUALL_COMPLETE").source())
