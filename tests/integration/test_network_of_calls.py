"""What a function reaches: the internet by default but neither the node nor its neighbours; nothing when blocked."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.integration import workload
from tests.integration.support import Kept

pytestmark = pytest.mark.root


@pytest.fixture(scope="module", autouse=True)
def app(shared_home: Path) -> Iterator[None]:
    with workload.app.run(output=Kept()):
        yield


@pytest.fixture
def listener() -> Iterator[int]:
    """A server on every address of this machine."""
    with socket.create_server(("", 0)) as server:
        yield server.getsockname()[1]


def own_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no network")
        return str(probe.getsockname()[0])


def test_a_function_has_a_network_and_a_blocked_one_only_itself() -> None:
    assert len(workload.interfaces.remote()) == 2
    assert workload.interfaces_blocked.remote() == ["lo"]


def test_a_function_reaches_no_service_of_its_node(listener: int) -> None:
    socket.create_connection((own_address(), listener), timeout=3).close()
    assert workload.connect_to.remote(own_address(), listener) != "reached"
    assert workload.connect_to.remote("127.0.0.1", listener) == "ConnectionRefusedError"


@pytest.mark.parametrize("address", ["169.254.169.254", "10.0.0.1", "192.168.0.1", "100.64.0.1"])
def test_a_function_reaches_no_private_address(address: str) -> None:
    assert workload.connect_to.remote(address, 80) != "reached"


def test_a_blocked_function_reaches_nothing() -> None:
    assert workload.connect_blocked.remote("192.0.2.1", 443) == "OSError"


def test_one_container_does_not_reach_another() -> None:
    kept = Kept()
    with workload.speaking.run(output=kept):
        workload.listen.spawn()
        wait_until(lambda: kept.text("listen").endswith(b"\n"), "it listens")
        address, port = kept.text("listen").split()
        assert workload.connect_to.remote(address.decode(), int(port)) != "reached"
