"""A backup is one moment of the Store, whole, and opens as a home."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import subprocess
from pathlib import Path
from typing import Any

import pytest

from squall.config import Config
from squall.exception import ConflictError, NotFoundError, ServiceError
from squall.server.backup import Copied, back_up, split_password
from squall.server.database import Database
from squall.storage.blobs import DirectoryBlobs
from tests.contract.test_store_faults import keys, put
from tests.stores import Cluster, Place, find_postgres


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def store_of(home: Path, url: str = "") -> Place:
    return Place(home / "state", url)


def test_backup_opens_as_a_home_with_all_that_was_acknowledged(home: Path, tmp_path: Path) -> None:
    async def body(database: Database) -> Copied:
        await asyncio.gather(*(database.write(put(f"k{number}")) for number in range(50)))
        digests.append(DirectoryBlobs(home / "blobs").put(b"a large value"))
        (home / "state" / "seal.key").write_bytes(b"key")
        return await asyncio.to_thread(back_up, Config(home=home), tmp_path / "copy")  # the server goes on

    digests: list[str] = []
    copied = store_of(home).run(body)
    assert (copied.database, copied.blobs, copied.blob_bytes, copied.key) == ("sqlite", 1, 13, True)
    shutil.rmtree(home)
    shutil.copytree(tmp_path / "copy", home)
    place = store_of(home)
    place.touch()
    assert keys(place) == {f"k{number}" for number in range(50)}
    assert DirectoryBlobs(home / "blobs").read(digests[0]) == b"a large value"
    assert (home / "state" / "seal.key").read_bytes() == b"key"


def put_pair(number: int) -> Any:
    def work(connection: Any) -> None:
        put(f"left{number}", 5000)(connection)
        put(f"right{number}", 5000)(connection)

    return work


def test_backup_under_writes_is_of_one_moment(home: Path, tmp_path: Path) -> None:
    async def body(database: Database) -> None:
        await database.ready()
        copying = asyncio.ensure_future(asyncio.to_thread(back_up, Config(home=home), tmp_path / "copy"))
        number = 0
        while not copying.done():
            await asyncio.gather(*(database.write(put_pair(number + i)) for i in range(20)))
            number += 20
        await copying

    store_of(home).run(body)
    copy = keys(Place(tmp_path / "copy" / "state"))
    assert {key.removeprefix("left") for key in copy if key.startswith("left")} == {
        key.removeprefix("right") for key in copy if key.startswith("right")
    }


def test_backup_is_for_its_owner_only(home: Path, tmp_path: Path) -> None:
    store_of(home).touch()
    back_up(Config(home=home), tmp_path / "copy")
    assert oct((tmp_path / "copy").stat().st_mode & 0o777) == "0o700"
    assert oct((tmp_path / "copy" / "state" / "squall.db").stat().st_mode & 0o777) == "0o600"


def test_blobs_of_a_backup_take_no_room_on_the_same_file_system(home: Path, tmp_path: Path) -> None:
    store_of(home).touch()
    digest = DirectoryBlobs(home / "blobs").put(b"bytes")
    back_up(Config(home=home), tmp_path / "copy")
    here, there = (path / "blobs" / digest[:2] / digest for path in (home, tmp_path / "copy"))
    assert os.path.samefile(here, there)


def test_backup_replaces_nothing(home: Path, tmp_path: Path) -> None:
    store_of(home).touch()
    (tmp_path / "copy").mkdir()
    with pytest.raises(ConflictError, match="it exists"):
        back_up(Config(home=home), tmp_path / "copy")


def test_home_without_a_store_has_nothing_to_back_up(home: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nothing to back up"):
        back_up(Config(home=home), tmp_path / "copy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]


def test_damaged_store_is_not_backed_up(home: Path, tmp_path: Path) -> None:
    async def body(database: Database) -> None:
        await asyncio.gather(*(database.write(put(f"k{number}", 500)) for number in range(200)))

    place = store_of(home)
    place.run(body)
    damaged = bytearray(place.path.read_bytes())
    damaged[len(damaged) // 2 : len(damaged) // 2 + 8192] = os.urandom(8192)
    place.path.write_bytes(damaged)
    with pytest.raises(ConflictError, match=r"damaged|malformed"):
        back_up(Config(home=home), tmp_path / "copy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]


def test_postgresql_is_dumped_and_restored(
    home: Path, tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    binaries = find_postgres()
    assert binaries is not None
    monkeypatch.setenv("PATH", f"{binaries}:{os.environ['PATH']}")
    place = store_of(home, cluster.create())
    place.run(lambda database: database.write(put("k")))
    copied = back_up(Config(home=home, database_url=place.url), tmp_path / "copy")
    assert copied.database == "postgresql"
    fresh = Place(tmp_path / "copy" / "state", cluster.create())
    dump = tmp_path / "copy" / "state" / "store.pgdump"
    subprocess.run([binaries / "pg_restore", "--no-owner", "-d", fresh.url, dump], check=True)
    fresh.touch()
    assert keys(fresh) - {"last_group"} == {"k"}


def test_postgresql_without_its_client_says_what_to_install(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ServiceError, match="postgresql-client"):
        back_up(Config(home=home, database_url="postgresql://squall@host/jobs"), tmp_path / "copy")


def test_password_does_not_get_among_the_arguments() -> None:
    url = "postgresql://sq%40all:a%2Fb@db.example:5432/jobs?sslmode=require"
    assert split_password(url) == ("postgresql://sq%40all@db.example:5432/jobs?sslmode=require", "a/b")
    assert split_password("postgresql://postgres@/jobs?host=/run") == ("postgresql://postgres@/jobs?host=/run", "")


def test_copy_of_the_store_is_a_database_of_its_own(home: Path, tmp_path: Path) -> None:
    async def body(database: Database) -> None:
        await database.write(put("before"))
        await asyncio.to_thread(back_up, Config(home=home), tmp_path / "copy")
        await database.write(put("after"))

    store_of(home).run(body)
    connection = sqlite3.connect(tmp_path / "copy" / "state" / "squall.db")
    found = connection.execute("SELECT count(*) FROM meta WHERE key IN ('before', 'after')").fetchall()
    connection.close()
    assert found == [(1,)]
