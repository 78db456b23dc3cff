"""Secrets kept by the server: sealed, bound to their place, given only to what names them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from squall.exception import ConflictError, InvalidError, NotFoundError, ServiceError
from squall.protocol.messages import FunctionSpec
from squall.server.auth import Auth
from squall.server.database import Database
from squall.server.objects import Scope
from squall.server.sealing import Seal
from squall.server.vault import Vault

NOW = 1_000_000.0
MAIN, DEV, TEAM = Scope(), Scope("main", "dev"), Scope("team", "main")


def run(directory: Path, body: Callable[[Vault], Awaitable[None]]) -> None:
    async def main() -> None:
        database = Database.in_directory(directory, asyncio.get_running_loop())
        try:
            vault = Vault(database, Seal(directory / "seal.key"))
            await vault.ready()
            await body(vault)
        finally:
            await database.close()

    asyncio.run(main())


def test_values_are_kept_over_servers_and_nowhere_in_the_clear(tmp_path: Path) -> None:
    async def first(vault: Vault) -> None:
        await vault.put(MAIN, "db", {"PASSWORD": "hunter2-in-the-clear"}, NOW, replace=False)

    async def second(vault: Vault) -> None:
        assert vault.values(MAIN, ["db"]) == {"PASSWORD": "hunter2-in-the-clear"}
        [row] = vault.rows(MAIN)
        assert row == {"name": "db", "keys": ["PASSWORD"], "created_at": NOW, "updated_at": NOW}

    run(tmp_path, first)
    assert b"in-the-clear" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())
    run(tmp_path, second)


def test_a_taken_name_is_replaced_only_when_asked_to(tmp_path: Path) -> None:
    async def body(vault: Vault) -> None:
        await vault.put(MAIN, "db", {"A": "1", "B": "2"}, NOW, replace=False)
        with pytest.raises(ConflictError, match="exists already"):
            await vault.put(MAIN, "db", {"A": "3"}, NOW, replace=False)
        await vault.put(MAIN, "db", {"A": "3"}, NOW + 1, replace=True)
        assert vault.values(MAIN, ["db"]) == {"A": "3"}
        assert vault.rows(MAIN)[0]["created_at"] == NOW

    run(tmp_path, body)


def test_a_secret_is_found_in_its_own_place_only(tmp_path: Path) -> None:
    async def body(vault: Vault) -> None:
        await vault.put(MAIN, "db", {"A": "main"}, NOW, replace=False)
        await vault.put(DEV, "db", {"A": "dev"}, NOW, replace=False)
        assert vault.values(DEV, ["db"]) == vault.values(MAIN, ["dev/db"]) == {"A": "dev"}
        for ref in ("db", "main/db", "dev/db", "../main/db"):
            with pytest.raises(NotFoundError, match="no secret"):
                vault.values(TEAM, [ref])
        assert vault.rows(TEAM) == []

    run(tmp_path, body)


def test_of_a_key_in_several_secrets_the_last_one_counts(tmp_path: Path) -> None:
    async def body(vault: Vault) -> None:
        await vault.put(MAIN, "one", {"A": "1", "B": "1"}, NOW, replace=False)
        await vault.put(MAIN, "two", {"B": "2"}, NOW, replace=False)
        assert vault.values(MAIN, ["one", "two"]) == {"A": "1", "B": "2"}

    run(tmp_path, body)


def test_a_function_whose_secret_is_missing_or_lacks_a_key_is_told_so(tmp_path: Path) -> None:
    async def body(vault: Vault) -> None:
        spec = FunctionSpec("f", secrets=["db"], secret_keys={"db": ["A", "B"]})
        with pytest.raises(NotFoundError, match=r"function `f`: no secret `db`") as caught:
            vault.check(MAIN, spec)
        assert "squall secret create db" in caught.value.hint
        await vault.put(MAIN, "db", {"A": "1"}, NOW, replace=False)
        with pytest.raises(NotFoundError, match=r"secret `db` has no key `B`"):
            vault.check(MAIN, spec)
        await vault.put(MAIN, "db", {"A": "1", "B": "2"}, NOW, replace=True)
        vault.check(MAIN, spec)
        await vault.delete(MAIN, "db")
        assert vault.problem(MAIN, spec) is not None

    run(tmp_path, body)


def test_an_environment_is_renamed_with_its_secrets(tmp_path: Path) -> None:
    async def body(vault: Vault) -> None:
        auth = Auth(vault.database)
        await auth.ready()
        await auth.create_environment("main", "dev", NOW)
        await vault.put(DEV, "db", {"A": "1"}, NOW, replace=False)
        await vault.rename_environment(DEV, "staging", lambda connection: None)

    async def later(vault: Vault) -> None:
        assert vault.values(Scope("main", "staging"), ["db"]) == {"A": "1"}
        assert vault.rows(DEV) == []
        await vault.delete_environment(Scope("main", "staging"))
        assert vault.rows(Scope("main", "staging")) == []

    run(tmp_path, body)
    run(tmp_path, later)


def test_a_row_moved_to_another_name_does_not_open(tmp_path: Path) -> None:
    async def body(vault: Vault) -> None:
        await vault.put(MAIN, "harmless", {"A": "1"}, NOW, replace=False)
        await vault.put(MAIN, "db", {"PASSWORD": "x"}, NOW, replace=False)
        vault.secrets[MAIN, "harmless"].box = vault.secrets[MAIN, "db"].box
        with pytest.raises(ServiceError, match="belong to another row"):
            vault.values(MAIN, ["harmless"])

    run(tmp_path, body)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("a/b", {"A": "1"}),
        ("", {"A": "1"}),
        ("db", {}),
        ("db", []),
        ("db", {"1A": "1"}),
        ("db", {"SQUALL_X": "1"}),
        ("db", {"A": 1}),
        ("db", {"A": "private\0"}),
        ("db", {"A": "private" * 10_000}),
        ("db", {f"K{i}": "private" * 4_000 for i in range(100)}),
    ],
)
def test_what_cannot_be_kept_is_refused_without_its_values(tmp_path: Path, name: str, values: object) -> None:
    async def body(vault: Vault) -> None:
        with pytest.raises(InvalidError) as caught:
            await vault.put(MAIN, name, values, NOW, replace=False)
        assert "private" not in str(caught.value)

    run(tmp_path, body)
