"""Tokens, workspaces, environments: who comes in, for how long, and what of it is kept."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from squall.exception import AuthError, ConflictError, InvalidError, NotFoundError
from squall.server.auth import Auth, digest_of
from squall.server.database import Database
from squall.server.objects import Scope

T = TypeVar("T")
NOW = 1_000_000.0


def run(directory: Path, body: Callable[[Auth], Awaitable[T]]) -> T:
    """What `body` gives with an Auth over the Store in a directory, as one server's life."""

    async def main() -> T:
        database = Database.in_directory(directory, asyncio.get_running_loop())
        try:
            auth = Auth(database)
            await auth.ready()
            return await body(auth)
        finally:
            await database.close()

    return asyncio.run(main())


def test_a_token_lets_in_until_it_is_revoked_also_in_a_later_server(tmp_path: Path) -> None:
    async def first(auth: Auth) -> tuple[str, str]:
        token, secret = await auth.create_token("main", "laptop", NOW)
        assert auth.verify(f"{token.token_id}:{secret}", NOW) is token
        return token.token_id, secret

    token_id, secret = run(tmp_path, first)

    async def second(auth: Auth) -> None:
        assert auth.verify(f"{token_id}:{secret}", NOW).name == "laptop"
        await auth.revoke_token(token_id, NOW)
        with pytest.raises(AuthError, match="was revoked"):
            auth.verify(f"{token_id}:{secret}", NOW)

    run(tmp_path, second)

    async def third(auth: Auth) -> None:
        with pytest.raises(AuthError, match="was revoked"):
            auth.verify(f"{token_id}:{secret}", NOW)

    run(tmp_path, third)


def test_of_a_secret_only_its_digest_is_on_disk(tmp_path: Path) -> None:
    async def body(auth: Auth) -> str:
        return (await auth.create_token("main", "", NOW))[1]

    secret = run(tmp_path, body)
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert secret.encode() not in kept
    assert digest_of(secret).encode() in kept


def test_unknown_ids_and_wrong_secrets_are_told_alike(tmp_path: Path) -> None:
    async def body(auth: Auth) -> None:
        token, secret = await auth.create_token("main", "", NOW)
        said = set()
        for credentials in (
            f"{token.token_id}:wrong",
            f"tk-0000000000000000:{secret}",
            f"{token.token_id}:",
            "::",
            ":",
            secret,
        ):
            with pytest.raises(AuthError) as caught:
                auth.verify(credentials, NOW)
            assert caught.value.message.endswith(" is not one of this server, or its secret is wrong")
            assert secret not in caught.value.message
            said.add(caught.value.message.replace(f"`{credentials.partition(':')[0]}`", "that was shown"))
        assert said == {"the token that was shown is not one of this server, or its secret is wrong"}
        with pytest.raises(AuthError, match="without a token"):
            auth.verify("", NOW)

    run(tmp_path, body)


def test_the_same_work_is_done_for_an_unknown_id_as_for_a_wrong_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No test asserts a time; that each path hashes once and compares twice is what makes them alike."""

    async def body(auth: Auth) -> None:
        token, _ = await auth.create_token("main", "", NOW)
        compared: list[int] = []
        plain = hmac.compare_digest

        def compare(a: str, b: str) -> bool:
            compared.append(len(b))
            return bool(plain(a, b))

        monkeypatch.setattr(hmac, "compare_digest", compare)
        for credentials in (f"{token.token_id}:wrong", "tk-none:wrong", "", "no colon"):
            compared.clear()
            with pytest.raises(AuthError):
                auth.verify(credentials, NOW)
            assert compared == [64, 64]

    run(tmp_path, body)


def test_a_token_expires_by_the_clock_of_the_server(tmp_path: Path) -> None:
    async def body(auth: Auth) -> None:
        token, secret = await auth.create_token("main", "", NOW, lifetime=60)
        auth.verify(f"{token.token_id}:{secret}", NOW + 59)
        with pytest.raises(AuthError, match="has expired"):
            auth.verify(f"{token.token_id}:{secret}", NOW + 60)
        assert auth.token_rows("", NOW + 60)[0]["state"] == "expired"

    run(tmp_path, body)


def test_rotation_gives_another_secret_and_the_old_one_its_grace(tmp_path: Path) -> None:
    async def body(auth: Auth) -> None:
        token, old = await auth.create_token("main", "", NOW)
        _, new = await auth.rotate_token(token.token_id, NOW, 10.0)
        auth.verify(f"{token.token_id}:{new}", NOW)
        auth.verify(f"{token.token_id}:{old}", NOW + 9)
        with pytest.raises(AuthError):
            auth.verify(f"{token.token_id}:{old}", NOW + 10)

    run(tmp_path, body)


def test_rotation_without_grace_ends_the_old_secret_and_its_connections(tmp_path: Path) -> None:
    async def body(auth: Auth) -> None:
        token, old = await auth.create_token("main", "", NOW)
        ended: list[object] = []
        auth.on_ended = ended.append
        await auth.rotate_token(token.token_id, NOW, 0.0)
        assert ended == [token]
        with pytest.raises(AuthError):
            auth.verify(f"{token.token_id}:{old}", NOW)
        await auth.revoke_token(token.token_id, NOW)
        with pytest.raises(ConflictError, match="was revoked"):
            await auth.rotate_token(token.token_id, NOW, 0.0)

    run(tmp_path, body)


def test_lists_of_tokens_hold_no_digest(tmp_path: Path) -> None:
    async def body(auth: Auth) -> None:
        await auth.create_workspace("team", NOW)
        await auth.create_token("main", "a", NOW)
        await auth.create_token("team", "b", NOW)
        assert [row["name"] for row in auth.token_rows("team", NOW)] == ["b"]
        assert all("digest" not in key for row in auth.token_rows("", NOW) for key in row)

    run(tmp_path, body)


def test_environments_are_looked_for_in_their_workspace_only(tmp_path: Path) -> None:
    async def body(auth: Auth) -> None:
        await auth.create_workspace("team", NOW)
        await auth.create_environment("team", "dev", NOW)
        assert auth.scope("team", "dev") == Scope("team", "dev")
        assert auth.scope("", "") == Scope("main", "main")
        with pytest.raises(NotFoundError, match=r"no environment `dev` in workspace `main`") as caught:
            auth.scope("main", "dev")
        assert "squall environment create dev" in caught.value.hint
        with pytest.raises(NotFoundError, match="no workspace `other`"):
            auth.scope("other", "main")
        with pytest.raises(ConflictError):
            await auth.create_environment("team", "dev", NOW)

    run(tmp_path, body)

    async def later(auth: Auth) -> None:
        assert [row["name"] for row in auth.environment_rows("team")] == ["main", "dev"]
        token, secret = await auth.create_token("team", "", NOW)
        await auth.delete_workspace("team", NOW)
        with pytest.raises(AuthError):
            auth.verify(f"{token.token_id}:{secret}", NOW)
        with pytest.raises(InvalidError, match="cannot be deleted"):
            await auth.delete_workspace("main", NOW)

    run(tmp_path, later)


@pytest.mark.parametrize("name", ["", "UPPER", "a" * 33, "-a", "a/b", "ä"])
def test_names_of_workspaces_that_make_no_path_are_refused(tmp_path: Path, name: str) -> None:
    async def body(auth: Auth) -> None:
        with pytest.raises(InvalidError, match="is not valid"):
            await auth.create_workspace(name, NOW)

    run(tmp_path, body)
