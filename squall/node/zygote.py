"""Host side of zygotes and of the shells they fork: start, ask, verify, join, end.

A zygote belongs to a tenant from its first instruction: what it sends is bounded and checked, what it does not send
in time kills it. Whom a process is, is learnt from the kernel alone (credentials on a socket, then /proc). Owns the
processes it started and reaps them; must never give a zygote a descriptor but its own socket, each shell's, and the
read-only trees of source that containers of its workspace have asked for.
`_launch_steps` is the order to read first. Tested in `tests/kernel/test_native.py`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import fcntl
import json
import os
import resource
import signal
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from squall import _linux
from squall._observe import Logger
from squall.node import linux, privileges
from squall.node.cgroups import Cgroup
from squall.node.linux import StepError
from squall.node.privileges import ID_RANGE
from squall.node.removal import Removals
from squall.node.rootfs import Root, source_tree

ZYGOTE_TIMEOUT = 20.0
"""From exec to the last warm import."""
SHELL_TIMEOUT = 5.0
"""For each answer of a shell; a zygote that keeps one waiting longer is killed."""
MESSAGE_LIMIT = 64 * 1024
_QUEUE_LIMIT = 16
_PROCESS_LIMIT = 256
"""A container that is being made has two processes; when we are late, its code may have started more."""
_CREDENTIALS = struct.Struct("3i")
_SHM_BYTES = 1 << 30
_BUNDLES = 1000
"""How many bundles of source are remembered to have been compiled."""
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "TMPDIR": "/tmp",
}
_THREAD_LIMITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")

_log = Logger("zygote")


# ---- sockets to the inside --------------------------------------------------------------------------------------


class Channel:
    """Our end of a packet socket whose other end a tenant may hold: bounded messages, each with its sender's pid."""

    def __init__(self) -> None:
        self.socket, self.peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.socket.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._messages: deque[tuple[bytes, int]] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False
        self._loop.add_reader(self.socket.fileno(), self._read)

    def _read(self) -> None:
        while not self._ended:
            try:
                data, ancillary, _, _ = self.socket.recvmsg(MESSAGE_LIMIT, 256, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                break
            except ConnectionResetError:
                continue  # it died with something of ours unread: what it sent before is still there
            except OSError:
                data, ancillary = b"", []
            pid = _sender(ancillary)
            if not data or len(self._messages) >= _QUEUE_LIMIT:
                self._ended = True
                self._loop.remove_reader(self.socket.fileno())
            else:
                self._messages.append((data, pid))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def receive(self, step: str, timeout: float) -> tuple[bytes, int]:
        """The next message and the pid of its sender, as the kernel tells it."""
        deadline = self._loop.time() + timeout
        while not self._messages:
            if self._ended:
                raise StepError(step, "the process ended before it answered")
            self._waiter = self._loop.create_future()
            try:
                await asyncio.wait_for(self._waiter, max(0.0, deadline - self._loop.time()))
            except (TimeoutError, asyncio.TimeoutError):
                raise StepError(step, f"no answer within {timeout:g} s") from None
        return self._messages.popleft()

    def pending(self) -> list[tuple[bytes, int]]:
        """What has arrived by now; used when the other side is gone."""
        self._read()
        found = list(self._messages)
        self._messages.clear()
        return found

    def send(self, message: Mapping[str, object], fds: Sequence[int] = ()) -> None:
        socket.send_fds(self.socket, [json.dumps(message).encode()], fds)

    def close(self) -> None:
        if self.socket.fileno() >= 0:
            self._loop.remove_reader(self.socket.fileno())
        self.socket.close()
        self.peer.close()


def _sender(ancillary: list[tuple[int, int, bytes]]) -> int:
    """The sender's pid; closes descriptors nobody asked for."""
    pid = 0
    for level, kind, data in ancillary:
        if level != socket.SOL_SOCKET:
            continue
        if kind == socket.SCM_CREDENTIALS and len(data) >= _CREDENTIALS.size:
            pid = _CREDENTIALS.unpack(data[: _CREDENTIALS.size])[0]
        elif kind == socket.SCM_RIGHTS:
            linux.close_fds(list(struct.unpack(f"{len(data) // 4}i", data[: len(data) // 4 * 4])))
    return pid


def _parse(step: str, data: bytes) -> dict[str, Any]:
    """A message from inside: a JSON object, or an error it reports about itself."""
    try:
        message = json.loads(data)
    except ValueError:
        raise StepError(step, f"answered with {data[:80]!r} instead of a message") from None
    if not isinstance(message, dict):
        raise StepError(step, f"answered with {data[:80]!r} instead of a message")
    if "error" in message:
        raise StepError(step, str(message["error"])[:4000])
    return message


def _steps(message: dict[str, Any], since: float) -> dict[str, float]:
    """Durations in milliseconds from clock readings a container sent; readings that cannot be are dropped."""
    found: dict[str, float] = {}
    entries = message.get("steps")
    for entry in entries[:32] if isinstance(entries, list) else []:
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], float)):
            continue
        name, at = str(entry[0])[:32], entry[1]
        if since <= at <= time.monotonic():
            found[name] = (at - since) * 1000
            since = at
    return found


# ---- zygote -----------------------------------------------------------------------------------------------------


@dataclass
class ZygotePlan:
    """All that a zygote is made from."""

    root: Root
    tree: Path
    """Where the agent mounted its root."""
    userns: int
    first_id: int
    group: Cgroup
    entry: str
    """`module:function` of the runner's loop."""
    environment: dict[str, str] = field(default_factory=dict)
    """Of the image: where its Python is found, and what that obeys."""


def _launch_steps(plan: ZygotePlan, control: int, log: int) -> list[tuple[str, Callable[[], None]]]:
    """The order in which a forked child of the agent becomes a tenant's process. Each step needs the ones before."""
    namespaces = _linux.CLONE_NEWNS | _linux.CLONE_NEWIPC | _linux.CLONE_NEWUTS | _linux.CLONE_NEWNET
    return [
        # While we are still root of the machine: groups cannot be joined from inside a user namespace.
        ("join-cgroup", lambda: plan.group.join(os.getpid())),
        ("set-limits", _set_limits),
        # The way here is closed to tenants (0700), so walk it now; the namespace's copy keeps us at its copy.
        ("enter-tree", lambda: os.chdir(plan.tree)),
        ("enter-user-namespace", lambda: linux.enter_user_namespace(plan.userns)),
        # After the user namespace, so that it owns these: the mounts' flags are locked by this very copy.
        ("new-namespaces", lambda: _linux.unshare(namespaces)),
        ("change-root", _change_root),
        ("redirect-streams", lambda: _redirect(control, log)),
        # Last, as it denies some of the above; no_new_privs so that no file of the image can add to it.
        ("no-new-privileges", _linux.no_new_privileges),
        ("install-filter", lambda: _linux.install_filter(privileges.zygote_filter())),
        ("die-with-parent", lambda: _linux.set_parent_death_signal(signal.SIGKILL)),
    ]


def _set_limits() -> None:
    _linux.limit_resources(privileges.NOFILE)
    with contextlib.suppress(ValueError, OSError):  # even root may lack the right; then the present limit holds
        resource.setrlimit(resource.RLIMIT_NPROC, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("300")


def _change_root() -> None:
    """Make a copy of the tree we stand in the root. Its top is not locked, as the tree's own is; all below it stays."""
    _linux.mount(None, "/", None, _linux.MS_REC | _linux.MS_PRIVATE)
    fd = _linux.open_tree(".")
    _linux.move_mount(fd, ".")
    os.fchdir(fd)
    _linux.pivot_root(".", ".")
    _linux.umount(".")
    os.chdir("/")


_CONTROL_FD = 3


def _redirect(control: int, log: int) -> None:
    """Descriptors 0 to 3 are null, log, log and the socket; there is no other."""
    null = os.open("/dev/null", os.O_RDWR)
    high = [os.dup(fd) for fd in (null, log, log, control)]
    if min(high) <= _CONTROL_FD:
        raise RuntimeError(f"descriptors {high} are too low to be moved")
    for wanted, fd in enumerate(high):
        os.dup2(fd, wanted, inheritable=True)
    _linux.close_from(_CONTROL_FD + 1)


def bootstrap(paths: Sequence[str], call: str) -> str:
    """The `-c` line: imports what the agent imports, without the current directory that `-c` puts first."""
    return (
        f"import sys; sys.path[:] = [p for p in sys.path if p]; "
        f"sys.path += [p for p in {list(paths)!r} if p not in sys.path]; "
        f"from squall.runner import main; main.{call}"
    )


def image_bootstrap(paths: Sequence[str], call: str) -> str:
    """The same for an image's own Python, whatever it is: Squall's packages come before any of the image's."""
    return (
        "import sys; sys.version_info >= (3, 10) or sys.exit('the Python of the image is %d.%d and containers need "
        "3.10 or newer' % sys.version_info[:2]); "
        f"sys.path[:] = {list(paths)!r} + [p for p in sys.path if p]; from squall.runner import main; main.{call}"
    )


def _become_zygote(plan: ZygotePlan, parent: int, control: socket.socket, log: int) -> None:
    name = "start"
    try:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, set())
        os.setsid()
        for name, step in _launch_steps(plan, control.fileno(), log):
            step()
            if name == "redirect-streams":
                control = socket.socket(fileno=os.dup(_CONTROL_FD))
                control.set_inheritable(False)
        if os.getppid() != parent:
            return
        environment = {**ENVIRONMENT, **dict.fromkeys(_THREAD_LIMITS, "1")}
        name = "exec"
        call = f"zygote({_CONTROL_FD})"
        if plan.root.layers:
            code = image_bootstrap(plan.root.import_paths, call)
            environment.update(plan.environment)
        else:
            code = bootstrap(plan.root.import_paths, call)
        try:
            os.execvpe(plan.root.python, [plan.root.python, "-c", code], environment)
        except FileNotFoundError:
            raise FileNotFoundError(f"the image has no `{plan.root.python}` on its PATH") from None
    except Exception as error:
        control.send(json.dumps({"error": f"{name}: {error}"}).encode())


class Zygote:
    """A running parent of one image's containers for one workspace."""

    def __init__(self, plan: ZygotePlan, executor: Executor) -> None:
        self.plan = plan
        self._executor = executor
        self.channel = Channel()
        self.pid = 0
        self.pidfd = -1
        self.ended = asyncio.get_running_loop().create_future()
        self.log_tail = bytearray()
        self.status = 0
        self.namespaces: dict[str, int] = {}
        """Kind -> id, from the moment it was ready: nothing it may call can change them."""
        self._compiled: set[Path] = set()
        self._log_fd = -1
        self._is_doomed = False

    @property
    def is_alive(self) -> bool:
        return self.pidfd >= 0 and not self._is_doomed and not self.ended.done()

    async def start(self) -> None:
        """Fork, contain, exec, warm up. On failure nothing of it is left."""
        loop = asyncio.get_running_loop()
        self._log_fd, log = os.pipe()
        os.set_blocking(self._log_fd, False)
        parent = os.getpid()
        self.pid = linux.fork_child(lambda: _become_zygote(self.plan, parent, self.channel.peer, log))
        self.pidfd = os.pidfd_open(self.pid)
        os.close(log)
        self.channel.peer.close()
        loop.add_reader(self._log_fd, self._read_log)
        loop.add_reader(self.pidfd, self._on_end)
        try:
            self.channel.send(self._config())
            data, _ = await self.channel.receive("start-zygote", ZYGOTE_TIMEOUT)
            _parse("start-zygote", data)
            self._check()
        except BaseException as error:
            await self.close("it did not start")
            if isinstance(error, StepError) and self.log_tail:
                raise StepError("start-zygote", f"{error.message}; it wrote: {self.log_text()}") from error
            raise

    def _config(self) -> dict[str, object]:
        return {
            "entry": self.plan.entry,
            "filter": base64.b64encode(privileges.container_filter()).decode(),
            "binds": [*self.plan.root.binds, *(target for _, target in self.plan.root.mounts)],
            "lower": len(self.plan.root.layers),
            "overrides": self.plan.root.overrides,
            "masked": [path for path in privileges.MASKED_PATHS if os.path.exists(path)],
            "readonly": [path for path in privileges.READONLY_PATHS if os.path.exists(path)],
            "nofile": privileges.NOFILE,
            "shm_bytes": _SHM_BYTES,
        }

    def _check(self) -> None:
        """A process with threads must not fork, and one outside its user namespace must not live."""
        status = linux.read_status(self.pid)
        if status.threads != 1:
            raise StepError("start-zygote", f"it has {status.threads} threads after its imports: it cannot fork safely")
        self.namespaces = {kind: linux.namespace_id(self.pid, kind) for kind in linux.NAMESPACES}
        if self.namespaces["user"] != os.fstat(self.plan.userns).st_ino:
            raise StepError("start-zygote", "it is not in its workspace's user namespace")

    def _read_log(self) -> None:
        try:
            data = os.read(self._log_fd, 65536)
        except BlockingIOError:
            return
        if not data:
            asyncio.get_running_loop().remove_reader(self._log_fd)
            return
        self.log_tail += data
        del self.log_tail[:-4096]

    def log_text(self) -> str:
        return self.log_tail.decode(errors="backslashreplace").strip()

    def _on_end(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.pidfd)
        with contextlib.suppress(ChildProcessError):
            self.status = os.waitpid(self.pid, 0)[1]
        if not self.ended.done():
            self.ended.set_result(None)

    def request(self, shell: Shell) -> None:
        """Ask for a shell. Raises StepError when the zygote is gone or takes nothing more."""
        try:
            fds = [shell.channel.peer.fileno(), *shell.layers]
            self.channel.send({"scratch": shell.name, **shell.request}, fds)
        except OSError as error:
            raise StepError("fork-shell", f"the zygote takes no request: {error}") from error

    def compile(self, source: Path) -> None:
        """Have it compile a bundle for the containers to come, once. It does so when it has nothing else to do, and
        what becomes of it is its own affair: they can do without."""
        if source in self._compiled or not self.is_alive:
            return
        if len(self._compiled) >= _BUNDLES:
            self._compiled.clear()
        self._compiled.add(source)
        tree = source_tree(source)
        try:
            self.channel.send({"compile": True}, [tree])
        except OSError as error:
            _log.debug("a bundle is not compiled ahead", source=str(source), error=str(error))
        finally:
            os.close(tree)

    def kill(self) -> None:
        self._is_doomed = True
        if self.pidfd >= 0 and not self.ended.done():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    async def close(self, reason: str) -> None:
        """End it and remove its group; containers it forked live on."""
        self.kill()
        if self.pidfd >= 0:
            await asyncio.wait_for(asyncio.shield(self.ended), SHELL_TIMEOUT)
            os.close(self.pidfd)
            self.pidfd = -1
        code = os.waitstatus_to_exitcode(self.status)
        _log.debug("zygote ended", reason=reason, pid=self.pid, code=code)
        loop = asyncio.get_running_loop()
        if self._log_fd >= 0:
            self._read_log_rest()
        self.channel.close()
        await loop.run_in_executor(self._executor, self.plan.group.remove)

    def _read_log_rest(self) -> None:
        with contextlib.suppress(OSError):
            self._read_log()
        asyncio.get_running_loop().remove_reader(self._log_fd)
        os.close(self._log_fd)
        self._log_fd = -1


# ---- shells -----------------------------------------------------------------------------------------------------


@dataclass
class Shell:
    """A container that is made but nobody's yet: own namespaces and root, in its group, waiting to be dressed."""

    name: str
    group: Cgroup
    scratch: Path
    channel: Channel
    pid: int = 0
    pidfd: int = -1
    steps: dict[str, float] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    """Of its runner, which commands that join it get as well."""
    request: dict[str, Any] = field(default_factory=dict)
    """What the zygote is told of this shell beside its name: how a build's differs."""
    layers: list[int] = field(default_factory=list)
    """Trees below a build's root, the topmost first; the caller's descriptors."""
    harvest: Callable[[Path], None] | None = None
    """Takes what it wrote from the scratch directory, once no process of it is left."""
    ended: asyncio.Future[int] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """The wait status, once reaped."""

    def watch(self) -> None:
        asyncio.get_running_loop().add_reader(self.pidfd, self._on_end)

    def _on_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self.pidfd)
        status = 0
        with contextlib.suppress(ChildProcessError):
            status = os.waitpid(self.pid, 0)[1]
        if not self.ended.done():
            self.ended.set_result(status)

    @property
    def is_alive(self) -> bool:
        return self.pidfd >= 0 and not self.ended.done()

    def has_ended(self) -> bool:
        """Asks the kernel, as our loop may not have heard of it yet."""
        return not self.is_alive or linux.is_readable(self.pidfd, 0)

    def send_signal(self, signum: int) -> None:
        if self.is_alive:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signum)

    async def receive(self, step: str) -> dict[str, Any]:
        """The next message, from this very process: a tenant's zygote may hold a copy of the socket."""
        data, pid = await self.channel.receive(step, SHELL_TIMEOUT)
        if pid != self.pid:
            raise StepError(step, f"process {pid} answered in place of {self.pid}")
        return _parse(step, data)

    async def undo(self, executor: Executor, removals: Removals) -> None:
        """Kill it and remove its group and files; of very many files the last may go later. Harmless to repeat."""
        try:
            await self._end(executor)
        finally:
            await removals.remove(self.scratch)

    async def _end(self, executor: Executor) -> None:
        self.send_signal(signal.SIGKILL)
        if self.pidfd >= 0:
            await asyncio.wait_for(asyncio.shield(self.ended), SHELL_TIMEOUT)
            os.close(self.pidfd)
            self.pidfd = -1
        self.channel.close()
        await asyncio.get_running_loop().run_in_executor(executor, self._remove)

    def _remove(self) -> None:
        self.group.remove()
        if self.harvest is not None:
            harvest, self.harvest = self.harvest, None
            harvest(self.scratch)


async def fork_shell(zygote: Zygote, shell: Shell, executor: Executor) -> None:
    """Have a zygote fork `shell`, put it into its group from outside while it builds its root, wait until it stands."""
    asked = time.monotonic()
    zygote.request(shell)
    shell.channel.peer.close()
    data, pid = await shell.channel.receive("fork-shell", SHELL_TIMEOUT)
    if data != b"hello":
        _parse("fork-shell", data)
        raise StepError("fork-shell", f"answered with {data[:80]!r} instead of a greeting")
    _adopt(zygote, shell, pid)
    await asyncio.get_running_loop().run_in_executor(executor, _join, shell.group, pid)
    shell.steps = _steps(await shell.receive("build-root"), asked)
    shell.steps["cgroup"] = max(0.0, (time.monotonic() - asked) * 1000 - sum(shell.steps.values()))


def _join(group: Cgroup, pid: int) -> None:
    group.create()
    group.join(pid)


def _adopt(zygote: Zygote, shell: Shell, pid: int) -> None:
    """Take a process as the shell, if the kernel says it is one: our child, the first of its pid namespace, its ids."""
    if pid <= 1:
        raise StepError("fork-shell", f"the kernel names no process of ours as sender (pid {pid})")
    try:
        fd = os.pidfd_open(pid)
        status = linux.read_status(pid)
    except OSError as error:
        raise StepError("fork-shell", f"process {pid} is gone: {error}") from error
    first = zygote.plan.first_id
    is_ours = (
        status.ppid == os.getpid()
        and len(status.ns_pids) == 2
        and status.ns_pids[1] == 1
        and all(first <= uid < first + ID_RANGE for uid in status.uids)
    )
    if not is_ours:
        os.close(fd)
        raise StepError("fork-shell", f"process {pid} is not a new container of this zygote: {status}")
    shell.pid, shell.pidfd = pid, fd
    shell.watch()


# ---- exec -------------------------------------------------------------------------------------------------------

_JOINED = (
    _linux.CLONE_NEWUSER | _linux.CLONE_NEWNS | _linux.CLONE_NEWPID | _linux.CLONE_NEWNET
    | _linux.CLONE_NEWIPC | _linux.CLONE_NEWUTS | _linux.CLONE_NEWCGROUP
)  # fmt: skip


async def join_and_exec(shell: Shell, argv: list[str], streams: tuple[int, int, int], workdir: str, tty: bool) -> int:
    """Start `argv` behind a container's walls. A helper joins; its sibling, a child of ours, becomes the command.

    The fork is made here and not in a thread: the command dies with whoever forked the helper, and a thread may end.
    """
    report, answer = os.pipe()
    parent = os.getpid()

    def helper() -> None:
        _linux.prctl(_linux.PR_SET_DUMPABLE, 0)  # nobody inside may look at us or our executable while we join
        step = "join-cgroup"
        try:
            shell.group.join_self()
            step = "join-namespaces"
            _linux.setns(shell.pidfd, _JOINED)
            os.setgroups([])
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
            step = "fork"
            pid = _linux.clone(_linux.CLONE_PARENT)
            if pid:
                os.write(answer, json.dumps({"pid": pid}).encode())
                return
        except OSError as error:
            os.write(answer, json.dumps({"error": f"{step}: {error}"}).encode())
            return
        _run_command(argv, streams, workdir, tty, environment)

    environment = shell.environment or ENVIRONMENT
    pid = linux.fork_child(helper)
    os.close(answer)
    message = {"error": f"the helper did not answer within {SHELL_TIMEOUT:g} s"}
    try:
        if await _is_readable(report, SHELL_TIMEOUT):
            message = json.loads(os.read(report, 65536) or b'{"error": "the helper ended without a word"}')
    finally:
        os.close(report)
        await _end_helper(pid)
    if "error" in message:
        raise StepError(f"exec in process {shell.pid} of {parent}", message["error"])
    return int(message["pid"])


async def _is_readable(fd: int, timeout: float) -> bool:
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(fd, readable.set)
    try:
        await asyncio.wait_for(readable.wait(), timeout)
    except (TimeoutError, asyncio.TimeoutError):
        return False
    finally:
        loop.remove_reader(fd)
    return True


async def _end_helper(pid: int) -> None:
    """Reap a helper that has nothing more to do; one that does not end by itself is killed."""
    fd = os.pidfd_open(pid)
    try:
        if not await _is_readable(fd, 1.0):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
            await _is_readable(fd, 1.0)
    finally:
        os.close(fd)
        os.waitpid(pid, os.WNOHANG)  # noqa: ASYNC222 - this does not wait


def _run_command(
    argv: list[str], streams: tuple[int, int, int], workdir: str, tty: bool, environment: dict[str, str]
) -> None:
    try:
        os.setsid()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 64) for fd in streams]
        for wanted, fd in enumerate(high):
            os.dup2(fd, wanted)
        if tty:
            fcntl.ioctl(0, _TIOCSCTTY, 0)
        _linux.close_from(3)
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(signum, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, set())
        os.umask(0o022)
        _linux.seal([privileges.zygote_filter(), privileges.container_filter()], privileges.NOFILE)
        _linux.set_parent_death_signal(signal.SIGKILL)
        os.chdir(workdir)
        environment = {**environment, "TERM": "xterm-256color" if tty else "dumb"}
        os.execvpe(argv[0], argv, environment)
    except OSError as error:
        missing = error.errno in (errno.ENOENT, errno.EACCES, errno.ENOTDIR)
        os.write(2, f"exec `{argv[0]}` in `{workdir}`: {error.strerror}\n".encode(errors="replace"))
        os._exit(127 if missing else 126)


_TIOCSCTTY = 0x540E


# ---- walls, seen from the host ----------------------------------------------------------------------------------


def check_walls(shell: Shell, zygote: Zygote, network: int, capabilities: int = 0) -> None:
    """Judge a sealed container by /proc. Nothing that matters is given to it before this has returned.

    All its processes are judged: its init forks the runner as soon as it is sealed, and a tenant's may have forked
    something before it joined its group or gave up its rights. `capabilities`: those a build may have, in its user
    namespace.
    """
    _check_process(shell.pid, shell, zygote, network, capabilities)
    own_pids = linux.namespace_id(shell.pid, "pid")
    for pid in _descendants(shell.pid):
        try:
            if linux.namespace_id(pid, "pid") != own_pids:
                raise StepError("check-walls", f"process {pid} of container {shell.pid} is in another pid namespace")
            _check_process(pid, shell, zygote, network, capabilities)
        except OSError:
            continue  # it has ended
        except StepError:
            if not linux.is_ending(pid):  # then the kernel names no namespaces and groups of it any more
                raise


def _descendants(pid: int) -> Iterator[int]:
    waiting = [pid]
    for _ in range(_PROCESS_LIMIT):
        if not waiting:
            return
        for child in linux.children_of(waiting.pop()):
            waiting.append(child)
            yield child
    raise StepError("check-walls", f"container {pid} has more than {_PROCESS_LIMIT} processes before it was handed out")


def _check_process(pid: int, shell: Shell, zygote: Zygote, network: int, capabilities: int) -> None:
    status = linux.read_status(pid)
    first = zygote.plan.first_id
    mine = range(first, first + ID_RANGE)
    namespaces = {kind: linux.namespace_id(pid, kind) for kind in linux.NAMESPACES}
    agent = linux.own_namespaces()
    facts = {
        "it is in its own control group": shell.group.holds(pid),
        f"it has no capability {'but a build has' if capabilities else 'in any set'}": (
            status.capabilities & ~capabilities == 0
        ),
        "no_new_privs is set": status.no_new_privs,
        "both system call filters are on": status.seccomp_mode == 2 and status.seccomp_filters >= 2,
        "its ids are in the workspace's range": all(i in mine for i in status.uids | status.gids),
        "it is in the workspace's user namespace": namespaces["user"] == os.fstat(zygote.plan.userns).st_ino,
        "it is in its own network namespace": namespaces["net"] == os.fstat(network).st_ino,
        "it shares no namespace with the node": all(namespaces[kind] != agent[kind] for kind in linux.NAMESPACES),
        "it shares no namespace with its zygote": all(
            namespaces[kind] != zygote.namespaces[kind] for kind in ("mnt", "pid", "net", "ipc", "uts")
        ),
    }
    failed = [fact for fact, holds in facts.items() if not holds]
    if failed:
        raise StepError("check-walls", f"not true of process {pid}: {'; '.join(failed)} ({status})")
