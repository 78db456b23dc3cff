"""The Runtime seam: how a node makes a container, with its simplest implementation in mind (a plain process).

A runtime owns everything between a `ContainerSpec` and a running process tree, and its undoing. It decides no
policy, keeps no truth the kernel does not have, and leaves nothing behind: `close` and `sweep` undo all.
The contract suite is `tests/contract/test_runtime.py`; calls on a container that is gone are harmless.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import squall
from squall.exception import ConflictError, InvalidError, StartupError
from squall.protocol.messages import ContainerSpec

PASSED_VARIABLES = frozenset({"SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"})
PASSED_PREFIXES = ("PIP_", "UV_")


def passed_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The host's certificate, proxy and package settings, which hold in containers too; nothing else of it does."""
    environment = os.environ if environment is None else environment
    return {
        name: value
        for name, value in environment.items()
        if name in PASSED_VARIABLES or name.startswith(PASSED_PREFIXES) or name.lower().endswith("_proxy")
    }


def identity(spec: ContainerSpec) -> dict[str, str]:
    return {"SQUALL_IS_REMOTE": "1", "SQUALL_TASK_ID": spec.container_id}


@dataclass(frozen=True)
class ContainerIO:
    """Descriptors a container gets, owned by the caller, who closes its copies once `create` has returned.

    `runner` is a connected Unix stream socket to the server; `stdout` and `stderr` are write ends of pipes; `control`,
    if it is one, a packet socket over which the runner is given another `runner` should the server be replaced.
    """

    runner: int
    stdout: int
    stderr: int
    control: int = -1


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
        """Wait until the whole process tree is gone and everything of it is undone; if it left very many files, the
        last of them may go later."""

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
    async def exec(self, argv: Sequence[str], *, stdin: int, stdout: int, stderr: int, workdir: str, tty: bool) -> int:
        """Start a command inside, with the container's walls; return its host pid, a child of this process.

        With `tty`, the three descriptors are one terminal and it becomes the controlling one.
        """


@dataclass
class Lease:
    """A network for one container. `netns_fd` is a namespace made inside the workspace's user namespace (CLOEXEC)."""

    netns_fd: int
    resolv_conf: str
    address: str


class NetworkPort(Protocol):
    """Who gives containers their network. A lease is released once, after the last process in it is gone."""

    async def lease(self, workspace: str, userns_fd: int) -> Lease: ...

    def release(self, lease: Lease) -> None: ...


@dataclass
class Build:
    """One command of an image's build."""

    spec: ContainerSpec
    """Limits, workspace, id; its `image` does not count."""
    layers: Sequence[Path] | None
    """Below its root, the topmost first; None to see what `Image.host()` shows."""
    command: list[str]
    environment: dict[str, str]
    workdir: str
    mounts: list[tuple[Path, str, bool]]
    """Host path, target, and whether it may be written to: what is shown beside the layers, and is part of none."""
    output: int
    """Descriptor that its stdout and stderr go to; the caller's."""
    harvest: Callable[[Path], None]
    """Is given its scratch directory when nothing of it runs any more; `u` in it is what was written."""


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
    async def create(
        self, spec: ContainerSpec, io: ContainerIO, source: Path | None, shown: Sequence[tuple[Path, str]] = ()
    ) -> Container:
        """Make a container whose runner serves `io.runner`, with `source` mounted read-only as its working tree, and
        each of `shown`, a path of the node and a target, as well.

        Raises `squall.exception.Error` with the step that failed; nothing of a failed attempt is left.
        """

    @abc.abstractmethod
    async def close(self) -> None:
        """Kill what is alive and undo everything."""


# ---- plain processes --------------------------------------------------------------------------------------------

RUNNER_ENTRY = "squall.runner.execute:serve"
_BOOTSTRAP = """
import sys
sys.path[:] = [p for p in sys.path if p]
sys.path += [p for p in {paths!r} if p not in sys.path]
from squall.runner import main
main.process({runner}, {source!r}, {entry!r}, *{control!r})
"""


class ProcessContainer(Container):
    def __init__(self, spec: ContainerSpec, process: subprocess.Popen[bytes], workdir: Path) -> None:
        self.container_id = spec.container_id
        self.pid = process.pid
        self.steps = {}
        self._process = process
        self._identity = identity(spec)
        self._workdir = workdir
        self._kill_reason = ""
        self._pidfd = os.pidfd_open(process.pid) if hasattr(os, "pidfd_open") else -1
        self._exit = asyncio.get_running_loop().create_task(self._finish())

    async def wait(self) -> Exit:
        return await asyncio.shield(self._exit)

    async def _finish(self) -> Exit:
        await self._ended()
        # Unreaped, so its usage can be read and its number, which is the group's, is nobody else's yet.
        self._signal_group(signal.SIGKILL)
        _, status, used = os.wait4(self.pid, 0)  # noqa: ASYNC222 - it has ended: this does not wait
        code = self._process.returncode = os.waitstatus_to_exitcode(status)
        if self._pidfd >= 0:
            os.close(self._pidfd)
        await asyncio.get_running_loop().run_in_executor(None, shutil.rmtree, self._workdir, True)
        usage = {"cpu_seconds": used.ru_utime + used.ru_stime, "memory_peak_bytes": float(used.ru_maxrss * _RSS_UNIT)}
        return Exit(code if code >= 0 else 128 - code, self._reason(code), False, usage)

    async def _ended(self) -> None:
        loop = asyncio.get_running_loop()
        if self._pidfd < 0:  # macOS
            await loop.run_in_executor(None, os.waitid, os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            return
        ended = asyncio.Event()
        loop.add_reader(self._pidfd, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(self._pidfd)

    def _reason(self, code: int) -> str:
        if code == -signal.SIGKILL and self._kill_reason:
            return self._kill_reason
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"killed by signal {signal.Signals(-code).name}"
            return f"killed by signal {-code}"
        return f"exited with code {code}"

    def _signal_group(self, signum: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signum)

    def signal(self, signum: int) -> None:
        if not self._exit.done() and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signum)

    def kill(self, reason: str) -> None:
        if not self._exit.done() and self._process.returncode is None:
            self._kill_reason = self._kill_reason or reason
            self._signal_group(signal.SIGKILL)

    def usage(self) -> dict[str, float]:
        """Of the process itself, where there is a /proc to read it from."""
        if self._exit.done() or self._process.returncode is not None:
            return {}
        try:
            with open(f"/proc/{self.pid}/stat", encoding="utf-8", errors="replace") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            return {}
        ticks, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
        return {
            "cpu_seconds": (int(fields[11]) + int(fields[12])) / ticks,
            "memory_bytes": float(int(fields[21]) * page),
        }

    async def exec(self, argv: Sequence[str], *, stdin: int, stdout: int, stderr: int, workdir: str, tty: bool) -> int:
        if self._process.returncode is not None:
            raise ConflictError(f"exec in container `{self.container_id}`: it is gone")
        command = list(argv)
        if tty:
            command = [sys.executable, "-c", _TAKE_TERMINAL, *command]
        process = subprocess.Popen(  # noqa: ASYNC220 - it starts the command, and waits for nothing
            command,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=workdir or self._workdir,
            env={**os.environ, **self._identity},
            start_new_session=True,
        )
        process.returncode = 0  # whoever asked reaps it: keep Popen from doing so
        return process.pid


_RSS_UNIT = 1 if sys.platform == "darwin" else 1024
_TAKE_TERMINAL = f"import fcntl, os, sys; fcntl.ioctl(0, {termios.TIOCSCTTY}, 0); os.execvp(sys.argv[1], sys.argv[1:])"


class ProcessRuntime(Runtime):
    """Each container is a plain process of this user: no walls, no limits; for machines where nothing else works."""

    name = "process"

    def __init__(self, home: Path, *, entry: str = RUNNER_ENTRY) -> None:
        self._scratch = Path(home) / "node" / "processes"
        self._entry = entry
        self._containers: dict[str, ProcessContainer] = {}

    @classmethod
    def problems(cls) -> list[str]:
        return []

    def warnings(self) -> list[str]:
        return [
            "containers are plain processes: they can read and write all that this user can, and see each other",
            "memory, cpu and process limits are not enforced, and the network is not restricted",
        ]

    async def start(self) -> None:
        await asyncio.get_running_loop().run_in_executor(None, shutil.rmtree, self._scratch, True)
        self._scratch.mkdir(parents=True, mode=0o700)

    async def create(
        self, spec: ContainerSpec, io: ContainerIO, source: Path | None, shown: Sequence[tuple[Path, str]] = ()
    ) -> Container:
        if spec.image.kind != "host":
            raise InvalidError(
                f"make container `{spec.container_id}` of image `{spec.image.image_id}`: the `process` runtime has no "
                "images but `Image.host()`",
                hint="`squall doctor` says what the native runtime lacks here",
            )
        started = time.monotonic()
        workdir = Path(tempfile.mkdtemp(prefix=f"{spec.container_id}-", dir=self._scratch))
        try:
            process = self._launch(spec, io, source, workdir)
        except OSError as error:
            shutil.rmtree(workdir, ignore_errors=True)
            raise StartupError(f"start a process for container `{spec.container_id}`: {error}") from error
        container = ProcessContainer(spec, process, workdir)
        container.steps = {"spawn": (time.monotonic() - started) * 1000}
        self._containers[spec.container_id] = container
        return container

    def _launch(
        self, spec: ContainerSpec, io: ContainerIO, source: Path | None, workdir: Path
    ) -> subprocess.Popen[bytes]:
        paths = [entry for entry in sys.path[1:] if entry] + [str(Path(squall.__file__).resolve().parent.parent)]
        # Copies: our caller may close its own as soon as we return, and keeps their flags.
        passed = [fcntl.fcntl(fd, fcntl.F_DUPFD, 3) for fd in (io.runner, io.control) if fd >= 0]
        try:
            code = _BOOTSTRAP.format(
                paths=paths,
                runner=passed[0],
                control=passed[1:],
                source=None if source is None else str(source),
                entry=self._entry,
            )
            return subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=io.stdout,
                stderr=io.stderr,
                pass_fds=passed,
                cwd=workdir,
                env={
                    **os.environ,
                    "TMPDIR": str(workdir),
                    "SQUALL_IS_REMOTE": "1",
                    "SQUALL_TASK_ID": spec.container_id,
                },
                start_new_session=True,
            )
        finally:
            for fd in passed:
                os.close(fd)

    async def close(self) -> None:
        for container in self._containers.values():
            container.kill("the node is shutting down")
        await asyncio.gather(*(container.wait() for container in self._containers.values()))
        self._containers.clear()
        await asyncio.get_running_loop().run_in_executor(None, shutil.rmtree, self._scratch, True)
