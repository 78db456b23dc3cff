"""Secrets that the server keeps: named values that reach only the containers of functions which name them.

They are sealed on disk and in memory, opened for one container at the moment it is loaded, and go to nobody else: no
message returns them, no log names more than their keys. A container that runs keeps what it got; the next one gets what
is kept then. A box is sealed for its very place (workspace, environment, name), so that none can be moved to another.
Must never put a value into an error. Tested in `tests/unit/test_vault.py` and `tests/integration/test_secrets.py`.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from squall.exception import ConflictError, Error, InvalidError, NotFoundError, ResourceExhaustedError
from squall.protocol.messages import FunctionSpec
from squall.server.database import Database
from squall.server.objects import Scope
from squall.server.sealing import Seal

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}")
KEY_LIMIT = 1000
SECRET_LIMIT = 1000
"""Of one environment."""
VALUE_LIMIT = 32_768
SIZE_LIMIT_BYTES = 1 << 20
NAMED_LIMIT = 100
"""Secrets of one function."""
RESERVED_PREFIX = "SQUALL_"


@dataclass
class Kept:
    keys: list[str]
    box: bytes
    created_at: float
    updated_at: float


class Vault:
    def __init__(self, database: Database, seal: Seal) -> None:
        self.database = database
        self.seal = seal
        self.secrets: dict[tuple[Scope, str], Kept] = {}
        self.changed: Callable[[Scope, str], None] = lambda scope, name: None
        """Set by `main`: a secret has other values."""
        self.is_loaded = False
        self._loading: asyncio.Future[Any] | None = None

    async def ready(self) -> None:
        """Read what the Store has, once, whoever asks first."""
        if self.is_loaded:
            return
        if self._loading is None or (self._loading.done() and self._loading.exception() is not None):
            self._loading = self.database.read(_read_all)
        rows = await asyncio.shield(self._loading)
        if not self.is_loaded:
            for row in rows:
                place = (Scope(row.workspace, row.environment), row.name)
                self.secrets[place] = Kept(json.loads(row.keys), row.box, row.created_at, row.updated_at)
            self.is_loaded = True

    # -- keeping

    async def put(self, scope: Scope, name: str, values: object, now: float, *, replace: bool) -> None:
        """Keep values under a name. Raises ConflictError where it is taken, unless to `replace`."""
        await self.ready()
        checked = check_values(name, values)
        before = self.secrets.get((scope, name))
        if before is not None and not replace:
            raise ConflictError(f"secret `{name}` exists already", hint="`--force` replaces its values")
        if before is None and sum(1 for place in self.secrets if place[0] == scope) >= SECRET_LIMIT:
            raise ResourceExhaustedError(f"environment `{scope.environment}` has {SECRET_LIMIT} secrets")
        # In a thread: the first one makes the key, and waits until that is on disk.
        box = await asyncio.get_running_loop().run_in_executor(None, self._seal, scope, name, checked)
        kept = Kept(sorted(checked), box, before.created_at if before is not None else now, now)
        await self.database.write(_put(scope, name, kept))
        self.secrets[scope, name] = kept
        self.changed(scope, name)

    async def delete(self, scope: Scope, name: str) -> None:
        await self.ready()
        self._kept(scope, name)
        await self.database.write(_delete(scope, name))
        self.secrets.pop((scope, name), None)

    async def rename_environment(self, scope: Scope, new_name: str, also: Callable[[Any], None]) -> None:
        """Rename an environment in the Store, its secrets with it: they are sealed for their place, so anew. `also` is
        what of others goes with it, in the same transaction."""
        await self.ready()
        target = Scope(scope.workspace, new_name)
        moved = {name: kept for (place, name), kept in self.secrets.items() if place == scope}
        resealed = {
            name: Kept(kept.keys, self._seal(target, name, self._open(scope, name)), kept.created_at, kept.updated_at)
            for name, kept in moved.items()
        }
        await self.database.write(_rename_environment(scope, new_name, resealed, also))
        for name, kept in resealed.items():
            del self.secrets[scope, name]
            self.secrets[target, name] = kept

    async def delete_environment(self, scope: Scope) -> None:
        """Delete an environment in the Store, its secrets with it."""
        await self.ready()
        await self.database.write(_delete_environment(scope))
        self.forget(lambda place: place == scope)

    def forget(self, is_gone: Any) -> None:
        """Drop from memory what the Store has no more."""
        self.secrets = {place: kept for place, kept in self.secrets.items() if not is_gone(place[0])}

    def rows(self, scope: Scope) -> list[dict[str, Any]]:
        """Names, keys and dates; never a value."""
        return [
            {"name": name, "keys": kept.keys, "created_at": kept.created_at, "updated_at": kept.updated_at}
            for (place, name), kept in sorted(self.secrets.items())
            if place == scope
        ]

    # -- giving

    def check(self, scope: Scope, spec: FunctionSpec) -> None:
        """Raise NotFoundError for a secret that the function names and that is not here, or lacks a key."""
        if len(spec.secrets) > NAMED_LIMIT:
            raise InvalidError(f"function `{spec.tag}` names {len(spec.secrets)} secrets, the limit is {NAMED_LIMIT}")
        for ref in spec.secrets:
            place, name = _place(scope, ref)
            try:
                kept = self._kept(place, name)
            except NotFoundError as error:
                raise NotFoundError(f"function `{spec.tag}`: {error.message}", hint=error.hint) from None
            missing = sorted(set(spec.secret_keys.get(ref, ())) - set(kept.keys))
            if missing:
                raise NotFoundError(
                    f"function `{spec.tag}`: secret `{ref}` has no key {', '.join(f'`{key}`' for key in missing[:10])}",
                    hint=f"`squall secret create {name} --force` replaces what it holds",
                )

    def problem(self, scope: Scope, spec: FunctionSpec) -> Error | None:
        """What keeps a container of the function from being started, as far as its secrets go."""
        try:
            self.check(scope, spec)
        except Error as error:
            return error
        return None

    def values(self, scope: Scope, refs: Iterable[str]) -> dict[str, str]:
        """What a container's environment gets of the secrets it names; of a key in several, the last one's."""
        merged: dict[str, str] = {}
        for ref in refs:
            merged.update(self._open(*_place(scope, ref)))
        return merged

    def _kept(self, scope: Scope, name: str) -> Kept:
        kept = self.secrets.get((scope, name))
        if kept is None:
            raise NotFoundError(
                f"no secret `{name[:80]}` in environment `{scope.environment}`",
                hint=f"`squall secret create {name[:80]} KEY=VALUE` makes it",
            )
        return kept

    def _seal(self, scope: Scope, name: str, values: Mapping[str, str]) -> bytes:
        return self.seal.seal(json.dumps(dict(values)).encode(), _row(scope, name))

    def _open(self, scope: Scope, name: str) -> dict[str, str]:
        values: dict[str, str] = json.loads(self.seal.open(self._kept(scope, name).box, _row(scope, name)))
        return values


def check_values(name: str, values: object) -> dict[str, str]:
    """Values as the SDK would take them; here because a client is not trusted. Raises InvalidError."""
    if not NAME.fullmatch(name):
        raise InvalidError(
            f"secret name `{name[:80]}` is not valid",
            hint="use 1 to 64 letters, digits, `-`, `_` and `.`, beginning with a letter or digit",
        )
    if not isinstance(values, dict) or not values or len(values) > KEY_LIMIT:
        raise InvalidError(f"secret `{name}` needs 1 to {KEY_LIMIT} values, each with a key")
    size = 0
    for key, value in values.items():
        if not KEY.fullmatch(key) or key.startswith(RESERVED_PREFIX):
            raise InvalidError(
                f"secret `{name}`: the key `{key[:80]}` cannot name an environment variable of yours",
                hint=f"letters, digits and `_`, not beginning with a digit or `{RESERVED_PREFIX}`",
            )
        if not isinstance(value, str) or len(value) > VALUE_LIMIT or "\0" in value:
            raise InvalidError(f"secret `{name}`: the value of `{key}` is not text of up to {VALUE_LIMIT} characters")
        size += len(key) + len(value.encode("utf-8", "surrogatepass"))
    if size > SIZE_LIMIT_BYTES:
        raise InvalidError(f"secret `{name}` takes {size:,} bytes, the limit is {SIZE_LIMIT_BYTES:,}")
    return values


def _place(scope: Scope, ref: str) -> tuple[Scope, str]:
    """`NAME`, or `ENVIRONMENT/NAME` of the same workspace: nobody names another workspace."""
    environment, slash, name = ref.partition("/")
    return (Scope(scope.workspace, environment), name) if slash else (scope, ref)


def _row(scope: Scope, name: str) -> str:
    return f"secret:{scope.workspace}/{scope.environment}/{name}"


# ---- what runs in the Store's thread ------------------------------------------------------------------------------


def _read_all(connection: Any) -> list[Any]:
    from squall.server import tables

    return list(connection.execute(tables.secrets.select()))


def _of(table: Any, scope: Scope) -> Any:
    return (table.c.workspace == scope.workspace) & (table.c.environment == scope.environment)


def _put(scope: Scope, name: str, kept: Kept) -> Any:
    def work(connection: Any) -> None:
        from squall.server import tables

        table = tables.secrets
        connection.execute(table.delete().where(_of(table, scope) & (table.c.name == name)))
        connection.execute(table.insert(), _values(scope, name, kept))

    return work


def _values(scope: Scope, name: str, kept: Kept) -> dict[str, Any]:
    row = {"workspace": scope.workspace, "environment": scope.environment, "name": name, "box": kept.box}
    times = {"created_at": kept.created_at, "updated_at": kept.updated_at}
    return {**row, "keys": json.dumps(kept.keys), **times}


def _delete(scope: Scope, name: str) -> Any:
    def work(connection: Any) -> None:
        from squall.server import tables

        table = tables.secrets
        connection.execute(table.delete().where(_of(table, scope) & (table.c.name == name)))

    return work


def _rename_environment(scope: Scope, new_name: str, resealed: dict[str, Kept], also: Callable[[Any], None]) -> Any:
    target = Scope(scope.workspace, new_name)

    def work(connection: Any) -> None:
        from squall.server import tables

        places, kept_secrets = tables.environments, tables.secrets
        mine = (places.c.workspace == scope.workspace) & (places.c.name == scope.environment)
        connection.execute(places.update().where(mine).values(name=new_name))
        connection.execute(kept_secrets.delete().where(_of(kept_secrets, scope)))
        for name, kept in resealed.items():
            connection.execute(kept_secrets.insert(), _values(target, name, kept))
        also(connection)

    return work


def _delete_environment(scope: Scope) -> Any:
    def work(connection: Any) -> None:
        from squall.server import tables

        places, kept_secrets = tables.environments, tables.secrets
        mine = (places.c.workspace == scope.workspace) & (places.c.name == scope.environment)
        connection.execute(kept_secrets.delete().where(_of(kept_secrets, scope)))
        connection.execute(places.delete().where(mine))

    return work
