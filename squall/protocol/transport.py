"""Both ends of a connection: `Link` for threads (SDK, runner), `FrameStream` for an event loop (server, agent).

`Link` has no event loop and no hop between threads on its fast path. Of all threads that wait for an answer, one
reads the socket for all (the leader); it hands each message to whom it belongs and leaves when its own has come,
passing the lead on. A call made from an idle thread is thus one send and one receive by that very thread. When
nobody waits in the foreground, one background thread leads, so that pushed messages (logs, cancellations) are seen
at any time; it keeps out of the way while foreground calls follow one another closely.

`FrameStream` is a duck-typed asyncio protocol: it cuts frames, coalesces what is written in one turn of the loop
into one write, and refuses a frame that announces more than the limit.

Nothing here knows what a message means. Tested in `tests/unit/test_transport.py`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from squall.exception import Error, OutputTimeoutError, ServiceError, from_wire
from squall.protocol.messages import (
    FRAME_LIMIT_BYTES,
    Failure,
    Message,
    Outputs,
    PutBlob,
    Reply,
    Run,
    Submit,
    decode,
    encode_header,
)

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")

HEAD_BYTES = 8
RECEIVE_BYTES = 1 << 16
"""Of one read of what is not known to be large; the rest of a large payload is read at once."""
SEND_TIMEOUT = 120.0
QUIET_S = 0.02
"""How long the foreground must have been quiet before the background thread takes the lead."""
HEADER_LIMIT_BYTES = 16 << 20
CHUNK_LIMIT = 1024
"""Pieces of a frame that are kept as they came; what comes in more is joined."""
LARGE_FRAME_BYTES = 1 << 16
"""From here on a frame is taken and sent without joining it to its neighbours: copying costs more than a call."""

SOCKET_BUFFER_BYTES = 4 << 20
"""A large payload then leaves in few pieces; each piece more is two switches between processes."""
IOV_LIMIT = 1000
"""Pieces that one call of the kernel's takes, and a little less."""
SO_SNDBUFFORCE = 32
"""Linux: as SO_SNDBUF, beyond the limit for ordinary users; needs a privilege."""

IN_PLACE = (Outputs, Run, Submit, PutBlob)
"""Whose large payloads are worked on where they lie; all other messages have bytes."""

driver = threading.local()
"""`driver.blocking` is true while a thread drives a coroutine with `squall._blocking.run`."""


def widen(sock: socket.socket) -> None:
    """Let as much wait in the socket as the kernel grants."""
    for option in (socket.SO_SNDBUF, SO_SNDBUFFORCE):
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)


class Pending(Generic[T]):
    """One value to come: awaited by coroutines of either face, or waited for by a thread. Set once, by any thread."""

    __slots__ = ("_callbacks", "_error", "_lock", "_value", "done", "link")

    def __init__(self, link: Link) -> None:
        self.link = link
        self.done = False
        self._value: Any = None
        self._error: BaseException | None = None
        self._lock: Any = None
        self._callbacks: list[Callable[[], None]] | None = None

    def set(self, value: T) -> None:
        self._finish(value, None)

    def fail(self, error: BaseException) -> None:
        self._finish(None, error)

    def _finish(self, value: Any, error: BaseException | None) -> None:
        if self.done:
            return
        self._value, self._error = value, error
        self.done = True
        self.wake()
        if self._callbacks is not None:
            self._run_callbacks()

    def wake(self) -> None:
        """Make a thread blocked on this look again: it is done, or the lead is free."""
        lock = self._lock
        if lock is not None:
            with contextlib.suppress(RuntimeError):
                lock.release()

    def _run_callbacks(self) -> None:
        callbacks, self._callbacks = self._callbacks or [], None
        for callback in callbacks:
            callback()

    def add_callback(self, callback: Callable[[], None]) -> None:
        """Call `callback` in the thread that sets the value; at once when it is set already."""
        if self._callbacks is None:
            self._callbacks = []
        self._callbacks.append(callback)
        if self.done:
            self._run_callbacks()

    def result(self) -> T:
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[no-any-return]

    def wait(self, timeout: float | None = None) -> T:
        """Block this thread; reads the socket itself when nobody else does. Raises OutputTimeoutError."""
        if not self.done:
            self.link.wait(self, timeout)
        return self.result()

    def __await__(self) -> Generator[Any, None, T]:
        return self.within(None).__await__()

    def within(self, timeout: float | None) -> _Within[T]:
        """Awaitable with a deadline: `await pending.within(5.0)`; raises OutputTimeoutError when it passes."""
        return _Within(self, timeout)


class _Within(Generic[T]):
    __slots__ = ("pending", "timeout")

    def __init__(self, pending: Pending[T], timeout: float | None) -> None:
        self.pending = pending
        self.timeout = timeout

    def wait(self) -> None:
        if not self.pending.done:
            self.pending.link.wait(self.pending, self.timeout)

    def __await__(self) -> Generator[Any, None, T]:
        pending = self.pending
        if not pending.done:
            if getattr(driver, "blocking", False):
                yield self
            else:
                yield from self._await_asyncio()
        return pending.result()

    def _await_asyncio(self) -> Generator[Any, None, None]:
        import asyncio  # heavy, and loaded already by whoever has a running loop

        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def resolve() -> None:
            if not future.done():
                future.set_result(None)

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(resolve)

        self.pending.link.lead_in_background()
        self.pending.add_callback(wake)
        if self.timeout is None:
            yield from future.__await__()
            return
        handle = loop.call_later(self.timeout, resolve)
        yield from future.__await__()
        handle.cancel()
        if not self.pending.done:
            raise OutputTimeoutError(f"no answer within {self.timeout:g} s")


Frame = tuple[bytes, Any]
"""Header and payload; a large payload is a memoryview."""


class FrameReader:
    """Cuts a byte stream into frames, `(header, payload)` pairs; raises ValueError on abuse.

    `feed` takes bytes that came. A large payload is received where it will lie: while one is under way, `room` is
    what is missing of it, and `filled` says how much of that has come. Such a payload is a `memoryview`, any other
    `bytes`.
    """

    __slots__ = ("_chunks", "_filled", "_have", "_header", "_need", "_payload", "_since_join", "limit")

    def __init__(self, limit: int = FRAME_LIMIT_BYTES) -> None:
        self._chunks: list[bytes] = []
        self._since_join = 0
        self._have = 0
        self._need = HEAD_BYTES
        self._header = b""
        self._payload: memoryview | None = None
        """Of the large frame under way, of which `_filled` bytes are there."""
        self._filled = 0
        self.limit = limit

    def room(self) -> memoryview | None:
        """Where the next bytes belong, when they are the rest of a large payload."""
        return None if self._payload is None else self._payload[self._filled :]

    def filled(self, count: int) -> list[Frame]:
        """`count` bytes were written to `room()`."""
        payload = self._payload
        assert payload is not None
        self._filled += count
        if self._filled < len(payload):
            return []
        self._payload = None
        return [(self._header, payload.toreadonly())]

    def feed(self, data: bytes) -> list[Frame]:
        frames: list[Frame] = []
        room = self.room()
        if room is not None:
            count = min(len(room), len(data))
            room[:count] = data[:count]
            frames = self.filled(count)
            data = data[count:]
        return frames + self._feed(data) if data else frames

    def feed_view(self, data: memoryview) -> list[Frame]:
        """As `feed`, for a buffer that is written to again afterwards: only what is kept of it is copied, once."""
        if not self._have and self._payload is None and len(data) >= LARGE_FRAME_BYTES // 2:
            header_len = int.from_bytes(data[:4], "little")
            payload_len = int.from_bytes(data[4:HEAD_BYTES], "little")
            body = HEAD_BYTES + header_len
            if body <= len(data) < body + payload_len and LARGE_FRAME_BYTES <= payload_len <= self.limit - body:
                self._begin_large(bytes(data[HEAD_BYTES:body]), payload_len, data[body:])
                return []
        return self.feed(bytes(data))

    def _feed(self, data: bytes) -> list[Frame]:
        self._have += len(data)
        if self._have < self._need and self._chunks:
            self._chunks.append(data)
            self._since_join += 1
            if self._since_join > CHUNK_LIMIT:
                self._join_latest()
            return []
        if self._chunks:
            self._chunks.append(data)
            data = b"".join(self._chunks)
            self._chunks.clear()
            self._since_join = 0
        return self._cut(data)

    def _join_latest(self) -> None:
        """A frame that comes byte by byte would cost forty times its size: an object each. Only what came since the
        last time is joined, so that no byte is copied again and again."""
        self._chunks[-self._since_join :] = [b"".join(self._chunks[-self._since_join :])]
        self._since_join = 0

    def _cut(self, data: bytes) -> list[Frame]:
        frames: list[Frame] = []
        offset, end = 0, len(data)
        need = HEAD_BYTES
        while end - offset >= HEAD_BYTES:
            header_len = int.from_bytes(data[offset : offset + 4], "little")
            payload_len = int.from_bytes(data[offset + 4 : offset + 8], "little")
            need = HEAD_BYTES + header_len + payload_len
            if need > self.limit or header_len > HEADER_LIMIT_BYTES:
                raise ValueError(f"frame announces {need} bytes, the limit is {self.limit}")
            body = offset + HEAD_BYTES + header_len
            if end - offset < need:
                if payload_len < LARGE_FRAME_BYTES:
                    break
                if end >= body:
                    self._begin_large(data[offset + HEAD_BYTES : body], payload_len, data[body:])
                    offset, need = end, HEAD_BYTES
                    break
                need = HEAD_BYTES + header_len  # look again when the header is there
                break
            frames.append((data[offset + HEAD_BYTES : body], data[body : offset + need]))
            offset += need
            need = HEAD_BYTES
        rest = data[offset:] if offset else data
        self._have, self._need = len(rest), need
        if rest:
            self._chunks.append(rest)
        return frames

    def _begin_large(self, header: bytes, size: int, beginning: bytes | memoryview) -> None:
        self._header = header
        self._payload = memoryview(bytearray(size))
        self._payload[: len(beginning)] = beginning
        self._filled = len(beginning)


def payload_for(message: Message, payload: Any) -> Any:
    """A large payload is a memoryview only for messages that are worked on where they lie; others get bytes."""
    return payload if type(payload) is bytes or isinstance(message, IN_PLACE) else bytes(payload)


Push = Callable[[Message, Any], None]


class Link:
    """A connection shared by the threads of a process. `on_push` gets every message that answers no request; it runs
    in whichever thread leads and must not block. `on_close` is called once with the reason."""

    def __init__(
        self,
        sock: socket.socket,
        on_push: Push,
        on_close: Callable[[str], None] | None = None,
        *,
        background: bool = True,
    ) -> None:
        sock.setblocking(False)
        widen(sock)
        self.sock = sock
        self.on_push = on_push
        self.on_close = on_close
        self.closed = ""
        self._reader = FrameReader()
        # One buffer for good: `recv` would take this much from the allocator, and mostly give it back, for each frame.
        self._buffer = memoryview(bytearray(RECEIVE_BYTES))
        self._frames: deque[Frame] = deque()
        self._send_lock = threading.Lock()
        self._unsent: deque[memoryview] = deque()
        self._lead = threading.Lock()
        self._followers: deque[Pending[Any]] = deque()
        self._requests: dict[int, Pending[tuple[Reply, bytes]]] = {}
        self._next_id = 0
        self._waiting = 0
        self.received = 0
        """Pieces that came, of whatever: where it stands still, nothing comes."""
        self._last_wait = 0.0
        self._parked = False
        self._kick = threading.Event()
        self.ended = threading.Event()
        self._wake_r, self._wake_w = os.pipe()
        os.set_blocking(self._wake_r, False)
        os.set_blocking(self._wake_w, False)
        self._poll = select.poll()
        self._poll.register(sock.fileno(), select.POLLIN)
        self._thread: threading.Thread | None = None
        self._start_lock = threading.Lock()
        if background:
            self.start_background()

    # -- sending

    def send(self, message: Message, payload: bytes = b"") -> None:
        """Put one message on the wire; blocks while the other side does not read. Raises ServiceError when closed."""
        self.send_raw(encode_header(message), payload)

    def send_raw(self, header: bytes, *payload: bytes) -> None:
        """`send` for a header that is encoded already, and a payload in pieces."""
        size = len(payload[0]) if len(payload) == 1 else sum(map(len, payload))
        head = len(header).to_bytes(4, "little") + size.to_bytes(4, "little") + header
        with self._send_lock:
            if self.closed:
                raise ServiceError(f"connection to the server is closed: {self.closed}")
            try:
                self._send_all(head, payload, size)
            except OSError as error:
                reason = f"sending failed: {error}"
                raise ServiceError(f"connection to the server broke: {reason}") from None

    def send_nowait(self, message: Message) -> None:
        """Send, unless somebody else is sending or would have to wait: then something is under way anyway."""
        if not self._send_lock.acquire(blocking=False):
            return
        try:
            if not self.closed and not self._unsent:
                header = encode_header(message)
                frame = len(header).to_bytes(4, "little") + bytes(4) + header
                sent = self.sock.send(frame)
                if sent < len(frame):
                    self._unsent.append(memoryview(frame)[sent:])
        except OSError:  # full, or gone: both are noticed by what does not come back
            pass
        finally:
            self._send_lock.release()

    def _send_all(self, head: bytes, payload: tuple[bytes, ...], size: int) -> None:
        """A small frame is one buffer; of a large one the payload is not copied behind its head.

        Ctrl-C, a cancelled input or a silent peer may end this within a frame. Its rest then leaves before what is
        sent next, which the other side would take for a part of it; a frame of which nothing left is forgotten.
        """
        unsent, is_first = self._unsent, not self._unsent
        parts = [head, *payload] if size >= LARGE_FRAME_BYTES else [b"".join((head, *payload)) if size else head]
        unsent.extend(map(memoryview, parts))
        begun = len(unsent[0])
        try:
            while unsent:
                self._send_some()
        except BaseException:
            if is_first and len(unsent) == len(parts) and len(unsent[0]) == begun:
                unsent.clear()
            raise

    def _send_some(self) -> None:
        unsent = self._unsent
        try:
            few = unsent if len(unsent) <= IOV_LIMIT else itertools.islice(unsent, IOV_LIMIT)
            sent = self.sock.send(unsent[0]) if len(unsent) == 1 else self.sock.sendmsg(few)
        except BlockingIOError:
            writable = select.poll()
            writable.register(self.sock.fileno(), select.POLLOUT)
            if not writable.poll(SEND_TIMEOUT * 1000):
                raise TimeoutError(f"the server read nothing for {SEND_TIMEOUT:g} s") from None
            return
        while unsent and sent >= len(unsent[0]):
            sent -= len(unsent.popleft())
        if sent:
            unsent[0] = unsent[0][sent:]

    def request(self, message: Message, payload: bytes = b"") -> Pending[tuple[Reply, bytes]]:
        """Send a message that is answered by `Reply` or `Failure`; the latter is raised by the Pending."""
        pending: Pending[tuple[Reply, bytes]] = Pending(self)
        with self._start_lock:
            self._next_id += 1
            message.id = self._next_id
        self._requests[message.id] = pending
        try:
            self.send(message, payload)
        except Error:
            self._requests.pop(message.id, None)
            raise
        if self.closed:
            self._fail_requests()
        return pending

    # -- waiting

    def wait(self, pending: Pending[Any], timeout: float | None = None) -> None:
        """Block until `pending` is done, leading if the lead is free."""
        deadline = None if timeout is None else time.monotonic() + timeout
        self._waiting += 1
        try:
            while not pending.done:
                if self._lead.acquire(blocking=False):
                    try:
                        self._lead_for(pending, deadline)
                    finally:
                        self._pass_lead()
                else:
                    self._follow(pending, deadline)
        finally:
            self._waiting -= 1
            self._last_wait = time.monotonic()

    def _lead_for(self, pending: Pending[Any], deadline: float | None) -> None:
        """Read until `pending` is done. After a quiet spell the background thread is parked, so that an idle process
        has no wake-ups at all; the message that ends the spell unparks it."""
        spell = 0.05
        while not pending.done:
            if self.closed:
                pending.fail(ServiceError(f"connection to the server is closed: {self.closed}"))
                return
            if self._frames:
                self._deliver_all()
                continue
            wait_s = spell if deadline is None else min(spell, max(0.0, deadline - time.monotonic()))
            if not self._poll.poll(wait_s * 1000):
                if deadline is not None and time.monotonic() >= deadline:
                    raise OutputTimeoutError("no answer within the given time")
                self._parked, spell = True, 3600.0
                continue
            if self._parked:
                self._parked = False
                self._kick.set()
            self._read()

    def _follow(self, pending: Pending[Any], deadline: float | None) -> None:
        lock = threading.Lock()
        lock.acquire()
        pending._lock = lock
        self._followers.append(pending)
        self._ask_lead()
        if not pending.done and self._lead.locked():
            remaining = -1.0 if deadline is None else max(0.0, deadline - time.monotonic())
            lock.acquire(timeout=remaining)
        with contextlib.suppress(ValueError):
            self._followers.remove(pending)
        if deadline is not None and not pending.done and time.monotonic() >= deadline:
            raise OutputTimeoutError("no answer within the given time")

    def _ask_lead(self) -> None:
        with contextlib.suppress(OSError):
            os.write(self._wake_w, b"1")

    def _pass_lead(self) -> None:
        self._lead.release()
        if self._parked:
            self._parked = False
            self._kick.set()
        while self._followers:
            try:
                follower = self._followers.popleft()
            except IndexError:
                return
            if not follower.done:
                follower.wake()
                return

    # -- reading (only the leader)

    def _read(self) -> None:
        room = self._reader.room()
        try:
            received = self.sock.recv_into(self._buffer if room is None else room)
        except BlockingIOError:
            return
        except OSError as error:
            self._break(f"receiving failed: {error}")
            return
        if not received:
            self._break("the other side closed it")
            return
        self.received += 1
        try:
            reader = self._reader
            self._frames.extend(reader.feed_view(self._buffer[:received]) if room is None else reader.filled(received))
            self._deliver_all()
        except ValueError as error:
            self._break(f"received garbage: {error}")

    def _deliver_all(self) -> None:
        """A KeyboardInterrupt may end this anywhere; what is left is delivered by the next to lead."""
        frames = self._frames
        while frames:
            header, payload = frames.popleft()
            self._deliver(decode(header), payload)

    def _deliver(self, message: Message, payload: Any) -> None:
        payload = payload_for(message, payload)
        if message.re and isinstance(message, (Reply, Failure)):
            pending = self._requests.pop(message.re, None)
            if pending is None:
                return
            if isinstance(message, Failure):
                pending.fail(from_wire(message.code, message.message, message.hint))
            else:
                pending.set((message, payload))
        else:
            self.on_push(message, payload)

    # -- the background thread

    def start_background(self) -> None:
        """Have pushed messages read when no thread waits. Idempotent."""
        if self._thread is None and not self.closed:
            with self._start_lock:
                if self._thread is None:
                    thread = threading.Thread(target=self._background, name="squall-link", daemon=True)
                    self._thread = thread
                    thread.start()

    def lead_in_background(self) -> None:
        """As `start_background`, and have the thread look at once: a coroutine waits and nobody will read for it."""
        self.start_background()
        if not self._lead.locked():
            self._last_wait = 0.0
            self._kick.set()

    def _background(self) -> None:
        poll = select.poll()
        poll.register(self._wake_r, select.POLLIN)
        poll.register(self.sock.fileno(), select.POLLIN)
        while not self.closed:
            quiet = time.monotonic() - self._last_wait
            if self._waiting or quiet < QUIET_S:
                self._kick.wait(None if self._parked else QUIET_S)
                self._kick.clear()
                continue
            with self._lead:
                self._lead_in_background(poll)
            self._pass_lead_to_follower()

    def _lead_in_background(self, poll: select.poll) -> None:
        while not self.closed and not self._waiting:
            ready = dict(poll.poll())
            if self._wake_r in ready:
                with contextlib.suppress(OSError):
                    os.read(self._wake_r, 4096)
            if self.sock.fileno() in ready:
                self._read()

    def _pass_lead_to_follower(self) -> None:
        for follower in list(self._followers):
            follower.wake()
            return

    # -- closing

    def _break(self, reason: str) -> None:
        if self.closed:
            return
        self.closed = reason
        self.ended.set()
        self._fail_requests()
        self._ask_lead()
        self._kick.set()
        for follower in list(self._followers):
            follower.wake()
        if self.on_close is not None:
            self.on_close(reason)

    def _fail_requests(self) -> None:
        error = ServiceError(f"connection to the server broke: {self.closed}")
        for key in list(self._requests):
            pending = self._requests.pop(key, None)
            if pending is not None:
                pending.fail(error)

    def abort(self, reason: str) -> None:
        """Give the connection up; whoever waits gets a ServiceError with the reason. From any thread."""
        self._break(reason)
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection; whoever waits gets a ServiceError. Idempotent."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self._break("closed by this side")
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=1.0)
        with contextlib.suppress(OSError):
            self.sock.close()
        for fd in (self._wake_r, self._wake_w):
            with contextlib.suppress(OSError):
                os.close(fd)


_scratches = threading.local()


def _scratch() -> memoryview:
    """The buffer of this thread's loop: what is read to it is copied before anything else is read."""
    buffer: memoryview | None = getattr(_scratches, "buffer", None)
    if buffer is None:
        buffer = _scratches.buffer = memoryview(bytearray(RECEIVE_BYTES))
    return buffer


class FrameStream:
    """One connection in an event loop. `on_frame(stream, header, payload)` gets raw frames in order; `on_lost(stream,
    reason)` comes once. Writes of one loop turn leave as one.

    With `hold_above` set, an end that does not read is not listened to: what it asks for would fill our memory."""

    __slots__ = (
        "_held", "_in_room", "_loop", "_on_frame", "_on_lost", "_out", "_out_bytes", "_reader", "closing", "hold_above",
        "owner", "paused", "received", "transport", "waiters",
    )  # fmt: skip

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        on_frame: Callable[[FrameStream, bytes, Any], None],
        on_lost: Callable[[FrameStream, str], None],
        limit: int = FRAME_LIMIT_BYTES,
    ) -> None:
        self._loop = loop
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._reader = FrameReader(limit)
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._held: list[Frame] = []
        self._in_room = False
        self.transport: Any = None
        self.closing = ""
        self.paused = False
        self.hold_above = 0
        """Bytes written and not read by the other side above which nothing is taken from it; 0 for no such bound.
        Never for two ends that both hold: each would wait for the other."""
        self.owner: Any = None
        """Whatever the user of the stream wants to find again from it."""
        self.waiters: list[asyncio.Future[None]] = []
        self.received = 0
        """Pieces that came, of whatever: where it stands still, nothing comes."""

    def allow(self, limit: int) -> None:
        """Take frames of up to `limit` bytes from now on."""
        self._reader.limit = limit

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.set_write_buffer_limits(high=4 << 20)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            widen(sock)
        if self._out:  # queued before there was a connection to write to
            self._loop.call_soon(self.flush)

    def get_buffer(self, hint: int) -> memoryview:
        """uvloop asks where to read to; whoever does not ask calls `data_received`."""
        room = self._reader.room()
        self._in_room = room is not None
        return _scratch() if room is None else room

    def buffer_updated(self, count: int) -> None:
        self.received += 1
        if self._in_room:
            self._take_or_hold(self._reader.filled(count))
        else:
            self._received(self._reader.feed_view, _scratch()[:count])

    def data_received(self, data: bytes) -> None:
        self.received += 1
        self._received(self._reader.feed, data)

    def _received(self, feed: Callable[[Any], list[Frame]], data: Any) -> None:
        try:
            frames = feed(data)
        except ValueError as error:
            self.abort(f"received garbage: {error}")
            return
        self._take_or_hold(frames)

    def _take_or_hold(self, frames: list[Frame]) -> None:
        if self._held:
            self._held += frames
        else:
            self._take(frames)

    def _take(self, frames: list[Frame]) -> None:
        for taken, (header, payload) in enumerate(frames):
            if self.closing:
                return
            if self.hold_above and self._is_unread():
                self._held = frames[taken:]
                self.transport.pause_reading()
                return
            self._on_frame(self, header, payload)

    def _is_unread(self) -> bool:
        if self._out_bytes > self.hold_above:
            return True
        return self.paused and self.waiting_bytes() + self._out_bytes > self.hold_above

    def _take_held(self) -> None:
        """The other side has read: go on where it was left waiting."""
        frames, self._held = self._held, []
        self._take(frames)
        if frames and not self._held and not self.closing:
            self.transport.resume_reading()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: BaseException | None) -> None:
        reason = self.closing or (f"connection lost: {error}" if error else "the other side closed it")
        self.closing = reason
        self.resume_writing()
        self._on_lost(self, reason)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        if self._held:
            self._loop.call_soon(self._take_held)
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def waiting_bytes(self) -> int:
        """What was written and the other side has not taken yet."""
        return 0 if self.transport is None else int(self.transport.get_write_buffer_size())

    async def drained(self) -> None:
        """Wait until the other side has read most of what was written."""
        while self.paused and not self.closing:
            waiter = self._loop.create_future()
            self.waiters.append(waiter)
            await waiter

    def send(self, message: Message, payload: bytes = b"") -> None:
        self.send_raw(encode_header(message), payload)

    def send_raw(self, header: bytes, *payload: bytes) -> None:
        """Queue one frame, its payload in pieces, for the end of this loop turn. Harmless when the connection is
        gone."""
        if self.closing:
            return
        if not self._out:
            self._loop.call_soon(self.flush)
        size = sum(map(len, payload))
        self._out.append(len(header).to_bytes(4, "little") + size.to_bytes(4, "little") + header)
        self._out_bytes += HEAD_BYTES + len(header) + size
        if size:
            self._out.extend(payload)

    def flush(self) -> None:
        """Write now what is queued."""
        if self.transport is None and not self.closing:
            return  # `connection_made` comes back to it
        out, self._out = self._out, []
        size, self._out_bytes = self._out_bytes, 0
        if self.closing or not out:
            return
        if size < LARGE_FRAME_BYTES:
            self.transport.write(b"".join(out))
        else:
            self.transport.writelines(out)
        if self._held and not self.paused:
            self._loop.call_soon(self._take_held)

    def close(self, reason: str) -> None:
        """Send what is queued, then close."""
        if not self.closing and self.transport is not None:
            self.flush()
            self.closing = reason
            self.transport.close()

    def abort(self, reason: str) -> None:
        if not self.closing:
            self.closing = reason
            if self.transport is not None:
                self.transport.abort()
