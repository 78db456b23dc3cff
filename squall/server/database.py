"""The Store's engine: one writer thread with group commit over SQLAlchemy Core; SQLite by default.

`write` and `read` take a function of a connection; it runs in the thread, inside a transaction that is shared by
everything queued at that moment, and must neither read a clock nor make ids. A future resolves only after the commit
that holds its write is on disk. A function that raises fails alone: the others of its group are run again without it.
The heavy imports happen in the thread, on first use, so that a server starts without them.
Tested in `tests/contract/test_database.py`.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from squall.exception import InternalError, ServiceError, VersionError

T = TypeVar("T")
Work = Callable[[Any], T]
GROUP_LIMIT = 2000
QUEUE_LIMIT = 100_000
Job = tuple[Work[Any], "asyncio.Future[Any]"]


class Database:
    def __init__(self, url: str, loop: asyncio.AbstractEventLoop) -> None:
        self.url = url
        self._loop = loop
        self._jobs: queue.Queue[Job | None] = queue.Queue(QUEUE_LIMIT)
        self._thread: threading.Thread | None = None
        self._engine: Any = None
        self._failed = ""
        self._closing = False

    @classmethod
    def in_directory(cls, directory: Path, loop: asyncio.AbstractEventLoop) -> Database:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        return cls(f"sqlite:///{directory / 'squall.db'}", loop)

    def start(self) -> None:
        """Start the thread (idempotent); called on first need, or when the server has nothing better to do."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="squall-store", daemon=True)
            self._thread.start()

    def write(self, work: Work[T]) -> asyncio.Future[T]:
        """Resolves once `work` is committed to disk."""
        self.start()
        return self._put(work)

    read = write

    def write_soon(self, work: Work[Any]) -> None:
        """Commit with the next group; for records whose loss in a crash is allowed. Does not start the thread."""
        future = self._put(work)
        future.add_done_callback(_swallow)

    def _put(self, work: Work[T]) -> asyncio.Future[T]:
        future: asyncio.Future[T] = self._loop.create_future()
        if self._failed or self._closing:
            future.set_exception(ServiceError(f"the store is not available: {self._failed or 'closing'}"))
            return future
        try:
            self._jobs.put_nowait((work, future))
        except queue.Full:
            future.set_exception(ServiceError(f"the store has {QUEUE_LIMIT} writes waiting", hint="try again later"))
        return future

    async def close(self) -> None:
        """Commit what is queued, then end the thread."""
        if self._closing:
            return
        self.start()
        self._closing = True
        thread = self._thread
        assert thread is not None
        await self._loop.run_in_executor(None, self._finish, thread)

    def _finish(self, thread: threading.Thread) -> None:
        self._jobs.put(None)
        thread.join(30)

    # -- the thread

    def _run(self) -> None:
        try:
            self._open()
        except Exception as error:
            self._failed = f"{type(error).__name__}: {error}"
        while (job := self._jobs.get()) is not None:
            group = [job]
            last = False
            while len(group) < GROUP_LIMIT and not self._jobs.empty():
                following = self._jobs.get()
                if following is None:
                    last = True
                    break
                group.append(following)
            self._commit(group)
            if last:
                break
        if self._engine is not None:
            self._engine.dispose()

    def _open(self) -> None:
        import sqlalchemy as sa

        from squall.server import tables

        engine = sa.create_engine(self.url, isolation_level="SERIALIZABLE")
        if engine.dialect.name == "sqlite":
            sa.event.listen(engine, "connect", _tune_sqlite)
        with engine.begin() as connection:
            known = sa.inspect(connection).has_table("meta")
            if known:
                self._check_version(connection, tables)
            tables.metadata.create_all(connection)
            if not known:
                row = {"key": "schema_version", "value": str(tables.SCHEMA_VERSION)}
                connection.execute(tables.meta.insert().values(row))
        self._engine = engine

    def _check_version(self, connection: Any, tables: Any) -> None:
        query = tables.meta.select().where(tables.meta.c.key == "schema_version")
        row = connection.execute(query).first()
        if row is None or int(row.value) != tables.SCHEMA_VERSION:
            found = row.value if row else "none"
            raise VersionError(f"the store has schema version {found}, this release needs {tables.SCHEMA_VERSION}")

    def _commit(self, group: list[Job]) -> None:
        if self._engine is None:
            for _, future in group:
                self._resolve(future, None, ServiceError(f"the store is not available: {self._failed}"))
            return
        try:
            results = self._attempt(group)
        except Exception as error:
            if len(group) == 1:
                self._resolve(group[0][1], None, error)
                return
            for job in group:
                self._commit([job])
            return
        self._loop_call(lambda: _settle_all(group, results))

    def _attempt(self, group: list[Job]) -> list[Any]:
        with self._engine.begin() as connection:
            return [work(connection) for work, _ in group]

    def _resolve(self, future: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:
        self._loop_call(lambda: _settle(future, value, error))

    def _loop_call(self, callback: Callable[[], Any]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback)


def _settle_all(group: list[Job], results: list[Any]) -> None:
    for (_, future), value in zip(group, results, strict=True):
        _settle(future, value, None)


def _settle(future: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(value)
    elif isinstance(error, Exception):
        future.set_exception(error)
    else:
        future.set_exception(InternalError(f"store: {error!r}"))


def _swallow(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()


def _tune_sqlite(connection: Any, record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA busy_timeout=30000")
    cursor.close()
