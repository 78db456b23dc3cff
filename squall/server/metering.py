"""Container starts, stops and use, in the Store from the first day: what usage and cost are computed from.

One row a container, written when it stood and completed when it ended. A row without `stopped_at` after a crash is
closed by the next server at the time it starts, so an interval is never counted twice and never lost.
"""

from __future__ import annotations

import json
from typing import Any

from squall.server.database import Database


class Metering:
    def __init__(self, database: Database) -> None:
        self.database = database

    def close_stale(self, now_wall: float) -> None:
        """Containers of an earlier server cannot be running: close their intervals."""

        def work(connection: Any) -> None:
            from squall.server import tables

            table = tables.containers
            values = {"stopped_at": now_wall, "reason": "the server ended before the container's end was recorded"}
            connection.execute(table.update().where(table.c.stopped_at.is_(None)).values(values))

        self.database.write_soon(work)

    def started(self, row: dict[str, Any]) -> None:
        def work(connection: Any) -> None:
            from squall.server import tables

            connection.execute(tables.containers.insert(), row)

        self.database.write_soon(work)

    def stopped(self, container_id: str, row: dict[str, Any], timeline: dict[str, Any]) -> None:
        values = {**row, "timeline": json.dumps(timeline)}

        def work(connection: Any) -> None:
            from squall.server import tables

            table = tables.containers
            connection.execute(table.update().where(table.c.container_id == container_id).values(values))

        self.database.write_soon(work)
