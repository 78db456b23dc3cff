"""HAND: runs several inputs of one container at a time, or in batches, as `slots` says.

The main thread is an event loop: async functions are tasks of it, plain ones run in threads. All decisions are made in
the loop's thread; readers and threads only wake it. A cancelled task is cancelled; in a thread `InputCancellation` is
raised between two of its instructions, which does not reach into C (the server kills what does not end). One input of
a batch cannot be stopped: it is answered at once, and the call goes on for the others.
Used by `execute` where a container has more than one slot. Tested in `tests/integration/test_concurrent.py`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import ctypes
import inspect
import threading
import time
from typing import TYPE_CHECKING, Any

from squall.exception import InputCancellation, InvalidError, ServiceError
from squall.protocol import payload as payloads
from squall.protocol.frames import Packed
from squall.protocol.messages import INLINE_LIMIT_BYTES, YIELD_WINDOW, OutputItem, RunItem, input_id
from squall.runner.loader import Callee, context
from squall.runner.slots import Slots

if TYPE_CHECKING:
    from squall.runner.execute import Runner

Key = tuple[str, int]


class Job:
    """One input."""

    def __init__(self, item: RunItem, data: bytes) -> None:
        self.item = item
        self.data = data
        self.key: Key = (item.call_id, item.idx)
        self.run: Run | None = None
        self.cancelled = False
        self.answered = False
        self.credits = YIELD_WINDOW
        self.changed = threading.Condition()
        """Guards `credits` and `cancelled` for a generator in a thread."""
        self.arrived: asyncio.Event | None = None
        """The same for an async generator."""


class Run:
    """One call of user code, for one input or a batch of them."""

    def __init__(self, jobs: list[Job], callee: Callee, started: float) -> None:
        self.jobs = jobs
        self.given = jobs
        """Those of a batch whose arguments fit."""
        self.callee = callee
        self.started = started
        self.task: asyncio.Future[None] | None = None
        self.thread = 0
        """While user code runs in a thread: which."""
        self.lock = threading.Lock()

    def is_cancelled(self) -> bool:
        return all(job.cancelled for job in self.jobs)

    def interrupt(self) -> None:
        """Nobody wants it any more."""
        if self.callee.is_async:
            if self.task is not None:
                self.task.cancel()
            return
        with self.lock:
            if self.thread:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(self.thread), ctypes.py_object(InputCancellation)
                )

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Call user code in this thread, within reach of `interrupt`."""
        return self.within_reach(lambda: self.callee.call(*args, **kwargs))

    def within_reach(self, body: Any) -> Any:
        with self.lock:
            if self.is_cancelled():
                raise InputCancellation("input was cancelled")
            self.thread = threading.get_ident()
        try:
            return body()
        finally:
            with self.lock:
                self.thread = 0
                # What was raised and has not been seen yet would hit our own code.
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(threading.get_ident()), None)


class Serving:
    """Serves a runner's inbox until it is told to stop."""

    def __init__(self, runner: Runner, parallel: int, batch_size: int, batch_wait: float) -> None:
        self.runner = runner
        self.is_batched = batch_size > 0
        self.slots: Slots[Job] = Slots(parallel, max(1, batch_size), batch_wait)
        self.jobs: dict[Key, Job] = {}
        self.runs: set[Run] = set()
        self.loop = runner.event_loop()
        self.threads = concurrent.futures.ThreadPoolExecutor(parallel, thread_name_prefix="input")
        self._timer: asyncio.TimerHandle | None = None

    def serve(self) -> None:
        """Returns when the runner shall end and nothing runs."""
        self.loop.call_soon(self._pump)
        self.loop.run_forever()

    def wake(self) -> None:
        """From any thread: look at what has changed."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self._pump)

    def cancel(self, key: Key) -> None:
        """From any thread."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._cancel, key)

    def abandon(self) -> None:
        """From any thread: nobody waits for anything that is here."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._abandon)

    def credit(self, key: Key, count: int) -> None:
        """From any thread: a generator's consumer took values."""
        job = self.jobs.get(key)
        if job is None:
            return
        with job.changed:
            job.credits += count
            job.changed.notify_all()
        if job.arrived is not None:
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(job.arrived.set)

    # -- in the loop's thread

    def _pump(self) -> None:
        runner, now = self.runner, time.monotonic()
        while runner.inbox:
            job = Job(*runner.inbox.popleft())
            self.jobs[job.key] = job
            self.slots.arrive(now, job)
        if runner.stopping:
            self.slots.clear()
            if not self.runs or runner.link.closed:
                self.loop.stop()
            return
        for jobs in self.slots.take(now):
            self._start(jobs)
        self._arm(self.slots.due())

    def _arm(self, due: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if due is None else self.loop.call_later(max(0.0, due - time.monotonic()), self._pump)

    def _start(self, jobs: list[Job]) -> None:
        run = Run(jobs, self.runner.code.callees[jobs[0].item.method], time.time())
        for job in jobs:
            job.run = run
        self.runs.add(run)
        if run.callee.is_async:
            run.task = self.loop.create_task(self._run_async(run))
        else:
            run.task = self.loop.run_in_executor(self.threads, self._run_here, run)
        run.task.add_done_callback(lambda _: self._ended(run))

    def _ended(self, run: Run) -> None:
        if run.task is not None and not run.task.cancelled():
            run.task.exception()  # the link's end; whoever waits for it is told by the link
        for job in run.jobs:
            self._answer(job, "cancelled", b"", "cancelled while it ran")  # no-op where there was an answer
            self.jobs.pop(job.key, None)
        self.runs.discard(run)
        self.slots.ended()
        self._pump()

    def _cancel(self, key: Key) -> None:
        job = self.jobs.get(key)
        if job is None or job.cancelled or job.answered:
            return
        with job.changed:
            job.cancelled = True
            job.changed.notify_all()
        if job.run is None:
            self.slots.drop(job)
            del self.jobs[key]
            self._answer(job, "cancelled", b"", "cancelled before it ran")
            return
        if job.arrived is not None:
            job.arrived.set()
        if self.is_batched:
            self._answer(job, "cancelled", b"", "cancelled while its batch ran")
        if job.run.is_cancelled():
            job.run.interrupt()

    def _abandon(self) -> None:
        for key in list(self.jobs):
            self._cancel(key)
        self._pump()

    # -- one run

    def _run_here(self, run: Run) -> None:
        """In a thread of its own."""
        context.set_context(input_id(*run.jobs[0].key), run.jobs[0].item.call_id)
        try:
            if self.is_batched:
                calls = self._batch(run, [self._read(job) for job in run.jobs])
                if calls is not None:
                    self._give_batch(run, run.call(*calls))
                return
            job = run.jobs[0]
            args, kwargs = payloads.unpack_call(self._read(job))
            if run.callee.is_generator:
                self._generate(run, job, args, kwargs)
                result = None
            else:
                result = run.call(*args, **kwargs)
            self._send(job, "ok", payloads.pack_in_pieces(result, "result"))
        except ServiceError:
            raise
        except BaseException as error:
            self._fail(run, error)

    async def _run_async(self, run: Run) -> None:
        context.set_context(input_id(*run.jobs[0].key), run.jobs[0].item.call_id)
        try:
            data = [await self._read_async(job) for job in run.jobs]
            if self.is_batched:
                calls = self._batch(run, data)
                if calls is not None:
                    self._give_batch(run, await run.callee.call(*calls))
                return
            job = run.jobs[0]
            args, kwargs = payloads.unpack_call(data[0])
            if run.callee.is_generator:
                await self._generate_async(job, run.callee.call(*args, **kwargs))
                result = None
            else:
                result = await run.callee.call(*args, **kwargs)
            await self._send_async(job, "ok", payloads.pack_in_pieces(result, "result"))
        except ServiceError:
            raise
        except BaseException as error:
            self._fail(run, error)

    def _fail(self, run: Run, error: BaseException) -> None:
        """User code raised, for all inputs of the run that have no answer."""
        is_cancel = isinstance(error, (InputCancellation, asyncio.CancelledError))
        data = b"" if is_cancel and run.is_cancelled() else payloads.pack_exception(error)
        for job in run.jobs:
            if data:
                self._answer(job, "error", data)
            else:
                self._answer(job, "cancelled", b"", "cancelled while it ran")

    # -- generators

    def _generate(self, run: Run, job: Job, args: Any, kwargs: Any) -> None:
        iterator = iter(run.call(*args, **kwargs))
        end = object()
        try:
            seq = 0
            while (value := run.within_reach(lambda: next(iterator, end))) is not end:
                with job.changed:
                    job.changed.wait_for(lambda: job.credits > 0 or job.cancelled)
                    job.credits -= 1
                if job.cancelled:
                    raise InputCancellation("input was cancelled")
                self._send(job, "yield", payloads.pack_in_pieces(value, f"value {seq} of the generator"), seq)
                seq += 1
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()

    async def _generate_async(self, job: Job, generator: Any) -> None:
        job.arrived = asyncio.Event()
        seq = 0
        try:
            async for value in generator:
                while job.credits <= 0:
                    job.arrived.clear()
                    await job.arrived.wait()
                job.credits -= 1
                await self._send_async(
                    job, "yield", payloads.pack_in_pieces(value, f"value {seq} of the generator"), seq
                )
                seq += 1
        finally:
            close = getattr(generator, "aclose", None)
            if close is not None:
                await close()

    # -- batches

    def _batch(self, run: Run, datas: list[bytes]) -> list[list[Any]] | None:
        """One list for each parameter; an input whose arguments do not fit fails alone. None when none is left."""
        signature = inspect.signature(run.callee.call)
        rows, kept = [], []
        for job, data in zip(run.jobs, datas, strict=True):
            try:
                args, kwargs = payloads.unpack_call(data)
                rows.append(list(signature.bind(*args, **kwargs).arguments.values()))
                kept.append(job)
            except BaseException as error:
                self._answer(job, "error", payloads.pack_exception(error))
        run.given = kept
        return [list(column) for column in zip(*rows, strict=True)] if rows else None

    def _give_batch(self, run: Run, results: Any) -> None:
        """Each input its result; an exception in the list is that input's failure."""
        jobs = run.given
        if not isinstance(results, list) or len(results) != len(jobs):
            what = f"a list of {len(results)}" if isinstance(results, list) else f"a `{type(results).__name__}`"
            raise InvalidError(
                f"a batched function was given {len(jobs)} inputs and returned {what}",
                hint="it must return a list with one result for each input, in their order",
            )
        for job, result in zip(jobs, results, strict=True):
            if job.answered:
                continue
            try:
                if isinstance(result, BaseException):
                    raise result
                self._send(job, "ok", payloads.pack_in_pieces(result, "result"))
            except ServiceError:
                raise
            except BaseException as error:
                self._answer(job, "error", payloads.pack_exception(error))

    # -- out

    def _answer(self, job: Job, status: str, data: bytes, message: str = "") -> None:
        """A result that is small; none twice."""
        with contextlib.suppress(ServiceError):
            self._deliver(job, self._output(job, status, 0), data, message)

    def _send(self, job: Job, status: str, data: Packed, seq: int = 0) -> None:
        out = self._output(job, status, seq)
        if len(data) > INLINE_LIMIT_BYTES:
            out.blob = self.runner.client.put_blob(data)
            data = b""
        self._deliver(job, out, data)

    async def _send_async(self, job: Job, status: str, data: Packed, seq: int = 0) -> None:
        out = self._output(job, status, seq)
        if len(data) > INLINE_LIMIT_BYTES:
            out.blob = await self.runner.client.put_blob.aio(data)
            data = b""
        self._deliver(job, out, data)

    def _output(self, job: Job, status: str, seq: int) -> OutputItem:
        started = job.run.started if job.run is not None else time.time()
        return OutputItem(*job.key, status, seq=seq, attempt=job.item.attempt, started_at=started)

    def _deliver(self, job: Job, out: OutputItem, data: Packed, message: str = "") -> None:
        if out.status != "yield":
            with job.changed:
                if job.answered:
                    return
                job.answered = True
            self.runner.release_terminal()
            self.runner.flush()
            out.finished_at, out.message = time.time(), message
        self.runner.deliver(out, data)

    def _read(self, job: Job) -> bytes:
        return self.runner.read_blob(job.item.blob) if job.item.blob else job.data

    async def _read_async(self, job: Job) -> bytes:
        return await self.runner.client.get_blob.aio(job.item.blob) if job.item.blob else job.data
