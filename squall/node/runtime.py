"""The Runtime seam: how a node makes a container, with its simplest implementation in mind (a plain process).

A runtime owns everything between a `ContainerSpec` and a running process tree, and its undoing. It decides no
policy, keeps no truth the kernel does not have, and leaves nothing behind: `close` and `sweep` undo all.
The contract suite is `tests/contract/test_runtime.py`; calls on a container that is gone are harmless.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from squall.protocol.messages import ContainerSpec


@dataclass(frozen=True)
class ContainerIO:
    """Descriptors a container gets, owned by the caller, who closes its copies once `create` has returned.

    `runner` is a connected Unix stream socket to the server; `stdout` and `stderr` are write ends of pipes.
    """

    runner: int
    stdout: int
    stderr: int


@dataclass
class Exit:
    """How a container ended. `code` is 128+n for signal n; -1 when nobody could see it."""

    code: int
    reason: str
    oom: bool = False
    usage: dict[str, float] = field(default_factory=dict)
    """`cpu_seconds`, `memory_peak_bytes`, as far as the runtime can tell."""


class Container(abc.ABC):
    """A container that stands: its walls were checked from the host before `Runtime.create` returned it."""

    container_id: str
    pid: int
    """Host pid of the init (pid 1 of the container), or of the process itself where there is no init."""
    steps: dict[str, float]
    """Name -> milliseconds of how it was made, in order; the parts of a cold start that `squall trace` shows."""

    @abc.abstractmethod
    async def wait(self) -> Exit:
        """Wait until the whole process tree is gone and everything of it is undone."""

    @abc.abstractmethod
    def signal(self, signum: int) -> None:
        """Send a signal to the init, which forwards it. Harmless when it is gone."""

    @abc.abstractmethod
    def kill(self, reason: str) -> None:
        """SIGKILL all of it now. Harmless when it is gone; `reason` ends up in `Exit.reason`."""

    @abc.abstractmethod
    def usage(self) -> dict[str, float]:
        """`cpu_seconds` and `memory_bytes` now; empty when it is gone."""

    @abc.abstractmethod
    def exec(self, argv: Sequence[str], *, stdin: int, stdout: int, stderr: int, workdir: str, tty: bool) -> int:
        """Start a command inside, with the container's walls; return its host pid, a child of this process.

        With `tty`, the three descriptors are one terminal and it becomes the controlling one.
        """


class Runtime(abc.ABC):
    name: str

    @classmethod
    @abc.abstractmethod
    def problems(cls) -> list[str]:
        """Why this runtime cannot work on this machine, in sentences with the fix; empty when it can."""

    @abc.abstractmethod
    def warnings(self) -> list[str]:
        """Protections that are missing while this runtime is in use, in sentences."""

    @abc.abstractmethod
    async def start(self) -> None:
        """Sweep what an earlier life left, then prepare; warms the zygote of `Image.host()` where there are zygotes."""

    @abc.abstractmethod
    async def create(self, spec: ContainerSpec, io: ContainerIO, source: Path | None) -> Container:
        """Make a container whose runner serves `io.runner`, with `source` mounted read-only as its working tree.

        Raises `squall.exception.Error` with the step that failed; nothing of a failed attempt is left.
        """

    @abc.abstractmethod
    async def close(self) -> None:
        """Kill what is alive and undo everything."""
