"""What `squall call list` shows: calls that are under way, and the latest that have ended.

Three places know of calls: dispatch of those under way, the Store of spawned ones, the ring of timelines of those that
ended since the server was started. Here they are put together; nothing is changed. Costs the calls that are shown and
the ring, never the inputs of a call beyond COUNT_LIMIT; what is long is looked at some at a time, as the loop is
everybody's. Tested in `tests/integration/test_spawn.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from squall.server.calls import CallInfo, title_of
from squall.server.inputs import Call
from squall.server.objects import Scope

if TYPE_CHECKING:
    from squall.server.main import Server

KEPT_LIMIT = 200
"""Spawned calls that are read from the Store."""
UNDER_WAY_LIMIT = 10_000
SEEN_LIMIT = 100_000
"""Calls under way that are looked at for those of one environment, the newest first."""
TURN = 1000
"""Of what is looked at before others have their turn."""
COUNT_LIMIT = 2000
"""Of an ended call with more inputs it is not counted how many have failed."""

Row = dict[str, Any]


async def call_rows(server: Server, scope: Scope) -> list[Row]:
    """The calls of an environment, the newest last."""
    kept = await server.database.read(lambda connection: list(_kept(connection, scope)))
    rows: dict[str, Row] = {}
    for row in kept:
        rows[row["call_id"]] = row
    for row in (await _ended(server, scope)).values():
        rows.setdefault(row["call_id"], row)
    for row in await _under_way(server, scope):
        rows[row["call_id"]] = rows.get(row["call_id"], {"ended_at": None}) | row
    return sorted(rows.values(), key=lambda row: float(row["started_at"]))


async def _under_way(server: Server, scope: Scope) -> list[Row]:
    """The newest; a million may be."""
    rows: list[Row] = []
    for number, call in enumerate(list(islice(reversed(server.dispatch.calls.values()), SEEN_LIMIT))):
        if number % TURN == TURN - 1:
            await asyncio.sleep(0)
        info = call.data
        if isinstance(info, CallInfo) and info.function is not None and info.function.app.scope == scope:
            rows.append(_row(call, info, info.function.app.name))
        if len(rows) == UNDER_WAY_LIMIT:
            break
    return rows


def _row(call: Call, info: CallInfo, app: str) -> Row:
    return {
        "call_id": call.call_id,
        "app": app,
        "function": title_of(info),
        "function_id": info.function_id,
        "kind": call.kind,
        "state": "running",
        "started_at": info.sent_at or time.time(),
        "inputs": call.submitted,
        "failed": call.failed,
    }


async def _ended(server: Server, scope: Scope) -> dict[str, Row]:
    found: dict[str, Row] = {}
    for number, one in enumerate(list(server.timelines.inputs)):
        if number % TURN == TURN - 1:
            await asyncio.sleep(0)
        if one.place != scope:
            continue
        row = found.get(one.call_id)
        if row is None:
            function = server.objects.find_function(one.function_id)
            row = found[one.call_id] = {
                "call_id": one.call_id,
                "app": function.app.name if function is not None else "",
                "function": one.function,
                "function_id": one.function_id,
                "kind": one.kind,
                "state": "ended",
                "started_at": one.sent_at or one.queued_at,
                "inputs": 0,
                "failed": 0,
            }
        row["inputs"] += 1
        row["failed"] += one.status != "ok"
        row["ended_at"] = one.done_at
    return found


def _kept(connection: Any, scope: Scope) -> Iterator[Row]:
    import sqlalchemy as sa

    from squall.server import tables

    calls, apps, functions, inputs = tables.calls.c, tables.apps.c, tables.functions.c, tables.inputs.c
    newest = (
        sa.select(tables.calls, apps.name, functions.tag)
        .join(tables.apps, apps.app_id == calls.app_id)
        .outerjoin(tables.functions, functions.function_id == calls.function_id)
        .where((calls.workspace == scope.workspace) & (apps.environment == scope.environment))
        .order_by(calls.created_at.desc())
        .limit(KEPT_LIMIT)
    )
    for call in connection.execute(newest).all():
        mine = inputs.call_id == call.call_id
        count = (connection.execute(sa.select(sa.func.max(inputs.idx)).where(mine)).scalar() or 0) + 1
        some = sa.select(inputs.status, inputs.finished_at).where(mine).limit(COUNT_LIMIT).subquery()
        by_status = sa.select(some.c.status, sa.func.count(), sa.func.max(some.c.finished_at)).group_by(some.c.status)
        found = {status: (number, at) for status, number, at in connection.execute(by_status)}
        failed = sum(number for status, (number, _) in found.items() if status not in ("ok", None))
        state = "cancelled" if call.cancelled_at is not None else "pending" if None in found else "ended"
        yield {
            "call_id": call.call_id,
            "app": call.name,
            "function": f"{call.tag or '?'}.{call.method}" if call.method else call.tag or "?",
            "function_id": call.function_id,
            "kind": "spawn",
            "state": state,
            "started_at": call.created_at,
            "inputs": count,
            "failed": failed if count <= COUNT_LIMIT else None,
            "ended_at": None if state == "pending" else max((at for _, at in found.values() if at), default=None),
        }
