"""Networking of containers: a router namespace, a veth for each container, namespaces ready ahead of need.

Owns the router's network namespace, the uplink between it and the host, the pools of network namespaces and the
addresses in them. What may be reached is decided in `egress.py`; names are answered by `dns.py`. Must never put an
interface, address or rule of a container into the host's namespace, never give a namespace to a second container, and
never let a packet out before the rules that judge it stand. No pyroute2: importing it costs half a second at every
start of an agent (`netlink.py` is what is needed of it). Tested in `tests/kernel/test_network.py` and
`tests/security/test_network_policy.py`.

    container  eth0 ──── c17  router  up ──── sq3f9a01c2  host  ── the world
    (in the workspace's       rules, DNS,                 one small table,
     user namespace)          routes, NAT                 NAT

Everything dies with the agent. The router is an anonymous namespace that only descriptors of the agent hold: killed
with -9, it is gone, and with it every veth, the uplink and all rules. The table on the host is owned by a child `nft`
(`flags owner`), which ends when the pipe from the agent breaks; the kernel then removes the table. One thing outlives
a kill: `ip_forward`, if it was off before. What it was is kept in `/run/squall-ip-forward`, shared by all homes of
the machine, and put back by the last of them that closes; it is in /run because the setting, too, ends with the boot.

Inside there is IPv4 only, and ::1. Containers have no route to each other: point-to-point links, /32 addresses, no
bridge, no ARP (neighbours are permanent entries, which also keeps a thousand containers out of the machine-wide
limit on neighbours).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import shutil
import socket
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from squall import _linux
from squall._observe import Logger, count
from squall.exception import Error, ResourceExhaustedError, ServiceError
from squall.node import netlink
from squall.node.dns import PORT, Forwarder, HostResolvers
from squall.node.egress import GATEWAY, UPLINK_NAME, Policy, configuration_files, policy_of_host, router_rules
from squall.node.netlink import IFF_NOARP, IFF_UP, LOOPBACK, End, Netlink, NetlinkError
from squall.node.netns import BATCH, Nursery
from squall.node.runtime import Lease
from squall.node.uplink import HostSide, is_forwarding, run_nft

MAX_NAMESPACES = 8192
"""Of one node, in use and ready."""
LEASE_TIMEOUT = 30.0
"""Seconds a container waits for a namespace when none is ready; one takes a few milliseconds."""
REFUSED_PAUSE = 1.0
"""Seconds without filling a pool ahead of need after the kernel refused a namespace. Those who ask are still served."""
POOL_TICK = 10.0

_CONTAINER_RANGES = [IPv4Network("100.112.0.0/14"), IPv4Network("10.192.0.0/14"), IPv4Network("172.24.0.0/14")]
_ROUTER_MAC = bytes.fromhex("025371000001")
_EVERYWHERE = IPv4Network("0.0.0.0/0")
_FIRST_INDEX = 16
_DOOMED_GROUP = 1
_ETH0 = 2
_SYSCTL = Path("/proc/sys/net")

_log = Logger("network")


@dataclass(frozen=True)
class _Namespace:
    """A network namespace that is wired and was never used. `serial` names its veth, and is never used again."""

    fd: int
    serial: int
    address: IPv4Address

    @property
    def index(self) -> int:
        return _FIRST_INDEX + self.serial


# ---- the router ---------------------------------------------------------------------------------------------------


class Router:
    """The namespace between the containers and the host. All methods but `open` run in a thread that lives in it."""

    def __init__(self) -> None:
        self.fd = -1
        self.wiring = ThreadPoolExecutor(1, "squall-router")
        self.destroying = ThreadPoolExecutor(1, "squall-router-undo", initializer=self._enter)
        self._netlink: Netlink | None = None
        self._undo_netlink: Netlink | None = None
        self._conntrack: Netlink | None = None

    def _enter(self) -> None:
        _linux.setns(self.fd, _linux.CLONE_NEWNET)

    def create(self, containers: IPv4Network, policy: Policy) -> None:
        """Make the namespace, closed: the rules stand before any interface does."""
        _linux.unshare(_linux.CLONE_NEWNET)
        self.fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        run_nft(router_rules(containers, policy.openings))
        self._netlink = Netlink()
        self._netlink.run(netlink.set_link(LOOPBACK), netlink.add_address(LOOPBACK, GATEWAY))
        for name, value in _ROUTER_SYSCTLS.items():
            _write_sysctl(name, value)

    def connect(self, address: IPv4Address, host: IPv4Address) -> None:
        """Bring up the uplink, which the host's side has put here."""
        assert self._netlink is not None
        index = socket.if_nametoindex(UPLINK_NAME)
        self._netlink.run(
            netlink.add_address(index, address, 30),
            netlink.set_link(index),
            netlink.add_route(index, _EVERYWHERE, host),
        )

    def dns_sockets(self) -> tuple[socket.socket, socket.socket]:
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        tcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            udp.bind((str(GATEWAY), PORT))
            tcp.bind((str(GATEWAY), PORT))
            tcp.listen(128)
        except BaseException:
            udp.close()
            tcp.close()
            raise
        return udp, tcp

    def wire(self, namespace: _Namespace, mtu: int) -> None:
        """Give a new namespace its loopback, its end of a veth, its address and its one route."""
        assert self._netlink is not None
        index, address = namespace.index, namespace.address
        mac = b"\x02\x53" + address.packed
        with self._netlink_inside(namespace.fd) as inside:
            self._netlink.run(
                netlink.add_veth(
                    End(f"c{namespace.serial}", index, _ROUTER_MAC, flags=IFF_UP | IFF_NOARP),
                    End("eth0", _ETH0, mac, namespace.fd, IFF_NOARP),  # not up yet: it does not know its peer
                    mtu,
                ),
                netlink.add_neighbour(index, address, mac),
                netlink.add_route(index, IPv4Network(address)),
            )
            inside.run(
                netlink.set_link(LOOPBACK),
                netlink.set_link(_ETH0),
                netlink.add_address(_ETH0, address),
                netlink.add_neighbour(_ETH0, GATEWAY, _ROUTER_MAC),
                netlink.add_route(_ETH0, _EVERYWHERE, GATEWAY),
            )

    def _netlink_inside(self, netns_fd: int) -> Netlink:
        _linux.setns(netns_fd, _linux.CLONE_NEWNET)
        try:
            for name, value in _CONTAINER_SYSCTLS.items():
                _write_sysctl(name, value)
            return Netlink()
        finally:
            _linux.setns(self.fd, _linux.CLONE_NEWNET)

    def destroy(self, namespaces: list[_Namespace]) -> None:
        """Cut namespaces off and let go of them. Whatever process is left in one has lost its network at once."""
        if self._undo_netlink is None:
            self._undo_netlink, self._conntrack = Netlink(), Netlink(netlink.NETFILTER)
        assert self._conntrack is not None
        grouping = [netlink.set_link_group(namespace.index, _DOOMED_GROUP) for namespace in namespaces]
        _run_ignoring(self._undo_netlink, *grouping)
        _run_ignoring(self._undo_netlink, netlink.delete_link_group(_DOOMED_GROUP))
        # An address is used again one day: by then nothing may come in on a connection of its former holder.
        _run_ignoring(self._conntrack, *(netlink.forget_connections(each.address) for each in namespaces))
        for namespace in namespaces:
            os.close(namespace.fd)

    def close(self) -> None:
        """End both threads, and with the last descriptor the namespace."""
        self.wiring.shutdown()
        self.destroying.shutdown()
        for conversation in (self._netlink, self._undo_netlink, self._conntrack):
            if conversation is not None:
                conversation.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


_ROUTER_SYSCTLS = {
    "ipv4/ip_forward": "1",
    # The same as the rule with `fib`, once more, by other code: a source must route back to where it came from.
    "ipv4/conf/all/rp_filter": "1",
    "ipv4/conf/default/rp_filter": "1",
    "ipv4/conf/all/accept_redirects": "0",
    "ipv4/conf/all/send_redirects": "0",
    "ipv4/conf/default/send_redirects": "0",
    "ipv4/conf/all/accept_source_route": "0",
    "ipv4/icmp_ratemask": "0",  # refusals are answered each time, not once a second
    "ipv6/conf/all/disable_ipv6": "1",
    "ipv6/conf/default/disable_ipv6": "1",
}
_CONTAINER_SYSCTLS = {
    "ipv6/conf/default/disable_ipv6": "1",  # of interfaces still to come: lo keeps ::1
    "ipv4/ip_unprivileged_port_start": "0",  # a web server may use port 80 of its own namespace without a capability
}


def _write_sysctl(name: str, value: str) -> None:
    try:
        (_SYSCTL / name).write_text(value)
    except FileNotFoundError:  # a kernel without IPv6
        if not name.startswith("ipv6/"):
            raise


def _run_ignoring(conversation: Netlink, *requests: netlink.Request) -> None:
    """Carry out undo steps. What is undone already is no failure; anything else is counted and logged, and goes on."""
    try:
        conversation.run(*requests)
    except NetlinkError as error:
        if error.errno not in (errno.ENODEV, errno.ENOENT):
            count("network_undo_refused")
            _log.debug("an undo step was refused", call=error.call, errno=error.errno)


# ---- pools --------------------------------------------------------------------------------------------------------


class Pool:
    """BRAIN: how many namespaces of one workspace to have ready. No I/O, no clock: `tick` is called now and then.

    A few always; twice as many each time somebody found none ready, so that the second burst of a kind is served at
    once; half as many after every quiet tick. A workspace that asked for nothing for a while keeps none.
    """

    READY = 8
    MOST = 128
    IDLE_TICKS = 30

    def __init__(self, ready: int = READY) -> None:
        self._least = self.target = ready
        self._asked = self._missed = False
        self._idle_ticks = 0

    def ask(self, ready: int) -> None:
        self._asked = True
        if ready == 0:
            self._missed = True
            self.target = min(self.MOST, max(self._least, self.target) * 2)
        self.target = max(self.target, self._least)

    def wanted(self, ready: int, waiting: int) -> int:
        """How many to make now. Waits for a batch worth its fork, unless somebody is waiting."""
        missing = self.target + waiting - ready
        return missing if waiting or missing >= max(1, self.target // 4) else 0

    def surplus(self, ready: int) -> int:
        return max(0, ready - self.target)

    def tick(self) -> None:
        self._idle_ticks = 0 if self._asked else self._idle_ticks + 1
        if self._idle_ticks >= self.IDLE_TICKS:
            self.target = 0
        elif not self._missed and self.target:
            self.target = max(self._least, self.target // 2)
        self._asked = self._missed = False


class _Workspace:
    """The namespaces of one workspace's user namespace: those ready, and who waits for one."""

    def __init__(self, userns_fd: int, ready: int) -> None:
        # Our own descriptor: it keeps the inode number from being given to another user namespace.
        self.userns_fd = os.dup(userns_fd)
        self.userns = os.fstat(userns_fd).st_ino
        self.pool = Pool(ready)
        self.ready: deque[_Namespace] = deque()
        self.waiting: deque[asyncio.Future[_Namespace]] = deque()
        self.filling: asyncio.Task[None] | None = None
        self.paused_until = 0.0

    def close(self) -> list[_Namespace]:
        """Turn away who waits, and hand out what was ready. A batch in the making comes to an end by itself."""
        self.pool.target = 0
        _fail_waiting(self, ServiceError("waiting for a network namespace: its workspace or the network was closed"))
        left, self.ready = list(self.ready), deque()
        return left


# ---- the network --------------------------------------------------------------------------------------------------


class Network:
    """All networking of one node. Methods are for the agent's event loop; none but `start` and `close` takes long."""

    def __init__(
        self,
        home: Path,
        *,
        policy: Policy | None = None,
        resolvers: HostResolvers | None = None,
        ready: int = Pool.READY,
    ) -> None:
        """`policy` and `resolvers` default to what this machine is configured with, looked at in `start`."""
        self._home = home
        self._policy = policy
        self._resolvers = resolvers or HostResolvers()
        self._ready = ready
        self._router = Router()
        self._host: HostSide | None = None
        self._nursery: Nursery | None = None
        self._forwarder: Forwarder | None = None
        self._containers = _CONTAINER_RANGES[0]
        self._serials = itertools.count()
        self._used: set[IPv4Address] = set()
        self._workspaces: dict[str, _Workspace] = {}
        self._leases: dict[int, tuple[Lease, _Namespace]] = {}
        self._doomed: list[_Namespace] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._ticker: asyncio.TimerHandle | None = None
        self._destroying = False
        self._open = False

    @classmethod
    def problems(cls) -> list[str]:
        """Why containers cannot have a network on this machine, in sentences with the fix; empty when they can."""
        if sys.platform != "linux":
            return ["container networking needs Linux"]
        if os.geteuid() != 0:
            return ["container networking needs root: start the agent as root"]
        if shutil.which("nft") is None:
            return ["the program nft is missing: install it (Debian, Ubuntu, Fedora: package nftables)"]
        found = []
        if not Path("/proc/sys/net/ipv4/ip_forward").exists():
            found.append("there is no /proc/sys/net/ipv4/ip_forward: mount /proc")
        elif not os.access("/proc/sys/net/ipv4/ip_forward", os.W_OK) and not is_forwarding():
            found.append("ip_forward is off and cannot be set: run `sysctl -w net.ipv4.ip_forward=1` on the host")
        return found or _probe()

    def warnings(self) -> list[str]:
        """What this machine is configured with and containers cannot use, in sentences."""
        return list(self._policy.warnings) if self._policy is not None else []

    # start and close

    async def start(self) -> None:
        """Sweep what an earlier agent of this home left, then set everything up; undo it all if a step fails."""
        try:
            await self._start()
        except OSError as error:
            await self.close()
            raise ServiceError(
                f"setting up the containers' network: {error}", hint="`squall doctor` says more"
            ) from None
        except BaseException:
            await self.close()
            raise

    async def _start(self) -> None:
        loop = asyncio.get_running_loop()
        if self._policy is None:
            files = configuration_files(Path.home(), Path(sys.prefix), os.environ)
            self._policy = await policy_of_host(os.environ, files)
        self._nursery = Nursery()
        self._containers = _free_range([opening.address for opening in self._policy.openings])
        await loop.run_in_executor(self._router.wiring, self._router.create, self._containers, self._policy)
        self._host = HostSide(self._home, self._router.fd, self._policy.openings)
        uplink = await asyncio.to_thread(self._host.open)
        await loop.run_in_executor(self._router.wiring, self._router.connect, uplink.router, uplink.host)
        self._forwarder = Forwarder(self._resolvers.servers)
        sockets = await loop.run_in_executor(self._router.wiring, self._router.dns_sockets)
        await self._forwarder.start(*sockets)
        self._host.watch(loop)
        self._open = True
        self._ticker = loop.call_later(POOL_TICK, self._tick)

    async def close(self) -> None:
        """Undo everything. Containers that are still alive lose their network."""
        self._open = False
        if self._ticker is not None:
            self._ticker.cancel()
        fillings = [each.filling for each in self._workspaces.values() if each.filling is not None]
        for workspace in self._workspaces.values():
            self._doomed += workspace.close()
        for lease, _ in list(self._leases.values()):
            self.release(lease)
        if self._forwarder is not None:
            await self._forwarder.close()
        if self._host is not None:
            self._host.unwatch()
        await asyncio.gather(*fillings, *self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._close_kernel_side)

    def _close_kernel_side(self) -> None:
        with contextlib.ExitStack() as steps:  # in reverse; each is done even when another fails
            steps.callback(self._router.close)
            for namespace in self._doomed:
                steps.callback(os.close, namespace.fd)
            for workspace in self._workspaces.values():
                steps.callback(os.close, workspace.userns_fd)
            if self._nursery is not None:
                steps.callback(self._nursery.close)
            if self._host is not None:
                steps.callback(self._host.close)
            self._doomed, self._workspaces = [], {}
            self._nursery = self._host = None

    # leases

    def prepare(self, workspace: str, userns_fd: int) -> None:
        """Begin to make namespaces for a workspace that will soon ask for some."""
        self._fill(self._workspace(workspace, userns_fd))

    async def lease(self, workspace: str, userns_fd: int) -> Lease:
        """A wired namespace, inside the workspace's user namespace, that no container ever had."""
        pool = self._workspace(workspace, userns_fd)
        pool.pool.ask(len(pool.ready))
        namespace = pool.ready.popleft() if pool.ready else None
        waiter = None if namespace else self._wait_in_line(pool)
        self._fill(pool)
        if namespace is None:
            assert waiter is not None
            namespace = await self._wait(pool, waiter)
        lease = Lease(namespace.fd, self._resolv_conf(), str(namespace.address))
        self._leases[lease.netns_fd] = lease, namespace
        return lease

    def release(self, lease: Lease) -> None:
        """Give a namespace up and close its descriptor; it is destroyed soon, off the hot path. Twice is harmless."""
        known, namespace = self._leases.get(lease.netns_fd, (None, None))
        if known is lease and namespace is not None:  # the same number may be another lease's descriptor by now
            del self._leases[lease.netns_fd]
            self._doom([namespace])

    def _workspace(self, name: str, userns_fd: int) -> _Workspace:
        if not self._open:
            raise ServiceError("asking for a network namespace: the node's network is not running")
        known = self._workspaces.get(name)
        if known is not None and known.userns == os.fstat(userns_fd).st_ino:
            return known
        if known is not None:  # the workspace has got a new user namespace: the old one's are of no use to it
            self._drop(name)
        new = self._workspaces[name] = _Workspace(userns_fd, self._ready)
        return new

    def _drop(self, name: str) -> None:
        workspace = self._workspaces.pop(name)
        self._doom(workspace.close())
        os.close(workspace.userns_fd)

    def _wait_in_line(self, pool: _Workspace) -> asyncio.Future[_Namespace]:
        waiter: asyncio.Future[_Namespace] = asyncio.get_running_loop().create_future()
        pool.waiting.append(waiter)
        return waiter

    async def _wait(self, pool: _Workspace, waiter: asyncio.Future[_Namespace]) -> _Namespace:
        try:
            return await asyncio.wait_for(asyncio.shield(waiter), LEASE_TIMEOUT)
        except asyncio.TimeoutError:
            _give_back(waiter, lambda namespace: self._take_in(pool, namespace))
            raise ServiceError(f"waiting for a network namespace: none was made within {LEASE_TIMEOUT:g} s") from None
        except asyncio.CancelledError:
            _give_back(waiter, lambda namespace: self._take_in(pool, namespace))
            raise

    def _resolv_conf(self) -> str:
        return "".join(f"{line}\n" for line in [f"nameserver {GATEWAY}", *self._resolvers.options()])

    # filling

    def _fill(self, pool: _Workspace) -> None:
        if self._open and pool.filling is None and self._wanted(pool):
            pool.filling = asyncio.get_running_loop().create_task(self._filling(pool))

    def _wanted(self, pool: _Workspace) -> int:
        waiting = sum(not waiter.done() for waiter in pool.waiting)
        if not waiting and asyncio.get_running_loop().time() < pool.paused_until:
            return 0
        return pool.pool.wanted(len(pool.ready), waiting)

    async def _filling(self, pool: _Workspace) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._open and (wanted := min(BATCH, self._wanted(pool))):
                await loop.run_in_executor(self._router.wiring, self._make, loop, pool, os.dup(pool.userns_fd), wanted)
        except (Error, OSError) as error:
            pool.paused_until = loop.time() + REFUSED_PAUSE
            _log.warning("could not make network namespaces", error=str(error))
            _fail_waiting(pool, error)
        finally:
            pool.filling = None

    def _make(self, loop: asyncio.AbstractEventLoop, pool: _Workspace, userns_fd: int, wanted: int) -> None:
        """In the router's thread: wire each namespace while the nursery makes the next."""
        assert self._host is not None
        try:
            for fd in self._living_nursery().make(userns_fd, wanted):
                namespace = None
                try:
                    namespace = _Namespace(fd, *self._next_address())
                    self._router.wire(namespace, self._host.mtu)
                except BaseException:
                    os.close(fd)  # and its half of a veth, and by that the other half
                    if namespace is not None:
                        self._used.discard(namespace.address)
                    raise
                loop.call_soon_threadsafe(self._take_in, pool, namespace)
        finally:
            os.close(userns_fd)

    def _living_nursery(self) -> Nursery:
        assert self._nursery is not None
        if not self._nursery.is_alive():
            _log.warning("the process that makes network namespaces is gone; starting another")
            self._nursery.close()
            self._nursery = Nursery()
        return self._nursery

    def _next_address(self) -> tuple[int, IPv4Address]:
        """The next serial number and its address, the one that was free for longest."""
        if len(self._used) >= MAX_NAMESPACES:
            raise ResourceExhaustedError(
                f"making a network namespace: this node has {MAX_NAMESPACES} already", hint="use more nodes"
            )
        while True:
            serial = next(self._serials)
            address = self._containers[1 + serial % (self._containers.num_addresses - 2)]
            if address not in self._used:
                self._used.add(address)
                return serial, address

    def _take_in(self, pool: _Workspace, namespace: _Namespace) -> None:
        """A namespace is ready: for who waits longest, else for the pool."""
        while pool.waiting:
            waiter = pool.waiting.popleft()
            if not waiter.done():
                waiter.set_result(namespace)
                return
        if self._open and pool in self._workspaces.values():
            pool.ready.append(namespace)
        else:
            self._doom([namespace])

    # destroying

    def _doom(self, namespaces: list[_Namespace]) -> None:
        self._doomed += namespaces
        if self._open and self._doomed and not self._destroying:
            self._destroying = True
            task = asyncio.get_running_loop().create_task(self._destroy())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _destroy(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._doomed and self._open:
                batch, self._doomed = self._doomed, []
                try:
                    await loop.run_in_executor(self._router.destroying, self._router.destroy, batch)
                except OSError as error:  # out of descriptors, say: tried again with the next that is released
                    _log.warning("could not destroy network namespaces", error=str(error), number=len(batch))
                    self._doomed += batch
                    return
                self._used.difference_update(namespace.address for namespace in batch)
        finally:
            self._destroying = False

    def _tick(self) -> None:
        self._ticker = asyncio.get_running_loop().call_later(POOL_TICK, self._tick)
        for name, workspace in list(self._workspaces.items()):
            workspace.pool.tick()
            for _ in range(workspace.pool.surplus(len(workspace.ready))):
                self._doom([workspace.ready.pop()])
            if not workspace.pool.target and not workspace.filling and not workspace.waiting:
                self._drop(name)
            else:
                self._fill(workspace)


def _give_back(waiter: asyncio.Future[_Namespace], take_in: Callable[[_Namespace], None]) -> None:
    """Nobody waits any more. A namespace that came at that very moment was never used, and goes to somebody else."""
    if not waiter.cancel() and not waiter.cancelled() and waiter.exception() is None:
        take_in(waiter.result())


def _fail_waiting(pool: _Workspace, error: Exception) -> None:
    while pool.waiting:
        waiter = pool.waiting.popleft()
        if not waiter.done():
            waiter.set_exception(error if isinstance(error, Error) else ServiceError(f"wiring a container: {error}"))


def _free_range(taken: list[IPv4Address]) -> IPv4Network:
    """A range for the containers that hides nothing they may reach. It is seen inside the router only."""
    for network in _CONTAINER_RANGES:
        if not any(address in network for address in taken):
            return network
    raise ServiceError(
        "choosing addresses for containers: every range has a proxy or package index of this machine in it",
        hint=f"free one of {', '.join(map(str, _CONTAINER_RANGES))}",
    )


def _probe() -> list[str]:
    """Try the two things a kernel may lack, in a namespace that is thrown away."""

    def try_out() -> None:
        _linux.unshare(_linux.CLONE_NEWNET)
        run_nft(router_rules(_CONTAINER_RANGES[0], ()))

    with ThreadPoolExecutor(1) as thread:
        try:
            thread.submit(try_out).result()
        except OSError as error:
            return [f"a network namespace cannot be made here ({error}): give this process CAP_SYS_ADMIN"]
        except Error as error:
            return [f"{error.message}: the kernel needs nf_tables with NAT, conntrack, fib and connlimit"]
    return []
