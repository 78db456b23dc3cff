"""One command in a container, joined to this process's standard streams or kept for a document.

Used by `squall container exec` and `squall shell`. Must always give the terminal back as it was found, and keep no
more of what a command writes than CAPTURE_LIMIT_BYTES. Tested in `tests/unit/test_cli_exec.py`,
`tests/acceptance/test_cli.py` and `tests/acceptance/test_cli_json.py`.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import click

from squall._terminal import make_raw, terminal_size, write_all
from squall.cli.documents import print_json
from squall.exception import ServiceError
from squall.protocol.messages import EXEC_WINDOW_BYTES, ExecData, ExecExit, Message, StartExec
from squall.protocol.transport import Link

ANSWER_SECONDS = 60.0
STDIN_CHUNK_BYTES = 32 << 10
CAPTURE_LIMIT_BYTES = 1 << 20
"""Most that is kept of each stream of a command for a document; the rest is left out and the document says so."""

exec_json_option = click.option(
    "--json", "as_json", is_flag=True, help="One JSON document on standard output: exit code and what it wrote."
)


def wants_pty(pty: bool | None, as_json: bool) -> bool:
    """Whether the command gets a terminal, from `--pty`, `--no-pty` or neither."""
    if pty and as_json:
        raise click.UsageError("--json and --pty exclude each other: on a terminal there is one stream for both")
    return pty if pty is not None else not as_json and sys.stdin.isatty() and sys.stdout.isatty()


def told(job: Exec, code: int) -> int:
    """Print what is to be said of a command that has ended; its exit code."""
    if isinstance(job, CapturedExec):
        print_json(job.document(code))
    return code


class Exec:
    """One command in a container, joined to this process's standard streams.

    Three threads: this one waits for the end, a pump reads stdin, and the connection's reader writes what comes.
    """

    def __init__(self, link: Link, container_id: str, argv: list[str], *, pty: bool, workdir: str) -> None:
        self.link = link
        self._size = rows, cols = terminal_size()
        self.request = StartExec(container_id, argv, pty=pty, rows=rows, cols=cols, workdir=workdir)
        self.exec_id = ""
        self._done = threading.Event()
        self._credit = threading.Condition()
        self._unread = 0
        """Bytes of our stdin that the command has not taken yet."""
        self._exit = ExecExit("", 1, "the connection to the server broke")

    def run(self) -> int:
        self.link.on_push = self._on_push
        self.link.on_close = lambda reason: self._done.set()
        reply, _ = self.link.request(self.request).wait(ANSWER_SECONDS)
        self.exec_id = str(reply.data["exec_id"])
        restore = self._raw_terminal() if self.request.pty else None
        threading.Thread(target=self._pump_stdin, name="squall-stdin", daemon=True).start()
        try:
            self._done.wait()
        finally:
            if restore is not None:
                restore()
        if self._exit.message:
            raise ServiceError(f"`{self.request.argv[0]}` in `{self.request.container_id}`: {self._exit.message}")
        return self._exit.code

    def _on_push(self, message: Message, payload: bytes) -> None:
        # Output may come before the answer that names the exec; it is the only one of this connection.
        if isinstance(message, ExecData) and message.credit:
            with self._credit:
                self._unread -= message.credit
                self._credit.notify()
        elif isinstance(message, ExecData):
            self._show(message.stream, payload)
        elif isinstance(message, ExecExit):
            self._exit = message
            self._done.set()

    def _show(self, stream: str, data: bytes) -> None:
        write_all(2 if stream == "stderr" else 1, data)

    def _pump_stdin(self) -> None:
        try:
            while data := os.read(0, STDIN_CHUNK_BYTES):
                with self._credit:
                    self._credit.wait_for(lambda: self._unread < EXEC_WINDOW_BYTES)
                    self._unread += len(data)
                if self.request.pty:
                    self._send_size()  # before keys that were typed at that size
                self.link.send(ExecData(self.exec_id, "stdin"), data)
            self.link.send(ExecData(self.exec_id, "stdin", eof=True))
        except (OSError, ServiceError):  # no stdin at all, or the command has ended
            pass

    def _raw_terminal(self) -> Callable[[], None]:
        """Keys go to the command as they are, and so do changes of the window's size; returns how to undo it."""
        import signal

        undo = make_raw(flush=False)  # the prompt may be there already, and an answer to it
        self._send_size()
        previous = signal.signal(signal.SIGWINCH, self._send_size)

        def restore() -> None:
            signal.signal(signal.SIGWINCH, previous)
            undo()

        return restore

    def _send_size(self, *_: object) -> None:
        size = terminal_size()
        if size != self._size:
            self._size = size
            self.link.send(ExecData(self.exec_id, "resize", rows=size[0], cols=size[1]))


class CapturedExec(Exec):
    """Keeps what the command writes, up to a limit."""

    def __init__(self, link: Link, container_id: str, argv: list[str], *, pty: bool, workdir: str) -> None:
        super().__init__(link, container_id, argv, pty=pty, workdir=workdir)
        self._written = {"stdout": bytearray(), "stderr": bytearray()}
        self._is_truncated = False

    def _show(self, stream: str, data: bytes) -> None:
        kept = self._written["stderr" if stream == "stderr" else "stdout"]
        room = CAPTURE_LIMIT_BYTES - len(kept)
        kept += data[:room]
        self._is_truncated |= len(data) > room

    def document(self, code: int) -> dict[str, Any]:
        """What the command has written, and how it ended."""
        texts = {stream: data.decode("utf-8", "replace") for stream, data in self._written.items()}
        about = {"container_id": self.request.container_id, "exit_code": code}
        return {**about, **texts, "truncated": self._is_truncated}
