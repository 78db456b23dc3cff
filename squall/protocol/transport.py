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
import functools
import itertools
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from squall.exception import Error, OutputTimeoutError, ServiceError, StartupError, from_wire
from squall.protocol.driving import driver
from squall.protocol.frames import HEAD_BYTES, LARGE_FRAME_BYTES, PEEK_BYTES, Frame, FrameReader, Packed, flat
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
from squall.protocol.silence import Silence

if TYPE_CHECKING:
    import asyncio

__all__ = [
    "Frame",
    "FrameReader",
    "FrameStream",
    "Link",
    "Pending",
    "RequestLostError",
    "payload_for",
    "widen",
]

T = TypeVar("T")

RECEIVE_BYTES = 1 << 16
"""Of one read of what is not known to be large; the rest of a large payload is read at once."""
SEND_TIMEOUT = 120.0
QUIET_S = 0.02
"""How long the foreground must have been quiet before the background thread takes the lead."""
RESUME_LOOK_S = 0.5
"""How long somebody who waits for another connection sleeps at most before looking again; its coming wakes them."""

SOCKET_BUFFER_BYTES = 4 << 20
"""A large payload then leaves in few pieces; each piece more is two switches between processes."""
IOV_LIMIT = 1000
"""Pieces that one call of the kernel's takes, and a little less."""
SO_SNDBUFFORCE = 32
"""Linux: as SO_SNDBUF, beyond the limit for ordinary users; needs a privilege."""

IN_PLACE = (Outputs, Run, Submit, PutBlob)
"""Whose large payloads are worked on where they lie; all other messages have bytes."""


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


def payload_for(message: Message, payload: Any) -> Any:
    """A large payload is a memoryview only for messages that are worked on where they lie; others get bytes."""
    return payload if type(payload) is bytes or isinstance(message, IN_PLACE) else bytes(payload)


Push = Callable[[Message, Any], None]


@dataclass
class _Asked:
    """A request without an answer yet; what it says is kept where saying it twice does no harm."""

    pending: Pending[tuple[Reply, bytes]]
    message: Message | None
    payload: Packed


class RequestLostError(ServiceError):
    """The connection broke before the answer came, to a request that may not be repeated just so."""


_LOST_HINT = "whether it was done is not known: look before you repeat it"


class Link:
    """A connection shared by the threads of a process. `on_push` gets every message that answers no request; it runs
    in whichever thread leads and must not block. `on_close` is called once with the reason.

    With `on_lost` set, a connection that breaks may be replaced: it is told the reason and says whether it will bring
    `resume` another one, or `give_up`. Meanwhile the link is *lost*: who waits goes on waiting, requests that may be
    repeated are, what is `tracked` is sent again as its sender says, and the rest fails or is dropped."""

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
        self.on_lost: Callable[[str], bool] | None = None
        self.closed = ""
        self.lost = ""
        """Why there is no connection just now, while another is made."""
        self.epoch = 0
        """How many connections there were before this one."""
        self._resumed = threading.Event()
        self._reader = FrameReader()
        # One buffer for good: `recv` would take this much from the allocator, and mostly give it back, for each frame.
        self._buffer = memoryview(bytearray(RECEIVE_BYTES))
        self._frames: deque[Frame] = deque()
        self._send_lock = threading.Lock()
        self._unsent: deque[memoryview] = deque()
        self._lead = threading.Lock()
        self._followers: deque[Pending[Any]] = deque()
        self._requests: dict[int, _Asked] = {}
        self._next_id = 0
        self._waiting = 0
        self.received = 0
        """Pieces that came, of whatever: where it stands still, nothing comes."""
        self.silence = Silence()
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

    def send(self, message: Message, payload: Packed = b"") -> None:
        """Put one message on the wire; blocks while the other side does not read. Raises ServiceError when closed.
        While the connection is lost, only what is of no use to the next one may be sent: it is dropped."""
        if self.lost and message.IS_FLEETING:
            return
        self.send_raw(encode_header(message), payload)

    def send_tracked(self, message: Message, payload: Packed, note: Callable[[], None]) -> None:
        """Send what has to be sent again if the connection is lost before its answer. `note` remembers it for that, at
        a moment when `resume` is either over or will find it. Raises ServiceError when closed."""
        self.send_raw(encode_header(message), payload, note=note)

    def send_raw(self, header: bytes, *payload: Packed, note: Callable[[], None] | None = None) -> None:
        """`send`, or `send_tracked` with `note`, for a header that is encoded already and a payload in pieces."""
        size = len(payload[0]) if len(payload) == 1 else sum(map(len, payload))
        head = len(header).to_bytes(4, "little") + size.to_bytes(4, "little") + header
        with self._send_lock:
            if self.closed:
                raise ServiceError(f"connection to the server is closed: {self.closed}")
            if note is not None:
                note()
            if self.lost:
                broken = self.lost
            else:
                try:
                    self._send_all(head, payload, size)
                    return
                except OSError as error:
                    broken = f"sending failed: {error}"
        if self.on_lost is not None and not self.lost:
            self._break(broken)
        if note is None or not self.lost:
            raise RequestLostError(f"connection to the server broke: {broken}", hint=_LOST_HINT)

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

    def _send_all(self, head: bytes, payload: tuple[Any, ...], size: int) -> None:
        """A small frame is one buffer; of a large one the payload is not copied behind its head.

        Ctrl-C, a cancelled input or a silent peer may end this within a frame. Its rest then leaves before what is
        sent next, which the other side would take for a part of it; a frame of which nothing left is forgotten.
        """
        unsent, is_first = self._unsent, not self._unsent
        parts = [head, *flat(payload)] if size >= LARGE_FRAME_BYTES else [b"".join((head, *payload)) if size else head]
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

    def request(self, message: Message, payload: Packed = b"") -> Pending[tuple[Reply, bytes]]:
        """Send a message that is answered by `Reply` or `Failure`; the latter is raised by the Pending."""
        pending: Pending[tuple[Reply, bytes]] = Pending(self)
        with self._start_lock:
            self._next_id += 1
            message.id = number = self._next_id
        again = message.IS_REPEATABLE and self.on_lost is not None
        asked = _Asked(pending, message, payload) if again else _Asked(pending, None, b"")
        note = functools.partial(self._requests.__setitem__, number, asked)
        try:
            if again:
                self.send_tracked(message, payload, note)
            else:
                note()
                self.send(message, payload)
        except Error:
            self._requests.pop(number, None)
            raise
        if self.closed:
            self._fail_requests(lost=False)
        return pending

    # -- waiting

    def wait(self, pending: Pending[Any], timeout: float | None = None) -> None:
        """Block until `pending` is done, leading if the lead is free."""
        deadline = None if timeout is None else time.monotonic() + timeout
        self._waiting += 1
        try:
            while not pending.done:
                if self.lost:
                    self._await_resumed(deadline)
                elif self._lead.acquire(blocking=False):
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
        while not pending.done and not self.lost:
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
                self._parked, spell = True, self.silence.look(self, self._parked)
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
        """What has come; of a large payload as much as there is, before anybody looks whether there is more."""
        more = True
        while more:
            room = self._reader.room()
            try:
                received = self.sock.recv_into(self._scratch() if room is None else room)
            except BlockingIOError:
                return
            except OSError as error:
                self._break(f"receiving failed: {error}")
                return
            if not received:
                self._break("the other side closed it")
                return
            more = self._take(received, room)

    def _scratch(self) -> memoryview:
        return self._buffer[:PEEK_BYTES] if self._reader.peek else self._buffer

    def _take(self, received: int, room: memoryview | None) -> bool:
        """Deliver what was received. True while the rest of a large payload is missing, which is likely to be there."""
        self.received += 1
        reader = self._reader
        try:
            self._frames.extend(reader.feed_view(self._buffer[:received]) if room is None else reader.filled(received))
            self._deliver_all()
        except ValueError as error:
            self._break(f"received garbage: {error}")
            return False
        return room is None and reader is self._reader and reader.room() is not None

    def _deliver_all(self) -> None:
        """A KeyboardInterrupt may end this anywhere; what is left is delivered by the next to lead."""
        frames = self._frames
        while frames:
            header, payload = frames.popleft()
            self._deliver(decode(header), payload)

    def _deliver(self, message: Message, payload: Any) -> None:
        payload = payload_for(message, payload)
        if message.re and isinstance(message, (Reply, Failure)):
            asked = self._requests.pop(message.re, None)
            if asked is None:
                return
            if isinstance(message, Failure):
                error = from_wire(message.code, message.message, message.hint)
                if isinstance(error, StartupError):
                    error.packed = bytes(payload)
                asked.pending.fail(error)
            else:
                asked.pending.set((message, payload))
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
        while not self.closed:
            if self.lost:
                self._resumed.wait(RESUME_LOOK_S)
                continue
            quiet = time.monotonic() - self._last_wait
            if self._waiting or quiet < QUIET_S:
                self._kick.wait(None if self._parked else QUIET_S)
                self._kick.clear()
                continue
            with self._lead:
                self._lead_in_background()
            self._pass_lead_to_follower()

    def _lead_in_background(self) -> None:
        poll = select.poll()
        poll.register(self._wake_r, select.POLLIN)
        poll.register(self.sock.fileno(), select.POLLIN)
        while not self.closed and not self.lost and not self._waiting:
            ready = dict(poll.poll(self.silence.wait_ms)) or self.silence.missed(self)
            if self._wake_r in ready:
                with contextlib.suppress(OSError):
                    os.read(self._wake_r, 4096)
            if self.sock.fileno() in ready:
                self._read()

    def _pass_lead_to_follower(self) -> None:
        for follower in list(self._followers):
            follower.wake()
            return

    # -- another connection in the place of a lost one

    def has_open_requests(self) -> bool:
        """Whether somebody waits for an answer that another connection could bring."""
        return any(asked.message is not None for asked in list(self._requests.values()))

    def await_readers(self) -> None:
        """Of a lost connection: wait until whoever reads has handed on what had come, and has left."""
        with self._lead:
            pass

    def _await_resumed(self, deadline: float | None) -> None:
        remaining = RESUME_LOOK_S if deadline is None else min(RESUME_LOOK_S, deadline - time.monotonic())
        if remaining <= 0:
            raise OutputTimeoutError("no answer within the given time")
        self._resumed.wait(remaining)

    def resume(
        self,
        sock: socket.socket,
        reader: FrameReader,
        early: Iterable[tuple[bytes, bytes]],
        tracked: Callable[[], Iterable[tuple[Message, Packed]]],
    ) -> None:
        """Go on over another connection, on which `reader` has read as far as the frames `early`. Requests without an
        answer are sent again, and what `tracked` gives, which is asked while nobody else can send."""
        with self._lead:  # whoever reads has left, or is about to
            self._install(sock)
            self._reader = reader
            self._frames.extend(early)
        with self._send_lock:
            if self.closed:
                return
            waiting = [asked for _, asked in sorted(self._requests.items()) if asked.message is not None]
            again = [(asked.message, asked.payload) for asked in waiting if asked.message is not None]
            again += tracked()
            self.lost = ""
            self.epoch += 1
            self._resumed.set()
            self._kick.set()
            try:
                for message, payload in again:
                    header = encode_header(message)
                    head = len(header).to_bytes(4, "little") + len(payload).to_bytes(4, "little") + header
                    self._send_all(head, (payload,), len(payload))
                return
            except OSError as error:
                broken = f"sending failed: {error}"
        self._break(broken)

    def _install(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        widen(sock)
        with contextlib.suppress(OSError, KeyError):
            self._poll.unregister(self.sock.fileno())
        self.sock.close()
        self.sock = sock
        self._unsent.clear()
        self._frames.clear()
        self._poll.register(sock.fileno(), select.POLLIN)

    def give_up(self, reason: str) -> None:
        """There will be no other connection."""
        self._end(reason)

    # -- closing

    def _break(self, reason: str) -> None:
        if self.closed or self.lost:
            return
        if self.on_lost is None:
            self._end(reason)
            return
        self.lost = reason  # before anything is decided, so that whoever reads leaves, and nobody decides twice
        self._resumed.clear()
        if not self.on_lost(reason):
            self._end(reason)
            return
        self._fail_requests(lost=True)
        self._wake_all()
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def _end(self, reason: str) -> None:
        if self.closed:
            return
        self.closed = reason
        self.lost = ""
        self.ended.set()
        self._fail_requests(lost=False)
        self._wake_all()
        self._resumed.set()
        if self.on_close is not None:
            self.on_close(reason)

    def _wake_all(self) -> None:
        self._ask_lead()
        self._kick.set()
        for follower in list(self._followers):
            follower.wake()

    def _fail_requests(self, *, lost: bool) -> None:
        """Fail those that wait for an answer; of a lost connection only those that may not be repeated."""
        for key, asked in list(self._requests.items()):
            if lost and asked.message is not None:
                continue
            if self._requests.pop(key, None) is not None:
                asked.pending.fail(self._broken())

    def _broken(self) -> ServiceError:
        return RequestLostError(f"connection to the server broke: {self.closed or self.lost}", hint=_LOST_HINT)

    def abort(self, reason: str) -> None:
        """Give the connection up; whoever waits gets a ServiceError with the reason. From any thread."""
        self._break(reason)
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection; whoever waits gets a ServiceError. Idempotent."""
        self._end("closed by this side")
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
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
        if room is not None:
            return room
        return _scratch()[:PEEK_BYTES] if self._reader.peek else _scratch()

    def buffer_updated(self, count: int) -> None:
        self.received += 1
        if self._in_room:
            self._received(self._reader.filled, count)
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
