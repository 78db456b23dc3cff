"""HAND: how long functions of deployed apps wait for their next start: written down, told, and resumed after a restart.

The rules are in `starts`. A row stands for a function whose starts fail, by the id its callers name and the version it
is of: a restart must neither start all of them at once nor forget why what is spawned waits. A row that is lost costs
one start too early. Owns the table `backoffs`. Tested in `tests/integration/test_crash_loops.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from squall._observe import Logger
from squall.protocol.messages import FunctionSpec
from squall.server.calls import Result
from squall.server.database import Database
from squall.server.dispatch import Dispatch
from squall.server.inputs import Instructions, StartFailure
from squall.server.objects import AppRecord, FunctionRecord, Objects, Scope
from squall.server.starts import Backoff, backoff_of

log = Logger("server")

OUTPUT_LIMIT_BYTES = 256 << 10
"""A longer exception is told without it after a restart."""
TOLD_LIMIT = 400
"""Characters of a reason in one line."""


class Backoffs:
    def __init__(self, dispatch: Dispatch, objects: Objects, database: Database) -> None:
        self.dispatch = dispatch
        self.objects = objects
        self.database = database
        self.apply: Callable[[Instructions], None]
        """Set by `main`: carries out dispatch's instructions."""
        self.tell: Callable[[AppRecord, str, str], object]
        """Set by `main`: writes a line of the platform's own into an app's output."""
        self._rows: dict[str, dict[str, Any]] = {}
        """What the Store has, by the id that callers name."""

    async def load(self) -> None:
        """Read what the server before has written, ahead of the first `resume`."""
        self._rows = {row["function_id"]: row for row in await self.database.read(_read)}

    def resume(self, function: FunctionRecord) -> None:
        """A pool takes inputs from now on: where its starts failed before a restart they go on as they were."""
        row = self._rows.get(function.stable_id)
        if row is None or row["version"] != function.version:
            return
        failing = None
        if row["message"] is not None:
            output = Result(row["output"], "", 0.0, 0.0) if row["output"] is not None else None
            failing = StartFailure(row["message"], row["hint"], output)
        left = row["until"] - time.time()
        backoff = Backoff(row["failures"], row["delay"], left, row["reason"], failing)
        self.dispatch.starts.resume(time.monotonic(), function.function_id, backoff)

    def changed(self, function_id: str) -> None:
        """A start has failed, or one has succeeded after some that failed."""
        function, state = self.objects.functions.get(function_id), self.dispatch.functions.get(function_id)
        if function is None or state is None or self.objects.find_function(function.stable_id) is not function:
            return  # on trial, or of a version that ends
        backoff = backoff_of(state, time.monotonic())
        app, tag = function.app, function.spec.tag
        if backoff is None or not backoff.failures:
            if self._rows.pop(function.stable_id, None) is not None:
                self._delete([function.stable_id])
                log.info("starts again", app=app.name, function=tag)
                self.tell(app, tag, f"[`{tag}` starts again]\n")
            return
        row = self._rows[function.stable_id] = _row(function, backoff)
        self.database.write_soon(lambda connection: _put(connection, row))
        told = f"{backoff.reason[:TOLD_LIMIT]}; failure {backoff.failures}, next start in {backoff.left:.3g} s"
        log.warning("does not start", app=app.name, function=tag, reason=told)
        self.tell(app, tag, f"[`{tag}` does not start: {told}]\n")

    def switched(self, app: AppRecord) -> None:
        """An app has another version, or has stopped: what was of the one before is over."""
        mine = [one for one, row in self._rows.items() if row["app_id"] == app.app_id]
        over = [one for one in mine if app.state != "running" or self._rows[one]["version"] != app.version]
        for function_id in over:
            del self._rows[function_id]
        if over:
            self._delete(over)

    def secret_changed(self, scope: Scope, name: str) -> None:
        """Functions that name this secret and do not start are tried again at once."""
        for function in list(self.objects.functions.values()):
            if _names(function.spec, function.app.scope, scope, name):
                self.apply(self.dispatch.starts.try_again(time.monotonic(), function.function_id))

    def _delete(self, function_ids: list[str]) -> None:
        self.database.write_soon(lambda connection: _delete(connection, function_ids))


def _names(spec: FunctionSpec, home: Scope, scope: Scope, name: str) -> bool:
    refs = [f"{scope.environment}/{name}"] + ([name] if home.environment == scope.environment else [])
    return home.workspace == scope.workspace and any(ref in spec.secrets for ref in refs)


def _row(function: FunctionRecord, backoff: Backoff) -> dict[str, Any]:
    failing = backoff.failing
    data = failing.output.data if failing is not None and failing.output is not None else None
    return {
        "function_id": function.stable_id,
        "app_id": function.app.app_id,
        "version": function.version,
        "failures": backoff.failures,
        "delay": backoff.delay,
        "until": time.time() + backoff.left,
        "reason": backoff.reason,
        "message": failing.message if failing is not None else None,
        "hint": failing.hint if failing is not None else "",
        "output": bytes(data) if data is not None and len(data) <= OUTPUT_LIMIT_BYTES else None,
    }


# ---- what runs in the Store's threads -----------------------------------------------------------------------------


def _read(connection: Any) -> list[dict[str, Any]]:
    from squall.server import tables

    return [dict(row._mapping) for row in connection.execute(tables.backoffs.select())]


def _put(connection: Any, row: dict[str, Any]) -> None:
    from squall.server import tables

    table = tables.backoffs
    connection.execute(table.delete().where(table.c.function_id == row["function_id"]))
    connection.execute(table.insert(), row)


def _delete(connection: Any, function_ids: list[str]) -> None:
    from squall.server import tables

    table = tables.backoffs
    connection.execute(table.delete().where(table.c.function_id.in_(function_ids)))
