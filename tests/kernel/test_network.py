"""The network of a node: namespaces ready ahead of need, and nothing left of it, however its agent ends."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from squall._observe import counters
from squall.exception import ConflictError
from squall.node import netlink, uplink
from squall.node.linux import make_user_namespace
from squall.node.network import Network, Pool
from tests.kernel.fake_internet import HOST, SERVER, World, in_namespace, run_in_fake_host, shell, tcp

__all__ = ["run_in_fake_host"]  # a fixture

pytestmark = pytest.mark.root
Run = Callable[..., None]

_NS_GET_USERNS = 0xB701
_VICTIM = """
import asyncio, os, sys
from ipaddress import IPv4Address
from pathlib import Path
from squall.node import uplink
from squall.node.dns import HostResolvers
from squall.node.egress import Policy
from squall._observe import counters
from squall.exception import ConflictError
from squall.node import netlink
from squall.node.linux import make_user_namespace
from squall.node.network import Network
async def main():
    uplink._REMEMBERED = Path(sys.argv[2])
    network = Network(Path(sys.argv[1]), policy=Policy())
    await network.start()
    userns = make_user_namespace(800_000)
    for _ in range(20):
        await network.lease("w", userns)
    print(network._nursery._process.pid, network._host._owner._process.pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


def links() -> list[str]:
    return [name for _, name in socket.if_nameindex() if name.startswith("sq")]


def rules() -> str:
    return shell("nft list ruleset")


def forwarding() -> str:
    return Path("/proc/sys/net/ipv4/ip_forward").read_text().strip()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def start(*argv: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(argv, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.getcwd()})


def test_machine_that_runs_these_tests_can_have_container_networks() -> None:
    assert Network.problems() == []


def test_problem_names_the_missing_program_and_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    (problem,) = Network.problems()
    assert "nft" in problem and "nftables" in problem


def test_namespace_belongs_to_the_workspaces_user_namespace(run_in_fake_host: Run) -> None:
    async def scenario(world: World) -> None:
        async with world.network() as network:
            lease = await network.lease("w", world.userns)
            owner = fcntl.ioctl(lease.netns_fd, _NS_GET_USERNS)
            assert os.fstat(owner).st_ino == os.fstat(world.userns).st_ino
            assert not os.get_inheritable(lease.netns_fd)
            os.close(owner)

    run_in_fake_host(scenario)


def test_lease_on_a_warm_pool_takes_no_time(run_in_fake_host: Run) -> None:
    async def scenario(world: World) -> None:
        async with world.network() as network:
            network.prepare("w", world.userns)
            workspace = network._workspaces["w"]
            await world.until(lambda: len(workspace.ready) >= Pool.READY, "the pool is full")
            began = time.perf_counter()
            for _ in range(Pool.READY):
                await network.lease("w", world.userns)
            assert (time.perf_counter() - began) / Pool.READY < 0.005

    run_in_fake_host(scenario)


def test_no_namespace_and_no_address_is_given_twice(run_in_fake_host: Run) -> None:
    async def scenario(world: World) -> None:
        async with world.network() as network:
            seen = set()
            for _ in range(40):
                lease = await network.lease("w", world.userns)
                assert lease.address not in seen
                seen.add(lease.address)
                network.release(lease)
                network.release(lease)  # harmless
            await world.until(lambda: not network._destroying, "the released are destroyed")
            await world.until(lambda: network._workspaces["w"].filling is None, "the pool is full again")
            assert len(network._used) == len(network._workspaces["w"].ready)

    run_in_fake_host(scenario)


def test_a_new_user_namespace_of_a_workspace_gets_namespaces_of_its_own(run_in_fake_host: Run) -> None:
    async def scenario(world: World) -> None:
        async with world.network() as network:
            await network.lease("w", world.userns)
            newer = make_user_namespace(900_000)
            lease = await network.lease("w", newer)
            owner = fcntl.ioctl(lease.netns_fd, _NS_GET_USERNS)
            assert os.fstat(owner).st_ino == os.fstat(newer).st_ino
            os.close(owner)
            os.close(newer)

    run_in_fake_host(scenario)


def test_release_cuts_off_what_is_left_in_the_namespace(run_in_fake_host: Run) -> None:
    async def scenario(world: World) -> None:
        world.internet.serve(80)
        async with world.network() as network:
            lease = await network.lease("w", world.userns)
            survivor = start("nsenter", f"--net=/proc/{os.getpid()}/fd/{lease.netns_fd}", "sleep", "60")
            path = f"/proc/{survivor.pid}/ns/net"
            inside = os.fstat(lease.netns_fd).st_ino
            await world.until(lambda: os.stat(path).st_ino == inside, "the survivor is inside")
            network.release(lease)
            await world.until(lambda: not network._destroying, "the namespace is destroyed")
            shown = shell(f"nsenter --net={path} ip -o link")
            assert "eth0" not in shown
            survivor.kill()
            survivor.communicate()

    run_in_fake_host(scenario)


def test_connections_of_a_released_address_are_forgotten(run_in_fake_host: Run) -> None:
    async def scenario(world: World) -> None:
        refused = counters().get("network_undo_refused", 0)
        listener = world.internet.listen_udp(9999)
        async with world.network() as network:
            lease = await network.lease("w", world.userns)
            server = await world.inside(lease, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            with server:
                server.sendto(b"hello", (SERVER, 9999))
                _, seen_from = await asyncio.to_thread(listener.recvfrom, 100)
                assert seen_from[0] == HOST
            assert in_namespace(network._router.fd, lambda: tracked(lease.address)) == 1
            network.release(lease)
            await world.until(lambda: not network._destroying, "the namespace is destroyed")
            assert in_namespace(network._router.fd, lambda: tracked(lease.address)) == 0
        assert counters().get("network_undo_refused", 0) == refused

    run_in_fake_host(scenario)


def tracked(address: str) -> int:
    """Connections from an address that are tracked in the namespace of this thread."""
    head = struct.pack("=BBH", socket.AF_INET, 0, 0)
    with netlink.Netlink(netlink.NETFILTER) as conversation:
        bodies = conversation.dump(netlink.Request("list connections", 1 << 8 | 1, 0x300, head))
        return sum(IPv4Address(address).packed in body for body in bodies)


def test_a_cancelled_lease_loses_no_namespace(run_in_fake_host: Run) -> None:
    async def scenario(world: World) -> None:
        async with world.network() as network:
            asking = [asyncio.ensure_future(network.lease("w", world.userns)) for _ in range(10)]
            await asyncio.sleep(0)
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
            workspace = network._workspaces["w"]
            await world.until(lambda: workspace.filling is None, "the pool is filled")
            assert len(network._used) == len(workspace.ready) + len(network._leases)
            await network.lease("w", world.userns)

    run_in_fake_host(scenario)


def test_close_leaves_nothing(run_in_fake_host: Run) -> None:
    async def scenario(world: World) -> None:
        world.internet.serve(80)
        before = (descriptors(), rules(), forwarding())
        async with world.network() as network:
            leases = [await network.lease("w", world.userns) for _ in range(20)]
            assert await world.inside(leases[0], lambda: tcp(SERVER, 80)) == HOST
            assert links() and forwarding() == "1"
            pids = [network._nursery._process.pid, network._host._owner._process.pid]  # type: ignore[union-attr]
        assert links() == []
        assert (rules(), forwarding()) == before[1:]
        assert descriptors() <= before[0] + 4  # threads of asyncio's own pool may have been started meanwhile
        assert not any(is_alive(pid) for pid in pids)
        assert "ip-forward" not in os.listdir(world.home)

    run_in_fake_host(scenario)


def test_kill_of_the_owner_leaves_no_interface_no_rule_and_no_process(run_in_fake_host: Run) -> None:
    async def scenario(world: World) -> None:
        os.mkdir(world.home / "home")
        victim = start(sys.executable, "-c", _VICTIM, str(world.home / "home"), str(world.home / "ip-forward"))
        assert victim.stdout is not None
        pids = [int(pid) for pid in victim.stdout.readline().split()]
        assert links() and "squall_" in rules()
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        victim.stdout.close()
        await world.until(lambda: not links(), "the uplink is gone")
        await world.until(lambda: "squall_" not in rules(), "the table on the host is gone")
        await world.until(lambda: not any(is_alive(pid) for pid in pids), "its children are gone")
        assert forwarding() == "1", "the one thing that a kill leaves, and the next close puts back"
        async with world.network() as network:
            await network.lease("w", world.userns)
        assert forwarding() == "0"

    run_in_fake_host(scenario)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_two_homes_on_one_machine_do_not_disturb_each_other(run_in_fake_host: Run) -> None:
    async def scenario(world: World) -> None:
        world.internet.serve(80)
        async with world.network("second") as second:
            async with world.network("first") as first:
                leases = [await network.lease("w", world.userns) for network in (first, second)]
                assert len(links()) == 2
                for lease in leases:
                    assert await world.inside(lease, lambda: tcp(SERVER, 80)) == HOST
            assert forwarding() == "1"
            assert await world.inside(leases[1], lambda: tcp(SERVER, 80)) == HOST
        assert forwarding() == "0"

    run_in_fake_host(scenario)


def test_forwarding_that_was_on_before_stays_on(run_in_fake_host: Run) -> None:
    async def scenario(world: World) -> None:
        shell("sysctl -qw net.ipv4.ip_forward=1")
        async with world.network():
            assert "ct status != dnat" not in rules(), "what others forward is none of our business"
        assert forwarding() == "1"

    run_in_fake_host(scenario)


def test_a_firewall_that_drops_forwarded_packets_lets_containers_by_and_is_left_as_it_was(
    run_in_fake_host: Run,
) -> None:
    async def scenario(world: World) -> None:
        world.internet.serve(80)
        shell("nft add table ip filter")
        shell("nft 'add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }'")
        before = rules()
        async with world.network() as network:
            lease = await network.lease("w", world.userns)
            assert await world.inside(lease, lambda: tcp(SERVER, 80)) == HOST
        assert rules() == before

    run_in_fake_host(scenario)


def test_network_is_closed_and_put_back_when_the_hosts_rules_are_taken_away(run_in_fake_host: Run) -> None:
    async def scenario(world: World) -> None:
        world.internet.serve(80)
        async with world.network() as network:
            lease = await network.lease("w", world.userns)
            assert network._host is not None and network._host._owner is not None
            old = network._host._owner
            os.kill(old._process.pid, signal.SIGKILL)
            await world.until(lambda: network._host and network._host._owner is not old, "there is a new owner")
            await world.until(lambda: "squall_" in rules(), "the rules are back")
            answers = await world.inside(lease, lambda: [tcp(SERVER, 80) for _ in range(3)])
            assert HOST in answers

    run_in_fake_host(scenario)


def test_nursery_that_was_killed_is_replaced(run_in_fake_host: Run) -> None:
    async def scenario(world: World) -> None:
        async with world.network() as network:
            await network.lease("w", world.userns)
            assert network._nursery is not None
            os.kill(network._nursery._process.pid, signal.SIGKILL)
            network._nursery._process.wait()
            for _ in range(40):
                await network.lease("w", world.userns)

    run_in_fake_host(scenario)


def test_a_second_agent_of_one_home_is_refused(run_in_fake_host: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(world: World) -> None:
        monkeypatch.setattr("squall.node.uplink.NFT_TIMEOUT", 0.5)
        world.internet.serve(80)
        async with world.network() as network:
            lease = await network.lease("w", world.userns)
            second = world.new_network()
            with pytest.raises(ConflictError, match="belongs to a running process"):
                await second.start()
            assert await world.inside(lease, lambda: tcp(SERVER, 80)) == HOST, "the first is not disturbed"

    run_in_fake_host(scenario)


def test_mtu_of_a_container_is_that_of_the_way_to_the_world(run_in_fake_host: Run) -> None:
    async def scenario(world: World) -> None:
        shell("ip link set eth0 mtu 1320")
        async with world.network() as network:
            lease = await network.lease("w", world.userns)
            shown = await world.inside(lease, lambda: shell("ip link show eth0"))
            assert "mtu 1320" in shown

    run_in_fake_host(scenario)


@pytest.mark.slow
def test_five_hundred_namespaces_at_once_come_and_go_without_stopping_the_loop(run_in_fake_host: Run) -> None:
    async def scenario(world: World) -> None:
        async with world.network() as network:
            leases = await asyncio.gather(*(network.lease("w", world.userns) for _ in range(500)))
            assert len({lease.address for lease in leases}) == 500
            began = time.perf_counter()
            for lease in leases:
                network.release(lease)
            assert time.perf_counter() - began < 0.5
            await world.until(lambda: not network._destroying, "all are destroyed")

    run_in_fake_host(scenario)


def test_the_host_rules_are_put_back_on_a_node_with_more_descriptors_than_select_knows() -> None:
    read, write = os.pipe()
    high = fcntl.fcntl(read, fcntl.F_DUPFD_CLOEXEC, 2000)
    try:
        owner = uplink._TableOwner.__new__(uplink._TableOwner)
        owner._table, owner.fd = "t", high
        os.write(write, b"table ip t {\n}\n")
        owner._wait_for_table()
    finally:
        for fd in (read, write, high):
            os.close(fd)
