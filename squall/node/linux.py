"""What the agent asks of the kernel in several steps: a private mount namespace, user and network namespaces, joins.

Built on `squall._linux`, the only file with ctypes. Owns the helper processes it forks for single steps and reaps
them; must never leave a descriptor inheritable, nor trust what a process says about itself where /proc can tell.
Tested in `tests/kernel/test_linux.py`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import select
import signal
import socket
import struct
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from squall import _linux
from squall.exception import Error
from squall.node.privileges import ID_RANGE

NAMESPACES = ("mnt", "pid", "net", "ipc", "uts", "user")
_HELPER_TIMEOUT = 10.0


class StepError(Error):
    """A step of making something in the kernel failed; the message names step, call and errno."""

    def __init__(self, step: str, cause: object, *, hint: str = "") -> None:
        super().__init__(f"{step}: {cause}", hint=hint)
        self.step = step


_private_mounts: int | None = None


def enter_private_mounts() -> None:
    """Give this process a mount namespace of its own, once, before it has threads.

    A slave of the host's: what the host mounts or unmounts later is followed, and nothing of ours is ever seen there.
    """
    global _private_mounts
    if has_private_mounts():
        return
    _linux.unshare(_linux.CLONE_NEWNS)
    _linux.mount(None, "/", None, _linux.MS_REC | _linux.MS_SLAVE)
    _private_mounts = namespace_id(os.getpid(), "mnt")


def has_private_mounts() -> bool:
    return _private_mounts is not None and _private_mounts == namespace_id(os.getpid(), "mnt")


def namespace_id(pid: int, kind: str) -> int:
    return os.stat(f"/proc/{pid}/ns/{kind}").st_ino


@functools.lru_cache(maxsize=4)
def _namespaces(pid: int) -> dict[str, int]:
    return {kind: namespace_id(pid, kind) for kind in NAMESPACES}


def own_namespaces() -> dict[str, int]:
    """Kind -> id of this process's, which stay what they are once its mounts are private."""
    return _namespaces(os.getpid())


def open_namespace(pid: int, kind: str) -> int:
    return os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)


def fork() -> int:
    """`os.fork` from a process that may have threads: the child may only run prepared code and must end in `_exit`."""
    sys.stdout.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def fork_child(body: Callable[[], object]) -> int:
    """Run `body` in a child that ends after it; its failure is exit code 1 and a line on stderr."""
    pid = fork()
    if pid:
        return pid
    code = 1
    try:
        body()
        code = 0
    except BaseException as error:
        with contextlib.suppress(BaseException):
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def run_helper(step: str, body: Callable[[socket.socket], None]) -> list[int]:
    """Fork a helper that does one step and sends back descriptors (`send_fds`); its error becomes a StepError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def child() -> None:
        _linux.set_parent_death_signal(signal.SIGKILL)
        try:
            body(theirs)
        except Exception as error:
            theirs.send(b"!" + str(error).encode()[:4096])

    with ours:
        pid = fork_child(child)
        theirs.close()
        try:
            return _receive_from_helper(step, ours)
        finally:
            ours.close()
            reap(pid, _HELPER_TIMEOUT)


def _receive_from_helper(step: str, ours: socket.socket) -> list[int]:
    ours.settimeout(_HELPER_TIMEOUT)
    found: list[int] = []
    while True:
        try:
            data, fds, _, _ = socket.recv_fds(ours, 8192, 32)
        except TimeoutError:
            close_fds(found)
            raise StepError(step, f"no answer within {_HELPER_TIMEOUT:.0f} s") from None
        found += fds
        for fd in fds:
            os.set_inheritable(fd, False)
        if not data:
            return found
        if data.startswith(b"!"):
            close_fds(found)
            raise StepError(step, data[1:].decode(errors="replace"))


def is_readable(fd: int, timeout: float) -> bool:
    """Wait for a descriptor of any number (`select` knows those below 1024 only)."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


def close_fds(fds: list[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def reap(pid: int, timeout: float) -> int:
    """Wait for a child of ours, killing it after `timeout` seconds. Its exit code, negative for a signal."""
    fd = os.pidfd_open(pid)
    try:
        if not is_readable(fd, timeout):
            os.kill(pid, signal.SIGKILL)
    finally:
        os.close(fd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ---- user namespaces --------------------------------------------------------------------------------------------


def make_user_namespace(base: int) -> int:
    """A descriptor of a new user namespace that maps 0..65535 to `base` and up; it lives while someone holds it."""
    ready_r, ready_w = os.pipe()
    done_r, done_w = os.pipe()

    def hold() -> None:
        os.close(done_w)
        _linux.unshare(_linux.CLONE_NEWUSER)
        os.write(ready_w, b"1")
        os.read(done_r, 1)

    pid = fork_child(hold)
    try:
        os.close(ready_w)
        os.close(done_r)
        if not is_readable(ready_r, _HELPER_TIMEOUT) or os.read(ready_r, 1) != b"1":
            raise StepError(
                "make-user-namespace",
                "unshare(CLONE_NEWUSER) failed",
                hint="allow user namespaces: `sysctl user.max_user_namespaces=65536`",
            )
        for kind in ("uid", "gid"):
            with open(f"/proc/{pid}/{kind}_map", "w", encoding="ascii") as file:
                file.write(f"0 {base} {ID_RANGE}")
        return open_namespace(pid, "user")
    finally:
        os.close(ready_r)
        os.close(done_w)
        reap(pid, _HELPER_TIMEOUT)


def enter_user_namespace(userns: int) -> None:
    """Become its root: all capabilities there, none outside."""
    _linux.setns(userns, _linux.CLONE_NEWUSER)
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


# ---- an empty proc ----------------------------------------------------------------------------------------------


def make_empty_proc() -> int:
    """A detached mount of the procfs of a pid namespace in which nothing lives.

    A zygote needs a fully visible proc in its mount namespace, or the kernel refuses its children theirs; and it must
    not see the host's.
    """

    def mount(answer: socket.socket) -> None:
        _linux.unshare(_linux.CLONE_NEWPID)
        pid = os.fork()
        if pid:
            os.waitpid(pid, 0)
            return
        try:
            fd = _linux.filesystem("proc", {}, _linux.ATTR_NOSUID | _linux.ATTR_NODEV | _linux.ATTR_NOEXEC)
            socket.send_fds(answer, [b"proc"], [fd])
        except BaseException as error:
            answer.send(b"!" + str(error).encode())
        os._exit(0)

    fds = run_helper("mount-empty-proc", mount)
    if len(fds) != 1:
        close_fds(fds)
        raise StepError("mount-empty-proc", f"the helper sent {len(fds)} descriptors, not 1")
    return fds[0]


# ---- network namespaces -----------------------------------------------------------------------------------------

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1


def bring_up_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("16sH14x", b"lo", 0)
        flags = struct.unpack("16sH14x", fcntl.ioctl(probe, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(probe, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | _IFF_UP))


class NetworkMaker:
    """A small process in a user namespace that makes network namespaces on request (3-4 ms each, off our loop).

    Only a namespace made inside the user namespace can be entered by that user namespace's processes.
    """

    def __init__(self, userns: int) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.setblocking(False)
        self.pid = fork_child(lambda: self._serve(userns, theirs))
        theirs.close()

    def ask(self) -> None:
        """Ask for one more; it arrives on `socket`."""
        self.socket.send(b"n")

    def receive(self) -> int:
        """A descriptor that has arrived. Raises BlockingIOError when none has, StepError when making it failed."""
        data, fds, _, _ = socket.recv_fds(self.socket, 4096, 1)
        if len(fds) != 1:
            raise StepError("make-network-namespace", data[1:].decode(errors="replace") or "the helper is gone")
        os.set_inheritable(fds[0], False)
        return fds[0]

    def close(self) -> None:
        self.socket.close()
        reap(self.pid, 1.0)

    @staticmethod
    def _serve(userns: int, requests: socket.socket) -> None:
        _linux.set_parent_death_signal(signal.SIGKILL)
        parent = os.getppid()
        _linux.close_all_but([0, 1, 2, requests.fileno(), userns])
        enter_user_namespace(userns)
        _linux.set_parent_death_signal(signal.SIGKILL)  # entering cleared it
        if os.getppid() != parent:
            return
        while _has_request(requests):
            try:
                _linux.unshare(_linux.CLONE_NEWNET)
                bring_up_loopback()
                fd = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                requests.send(b"!" + str(error).encode())
                continue
            socket.send_fds(requests, [b"net"], [fd])
            os.close(fd)


def _has_request(requests: socket.socket) -> bool:
    try:
        return bool(requests.recv(16))
    except ConnectionResetError:  # the agent died with something of ours unread
        return False


# ---- what /proc says about a process ----------------------------------------------------------------------------


_PF_EXITING = 4


@dataclass(frozen=True)
class Status:
    """The lines of /proc/PID/status that walls are judged by."""

    ppid: int
    ns_pids: tuple[int, ...]
    uids: frozenset[int]
    gids: frozenset[int]
    capabilities: int
    """All five sets or-ed together: zero means that each is empty."""
    no_new_privs: bool
    seccomp_mode: int
    seccomp_filters: int
    threads: int


def _read(path: str) -> str:
    """A file of /proc, by one call wherever it is short: each start of a container reads several."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = piece = os.read(fd, 16384)
        while piece:
            piece = os.read(fd, 65536)
            data += piece
    finally:
        os.close(fd)
    return data.decode("utf-8", "replace")


def read_status(pid: int) -> Status:
    """Raises FileNotFoundError or ProcessLookupError when it is gone."""
    lines = dict(line.split(":", 1) for line in _read(f"/proc/{pid}/status").splitlines() if ":" in line)
    caps = 0
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        caps |= int(lines[name], 16)
    return Status(
        ppid=int(lines["PPid"]),
        ns_pids=tuple(map(int, lines.get("NSpid", str(pid)).split())),
        uids=frozenset(map(int, lines["Uid"].split())),
        gids=frozenset(map(int, (lines["Gid"] + " " + lines.get("Groups", "")).split())),
        capabilities=caps,
        no_new_privs=lines.get("NoNewPrivs", "0").strip() == "1",
        seccomp_mode=int(lines.get("Seccomp", "0")),
        seccomp_filters=int(lines.get("Seccomp_filters", "0")),
        threads=int(lines["Threads"]),
    )


def memory_share(pid: int) -> int:
    """Bytes of memory a process takes, pages it shares with others in proportion; 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
            return next((int(line.split()[1]) << 10 for line in file if line.startswith("Pss:")), 0)
    except (OSError, ValueError):
        return 0


def is_ending(pid: int) -> bool:
    """Whether a process is gone, dead or has begun to exit, which it cannot pretend."""
    try:
        flags = int(_read(f"/proc/{pid}/stat").rpartition(")")[2].split()[6])
    except OSError:
        return True
    return bool(flags & _PF_EXITING)


def children_of(pid: int) -> Iterator[int]:
    """Direct children, by the kernel's list."""
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                yield from map(int, _read(f"/proc/{pid}/task/{task}/children").split())


def reap_strays(first: int, known: set[int]) -> None:
    """Reap dead children we never asked for: what a workspace's processes left when a zygote ended.

    Only ids from `first` up are a workspace's; children of asyncio or of a library are never among them.
    """
    for pid in list(children_of(os.getpid())):
        if pid in known:
            continue
        with contextlib.suppress(OSError, KeyError, ValueError):
            if min(read_status(pid).uids) >= first:
                os.waitpid(pid, os.WNOHANG)


def wait_until(condition: Callable[[], bool], timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def is_gone(error: OSError) -> bool:
    return error.errno in (errno.ESRCH, errno.ENOENT, errno.ECHILD)
