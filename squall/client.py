"""Client: the process's connection to its server, and what comes back over it.

Owns connecting (and starting an embedded server when none listens), the routing of pushed messages to whoever waits
for them, blobs, and the translation of an `OutputItem` into a value or an exception. One client per process,
`Client.current()`; in a container the runner installs one on its own link. Must never interpret log text or decide
to retry an input: the server does. How it goes on when its connection breaks is in
`_resume`. Tested in `tests/unit/test_client.py` and `tests/integration/test_calls.py`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from squall._blocking import both
from squall._context import state
from squall._observe import Logger
from squall.exception import (
    CancelledError,
    ConflictError,
    ContainerLostError,
    Error,
    FunctionTimeoutError,
    InternalError,
    InvalidError,
    RemoteError,
    ResourceExhaustedError,
    SerializationError,
    ServiceError,
    StartupError,
    VersionError,
)
from squall.protocol import payload as payloads
from squall.protocol.frames import Packed
from squall.protocol.messages import (
    BLOB_CHUNK_BYTES,
    INLINE_LIMIT_BYTES,
    BindFunction,
    BuildOutput,
    CreateApp,
    Ending,
    ExecData,
    ExecExit,
    GetBlob,
    HasBlobs,
    Hello,
    Interact,
    LogChunk,
    Message,
    Notice,
    OutputItem,
    Outputs,
    Ping,
    PutBlob,
    Reply,
    Welcome,
    split_payload,
)
from squall.protocol.transport import Link, Pending, RequestLostError

if TYPE_CHECKING:
    from squall._terminal import Terminal
    from squall.config import Config

log = Logger("client")

PAYLOAD_LIMIT_BYTES = 4 << 30
"""A value larger than this, pickled, is refused before anything is sent."""
REQUEST_TIMEOUT = 60.0
SLOW_REQUEST_TIMEOUT = 300.0
"""The same for a server elsewhere: an answer may wait behind megabytes, and whether it lives is seen by its beats."""
CONNECT_TIMEOUT = 5.0
SLOW_CONNECT_TIMEOUT = 15.0
"""For each step of connecting to a server elsewhere."""
UPLOAD_LOOK = 0.02
"""Seconds between two looks at an upload that another thread makes."""
CHUNK_TIMEOUT = 900.0
"""For one chunk: that the connection lives is seen by other means, and it may be slow."""
FIRST_WINDOW = 4
UPLOAD_WINDOW = 16
"""Chunks of a blob that are under way before the sender waits for the server."""
UNCLAIMED_LIMIT = 1024
"""Messages kept of an app whose id is not known here yet: its `CreateApp` is being answered."""


class Output(Protocol):
    """Where an app's logs and notices go; called in whichever thread reads the connection, so it must be quick."""

    def log(self, chunk: LogChunk, data: bytes) -> None: ...

    def notice(self, notice: Notice) -> None: ...


class Sink(Protocol):
    """Who takes the results of one call."""

    def take(self, outputs: list[tuple[OutputItem, bytes]]) -> None: ...

    def fail(self, error: Error) -> None: ...

    def lost(self) -> None:
        """The connection broke, and another is being made."""

    def again(self) -> Iterable[tuple[Message, Packed]]:
        """What the other connection must carry for the results that are still missing."""


class Waiter:
    """The sink of a call with one input and one result."""

    __slots__ = ("pending", "sent")

    def __init__(self, link: Link) -> None:
        self.pending: Pending[tuple[OutputItem, bytes]] = Pending(link)
        self.sent: tuple[Message, Packed] | None = None

    def send(self, message: Message, payload: Packed) -> None:
        """Make the call; once more if the connection is lost before its result."""
        self.pending.link.send_tracked(message, payload, lambda: setattr(self, "sent", (message, payload)))

    def take(self, outputs: list[tuple[OutputItem, bytes]]) -> None:
        self.pending.set(outputs[0])

    def fail(self, error: Error) -> None:
        self.pending.fail(error)

    def lost(self) -> None:
        pass  # it is as good over another connection

    def again(self) -> Iterable[tuple[Message, Packed]]:
        return () if self.sent is None or self.pending.done else (self.sent,)


class Client:
    """A connection to a server. Most programs never name it: `Client.current()` is made when first needed.

    Example:

        client = squall.Client.connect()
        print(client.server_id)
        client.close()
    """

    def __init__(self, sock: socket.socket | None = None, *, link: Link | None = None) -> None:
        self.pid = os.getpid()
        self.sinks: dict[str, Sink] = {}
        self.server_id = ""
        self._followers: dict[str, Output | None] = {}
        """App id -> who sees its logs; None when it is over."""
        self._uploads: dict[str, list[Pending[None]]] = {}
        """Digest under way -> those who wait for it."""
        self._upload_lock = threading.Lock()
        self.terminal: Terminal | None = None
        """This program's, while an interactive app runs."""
        self._unclaimed: deque[tuple[str, Message, bytes]] = deque(maxlen=UNCLAIMED_LIMIT)
        self._follow_lock = threading.Lock()
        self.client_id = os.urandom(8).hex()
        self.received = 0
        """Frames of results and output that came of this server: after a break it goes on behind them."""
        self.apps: dict[str, CreateApp] = {}
        """By id, those this program runs: they are named again on another connection."""
        self.pools: dict[str, tuple[BindFunction, bytes]] = {}
        """By id, variants that this program asked for: another server has to hear of them before their calls."""
        self._settings: Config | None = None
        self._autostart = False
        self._server_stays = False
        self._ended_for_good = ""
        self._connected_at = 0.0
        if link is None:
            assert sock is not None
            self._welcome: Pending[Message] | None = None
            link = Link(sock, self.on_push, self.on_close, background=False)
        self.link = link

    # -- connecting

    @staticmethod
    def connect(autostart: bool = True, config: Config | None = None) -> Client:
        """A new connection to the server of this home; starts one when none listens and `autostart` is set.

        Raises ServiceError when there is none or it cannot be started, VersionError when it speaks another version.
        """
        from squall import config as configs  # pathlib, which it needs, would double the SDK's own import time

        settings = config or configs.load()
        deadline = time.monotonic() + CONNECT_TIMEOUT
        while True:
            client = Client(_find_server(settings, autostart))
            client._settings, client._autostart = settings, autostart
            try:
                client._greet()
                break
            except BaseException as error:
                was_ending = isinstance(error, ServiceError) and client._welcome is not None and client.link.closed
                client.close()
                if not was_ending or time.monotonic() > deadline:
                    raise
            time.sleep(0.02)  # it ended when we came: another follows, or nobody listens any more
        client.link.on_lost = client._on_lost
        client.link.start_background()
        if settings.server:
            import atexit

            atexit.register(client.say_goodbye)
        return client

    def hello(self) -> Hello:
        """The first words on each connection."""
        settings = self._settings
        python = f"{sys.version_info[0]}.{sys.version_info[1]}"
        hello = Hello("client", python=python, prefix=sys.prefix, client_id=self.client_id, received=self.received)
        if settings is not None:
            hello.patience = settings.reconnect_timeout
            hello.environment = "" if settings.environment == "main" else settings.environment
            if settings.server and settings.token_id:
                hello.token = f"{settings.token_id}:{settings.token_secret}"
        return hello

    def _greet(self) -> None:
        """Say hello; the answer is the one message of a connection that neither names a request nor is a push."""
        welcome: Pending[Message] = Pending(self.link)
        self._welcome = welcome
        self.link.send(self.hello())
        answer = welcome.wait(SLOW_CONNECT_TIMEOUT)
        self._welcome = None
        if not isinstance(answer, Welcome):
            from squall.exception import from_wire

            raise from_wire(
                getattr(answer, "code", VersionError.code),
                getattr(answer, "message", "the server refused the connection"),
                getattr(answer, "hint", ""),
            )
        self.welcomed(answer)

    def welcomed(self, welcome: Welcome) -> None:
        """A server has let this client in."""
        self.server_id, self._server_stays = welcome.server_id, welcome.stays
        self._connected_at = time.monotonic()
        self.link.silence.interval = welcome.heartbeat
        if welcome.heartbeat and self._settings is not None and self._settings.server:
            self.link.silence.interval = 0.0
            from squall.protocol.remote import keep_alive

            keep_alive(self.link, welcome.heartbeat, lambda: self.received)

    # -- coming back

    def _on_lost(self, reason: str) -> bool:
        """Whether the connection is worth another: something of this program goes on there, and the server returns."""
        settings = self._settings
        if self.pid != os.getpid() or settings is None or self._ended_for_good or not settings.reconnect_timeout:
            return False
        if not (self.apps or self.sinks or self._uploads or self.link.has_open_requests()):
            return False
        if not self._autostart and not self._server_stays and not settings.server:
            return False
        from squall._resume import FIRST_PAUSE_S, HEALTHY_AFTER_S, Return

        for sink in list(self.sinks.values()):
            sink.lost()
        if self.terminal is not None:
            self.terminal.close("the connection to the server broke")
        lasted = time.monotonic() - self._connected_at
        pause = FIRST_PAUSE_S if lasted > HEALTHY_AFTER_S else 10 * FIRST_PAUSE_S
        Return(self, reason, settings.reconnect_timeout, pause).start()
        return True

    def reach(self) -> socket.socket:
        """A new connection to the server this client had, or its successor."""
        settings = self._settings
        assert settings is not None  # only a client that was connected comes back
        if settings.server:
            return _connect_elsewhere(settings)
        sock = _try_connect(str(settings.socket_path))
        if sock is None:
            if self._server_stays or not self._autostart:
                raise ServiceError(f"no server listens at `{settings.socket_path}`")
            sock = _start_server(settings)
        return sock

    def unanswered(self) -> list[tuple[Message, Packed]]:
        """What must be said again for the calls without a result."""
        return [frame for sink in list(self.sinks.values()) for frame in sink.again()]

    @staticmethod
    def current() -> Client:
        """The process's client; connects when there is none, or when it broke or was inherited by a fork."""
        client = state.client
        if client is not None and client.usable():
            return client
        with state.lock:
            client = state.client
            if client is None or not client.usable():
                if state.in_container:
                    raise ServiceError(
                        "this process has no connection to the server",
                        hint="in a container, only the function's own process can call others, not its children",
                    )
                if client is not None and client.pid == os.getpid():  # a parent's is not ours to close
                    client.close()
                client = state.client = Client.connect()
        return client

    def usable(self) -> bool:
        """Whether it is open and was made by this very process."""
        return not self.link.closed and self.pid == os.getpid()

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self.say_goodbye()
        self.link.close()
        if self._settings is not None and self._settings.server:
            import atexit

            atexit.unregister(self.say_goodbye)

    def say_goodbye(self) -> None:
        """Have a server elsewhere not wait for this client to come back. Idempotent."""
        settings = self._settings
        if settings is not None and settings.server and self.usable() and not self.link.lost:
            from squall.protocol.resumption import Leaving

            self.link.send_nowait(Leaving())

    # -- what the server pushes

    def on_push(self, message: Message, payload: bytes) -> None:
        """Hand a message that answers no request to whom it belongs; runs in whichever thread reads."""
        if type(message) is Outputs:
            self.received += 1
            self._route(message, payload)
        elif isinstance(message, (LogChunk, Notice)):
            if isinstance(message, LogChunk):
                self.received += 1
            elif message.kind == "stopped":
                self.apps.pop(message.app_id, None)
            self._show(message.app_id, message, payload)
        elif isinstance(message, Ending):
            self._ended_for_good = "" if message.returns else message.reason or "it was stopped"
        elif isinstance(message, BuildOutput):
            self._show(message.image_id, _as_shown(message), payload)
        elif self.terminal is not None and isinstance(message, (Interact, ExecData, ExecExit)):
            self.terminal.on_push(message, payload)
        elif isinstance(message, Ping) and message.id:
            self.link.send_nowait(Reply(re=message.id))
        elif getattr(self, "_welcome", None) is not None:
            self._welcome.set(message)  # type: ignore[union-attr]

    def _route(self, message: Outputs, payload: bytes) -> None:
        items = message.items
        if len(items) == 1:
            sink = self.sinks.get(items[0].call_id)
            if sink is not None:
                sink.take([(items[0], payload)])
            return
        by_call: dict[str, list[tuple[OutputItem, bytes]]] = {}
        for pair in zip(items, split_payload(items, payload), strict=True):
            by_call.setdefault(pair[0].call_id, []).append(pair)
        for call_id, outputs in by_call.items():
            sink = self.sinks.get(call_id)
            if sink is not None:
                sink.take(outputs)

    def _show(self, app_id: str, message: Message, payload: bytes) -> None:
        with self._follow_lock:
            if app_id not in self._followers:
                self._unclaimed.append((app_id, message, payload))
            elif (output := self._followers[app_id]) is not None:
                _show_on(output, message, payload)

    def follow(self, app_id: str, output: Output) -> None:
        """Send the app's logs and notices to `output`, those first that came before its id was known here."""
        with self._follow_lock:
            self._followers[app_id] = output
            early = [entry for entry in self._unclaimed if entry[0] == app_id]
            for entry in early:
                self._unclaimed.remove(entry)
                _show_on(output, entry[1], entry[2])

    def unfollow(self, app_id: str) -> None:
        """Drop what still comes of the app: nobody is there to see it."""
        with self._follow_lock:
            self._followers[app_id] = None

    def on_close(self, reason: str) -> None:
        error = ServiceError(
            f"connection to the server broke: {reason}", hint="what was called may have run; calling again is up to you"
        )
        if getattr(self, "_welcome", None) is not None:
            self._welcome.fail(error)  # type: ignore[union-attr]
        if self.terminal is not None:
            self.terminal.close("the connection to the server broke")
        for call_id in list(self.sinks):
            sink = self.sinks.pop(call_id, None)
            if sink is not None:
                sink.fail(error)

    # -- requests

    async def request(
        self, message: Message, payload: Packed = b"", timeout: float | None = REQUEST_TIMEOUT
    ) -> tuple[Reply, bytes]:
        """Ask and wait for the answer. A Failure is raised; no answer in time is a ServiceError."""
        from squall.exception import OutputTimeoutError

        if timeout == REQUEST_TIMEOUT and self._settings is not None and self._settings.server:
            timeout = SLOW_REQUEST_TIMEOUT
        try:
            return await self.link.request(message, payload).within(timeout)
        except OutputTimeoutError:
            raise ServiceError(f"the server did not answer `{message.TAG}` within {timeout:g} s") from None

    # -- blobs

    @both
    async def put_blob(self, data: Packed) -> str:
        """Upload `data` unless the server has it; its digest. Two uploads of the same bytes at once are one."""
        data = bytes(data)
        digest = blob_digest(data)
        with self._upload_lock:
            others = self._uploads.get(digest)
            mine: Pending[None] = Pending(self.link)  # one for each that waits, as only one thread can wait for one
            if others is not None:
                others.append(mine)
            else:
                self._uploads[digest] = []
        if others is not None:
            from squall.exception import OutputTimeoutError

            # In turns: a thread that reads the connection meanwhile is woken by what arrives, not by another thread.
            while not mine.done:
                with contextlib.suppress(OutputTimeoutError):
                    await mine.within(UPLOAD_LOOK)
            await mine
            return digest
        try:
            while not await self._upload(digest, data):
                pass
        except BaseException as error:
            for other in self._end_upload(digest):
                other.fail(error)
            raise
        for other in self._end_upload(digest):
            other.set(None)
        return digest

    def _end_upload(self, digest: str) -> list[Pending[None]]:
        """Those who waited for the upload of these bytes."""
        with self._upload_lock:
            return self._uploads.pop(digest)

    async def _upload(self, digest: str, data: bytes) -> bool:
        """Whether the server has it; False when the connection was lost meanwhile."""
        reply, _ = await self.request(HasBlobs([digest]))
        if digest not in reply.data.get("missing", [digest]):
            return True
        start = int(reply.data.get("parts", {}).get(digest, 0))
        try:
            await self._send_blob(digest, data, start if start < len(data) else 0)
        except RequestLostError:
            if self.link.closed:
                raise
            return False
        except (ConflictError, InvalidError):
            if not start:
                raise
            await self._send_blob(digest, data, 0)  # what was there was not ours, or is gone
        return True

    async def _send_blob(self, digest: str, data: bytes, start: int) -> None:
        view = memoryview(data)
        window = FIRST_WINDOW
        under_way: deque[tuple[float, Pending[tuple[Reply, bytes]]]] = deque()
        for offset in range(start, max(1, len(data)), BLOB_CHUNK_BYTES):
            chunk = bytes(view[offset : offset + BLOB_CHUNK_BYTES])
            last = offset + len(chunk) >= len(data)
            under_way.append((time.monotonic(), self.link.request(PutBlob(digest, offset, last=last), chunk)))
            while len(under_way) >= window:
                window = await _answered(window, *under_way.popleft())
        while under_way:
            await _answered(window, *under_way.popleft())

    @both
    async def get_blob(self, digest: str) -> bytes:
        """The bytes of a blob, checked against its digest."""
        for _ in range(2):
            data = await self._read_blob(digest)
            if blob_digest(data) == digest:
                return data
            await self.request(GetBlob(digest, suspect=True))  # raises when it is the server's copy that is damaged
        raise ServiceError(f"blob `{digest}` arrived damaged, twice")

    async def _read_blob(self, digest: str) -> bytes:
        parts, offset, size = [], 0, 1
        while offset < size:
            reply, chunk = await self.request(GetBlob(digest, offset))
            size = int(reply.data["size"])
            if size > PAYLOAD_LIMIT_BYTES or (not chunk and size):
                raise ServiceError(f"blob `{digest}` broke off at {offset} of {size} bytes")
            parts.append(chunk)
            offset += len(chunk)
        return b"".join(parts)

    # -- results

    async def value_of(
        self, item: OutputItem, data: bytes, name: str, source_map: Mapping[str, str] | None = None
    ) -> Any:
        """The value of an output; raises what its function raised, or the error its status stands for."""
        if item.blob:
            data = await self.get_blob.aio(item.blob)
        if item.status in ("ok", "yield"):
            return payloads.unpack(data, f"the result of `{name}`")
        raise error_of(item, data, name, source_map)


async def _answered(window: int, sent_at: float, pending: Pending[tuple[Reply, bytes]]) -> int:
    """Wait for the answer to a chunk. How many may be under way from then on: so few on a slow connection that others
    need not wait long behind them."""
    await pending.within(CHUNK_TIMEOUT)
    took = time.monotonic() - sent_at
    return min(UPLOAD_WINDOW, window * 2) if took < 0.5 else max(1, window // 2) if took > 2.0 else window


def error_of(item: OutputItem, data: bytes, name: str, source_map: Mapping[str, str] | None = None) -> BaseException:
    """The exception for an output that is no value."""
    if item.status == "error" and data:
        return payloads.unpack_exception(data, name, source_map)
    cls, said = _STATUSES.get(item.status, (InternalError, f"ended with the unknown status `{item.status}`"))
    if item.code:
        from squall.exception import all_errors

        cls = all_errors().get(item.code, cls)
    hint = item.hint
    if cls is StartupError and data:
        cause = payloads.unpack_exception(data, name, source_map)
        error: Error = StartupError(
            f"`{name}` {said}: {item.message or type(cause).__name__}",
            hint=hint or _startup_hint(cause),
        )
        error.__cause__ = cause
        return error
    error = cls(f"`{name}` {said}" + (f": {item.message}" if item.message else ""), hint=hint)
    return error


def startup_cause(error: StartupError, source_map: Mapping[str, str]) -> BaseException | None:
    """What kept a container from starting, as the answer to a request tells it; `error` gets the hint that fits."""
    if not error.packed:
        return None
    cause = payloads.unpack_exception(error.packed, "", source_map)
    error.hint = error.hint or _startup_hint(cause)
    return cause


def _startup_hint(cause: BaseException) -> str:
    if isinstance(cause, ModuleNotFoundError) and cause.name:
        return (
            f"containers get the file that defines the function, or the whole package it is in; `{cause.name}` is in "
            "neither, nor is it installed in the image"
        )
    return "the exception above was raised while the container imported your code or entered your class"


_STATUSES: dict[str, tuple[type[Error], str]] = {
    "error": (RemoteError, "raised an exception that did not arrive"),
    "timeout": (FunctionTimeoutError, "took longer than its timeout"),
    "cancelled": (CancelledError, "was cancelled"),
    "lost": (ContainerLostError, "lost its container"),
    "init_error": (StartupError, "could not start"),
    "rejected": (ResourceExhaustedError, "was refused by the server"),
}


def blob_digest(data: bytes) -> str:
    """The name of a blob: blake2b of its bytes."""
    import hashlib  # loads OpenSSL, 5 ms that most programs never need

    return hashlib.blake2b(data, digest_size=32).hexdigest()


def check_payload(data: Packed, what: str) -> bool:
    """Whether `data` is small enough to travel inline; raises when it is too large to travel at all."""
    size = len(data)
    if size > PAYLOAD_LIMIT_BYTES:
        raise SerializationError(
            f"{what} take {size / (1 << 30):.1f} GiB when pickled, the limit is {PAYLOAD_LIMIT_BYTES >> 30} GiB",
            hint="pass a path to a file that the container can read instead",
        )
    return size <= INLINE_LIMIT_BYTES


def _as_shown(message: BuildOutput) -> Message:
    """A build's words as an app's output shows them: its output on stderr, the rest as notices."""
    if message.kind == "output":
        return LogChunk(message.image_id, message.image_id, "image", "stderr", time.time())
    reason = message.text if message.kind == "step" else f"{message.step} took {message.text}"
    return Notice(message.image_id, "build", {"reason": reason, "state": message.kind, "step": message.step})


def _show_on(output: Output, message: Message, payload: bytes) -> None:
    try:
        if isinstance(message, LogChunk):
            output.log(message, payload)
        elif isinstance(message, Notice):
            output.notice(message)
    except Exception as error:  # somebody else's code, in the thread that reads for all: a call must not fail by it
        log.warning("an app's output failed", output=type(output).__name__, error=repr(error))


# ---- in a container ---------------------------------------------------------------------------------------------


def install(link: Link) -> Client:
    """For the runner: make a client on its link the process's client. It passes pushes on to `Client.on_push`."""
    state.client = Client(link=link)
    state.in_container = True
    return state.client


# ---- starting a server ------------------------------------------------------------------------------------------


def _find_server(settings: Config, autostart: bool) -> socket.socket:
    sock = _connect_elsewhere(settings) if settings.server else _try_connect(str(settings.socket_path))
    if sock is not None:
        return sock
    if not autostart:
        raise ServiceError(
            f"no server listens at `{settings.socket_path}`",
            hint="`squall run` and `app.run()` start one by themselves",
        )
    return _start_server(settings)


def _connect_elsewhere(settings: Config) -> socket.socket:
    from squall.protocol import remote  # most programs use the server of their own machine

    return remote.connect(settings.server, settings.ca_file, SLOW_CONNECT_TIMEOUT)


def _try_connect(path: str) -> socket.socket | None:
    """A connection to the socket at `path`; None when nobody listens there (no file, or one left by the dead)."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(CONNECT_TIMEOUT)
    try:
        sock.connect(path)
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        sock.close()
        return None
    except PermissionError:
        sock.close()
        raise ServiceError(
            f"cannot connect to the server at `{path}`: permission denied",
            hint="it belongs to another user; set `SQUALL_HOME` to a directory of your own",
        ) from None
    except OSError as error:
        sock.close()
        raise ServiceError(f"cannot connect to the server at `{path}`: {error}") from None
    return sock


def _start_server(settings: Config, *arguments: str) -> socket.socket:
    """Start `python -m squall.server`, once however many clients ask, and connect to it."""
    import fcntl

    path = str(settings.socket_path)
    if not arguments and (sock := _await_successor(settings, path)) is not None:
        return sock
    for directory in (settings.home, settings.run_dir, settings.state_dir):
        _make_directory(str(directory))
    lock = os.open(str(settings.run_dir / "start.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + settings.start_timeout
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # another client is starting it
                if (sock := _try_connect(path)) is not None:
                    return sock
                _pause(deadline, f"waited {settings.start_timeout:g} s for another process to start the server")
        sock = _try_connect(path)
        return sock if sock is not None else _launch(settings, path, deadline, arguments)
    finally:
        os.close(lock)


def _await_successor(settings: Config, path: str) -> socket.socket | None:
    """Wait for the server of `squall up` where it was killed and somebody, such as systemd, starts it again: one of our
    own in its place would keep it from coming back. None where there is no such server."""
    deadline = time.monotonic() + settings.start_timeout
    while os.path.exists(str(settings.run_dir / "stays")):
        if (sock := _try_connect(path)) is not None:
            return sock
        if time.monotonic() > deadline:
            raise ServiceError(
                f"the server that `squall up` started for `{settings.home}` is gone, and did not come back within "
                f"{settings.start_timeout:g} s",
                hint="start it with `squall up`; after `squall down` programs start one of their own",
            )
        time.sleep(0.02)
    return None


def _make_directory(path: str) -> None:
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
    except OSError as error:
        raise InvalidError(
            f"cannot create `{path}`: {error.strerror}", hint="set `SQUALL_HOME` to a directory you can write"
        ) from None


def _launch(settings: Config, path: str, deadline: float, arguments: tuple[str, ...] = ()) -> socket.socket:
    import subprocess

    log_path = str(settings.state_dir / "server.log")
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    began = os.fstat(log).st_size
    env = {**os.environ, "SQUALL_HOME": str(settings.home), "PYTHONPATH": _python_path()}
    try:
        server = subprocess.Popen(
            [sys.executable, *_SAFE_PATH, "-m", "squall.server", *arguments],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/", env=env,
        )  # fmt: skip
    finally:
        os.close(log)
    step = 0.002
    while True:
        if (sock := _try_connect(path)) is not None:
            server.returncode = 0  # it outlives us; keeps subprocess from warning that it still runs
            return sock
        code = server.poll()
        if code is not None and code != 0:
            raise ServiceError(
                f"the embedded server ended with exit code {code} when it started:\n{_tail(log_path, began)}",
                hint=f"the whole log is `{log_path}`",
            )
        if time.monotonic() > deadline:
            server.kill()
            server.wait()
            raise ServiceError(
                f"the embedded server did not listen at `{path}` within {settings.start_timeout:g} s"
                f":\n{_tail(log_path, began)}",
                hint=f"the whole log is `{log_path}`",
            )
        time.sleep(step)
        step = min(step * 1.2, 0.02)


def _python_path() -> str:
    """Where the server finds what this program finds by PYTHONPATH, and Squall where it is not installed."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    entries = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if not root.endswith("-packages") and root not in entries:
        entries.insert(0, root)
    return os.pathsep.join(entries)


_SAFE_PATH = ["-P"] if sys.version_info >= (3, 11) else []
"""Keeps the working directory off the server's import path, all of which containers get to see."""


def _pause(deadline: float, complaint: str) -> None:
    if time.monotonic() > deadline:
        raise ServiceError(complaint)
    time.sleep(0.005)


def _tail(path: str, start: int, limit: int = 4000) -> str:
    """The end of what was written to a log since `start`."""
    with contextlib.suppress(OSError), open(path, "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(start, size - limit))
        return stream.read(limit).decode(errors="replace").strip()
    return ""
