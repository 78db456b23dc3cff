"""What a program sees while an app runs: `squall run --json`, JSON Lines on standard output.

One object a line: `log` for what containers and this program itself write, `notice` for what Squall has to say, `yield`
for each value of a generator, and `result` last; a failure's last line is the command line's. Lines of all writers
are whole, whatever they hold: this program's file descriptor 1 is a pipe of ours meanwhile, so that not even a child
process's output comes between. Must never raise into the connection's reader: when nobody reads any more, lines are
dropped. Tested in `tests/unit/test_output_json.py` and `tests/acceptance/test_cli_json.py`.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

from squall._output import HELD_LIMIT_BYTES, Output, notice_text
from squall._terminal import write_all
from squall.protocol.messages import LogChunk, Notice

READ_BYTES = 64 << 10
REPR_LIMIT = 64 << 10
"""Most characters shown of a value that is no JSON."""
END_SECONDS = 5.0
"""How long what was printed last may take to pass; a reader of ours that stands still is left behind."""


def json_fields(value: Any) -> dict[str, Any]:
    """`{"value": ...}`, or `repr` and `python_type` where JSON has nothing for it."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        kind = type(value)
        shown = _repr(value)
        cut = {"repr_truncated": True} if len(shown) > REPR_LIMIT else {}
        return {"repr": shown[:REPR_LIMIT], "python_type": f"{kind.__module__}.{kind.__qualname__}", **cut}
    return {"value": value}


def _repr(value: Any) -> str:
    try:
        return repr(value)
    except Exception:  # the user's code may raise anything
        return object.__repr__(value)


class _Writer:
    """One stream of one container, or of this program."""

    def __init__(self, about: dict[str, Any]) -> None:
        self.about = about
        self.held = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")

    def feed(self, data: bytes, *, final: bool = False) -> list[str]:
        """The lines that have ended, each with its end. Put together, they are what was written.

        A line that is drawn over and over with carriage returns comes version after version; the last one may stay.
        """
        text = self.held + self._decoder.decode(data, final)
        cut = max(text.rfind("\n"), text.rfind("\r", 0, len(text) - 1)) + 1
        if final or (len(text) - cut) > HELD_LIMIT_BYTES:
            cut = len(text)
        self.held = text[cut:]
        return _lines(text[:cut])


def _lines(text: str) -> list[str]:
    """Split after each `\\n`; other line ends are text."""
    lines = [f"{line}\n" for line in text.split("\n")]
    lines[-1] = lines[-1][:-1]
    return lines if lines[-1] else lines[:-1]


class JsonOutput(Output):
    """From its making to `close` it stands between this program's own prints and standard output."""

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__(quiet=quiet)
        self._writers_of: dict[tuple[str, str], _Writer] = {}
        self._pending: deque[dict[str, Any]] = deque()
        self._is_writing = False
        self._last: dict[str, Any] | None = None
        self._is_closed = False
        self._is_over = False
        """The last line was written; what comes later has no place any more."""
        self._is_read = True
        """Somebody reads our lines, as far as we know."""
        sys.stdout.flush()
        self._stdout = os.dup(1)
        self._read_end, write_end = os.pipe()
        self._wake, self._awake = os.pipe()
        os.set_blocking(self._read_end, False)
        os.dup2(write_end, 1)
        os.close(write_end)
        self._buffers_lines = getattr(sys.stdout, "line_buffering", True)
        _buffer_lines(True)
        self._stderr = sys.stderr
        self._tap = _Tap(self, sys.stderr)
        sys.stderr = self._tap
        self._reader = threading.Thread(target=self._read_own, name="squall-own-output", daemon=True)
        self._reader.start()

    # -- what comes in

    def log(self, chunk: LogChunk, data: bytes) -> None:
        with self._lock:
            key = (chunk.container_id, chunk.stream)
            writer = self._writers_of.get(key)
            if writer is None:
                writer = self._writers_of[key] = _Writer(_about(chunk))
            self._log(writer, writer.feed(data), chunk.at)

    def local(self, stream: str, data: bytes) -> None:
        """What this program itself has printed."""
        with self._lock:
            self._drain()
            self._local(stream, data)

    def _local(self, stream: str, data: bytes) -> None:
        about = {"function": None, "container_id": None, "stream": stream}
        writer = self._writers_of.setdefault(("", stream), _Writer(about))
        self._log(writer, writer.feed(data), 0.0)

    def notice(self, notice: Notice) -> None:
        with self._lock:
            text = notice_text(notice)
            if self.quiet or not text or text in self._said or (self.leaving and notice.kind == "stopped"):
                return
            self._said.add(text)
            known = {key: notice.data[key] for key in ("function", "state", "step", "hint") if notice.data.get(key)}
            text = text.partition("\nhint: ")[0]
            self._emit({"type": "notice", "time": time.time(), "kind": notice.kind, "text": text, **known})

    def say(self, text: str) -> None:
        with self._lock:
            self._drain()
            if not self.quiet:
                self._emit({"type": "notice", "time": time.time(), "kind": "run", "text": text})

    def yielded(self, value: Any) -> None:
        shown = json_fields(value)  # before the lock is taken: the user's `repr` may print
        with self._lock:
            self._drain()
            self._emit({"type": "yield", **shown})

    def returned(self, value: Any) -> None:
        """It comes last, by `result`."""

    def result(self, value: Any) -> None:
        self._last = {"type": "result", **json_fields(value)}

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        sys.stdout.flush()
        os.dup2(self._stdout, 1)
        _buffer_lines(self._buffers_lines)
        if sys.stderr is self._tap:
            sys.stderr = self._stderr
        os.write(self._awake, b"x")  # a child process may hold the pipe open for as long as it likes
        self._reader.join(END_SECONDS)
        with self._lock:
            for writer in self._writers_of.values():
                self._log(writer, writer.feed(b"", final=True), 0.0)
            if self._last is not None:
                self._emit(self._last)
            self._is_over = True
        if not self._reader.is_alive():
            for fd in (self._read_end, self._wake, self._awake):
                os.close(fd)
        if self._last is not None and not self._is_read:
            raise BrokenPipeError  # as printing the result would

    # -- what goes out

    def _log(self, writer: _Writer, lines: list[str], at: float) -> None:
        for line in lines:
            self._emit({"type": "log", "time": at or time.time(), **writer.about, "text": line})

    def _emit(self, line: dict[str, Any]) -> None:
        """Write one line. A signal's handler may come in while this very thread writes one: its line is next."""
        if self._is_over:
            return
        self._pending.append(line)
        if self._is_writing:
            return
        self._is_writing = True
        try:
            self._write_pending()
        finally:
            self._write_pending()  # that of a handler which raises, as for Ctrl-C
            self._is_writing = False

    def _write_pending(self) -> None:
        while self._pending:
            line = json.dumps(self._pending.popleft()).encode() + b"\n"
            self._is_read = self._is_read and write_all(self._stdout, line)

    def _read_own(self) -> None:
        """What this program and its children write to descriptor 1, until `close`."""
        poll = select.poll()
        poll.register(self._read_end, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            with self._lock:
                found = self._drain()
            if found == b"" or (found is None and self._wake in ready):
                return

    def _drain(self) -> bytes | None:
        """Take what is in the pipe now, which one read does; None when there is nothing, empty when nobody can write
        to it any more. Before each line of another kind: what was printed first comes first."""
        try:
            data = os.read(self._read_end, READ_BYTES)
        except BlockingIOError:
            return None
        self._local("stdout", data)
        return data


class _Tap:
    """Stands in for sys.stderr; all but writing text is the real stream's. What is written to descriptor 2 goes there:
    the last words of a program that crashes must not be lost with the thread that would read them."""

    def __init__(self, output: JsonOutput, stream: Any) -> None:
        self._output = output
        self._real = stream
        self._pid = os.getpid()

    def write(self, text: str) -> int:
        if self._output._is_closed or os.getpid() != self._pid:  # a fork's lock may be held for ever
            self._real.write(text)
        else:
            self._output.local("stderr", text.encode("utf-8", "replace"))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def _about(chunk: LogChunk) -> dict[str, Any]:
    """Where a piece of output comes from. That of a build has an image in the container's place."""
    if chunk.container_id.startswith("im-"):
        return {"function": None, "container_id": None, "image_id": chunk.container_id, "stream": chunk.stream}
    return {"function": chunk.function, "container_id": chunk.container_id, "stream": chunk.stream}


def _buffer_lines(wanted: bool) -> None:
    """A line that is printed comes at once, among those of containers."""
    with contextlib.suppress(AttributeError, ValueError):  # replaced, or closed
        sys.stdout.reconfigure(line_buffering=wanted)  # type: ignore[union-attr]
