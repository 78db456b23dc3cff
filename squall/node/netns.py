"""Makes network namespaces inside a workspace's user namespace, from a small process of its own.

A network namespace can be entered only from the user namespace that owns it, so it has to be made from in there:
somebody enters the workspace's user namespace, and that must not be the agent. Owns that process (the nursery) and
the few bytes spoken with it. It never wires or configures anything, and it never holds a descriptor but its control
socket, so nothing of the node can leak into a workspace through it.

Why nobody inside can touch it although it stands in the tenant's user namespace with all capabilities there: it is in
none of the tenant's pid namespaces, so it cannot be named, and its memory belongs to the user namespace in which it
was exec'd, the host's; once it is not dumpable, ptrace asks for CAP_SYS_PTRACE *there*, which no tenant has.

It is exec'd and forks single-threaded: a fork of the agent would take along every descriptor it holds (the router's
namespace, other tenants' sockets) and whatever lock another of its threads held at that moment.
"""

from __future__ import annotations

import array
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from squall import _linux
from squall.exception import Error, ServiceError

BATCH = 32
"""Namespaces asked for at once, at most."""
TIMEOUT = 10.0
"""Seconds until the next namespace of a batch; making one takes about a millisecond."""

_START = "import sys; sys.path.insert(0, sys.argv[1]); from squall.node import netns; netns.serve(int(sys.argv[2]))"
_ROOT = Path(__file__).parents[2]


class Nursery:
    """The agent's side. Threads may use it at the same time: each batch has a socket of its own."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # -I -S: nothing of the environment and no site directory decides what runs here, and it starts faster.
            argv = [sys.executable, "-I", "-S", "-c", _START, str(_ROOT), str(theirs.fileno())]
            self._process = subprocess.Popen(
                argv, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env={}, cwd="/"
            )
        self._socket = ours
        self._socket.settimeout(TIMEOUT)

    def make(self, userns_fd: int, count: int) -> Iterator[int]:
        """Make namespaces in the user namespace and yield a descriptor of each as it comes. Stops early, never late."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(TIMEOUT)
        with ours:
            with theirs:
                try:
                    socket.send_fds(self._socket, [b"%d" % min(count, BATCH)], [userns_fd, theirs.fileno()])
                except OSError as error:
                    raise ServiceError(
                        f"making network namespaces: the process that makes them is gone: {error}"
                    ) from None
            while (fd := _receive(ours)) >= 0:
                yield fd

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        self._socket.close()  # its reading end: the nursery ends by itself
        try:
            self._process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(TIMEOUT)


def _receive(reply: socket.socket) -> int:
    """The next namespace, or -1 after the last."""
    try:
        message, fds = _receive_fds(reply, 1)
    except TimeoutError:
        raise ServiceError(f"making a network namespace: nothing came within {TIMEOUT:g} s") from None
    if fds:
        return fds[0]
    if message:
        raise Error(f"making a network namespace in the workspace's user namespace: {message.decode(errors='replace')}")
    return -1


def _receive_fds(connection: socket.socket, count: int) -> tuple[bytes, list[int]]:
    """Close-on-exec from the start: `socket.recv_fds` takes flags and does not pass them on."""
    room = socket.CMSG_SPACE(count * 4)
    message, ancillary, _, _ = connection.recvmsg(4096, room, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return message, list(fds)


# ---- inside the nursery -------------------------------------------------------------------------------------------


def serve(control_fd: int) -> None:
    """Fork a child for each batch until the agent is gone. Its children die with it, it dies with its agent."""
    _linux.set_parent_death_signal(signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped by the kernel
    control = socket.socket(fileno=control_fd)
    while True:
        request, fds = _receive_fds(control, 2)
        if not request:
            return
        userns_fd, reply_fd = fds
        if os.fork() == 0:
            control.close()
            _serve_batch(userns_fd, socket.socket(fileno=reply_fd), int(request))
        os.close(userns_fd)
        os.close(reply_fd)


def _serve_batch(userns_fd: int, reply: socket.socket, count: int) -> None:
    try:
        reply.settimeout(TIMEOUT)
        for fd in _made(userns_fd, count):
            socket.send_fds(reply, [b"n"], [fd])
            os.close(fd)
    except OSError as error:
        reply.send(str(error).encode()[:1000])
    finally:
        os._exit(0)


def _made(userns_fd: int, count: int) -> Iterator[int]:
    # Entering does not clear the flag by itself: root owns the user namespace, so its capabilities count as a subset.
    _linux.prctl(_linux.PR_SET_DUMPABLE, 0)
    _linux.setns(userns_fd, _linux.CLONE_NEWUSER)
    _linux.set_parent_death_signal(signal.SIGKILL)  # after setns: a change of credentials clears it
    for _ in range(count):
        _linux.unshare(_linux.CLONE_NEWNET)
        yield os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
