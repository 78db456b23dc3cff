"""The terminal of the person who runs the app, in the container: what `squall.interact()` and `breakpoint()` ask for.

Standard input, output and error of this process become a pseudo-terminal made here; a pump thread carries its bytes
to and from the server. It lasts as long as the inputs that asked for it. Asked for in the main thread it is the
process's controlling terminal too, so that Ctrl-C raises KeyboardInterrupt and Ctrl-\\ kills. When the other end goes
away, standard streams are what they were before, and who waits for keys reads the end of the file.
Imported only in containers of an app that has a terminal. Tested in `tests/acceptance/test_interactive.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import struct
import sys
import termios
import threading
from collections.abc import Callable
from typing import Any

from squall.exception import Error
from squall.protocol.messages import EXEC_WINDOW_BYTES, ExecData, ExecExit, Interact, Message
from squall.protocol.transport import Link

CHUNK_BYTES = 1 << 16
KEYS_LIMIT_BYTES = 2 * EXEC_WINDOW_BYTES
DRAIN_SECONDS = 1.0
"""How long the last output may take to leave; a child that still holds the terminal does not keep it longer."""
DEBUGGER_SKIPS = ["squall.*"]
"""Modules in which the debugger does not stop: the way from the user's function back is none of theirs."""


class Terminal:
    def __init__(
        self, link: Link, term: str, current: Callable[[], str | None], may_control: Callable[[], bool]
    ) -> None:
        self.link = link
        self.term = term
        self._current = current
        """The id of the input that runs in this thread or task; None while the code is loaded."""
        self._may_control = may_control
        """Whether what the terminal's signals would interrupt is the user's code."""
        self._lock = threading.RLock()
        self._holders: set[str | None] = set()
        self._session: Session | None = None
        self._arrival = threading.Lock()
        self._early: list[tuple[Message, bytes]] | None = None
        """What came after the answer and before there was a session for it; None when nothing is asked for."""
        self._interrupt: Any = None

    def attach(self) -> None:
        """Make the terminal this process's standard streams; waits for as long as another container has it."""
        with self._lock:
            if self._session is None or self._session.is_over:
                self._begin()
            self._holders.add(self._current())

    def _begin(self) -> None:
        self._end()
        _flush()
        self.link.start_background()  # keys come while user code has the main thread, also while it is loaded
        self._early = []
        try:
            data = self._ask()
            controls = self._may_control()
            if controls:
                self._take_signals()
            session = Session(self.link, str(data["exec_id"]), (int(data["rows"]), int(data["cols"])), controls)
        except BaseException:
            self._early = None
            raise
        os.environ["TERM"] = self.term
        with self._arrival:
            self._session, early, self._early = session, self._early, None
            for message, payload in early:
                _take(session, message, payload)

    def _ask(self) -> dict[str, Any]:
        try:
            reply, _ = self.link.request(Interact()).wait(None)
        except Error:
            raise
        except BaseException:  # cancelled while it waited
            with contextlib.suppress(Error):
                self.link.send(ExecExit("", 0))
            raise
        return reply.data

    def _take_signals(self) -> None:
        """SIGHUP, which a terminal that goes away sends, must not end the process; Ctrl-C is Python's own."""
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
            signal.signal(signal.SIGHUP, _ignore)
        self._interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)

    def release(self) -> None:
        """The input that runs here is over; with the last that asked for it the terminal is given back."""
        if self._session is None:
            return
        with self._lock:
            self._holders -= {self._current(), None}  # a thread of the user's own runs for no input that is known
            if not self._holders:
                self._end()

    def _end(self) -> None:
        session, self._session = self._session, None
        self._holders.clear()
        if session is None:
            return
        sys.settrace(None)  # a debugger that would ask on, in the next input
        if session.controls:
            with contextlib.suppress(ValueError):  # a thread of the user's asks anew after the terminal had gone
                signal.signal(signal.SIGINT, self._interrupt if self._interrupt is not None else signal.SIG_IGN)
        _flush()
        session.end()

    def on_push(self, message: Message, payload: bytes) -> None:
        """Keys, sizes and the end; runs in whichever thread reads."""
        with self._arrival:
            if self._session is not None:
                _take(self._session, message, payload)
            elif self._early is not None:
                self._early.append((message, payload))

    def on_close(self) -> None:
        session = self._session
        if session is not None:
            session.hang_up()

    def breakpoint(self, *args: Any, **kwargs: Any) -> None:
        """Stands in for `sys.breakpointhook`: the terminal first, then the debugger, in the caller's frame."""
        wanted = os.environ.get("PYTHONBREAKPOINT", "")
        if wanted == "0":
            return
        self.attach()
        if wanted not in ("", "pdb.set_trace"):
            sys.__breakpointhook__(*args, **kwargs)  # noqa: T100 - the debugger that was asked for
            return
        import pdb  # noqa: T100 - this is where it is asked for

        debugger = pdb.Pdb(skip=DEBUGGER_SKIPS)
        header = kwargs.get("header")
        if header is not None:
            debugger.message(str(header))
        debugger.set_trace(sys._getframe(1))


def _take(session: Session, message: Message, payload: bytes) -> None:
    if not isinstance(message, (ExecData, ExecExit)) or message.exec_id != session.exec_id:
        return
    if isinstance(message, ExecExit):
        session.hang_up()
    elif message.stream == "resize":
        session.resize(message.rows, message.cols)
    elif message.stream == "stdin" and (message.eof or not session.feed(payload)):
        session.hang_up()


class Session:
    """One time that this process has the terminal."""

    def __init__(self, link: Link, exec_id: str, size: tuple[int, int], controls: bool) -> None:
        self.link = link
        self.exec_id = exec_id
        self.controls = controls
        self.is_over = False
        """Its streams are what they were before."""
        self._lock = threading.Lock()
        self._keys = bytearray()
        self._wake_r, self._wake_w = os.pipe()
        self._main, side = os.openpty()
        os.set_blocking(self._main, False)
        self.resize(*size)
        if controls:
            with contextlib.suppress(OSError):  # this process leads no session: it does without signals
                fcntl.ioctl(side, termios.TIOCSCTTY, 0)
        self._before = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 64) for fd in range(3)]
        for fd in range(3):
            os.dup2(side, fd)
        os.close(side)
        self._pump_thread = threading.Thread(target=self._pump, name="squall-terminal", daemon=True)
        self._pump_thread.start()

    def resize(self, rows: int, columns: int) -> None:
        with self._lock, contextlib.suppress(OSError):
            fcntl.ioctl(self._main, termios.TIOCSWINSZ, struct.pack("HHHH", rows & 0xFFFF, columns & 0xFFFF, 0, 0))

    def feed(self, keys: bytes) -> bool:
        """Pass on what was typed; whether there was room for it."""
        with self._lock:
            if len(self._keys) + len(keys) > KEYS_LIMIT_BYTES:
                return False
            self._keys += keys
        self._wake()
        return True

    def hang_up(self) -> None:
        """The other end is gone. Whoever reads the terminal now reads its end."""
        self._restore()
        self._wake()

    def end(self) -> None:
        """Give it back when its last output has left.

        It stops being the controlling terminal when the pump closes it: TIOCNOTTY would send SIGHUP to all that the
        user has started, too."""
        self._restore()
        self._wake()
        self._pump_thread.join(2 * DRAIN_SECONDS)
        with contextlib.suppress(Error):
            self.link.send(ExecExit(self.exec_id, 0))

    def _restore(self) -> None:
        with self._lock:
            if self.is_over:
                return
            self.is_over = True
            for fd, before in enumerate(self._before):
                os.dup2(before, fd)
                os.close(before)

    def _wake(self) -> None:
        with self._lock:
            if self._wake_w >= 0:
                os.write(self._wake_w, b"w")

    def _pump(self) -> None:
        poll = select.poll()
        poll.register(self._wake_r, select.POLLIN)
        try:
            while not self.is_over:
                poll.register(self._main, select.POLLIN | (select.POLLOUT if self._keys else 0))
                ready = dict(poll.poll())
                if self._wake_r in ready:
                    os.read(self._wake_r, 64)
                if ready.get(self._main, 0) & select.POLLOUT:
                    self._type()
                if ready.get(self._main, 0) & ~select.POLLOUT and not self._forward():
                    break
            self._drain()
        except (OSError, Error):  # the connection is gone
            self._restore()
        finally:
            with self._lock:
                for fd in (self._main, self._wake_r, self._wake_w):
                    os.close(fd)
                self._main = self._wake_r = self._wake_w = -1

    def _drain(self) -> None:
        """What was written before the streams went back; the terminal's end is the end of it."""
        poll = select.poll()
        poll.register(self._main, select.POLLIN)
        while poll.poll(DRAIN_SECONDS * 1000) and self._forward():
            pass

    def _forward(self) -> bool:
        """Send on what was written; whether there may be more."""
        try:
            data = os.read(self._main, CHUNK_BYTES)
        except BlockingIOError:
            return True
        except OSError:  # nobody has the other side open any more
            return False
        self.link.send(ExecData(self.exec_id, "stdout"), data)
        return bool(data)

    def _type(self) -> None:
        with self._lock:
            try:
                sent = os.write(self._main, self._keys)
            except OSError:  # full, or gone
                return
            del self._keys[:sent]
        self.link.send(ExecData(self.exec_id, "stdin", credit=sent))


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # the user may have closed or replaced it
            stream.flush()


def _ignore(signum: int, frame: object) -> None:
    return
