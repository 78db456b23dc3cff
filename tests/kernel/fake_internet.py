"""A host with an internet behind it, all in network namespaces of the test's own: nothing here touches the machine.

`run_in_fake_host` runs a scenario in a thread whose network namespace is that host's; threads and processes started
from there are in it too, so a `Network` under test takes it for the machine. Both namespaces end with the scenario.

    fake host  203.0.113.2 ──── 203.0.113.1  internet  198.51.100.7, 10.9.9.9, 10.9.9.53, 169.254.169.254
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shlex
import socket
import struct
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import TypeVar

import pytest

from squall import _linux
from squall.node import netlink, uplink
from squall.node.dns import HostResolvers
from squall.node.egress import Opening, Policy
from squall.node.linux import make_user_namespace
from squall.node.netlink import LOOPBACK, End, Netlink
from squall.node.network import Network
from squall.node.runtime import Lease

T = TypeVar("T")

HOST, SERVER, PRIVATE, RESOLVER, METADATA = "203.0.113.2", "198.51.100.7", "10.9.9.9", "10.9.9.53", "169.254.169.254"
ANSWER = "192.0.2.99"
"""What the fake resolver says every name's address is."""
PATIENCE = 10.0
ID_BASE = 700_000


def in_namespace(fd: int, body: Callable[[], T]) -> T:
    """Run `body` in a thread that is in a network namespace, and wait for it."""
    with ThreadPoolExecutor(1, initializer=_linux.setns, initargs=(fd, _linux.CLONE_NEWNET)) as thread:
        return thread.submit(body).result(PATIENCE * 3)


def shell(command: str) -> str:
    """What a short command prints, in the namespace of this thread. Blocks the loop, which has nothing else to do."""
    return subprocess.run(shlex.split(command), check=True, capture_output=True, text=True, timeout=PATIENCE).stdout


def new_namespace(body: Callable[[], None] = lambda: None) -> int:
    """A descriptor of a new network namespace in which `body` has run."""

    def make() -> int:
        _linux.unshare(_linux.CLONE_NEWNET)
        body()
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result(PATIENCE)


def tcp(address: str, port: int, timeout: float = 3.0) -> str:
    """What a server says to who connects, or the name of the error that connecting ends with."""
    try:
        with socket.create_connection((address, port), timeout) as connection:
            return connection.recv(100).decode()
    except TimeoutError:
        return "timeout"
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def udp_packet(source: str, target: str, port: int, payload: bytes, protocol: int = socket.IPPROTO_UDP) -> bytes:
    """An IPv4 packet with whatever source address one likes."""
    datagram = struct.pack("!HHHH", 5000, port, 8 + len(payload), 0) + payload
    head = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, 20 + len(datagram), 7, 0, 64, protocol, 0, *map(_packed, (source, target))
    )
    total = sum(struct.unpack("!10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    return head[:10] + struct.pack("!H", ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF) + head[12:] + datagram


def _packed(address: str) -> bytes:
    return IPv4Address(address).packed


def send_raw(packet: bytes) -> None:
    """Put a packet on eth0 below everything that would check it, as one with CAP_NET_RAW could."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM) as wire:
        wire.sendto(packet, ("eth0", 0x0800, 0, 0, bytes.fromhex("025371000001")))


def query(name: str, query_id: int = 0x1234) -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return struct.pack("!HHHHHH", query_id, 0x0100, 1, 0, 0, 0) + labels + b"\0\0\1\0\1"


def answer_to(asked: bytes, query_id: int | None = None) -> bytes:
    head = asked[:2] if query_id is None else struct.pack("!H", query_id)
    record = b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, 60, 4) + IPv4Address(ANSWER).packed
    return head + struct.pack("!HHHHH", 0x8180, 1, 1, 0, 0) + asked[12:] + record


def ask_by_udp(server: str, asked: bytes, timeout: float = 15.0) -> bytes | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        asker.settimeout(timeout)
        try:
            asker.connect((server, 53))
            asker.send(asked)
            return asker.recv(4096)
        except OSError:
            return None


def ask_by_tcp(server: str, asked: bytes) -> bytes:
    with socket.create_connection((server, 53), 15.0) as connection:
        connection.sendall(struct.pack("!H", len(asked)) + asked)
        with connection.makefile("rb") as answers:
            (length,) = struct.unpack("!H", answers.read(2))
            return answers.read(length)


class Internet:
    """Servers in the namespace behind the host. Each connection is greeted with the address it came from."""

    def __init__(self) -> None:
        self.fd = new_namespace()
        self._sockets: list[socket.socket] = []
        self.questions: list[bytes] = []
        self.forge_answers = False

    def wire(self) -> None:
        """Called in the fake host: a link to here, the addresses, the servers."""
        with Netlink() as here:
            here.run(netlink.set_link(LOOPBACK), netlink.add_veth(End("eth0"), End("net", netns=self.fd), 1500))
            index = socket.if_nametoindex("eth0")
            here.run(netlink.add_address(index, IPv4Address(HOST), 24), netlink.set_link(index))
            in_namespace(self.fd, self._configure)
            shell("sysctl -qw net.ipv4.ip_forward=0")  # a new namespace has it as the machine has it at that moment
            here.run(netlink.add_route(index, IPv4Network("0.0.0.0/0"), IPv4Address("203.0.113.1")))

    def _configure(self) -> None:
        with Netlink() as there:
            index = socket.if_nametoindex("net")
            there.run(netlink.set_link(LOOPBACK), netlink.set_link(index))
            there.run(netlink.add_address(index, IPv4Address("203.0.113.1"), 24))
            there.run(
                *(netlink.add_address(LOOPBACK, IPv4Address(each)) for each in (SERVER, PRIVATE, RESOLVER, METADATA))
            )

    def serve(self, port: int) -> None:
        self._sockets.append(in_namespace(self.fd, lambda: greeter("0.0.0.0", port)))

    def serve_dns(self) -> None:
        udp = in_namespace(self.fd, lambda: _bound(socket.SOCK_DGRAM, RESOLVER, 53))
        tcp_socket = in_namespace(self.fd, lambda: _bound(socket.SOCK_STREAM, RESOLVER, 53))
        self._sockets += [udp, tcp_socket]
        threading.Thread(target=self._answer_udp, args=(udp,), daemon=True).start()
        threading.Thread(target=self._answer_tcp, args=(tcp_socket,), daemon=True).start()

    def _answer_udp(self, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                asked, asker = server.recvfrom(4096)
                if not asked:  # shut down
                    return
                self.questions.append(asked)
                if self.forge_answers:
                    server.sendto(answer_to(asked, int.from_bytes(asked[:2], "big") ^ 1), asker)
                    server.sendto(answer_to(query("somewhere.else"), int.from_bytes(asked[:2], "big")), asker)
                server.sendto(answer_to(asked), asker)

    def _answer_tcp(self, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection:
                    asked = connection.recv(4096)[2:]
                    answer = answer_to(asked)
                    connection.sendall(struct.pack("!H", len(answer)) + answer)

    def listen_udp(self, port: int) -> socket.socket:
        listener = in_namespace(self.fd, lambda: _bound(socket.SOCK_DGRAM, SERVER, port))
        listener.settimeout(PATIENCE)
        self._sockets.append(listener)
        return listener

    def close(self) -> None:
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits on it
            each.close()
        os.close(self.fd)


def _bound(kind: int, address: str, port: int) -> socket.socket:
    server = socket.socket(socket.AF_INET, kind)
    server.bind((address, port))
    if kind == socket.SOCK_STREAM:
        server.listen(64)
    return server


def greeter(address: str, port: int) -> socket.socket:
    """A server in this thread's namespace that tells who connects where the connection came from, and hangs up."""
    server = _bound(socket.SOCK_STREAM, address, port)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, peer = server.accept()
                with connection:
                    connection.sendall(peer[0].encode())

    threading.Thread(target=serve, daemon=True).start()
    return server


class World:
    """What a scenario gets: the internet, and networks under test."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.internet = Internet()
        self.userns = make_user_namespace(ID_BASE)
        self.resolv_conf = home / "resolv.conf"
        self.resolv_conf.write_text(f"search example.test\nnameserver {RESOLVER}\noptions ndots:2\n")

    @contextlib.asynccontextmanager
    async def network(self, name: str = "home", openings: tuple[tuple[str, int], ...] = ()) -> AsyncIterator[Network]:
        network = self.new_network(name, openings)
        await network.start()
        try:
            yield network
        finally:
            await network.close()

    def new_network(self, name: str = "home", openings: tuple[tuple[str, int], ...] = ()) -> Network:
        home = self.home / name
        home.mkdir(exist_ok=True)
        policy = Policy(tuple(Opening(IPv4Address(address), port, "test") for address, port in openings))
        return Network(home, policy=policy, resolvers=HostResolvers(self.resolv_conf))

    async def inside(self, lease: Lease, body: Callable[[], T]) -> T:
        """Run `body` in a container's namespace while the loop goes on."""
        return await asyncio.to_thread(in_namespace, lease.netns_fd, body)

    async def until(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"waited {PATIENCE:g} s in vain until {what}"
            await asyncio.sleep(0.02)

    def close(self) -> None:
        self.internet.close()
        os.close(self.userns)


@pytest.fixture
def run_in_fake_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs `scenario(world)` as the only thing on a machine of its own. Imported, it is a fixture of the module."""
    monkeypatch.setattr(uplink, "_REMEMBERED", tmp_path / "ip-forward")

    def run(scenario: Callable[[World], Awaitable[None]]) -> None:
        def live() -> None:
            _linux.unshare(_linux.CLONE_NEWNET)
            world = World(tmp_path)
            try:
                world.internet.wire()
                asyncio.run(_awaited(scenario(world)))
            finally:
                world.close()

        with ThreadPoolExecutor(1) as thread:
            thread.submit(live).result(120)

    return run


async def _awaited(scenario: Awaitable[None]) -> None:
    await scenario
