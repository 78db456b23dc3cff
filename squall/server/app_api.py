"""What clients may ask about apps and their functions: looking up, deploying, going back, scaling, stats.

Handlers of `api`, apart from it because they are many: each checks, calls one thing, encodes. A name is meant in the
asker's environment unless the message names another of the same workspace. Tested in
`tests/integration/test_deploys.py`.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

from squall.exception import InvalidError
from squall.protocol.requests import (
    DeployApp,
    GetApp,
    GetFunctionStats,
    ListVersions,
    LookupApp,
    LookupFunction,
    RedeployApp,
    SetLabels,
    UpdateAutoscaler,
)
from squall.server import app_rows
from squall.server.deploys import check_labels
from squall.server.objects import AppRecord, FunctionRecord, Scope, check_spec, options_of
from squall.server.starts import backoff_of
from squall.server.stats import counted

if TYPE_CHECKING:
    from squall.server.api import Peer
    from squall.server.main import Server

SETTINGS = ("min_containers", "max_containers", "buffer_containers", "scaledown_window")
"""What the autoscaler can be told while a function runs."""
SINCE_LIMIT_S = 7 * 86400.0


class AppApi:
    def __init__(self, server: Server) -> None:
        self.server = server
        self.objects = server.objects

    def _find(self, peer: Peer, ref: str, environment: str) -> AppRecord:
        return self.objects.find_app(ref, scope_of(peer, environment))

    # -- looking up

    def lookup_function(self, peer: Peer, message: LookupFunction, payload: bytes) -> None:
        app = self.objects.deployed_or_raise(message.app, scope_of(peer, message.environment))
        function_id, version, spec = self.objects.lookup(app, message.name, message.version)
        peer.reply(
            message.id,
            {
                "function_id": function_id,
                "app_id": app.app_id,
                "version": version.number,
                "is_generator": spec.is_generator,
                "shape": spec.shape,
            },
        )

    async def lookup_app(self, peer: Peer, message: LookupApp) -> None:
        scope = scope_of(peer, message.environment)
        if message.create:
            await self.server.access.check_place(scope)
            app = await self.server.deploys.create(message.app, scope)
        else:
            await self.objects.recall()
            app = self.objects.find_app(message.app, scope)
        data = {"app_id": app.app_id, "name": app.name, "state": app.state, "version": app.version}
        peer.reply(message.id, {**data, "labels": app.labels})

    # -- versions

    async def deploy(self, peer: Peer, message: DeployApp) -> None:
        self.server.check_deploy(peer, message)
        scope = scope_of(peer, message.environment)
        await self.server.access.check_place(scope)
        peer.reply(message.id, await self.server.deploys.deploy(peer, message, scope))

    async def redeploy(self, peer: Peer, message: RedeployApp) -> None:
        app = self.objects.deployed_or_raise(message.app, scope_of(peer, message.environment))
        peer.reply(message.id, await self.server.deploys.redeploy(message, app))

    async def list_versions(self, peer: Peer, message: ListVersions) -> None:
        app = self.objects.deployed_or_raise(message.app, scope_of(peer, message.environment))
        limit = max(1, min(message.limit, 1000))
        found = await self.server.database.read(lambda connection: app_rows.history(connection, app.app_id, limit))
        rows = []
        for version in found:
            row = {name: value for name, value in vars(version).items() if name not in ("specs", "is_kept")}
            row["version"], row["functions"] = row.pop("number"), row.pop("tags")
            row["kept"] = version.is_kept
            row["current"] = version.number == app.version and app.state == "running"
            rows.append(row)
        peer.reply(message.id, {"app_id": app.app_id, "name": app.name, "rows": rows})

    # -- one app

    async def get_app(self, peer: Peer, message: GetApp) -> None:
        await self.objects.recall()
        app = self._find(peer, message.app, message.environment)
        version = app.current if app.deployed else None
        data = self.app_row(app)
        data["functions"] = [self._function_row(function) for function in app.functions.values()]
        if version is not None:
            data.update(
                deployed_at=version.created_at,
                tag=version.tag,
                git_commit=version.git_commit,
                git_dirty=version.git_dirty,
                user=version.user,
                host=version.host,
            )
        peer.reply(message.id, data)

    def app_row(self, app: AppRecord) -> dict[str, Any]:
        containers = self.server.reconciler.containers.values()
        return {
            "app_id": app.app_id,
            "name": app.name,
            "state": app.state,
            "environment": app.scope.environment,
            "deployed": app.deployed,
            "version": app.version or None,
            "detached": app.detached,
            "created_at": app.created_at,
            "stopped_at": app.stopped_at or None,
            "reason": app.reason,
            "labels": app.labels,
            "functions": len(app.functions),
            "containers": sum(1 for record in containers if record.function.app is app),
            "next_firing_at": self.server.firings.next_of(app),
        }

    def function_rows(self, peer: Peer, ref: str) -> list[dict[str, Any]]:
        """Of every running app the asker may see, or of one: its functions, and the variants that were asked for."""
        apps = [app for app in self.objects.apps.values() if app.state == "running"]
        apps = [app for app in apps if app.scope == peer.scope]
        if ref:
            apps = [app for app in apps if ref in (app.app_id, app.name)]
        return [self._function_row(f) for app in apps for f in (*app.functions.values(), *app.variants.values())]

    def _function_row(self, function: FunctionRecord) -> dict[str, Any]:
        app, spec = function.app, function.spec
        row: dict[str, Any] = {
            "function_id": function.stable_id,
            "function": spec.tag,
            "app": app.name,
            "app_id": app.app_id,
            "kind": "class" if spec.methods else "generator" if spec.is_generator else "function",
            "methods": spec.methods,
            "variant_of": function.root.stable_id if function.root is not None else "",
            "cpu": spec.cpu,
            "memory_mib": spec.memory_mib,
            "gpu": spec.gpu,
            "timeout": spec.timeout,
            "image_id": spec.image.image_id or "host",
            "autoscaler": settings_of(function),
            "overridden": sorted(function.override),
        }
        return {**row, **self._load(function)}

    def _load(self, function: FunctionRecord) -> dict[str, Any]:
        """How busy it is now, with what still runs in versions that are ending."""
        dispatch = self.server.dispatch
        ids = {one.function_id for one in function.app.pools() if one.stable_id == function.stable_id}
        states = [dispatch.functions[one] for one in ids if one in dispatch.functions]
        current = dispatch.functions.get(function.function_id)
        backoff = backoff_of(current, time.monotonic()) if current else None
        return {
            "backlog": sum(state.pending() for state in states),
            "running": sum(len(state.running) for state in states),
            "containers": sum(len(state.containers) for state in states),
            "ready": sum(1 for one in current.containers.values() if one.state == "ready") if current else 0,
            "starting": len(current.starting) if current else 0,
            "blocked": self.server.reconciler.why_waiting(function),
            "start_failures": backoff.failures if backoff else 0,
            "next_start_in": round(backoff.left, 1) if backoff else 0.0,
        }

    async def set_labels(self, peer: Peer, message: SetLabels) -> None:
        app = self._find(peer, message.app, message.environment)
        labels = message.labels
        if labels is not None:
            check_labels(labels)
            await self.server.database.write(lambda connection: app_rows.set_labels(connection, app.app_id, labels))
            app.labels = labels
        peer.reply(message.id, {"labels": app.labels})

    # -- functions

    async def update_autoscaler(self, peer: Peer, message: UpdateAutoscaler) -> None:
        function = self.objects.function(message.function_id, peer.scope)
        if message.settings:
            override = checked_override(function, message.settings)
            function.override = override
            named, dispatch = function.stable_id, self.server.dispatch
            if function.function_id in dispatch.functions:
                options = options_of(function)
                self.server.reconciler.apply(dispatch.update_function(time.monotonic(), function.function_id, options))
            await self.server.database.write(lambda connection: app_rows.set_override(connection, named, override))
        peer.reply(message.id, {"settings": settings_of(function), "overridden": sorted(function.override)})

    def get_function_stats(self, peer: Peer, message: GetFunctionStats, payload: bytes) -> None:
        if message.function_id:
            functions = [self.objects.function(message.function_id, peer.scope)]
        else:
            app = self._find(peer, message.app, message.environment)
            functions = [*app.functions.values(), *app.variants.values()]
        since = max(1.0, min(message.since, SINCE_LIMIT_S))
        by_id = {function.stable_id: function for function in functions}
        found = counted(self.server.timelines.inputs, set(by_id), time.time() - since)
        rows = []
        for named, function in by_id.items():
            root = function.root.stable_id if function.root is not None else ""
            row = {"function_id": named, "function": function.spec.tag, "variant_of": root, "window_s": since}
            rows.append({**row, **found[named], **self._load(function)})
        peer.reply(message.id, {"rows": rows})


def scope_of(peer: Peer, environment: str) -> Scope:
    """Where a name is meant."""
    return peer.scope._replace(environment=environment) if environment else peer.scope


def settings_of(function: FunctionRecord) -> dict[str, Any]:
    return {name: function.override.get(name, getattr(function.spec, name)) for name in SETTINGS}


def checked_override(function: FunctionRecord, settings: dict[str, int | float | None]) -> dict[str, Any]:
    """What is laid over the function's own settings, these included. Raises InvalidError."""
    override = dict(function.override)
    tag = function.spec.tag
    for name, value in settings.items():
        if name not in SETTINGS:
            raise InvalidError(
                f"`{tag}`: the autoscaler has no setting `{name[:40]}`", hint=f"settings: {', '.join(SETTINGS)}"
            )
        if value is None:
            override.pop(name, None)
        elif name == "scaledown_window":
            override[name] = float(value)
        elif value != int(value):
            raise InvalidError(f"`{tag}`: {name}={value} is not a whole number")
        else:
            override[name] = int(value)
    made = dataclasses.replace(function.spec, **override)
    check_spec(made)
    if made.max_containers and made.min_containers > made.max_containers:
        raise InvalidError(
            f"`{tag}`: `min_containers` would be {made.min_containers}, more than `max_containers`, "
            f"{made.max_containers}"
        )
    return override
