"""Deploying an app from a program, and handles of apps that are deployed.

Owns what `app.deploy()` sends (the specs of the app, and who deploys what state of the source) and what an App without
code can be asked. The parts of an app on their way to the server are `_session`'s. Must never print by itself.
Tested in `tests/unit/test_deploy.py` and `tests/integration/test_deploys.py`.
"""

from __future__ import annotations

import getpass
import os
import socket
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from squall import client as clients
from squall._context import is_local
from squall._output import enabled_output
from squall._session import PlainOutput, default_name, send_parts
from squall.client import Client, Output
from squall.exception import InvalidError, StartupError
from squall.options import checked_name
from squall.protocol.messages import Message, StopApp
from squall.protocol.requests import DeployApp, GetApp, GetFunctionStats, LookupApp, SetLabels

if TYPE_CHECKING:
    from squall.app import App

DEPLOY_TIMEOUT_S = None
"""None: the server holds each start to its `startup_timeout`, and waiting for others to a bound of its own."""
GIT_TIMEOUT_S = 5.0
STOP_TIMEOUT_S = 90.0


@dataclass(frozen=True)
class Deployment:
    """What `app.deploy()` made: a version of the app, which takes its calls from now on."""

    app_id: str
    name: str
    version: int
    added: tuple[str, ...] = ()
    """Functions that the version before did not have."""
    removed: tuple[str, ...] = ()
    changed: dict[str, list[str]] = field(default_factory=dict)
    """Function -> the options that are others now; `source` when its code is."""
    notices: tuple[str, ...] = ()
    """What to know about it, such as a function that could not be tried for want of room."""

    @classmethod
    def of(cls, name: str, data: dict[str, Any]) -> Deployment:
        """From the server's answer."""
        changes = data.get("changes") or {}
        return cls(
            str(data["app_id"]),
            name,
            int(data["version"]),
            tuple(changes.get("added", ())),
            tuple(changes.get("removed", ())),
            dict(changes.get("changed", {})),
            tuple(data.get("notices", ())),
        )


@dataclass(frozen=True)
class AppInfo:
    """What the server knows of an app. Times are seconds since 1970; `version` is None of one that is not deployed."""

    app_id: str
    name: str
    state: str
    version: int | None
    created_at: float
    deployed_at: float | None
    tag: str
    git_commit: str
    containers: int
    functions: tuple[str, ...]


async def deploy_app(
    app: App, *, name: str | None, environment_name: str | None, tag: str, strategy: str, output: Output | None
) -> Deployment:
    """Make a version of the app on the server and give the app's handles its ids."""
    if not is_local():
        raise InvalidError(
            "`app.deploy()` was called in a container, while it imports your module",
            hint='put it under `if __name__ == "__main__":`, or use `squall deploy`',
        )
    if strategy not in ("rolling", "recreate"):
        raise InvalidError(f"`strategy={strategy!r}` is no way to deploy", hint="`rolling` or `recreate`")
    if not isinstance(tag, str):
        raise InvalidError(f"`tag={tag!r}` is not a string")
    app_name = checked_name(name, "app name") if name is not None else app.name or default_name(app)
    environment = "" if environment_name is None else checked_name(environment_name, "environment name")
    shown = output or enabled_output() or PlainOutput()
    client = Client.current()
    prepared = await send_parts(app, client, shown)
    commit, is_dirty = git_state(_directory_of(app))
    message = DeployApp(
        app_name,
        prepared.specs,
        environment,
        tag,
        strategy,
        dict(app.tags),
        commit,
        is_dirty,
        user_name(),
        socket.gethostname(),
        follow=output is not None,
    )
    try:
        reply, _ = await client.request(message, timeout=DEPLOY_TIMEOUT_S)
    except StartupError as error:
        cause = clients.startup_cause(error, prepared.source_map)
        raise error from cause
    deployment = Deployment.of(app_name, reply.data)
    if output is not None:
        client.follow(deployment.app_id, output)
    app._deployed_id = deployment.app_id
    for function_tag, pool in app._pools().items():
        pool._object_id = str(reply.data["functions"].get(function_tag, ""))
    return deployment


def user_name() -> str:
    """Who runs this program, for the history."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a user without a name
        return str(os.getuid())


def _directory_of(app: App) -> str:
    """Where the app's source is."""
    import sys

    for spec in app._specs.values():
        file: str | None = getattr(sys.modules.get(spec.module), "__file__", None)
        if file:
            return os.path.dirname(os.path.abspath(file))
    return os.getcwd()


def git_state(directory: str) -> tuple[str, bool]:
    """The commit that a directory is at, and whether its files differ from it; empty where there is no repository."""
    commit = _git(directory, "rev-parse", "HEAD").strip()
    if not commit:
        return "", False
    return commit, bool(_git(directory, "status", "--porcelain", "--", "."))


def _git(directory: str, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", directory, "--no-optional-locks", *arguments],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
    return str(done.stdout) if done.returncode == 0 else ""


# ---- an app that is deployed, without its code --------------------------------------------------------------------


async def look_up(app: App, name: str, environment: str, *, create: bool) -> None:
    """Find the app that the handle shall stand for."""
    reply, _ = await Client.current().request(LookupApp(name, environment, create))
    app.name, app._deployed_id = str(reply.data["name"]), str(reply.data["app_id"])
    app.tags = dict(reply.data["labels"])


async def ask_app(app: App, make: Any) -> dict[str, Any]:
    """The data of the server's answer to a request about the app, made from its id."""
    app_id = app.app_id
    if app_id is None:
        raise InvalidError(
            f"{app!r} is not known to the server",
            hint="deploy it or run it first, or find one that is deployed with `squall.App.lookup(name)`",
        )
    message: Message = make(app_id)
    reply, _ = await Client.current().request(message, timeout=STOP_TIMEOUT_S)
    return reply.data


async def stop_app(app: App) -> None:
    await ask_app(app, StopApp)


async def info_of(app: App) -> AppInfo:
    data = await ask_app(app, GetApp)
    functions = data["functions"] if isinstance(data["functions"], list) else []
    return AppInfo(
        data["app_id"],
        data["name"],
        data["state"],
        data.get("version"),
        float(data["created_at"]),
        data.get("deployed_at"),
        data.get("tag", ""),
        data.get("git_commit", ""),
        int(data["containers"]),
        tuple(sorted(str(row["function"]) for row in functions)),
    )


async def stats_of(app: App, since: float) -> dict[str, dict[str, Any]]:
    data = await ask_app(app, lambda app_id: GetFunctionStats(app_id, since=since))
    return {str(row["function"]): row for row in data["rows"] if not row.get("variant_of")}


async def labels_of(app: App, labels: dict[str, str] | None) -> dict[str, str]:
    """Replace the labels of an app; with None only ask for them."""
    if app.app_id is None:
        app.tags = app.tags if labels is None else labels
        return dict(app.tags)
    data = await ask_app(app, lambda app_id: SetLabels(app_id, labels=labels))
    app.tags = dict(data["labels"])
    return dict(app.tags)
