"""The Store's rows of apps: their versions with sealed definitions, their functions, and how they are read back.

Every app that was run or deployed is here, and of the deployed ones all that is needed to start their functions again;
of the others that is `kept`'s. Definitions hold environment values, which may be secrets, so they are sealed; what
people may see of a function stands beside them in the clear. Functions of a connection, run in the Store's threads;
only `objects` and `deploys` call them. Nobody else writes `apps`, `versions` and `functions`. Tested in
`tests/integration/test_deploys.py`.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from squall._observe import Logger
from squall.exception import Error
from squall.protocol.messages import FunctionSpec
from squall.server.sealing import Seal
from squall.server.versions import KEPT_VERSIONS, Version, pack_specs, unpack_specs

if TYPE_CHECKING:
    from squall.server.objects import AppRecord, FunctionRecord

log = Logger("server")

Variant = tuple[str, dict[str, Any], bytes]
"""What it varies (by what callers name), its options and parameters."""
_FACTS = (
    "kind", "from_version", "tag", "strategy", "git_commit", "git_dirty", "user", "host", "tags", "changes",
    "pool_seed",
)  # fmt: skip


@dataclass
class KeptApp:
    """An app as the Store has it."""

    row: Any
    versions: list[Version]
    """Those whose definitions are kept, the oldest first."""
    labels: dict[str, str] = field(default_factory=dict)
    variants: list[Variant] = field(default_factory=list)
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Function by what callers name -> settings laid over its own."""


# ---- writing ----------------------------------------------------------------------------------------------------


def app_row(app: AppRecord) -> dict[str, Any]:
    return {
        "app_id": app.app_id,
        "name": app.name,
        "state": app.state,
        "detached": app.detached,
        "created_at": app.created_at,
        "workspace": app.scope.workspace,
        "environment": app.scope.environment,
        "deployed": app.deployed,
        "version": app.version,
        "labels": packed_labels(app.labels),
    }


def packed_labels(labels: dict[str, str]) -> str:
    return json.dumps(labels)


def put_app(connection: Any, row: dict[str, Any], specs: list[FunctionSpec]) -> None:
    """Write an app, perhaps over the row it has, and what people may see of its functions."""
    from squall.server import tables
    from squall.server.objects import stable_id_of

    app_id, table = row["app_id"], tables.apps
    values = {"stopped_at": None, "reason": None, **row}
    done = connection.execute(table.update().where(table.c.app_id == app_id).values(values))
    if not done.rowcount:
        connection.execute(table.insert(), row)
    functions = tables.functions
    named = {stable_id_of(app_id, spec.tag): spec for spec in specs}
    for start in range(0, len(named), 500):
        some = list(named)[start : start + 500]
        connection.execute(functions.delete().where(functions.c.function_id.in_(some)))
    rows = [
        {"function_id": function_id, "app_id": app_id, "tag": spec.tag, "spec": _shown(spec)}
        for function_id, spec in named.items()
    ]
    if rows:
        connection.execute(functions.insert(), rows)


def put_version(connection: Any, row: dict[str, Any], version: Version, seal: Seal) -> None:
    """Write a deployed app with its newest version, which settings laid over the one before do not outlive."""
    put_app(connection, row, version.specs)
    _put_version(connection, row["app_id"], version, seal)


def _put_version(connection: Any, app_id: str, version: Version, seal: Seal) -> None:
    from squall.server import tables

    table = tables.versions
    connection.execute(table.delete().where((table.c.app_id == app_id) & (table.c.version == version.number)))
    row = {
        "app_id": app_id,
        "version": version.number,
        "created_at": version.created_at,
        "facts": json.dumps({name: getattr(version, name) for name in _FACTS}),
        "box": seal.seal(pack_specs(version.specs), _seat(app_id, version.number)),
    }
    connection.execute(table.insert(), row)
    too_old = (table.c.app_id == app_id) & (table.c.version <= version.number - KEPT_VERSIONS)
    connection.execute(table.update().where(too_old).values({"box": None}))


def variant_row(variant: FunctionRecord) -> dict[str, Any]:
    """As `put_variant` takes it: the box not sealed yet."""
    assert variant.root is not None
    packed = base64.b64encode(variant.parameters).decode()
    return {
        "function_id": variant.stable_id,
        "app_id": variant.app.app_id,
        "tag": variant.spec.tag,
        "spec": _shown(variant.spec),
        "root_id": variant.root.stable_id,
        "box": json.dumps({"options": variant.options, "parameters": packed}).encode(),
    }


def put_variant(connection: Any, row: dict[str, Any], seal: Seal | None) -> None:
    """Without a seal only for history."""
    from squall.server import tables

    table = tables.functions
    connection.execute(table.delete().where(table.c.function_id == row["function_id"]))
    box = seal.seal(row["box"], row["function_id"]) if seal is not None else None
    connection.execute(table.insert(), {**row, "box": box})


def set_stopped(connection: Any, app_id: str, now_wall: float, reason: str) -> None:
    from squall.server import tables

    table = tables.apps
    values = {"state": "stopped", "stopped_at": now_wall, "reason": reason}
    connection.execute(table.update().where(table.c.app_id == app_id).values(values))


def rename_environment(connection: Any, workspace: str, name: str, new_name: str) -> None:
    """Apps that have stopped go with their environment. What one of the new name left when deleted is history."""
    from squall.server import tables

    table = tables.apps
    mine = table.c.workspace == workspace
    connection.execute(table.update().where(mine & (table.c.environment == new_name)).values(deployed=False))
    connection.execute(table.update().where(mine & (table.c.environment == name)).values(environment=new_name))


def set_labels(connection: Any, app_id: str, labels: dict[str, str]) -> None:
    from squall.server import tables

    table = tables.apps
    connection.execute(table.update().where(table.c.app_id == app_id).values({"labels": packed_labels(labels)}))


def set_override(connection: Any, function_id: str, override: dict[str, Any]) -> None:
    from squall.server import tables

    table = tables.functions
    said = json.dumps(override) if override else None
    connection.execute(table.update().where(table.c.function_id == function_id).values({"override": said}))


# ---- reading ----------------------------------------------------------------------------------------------------


def newest(connection: Any, limit: int) -> list[Any]:
    from squall.server import tables

    table = tables.apps
    return list(connection.execute(table.select().order_by(table.c.created_at.desc()).limit(limit)))


def deployed(connection: Any, seal: Seal) -> list[KeptApp]:
    """All deployed apps, also those that were stopped: their names can be deployed again, and their history told. One
    that does not open is left out, and logged: the others are not to suffer for it."""
    from squall.server import tables

    table, found = tables.apps, []
    rows = connection.execute(table.select().where(table.c.deployed).order_by(table.c.created_at))
    for row in rows.all():
        try:
            found.append(_kept(connection, row, seal))
        except (Error, ValueError) as error:
            log.error("a deployed app could not be taken up again", app=row.name, error=str(error))
    return found


def _kept(connection: Any, row: Any, seal: Seal) -> KeptApp:
    from squall.server import tables

    table, functions = tables.versions, tables.functions
    newest_first = table.select().where((table.c.app_id == row.app_id) & table.c.box.is_not(None))
    newest_first = newest_first.order_by(table.c.version.desc()).limit(KEPT_VERSIONS)
    versions = [_version(found, seal) for found in connection.execute(newest_first)]
    kept = KeptApp(row, versions[::-1], json.loads(row.labels or "{}"))
    extra = functions.c.box.is_not(None) | functions.c.override.is_not(None)
    for found in connection.execute(functions.select().where((functions.c.app_id == row.app_id) & extra)):
        if found.override:
            kept.overrides[found.function_id] = json.loads(found.override)
        if found.box is not None and found.root_id:
            said = json.loads(seal.open(found.box, found.function_id))
            kept.variants.append((found.root_id, said["options"], base64.b64decode(said["parameters"])))
    return kept


def history(connection: Any, app_id: str, limit: int) -> list[Version]:
    """All versions there ever were, the newest first, without their definitions."""
    from squall.server import tables

    table = tables.versions
    query = table.select().where(table.c.app_id == app_id).order_by(table.c.version.desc()).limit(limit)
    return [_version(row, None) for row in connection.execute(query)]


def _version(row: Any, seal: Seal | None) -> Version:
    version = Version(row.version, row.created_at, [])
    for name, value in json.loads(row.facts).items():
        if name in _FACTS:
            setattr(version, name, value)
    version.is_kept = row.box is not None
    if seal is not None and version.is_kept:
        version.specs = unpack_specs(seal.open(row.box, _seat(row.app_id, row.version)))
    return version


def _seat(app_id: str, number: int) -> str:
    return f"version:{app_id}:{number}"


def _shown(spec: FunctionSpec) -> str:
    """What people may see of a spec: of its environment the names alone."""
    fields = dataclasses.asdict(spec)
    fields["env"] = sorted(spec.env)
    return json.dumps(fields)
