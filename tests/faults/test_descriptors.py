"""A server and its agent that have run out of descriptors: refused politely, nobody else disturbed, and good again."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from squall.client import Client
from squall.exception import ServiceError
from squall.protocol.messages import Ping
from tests.conftest import wait_until
from tests.faults import chaos
from tests.integration import durable, workload
from tests.integration.support import Kept, Wire, containers_of, pid_of

pytestmark = pytest.mark.root


@contextlib.contextmanager
def few_descriptors(pid: int, number: int) -> Iterator[None]:
    """The process may open files up to this number, and no more for now."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (number, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))


def highest(pid: int) -> int:
    return max(int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir())


def used(pid: int) -> float:
    """Seconds of a processor that a process has used."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def crowd(home: Path, number: int) -> list[socket.socket]:
    """Connections that say nothing."""
    found = []
    for _ in range(number):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(5)
        sock.connect(str(home / "run/server.sock"))
        found.append(sock)
    return found


def test_server_without_descriptors_serves_whom_it_has_and_takes_others_again(home: Path) -> None:
    with workload.app.run(output=Kept()):
        assert workload.square.remote(2) == 4
        pid = pid_of(home, "server")
        with few_descriptors(pid, highest(pid) + 8):
            others = crowd(home, 60)
            before = used(pid)
            for n in range(200):
                assert workload.square.remote(n) == n * n
            Client.current().link.request(Ping()).wait(20)
            spent = used(pid) - before
            for sock in others:
                sock.close()
        assert spent < 5, f"{spent} s of a processor for 200 calls: it spins"
        with Wire() as wire:
            assert wire.ask(Ping())[0].TAG == "reply"


def test_store_that_could_not_be_opened_for_want_of_descriptors_is_opened_when_there_are_some(home: Path) -> None:
    with workload.app.run(output=Kept()):
        assert workload.square.remote(2) == 4
        pid = pid_of(home, "server")
        with few_descriptors(pid, highest(pid) + 1):
            with pytest.raises(ServiceError, match="no descriptors left"):
                workload.square.spawn(3)
            assert workload.square.remote(3) == 9
        wait_until(spawns, "the Store is open")


def spawns() -> bool:
    try:
        return workload.square.spawn(4).get(timeout=30) == 16
    except ServiceError:
        return False


def test_call_that_needs_a_container_waits_until_the_server_has_descriptors(home: Path) -> None:
    with workload.app.run(output=Kept()), durable.app.run(output=Kept()):
        assert workload.square.spawn(2).get(timeout=30) == 4
        pid = pid_of(home, "server")
        with few_descriptors(pid, highest(pid) + 1):
            call = durable.step.spawn(0.0, 5)
            assert workload.square.remote(3) == 9
        assert call.get(timeout=60) == 5


def test_agent_without_descriptors_starts_nothing_and_goes_on_when_it_has_some(home: Path) -> None:
    with workload.app.run(output=Kept()), chaos.app.run(output=Kept()):
        assert workload.square.remote(2) == 4
        pid = pid_of(home, "node")
        with few_descriptors(pid, highest(pid) + 1):
            call = chaos.work.spawn("a", 1)
            before = used(pid)
            for n in range(200):
                assert workload.square.remote(n) == n * n
            assert used(pid) - before < 5
        assert call.get(timeout=60)[:2] == ("a", 1)
        assert pid_of(home, "node") == pid
        wait_until(lambda: containers_of("work"), "it is listed")
