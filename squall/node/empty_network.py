"""The network of containers that get none: fresh namespaces with nothing but `lo`, made ahead of need.

Owns one helper process for each workspace, which makes them inside the workspace's user namespace. Must never hand the
same namespace out twice. Tested in `tests/kernel/test_native.py`.
"""

from __future__ import annotations

import asyncio
from collections import deque

from squall.node import linux
from squall.node.linux import StepError
from squall.node.runtime import Lease
from squall.node.zygote import SHELL_TIMEOUT

SPARE_NETWORKS = 4


class EmptyNetwork:
    """The network of containers that get none: a fresh namespace with nothing but `lo`, made ahead in a helper."""

    def __init__(self) -> None:
        self._pools: dict[str, _NetworkPool] = {}

    async def lease(self, workspace: str, userns_fd: int) -> Lease:
        pool = self._pools.get(workspace)
        if pool is None:
            pool = self._pools[workspace] = _NetworkPool(userns_fd)
        return Lease(await pool.take(), "# this container has no network\n", "127.0.1.1")

    def release(self, lease: Lease) -> None:
        linux.close_fds([lease.netns_fd])

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()


class _NetworkPool:
    def __init__(self, userns_fd: int) -> None:
        self._maker = linux.NetworkMaker(userns_fd)
        self._ready: deque[int] = deque()
        self._waiting: deque[asyncio.Future[int]] = deque()
        self._asked = 0
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._maker.socket.fileno(), self._receive)
        self._ask()

    def _ask(self) -> None:
        # Bounded by what is wanted now, so the helper's socket never fills.
        while self._asked + len(self._ready) < SPARE_NETWORKS + len(self._waiting) and self._asked < 64:
            self._maker.ask()
            self._asked += 1

    def _receive(self) -> None:
        while True:
            try:
                fd = self._maker.receive()
            except BlockingIOError:
                break
            except (StepError, OSError) as error:
                self._fail(error)
                break
            self._asked -= 1
            while self._waiting:
                waiter = self._waiting.popleft()
                if not waiter.done():
                    waiter.set_result(fd)
                    break
            else:
                self._ready.append(fd)
        if self._maker.socket.fileno() >= 0:
            self._ask()

    def _fail(self, error: Exception) -> None:
        self._asked = max(0, self._asked - 1)
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_exception(StepError("make-network-namespace", error))
        self._waiting.clear()

    async def take(self) -> int:
        if self._ready:
            fd = self._ready.popleft()
            self._ask()
            return fd
        waiter: asyncio.Future[int] = self._loop.create_future()
        self._waiting.append(waiter)
        self._ask()
        try:
            return await asyncio.wait_for(waiter, SHELL_TIMEOUT)
        except (TimeoutError, asyncio.TimeoutError):
            raise StepError("make-network-namespace", f"no answer within {SHELL_TIMEOUT:g} s") from None

    def close(self) -> None:
        self._loop.remove_reader(self._maker.socket.fileno())
        self._maker.close()
        linux.close_fds(list(self._ready))
        self._ready.clear()
