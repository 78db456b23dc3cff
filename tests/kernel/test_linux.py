"""Kernel calls: how they fail, in which order privileges are given up, and the helpers that make namespaces."""

from __future__ import annotations

import errno
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from squall import _linux
from squall.node import linux, privileges
from squall.node.linux import StepError
from squall.runner import main as inside


def names(calls: list[tuple[object, ...]]) -> list[object]:
    return [call[0] for call in calls]


def test_failed_call_names_itself_its_arguments_and_errno() -> None:
    with pytest.raises(_linux.KernelError, match=r"mount\('overlay', '/no/where', 'overlay', 0, None\): E[A-Z]+ \("):
        _linux.mount("overlay", "/no/where", "overlay")


def test_recorded_calls_do_not_reach_the_kernel() -> None:
    with _linux.recording() as calls:
        _linux.umount("/")
        _linux.pivot_root("a", "b")
    assert calls == [("umount2", b"/", 2), ("pivot_root", b"a", b"b")]


def test_sealing_gives_up_everything_in_an_order_that_works() -> None:
    with _linux.recording() as calls:
        _linux.seal([b"x" * 8, b"y" * 16], 100, bounding=False)
    assert calls == [
        ("setrlimit", "core", 0, "nofile", 100),
        ("prctl", _linux.PR_CAP_AMBIENT, _linux.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0),
        ("prctl", _linux.PR_SET_SECUREBITS, 0xEF, 0, 0, 0),
        ("capset", "all", 0),
        ("prctl", _linux.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        ("seccomp", "SECCOMP_SET_MODE_FILTER", "1 instructions"),
        ("seccomp", "SECCOMP_SET_MODE_FILTER", "2 instructions"),
    ]


def test_sealing_a_build_keeps_the_few_capabilities_it_was_told() -> None:
    with _linux.recording() as calls:
        _linux.seal([b"x" * 8], 100, bounding=True, keep=0b1001)
    assert ("prctl", _linux.PR_CAPBSET_DROP, "all but 0x9") in calls
    assert ("capset", "0x9", 0) in calls
    assert calls[-2:] == [
        ("prctl", _linux.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        ("seccomp", "SECCOMP_SET_MODE_FILTER", "1 instructions"),
    ]


def test_root_is_built_so_that_proc_is_mounted_before_the_old_root_goes() -> None:
    config: dict[str, Any] = {"binds": [], "overrides": {}, "masked": [], "readonly": []}
    order = [name for name, _ in inside._root_steps(config, [])]
    assert order == ["box", "overlay", "collect", "pivot", "binds", "proc", "dev", "detach"]


def test_descriptors_are_closed_around_those_kept() -> None:
    with _linux.recording() as calls:
        _linux.close_all_but([7, 0, 5])
    assert calls == [
        ("close_range", 1, 4, 0),
        ("close_range", 6, 6, 0),
        ("close_range", 8, 0xFFFFFFFF, 0),
    ]


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="forks and pidfds of Linux")
def test_helper_that_fails_tells_step_and_cause() -> None:
    def body(answer: socket.socket) -> None:
        raise OSError(errno.EPERM, "not today")

    with pytest.raises(StepError, match=r"make-something: \[Errno 1\] not today"):
        linux.run_helper("make-something", body)


def test_helper_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux, "_HELPER_TIMEOUT", 0.1)
    started = time.monotonic()
    with pytest.raises(StepError, match=r"make-something: no answer within"):
        linux.run_helper("make-something", lambda answer: time.sleep(60))
    assert time.monotonic() - started < 5


@pytest.mark.root
def test_user_namespace_maps_its_range_and_no_other_id() -> None:
    base = privileges.id_base(3)
    userns = linux.make_user_namespace(base)

    def body(answer: socket.socket) -> None:
        linux.enter_user_namespace(userns)
        answer.send(b"!" + Path("/proc/self/uid_map").read_bytes() + Path("/proc/self/gid_map").read_bytes())

    try:
        with pytest.raises(StepError) as found:
            linux.run_helper("look", body)
    finally:
        os.close(userns)
    assert found.value.message.split()[1:] == ["0", str(base), "65536"] * 2


@pytest.mark.root
def test_empty_proc_shows_no_process() -> None:
    fd = linux.make_empty_proc()
    try:
        entries = os.listdir(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
    assert "meminfo" in entries
    assert not [name for name in entries if name.isdigit()]


@pytest.mark.root
def test_network_maker_makes_fresh_namespaces_of_the_user_namespace() -> None:
    userns = linux.make_user_namespace(privileges.id_base(3))
    maker = linux.NetworkMaker(userns)
    maker.socket.setblocking(True)
    maker.ask()
    maker.ask()
    fds = [maker.receive(), maker.receive()]

    def enter_from_inside(answer: socket.socket) -> None:
        linux.enter_user_namespace(userns)
        _linux.setns(fds[0], _linux.CLONE_NEWNET)
        with socket.socket() as server, socket.socket() as client:
            server.bind((b"127.0.0.1", 0))  # bytes: a name would import a codec, from where only root may read
            server.listen()
            client.connect((b"127.0.0.1", server.getsockname()[1]))

    try:
        assert len({os.fstat(fd).st_ino for fd in fds}) == 2
        assert not any(os.get_inheritable(fd) for fd in fds)
        linux.run_helper("enter", enter_from_inside)
    finally:
        maker.close()
        linux.close_fds([*fds, userns])


def test_status_of_a_process_is_read_as_the_kernel_tells_it() -> None:
    status = linux.read_status(os.getpid())
    assert status.ppid == os.getppid()
    assert status.ns_pids[0] == os.getpid()
    assert os.getuid() in status.uids
