"""Netlink, as much of it as wiring containers takes: links, addresses, routes, neighbours, forgotten connections.

Owns the encoding and the one bounded conversation with the kernel; decides nothing and keeps nothing. It is our own
because pyroute2 costs half a second of import at every start of an agent, for the eight messages that are needed
here. A socket belongs to the network namespace of the thread that opened it, for good, whoever uses it later.
Encoding is tested in `tests/unit/test_netlink.py`, the effect in `tests/kernel/test_network.py`.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

ROUTE, NETFILTER = 0, 12
TIMEOUT = 5.0
"""Seconds one answer of the kernel may take. Only a kernel stuck on its own lock ever needs more than milliseconds."""

IFF_UP, IFF_NOARP = 0x1, 0x80
LOOPBACK = 1
"""The index of `lo`, the same in every network namespace."""

_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_EXCLUSIVE, _CREATE = 0x200, 0x400
_ERROR, _DONE = 2, 3
_NEWLINK, _DELLINK, _SETLINK = 16, 17, 19
_NEWADDR, _GETADDR = 20, 22
_NEWROUTE, _GETROUTE = 24, 26
_NEWNEIGH = 28
_CONNTRACK_DELETE = 1 << 8 | 2
_SOL_NETLINK, _EXT_ACK, _CAP_ACK = 270, 11, 10
_NESTED = 0x8000
_BATCH = 64
"""Requests per datagram: bounds what is sent, and what is owed to us in answers, to less than a socket buffer."""


class NetlinkError(OSError):
    """The kernel refused a request. `call` is what was asked, in words a log can carry."""

    def __init__(self, code: int, call: str, reason: str = "") -> None:
        name = errno.errorcode.get(code, str(code))
        super().__init__(code, f"{call}: {name} ({reason or os.strerror(code)})")
        self.call = call


@dataclass(frozen=True)
class Request:
    call: str
    kind: int
    flags: int
    body: bytes

    def encode(self, sequence: int) -> bytes:
        flags = self.flags | _REQUEST
        return struct.pack("=IHHII", 16 + len(self.body), self.kind, flags, sequence, 0) + self.body


def attribute(kind: int, *values: bytes | int | str) -> bytes:
    """One attribute; several values follow each other, as the members of a nested one do."""
    data = b"".join(_value(value) for value in values)
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def _value(value: bytes | int | str) -> bytes:
    if isinstance(value, int):
        return struct.pack("=I", value)
    return value.encode() + b"\0" if isinstance(value, str) else value


def attributes(data: bytes) -> dict[int, bytes]:
    """Attribute kind -> its bytes; of a repeated one the last. Stops at what is not well-formed."""
    found = {}
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if not 4 <= length <= len(data):
            break
        found[kind & 0x3FFF] = data[4:length]
        data = data[(length + 3) & ~3 :]
    return found


# ---- links --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class End:
    """One end of a veth pair. `netns` is a descriptor of the namespace it is put into, or the socket's own."""

    name: str
    index: int = 0
    mac: bytes = b""
    netns: int | None = None
    flags: int = 0

    def encode(self, mtu: int) -> bytes:
        parts = [_ifinfo(self.index, self.flags, self.flags), attribute(3, self.name)]
        if self.mac:
            parts.append(attribute(1, self.mac))
        if self.netns is not None:
            parts.append(attribute(28, self.netns))
        # One queue each way: the default is one per CPU of the machine, each with its own memory and files in /sys.
        parts += [attribute(4, mtu), attribute(31, 1), attribute(32, 1)]
        return b"".join(parts)


def add_veth(end: End, peer: End, mtu: int) -> Request:
    """Make both ends at once, each in its namespace and already up when its flags say so."""
    link_info = attribute(18, attribute(1, "veth"), attribute(2, attribute(1, peer.encode(mtu))))
    call = f"add veth {end.name!r} with peer {peer.name!r}"
    return Request(call, _NEWLINK, _ACK | _CREATE | _EXCLUSIVE, end.encode(mtu) + link_info)


def set_link(index: int, *, up: bool = True) -> Request:
    state = IFF_UP if up else 0
    return Request(f"set link {index} {'up' if up else 'down'}", _SETLINK, _ACK, _ifinfo(index, state, IFF_UP))


def set_link_group(index: int, group: int) -> Request:
    return Request(f"put link {index} in group {group}", _SETLINK, _ACK, _ifinfo(index) + attribute(27, group))


def delete_link(name: str) -> Request:
    return Request(f"delete link {name!r}", _DELLINK, _ACK, _ifinfo(0) + attribute(3, name))


def delete_link_group(group: int) -> Request:
    """Delete all links of a group in one go: the kernel waits out its readers once, not once per link."""
    return Request(f"delete links of group {group}", _DELLINK, _ACK, _ifinfo(0) + attribute(27, group))


def _ifinfo(index: int, flags: int = 0, change: int = 0) -> bytes:
    return struct.pack("=BxHiII", socket.AF_UNSPEC, 0, index, flags, change)


# ---- addresses, routes, neighbours --------------------------------------------------------------------------------


def add_address(index: int, address: IPv4Address, prefix: int = 32) -> Request:
    # Scope link for 169.254/16 and loopback would be tidier to look at; nothing here depends on it.
    head = struct.pack("=BBBBI", socket.AF_INET, prefix, 0, 0, index)
    body = head + attribute(2, address.packed) + attribute(1, address.packed)
    return Request(f"add address {address}/{prefix} to link {index}", _NEWADDR, _ACK | _CREATE | _EXCLUSIVE, body)


def add_route(index: int, network: IPv4Network, gateway: IPv4Address | None = None) -> Request:
    """A route over a link. A gateway is taken to be on that link (`onlink`), whatever its address looks like."""
    on_link = 4 if gateway is not None else 0
    scope = 0 if gateway is not None else 253
    head = struct.pack("=BBBBBBBBI", socket.AF_INET, network.prefixlen, 0, 0, 254, 3, scope, 1, on_link)
    parts = [head, attribute(4, index)]
    if network.prefixlen:
        parts.append(attribute(1, network.network_address.packed))
    if gateway is not None:
        parts.append(attribute(5, gateway.packed))
    call = f"add route {network} via {gateway or 'link'} on link {index}"
    return Request(call, _NEWROUTE, _ACK | _CREATE | _EXCLUSIVE, b"".join(parts))


def add_neighbour(index: int, address: IPv4Address, mac: bytes) -> Request:
    """A permanent neighbour: never asked for, never forgotten, not counted by the table's machine-wide limit."""
    head = struct.pack("=BxxxiHBB", socket.AF_INET, index, 0x80, 0, 1)
    body = head + attribute(1, address.packed) + attribute(2, mac)
    return Request(f"add neighbour {address} on link {index}", _NEWNEIGH, _ACK | _CREATE, body)


def forget_connections(source: IPv4Address) -> Request:
    """Drop the tracked connections that `source` began (a filtered flush; needs Linux 5.8)."""
    head = struct.pack("=BBH", socket.AF_INET, 0, 0)
    address = attribute(_NESTED | 1, attribute(1, source.packed))
    body = head + attribute(_NESTED | 1, address) + attribute(_NESTED | 25, attribute(1, 1))
    return Request(f"forget connections of {source}", _CONNTRACK_DELETE, _ACK, body)


# ---- what is there ------------------------------------------------------------------------------------------------


def used_networks(netlink: Netlink) -> list[IPv4Network]:
    """Every IPv4 network that has an address or a route here, in whatever table, the default route left out."""
    found = set()
    for body in netlink.dump(
        Request("list addresses", _GETADDR, _DUMP, struct.pack("=BBBBI", socket.AF_INET, 0, 0, 0, 0))
    ):
        found.add(_network(attributes(body[8:]).get(1), body[1]))
    for body in netlink.dump(Request("list routes", _GETROUTE, _DUMP, struct.pack("=B11x", socket.AF_INET))):
        found.add(_network(attributes(body[12:]).get(1), body[1]))
    return sorted(network for network in found if network is not None and network.prefixlen)


def _network(address: bytes | None, prefix: int) -> IPv4Network | None:
    if address is None or len(address) != 4 or prefix > 32:
        return None
    return IPv4Network((address, prefix), strict=False)


# ---- the conversation ---------------------------------------------------------------------------------------------


class Netlink:
    """A netlink socket of the calling thread's network namespace. Used by one thread at a time."""

    def __init__(self, protocol: int = ROUTE) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._sequence = 0
        try:
            self._socket.settimeout(TIMEOUT)
            self._socket.setsockopt(_SOL_NETLINK, _EXT_ACK, 1)
            self._socket.setsockopt(_SOL_NETLINK, _CAP_ACK, 1)  # errors without a copy of the request
            self._socket.bind((0, 0))
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def run(self, *requests: Request) -> None:
        """Carry out all requests in order and raise the first refusal, once every answer has been seen."""
        first: NetlinkError | None = None
        for start in range(0, len(requests), _BATCH):
            refused = self._batch(requests[start : start + _BATCH])
            first = first or refused
        if first is not None:
            raise first

    def _batch(self, requests: Sequence[Request]) -> NetlinkError | None:
        waiting = {}
        data = []
        for request in requests:
            self._sequence += 1
            waiting[self._sequence] = request
            data.append(request.encode(self._sequence))
        self._send(b"".join(data), requests[0])
        first: NetlinkError | None = None
        while waiting:
            for kind, sequence, body in self._receive(requests[0]):
                asked = waiting.pop(sequence, None) if kind == _ERROR else None
                if asked is not None and (code := _code(body)):
                    first = first or NetlinkError(code, asked.call, _explanation(body))
        return first

    def dump(self, request: Request) -> Iterator[bytes]:
        """The bodies of all answers to a listing request."""
        self._sequence += 1
        self._send(request.encode(self._sequence), request)
        while True:
            for kind, sequence, body in self._receive(request):
                if sequence != self._sequence:
                    continue
                if kind == _ERROR:
                    raise NetlinkError(_code(body), request.call, _explanation(body))
                if kind == _DONE:
                    return
                yield body

    def _send(self, data: bytes, request: Request) -> None:
        try:
            self._socket.send(data)
        except OSError as error:
            raise NetlinkError(error.errno or errno.EIO, f"{request.call}: send") from error

    def _receive(self, request: Request) -> list[tuple[int, int, bytes]]:
        try:
            data = self._socket.recv(1 << 17)
        except TimeoutError:
            raise NetlinkError(errno.ETIMEDOUT, request.call, f"no answer within {TIMEOUT:g} s") from None
        except OSError as error:
            raise NetlinkError(error.errno or errno.EIO, f"{request.call}: receive") from error
        return list(_messages(data))


def _messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    while len(data) >= 16:
        length, kind, _, sequence, _ = struct.unpack_from("=IHHII", data)
        if not 16 <= length <= len(data):
            return
        yield kind, sequence, data[16:length]
        data = data[(length + 3) & ~3 :]


def _code(body: bytes) -> int:
    return -int(struct.unpack_from("=i", body)[0]) if len(body) >= 4 else errno.EPROTO


def _explanation(body: bytes) -> str:
    """The kernel's own sentence on a refusal, where it has one (extended acknowledgement)."""
    text = attributes(body[20:]).get(1, b"")
    return text.rstrip(b"\0").decode("utf-8", "replace")
