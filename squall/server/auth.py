"""Who may come in: workspaces, their environments, and the tokens of people and programs elsewhere.

A token is an id, which is no secret, and 32 random bytes, of which only the SHA-256 is kept: they are shown once, when
it is made. All of it is few and asked for at every connection, so it is held in memory, read once and written through:
memory changes when the row is on disk. One server per state directory makes that sound. `main` always exists as a
workspace and, in each workspace, as an environment. Must never tell a wrong secret from an unknown id, in words or in
time. Moments are arguments: expiry is judged by the server's clock alone. Tested in `tests/unit/test_auth.py`.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from squall.exception import AuthError, ConflictError, InvalidError, NotFoundError, ResourceExhaustedError
from squall.protocol.messages import new_id
from squall.server.database import Database
from squall.server.objects import Scope

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
WORKSPACE = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
TOKEN_ID = re.compile(r"tk-[0-9a-f]{1,40}")
MAIN = "main"
WORKSPACE_LIMIT = 1000
ENVIRONMENT_LIMIT = 1500
TOKEN_LIMIT = 10_000
LIFETIME_LIMIT = 10 * 366 * 86400.0
USED_EVERY = 60.0
"""Seconds between two notes that a token was used."""
NOBODY = "0" * 64
"""What an unknown id is compared with: no SHA-256 that anybody knows the bytes for."""
HINT = "`squall token new` on the server makes a token, `squall token set` keeps it here"


@dataclass
class Token:
    token_id: str
    digest: str
    name: str
    workspace: str
    is_admin: bool
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None
    used_at: float | None = None
    old_digest: str | None = None
    """Of the secret before the last rotation, which counts until `old_until`."""
    old_until: float | None = None

    def has_ended(self, now: float) -> str:
        """Why it counts no more at `now`, or nothing."""
        if self.revoked_at is not None:
            return "was revoked"
        if self.expires_at is not None and now >= self.expires_at:
            return "has expired"
        return ""


def digest_of(secret: str) -> str:
    # No slow hash: the secret is 256 random bits, which nobody finds by trying.
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


class Auth:
    def __init__(self, database: Database) -> None:
        self.database = database
        self.tokens: dict[str, Token] = {}
        self.workspaces: dict[str, float] = {MAIN: 0.0}
        """Name -> when it was made."""
        self.environments: dict[str, dict[str, float]] = {MAIN: {MAIN: 0.0}}
        self.is_loaded = False
        self.on_ended: Callable[[Token], None] = lambda token: None
        """Set by `access`: closes the connections of a token that counts no more."""
        self._loading: asyncio.Future[Any] | None = None

    async def ready(self) -> None:
        """Read what the Store has, once, whoever asks first."""
        if self.is_loaded:
            return
        if self._loading is None or (self._loading.done() and self._loading.exception() is not None):
            self._loading = self.database.read(_read_all)
        found = await asyncio.shield(self._loading)
        if not self.is_loaded:
            self._take(*found)

    def _take(self, workspaces: list[Any], environments: list[Any], tokens: list[Any]) -> None:
        self.workspaces.update({row.name: row.created_at for row in workspaces})
        self.environments.update({name: {MAIN: 0.0} for name in self.workspaces})
        for row in environments:
            self.environments.setdefault(row.workspace, {MAIN: 0.0})[row.name] = row.created_at
        self.tokens = {row.token_id: Token(**row._mapping) for row in tokens}
        self.is_loaded = True

    # -- coming in

    def verify(self, credentials: str, now: float) -> Token:
        """The token of `ID:SECRET`. Raises AuthError, after the same work whatever is wrong."""
        token_id, _, secret = credentials.partition(":")
        token = self.tokens.get(token_id)
        given = digest_of(secret)
        is_right = hmac.compare_digest(given, token.digest if token is not None else NOBODY)
        was_right = hmac.compare_digest(given, (token.old_digest if token is not None else None) or NOBODY)
        if not credentials:
            raise AuthError("this server takes nobody without a token", hint=HINT)
        if token is None or not (is_right or (was_right and now < (token.old_until or 0.0))):
            raise AuthError(f"{_named(token_id)} is not one of this server, or its secret is wrong", hint=HINT)
        if ended := token.has_ended(now):
            raise AuthError(f"the token `{token_id}` {ended}", hint=HINT)
        self._note_use(token, now)
        return token

    def _note_use(self, token: Token, now: float) -> None:
        if token.used_at is None or now - token.used_at >= USED_EVERY:
            token.used_at = now
            self._update_soon(token.token_id, {"used_at": now})

    def scope(self, workspace: str, environment: str) -> Scope:
        """The place of that name. Raises NotFoundError where there is none."""
        workspace, environment = workspace or MAIN, environment or MAIN
        if workspace not in self.workspaces:
            raise NotFoundError(f"no workspace `{workspace[:80]}`", hint=_known("workspaces", self.workspaces))
        known = self.environments[workspace]
        if environment not in known:
            raise NotFoundError(
                f"no environment `{environment[:80]}` in workspace `{workspace}`",
                hint=f"`squall environment create {environment[:80]}` makes it; {_known('environments', known)}",
            )
        return Scope(workspace, environment)

    # -- tokens

    async def create_token(
        self, workspace: str, name: str, now: float, *, lifetime: float = 0.0, is_admin: bool = False
    ) -> tuple[Token, str]:
        """A new token and its secret, which is kept nowhere."""
        await self.ready()
        self.scope(workspace, MAIN)
        if len(name) > 64 or not (name.isprintable() or not name):
            raise InvalidError(f"token name `{name[:80]!r}` is not valid", hint="use up to 64 printable characters")
        if not 0 <= lifetime <= LIFETIME_LIMIT:
            raise InvalidError(f"a lifetime of {lifetime:g} s is not allowed", hint="0 for ever, or up to ten years")
        if len(self.tokens) >= TOKEN_LIMIT:
            raise ResourceExhaustedError(f"there are {TOKEN_LIMIT} tokens", hint="`squall token revoke` those unused")
        secret = _new_secret()
        expires_at = now + lifetime if lifetime else None
        token = Token(new_id("tk"), digest_of(secret), name, workspace or MAIN, is_admin, now, expires_at)
        await self.database.write(_insert("tokens", asdict(token)))
        self.tokens[token.token_id] = token
        return token, secret

    async def revoke_token(self, token_id: str, now: float) -> Token:
        await self.ready()
        token = self.token(token_id)
        if token.revoked_at is None:
            await self.database.write(_update_token(token_id, {"revoked_at": now}))
            token.revoked_at = now
        self.on_ended(token)
        return token

    async def rotate_token(self, token_id: str, now: float, grace: float) -> tuple[Token, str]:
        """Give a token another secret; the one before counts `grace` seconds longer."""
        await self.ready()
        token = self.token(token_id)
        if ended := token.has_ended(now):
            raise ConflictError(f"the token `{token_id}` {ended}", hint="`squall token new` makes another")
        if not 0 <= grace <= LIFETIME_LIMIT:
            raise InvalidError(f"a grace of {grace:g} s is not allowed")
        secret = _new_secret()
        old = (token.digest, now + grace) if grace else (None, None)
        values = {"digest": digest_of(secret), "old_digest": old[0], "old_until": old[1]}
        await self.database.write(_update_token(token_id, values))
        token.digest, (token.old_digest, token.old_until) = digest_of(secret), old
        if not grace:
            self.on_ended(token)
        return token, secret

    def token(self, token_id: str) -> Token:
        """By id, or by the name that exactly one has."""
        if token_id in self.tokens:
            return self.tokens[token_id]
        named = [token for token in self.tokens.values() if token.name == token_id and token.revoked_at is None]
        if len(named) == 1:
            return named[0]
        many = f"{len(named)} tokens are named" if named else "no token"
        raise NotFoundError(f"{many} `{token_id[:80]}`", hint="`squall token list` shows their ids")

    # -- workspaces and environments

    async def create_workspace(self, name: str, now: float) -> None:
        await self.ready()
        if not WORKSPACE.fullmatch(name):
            raise InvalidError(
                f"workspace name `{name[:80]}` is not valid", hint="use 1 to 32 lower-case letters, digits and `-`"
            )
        if name in self.workspaces:
            raise ConflictError(f"workspace `{name}` exists already")
        if len(self.workspaces) >= WORKSPACE_LIMIT:
            raise ResourceExhaustedError(f"there are {WORKSPACE_LIMIT} workspaces")
        await self.database.write(_insert("workspaces", {"name": name, "created_at": now}))
        self.workspaces[name] = now
        self.environments[name] = {MAIN: now}

    async def delete_workspace(self, name: str, now: float) -> None:
        """With its environments and tokens; its secrets are the vault's to delete first."""
        await self.ready()
        self.scope(name, MAIN)
        if name == MAIN:
            raise InvalidError("the workspace `main` cannot be deleted")
        for token in [token for token in self.tokens.values() if token.workspace == name]:
            await self.revoke_token(token.token_id, now)
        await self.database.write(_delete_workspace(name))
        del self.workspaces[name], self.environments[name]
        self.tokens = {token_id: token for token_id, token in self.tokens.items() if token.workspace != name}

    async def create_environment(self, workspace: str, name: str, now: float) -> None:
        await self.ready()
        known = self.environments[workspace]
        _check_environment_name(name)
        if name in known:
            raise ConflictError(f"environment `{name}` exists already")
        if len(known) >= ENVIRONMENT_LIMIT:
            raise ResourceExhaustedError(f"workspace `{workspace}` has {ENVIRONMENT_LIMIT} environments")
        row = {"workspace": workspace, "name": name, "created_at": now}
        await self.database.write(_insert("environments", row))
        known[name] = now

    def check_rename(self, workspace: str, name: str, new_name: str) -> None:
        self.scope(workspace, name)
        _check_environment_name(new_name)
        if MAIN in (name, new_name):
            raise InvalidError("the environment `main` keeps its name")
        if new_name in self.environments[workspace]:
            raise ConflictError(f"environment `{new_name}` exists already")

    def renamed_environment(self, workspace: str, name: str, new_name: str) -> None:
        """The vault has renamed it in the Store, in one transaction with its secrets."""
        known = self.environments[workspace]
        known[new_name] = known.pop(name)

    def check_delete(self, workspace: str, name: str) -> None:
        self.scope(workspace, name)
        if name == MAIN:
            raise InvalidError("the environment `main` cannot be deleted")

    def deleted_environment(self, workspace: str, name: str) -> None:
        """The vault has deleted it in the Store, with its secrets."""
        self.environments[workspace].pop(name, None)

    # -- lists, without digests

    def token_rows(self, workspace: str, now: float) -> list[dict[str, Any]]:
        """Of one workspace, or of all when it is empty."""
        hidden = ("digest", "old_digest", "old_until")
        return [
            {**{key: value for key, value in asdict(token).items() if key not in hidden}, "state": _state(token, now)}
            for token in self.tokens.values()
            if workspace in ("", token.workspace)
        ]

    def workspace_rows(self) -> list[dict[str, Any]]:
        return [
            {"name": name, "created_at": at or None, "environments": len(self.environments[name])}
            for name, at in self.workspaces.items()
        ]

    def environment_rows(self, workspace: str) -> list[dict[str, Any]]:
        return [{"name": name, "created_at": at or None} for name, at in self.environments[workspace].items()]

    def _update_soon(self, token_id: str, values: dict[str, Any]) -> None:
        self.database.write_soon(_update_token(token_id, values))


def _named(token_id: str) -> str:
    """What was shown, as it may be said and logged: not a secret that came without its id."""
    return f"the token `{token_id}`" if TOKEN_ID.fullmatch(token_id) else "the token that was shown"


def _new_secret() -> str:
    return f"ts-{secrets.token_urlsafe(32)}"


def _state(token: Token, now: float) -> str:
    return {"": "valid", "was revoked": "revoked", "has expired": "expired"}[token.has_ended(now)]


def _known(what: str, names: Any) -> str:
    return f"{what}: {', '.join(f'`{name}`' for name in sorted(names)[:10])}"


def _check_environment_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise InvalidError(
            f"environment name `{name[:80]}` is not valid",
            hint="use 1 to 64 letters, digits, `-`, `_` and `.`, beginning with a letter or digit",
        )


# ---- what runs in the Store's thread ------------------------------------------------------------------------------


def _read_all(connection: Any) -> tuple[list[Any], list[Any], list[Any]]:
    from squall.server import tables

    workspaces, environments, tokens = (
        list(connection.execute(table.select().order_by(table.c.created_at)))
        for table in (tables.workspaces, tables.environments, tables.tokens)
    )
    return workspaces, environments, tokens


def _insert(table: str, row: dict[str, Any]) -> Callable[[Any], None]:
    def work(connection: Any) -> None:
        from squall.server import tables

        connection.execute(tables.metadata.tables[table].insert(), row)

    return work


def _update_token(token_id: str, values: dict[str, Any]) -> Callable[[Any], None]:
    def work(connection: Any) -> None:
        from squall.server import tables

        table = tables.tokens
        connection.execute(table.update().where(table.c.token_id == token_id).values(values))

    return work


def _delete_workspace(name: str) -> Callable[[Any], None]:
    def work(connection: Any) -> None:
        from squall.server import tables

        connection.execute(tables.tokens.delete().where(tables.tokens.c.workspace == name))
        connection.execute(tables.secrets.delete().where(tables.secrets.c.workspace == name))
        connection.execute(tables.environments.delete().where(tables.environments.c.workspace == name))
        connection.execute(tables.workspaces.delete().where(tables.workspaces.c.name == name))

    return work
