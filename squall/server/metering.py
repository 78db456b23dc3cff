"""Container starts, stops and use, in the Store from the first day: what usage and cost are computed from.

One row a container. Rows are gathered for FLUSH_S and written together, so a container that lives shorter than that
costs one insert. What a crash of the server takes of them its agent tells the next server: which containers go on, and
which have ended since. Only what died with both is lost for that second, and a row without `stopped_at` is closed then,
so an interval is never counted twice. Tested in `tests/integration/test_metering.py` and
`tests/faults/test_metering_kills.py`.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from squall.server.database import Database

if TYPE_CHECKING:
    from squall.server.containers import ContainerRecord

FLUSH_S = 1.0
STALE = "the server ended before the container's end was recorded"
Row = dict[str, Any]


class Metering:
    def __init__(self, database: Database) -> None:
        self.database = database
        self._loop = asyncio.get_running_loop()
        self._new: dict[str, Row] = {}
        self._ended: dict[str, Row] = {}
        self._timer: asyncio.TimerHandle | None = None

    def close_stale(self, started_at: float, now_wall: float) -> None:
        """Containers of an earlier server than this one, started then, cannot be running: close their intervals."""

        def work(connection: Any) -> None:
            from squall.server import tables

            table = tables.containers
            values = {"stopped_at": now_wall, "reason": STALE}
            stale = table.c.stopped_at.is_(None) & (table.c.requested_at < started_at)
            connection.execute(table.update().where(stale).values(values))

        self.database.write_soon(work)

    def started(self, row: Row) -> None:
        """A container was asked for."""
        self._new[row["container_id"]] = {**row, **dict.fromkeys(ENDS)}
        self._flush_soon()

    def resumed(self, row: Row) -> None:
        """One of an earlier server's goes on: its interval was closed too early, or its start was not written."""
        self._put(row, {"stopped_at": None, "reason": None})

    def ended_unheard(self, row: Row, ends: Row) -> None:
        """One of an earlier server's has ended, and that server may not have written it down."""
        self._put(row, ends)

    def _put(self, row: Row, ends: Row) -> None:
        """Write an end over that which was guessed, and only over that."""

        def work(connection: Any) -> None:
            from squall.server import tables

            table = tables.containers
            mine = table.c.container_id == row["container_id"]
            is_open = table.c.stopped_at.is_(None) | (table.c.reason == STALE)
            changed = connection.execute(table.update().where(mine & is_open).values(ends)).rowcount
            if not changed and connection.execute(table.select().where(mine)).first() is None:
                connection.execute(table.insert(), {**row, **ends})

        self.database.write_soon(work)

    def stopped(self, container_id: str, row: Row, timeline: Row) -> None:
        """It ended; `row` has the columns in ENDS but for the timeline."""
        values = {**row, "timeline": json.dumps(timeline)}
        new = self._new.get(container_id)
        if new is not None:
            new.update(values)
        else:
            self._ended[container_id] = {**values, "which": container_id}
        self._flush_soon()

    async def app_of(self, container_id: str) -> str:
        """The app of a container of an earlier server; empty when there was none."""
        self.flush()

        def work(connection: Any) -> str:
            from squall.server import tables

            table = tables.containers
            row = connection.execute(table.select().where(table.c.container_id == container_id)).first()
            return str(row.app_id) if row is not None else ""

        return await self.database.read(work)

    def _flush_soon(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(FLUSH_S, self.flush)

    def flush(self) -> None:
        """Hand what was gathered to the Store."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        new, self._new = list(self._new.values()), {}
        ended, self._ended = list(self._ended.values()), {}

        def work(connection: Any) -> None:
            import sqlalchemy as sa

            from squall.server import tables

            table = tables.containers
            if new:
                connection.execute(table.insert(), new)
            if ended:
                columns: dict[str, Any] = {name: sa.bindparam(name) for name in ENDS}
                mine = table.c.container_id == sa.bindparam("which")
                connection.execute(table.update().where(mine).values(columns), ended)

        if new or ended:
            self.database.write_soon(work)


ENDS = ("started_at", "stopped_at", "exit_code", "reason", "cpu_seconds", "memory_peak_bytes", "timeline")


def meter_row(record: ContainerRecord) -> dict[str, Any]:
    spec = record.function.spec
    return {
        "container_id": record.container_id,
        "function_id": record.function.stable_id,
        "app_id": record.function.app.app_id,
        "node_id": record.node.node_id,
        "cpu": spec.cpu,
        "memory_mib": spec.memory_mib,
        "gpus": len(record.gpus),
        "requested_at": record.timeline.requested_at,
    }


def stop_row(record: ContainerRecord) -> dict[str, Any]:
    return {
        "started_at": record.timeline.stood_at or None,
        "stopped_at": record.timeline.exited_at,
        "exit_code": record.exit_code,
        "reason": record.stop_reason or record.reason,
        "cpu_seconds": record.usage.get("cpu_seconds"),
        "memory_peak_bytes": record.usage.get("memory_peak_bytes"),
    }
