"""Commands run in a running container on somebody's behalf: bytes both ways, a terminal when asked for.

Each exec has its pipes or a pty; its output is read while the server keeps up and its input is queued within a bound.
It ends with its process, or is killed when its caller goes away. Tested in `tests/integration/test_exec.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import struct
import termios
from typing import TYPE_CHECKING

from squall.exception import Error
from squall.protocol.messages import EXEC_WINDOW_BYTES, ExecData, ExecExit, StartExec

if TYPE_CHECKING:
    from squall.node.agent import Agent
    from squall.node.runtime import Container

STDIN_LIMIT_BYTES = 4 * EXEC_WINDOW_BYTES
CHUNK_BYTES = 1 << 16


class Exec:
    def __init__(self, exec_id: str, pty: bool) -> None:
        self.exec_id = exec_id
        self.pty = pty
        self.pid = 0
        self.stdin = -1
        self.readers: dict[int, str] = {}
        self.pending = bytearray()
        self.close_stdin = False
        self.is_killed = False
        self.message = ""
        """Why it was killed, when it was for what its caller did."""


class Execs:
    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.running: dict[str, Exec] = {}

    def start(self, message: StartExec) -> None:
        held = self.agent.held.get(message.container_id)
        if held is None or held.container is None:
            self._fail(message.exec_id, f"container `{message.container_id}` is not running")
            return
        job = Exec(message.exec_id, message.pty)
        try:
            theirs = self._open_ends(job, message)
        except OSError as error:
            self._close_ends(job)
            self._fail(message.exec_id, str(error))
            return
        self.running[job.exec_id] = job
        self.agent._spawn(self._run(job, held.container, message, theirs))

    async def _run(self, job: Exec, container: Container, message: StartExec, theirs: tuple[int, int, int]) -> None:
        stdin, stdout, stderr = theirs
        try:
            job.pid = await container.exec(
                message.argv, stdin=stdin, stdout=stdout, stderr=stderr, workdir=message.workdir, tty=message.pty
            )
        except (Error, OSError, ValueError) as error:
            del self.running[job.exec_id]
            self._close_ends(job)
            self._fail(job.exec_id, getattr(error, "message", "") or str(error))
            return
        finally:
            for fd in set(theirs):
                os.close(fd)
        if job.is_killed:  # while it was being started
            self._kill(job)
        for fd, stream in job.readers.items():
            os.set_blocking(fd, False)
            self.agent.loop.add_reader(fd, self._forward, job, stream, fd)
        await self._wait(job)

    def _open_ends(self, job: Exec, message: StartExec) -> tuple[int, int, int]:
        """Make the pipes or the pty; our ends go into `job`, theirs are returned."""
        if message.pty:
            main, side = os.openpty()
            job.stdin = main
            job.readers = {main: "stdout"}
            _set_size(main, message.rows, message.cols)
            return side, side, side
        in_r, in_w = os.pipe2(os.O_CLOEXEC)
        out_r, out_w = os.pipe2(os.O_CLOEXEC)
        err_r, err_w = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(in_w, False)
        job.stdin = in_w
        job.readers = {out_r: "stdout", err_r: "stderr"}
        return in_r, out_w, err_w

    def data(self, message: ExecData, payload: bytes) -> None:
        job = self.running.get(message.exec_id)
        if job is None:
            return
        if message.stream == "resize" and job.pty:
            _set_size(job.stdin, message.rows, message.cols)
        elif message.stream == "kill":
            self._kill(job)
        elif message.stream == "stdin":
            if len(job.pending) + len(payload) > STDIN_LIMIT_BYTES:
                job.message = "its input came faster than it was read"
                self._kill(job)
                return
            job.pending += payload
            job.close_stdin = job.close_stdin or message.eof
            self._write(job)

    def _write(self, job: Exec) -> None:
        """Pass on its input, and tell who sends it how much has gone."""
        before = len(job.pending)
        self._write_pending(job)
        taken = before - len(job.pending)
        if taken:
            self.agent.stream.send(ExecData(job.exec_id, "stdin", credit=taken))

    def _write_pending(self, job: Exec) -> None:
        if job.stdin < 0:
            job.pending.clear()  # the command has closed it
            return
        while job.pending:
            try:
                sent = os.write(job.stdin, job.pending)
            except BlockingIOError:
                self.agent.loop.add_writer(job.stdin, self._write, job)
                return
            except OSError:
                job.pending.clear()
                job.close_stdin = True
                break
            del job.pending[:sent]
        self.agent.loop.remove_writer(job.stdin)
        if job.close_stdin and not job.pty:
            os.close(job.stdin)
            job.stdin = -1

    def _forward(self, job: Exec, stream: str, fd: int) -> None:
        """Pass on what it wrote; while the server does not keep up the pipe is left full and the command waits."""
        if self.agent.stream.paused and not self.agent.stream.closing:
            self.agent.loop.remove_reader(fd)
            self.agent._spawn(self._resume(job, stream, fd))
            return
        try:
            data = os.read(fd, CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:  # a pty says EIO when its last process is gone
            data = b""
        if data:
            self.agent.stream.send(ExecData(job.exec_id, stream), data)
            return
        self._close_reader(job, fd)

    async def _resume(self, job: Exec, stream: str, fd: int) -> None:
        await self.agent.stream.drained()
        if fd in job.readers:
            self.agent.loop.add_reader(fd, self._forward, job, stream, fd)

    def _close_reader(self, job: Exec, fd: int) -> None:
        self.agent.loop.remove_reader(fd)
        del job.readers[fd]
        if fd == job.stdin:
            self.agent.loop.remove_writer(fd)
            job.stdin = -1
        os.close(fd)

    async def _wait(self, job: Exec) -> None:
        code = await wait_pid(self.agent.loop, job.pid)
        job.pid = 0  # it may be another's now
        await self._drain(job)
        self.running.pop(job.exec_id, None)
        self._close_ends(job)
        self.agent.stream.send(ExecExit(job.exec_id, code, job.message))

    async def _drain(self, job: Exec) -> None:
        """Give its output half a second to end; a background process may hold the pipes open for ever."""
        for _ in range(50):
            if not job.readers:
                return
            await asyncio.sleep(0.01)

    def _close_ends(self, job: Exec) -> None:
        for fd in list(job.readers):
            self._close_reader(job, fd)
        if job.stdin >= 0:
            self.agent.loop.remove_writer(job.stdin)
            os.close(job.stdin)
            job.stdin = -1

    def _kill(self, job: Exec) -> None:
        """The command and what it started in its process group."""
        job.is_killed = True
        if not job.pid:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(job.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):  # it had not yet made the group its own
            os.killpg(job.pid, signal.SIGKILL)

    def _fail(self, exec_id: str, message: str) -> None:
        self.agent.stream.send(ExecExit(exec_id, 126, message))

    def close(self) -> None:
        for job in list(self.running.values()):
            self._kill(job)


def _set_size(terminal: int, rows: int, columns: int) -> None:
    with contextlib.suppress(OSError):
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows & 0xFFFF, columns & 0xFFFF, 0, 0))


async def wait_pid(loop: asyncio.AbstractEventLoop, pid: int) -> int:
    """Wait for a child; its exit code, 128+n for signal n. Watches a pidfd, so no other child's status is taken."""
    fd = os.pidfd_open(pid)
    gone = asyncio.Event()
    loop.add_reader(fd, gone.set)
    try:
        await gone.wait()
    finally:
        loop.remove_reader(fd)
        os.close(fd)
    try:
        _, status = os.waitpid(pid, 0)  # noqa: ASYNC222 - it has ended: this does not wait
    except ChildProcessError:
        return -1
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code
