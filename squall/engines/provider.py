"""The NodeProvider seam: where machines come from; with the embedded provider, which is this machine.

The embedded provider runs one agent as a child process and starts it anew when it dies, with a delay that grows while
it keeps dying. It decides nothing about containers. Tested in `tests/integration/test_kills.py`.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from squall._observe import Logger
from squall.config import Config, shared_environ

log = Logger("server")

RESTART_DELAY = 0.1
RESTART_DELAY_LIMIT = 10.0
HEALTHY_AFTER = 10.0
STOP_TIMEOUT = 15.0


class NodeProvider(abc.ABC):
    @abc.abstractmethod
    def start(self) -> None:
        """Make the nodes come; they register by themselves."""

    @abc.abstractmethod
    def kill(self) -> None:
        """End an agent that hangs, at once, with everything on its node; another takes its place."""

    @abc.abstractmethod
    async def stop(self) -> None:
        """Have them go, with everything on them. Waits, within a deadline."""


class EmbeddedProvider(NodeProvider):
    """One agent on this machine, supervised."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.loop = asyncio.get_running_loop()
        self.process: subprocess.Popen[bytes] | None = None
        self.failures = 0
        self.last_error = ""
        self._stopping = False
        self._started_at = 0.0
        self._pidfd = -1
        self._ended = asyncio.Event()

    def start(self) -> None:
        if self._stopping:
            return
        log_path = self.config.state_dir / "agent.log"
        with log_path.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "squall.node"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**shared_environ(), "SQUALL_HOME": str(self.config.home)},
                start_new_session=True,
            )
        self._started_at = time.monotonic()
        self._ended.clear()
        if hasattr(os, "pidfd_open"):
            self._pidfd = os.pidfd_open(self.process.pid)
            self.loop.add_reader(self._pidfd, self._on_exit)
        else:  # not Linux: look now and then
            self.loop.call_later(0.5, self._look)

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
        assert self.process is not None
        code = self.process.wait()
        self.process = None
        self._ended.set()
        if self._stopping:
            return
        self.failures = 0 if time.monotonic() - self._started_at > HEALTHY_AFTER else self.failures + 1
        self.last_error = _tail(self.config.state_dir / "agent.log")
        delay = min(RESTART_DELAY_LIMIT, RESTART_DELAY * 2 ** min(self.failures, 10))
        log.warning("the node agent ended and is started again", code=code, delay=delay)
        self.loop.call_later(delay, self.start)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()

    async def stop(self) -> None:
        self._stopping = True
        process = self.process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._ended.wait(), STOP_TIMEOUT)
        except asyncio.TimeoutError:
            log.error("the node agent did not end in time and is killed", timeout=STOP_TIMEOUT)
            process.kill()
            await asyncio.wait_for(self._ended.wait(), STOP_TIMEOUT)


def _tail(path: Path, lines: int = 5) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
