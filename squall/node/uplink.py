"""The host's side of container networking: one interface, one small nftables table, and `ip_forward`.

Owns everything of the network that the host can see, and takes it away again. It must never flush, change or depend
on a rule of anybody else; the one thing it adds to another's chain is an exception for the uplink at the end of a
forward chain whose policy is to drop, without which no container behind that firewall reaches anything.
Homes on one machine share nothing but `/run/squall-ip-forward`: names come from a hash of the home, and the link's
addresses from whatever range the host has no route to. Tested in `tests/kernel/test_network.py`.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import struct
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

from squall._observe import Logger
from squall.exception import ConflictError, Error, ServiceError
from squall.node import netlink
from squall.node.egress import UPLINK_NAME, Opening, Uplink, host_rules
from squall.node.linux import is_readable
from squall.node.netlink import End, Netlink, NetlinkError

NFT_TIMEOUT = 10.0
LOCK_TIMEOUT = 10.0
RESTARTS = 3
"""Times the table on the host is put back after somebody killed its owner. While it is away, the uplink is down."""

_FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")
_REMEMBERED = Path("/run/squall-ip-forward")
_LINK_NAME = re.compile(r"sq[0-9a-f]{8}")
_LINK_RANGES = [IPv4Network(text) for text in ("100.64.0.0/12", "10.213.0.0/16", "172.30.0.0/16", "192.168.240.0/20")]
_TRIES_PER_RANGE = 64
_SIOCGIFMTU = 0x8921

_log = Logger("network")


class HostSide:
    """`open` and `close` run in a thread of the host's network namespace, `watch` on the loop."""

    def __init__(self, home: Path, router_fd: int, openings: Sequence[Opening]) -> None:
        self._mark = hashlib.sha256(os.fsencode(home.resolve())).hexdigest()[:8]
        self._router_fd = router_fd
        self._openings = openings
        self._link = f"sq{self._mark}"
        self._table = f"squall_{self._mark}"
        self._owner: _TableOwner | None = None
        self._rules: list[str] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._restarts = 0
        self._is_ours = False
        """Whether what carries this home's name is of this agent: `open` may have been refused."""
        self.mtu = 1500

    def open(self) -> Uplink:
        """Put the uplink between host and router, and bring it up once the table that judges it stands."""
        with _machine_lock() as remembered, Netlink() as conversation:
            self._sweep(conversation)
            self._is_ours = True
            world = default_interfaces()
            self.mtu = min((_mtu(name) for name in world), default=1500)
            uplink = self._make_link(conversation)
            # Forwarding that an earlier Squall turned on is as good as off: only somebody else's is to be left alone.
            guarded = world if remembered.exists() or not is_forwarding() else []
            self._owner = self._make_table(uplink, guarded)
            self._pass_foreign_chains()
            if not is_forwarding():
                remembered.write("0")
                _FORWARDING.write_text("1")
            conversation.run(netlink.set_link(socket.if_nametoindex(self._link)))
        return uplink

    def close(self) -> None:
        """Take the uplink away first, so that nothing passes while the rules go."""
        if not self._is_ours:
            return
        self._is_ours = False
        with _machine_lock() as remembered, Netlink() as conversation:
            _delete_link(conversation, self._link)
            _delete_foreign_rules(self._table)
            if self._owner is not None:
                self._owner.close()
                self._owner = None
            self._delete_table()
            if not any(_LINK_NAME.fullmatch(name) for _, name in socket.if_nameindex()):
                remembered.restore()

    def _sweep(self, conversation: Netlink) -> None:
        """Remove what an agent of this home left that was killed so hard that not even the kernel cleaned up yet."""
        self._delete_table()  # first: it tells whether that agent is still alive, and then nothing of it is touched
        _delete_link(conversation, self._link)
        _delete_foreign_rules(self._table)

    def _delete_table(self) -> None:
        """A table with an owner goes with it, a moment later perhaps; one without is deleted."""
        deadline = time.monotonic() + NFT_TIMEOUT
        while self._table in _nft("list tables").split():
            try:
                _nft(f"delete table ip {self._table}")
            except ServiceError:
                if time.monotonic() > deadline:
                    raise ConflictError(
                        f"setting up the network: the nftables table `{self._table}` belongs to a running process",
                        hint="another agent uses the same home; stop it with `squall down`",
                    ) from None
                time.sleep(0.05)

    def _make_link(self, conversation: Netlink) -> Uplink:
        host, router = _free_pair(
            netlink.used_networks(conversation), [each.address for each in self._openings], self._mark
        )
        conversation.run(netlink.add_veth(End(self._link), End(UPLINK_NAME, netns=self._router_fd), self.mtu))
        no_ipv6 = Path(f"/proc/sys/net/ipv6/conf/{self._link}/disable_ipv6")
        if no_ipv6.exists():
            no_ipv6.write_text("1")
        conversation.run(netlink.add_address(socket.if_nametoindex(self._link), host, 30))
        return Uplink(self._link, self._table, host, router)

    def _make_table(self, uplink: Uplink, guarded: Sequence[str]) -> _TableOwner:
        self._rules = host_rules(uplink, self._openings, guarded, "flags owner;")
        try:
            return _TableOwner(self._table, self._rules)
        except ServiceError as error:  # nft before 0.9.9 or Linux before 5.12: swept by name at the next start instead
            _log.debug("nftables tables cannot have an owner here", error=error.message)
            self._rules = host_rules(uplink, self._openings, guarded)
            return _TableOwner(self._table, self._rules)

    def _pass_foreign_chains(self) -> None:
        for family, table, chain in _dropping_forward_chains():
            comment = f'comment "{self._table}"'
            for match in (f'iifname "{self._link}"', f'oifname "{self._link}" ct state established,related'):
                _nft(f"add rule {family} {table} {chain} {match} accept {comment}")
            _log.info("a firewall drops what is forwarded; containers were excepted", table=table, chain=chain)

    # the owner of the table may be killed by anybody who is root; then the uplink goes down until it stands again

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._owner is not None:
            self._loop = loop
            loop.add_reader(self._owner.fd, self._on_owner_output, loop)

    def unwatch(self) -> None:
        if self._loop is not None and self._owner is not None:
            self._loop.remove_reader(self._owner.fd)
        self._loop = None

    def _on_owner_output(self, loop: asyncio.AbstractEventLoop) -> None:
        owner = self._owner
        if owner is None or not owner.has_ended():
            return
        loop.remove_reader(owner.fd)
        try:
            with Netlink() as conversation:  # here and now: until then, the host's own addresses are not closed
                conversation.run(netlink.set_link(socket.if_nametoindex(self._link), up=False))
        except OSError as error:  # the uplink is gone as well: nothing passes
            _log.debug("the uplink could not be taken down", error=str(error))
        _log.error("the nft that owns the host's rules was killed; containers have no network until it is back")
        loop.run_in_executor(None, self._restore)

    def _restore(self) -> None:
        self._restarts += 1
        if self._restarts > RESTARTS:
            _log.error("the host's rules were removed too often; the network stays down", restarts=RESTARTS)
            return
        try:
            with _machine_lock(), Netlink() as conversation:
                if self._owner is None:  # closed meanwhile
                    return
                self._owner.close()
                self._owner = _TableOwner(self._table, self._rules)
                conversation.run(netlink.set_link(socket.if_nametoindex(self._link)))
        except (Error, OSError) as error:
            _log.error("the host's rules could not be put back; the network stays down", error=str(error))
        else:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._watch_again)

    def _watch_again(self) -> None:
        if self._loop is not None:  # not closed meanwhile
            self.watch(self._loop)


# ---- nft ----------------------------------------------------------------------------------------------------------


def run_nft(commands: Sequence[str]) -> None:
    """Carry out commands as one transaction, in the network namespace of the calling thread."""
    _nft("-", input="\n".join(commands) + "\n", option="-f")


def _nft(command: str, *, option: str = "", input: str = "", json_wanted: bool = False) -> str:
    argv = ["nft", *(["-j"] if json_wanted else []), *([option] if option else []), command]
    try:
        done = subprocess.run(argv, input=input, capture_output=True, text=True, timeout=NFT_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServiceError(f"running `{' '.join(argv)}`: {error}", hint="install the package nftables") from None
    if done.returncode:
        raise ServiceError(f"running `{' '.join(argv)}`: {_first_error(done.stderr)}")
    return done.stdout


def _first_error(text: str) -> str:
    return " ".join(text.split())[:500] or "nft failed without a word"


class _TableOwner:
    """A running `nft -i` that made a table with `flags owner`: the table exists as long as this process does.

    It ends when its input does, hence with this process, however that dies.
    """

    def __init__(self, table: str, rules: Sequence[str]) -> None:
        self._table = table
        self._process = subprocess.Popen(
            ["nft", "-i"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd="/"
        )
        assert self._process.stdout is not None
        self.fd = self._process.stdout.fileno()
        os.set_blocking(self.fd, False)
        try:
            # One line is one transaction. Listing the table at the end tells that nft is through with it.
            self._say("; ".join(rules))
            self._say(f"list table ip {table}")
            self._wait_for_table()
        except BaseException:
            self.close()
            raise

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise ServiceError(f"making the nftables table `{self._table}`: nft ended: {error}") from None

    def _wait_for_table(self) -> None:
        deadline = time.monotonic() + NFT_TIMEOUT
        output = ""
        while not re.search(rf"^table ip {self._table} .*\n}}$", output, re.MULTILINE | re.DOTALL):
            ready = is_readable(self.fd, max(0.0, deadline - time.monotonic()))
            chunk = os.read(self.fd, 1 << 16) if ready else b""
            output += chunk.decode("utf-8", "replace")
            if not chunk or "Error" in output:
                raise ServiceError(
                    f"making the nftables table `{self._table}`: {_first_error(output) if output else 'no answer'}"
                )

    def has_ended(self) -> bool:
        """Drain what it says (nothing, as a rule); whether it is gone."""
        try:
            return not os.read(self.fd, 1 << 16)
        except BlockingIOError:
            return False

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
        except OSError:  # it has ended already
            pass
        self._process.kill()  # the kernel removes its table either way; by itself it computes for 0.2 s before it ends
        self._process.wait(NFT_TIMEOUT)
        self._process.stdout.close()


def _dropping_forward_chains() -> Iterator[tuple[str, str, str]]:
    for item in _listed("list chains"):
        chain = item.get("chain", {})
        drops = chain.get("hook") == "forward" and chain.get("policy") == "drop"
        if drops and chain["family"] in ("ip", "inet") and not chain["table"].startswith("squall_"):
            yield chain["family"], chain["table"], chain["name"]


def _delete_foreign_rules(comment: str) -> None:
    for family, table, chain in list(_dropping_forward_chains()):
        for item in _listed(f"list chain {family} {table} {chain}"):
            rule = item.get("rule", {})
            if rule.get("comment") == comment:
                _nft(f"delete rule {family} {table} {chain} handle {int(rule['handle'])}")


def _listed(command: str) -> list[dict[str, Any]]:  # Any: JSON, looked at field by field
    found = json.loads(_nft(command, json_wanted=True) or "{}").get("nftables", [])
    return [item for item in found if isinstance(item, dict)]


# ---- what the host has --------------------------------------------------------------------------------------------


def is_forwarding() -> bool:
    return _FORWARDING.read_text().strip() == "1"


def default_interfaces() -> list[str]:
    """The interfaces that have a default route: the ways to the world."""
    rows = [line.split() for line in Path("/proc/thread-self/net/route").read_text().splitlines()[1:]]
    return sorted({row[0] for row in rows if len(row) > 7 and row[1] == row[7] == "00000000"})


def _mtu(interface: str) -> int:
    request = struct.pack("16si12x", interface.encode(), 0)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            mtu = int(struct.unpack("16si12x", fcntl.ioctl(probe, _SIOCGIFMTU, request))[1])
    except OSError:  # gone since it was listed
        return 1500
    return max(576, min(65535, mtu))


def _free_pair(used: Sequence[IPv4Network], taken: Sequence[IPv4Address], mark: str) -> tuple[IPv4Address, IPv4Address]:
    """Both addresses of a /30 that overlaps nothing the host knows. Where the search begins depends on the home."""
    start = int(mark, 16)
    for network in _LINK_RANGES:
        size = network.num_addresses // 4
        for attempt in range(min(size, _TRIES_PER_RANGE)):
            candidate = IPv4Network((int(network.network_address) + 4 * ((start + attempt) % size), 30))
            if not any(candidate.overlaps(each) for each in used) and not any(each in candidate for each in taken):
                return candidate[1], candidate[2]
    raise ServiceError(
        "choosing addresses for the uplink: the host has routes to every range it could be in",
        hint=f"free a part of one of {', '.join(map(str, _LINK_RANGES))}",
    )


def _delete_link(conversation: Netlink, name: str) -> None:
    try:
        conversation.run(netlink.delete_link(name))
    except NetlinkError as error:
        if error.errno != errno.ENODEV:
            raise


class _Remembered:
    """What `ip_forward` was before the first Squall of this machine set it; empty when none did."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def exists(self) -> bool:
        return os.fstat(self._fd).st_size > 0

    def write(self, value: str) -> None:
        if not self.exists():
            os.pwrite(self._fd, value.encode(), 0)

    def restore(self) -> None:
        """By the last one out: put the setting back and forget it."""
        if self.exists():
            _FORWARDING.write_text(os.pread(self._fd, 16, 0).decode())
        _REMEMBERED.unlink(missing_ok=True)


@contextmanager
def _machine_lock() -> Iterator[_Remembered]:
    """One Squall of the machine at a time changes what they share. The file is gone when nobody needs it."""
    deadline = time.monotonic() + LOCK_TIMEOUT
    while True:
        fd = os.open(_REMEMBERED, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if _lock(fd, deadline) and _is_the_file(fd):
                yield _Remembered(fd)
                if os.fstat(fd).st_size == 0:
                    _REMEMBERED.unlink(missing_ok=True)
                return
        finally:
            os.close(fd)


def _lock(fd: int, deadline: float) -> bool:
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ServiceError(
                    f"locking {_REMEMBERED}: another Squall has held it for {LOCK_TIMEOUT:g} s"
                ) from None
            time.sleep(0.02)


def _is_the_file(fd: int) -> bool:
    """Whether the locked file is still the one at the path: its last user removes it."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(_REMEMBERED))
    except FileNotFoundError:
        return False
