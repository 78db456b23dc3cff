"""This program's terminal, lent to one container of its app at a time: `squall run -i`, `app.run(interactive=True)`.

While it is lent keys go to the container as they are (Ctrl-C too), so do changes of the window's size, and what the
container writes comes here; output of other containers goes between with the carriage returns that a raw terminal
wants. Must always give the terminal back as it was found. Called by the connection's reader thread; a pump thread
reads the keys, only while the terminal is lent. Tested in `tests/acceptance/test_interactive.py`.
"""

from __future__ import annotations

import os
import select
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from squall._output import notice_text
from squall.exception import InvalidError, ServiceError
from squall.protocol.messages import EXEC_WINDOW_BYTES, ExecData, ExecExit, Interact, LogChunk, Message, Notice

if TYPE_CHECKING:
    from squall.client import Output
    from squall.protocol.transport import Link

CHUNK_BYTES = 32 << 10
QUIT_KEY = b"\x1c"
LOOK_MS = 250
"""How often a lent terminal is asked for its size: a signal's handler could only be set in the main thread."""


def check_terminal() -> str:
    """The TERM of this program's terminal. Raises InvalidError when it has none."""
    if not (os.isatty(0) and os.isatty(1)):
        raise InvalidError(
            "an interactive run needs a terminal, and this program's standard input or output is none",
            hint="run it in a terminal, or without `-i`",
        )
    return os.environ.get("TERM") or "xterm"


def terminal_size() -> tuple[int, int]:
    """Rows and columns."""
    try:
        size = os.get_terminal_size(1)
    except OSError:
        return 24, 80
    return size.lines, size.columns


def make_raw(flush: bool = True) -> Callable[[], None]:
    """Have the keys come as they are, and drop those that came before unless told not to; returns how to undo it."""
    import termios
    import tty

    before = termios.tcgetattr(0)
    tty.setraw(0, termios.TCSAFLUSH if flush else termios.TCSADRAIN)
    return lambda: termios.tcsetattr(0, termios.TCSADRAIN, before)


def write_all(fd: int, data: bytes) -> bool:
    """Write to a descriptor; False when nobody reads there any more."""
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(fd, view) :]
    except OSError:
        return False
    return True


class Terminal:
    """One for each interactive app of a program; it takes the connection's pushes that concern it."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.term = check_terminal()
        self._lock = threading.RLock()
        self._exec_id = ""
        """Of the container that has the terminal."""
        self._restore: Callable[[], None] | None = None
        self._credit = 0
        """Bytes that may be on their way to the container."""
        self._wake_r, self._wake_w = os.pipe()

    @property
    def is_lent(self) -> bool:
        return bool(self._exec_id)

    def on_push(self, message: Message, payload: bytes) -> None:
        if isinstance(message, Interact):
            self._asked(message)
        elif isinstance(message, (ExecData, ExecExit)) and message.exec_id == self._exec_id:
            if isinstance(message, ExecExit):
                self._take_back(message.message)
            elif message.stream == "stdin":
                self._credit += message.credit
                os.write(self._wake_w, b"c")
            else:
                write_all(1, payload)

    def _asked(self, message: Interact) -> None:
        if not message.exec_id:
            self.say(f"`{message.function}` in {message.container_id} waits until this terminal is free")
            return
        self.say(
            f"`{message.function}` in {message.container_id} has this terminal; Ctrl-\\ kills it, twice if it hangs"
        )
        with self._lock:
            if self._exec_id:
                return
            self._exec_id, self._credit = message.exec_id, EXEC_WINDOW_BYTES
            sys.stdout.flush()
            self._restore = make_raw()
        threading.Thread(target=self._pump, args=(message.exec_id,), name="squall-keys", daemon=True).start()

    def say(self, text: str) -> None:
        write_all(2, f"squall: {text}\r\n".encode())

    def close(self, reason: str = "") -> None:
        """Take it back, whoever has it. Idempotent."""
        self._take_back(reason)

    def _take_back(self, reason: str) -> None:
        with self._lock:
            restore, self._restore = self._restore, None
            if restore is None:
                return
            self._exec_id = ""
            os.write(self._wake_w, b"e")
            try:
                restore()
            except OSError:  # the terminal itself is gone
                pass
        if reason:
            self.say(f"the terminal came back: {reason}")

    def _pump(self, exec_id: str) -> None:
        """Send keys and sizes until the terminal is taken back."""
        poll = select.poll()
        poll.register(self._wake_r, select.POLLIN)
        try:
            size = self._send_size(exec_id, (0, 0))
            while self._exec_id == exec_id:
                if self._credit > 0:
                    poll.register(0, select.POLLIN)
                else:
                    poll.register(0, 0)
                ready = dict(poll.poll(LOOK_MS))
                size = self._send_size(exec_id, size)  # before keys that were typed at that size
                if self._wake_r in ready:
                    os.read(self._wake_r, 64)
                elif 0 in ready and not self._send_keys(exec_id):
                    return
        except (OSError, ServiceError):  # the terminal or the server is gone: the connection's end takes it back
            return

    def _send_size(self, exec_id: str, known: tuple[int, int]) -> tuple[int, int]:
        size = terminal_size()
        if size != known:
            self.link.send(ExecData(exec_id, "resize", rows=size[0], cols=size[1]))
        return size

    def _send_keys(self, exec_id: str) -> bool:
        """Whether there may be more."""
        with self._lock:  # the next container's pump may be there already, and these keys for it
            if self._exec_id != exec_id:
                return False
            data = os.read(0, min(CHUNK_BYTES, max(1, self._credit)))
        if data.count(QUIT_KEY) > 1 or (QUIT_KEY in data and self._credit < EXEC_WINDOW_BYTES):
            # It does not take its keys, so this one would not reach it: code that never lets Python run, mostly.
            self.link.send(ExecData(exec_id, "kill"))
        self._credit -= len(data)
        self.link.send(ExecData(exec_id, "stdin", eof=not data), data)
        return bool(data)


class Between:
    """An output whose lines keep their place on a terminal that is lent."""

    def __init__(self, output: Output, terminal: Terminal) -> None:
        self._output = output
        self._terminal = terminal

    def log(self, chunk: LogChunk, data: bytes) -> None:
        self._output.log(chunk, data.replace(b"\n", b"\r\n") if self._terminal.is_lent else data)

    def notice(self, notice: Notice) -> None:
        self._output.notice(notice)
        if self._terminal.is_lent and notice_text(notice):
            write_all(2, b"\r")
