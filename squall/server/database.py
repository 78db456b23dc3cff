"""The Store's engine: one writing thread with group commit and a few reading ones, over SQLAlchemy Core.

`write` takes a function of a connection; it runs in the writer's thread, in a transaction that is shared by everything
queued at that moment, and must neither read a clock nor make ids. A future resolves only after the commit that holds
its write is on disk. A function that raises fails alone: its group is run again with a savepoint for each. Trouble of
the Store itself (full, locked, read-only, gone) fails all that wait, with an error that says so and may be retried.

- `write_item(work, item)` is for many small writes of one kind: all that are in a group are one call of `work` with the
  list of their items, so that they can be one statement. That call is where the first of them stood: between writes of
  different kinds there is no order within a group, so await the one that must come first.
- `write_soon` is not waited for; what it brings is kept until it can be written, and lost by a crash only.
- `read` sees everything written before it was called; `read_committed` waits for no write. Neither holds up a commit.

The heavy imports happen in the thread, on first use, so that a server starts without them.
Tested in `tests/contract/test_database.py` over each backend that is present.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import queue
import secrets
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from squall._observe import Logger, count
from squall.exception import ConflictError, Error, InternalError, ResourceExhaustedError, ServiceError
from squall.server import schema
from squall.server.backends import Backend, Fault, backend_of

log = Logger("store")

T = TypeVar("T")
I = TypeVar("I")  # noqa: E741
Work = Callable[[Any], T]
ItemsWork = Callable[[Any, list[I]], Sequence[T] | None]
GROUP_LIMIT = 2000
QUEUE_LIMIT = 100_000
READERS = 2
RECONNECT_EVERY_S = 0.1
OPEN_RETRY_S = 0.5
"""Between attempts to open it after one that failed for a reason that may pass: no room, no descriptors, a lock."""
DESCRIPTORS = 8
"""What an open Store needs of them."""
OWED_RETRY_S = 0.5
"""Between attempts at what `write_soon` left while the Store cannot be written."""
CLOSE_S = 15.0
"""How long the end of the server is held up by such writes."""


_MAY_PASS = (ServiceError, ResourceExhaustedError)


class _Job:
    """One write: with `item` when it shares its call of `work` with others, without a future when nobody waits."""

    __slots__ = ("future", "item", "work")

    def __init__(self, work: Any, item: Any, future: asyncio.Future[Any] | None) -> None:
        self.work = work
        self.item = item
        self.future = future


class _Failed:
    """In the place of the result of a write that raised."""

    __slots__ = ("error",)

    def __init__(self, error: Exception) -> None:
        self.error = error


_ALONE: Any = object()
"""The item of a write that has none."""


class Database:
    def __init__(self, backend: Backend, loop: asyncio.AbstractEventLoop) -> None:
        self.backend = backend
        self._loop = loop
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._reads: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._readers: list[threading.Thread] = []
        self._closing = False
        self._ready: asyncio.Future[Error | None] = loop.create_future()
        # The loop's: writes handed over, those attempted, and the reads that wait for them.
        self._sent = 0
        self._attempted = 0
        self._opened = False
        self._error: Error | None = None
        self._ordered: deque[tuple[int, _Job]] = deque()
        # The writer's thread's.
        self._engine: Any = None
        self._connection: Any = None
        self._owed: list[_Job] = []
        self._down = False
        self._nonce = secrets.token_hex(4)
        self._groups = 0
        self._last = ""
        self._unsure: dict[str, list[Any]] = {}

    @classmethod
    def in_directory(cls, directory: Path, loop: asyncio.AbstractEventLoop, url: str = "") -> Database:
        """The Store of a state directory: a file in it, or the database at `url`."""
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        return cls(backend_of(url, directory), loop)

    def check(self) -> None:
        """Refuse, before anything is served, a database that is missing, foreign, damaged or newer than this release.

        Raises ConflictError or VersionError, and changes nothing. Costs some milliseconds."""
        self.backend.check()

    async def ready(self) -> None:
        """Wait until it is open. Raises the error that stands in the way."""
        self.start()
        error = await asyncio.shield(self._ready)
        if error is not None:
            raise error

    def start(self) -> None:
        """Start the thread (idempotent); called on first need, or when the server has nothing better to do."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="squall-store", daemon=True)
            self._thread.start()

    # -- the loop's side

    def write(self, work: Work[T]) -> asyncio.Future[T]:
        """Resolves to what `work` returns, once it is committed to disk."""
        self.start()
        return self._put(work, _ALONE)

    def write_item(self, work: ItemsWork[I, T], item: I) -> asyncio.Future[T]:
        """The same for one of many alike: `work` gets the items of all that share its group and answers with a list of
        their results, or None. The same function must be given each time, no closure. For order see the head of this
        file."""
        self.start()
        return self._put(work, item)

    def write_soon(self, work: Work[Any]) -> None:
        """Commit with the next group; for records whose loss in a crash is allowed. Does not start the thread."""
        if self._error or self._closing:
            return  # said where it was found
        if self._jobs.qsize() >= QUEUE_LIMIT:
            count("store_records_dropped")
            return
        self._sent += 1
        self._jobs.put(_Job(work, _ALONE, None))

    def read(self, work: Work[T]) -> asyncio.Future[T]:
        """Resolves to what `work` returns. It sees every write that was called before, and can change nothing."""
        return self._read(work, self._sent)

    def read_committed(self, work: Work[T]) -> asyncio.Future[T]:
        """`read` without waiting for the writes under way: for long looks, and where what matters was awaited."""
        return self._read(work, 0)

    def _put(self, work: Any, item: Any) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = self._loop.create_future()
        if self._error or self._closing:
            future.set_exception(self._unavailable())
        elif self._jobs.qsize() >= QUEUE_LIMIT:
            future.set_exception(ServiceError(f"the store has {QUEUE_LIMIT} writes waiting", hint="try again later"))
        else:
            self._sent += 1
            self._jobs.put(_Job(work, item, future))
        return future

    def _read(self, work: Any, after: int) -> asyncio.Future[Any]:
        self.start()
        future: asyncio.Future[Any] = self._loop.create_future()
        job = _Job(work, _ALONE, future)
        if self._error or self._closing:
            future.set_exception(self._unavailable())
        elif len(self._ordered) + self._reads.qsize() >= QUEUE_LIMIT:
            future.set_exception(ServiceError(f"the store has {QUEUE_LIMIT} reads waiting", hint="try again later"))
        elif self._opened and self._attempted >= after:
            self._reads.put(job)
        else:
            self._ordered.append((after, job))
        return future

    def _unavailable(self) -> ServiceError:
        if self._error is None:
            return ServiceError("the store is not available: the server is ending")
        return ServiceError(f"the store is not available: {self._error.message}", hint=self._error.hint)

    def _on_open(self, error: Error | None) -> None:
        self._opened, self._error = True, error
        if self._ready.done():  # it could not be opened before
            self._ready = self._loop.create_future()
        self._ready.set_result(error)
        if error is not None:
            log.error("the store cannot be used", error=error.message, hint=error.hint)
        self._release()

    def _on_attempted(self, count: int, settled: Iterable[tuple[_Job, Any]]) -> None:
        for job, result in settled:
            _settle(job, result)
        self._attempted += count
        if self._ordered:
            self._release()

    def _release(self) -> None:
        """Let the reads go whose turn has come. Those that wait for no write may stand behind others, at the start."""
        kept: deque[tuple[int, _Job]] = deque()
        for after, job in self._ordered:
            if self._error is not None:
                _settle(job, _Failed(self._unavailable()))
            elif self._opened and self._attempted >= after:
                self._reads.put(job)
            else:
                kept.append((after, job))
        self._ordered = kept

    async def close(self) -> None:
        """Commit what is queued, then end the threads."""
        if self._closing:
            return
        self.start()
        self._closing = True
        thread = self._thread
        assert thread is not None
        await self._loop.run_in_executor(None, self._finish, thread)

    def _finish(self, thread: threading.Thread) -> None:
        self._jobs.put(None)
        thread.join(2 * CLOSE_S)
        for _ in self._readers:
            self._reads.put(None)
        for reader in self._readers:
            reader.join(CLOSE_S)

    # -- the writer's thread

    def _run(self) -> None:
        error = self._open()
        self._loop_call(functools.partial(self._on_open, error))
        while error is not None:
            if not self._refuse(error, OPEN_RETRY_S if isinstance(error, _MAY_PASS) else None):
                return
            error = self._open()
            if error is None:
                self._loop_call(functools.partial(self._on_open, None))
        last = False
        while not last:
            group, last = self._take()
            if group or self._owed:
                self._commit(group)
        self._pay_last()
        self._disconnect()

    def _refuse(self, error: Error, seconds: float | None) -> bool:
        """The Store cannot be used: answer each write that was queued before the loop knew, for so long, or until the
        end. Whether it has not come to the end."""
        refusal = ServiceError(f"the store is not available: {error.message}", hint=error.hint)
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            try:
                job = self._jobs.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return True
            if job is None:
                return False
            self._loop_call(functools.partial(self._on_attempted, 1, [(job, _Failed(refusal))]))

    def _take(self) -> tuple[list[_Job], bool]:
        """Wait for a write, then take all that are there; and whether they are the last. While something is owed, wait
        only until it is time to try that again."""
        group: list[_Job] = []
        try:
            job = self._jobs.get(timeout=OWED_RETRY_S if self._owed else None)
            while job is not None:
                group.append(job)
                if len(group) >= GROUP_LIMIT:
                    return group, False
                job = self._jobs.get_nowait()
        except queue.Empty:
            return group, False
        return group, True

    def _open(self) -> Error | None:
        """Open, check, and create or migrate. What stood in the way, if anything did."""
        try:
            self.backend.check()
            self._engine = self.backend.writer()
            self._connect_within(self.backend.reconnect_s)
            self._start_readers(self.backend.reader(READERS))
        except Exception as error:
            return _why_not_opened(error)
        return None

    def _connect_within(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                self._connect()
                return
            except Exception as error:
                self._disconnect()
                fault = self.backend.fault_of(error)
                if fault is None:
                    raise
                if not fault.lost or time.monotonic() > deadline or self._closing:
                    raise fault.error from error
            time.sleep(RECONNECT_EVERY_S)

    def _connect(self) -> None:
        """Claim the database, make it today's, and learn what became of a commit whose answer was lost."""
        connection = self._connection = self._engine.connect()
        self.backend.claim(connection)
        with connection.begin():
            store_id = schema.prepare(connection, f"st-{secrets.token_hex(8)}")
            self.backend.marker.check_store(self.backend.kind, store_id)
            sealed = self.backend.sealed(connection)
        self.backend.marker.write(self.backend.kind, store_id)
        if self._groups and sealed != self._last and sealed not in self._unsure:
            raise ConflictError(
                "another server has written to the Store while this one had lost it",
                hint="end one of them: a database has one server",
            )
        self._last = sealed

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        with contextlib.suppress(Exception):  # it may be broken: what it held is the database's to clean up
            if connection is not None:
                connection.close()
        with contextlib.suppress(Exception):
            self._engine.dispose()

    def _commit(self, group: list[_Job]) -> None:
        """Attempt the group, and before it what is owed; tell the loop."""
        jobs = self._owed + group
        results = self._settled(jobs)
        self._owed = []
        if isinstance(results, Fault):
            self._owed = [job for job in jobs if job.future is None][:QUEUE_LIMIT]
            results = [_Failed(results.error)] * len(jobs)
        else:
            _log_lost(jobs, results)
        settled = [pair for pair in zip(jobs, results, strict=True) if pair[0].future is not None]
        self._loop_call(lambda: self._on_attempted(len(group), settled))

    def _settled(self, jobs: list[_Job]) -> list[Any] | Fault:
        """The result of each, or what is wrong with the Store. A connection that was lost is made anew, for a while;
        whether the last commit on it was done is then known."""
        tries, token = 0, ""
        while True:
            try:
                if self._connection is None:
                    self._connect_within(0.0 if self._down else self.backend.reconnect_s)
                    log.info("the store is back")
                self._down = False
                if token and token == self._last:
                    return self._unsure[token]
                token = self._next_token()
                return self._attempt(jobs, token)
            except Error as error:  # of the connecting
                self._down = True
                return Fault(error)
            except Exception as error:
                fault = self.backend.fault_of(error)
                if fault is None:
                    return self._bug(jobs, error)
                if fault.lost:
                    log.warning("the store is away", error=fault.error.message)
                    self._disconnect()
                elif not fault.again or tries >= self.backend.retries:
                    return fault
                tries += 1
                time.sleep(0.01 * min(tries, 10))

    def _next_token(self) -> str:
        self._groups += 1
        return f"{self._nonce}-{self._groups}"

    def _bug(self, jobs: list[_Job], error: Exception) -> list[Any]:
        log.error("a group of writes failed", error=traceback.format_exc())
        return [_Failed(InternalError(f"store: {error!r}"))] * len(jobs)

    def _attempt(self, jobs: list[_Job], token: str) -> list[Any]:
        """All in one transaction; when one of them raises, once more with a savepoint for each."""
        parts = _parts(jobs)
        try:
            return self._transact(self._together, jobs, parts, token)
        except Exception as error:
            if self.backend.fault_of(error) is not None or self._connection.invalidated:
                raise
        return self._transact(self._apart, jobs, parts, token)

    def _transact(self, run: Any, jobs: list[_Job], parts: list[list[int]], token: str) -> list[Any]:
        with self._connection.begin():
            results: list[Any] = run(jobs, parts)
            self.backend.seal(self._connection, token)
            self._unsure[token] = results
        self._unsure = {}
        self._last = token
        return results

    def _together(self, jobs: list[_Job], parts: list[list[int]]) -> list[Any]:
        results: list[Any] = [None] * len(jobs)
        for part in parts:
            first = jobs[part[0]]
            if first.item is _ALONE:
                results[part[0]] = first.work(self._connection)
                continue
            answers = first.work(self._connection, [jobs[at].item for at in part])
            if answers is not None:
                for at, answer in zip(part, answers, strict=True):
                    results[at] = answer
        return results

    def _apart(self, jobs: list[_Job], parts: list[list[int]]) -> list[Any]:
        results: list[Any] = [None] * len(jobs)
        for at in (at for part in parts for at in part):
            try:
                with self._connection.begin_nested():
                    (results[at],) = self._together([jobs[at]], [[0]])
            except Exception as error:
                if self.backend.fault_of(error) is not None:
                    raise
                results[at] = _Failed(error)
        return results

    def _pay_last(self) -> None:
        """The server ends: try what is owed for a while longer."""
        deadline = time.monotonic() + CLOSE_S
        while self._owed and time.monotonic() < deadline:
            time.sleep(OWED_RETRY_S)
            self._commit([])
        if self._owed:
            log.error("records were lost: the store could not be written until the end", writes=len(self._owed))

    # -- the readers' threads

    def _start_readers(self, engine: Any) -> None:
        for number in range(READERS):
            thread = threading.Thread(
                target=self._run_reader, args=(engine,), name=f"squall-read-{number}", daemon=True
            )
            self._readers.append(thread)
            thread.start()

    def _run_reader(self, engine: Any) -> None:
        while (job := self._reads.get()) is not None:
            result = self._read_once(engine, job)
            self._loop_call(lambda job=job, result=result: _settle(job, result))  # type: ignore[misc]
        engine.dispose()

    def _read_once(self, engine: Any, job: _Job) -> Any:
        deadline = time.monotonic() + self.backend.reconnect_s
        while True:
            try:
                with engine.connect() as connection:
                    return job.work(connection)
            except Exception as error:
                fault = self.backend.fault_of(error)
                if fault is None:
                    return _Failed(error)
                if not fault.lost or time.monotonic() > deadline or self._closing:
                    return _Failed(fault.error)
            time.sleep(RECONNECT_EVERY_S)

    def _loop_call(self, callback: Callable[[], Any]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback)


def _parts(jobs: list[_Job]) -> list[list[int]]:
    """Places in `jobs` that are executed together: items that share `work`, where the first of them stands."""
    parts: list[list[int]] = []
    shared: dict[Any, list[int]] = {}
    for at, job in enumerate(jobs):
        part = shared.get(job.work) if job.item is not _ALONE else None
        if part is not None:
            part.append(at)
            continue
        parts.append(part := [at])
        if job.item is not _ALONE:
            shared[job.work] = part
    return parts


def _why_not_opened(error: Exception) -> Error:
    """What happens first when there are no descriptors left looks like all kinds of damage."""
    opened: list[int] = []
    try:
        for _ in range(DESCRIPTORS):
            opened.append(os.open("/", os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        return ServiceError(
            "cannot open the Store: the server has no descriptors left",
            hint="it goes on by itself when it has some; raise its limit of open files, as `LimitNOFILE` of a unit",
        )
    finally:
        for fd in opened:
            os.close(fd)
    if isinstance(error, Error):
        return error
    log.debug("opening the store failed", error="".join(traceback.format_exception(error)))
    return Error(f"cannot open the Store: {type(error).__name__}: {error}")


def _log_lost(jobs: list[_Job], results: list[Any]) -> None:
    """A record nobody waits for that the database refuses will be refused again: it is given up, and said."""
    for job, result in zip(jobs, results, strict=True):
        if job.future is None and isinstance(result, _Failed):
            log.error("a record could not be stored", error=repr(result.error))


def _settle(job: _Job, result: Any) -> None:
    future = job.future
    if future is None or future.done():
        return
    if isinstance(result, _Failed):
        future.set_exception(result.error)
    else:
        future.set_result(result)
