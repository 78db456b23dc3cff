"""What goes with an environment that gets another name, in either database."""

from __future__ import annotations

import time
from typing import Any

import pytest

from squall.exception import NotFoundError
from squall.protocol.messages import FunctionSpec, new_id
from squall.server import app_rows
from squall.server.auth import Auth
from squall.server.database import Database
from squall.server.objects import AppRecord, Objects, Scope
from squall.server.sealing import Seal
from squall.server.vault import Vault
from squall.server.versions import Version
from tests.stores import Place

DEV, STAGING = Scope("main", "dev"), Scope("main", "staging")


class Rooms:
    """The parts of a server that know environments."""

    def __init__(self, place: Place, database: Database) -> None:
        seal = Seal(place.directory / "seal.key")
        self.database, self.seal = database, seal
        self.objects, self.vault, self.auth = Objects(database, seal), Vault(database, seal), Auth(database)

    async def ready(self) -> Rooms:
        await self.auth.ready()
        await self.vault.ready()
        kept = await self.database.read(lambda connection: app_rows.deployed(connection, self.seal))
        self.objects.restored(kept)
        return self

    async def stopped_app(self, scope: Scope) -> AppRecord:
        """One that was deployed, and stopped."""
        app = AppRecord(new_id("ap"), "web", False, time.time(), None, scope=scope, deployed=True, version=1)
        version = Version(1, 1.0, [FunctionSpec("home", module="web", qualname="home")], tags=["home"])
        row = {**app_rows.app_row(app), "state": "running"}
        await self.database.write(lambda connection: app_rows.put_version(connection, row, version, self.seal))
        self.objects.apps[app.app_id] = app
        self.objects.keep(app, version)
        self.objects.set_stopped(app, time.time())
        return app

    async def rename(self, scope: Scope, new_name: str) -> None:
        await self.vault.rename_environment(scope, new_name, self.objects.renaming(scope, new_name))
        self.objects.renamed_environment(scope, new_name)


async def rooms(place: Place, database: Database) -> Rooms:
    return await Rooms(place, database).ready()


def test_stopped_apps_go_with_their_environment(place: Place) -> None:
    async def before(database: Database) -> str:
        here = await rooms(place, database)
        await here.auth.create_environment("main", "dev", 1.0)
        app, other = await here.stopped_app(DEV), await here.stopped_app(Scope())
        await here.rename(DEV, "staging")
        assert here.objects.deployed_or_raise("web", STAGING) is app
        assert here.objects.deployed_or_raise("web", Scope()) is other
        with pytest.raises(NotFoundError):
            here.objects.deployed_or_raise("web", DEV)
        return app.app_id

    async def after(database: Database) -> Any:
        here = await rooms(place, database)
        app = here.objects.deployed_or_raise("web", STAGING)
        assert list(app.versions) == [1], "it can be gone back to"
        assert here.objects.deployed("web", DEV) is None
        return app.app_id

    assert place.run(before) == place.run(after)


def test_what_a_deleted_environment_of_that_name_has_left_is_history(place: Place) -> None:
    async def before(database: Database) -> str:
        here = await rooms(place, database)
        await here.auth.create_environment("main", "staging", 1.0)
        left = await here.stopped_app(STAGING)
        await here.vault.delete_environment(STAGING)
        await here.auth.create_environment("main", "dev", 1.0)
        mine = await here.stopped_app(DEV)
        await here.rename(DEV, "staging")
        assert here.objects.deployed("web", STAGING) is mine is not left
        return mine.app_id

    async def after(database: Database) -> str:
        found = (await rooms(place, database)).objects.deployed_or_raise("web", STAGING)
        return found.app_id

    assert place.run(before) == place.run(after)
