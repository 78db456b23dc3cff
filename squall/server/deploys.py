"""HAND: makes versions of deployed apps: a candidate, its trial, the switch, and the end of what it replaces.

A candidate's pools stand beside those that serve, under ids nobody calls. One container of each function is started;
only when all are ready, or there is no room for one, the new version is written to the Store and takes over, in one
turn of the loop: what waits moves to it (`Dispatch.supersede`), what runs ends where it is. Whatever fails before that
leaves the version that serves as it was. One deploy of an app at a time. Nothing here decides where or how many
containers there are. Tested in `tests/integration/test_deploys.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from squall._observe import Logger
from squall.exception import (
    ConflictError,
    InvalidError,
    NotFoundError,
    ResourceExhaustedError,
    StartupError,
)
from squall.protocol.messages import FunctionSpec, new_id
from squall.protocol.requests import DeployApp, RedeployApp
from squall.server import app_rows
from squall.server.builds import Builds
from squall.server.database import Database
from squall.server.dispatch import Dispatch
from squall.server.objects import (
    AppRecord,
    FunctionRecord,
    Objects,
    Scope,
    check_name,
    check_specs,
    options_of,
)
from squall.server.reconciler import Reconciler
from squall.server.takeover import RECREATE_GRACE_S
from squall.server.versions import Kind, Version, changes_between

log = Logger("server")

STRATEGIES = ("rolling", "recreate")
_KINDS: dict[str, Kind] = {"rollback": "rollback", "rollover": "rollover"}
WAITING_LIMIT = 8
"""Deploys of one app that may wait for the one under way."""
WAIT_S = 900.0
"""How long each waits at most."""
TRIAL_STEP_S = 0.02
ROOM_PATIENCE_S = 5.0
"""Without room for that long, a function is deployed without a trial."""
START_PATIENCE_S = 10.0
"""Added to `startup_timeout` for what comes before a container starts."""
PIN_IDLE_S = 600.0
"""A pool of those who call a version by its number is forgotten when nothing was asked of it for that long."""
FUNCTIONS_LIMIT = 1000
LABELS_LIMIT = 100
TEXT_LIMIT = 200


class Deploys:
    def __init__(
        self, objects: Objects, dispatch: Dispatch, reconciler: Reconciler, builds: Builds, database: Database
    ) -> None:
        self.objects = objects
        self.dispatch = dispatch
        self.reconciler = reconciler
        self.builds = builds
        self.database = database
        self.switched: Callable[[AppRecord], None] = lambda app: None
        """Set by `main`: an app has another version now, or is here again after a restart."""
        self.resumed: Callable[[FunctionRecord], None] = lambda pool: None
        """Set by `main`: a pool is here again after a restart."""
        self._turns: dict[tuple[Scope, str], asyncio.Lock] = {}
        self._queued: dict[tuple[Scope, str], int] = {}
        self._on_trial: set[str] = set()

    # -- what is asked for

    async def deploy(self, peer: Any, message: DeployApp, scope: Scope) -> dict[str, Any]:
        _check(message)
        check_specs(message.name, message.functions)
        for spec in message.functions:
            self.builds.check_use(spec.image, scope.workspace)
        await self._check_secrets(message.functions, scope)
        async with self._turn(scope, message.name):
            app = self.objects.deployed(message.name, scope) or self._new_app(message.name, scope)
            version = Version(app.version + 1, time.time(), message.functions)
            version.tag, version.strategy = message.tag, message.strategy
            version.git_commit, version.git_dirty = message.git_commit, message.git_dirty
            version.user, version.host = message.user, message.host
            if message.follow:
                app.followers.add(peer)
            return await self._release(app, version, message.labels)

    async def redeploy(self, message: RedeployApp, app: AppRecord) -> dict[str, Any]:
        if message.strategy not in STRATEGIES:
            raise _no_strategy(message.strategy)
        if message.kind not in _KINDS:
            raise InvalidError(f"`{message.kind[:40]}` is no way to deploy an app again")
        async with self._turn(app.scope, app.name):
            before = self._to_repeat(app, message)
            for spec in before.specs:
                self.builds.check_use(spec.image, app.scope.workspace)
            await self._check_secrets(before.specs, app.scope)
            version = dataclasses.replace(
                before,
                number=app.version + 1,
                created_at=time.time(),
                kind=_KINDS[message.kind],
                from_version=before.number,
                strategy=message.strategy,
                user=message.user[:TEXT_LIMIT],
                host=message.host[:TEXT_LIMIT],
            )
            return await self._release(app, version, None)

    async def _check_secrets(self, specs: list[FunctionSpec], scope: Scope) -> None:
        vault = self.reconciler.vault
        if any(spec.secrets for spec in specs):
            await vault.ready()
        for spec in specs:
            vault.check(scope, spec)

    def _to_repeat(self, app: AppRecord, message: RedeployApp) -> Version:
        if not app.deployed or not app.version:
            raise NotFoundError(f"app `{app.name}` was never deployed", hint="see `squall app list`")
        if message.kind == "rollover":
            if app.state != "running":
                raise ConflictError(f"app `{app.name}` was stopped, it has no containers to replace")
            number = app.version
        else:
            stopped = app.state != "running"
            number = message.version or (app.version if stopped else app.version - 1)
        version = app.versions.get(number)
        if version is None:
            kept = ", ".join(map(str, sorted(app.versions)))
            raise NotFoundError(
                f"app `{app.name}` cannot go back to version {number}",
                hint=f"versions that are kept: {kept}" if number else "it has had one version only",
            )
        return version

    async def create(self, name: str, scope: Scope) -> AppRecord:
        """A deployed app without functions yet, or the one there is."""
        check_name(name)
        async with self._turn(scope, name):
            app = self.objects.deployed(name, scope)
            if app is not None and app.state == "running":
                return app
            app = app or self._new_app(name, scope)
            row = {**app_rows.app_row(app), "state": "running"}
            await self.database.write(lambda connection: app_rows.put_app(connection, row, []))
            app.state, app.reason, app.stopped_at = "running", "", 0.0
            return app

    @contextlib.asynccontextmanager
    async def _turn(self, scope: Scope, name: str) -> AsyncIterator[None]:
        """One deploy of an app at a time; others wait, within bounds."""
        key = scope, name
        if self._queued.get(key, 0) > WAITING_LIMIT:
            raise ConflictError(f"app `{name}` is being deployed, and {WAITING_LIMIT} deploys of it wait already")
        lock = self._turns.setdefault(key, asyncio.Lock())
        self._queued[key] = self._queued.get(key, 0) + 1
        try:
            try:
                await asyncio.wait_for(lock.acquire(), WAIT_S)
            except asyncio.TimeoutError:
                raise ConflictError(
                    f"app `{name}` is being deployed for {WAIT_S:g} s by somebody else", hint="try again later"
                ) from None
            try:
                yield
            finally:
                lock.release()
        finally:
            self._queued[key] -= 1
            if not self._queued[key]:
                del self._queued[key], self._turns[key]

    def _new_app(self, name: str, scope: Scope) -> AppRecord:
        """Known from now on, and running once it has a version."""
        app = AppRecord(new_id("ap"), name, False, time.time(), None, scope=scope, deployed=True)
        app.state, app.reason = "stopped", "it was never deployed"
        self.objects.apps[app.app_id] = app
        return app

    # -- a version's way

    async def _release(self, app: AppRecord, version: Version, labels: dict[str, str] | None) -> dict[str, Any]:
        if app.state == "stopping":
            raise ConflictError(f"app `{app.name}` is being stopped", hint="deploy it again when it has stopped")
        before = app.current
        version.tags = [spec.tag for spec in version.specs]
        version.changes = changes_between(before.specs if before else [], version.specs)
        pools = self.objects.draft(app, version)
        self._on_trial |= {pool.function_id for pool in pools.values()}
        try:
            notices = await self._try(app, pools)
        except BaseException:
            self._withdraw(app, pools)
            raise
        # From here on it happens, whether its deployer is still there to hear of it or not.
        done = asyncio.ensure_future(self._commit(app, version, pools, labels))
        try:
            await asyncio.shield(done)
        except asyncio.CancelledError:
            await asyncio.wait([done])
            raise
        return {
            "app_id": app.app_id,
            "version": version.number,
            "functions": {tag: pool.stable_id for tag, pool in pools.items()},
            "changes": version.changes,
            "notices": notices,
        }

    async def _try(self, app: AppRecord, pools: dict[str, FunctionRecord]) -> list[str]:
        """Have each function start a container. Raises when one cannot; what could not be tried is told."""
        now = time.monotonic()
        left = {tag: pool for tag, pool in pools.items() if not pool.spec.parameters}
        for tag, pool in pools.items():
            options = options_of(pool)
            if tag in left:
                options = dataclasses.replace(options, min_containers=max(1, options.min_containers))
            self.reconciler.apply(self.dispatch.add_function(now, pool.function_id, options))
        notices: list[str] = []
        while left:
            for tag, pool in list(left.items()):
                verdict = self._verdict(app, pool, time.monotonic() - now)
                if verdict is not None:
                    del left[tag]
                    notices += [verdict] if verdict else []
            if left:
                await asyncio.sleep(TRIAL_STEP_S)
        return notices

    def _verdict(self, app: AppRecord, pool: FunctionRecord, waited: float) -> str | None:
        """Empty when a container was ready, a notice when none could be tried, None as long as it is not known."""
        tag = pool.spec.tag
        state = self.dispatch.functions.get(pool.function_id)
        if state is None or state.closed:
            raise ConflictError(f"app `{app.name}` was stopped while it was deployed")
        if state.cold_start is not None:
            return ""
        goes_on = f"version {app.version} goes on serving" if app.state == "running" else "nothing was deployed"
        if state.failing is not None:
            error = StartupError(
                f"cannot deploy `{app.name}`: `{tag}` does not start: {state.failing.message}; {goes_on}",
                hint=state.failing.hint,
            )
            error.packed = bytes(state.failing.output.data) if state.failing.output is not None else b""
            raise error
        refusal = self.reconciler.refusal(pool.function_id)
        if refusal is not None and refusal[2]:
            raise ResourceExhaustedError(
                f"cannot deploy `{app.name}`: `{tag}` has no place to run: {refusal[0]}; {goes_on}", hint=refusal[1]
            )
        if refusal is not None and waited > ROOM_PATIENCE_S and not state.containers:
            return f"`{tag}` was not tried, as no node has room now: {refusal[0]}"
        if waited > pool.spec.startup_timeout + START_PATIENCE_S:
            why = state.blocked_reason or f"no container was ready within {waited:.0f} s"
            raise StartupError(f"cannot deploy `{app.name}`: `{tag}` does not start: {why}; {goes_on}")
        return None

    async def _commit(
        self, app: AppRecord, version: Version, pools: dict[str, FunctionRecord], labels: dict[str, str] | None
    ) -> None:
        """Write the version; then, without a pause in which anything could be asked of either, switch to it."""
        labels = app.labels if labels is None else labels
        row = {**app_rows.app_row(app), "state": "running", "version": version.number}
        row["labels"] = app_rows.packed_labels(labels)
        seal = self.objects.seal
        try:
            await self.database.write(lambda connection: app_rows.put_version(connection, row, version, seal))
        except BaseException:
            self._withdraw(app, pools)
            raise
        app.labels = labels
        ended = [tag for tag, pool in pools.items() if self._is_closed(pool)]
        if ended:  # stopped while its version was being written: the Store hears of the stop last
            self._withdraw(app, pools)
            raise ConflictError(f"app `{app.name}` was stopped while it was deployed")
        self._switch(app, version, pools)

    def _is_closed(self, pool: FunctionRecord) -> bool:
        state = self.dispatch.functions.get(pool.function_id)
        return state is None or bool(state.closed)

    def _switch(self, app: AppRecord, version: Version, pools: dict[str, FunctionRecord]) -> None:
        now = time.monotonic()
        apply = self.reconciler.apply
        reason = f"version {version.number} of `{app.name}` took over"
        replaced = self.objects.publish(app, version, pools)
        app.state, app.reason, app.stopped_at = "running", "", 0.0
        for pool in [*pools.values(), *(new for _, new in replaced if new is not None)]:
            apply(self.dispatch.add_function(now, pool.function_id, options_of(pool)))
            self._on_trial.discard(pool.function_id)
        for old, new in replaced:
            if old.function_id not in self.dispatch.functions:
                continue
            if new is not None:
                apply(self.dispatch.supersede(now, old.function_id, new.function_id, reason))
            else:
                self._retire(now, old)
        if version.strategy == "recreate":
            self._end_old({old.function_id for old, _ in replaced}, reason)
        log.info("deployed", app=app.name, version=version.number, kind=version.kind)
        self.switched(app)

    def _retire(self, now: float, old: FunctionRecord) -> None:
        """A function that the new version does not have: what was asked of it is done, and no more is taken."""
        options = dataclasses.replace(options_of(old), min_containers=0, buffer_containers=0)
        self.reconciler.apply(self.dispatch.update_function(now, old.function_id, options))

    def _end_old(self, pool_ids: set[str], reason: str) -> None:
        for record in list(self.reconciler.containers.values()):
            if record.function.function_id in pool_ids:
                grace = max(RECREATE_GRACE_S, record.function.spec.exit_grace)
                self.reconciler.stop_container(record.container_id, grace, reason, by_operator=True)

    def _withdraw(self, app: AppRecord, pools: dict[str, FunctionRecord]) -> None:
        now = time.monotonic()
        for pool in pools.values():
            self.reconciler.apply(self.dispatch.close_function(now, pool.function_id, "its version was not accepted"))
            self._on_trial.discard(pool.function_id)
        if not app.version and app.state == "stopped":
            self.objects.apps.pop(app.app_id, None)
        self._sweep_app(app)

    # -- what is over, what was before

    def sweep(self) -> None:
        """Forget the pools that have ended, and end those that nobody needs any more. Called every second or so."""
        for app in list(self.objects.apps.values()):
            if app.others:
                self._sweep_app(app)

    def _sweep_app(self, app: AppRecord) -> None:
        now = time.monotonic()
        for pool in [pool for pool in app.others.values() if pool.function_id not in self._on_trial]:
            state = self.dispatch.functions.get(pool.function_id)
            if state is None:
                self.reconciler.forget_function(pool.function_id)
                self.objects.discard(pool)
                continue
            if state.closed or state.containers or state.pending() or state.running:
                continue
            is_pin = pool.stable_id == pool.function_id
            if is_pin and (now - state.active_at < PIN_IDLE_S or self._has_calls(pool.function_id)):
                continue
            reason = "nobody calls its version any more"
            self.reconciler.apply(self.dispatch.close_function(now, pool.function_id, reason))

    def _has_calls(self, function_id: str) -> bool:
        return any(call.function_id == function_id for call in self.dispatch.calls.values())

    async def restore(self) -> None:
        """Take up the deployed apps that the Store has."""
        seal = self.objects.seal
        kept = await self.database.read(lambda connection: app_rows.deployed(connection, seal))
        self.take_up(self.objects.restored(kept))

    def take_up(self, apps: list[AppRecord]) -> None:
        """Have restored apps take calls."""
        now = time.monotonic()
        for app in apps:
            for pool in app.pools() if app.state == "running" else ():
                self.reconciler.apply(self.dispatch.add_function(now, pool.function_id, options_of(pool)))
                self.resumed(pool)
                self.reconciler.takeover.function_opened(pool.function_id)
            self.switched(app)


def _check(message: DeployApp) -> None:
    check_name(message.name)
    if message.strategy not in STRATEGIES:
        raise _no_strategy(message.strategy)
    if len(message.functions) > FUNCTIONS_LIMIT:
        raise InvalidError(f"app `{message.name}` has {len(message.functions)} functions, the limit is 1,000")
    for what, text in (("tag", message.tag), ("commit", message.git_commit)):
        if len(text) > TEXT_LIMIT or not text.isprintable():
            raise InvalidError(f"the {what} of a version takes up to {TEXT_LIMIT} printable characters")
    message.user, message.host = message.user[:TEXT_LIMIT], message.host[:TEXT_LIMIT]
    check_labels(message.labels)


def check_labels(labels: dict[str, str]) -> None:
    if len(labels) > LABELS_LIMIT or any(len(k) > TEXT_LIMIT or len(v) > TEXT_LIMIT for k, v in labels.items()):
        raise InvalidError(f"an app has up to {LABELS_LIMIT} tags of up to {TEXT_LIMIT} characters")


def _no_strategy(strategy: str) -> InvalidError:
    return InvalidError(f"there is no strategy `{strategy[:40]}`", hint="`rolling` or `recreate`")
