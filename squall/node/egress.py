"""What containers may reach, and the nftables commands that hold them to it.

Owns the policy: the internet yes; the host, private, shared, link-local and multicast addresses no, except what this
machine itself is configured to fetch through: its proxy and its package indexes, each by address and port. (The
resolver is the agent's forwarder, `dns.py`.) Owns the two rule sets too, as pure text: `router_rules` holds for every
packet that leaves a container, `host_rules` for what then leaves the router towards the host. It opens nothing and
runs nothing but name look-ups. The walls are attacked in `tests/security/test_network_policy.py`.

The router's rules name no container. Which source address belongs to which container is in its routing table alone,
and `fib saddr . iif` asks it: a packet whose source does not route back out of the interface it came in by is
dropped. So a thousand containers cost no rule, and adding one changes none.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, ip_address
from pathlib import Path
from urllib.parse import urlsplit

DENIED = [
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # shared by a carrier's customers; overlays such as Tailscale
        "127.0.0.0/8",  # loopback
        "169.254.0.0/16",  # link-local: cloud metadata
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments
        "192.168.0.0/16",  # private
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
    )
]
GATEWAY = IPv4Address("169.254.1.1")
"""Where every container finds the router and its DNS forwarder. Link-local, so that it is nobody's real address."""
UPLINK_NAME = "up"
CONNECTIONS = 4096
"""Connections one container may have open; the table that tracks them is shared by all containers of the node."""
RESOLVE_TIMEOUT = 5.0
"""Seconds for looking up the names of proxies and indexes, all together, at start."""
MAX_ENDPOINTS = 64

_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "FTP_PROXY", "PIP_PROXY")
_INDEXES = (
    "PIP_INDEX_URL",
    "PIP_EXTRA_INDEX_URL",
    "PIP_FIND_LINKS",
    "UV_INDEX_URL",
    "UV_DEFAULT_INDEX",
    "UV_INDEX",
    "UV_EXTRA_INDEX_URL",
    "UV_FIND_LINKS",
)
_DEFAULT_INDEX = "https://pypi.org/simple https://files.pythonhosted.org"
"""Where pip and uv go when nothing is configured; behind some companies' resolvers these have private addresses."""
_PORTS = {"http": 80, "https": 443, "socks5": 1080, "socks5h": 1080, "socks4": 1080, "socks4a": 1080, "socks": 1080}
_URL = re.compile(r"(?:https?|socks\w*)://[^\s\"'\],}]+")
_PIP_PROXY = re.compile(r"^\s*proxy\s*[=:]\s*(\S+)", re.MULTILINE)
_COMMENT = re.compile(r"^\s*[#;].*$", re.MULTILINE)


@dataclass(frozen=True, order=True)
class Opening:
    """A denied address that may be reached all the same, on one TCP port."""

    address: IPv4Address
    port: int
    why: str

    def __post_init__(self) -> None:
        if not 0 < self.port < 65536:
            raise ValueError(f"opening to {self.address}: {self.port} is no port")


@dataclass(frozen=True)
class Policy:
    openings: tuple[Opening, ...] = ()
    warnings: tuple[str, ...] = ()
    """What the host is configured with and containers cannot use, in sentences."""


# ---- what this machine is configured with -------------------------------------------------------------------------


async def policy_of_host(environ: Mapping[str, str], files: Iterable[Path]) -> Policy:
    """The openings that the proxy and package index settings of this machine ask for."""
    endpoints = endpoints_of(environ, files)
    addresses = await _resolve({host for host, _, _ in endpoints})
    openings = set()
    warnings = []
    for host, port, why in endpoints:
        for address in addresses.get(host, ()):
            if address.is_loopback:
                warnings.append(
                    f"{why} names {host}:{port}, which inside a container is the container itself; "
                    "give the proxy or index an address that other machines can reach too"
                )
            else:  # public addresses too: one of them may be the host's own, which are closed as well
                openings.add(Opening(address, port, why))
    return Policy(tuple(sorted(openings)), tuple(dict.fromkeys(warnings)))


def configuration_files(home: Path, prefix: Path, environ: Mapping[str, str]) -> list[Path]:
    """Where pip and uv keep settings, for the user whose home this is and the Python installed at `prefix`."""
    config = Path(environ.get("XDG_CONFIG_HOME") or home / ".config")
    files = [Path("/etc/pip.conf"), Path("/etc/xdg/pip/pip.conf"), Path("/etc/uv/uv.toml"), Path("/etc/xdg/uv/uv.toml")]
    files += [home / ".pip" / "pip.conf", config / "pip" / "pip.conf", config / "uv" / "uv.toml", prefix / "pip.conf"]
    return files + [Path(environ[name]) for name in ("PIP_CONFIG_FILE", "UV_CONFIG_FILE") if environ.get(name)]


def endpoints_of(environ: Mapping[str, str], files: Iterable[Path]) -> list[tuple[str, int, str]]:
    """(host, port, which setting names it) of every proxy and package index, without repetition."""
    found: dict[tuple[str, int], str] = {}
    for why, text in _settings(environ, files):
        for url in text.split():
            endpoint = _endpoint(url)
            if endpoint is not None:
                found.setdefault(endpoint, why)
    return [(host, port, why) for (host, port), why in found.items()][:MAX_ENDPOINTS]


def _settings(environ: Mapping[str, str], files: Iterable[Path]) -> Iterable[tuple[str, str]]:
    for name in _PROXIES:
        for variable in (name, name.lower()):
            value = environ.get(variable, "").strip()
            if value:
                yield variable, value if "://" in value else f"http://{value}"
    for name in _INDEXES:
        yield name, " ".join(_URL.findall(environ.get(name, "")))
    for file in files:
        try:
            text = _COMMENT.sub("", file.read_text("utf-8", "replace")[: 1 << 20])
        except OSError:  # most of these files do not exist
            continue
        proxies = [value if "://" in value else f"http://{value}" for value in _PIP_PROXY.findall(text)]
        yield str(file), " ".join(_URL.findall(text) + proxies)
    yield "the default package index", _DEFAULT_INDEX


def _endpoint(url: str) -> tuple[str, int] | None:
    try:
        parts = urlsplit(url)
        port = parts.port or _PORTS.get(parts.scheme, 0)
    except ValueError:  # a port that is no number, an address that is none
        return None
    return (parts.hostname, port) if parts.hostname and 0 < port < 65536 else None


async def _resolve(hosts: Iterable[str]) -> dict[str, list[IPv4Address]]:
    """IPv4 addresses of each host. A name that does not resolve in time opens nothing."""
    loop = asyncio.get_running_loop()
    found: dict[str, list[IPv4Address]] = {}

    async def look_up(host: str) -> None:
        try:
            rows = await loop.getaddrinfo(host, None, family=socket.AF_INET, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            return
        found[host] = sorted({IPv4Address(row[4][0]) for row in rows})

    names = []
    for host in hosts:
        literal = _literal(host)
        if literal is None:
            names.append(asyncio.ensure_future(look_up(host)))
        elif isinstance(literal, IPv4Address):
            found[host] = [literal]
    if names:
        _, late = await asyncio.wait(names, timeout=RESOLVE_TIMEOUT)
        for task in late:
            task.cancel()
    return found


def _literal(host: str) -> object | None:
    try:
        return ip_address(host)
    except ValueError:
        return None


# ---- rules --------------------------------------------------------------------------------------------------------


def router_rules(containers: IPv4Network, openings: Sequence[Opening]) -> list[str]:
    """The table inside the router's namespace. Everything not named here is dropped, whatever the protocol."""
    refuse = "reject with icmp type admin-prohibited"  # a clear error at once instead of a time-out
    to_gateway = f'iifname != "{UPLINK_NAME}" ip daddr {GATEWAY}'
    rules = [
        "add table inet squall",
        "add set inet squall flows { type ipv4_addr; size 65535; flags dynamic; }",
        "add set inet squall dns { type ipv4_addr; size 65535; flags dynamic; }",
        "add chain inet squall arriving { type filter hook prerouting priority raw; policy drop; }",
        "add chain inet squall own { type filter hook input priority filter; policy drop; }",
        "add chain inet squall through { type filter hook forward priority filter; policy drop; }",
        "add chain inet squall leaving { type nat hook postrouting priority srcnat; policy accept; }",
    ]
    arriving = [
        'iifname "lo" accept',
        "meta nfproto != ipv4 drop",
        f'iifname "{UPLINK_NAME}" accept',
        f"ip saddr != {containers} drop",
        "fib saddr . iif oif missing drop",  # forged: this source lives behind another interface, or nowhere
        "accept",
    ]
    own = [
        'iifname "lo" accept',
        f"{to_gateway} udp dport 53 accept",
        f"{to_gateway} tcp dport 53 ct state new add @dns {{ ip saddr ct count over 64 }} drop",
        f"{to_gateway} tcp dport 53 accept",
        f'iifname != "{UPLINK_NAME}" {refuse}',
    ]
    through = [
        f'iifname "{UPLINK_NAME}" ct state established,related accept',
        f'iifname "{UPLINK_NAME}" drop',
        f'oifname != "{UPLINK_NAME}" {refuse}',  # another container
        "meta l4proto != { tcp, udp, icmp } drop",
        "ct state invalid drop",
        f"ct state new add @flows {{ ip saddr ct count over {CONNECTIONS} }} drop",
        *_accept(openings),
        f"ip daddr {{ {_joined(DENIED)} }} {refuse}",
        "accept",
    ]
    rules += _chain("inet squall arriving", arriving) + _chain("inet squall own", own)
    rules += _chain("inet squall through", through)
    return [*rules, f'add rule inet squall leaving oifname "{UPLINK_NAME}" masquerade fully-random']


@dataclass(frozen=True)
class Uplink:
    """The link between the host's namespace and the router's, and the table on the host that goes with it."""

    name: str
    table: str
    host: IPv4Address
    router: IPv4Address


def host_rules(uplink: Uplink, openings: Sequence[Opening], guarded: Sequence[str], flags: str = "") -> list[str]:
    """The table on the host. It touches nothing but the uplink's packets, and what comes in by a `guarded` interface.

    Those are the interfaces to the world of a machine that forwarded nothing until we made it. What others send it to
    pass on stays unforwarded; the ports another container engine publishes (dnat) are let by, it may start later.
    The host's own addresses, public ones as well, are closed here: whatever goes to one of them goes through `local`.
    A published port of some other container engine is reached by rewriting the destination, hence `ct status dnat`.
    """
    table = f"ip {uplink.table}"
    from_us, to_us = f'iifname "{uplink.name}"', f'oifname "{uplink.name}"'
    local = [f'iifname != "{uplink.name}" accept', *_accept(openings), "drop"]
    through = [
        f"{from_us} ip saddr != {uplink.router} drop",
        *(f"{from_us} {rule}" for rule in _accept(openings)),
        f"{from_us} ct status dnat drop",
        f"{from_us} ip daddr {{ {_joined(DENIED)} }} drop",
        f"{from_us} accept",
        f"{to_us} ct state established,related accept",
        f"{to_us} drop",
    ]
    through += [f'iifname "{name}" ct state new ct status != dnat drop' for name in guarded]
    rules = [
        f"add table {table} {{ {flags} }}" if flags else f"add table {table}",
        f"add chain {table} local {{ type filter hook input priority -5; policy accept; }}",
        f"add chain {table} through {{ type filter hook forward priority -5; policy accept; }}",
        f"add chain {table} leaving {{ type nat hook postrouting priority 100; policy accept; }}",
    ]
    rules += _chain(f"{table} local", local) + _chain(f"{table} through", through)
    return [*rules, f'add rule {table} leaving ip saddr {uplink.router} oifname != "{uplink.name}" masquerade']


def _chain(chain: str, rules: Iterable[str]) -> list[str]:
    return [f"add rule {chain} {rule}" for rule in rules]


def _accept(openings: Sequence[Opening]) -> list[str]:
    pairs = sorted({(opening.address, opening.port) for opening in openings})
    if not pairs:
        return []
    return [f"ip daddr . tcp dport {{ {', '.join(f'{address} . {port}' for address, port in pairs)} }} accept"]


def _joined(networks: Iterable[IPv4Network]) -> str:
    return ", ".join(map(str, networks))
