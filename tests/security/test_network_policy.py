"""What a container must not reach, and the little it must: attacked from inside, in a world of namespaces.

Probes run as root of the machine inside the container's network namespace, with rights no container has; the walls
stand outside of it, so they must hold all the same.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from functools import partial
from ipaddress import IPv4Address

import pytest

from tests.kernel.fake_internet import (
    ANSWER,
    HOST,
    METADATA,
    PRIVATE,
    RESOLVER,
    SERVER,
    World,
    ask_by_tcp,
    ask_by_udp,
    greeter,
    in_namespace,
    query,
    run_in_fake_host,
    send_raw,
    shell,
    tcp,
    udp_packet,
)

__all__ = ["run_in_fake_host"]  # a fixture

pytestmark = pytest.mark.root
Run = Callable[..., None]
GATEWAY = "169.254.1.1"
REFUSED = {"EHOSTUNREACH", "ECONNREFUSED", "ENETUNREACH", "timeout"}


def test_container_reaches_the_internet_from_the_hosts_address(run_in_fake_host: Run) -> None:
    async def scenario(world: World) -> None:
        world.internet.serve(80)
        async with world.network() as network:
            lease = await network.lease("w", world.userns)
            assert await world.inside(lease, lambda: tcp(SERVER, 80)) == HOST

    run_in_fake_host(scenario)


@pytest.mark.parametrize("address", [PRIVATE, METADATA, RESOLVER])
def test_container_is_refused_a_private_address_at_once(run_in_fake_host: Run, address: str) -> None:
    async def scenario(world: World) -> None:
        world.internet.serve(80)
        async with world.network() as network:
            lease = await network.lease("w", world.userns)
            assert tcp(address, 80) == HOST, "the host itself reaches it"
            assert await world.inside(lease, lambda: tcp(address, 80)) == "EHOSTUNREACH"

    run_in_fake_host(scenario)


def test_container_cannot_reach_a_port_of_the_host_by_any_of_its_addresses(run_in_fake_host: Run) -> None:
    async def scenario(world: World) -> None:
        with greeter("0.0.0.0", 8080):
            async with world.network() as network:
                lease = await network.lease("w", world.userns)
                uplink = [name for _, name in socket.if_nameindex() if name.startswith("sq")]
                shown = shell(f"ip -4 -o addr show {uplink[0]}")
                for address in (HOST, "127.0.0.1", shown.split()[3].split("/")[0], GATEWAY):
                    assert await world.inside(lease, partial(tcp, address, 8080, 1.0)) in REFUSED, address

    run_in_fake_host(scenario)


def test_container_cannot_reach_a_port_the_host_publishes_by_rewriting(run_in_fake_host: Run) -> None:
    async def scenario(world: World) -> None:
        world.internet.serve(80)
        for rule in (
            "add table ip engine",
            "add chain ip engine pre { type nat hook prerouting priority -100; }",
            f"add rule ip engine pre ip daddr {HOST} tcp dport 8080 dnat to {SERVER}:80",
        ):
            shell(f"nft '{rule}'")
        async with world.network() as network:
            lease = await network.lease("w", world.userns)
            assert await world.inside(lease, lambda: tcp(HOST, 8080, 1.0)) in REFUSED

    run_in_fake_host(scenario)


def test_containers_cannot_reach_each_other_even_in_one_workspace(run_in_fake_host: Run) -> None:
    async def scenario(world: World) -> None:
        async with world.network() as network:
            one, other = [await network.lease("w", world.userns) for _ in range(2)]
            server = await world.inside(other, lambda: greeter("0.0.0.0", 80))
            with server:
                assert await world.inside(other, lambda: tcp(other.address, 80)) == other.address
                assert await world.inside(one, lambda: tcp(other.address, 80, 1.0)) in REFUSED

    run_in_fake_host(scenario)


def test_container_cannot_be_reached_from_outside(run_in_fake_host: Run) -> None:
    async def scenario(world: World) -> None:
        shell("sysctl -qw net.ipv4.ip_forward=1")  # a host that passes on what others send it
        async with world.network() as network:
            lease = await network.lease("w", world.userns)
            with await world.inside(lease, lambda: greeter("0.0.0.0", 80)):
                link = next(line for line in shell("ip -4 route").splitlines() if " dev sq" in line).split("/")[0]
                router = str(IPv4Address(link) + 2)
                shell(f"ip route add {lease.address} via {router}")  # as a neighbour of the host could, too
                for address in (lease.address, router):
                    assert await asyncio.to_thread(tcp, address, 80, 1.0) in REFUSED, address

                def from_the_internet() -> str:
                    shell(f"ip route add {lease.address} via {HOST}")
                    return tcp(lease.address, 80, 1.0)

                assert await asyncio.to_thread(in_namespace, world.internet.fd, from_the_internet) in REFUSED

    run_in_fake_host(scenario)


def test_forged_source_addresses_never_leave_the_router(run_in_fake_host: Run) -> None:
    async def scenario(world: World) -> None:
        listener = world.internet.listen_udp(9999)
        async with world.network() as network:
            one, other = [await network.lease("w", world.userns) for _ in range(2)]
            forged = (other.address, "0.0.0.0", GATEWAY, "127.0.0.1", SERVER, "8.8.8.8")

            def attack() -> None:
                for source in forged:
                    send_raw(udp_packet(source, SERVER, 9999, b"forged"))
                send_raw(udp_packet(one.address, SERVER, 9999, b"honest"))

            await world.inside(one, attack)
            assert await asyncio.to_thread(listener.recv, 100) == b"honest", "sent last, so nothing else came through"

    run_in_fake_host(scenario)


def test_protocols_other_than_tcp_udp_and_icmp_never_leave_the_router(run_in_fake_host: Run) -> None:
    async def scenario(world: World) -> None:
        listener = world.internet.listen_udp(9999)
        async with world.network() as network:
            lease = await network.lease("w", world.userns)
            sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0003))

            def attack() -> None:
                for protocol in (2, 4, 41, 47, 50, 132):  # IGMP, IP in IP, IPv6 in IP, GRE, ESP, SCTP
                    send_raw(udp_packet(lease.address, SERVER, 9999, b"odd", protocol))
                send_raw(udp_packet(lease.address, SERVER, 9999, b"honest"))

            with sniffer:
                sniffer.setblocking(False)
                await world.inside(lease, attack)
                await asyncio.to_thread(listener.recv, 100)
                assert _protocols_seen(sniffer) <= {1, 17}

    run_in_fake_host(scenario)


def _protocols_seen(sniffer: socket.socket) -> set[int]:
    """Of what passed on the fake host, whichever interface."""
    seen: set[int] = set()
    while True:
        try:
            packet, where = sniffer.recvfrom(2048)
        except BlockingIOError:
            return seen
        if where[1] == 0x0800:
            seen.add(packet[9])


def test_container_has_no_ipv6_but_its_own_loopback(run_in_fake_host: Run) -> None:
    async def scenario(world: World) -> None:
        async with world.network() as network:
            lease = await network.lease("w", world.userns)
            with await world.inside(lease, lambda: greeter("0.0.0.0", 80)):
                shown = await world.inside(lease, lambda: shell("ip -6 -o addr"))
                assert [line.split()[1] for line in shown.splitlines()] in ([], ["lo"])
                mapped = await world.inside(lease, lambda: tcp("::ffff:" + PRIVATE, 80, 1.0))
                assert mapped in REFUSED

    run_in_fake_host(scenario)


def test_an_opening_is_for_one_address_and_one_port(run_in_fake_host: Run) -> None:
    async def scenario(world: World) -> None:
        world.internet.serve(3128)
        world.internet.serve(80)
        with greeter(HOST, 3141), greeter(HOST, 8080):
            async with world.network(openings=((PRIVATE, 3128), (HOST, 3141))) as network:
                lease = await network.lease("w", world.userns)
                assert await world.inside(lease, lambda: tcp(PRIVATE, 3128)) == HOST
                assert await world.inside(lease, lambda: tcp(PRIVATE, 80)) == "EHOSTUNREACH"
                assert await world.inside(lease, lambda: tcp(HOST, 3141)) not in REFUSED, "an index on the host itself"
                assert await world.inside(lease, lambda: tcp(HOST, 8080, 1.0)) in REFUSED

    run_in_fake_host(scenario)


def test_names_are_answered_through_the_forwarder_and_not_by_the_resolver_itself(run_in_fake_host: Run) -> None:
    async def scenario(world: World) -> None:
        world.internet.serve_dns()
        async with world.network() as network:
            lease = await network.lease("w", world.userns)
            assert lease.resolv_conf == f"nameserver {GATEWAY}\nsearch example.test\noptions ndots:2\n"
            asks: list[Callable[[str, bytes], bytes | None]] = [ask_by_udp, ask_by_tcp]
            for ask in asks:
                answer = await world.inside(lease, partial(ask, GATEWAY, query("pypi.org")))
                assert answer is not None
                assert answer[:2] == b"\x12\x34" and answer[-4:] == socket.inet_aton(ANSWER)
            assert await world.inside(lease, lambda: ask_by_udp(RESOLVER, query("pypi.org"), 1.0)) is None

    run_in_fake_host(scenario)


def test_forged_answers_are_passed_over_and_ids_are_not_the_containers(run_in_fake_host: Run) -> None:
    async def scenario(world: World) -> None:
        world.internet.serve_dns()
        world.internet.forge_answers = True
        async with world.network() as network:
            lease = await network.lease("w", world.userns)
            for _ in range(5):
                answer = await world.inside(lease, lambda: ask_by_udp(GATEWAY, query("pypi.org")))
                assert answer is not None and answer[12:].startswith(query("pypi.org")[12:])
            ids = {asked[:2] for asked in world.internet.questions}
            assert len(ids) > 1 and ids != {b"\x12\x34"}

    run_in_fake_host(scenario)


def test_malformed_questions_reach_no_resolver(run_in_fake_host: Run) -> None:
    async def scenario(world: World) -> None:
        world.internet.serve_dns()
        good = query("a.test")
        bad = [b"", b"\0" * 11, good[:-1], good[:2] + b"\x81" + good[3:], good[:5] + b"\2" + good[6:], b"\xff" * 600]
        async with world.network() as network:
            lease = await network.lease("w", world.userns)

            def attack() -> None:
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
                    for message in bad:
                        asker.sendto(message, (GATEWAY, 53))

            await world.inside(lease, attack)
            await world.inside(lease, lambda: ask_by_udp(GATEWAY, good))
            assert len(world.internet.questions) == 1

    run_in_fake_host(scenario)


def test_without_a_resolver_the_container_learns_of_the_failure(run_in_fake_host: Run) -> None:
    async def scenario(world: World) -> None:  # nobody listens at the resolver's port
        async with world.network() as network:
            lease = await network.lease("w", world.userns)
            answer = await world.inside(lease, lambda: ask_by_udp(GATEWAY, query("a.test")))
            assert answer is not None and answer[3] & 0xF == 2

    run_in_fake_host(scenario)


def test_a_container_that_opens_too_many_connections_leaves_the_others_theirs(run_in_fake_host: Run) -> None:
    async def scenario(world: World) -> None:
        listener = world.internet.listen_udp(9999)
        async with world.network() as network:
            one, other = [await network.lease("w", world.userns) for _ in range(2)]

            def flood() -> None:
                with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM) as wire:
                    for port in range(1, 6000):
                        packet = udp_packet(one.address, SERVER, port, b"x")
                        wire.sendto(packet, ("eth0", 0x0800, 0, 0, bytes.fromhex("025371000001")))

            await world.inside(one, flood)
            await world.inside(one, lambda: send_raw(udp_packet(one.address, SERVER, 9999, b"too many")))
            await world.inside(other, lambda: send_raw(udp_packet(other.address, SERVER, 9999, b"honest")))
            assert await asyncio.to_thread(listener.recv, 100) == b"honest"

    run_in_fake_host(scenario)
