"""Databases for tests of the Store: a file of SQLite, and a PostgreSQL of the tests' own where it is installed.

The cluster lives in a temporary directory and listens on a socket in it, so that it meets no other of the machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import sqlalchemy as sa

from squall.server.database import Database

T = TypeVar("T")
SETTINGS = {
    "fsync": "off",
    "full_page_writes": "off",
    "listen_addresses": "''",
    "max_connections": "60",
    "shared_buffers": "32MB",
}
STOP_SECONDS = 60
ROOM_BYTES = 2 << 20


class Cluster:
    """A PostgreSQL of its own."""

    def __init__(self, binaries: Path, settings: dict[str, str] | None = None) -> None:
        self.binaries = binaries
        self.directory = Path(tempfile.mkdtemp(prefix="squall-pg-"))
        self.settings = SETTINGS if settings is None else settings
        self._names = (f"store{number}" for number in itertools.count())
        if os.geteuid() == 0:
            shutil.chown(self.directory, "postgres")
        initdb = ["initdb", "-D", self.data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "-N"]
        self._run(*initdb)
        self.start()

    @property
    def data(self) -> str:
        return str(self.directory / "data")

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self.binaries / program), *arguments]
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            command = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", *command]
        subprocess.run(
            command,
            cwd=self.directory,
            check=True,
            timeout=STOP_SECONDS,
            stdout=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
        )

    def start(self) -> None:
        options = " ".join(f"-c {name}={value}" for name, value in self.settings.items())
        log = str(self.directory / "log")
        self._run("pg_ctl", "start", "-w", "-D", self.data, "-l", log, "-o", f"-k {self.directory} {options}")

    def stop(self, mode: str = "fast") -> None:
        self._run("pg_ctl", "stop", "-w", "-D", self.data, "-m", mode)

    def remove(self) -> None:
        if (Path(self.data) / "postmaster.pid").exists():
            self.stop("immediate")
        shutil.rmtree(self.directory)

    def url(self, name: str) -> str:
        return f"postgresql://postgres@/{name}?host={self.directory}"

    def create(self) -> str:
        """The URL of a new, empty database."""
        name = next(self._names)
        self.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def execute(self, statement: str, name: str = "postgres") -> list[Any]:
        engine = engine_of(self.url(name))
        try:
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                result = connection.exec_driver_sql(statement)
                return [tuple(row) for row in result] if result.returns_rows else []
        finally:
            engine.dispose()


def find_postgres() -> Path | None:
    """The directory of the programs of PostgreSQL; None where it is not installed."""
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    if initdb := shutil.which("initdb"):
        places.append(Path(initdb).resolve().parent)
    return next((place for place in places if (place / "initdb").exists()), None)


def engine_of(url: str) -> sa.Engine:
    return sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"), poolclass=sa.pool.NullPool)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A PostgreSQL that the tests share, each with a database of its own."""
    binaries = find_postgres()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    cluster = Cluster(binaries)
    try:
        yield cluster
    finally:
        cluster.remove()


@contextlib.contextmanager
def small_disk_at(path: Path, filler_bytes: int = 1 << 20) -> Iterator[Path]:
    """A file system of its own with little room, and `filler` on it, which makes more when it is removed."""
    path.mkdir(exist_ok=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={ROOM_BYTES + filler_bytes},mode=0700", "squall-test", path], check=True
    )
    try:
        (path / "filler").write_bytes(bytes(filler_bytes))
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk_at(tmp_path / "disk") as path:
        yield path


class Place:
    """Where one test's Store is."""

    def __init__(self, directory: Path, url: str = "") -> None:
        self.directory = directory
        self.url = url
        self.path = directory / "squall.db"

    @property
    def kind(self) -> str:
        return "postgresql" if self.url else "sqlite"

    def open(self) -> Database:
        """The Store, as the server of this state directory opens it; in a running loop."""
        return Database.in_directory(self.directory, asyncio.get_running_loop(), self.url)

    def run(self, body: Callable[[Database], Awaitable[T]]) -> T:
        """What `body` returns, given the Store, which is closed afterwards."""

        async def main() -> T:
            database = self.open()
            try:
                return await body(database)
            finally:
                await database.close()

        return asyncio.run(main())

    def touch(self) -> None:
        """Open the Store and close it."""

        async def nothing(database: Database) -> None:
            await database.ready()

        self.run(nothing)

    def engine(self) -> sa.Engine:
        """Past the Store, with a connection of its own."""
        return engine_of(self.url or f"sqlite:///{self.path}")

    def execute(self, statement: str) -> list[Any]:
        """Do this past the Store, and commit; the rows of a query."""
        if not self.url:
            with contextlib.closing(sqlite3.connect(self.path)) as file, file:
                return file.execute(statement).fetchall()
        with self.engine().begin() as connection:
            result = connection.exec_driver_sql(statement)
            return [tuple(row) for row in result] if result.returns_rows else []
