"""Apps and their functions: what exists, who owns it, what state it is in; and their rows in the Store.

The truth of a running app is in memory, since it ends with the server; the Store keeps its history. Specs are stored
without environment values, which may be secrets. Tested in `tests/integration/test_apps.py`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from typing import Any

from squall.exception import InvalidError, NotFoundError
from squall.protocol.messages import CreateApp, FunctionSpec, new_id
from squall.protocol.states import AppState
from squall.server.database import Database
from squall.server.dispatch import FunctionOptions
from squall.server.scheduler import parse_gpu

GPU = re.compile(r"[A-Za-z0-9_!-]{1,60}(:[1-9][0-9]{0,3})?")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
HISTORY_LIMIT = 200


@dataclass(eq=False)
class AppRecord:
    app_id: str
    name: str
    detached: bool
    created_at: float
    owner: Any
    """The connection that made it, or None once that is gone."""
    functions: dict[str, FunctionRecord] = field(default_factory=dict)
    """By tag."""
    followers: set[Any] = field(default_factory=set)
    state: AppState = "running"
    stopped_at: float = 0.0
    reason: str = ""


@dataclass(eq=False)
class FunctionRecord:
    function_id: str
    app: AppRecord
    spec: FunctionSpec
    progress: tuple[int, float] = (0, 0.0)
    """Inputs that had ended, and since when it is that many."""
    told_stalled: bool = False
    told_stats: dict[str, int] = field(default_factory=dict)
    """What its followers were last told."""


def options_of(spec: FunctionSpec) -> FunctionOptions:
    retries = spec.retries
    return FunctionOptions(
        timeout=spec.timeout,
        startup_timeout=spec.startup_timeout,
        max_retries=retries.max_retries,
        backoff_coefficient=retries.backoff_coefficient,
        initial_delay=retries.initial_delay,
        max_delay=retries.max_delay,
        min_containers=spec.min_containers,
        max_containers=spec.max_containers,
        buffer_containers=spec.buffer_containers,
        scaledown_window=spec.scaledown_window,
        single_use=spec.single_use,
        concurrency=spec.concurrency,
        is_generator=spec.is_generator,
    )


class Objects:
    def __init__(self, database: Database) -> None:
        self.database = database
        self.apps: dict[str, AppRecord] = {}
        self.functions: dict[str, FunctionRecord] = {}
        self._recalled = False

    def create_app(self, message: CreateApp, owner: Any, now_wall: float) -> AppRecord:
        if not NAME.fullmatch(message.name):
            raise InvalidError(
                f"app name `{message.name[:80]}` is not valid",
                hint="use 1 to 64 letters, digits, `-`, `_` and `.`, beginning with a letter or digit",
            )
        app = AppRecord(new_id("ap"), message.name, message.detach, now_wall, owner)
        for spec in message.functions:
            check_spec(spec)
            if spec.tag in app.functions:
                raise InvalidError(f"app `{message.name}` has two functions named `{spec.tag}`")
            app.functions[spec.tag] = FunctionRecord(new_id("fu"), app, spec)
        self.apps[app.app_id] = app
        for function in app.functions.values():
            self.functions[function.function_id] = function
        self._record(app)
        return app

    def _record(self, app: AppRecord) -> None:
        row = {
            "app_id": app.app_id,
            "name": app.name,
            "state": app.state,
            "detached": app.detached,
            "created_at": app.created_at,
        }
        specs = [
            {"function_id": f.function_id, "app_id": app.app_id, "tag": f.spec.tag, "spec": _storable(f.spec)}
            for f in app.functions.values()
        ]

        def work(connection: Any) -> None:
            from squall.server import tables

            connection.execute(tables.apps.insert(), row)
            if specs:
                connection.execute(tables.functions.insert(), specs)

        self.database.write_soon(work)

    def set_stopped(self, app: AppRecord, now_wall: float) -> None:
        app.state, app.stopped_at = "stopped", now_wall
        for function in app.functions.values():
            self.functions.pop(function.function_id, None)
        app_id, reason = app.app_id, app.reason
        self._trim()

        def work(connection: Any) -> None:
            from squall.server import tables

            table = tables.apps
            values = {"state": "stopped", "stopped_at": now_wall, "reason": reason}
            connection.execute(table.update().where(table.c.app_id == app_id).values(values))

        self.database.write_soon(work)

    def _trim(self) -> None:
        """Keep the newest stopped apps in memory, for their logs and traces."""
        stopped = [app for app in self.apps.values() if app.state == "stopped"]
        for app in stopped[: max(0, len(stopped) - HISTORY_LIMIT)]:
            del self.apps[app.app_id]

    def find_app(self, ref: str) -> AppRecord:
        """By id, or by name: the running one of that name, else the newest."""
        if ref in self.apps:
            return self.apps[ref]
        named = [app for app in self.apps.values() if app.name == ref]
        if not named:
            known = sorted({app.name for app in self.apps.values()})
            hint = f"apps: {', '.join(known[:10])}" if known else "no app was run on this server yet"
            raise NotFoundError(f"no app `{ref[:80]}`", hint=hint)
        return next((app for app in named if app.state == "running"), named[-1])

    async def recall(self) -> None:
        """Fill the history with the newest apps of earlier servers, for whoever looks back. Once."""
        if self._recalled:
            return
        self._recalled = True

        def work(connection: Any) -> list[Any]:
            from squall.server import tables

            table = tables.apps
            query = table.select().order_by(table.c.created_at.desc()).limit(HISTORY_LIMIT)
            return list(connection.execute(query))

        past: dict[str, AppRecord] = {}
        for row in reversed(await self.database.read(work)):
            if row.app_id not in self.apps:
                app = past[row.app_id] = AppRecord(row.app_id, row.name, row.detached, row.created_at, None)
                app.state, app.stopped_at = "stopped", row.stopped_at or 0.0
                app.reason = row.reason or "its server ended"
        self.apps = {**past, **self.apps}

    def function(self, function_id: str) -> FunctionRecord:
        record = self.functions.get(function_id)
        if record is None:
            raise NotFoundError(f"no running function `{function_id[:80]}`", hint="its app may have been stopped")
        return record


def check_spec(spec: FunctionSpec) -> None:
    """Limits the SDK checks too; here because a client is not trusted."""
    problems = [
        (not spec.tag or len(spec.tag) > 256 or not spec.tag.isprintable(), f"function name `{spec.tag[:80]!r}`"),
        (" " in spec.tag, f"function name `{spec.tag}` with a space"),
        (not 0 < spec.cpu <= 4096, f"cpu={spec.cpu}"),
        (not 1 <= spec.memory_mib <= 1 << 30, f"memory={spec.memory_mib}"),
        (not 0 <= spec.cpu_limit <= 8192, f"cpu limit {spec.cpu_limit}"),
        (not 0 <= spec.memory_limit_mib <= 1 << 30, f"memory limit {spec.memory_limit_mib}"),
        (not all(len(wish) < 80 and GPU.fullmatch(wish) for wish in spec.gpu[:20]), f"gpu={str(spec.gpu)[:80]}"),
        (len(spec.gpu) > 20, f"a list of {len(spec.gpu)} GPUs"),
        (not 0.1 <= spec.timeout <= 86400, f"timeout={spec.timeout}"),
        (not 0.1 <= spec.startup_timeout <= 86400, f"startup_timeout={spec.startup_timeout}"),
        (not 0 <= spec.retries.max_retries <= 10_000, f"retries={spec.retries.max_retries}"),
        (not 0 <= spec.retries.initial_delay <= 3600, f"a delay of {spec.retries.initial_delay} before a retry"),
        (not 0 <= spec.retries.max_delay <= 3600, f"a delay of {spec.retries.max_delay} before a retry"),
        (not 1 <= spec.retries.backoff_coefficient <= 10, f"backoff_coefficient={spec.retries.backoff_coefficient}"),
        (not 0 <= spec.min_containers <= 100_000, f"min_containers={spec.min_containers}"),
        (not 0 <= spec.max_containers <= 100_000, f"max_containers={spec.max_containers}"),
        (not 0 <= spec.buffer_containers <= 100_000, f"buffer_containers={spec.buffer_containers}"),
        (not 0 <= spec.scaledown_window <= 86400, f"scaledown_window={spec.scaledown_window}"),
        (not 1 <= spec.concurrency <= 10_000, f"concurrency={spec.concurrency}"),
        (not 0 <= spec.cpu_limit <= 4096, f"cpu limit {spec.cpu_limit}"),
        (not 0 <= spec.memory_limit_mib <= 1 << 24, f"memory limit {spec.memory_limit_mib}"),
        (not 1 <= spec.retries.backoff_coefficient <= 10, f"backoff_coefficient={spec.retries.backoff_coefficient}"),
        (not 0 <= spec.retries.initial_delay <= 86400, f"initial_delay={spec.retries.initial_delay}"),
        (not 0 <= spec.retries.max_delay <= 86400, f"max_delay={spec.retries.max_delay}"),
        (not all(map(_is_gpu, spec.gpu)), f"gpu={spec.gpu}"),
    ]
    for wrong, what in problems:
        if wrong:
            raise InvalidError(f"function `{spec.tag[:80]}`: {what} is not allowed")


def _is_gpu(wish: str) -> bool:
    try:
        return 0 < parse_gpu(wish)[1] <= 1024
    except ValueError:
        return False


def _storable(spec: FunctionSpec) -> str:
    fields = dataclasses.asdict(spec)
    fields["env"] = sorted(spec.env)
    return json.dumps(fields)
