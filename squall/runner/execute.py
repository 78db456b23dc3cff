"""Runs inputs inside a container: takes them from the server's socket, calls the user's function, streams results.

One process, one main thread that is both the reader of the socket and the place where user code runs: an input
costs one receive and one send. A second thread takes over reading only while user code keeps the main thread busy,
which is how cancellation reaches it. This file does not depend on what the user's image contains, and imports in
milliseconds, as every container is forked from a process that has it loaded.

The order in `_run_one` is the contract: output of an input is flushed before its result leaves; a result is sent
exactly once; nothing user code does between inputs stops the loop, short of ending the process.
Tested in `tests/unit/test_runner_frames.py` and through every call in `tests/integration`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from squall.exception import InputCancellation, ServiceError
from squall.protocol import payload as payloads
from squall.protocol.frames import FrameReader, Packed
from squall.protocol.messages import (
    INLINE_LIMIT_BYTES,
    YIELD_WINDOW,
    CancelRun,
    ExecData,
    ExecExit,
    FunctionSpec,
    Hello,
    Load,
    Loaded,
    Message,
    OutputItem,
    Outputs,
    Run,
    RunItem,
    StopRunner,
    YieldCredit,
    encode_output,
    input_id,
    split_payload,
)
from squall.protocol.transport import Link, Pending
from squall.runner import loader
from squall.runner.loader import context, sdk
from squall.runner.returning import Ledger, await_socket

if TYPE_CHECKING:
    from squall.runner.concurrent import Serving
    from squall.runner.terminal import Terminal

CANCEL_SIGNAL = getattr(signal, "SIGRTMIN", signal.SIGUSR2) + (5 if hasattr(signal, "SIGRTMIN") else 0)
LOAD_TIMEOUT = 120.0
Key = tuple[str, int]


class Stop(Exception):
    """The server asked this runner to end."""


class Runner:
    def __init__(self, sock: socket.socket, source: str | None, control: socket.socket | None = None) -> None:
        self.source = source
        self.control = control
        """Over which the agent sends another socket when the server was killed; None: this runner ends with it."""
        self.ledger = Ledger()
        self.inbox: deque[tuple[RunItem, bytes]] = deque()
        self.load: tuple[Load, bytes] | None = None
        self.entered = False
        self.serving: Serving | None = None
        """Where several inputs run at a time."""
        self.terminal: Terminal | None = None
        """Of who runs the app, where user code may ask for one."""
        self.stopping = False
        self.current: Key | None = None
        self.in_user_code = False
        self.cancelled: set[Key] = set()
        self.task: Any = None
        self.loop: Any = None
        self.credits: dict[Key, int] = {}
        self.link = Link(sock, self.on_push, self.on_close, background=False)
        if control is not None:
            self.link.on_lost = self.on_lost
        self.mail: Pending[None] = Pending(self.link)
        self.client = sdk.install(self.link)
        self.code: loader.UserCode

    # -- what the server says; runs in whichever thread reads

    def on_push(self, message: Message, payload: bytes) -> None:
        if type(message) is Run:
            self.ledger.give(message.items)
            self.inbox.extend(zip(message.items, split_payload(message.items, payload), strict=True))
            self._wake()
        elif type(message) is Outputs:
            self.client.on_push(message, payload)
        elif type(message) is Load:
            self.load = (message, payload)
            self.mail.set(None)
        elif type(message) is CancelRun:
            self._cancel((message.call_id, message.idx))
        elif type(message) is YieldCredit:
            key = (message.call_id, message.idx)
            if self.serving is not None:
                self.serving.credit(key, message.n)
            elif key in self.credits:
                self.credits[key] += message.n
                self.mail.set(None)
        elif type(message) is StopRunner:
            self.stopping = True
            if message.cancel:
                self._abandon()
            self._wake()
        elif self.terminal is not None and isinstance(message, (ExecData, ExecExit)):
            self.terminal.on_push(message, payload)

    def on_close(self, reason: str) -> None:
        self.stopping = True
        if self.terminal is not None:
            self.terminal.on_close()
        self._wake()

    def on_lost(self, reason: str) -> bool:
        """The server is gone; whether to go on until the agent brings another."""
        if self.stopping:
            return False
        for sink in list(self.client.sinks.values()):
            sink.lost()
        if self.terminal is not None:
            self.terminal.on_close()
        for key, item in list(self.ledger.held.items()):
            if self.code.callees[item.method].is_generator:
                self.ledger.broken.add(key)
                self._cancel(key)
        self._wake()
        threading.Thread(target=self._return, args=(reason,), name="squall-return", daemon=True).start()
        return True

    def _return(self, reason: str) -> None:
        assert self.control is not None
        try:
            sock = await_socket(self.control, lambda: self.stopping)
            if sock is None:
                self.link.give_up(reason)
            else:
                self.link.resume(sock, FrameReader(), (), lambda: self.ledger.again() + self.client.unanswered())
        except Exception as error:  # whatever it is, this runner must not stay without a server
            self.link.give_up(f"{reason}, and then: {error!r}")

    def _wake(self) -> None:
        self.mail.set(None)
        if self.serving is not None:
            self.serving.wake()

    def _cancel(self, key: Key) -> None:
        if self.serving is not None:
            self.serving.cancel(key)
            return
        self.cancelled.add(key)
        if self.current != key:
            return
        if self.task is not None:
            self.loop.call_soon_threadsafe(self.task.cancel)
        elif self.in_user_code:
            signal.pthread_kill(threading.main_thread().ident or 0, CANCEL_SIGNAL)

    def _abandon(self) -> None:
        """Nobody waits for what is here any more."""
        self.inbox.clear()
        if self.serving is not None:
            self.serving.abandon()
        current = self.current
        if current is not None:
            self._cancel(current)

    def _on_cancel_signal(self, signum: int, frame: object) -> None:
        if self.in_user_code and self.current in self.cancelled:
            self.in_user_code = False
            raise InputCancellation("input was cancelled")

    # -- life

    def main(self) -> int:
        signal.signal(CANCEL_SIGNAL, self._on_cancel_signal)
        signal.signal(signal.SIGTERM, self._on_terminate)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, ValueError):
                stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        try:
            hello = Hello("runner", container_id=os.environ.get("SQUALL_TASK_ID", ""))
            self.link.send_tracked(hello, b"", lambda: None)  # to another server it says more than this
            if not self._load():
                return 1
            self.link.start_background()
            spec = self.load[0].spec if self.load else None
            if spec is not None and (spec.concurrency > 1 or spec.batch_size):
                self._serve_many(spec)
            else:
                self._serve()
        except (ServiceError, Stop):
            return 0
        finally:
            self._exit()
            self._close_loop()
            self.flush()
        return 0

    def _on_terminate(self, signum: int, frame: object) -> None:
        self.stopping = True
        if not self.in_user_code:
            self._wake()

    def _wait_mail(self, ready: Callable[[], Any]) -> None:
        """Read the socket until `ready()`; raises Stop when the runner should end instead."""
        while not ready():
            if self.stopping:
                raise Stop
            self.mail = Pending(self.link)
            if ready() or self.stopping:
                continue
            self.link.wait(self.mail)

    def _load(self) -> bool:
        self._wait_mail(lambda: self.load)
        assert self.load is not None
        message, parameters = self.load
        context.set_app(message.app_name, message.app_id)
        if message.terminal:
            self._offer_terminal(message.terminal)
        else:
            sys.breakpointhook = context.refuse_breakpoint
        try:
            self.code = loader.load(message, parameters, self.source, self.read_blob)
            self._enter()
        except BaseException as error:
            self.release_terminal()
            self.flush()
            text, hint = loader.what_failed(error)
            self.link.send(Loaded(False, message=text, hint=hint), payloads.pack_exception(error))
            return False
        self.release_terminal()
        self.flush()
        self.ledger.slots = message.spec.concurrency * max(1, message.spec.batch_size)
        loaded = Loaded(True, steps=self.code.steps)
        self.link.send_tracked(loaded, b"", lambda: setattr(self.ledger, "is_loaded", True))
        return True

    def _offer_terminal(self, term: str) -> None:
        from squall.runner.terminal import Terminal  # which most containers never need

        def may_control() -> bool:
            return self.serving is None and threading.current_thread() is threading.main_thread()

        def current() -> str | None:
            return context.current_input_id() if self.serving is not None else ""

        self.terminal = Terminal(self.link, term, current, may_control)
        context.set_attach(self.terminal.attach)
        sys.breakpointhook = self.terminal.breakpoint

    def release_terminal(self) -> None:
        """What ran in this thread or task is over."""
        if self.terminal is not None:
            self.terminal.release()

    def _enter(self) -> None:
        """A class's enter hooks. One that raises ends the container, and the exit hooks do not run."""
        started = time.perf_counter()
        for hook in self.code.enters:
            if hook.is_async:
                self._run_async(hook.call())
            else:
                hook.call()
        if self.code.enters:
            self.code.steps["enter"] = (time.perf_counter() - started) * 1000
        self.entered = True

    def _exit(self) -> None:
        """A class's exit hooks, each of them whatever the others do; who waits for the container sets the deadline."""
        if not self.entered:
            return
        self.entered = False
        context.set_context("", "")
        for hook in self.code.exits:
            try:
                if hook.is_async:
                    self._run_async(hook.call())
                else:
                    hook.call()
            except BaseException:
                traceback.print_exc()
        self.release_terminal()

    def _serve(self) -> None:
        inbox = self.inbox
        while True:
            if not inbox:
                self._wait_mail(lambda: inbox)
            item, data = inbox.popleft()
            self._run_one(item, data)

    def _serve_many(self, spec: FunctionSpec) -> None:
        from squall.runner.concurrent import Serving  # with asyncio and threads, which most containers never need

        self.serving = Serving(self, spec.concurrency, spec.batch_size, spec.batch_wait)
        self.serving.serve()

    # -- one input

    def _run_one(self, item: RunItem, data: bytes) -> None:
        key = (item.call_id, item.idx)
        started = time.time()
        out = OutputItem(item.call_id, item.idx, "ok", attempt=item.attempt, started_at=started)
        try:
            result = self._execute(key, item, data)
        except InputCancellation:
            out.status, out.message, result = "cancelled", "cancelled while it ran", b""
        except BaseException as error:
            if self.link.closed:
                raise
            out.status, result = "error", payloads.pack_exception(error)
        finally:
            self.release_terminal()
            self.current = None
            self.cancelled.discard(key)
            self.credits.pop(key, None)
        self.flush()
        out.finished_at = time.time()
        self.send_output(out, result)

    def _execute(self, key: Key, item: RunItem, data: bytes) -> Packed:
        self.current = key
        context.set_context(input_id(*key), item.call_id)
        if key in self.cancelled:
            raise InputCancellation("input was cancelled")
        if item.blob:
            data = self.read_blob(item.blob)
        args, kwargs = payloads.unpack_call(data)
        callee = self.code.callees[item.method]
        if callee.is_generator:
            self._run_generator(key, item, callee, args, kwargs)
            return payloads.pack(None, "result")
        if callee.is_async:
            result = self._run_async(callee.call(*args, **kwargs))
        else:
            self.in_user_code = True
            try:
                result = callee.call(*args, **kwargs)
            finally:
                self.in_user_code = False
        return payloads.pack_in_pieces(result, "result")

    def _in_user_code(self, body: Callable[[], Any]) -> Any:
        self.in_user_code = True
        try:
            return body()
        finally:
            self.in_user_code = False

    def _run_async(self, awaitable: Any) -> Any:
        import asyncio  # only functions that are async pay for it

        self.task = asyncio.ensure_future(awaitable, loop=self.event_loop())
        if self.current in self.cancelled:
            self.task.cancel()
        try:
            return self.loop.run_until_complete(self.task)
        except asyncio.CancelledError:
            if self.current in self.cancelled:
                raise InputCancellation("input was cancelled") from None
            raise
        finally:
            self.task = None

    def event_loop(self) -> Any:
        """The container's, made when it is first needed."""
        import asyncio

        if self.loop is None:
            self.loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self.loop)
        return self.loop

    def _run_generator(self, key: Key, item: RunItem, callee: loader.Callee, args: Any, kwargs: Any) -> None:
        self.credits[key] = YIELD_WINDOW
        generator = callee.call(*args, **kwargs)
        values = self._iterate_async(generator) if callee.is_async else self._iterate(generator)
        try:
            for seq, value in enumerate(values):
                if self.credits[key] <= 0:
                    self.flush()
                    self._wait_mail(lambda: self.credits[key] > 0 or key in self.cancelled)
                if key in self.cancelled:
                    raise InputCancellation("input was cancelled")
                self.credits[key] -= 1
                out = OutputItem(item.call_id, item.idx, "yield", seq=seq, attempt=item.attempt)
                self.send_output(out, payloads.pack_in_pieces(value, f"value {seq} of the generator"))
        finally:
            values.close()

    def _iterate(self, generator: Any) -> Any:
        """Step a user's generator with `in_user_code` set only while its own code runs."""
        iterator = iter(generator)
        end = object()
        try:
            while (value := self._in_user_code(lambda: next(iterator, end))) is not end:
                yield value
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()

    def _iterate_async(self, generator: Any) -> Any:
        iterator = generator.__aiter__()
        try:
            while True:
                try:
                    value = self._run_async(iterator.__anext__())
                except StopAsyncIteration:
                    return
                yield value
        finally:
            close = getattr(iterator, "aclose", None)
            if close is not None:
                self._run_async(close())

    def send_output(self, out: OutputItem, data: Packed) -> None:
        if len(data) > INLINE_LIMIT_BYTES:
            out.blob = self.client.put_blob(data)
            data = b""
        self.deliver(out, data)

    def deliver(self, out: OutputItem, data: Packed) -> None:
        """Send a result or a value. A result that the server may not have got is sent again to the next one."""
        out.size = len(data)
        note = functools.partial(self.ledger.answer, out, data) if out.status != "yield" else None
        self.link.send_raw(encode_output(out), data, note=note)

    def read_blob(self, digest: str) -> bytes:
        return self.client.get_blob(digest)

    def flush(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except Exception:  # the user may have closed or replaced it
                continue

    def _close_loop(self) -> None:
        if self.loop is not None:
            with contextlib.suppress(Exception):
                self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()


def serve(fd: int, source: str | None, control: int = -1) -> int:
    """Serve the server's socket `fd` until it says stop or goes away for good; the process's exit code. With `control`,
    the agent may bring the socket of another server."""
    return Runner(socket.socket(fileno=fd), source, socket.socket(fileno=control) if control >= 0 else None).main()
