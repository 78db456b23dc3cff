"""The NodeProvider seam: where machines come from; with the embedded provider, which is this machine.

The embedded provider runs one agent as a child process and starts it anew when it dies, with a delay that grows while
it keeps dying. An agent that has outlived an earlier server is found by its lock and taken over, with its containers;
one that does not register in time is killed. It decides nothing about containers. Tested in
`tests/integration/test_kills.py` and `test_reattach.py`.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from squall._observe import Logger
from squall.config import Config, shared_environ

log = Logger("server")

RESTART_DELAY = 0.1
RESTART_DELAY_LIMIT = 10.0
HEALTHY_AFTER = 10.0
STOP_TIMEOUT = 15.0
ADOPT_TIMEOUT = 5.0
"""For an agent that has outlived its server to register with the next one. It looks for it several times a second."""
LINUX = hasattr(os, "pidfd_open")


class NodeProvider(abc.ABC):
    on_ended: Callable[[str], None]
    """Set by the server: to be told, with a reason, when the agents that this provider started are known to be gone."""

    @abc.abstractmethod
    def start(self) -> None:
        """Make the nodes come; they register by themselves, as soon as the server listens."""

    @abc.abstractmethod
    def listening(self) -> None:
        """To be told when they can register."""

    @abc.abstractmethod
    def registered(self) -> None:
        """To be told when a node has registered."""

    @abc.abstractmethod
    def lost(self) -> None:
        """A node was given up, as nothing is heard of it. An agent that hangs on a machine at hand is ended, with
        everything on its node, and another takes its place; one elsewhere may only be cut off, and is let be."""

    @abc.abstractmethod
    async def stop(self) -> None:
        """Have them go, with everything on them. Waits, within a deadline."""

    @abc.abstractmethod
    async def withdraw(self) -> None:
        """The server cannot serve: have those go that were made by `start`, and leave those that were there."""


class EmbeddedProvider(NodeProvider):
    """One agent on this machine, supervised."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.loop = asyncio.get_running_loop()
        self.process: subprocess.Popen[bytes] | None = None
        """The agent, when it is our child."""
        self.failures = 0
        self.last_error = ""
        self._stopping = False
        self._owes_sweep = False
        """An agent was killed, and none has cleaned up after it yet."""
        self._listening = False
        self._started_at = 0.0
        self._pidfd = -1
        """Of the agent, ours or one that was there."""
        self._ended = asyncio.Event()
        self._ended.set()
        self._deadline: asyncio.TimerHandle | None = None

    def start(self) -> None:
        if self._stopping:
            return
        self._started_at = time.monotonic()
        self._pidfd = _find_agent(self.config.agent_lock) if LINUX else -1
        if self._pidfd >= 0:
            log.info("a node agent is there already", timeout=ADOPT_TIMEOUT)
            self._await_registering()
        else:
            self._launch()
        self._ended.clear()
        if self._pidfd >= 0:
            self.loop.add_reader(self._pidfd, self._on_exit)
        else:  # not Linux: look now and then
            self.loop.call_later(0.5, self._look)

    def listening(self) -> None:
        self._listening = True
        if self.process is None:
            self._await_registering()

    def _await_registering(self) -> None:
        if self._listening and self._pidfd >= 0 and self._deadline is None:
            self._deadline = self.loop.call_later(ADOPT_TIMEOUT, self._give_up)

    def _launch(self) -> None:
        self.process = self._run_agent()
        if LINUX:
            self._pidfd = os.pidfd_open(self.process.pid)

    def _run_agent(self, *options: str) -> subprocess.Popen[bytes]:
        with (self.config.state_dir / "agent.log").open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "squall.node", *options],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**shared_environ(), "SQUALL_HOME": str(self.config.home)},
                start_new_session=True,
            )

    def registered(self) -> None:
        self._owes_sweep = False  # that is the first thing it does
        self._cancel_deadline()

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        log.warning("the node agent that was there did not register and is killed", timeout=ADOPT_TIMEOUT)
        self._deadline = None
        self._kill()

    def _look(self) -> None:
        if self.process is not None and self.process.poll() is not None:
            self._on_exit()
        elif self.process is not None:
            self.loop.call_later(0.5, self._look)

    def _on_exit(self) -> None:
        if self._pidfd >= 0:
            self.loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        self._cancel_deadline()
        code = self.process.wait() if self.process is not None else None  # of another's child nobody tells us
        self.process = None
        self._owes_sweep = code != 0
        self._ended.set()
        if self._stopping:
            return
        self.on_ended("its agent ended" if code is None else f"its agent ended with code {code}")
        self.failures = 0 if time.monotonic() - self._started_at > HEALTHY_AFTER else self.failures + 1
        self.last_error = _tail(self.config.state_dir / "agent.log")
        delay = min(RESTART_DELAY_LIMIT, RESTART_DELAY * 2 ** min(self.failures, 10))
        log.warning("the node agent ended and is started again", code=code, delay=delay)
        self.loop.call_later(delay, self.start)

    def _signal(self, signum: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self._pidfd >= 0:
                signal.pidfd_send_signal(self._pidfd, signum)
            elif self.process is not None:
                self.process.send_signal(signum)

    def lost(self) -> None:
        if not self._stopping and not self._ended.is_set():
            log.error("the node agent hangs and is killed")
            self._kill()

    def _kill(self) -> None:
        self._signal(signal.SIGKILL)

    async def stop(self) -> None:
        self._stopping = True
        if not self._ended.is_set():
            self._signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self._ended.wait(), STOP_TIMEOUT)
            except asyncio.TimeoutError:
                log.error("the node agent did not end in time and is killed", timeout=STOP_TIMEOUT)
                self._kill()
                await asyncio.wait_for(self._ended.wait(), STOP_TIMEOUT)
        if self._owes_sweep:
            await self.loop.run_in_executor(None, self._sweep)

    def _sweep(self) -> None:
        """Clean up after an agent that was killed, in the place of the next one, which will not be."""
        try:
            with self._run_agent("--sweep") as process:
                try:
                    process.wait(STOP_TIMEOUT)
                except subprocess.TimeoutExpired:
                    process.kill()
                    raise
        except (OSError, subprocess.SubprocessError) as error:
            log.error("what a killed agent left is there until the next start", error=str(error))

    async def withdraw(self) -> None:
        if self.process is not None:
            await self.stop()


def end_agent(config: Config) -> bool:
    """End the agent of a home whose server is gone, with all that it keeps for another; whether there was one."""
    pidfd = _find_agent(config.agent_lock) if LINUX else -1
    if pidfd < 0:
        return False
    try:
        for signum in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signum)
            ended = select.poll()
            ended.register(pidfd, select.POLLIN)
            if ended.poll(STOP_TIMEOUT * 1000):
                break
    finally:
        os.close(pidfd)
    return True


def _find_agent(lock: Path) -> int:
    """A pid descriptor of the agent that holds the lock, -1 when there is none. The pid in the file is that of the
    holder if, with the descriptor open, the lock is still held and the number still there: a dead agent's lock is free,
    and its number, should it be another's by now, is not in a file that is held."""
    try:
        with lock.open("rb") as file:
            if not _is_held(file):
                return -1
            pid = int(file.read(20) or 0)
            pidfd = os.pidfd_open(pid) if pid > 0 else -1
            file.seek(0)
            if pidfd >= 0 and not (_is_held(file) and file.read(20) == str(pid).encode()):
                os.close(pidfd)
                return -1
            return pidfd
    except (OSError, ValueError):
        return -1


def _is_held(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(file, fcntl.LOCK_UN)
    return False


def _tail(path: Path, lines: int = 5) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
