"""Running apps on disk: what a server that was killed leaves to the next one.

A row holds all that an app was made from, sealed, as it names secret values. It is written before the first spawned
input of the app (both go the same way to the Store, in order) and is gone when the app has stopped. Must never hold an
app that was stopped on purpose. Tested in `tests/integration/test_restarts.py`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from squall._observe import Logger
from squall.exception import Error
from squall.protocol.messages import CreateApp, FunctionSpec, build, to_dict
from squall.server.database import Database
from squall.server.objects import AppRecord, Scope
from squall.server.sealing import Seal

log = Logger("server")


class KeptVariant(NamedTuple):
    tag: str
    """Of the function it was made from."""
    options: dict[str, Any]
    parameters: bytes


class KeptApp(NamedTuple):
    message: CreateApp
    scope: Scope
    created_at: float
    variants: list[KeptVariant]


class KeptApps:
    def __init__(self, database: Database, seal: Seal) -> None:
        self.database = database
        self.seal = seal

    def keep(self, app: AppRecord) -> None:
        """Write down what the app is made of now."""
        data = _packed(app)
        row = {
            "app_id": app.app_id,
            "workspace": app.scope.workspace,
            "environment": app.scope.environment,
            "created_at": app.created_at,
        }

        def work(connection: Any) -> None:
            from squall.server import tables

            table = tables.kept_apps
            connection.execute(table.delete().where(table.c.app_id == row["app_id"]))
            # Sealed here, as loading the cipher takes a while and this is the Store's thread.
            connection.execute(table.insert(), {**row, "box": self.seal.seal(data, _row_name(app.app_id))})

        self.database.write_soon(work)

    def forget(self, app_id: str) -> None:
        def work(connection: Any) -> None:
            from squall.server import tables

            connection.execute(tables.kept_apps.delete().where(tables.kept_apps.c.app_id == app_id))

        self.database.write_soon(work)

    def load(self) -> asyncio.Future[list[KeptApp]]:
        """The apps that were running when the last server ended."""

        def work(connection: Any) -> list[KeptApp]:
            from squall.server import tables

            table = tables.kept_apps
            rows = connection.execute(table.select().order_by(table.c.created_at))
            return [app for row in rows if (app := self._opened(row)) is not None]

        return self.database.read(work)

    def _opened(self, row: Any) -> KeptApp | None:
        try:
            data = json.loads(self.seal.open(row.box, _row_name(row.app_id)))
        except (Error, ValueError) as error:
            log.error("an app could not be taken up again", app=row.app_id, error=str(error))
            return None
        functions = [build(FunctionSpec, fields) for fields in data["functions"]]
        message = CreateApp(data["name"], functions, detach=data["detach"], app_id=row.app_id)
        variants = [KeptVariant(tag, options, base64.b64decode(text)) for tag, options, text in data["variants"]]
        return KeptApp(message, Scope(row.workspace, row.environment), row.created_at, variants)


def has_any(path: Path) -> bool:
    """Whether a database file holds anything to take up. Costs milliseconds, as it decides whether the Store, which
    takes most of a second to load, must be open before the first client is let in."""
    import sqlite3

    if not path.exists():
        return False
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path, timeout=2.0)) as connection:
        return connection.execute("SELECT 1 FROM kept_apps LIMIT 1").fetchone() is not None
    return True  # of an earlier release, or in use for a moment: let the Store say


def _row_name(app_id: str) -> str:
    return f"app:{app_id}"


def _packed(app: AppRecord) -> bytes:
    variants = [
        (variant.root.spec.tag, variant.options, base64.b64encode(variant.parameters).decode())
        for variant in app.variants.values()
        if variant.root is not None
    ]
    functions = [function.spec for function in app.functions.values()]
    data = {"name": app.name, "detach": app.detached, "functions": functions, "variants": variants}
    return json.dumps(data, default=to_dict).encode()
