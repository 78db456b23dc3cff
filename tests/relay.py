"""A network between two processes on one machine: slow, narrow, broken, or parted in one direction or in both.

Bytes are as in TCP delayed and never lost: while the network is parted they wait where they are, also those that say
that an end was closed; when it is healed they go on, and an end that is gone by then breaks the other. It also carries
sockets that an agent hands over, and puts itself between their ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

PIECE = 1 << 16
LOOK_S = 0.01

Address = tuple[str, int] | str


class Relay:
    """Listens, and connects each who comes with `target`. `up` is from whoever comes to the target."""

    def __init__(self, target: Address, listen: Address = ("127.0.0.1", 0)) -> None:
        self.target = target
        self.delay = 0.0
        """Seconds that each byte takes, in either direction."""
        self.rate = 0.0
        """Bytes a second, in each direction; 0: without limit."""
        self.parted = {"up": False, "down": False}
        self.carried = {"up": 0, "down": 0}
        self.limit: Callable[[], bool] = lambda: False
        """Asked after each piece: whether to break all connections now."""
        self.broken = 0
        self._loop = asyncio.new_event_loop()
        self._pairs: set[Pair] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listeners: list[socket.socket] = []
        self._thread = threading.Thread(target=self._loop.run_forever, name="relay", daemon=True)
        self._thread.start()
        listener = _listening(listen)
        self.address: Address = listener.getsockname()
        self._listeners.append(listener)
        self._call(self._accept(listener), wait=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.address[1]}"

    def part(self, *directions: str) -> None:
        """Nothing passes in these directions, `up` and `down`, from now on."""
        for direction in directions or ("up", "down"):
            self.parted[direction] = True

    def heal(self) -> None:
        self.parted = {"up": False, "down": False}

    def cut(self) -> None:
        """Break all connections; others may be made."""
        self._call(self._cut())

    def close(self) -> None:
        """Idempotent."""
        if self._loop.is_closed():
            return
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def carry_sockets(self, listen: Path, target: Path) -> None:
        """Take hand-overs at `listen`, and pass them on to `target` with an end of ours in place of each socket."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(listen))
        listener.listen(8)
        listener.setblocking(False)
        self._listeners.append(listener)
        self._call(self._accept_handoffs(listener, str(target)), wait=False)

    # -- in the loop

    def _call(self, body: Coroutine[Any, Any, None], wait: bool = True) -> None:
        def start() -> None:
            task = self._loop.create_task(body)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            task.add_done_callback(lambda _: done.set())

        done = threading.Event()
        self._loop.call_soon_threadsafe(start)
        if wait:
            assert done.wait(10)

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            near, _ = await self._loop.sock_accept(listener)
            near.setblocking(False)
            self._call(self._connect(near), wait=False)

    async def _connect(self, near: socket.socket) -> None:
        family = socket.AF_UNIX if isinstance(self.target, str) else socket.AF_INET
        far = socket.socket(family, socket.SOCK_STREAM)
        far.setblocking(False)
        try:
            await self._passable("up")
            await self._loop.sock_connect(far, self.target)
        except BaseException as error:
            near.close()
            far.close()
            if isinstance(error, OSError):
                return
            raise
        if family == socket.AF_INET:
            for sock in (near, far):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await self._join(near, far)

    async def _join(self, near: socket.socket, far: socket.socket) -> None:
        pair = Pair(near, far)
        self._pairs.add(pair)
        try:
            up = self._loop.create_task(self._carry("up", near, far))
            down = self._loop.create_task(self._carry("down", far, near))
            pair.tasks = [up, down]
            await asyncio.wait(pair.tasks)
        finally:
            self._pairs.discard(pair)
            pair.close()

    async def _passable(self, direction: str) -> None:
        while self.parted[direction]:  # noqa: ASYNC110
            await asyncio.sleep(LOOK_S)

    async def _carry(self, direction: str, source: socket.socket, sink: socket.socket) -> None:
        """A piece is sent `delay` after it came; meanwhile others are on their way, as many as fit into the rate."""
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)
        sender = self._loop.create_task(self._send(direction, under_way, sink))
        data = b"x"
        try:
            while data and not sender.done():
                await self._passable(direction)
                try:
                    data = await self._loop.sock_recv(source, PIECE)
                except OSError:
                    data = b""
                await under_way.put((time.monotonic() + self.delay, data))
                if self.rate:
                    await asyncio.sleep(len(data) / self.rate)
            await sender
        finally:
            sender.cancel()

    async def _send(self, direction: str, under_way: asyncio.Queue[tuple[float, bytes]], sink: socket.socket) -> None:
        while True:
            due, data = await under_way.get()
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            await self._passable(direction)
            try:
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                await self._loop.sock_sendall(sink, data)
            except OSError:
                return
            self.carried[direction] += len(data)
            if self.limit():
                self.broken += 1
                for pair in list(self._pairs):
                    pair.cut()

    async def _cut(self) -> None:
        self.broken += 1
        for pair in list(self._pairs):
            pair.cut()

    async def _close(self) -> None:
        for listener in self._listeners:
            listener.close()
        this = asyncio.current_task()
        for task in [task for task in self._tasks if task is not this]:
            task.cancel()
        for pair in list(self._pairs):
            pair.cut()
        await asyncio.sleep(0)

    # -- hand-overs

    async def _accept_handoffs(self, listener: socket.socket, target: str) -> None:
        while True:
            near, _ = await self._loop.sock_accept(listener)
            near.setblocking(False)
            self._call(self._pass_on(near, target), wait=False)

    async def _pass_on(self, near: socket.socket, target: str) -> None:
        far = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with near, far:
            await self._passable("up")
            far.connect(target)
            while True:
                await self._passable("up")
                await self._readable(near)
                data, fds, _, _ = socket.recv_fds(near, 4096, 4)
                if not data:
                    return
                for fd in fds:
                    mine, theirs = socket.socketpair()
                    runner = socket.socket(fileno=fd)
                    for sock in (mine, runner):
                        sock.setblocking(False)
                    socket.send_fds(far, [data], [theirs.fileno()])
                    theirs.close()
                    self._call(self._join(runner, mine), wait=False)

    async def _readable(self, sock: socket.socket) -> None:
        ready: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(sock, lambda: None if ready.done() else ready.set_result(None))
        try:
            await ready
        finally:
            self._loop.remove_reader(sock)


class Pair:
    """Two connections that are joined."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self.near = near
        self.far = far
        self.tasks: list[asyncio.Task[None]] = []

    def cut(self) -> None:
        """As when a router between them was restarted: whoever says something learns that the other is gone."""
        for sock in (self.near, self.far):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for task in self.tasks:
            task.cancel()

    def close(self) -> None:
        for sock in (self.near, self.far):
            sock.close()


def _listening(address: Address) -> socket.socket:
    if isinstance(address, str):
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(address)
    else:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.bind(address)
    listener.listen(64)
    listener.setblocking(False)
    return listener


@contextlib.contextmanager
def relay(target: Address, listen: Address = ("127.0.0.1", 0)) -> Iterator[Relay]:
    made = Relay(target, listen)
    try:
        yield made
    finally:
        made.close()
