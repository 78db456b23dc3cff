"""The TCP port: takes connections from elsewhere, one port for HTTP and for frames, with TLS or without.

Every connection speaks HTTP/1.1 first. One that asks for `Upgrade: squall` gets `101` and from there on is a stream of
frames, of which the first must be a hello with a token; every other request is answered and the connection closed.
Whoever has shown no token yet is bounded: in the bytes kept of it, in the time it may take, and in number; the oldest
of them makes way for the newest, so that a crowd that says nothing keeps out nobody who has a token. When the process
has no descriptor left, taking connections pauses. Must never read a frame's meaning. Tested in
`tests/integration/test_door.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from squall._observe import Logger, count
from squall.exception import AuthError, Error, InvalidError, NotFoundError
from squall.protocol.messages import FRAME_LIMIT_BYTES
from squall.protocol.transport import FrameStream

if TYPE_CHECKING:
    import ssl

    import h11

log = Logger("server")

PENDING_LIMIT = 256
"""Connections at a time that have shown no token yet."""
ARRIVAL_TIMEOUT = 10.0
"""Seconds from being connected to having shown a token, or to having asked over HTTP."""
HEAD_LIMIT_BYTES = 16 << 10
HELLO_LIMIT_BYTES = 64 << 10
BODY_LIMIT_BYTES = 64 << 10
"""Of a request that is refused anyway: what it sends is read, so that it reads the answer, but not without end."""
BACKLOG = 1024
ACCEPTS_A_TURN = 64
PAUSE_S = 0.5
"""How long nobody is taken when the process has no descriptor, or the kernel no memory, left."""
TELL_EVERY_S = 10.0
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
Answer = tuple[int, dict[str, Any] | str]
"""Status, and a JSON object or plain text."""


class Acceptor:
    """Takes connections from one listening socket, some at each turn of the loop."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, listener: socket.socket, take: Callable[[socket.socket, Any], None]
    ) -> None:
        self.loop = loop
        self.listener = listener
        self._take = take
        self._resume: asyncio.TimerHandle | None = None
        listener.setblocking(False)
        loop.add_reader(listener, self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_A_TURN):
            try:
                sock, address = self.listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._pause(error)
                return
            sock.setblocking(False)
            self._take(sock, address)

    def _pause(self, error: OSError) -> None:
        """The connection stays in the backlog and the socket readable: looking again at once would only burn CPU."""
        count("accepts_paused")
        log.warning("taking no connections for a moment", reason=error.strerror or str(error))
        self.loop.remove_reader(self.listener)
        self._resume = self.loop.call_later(PAUSE_S, self._go_on)

    def _go_on(self) -> None:
        self._resume = None
        self.loop.add_reader(self.listener, self._accept)

    def close(self) -> None:
        if self._resume is not None:
            self._resume.cancel()
        self.loop.remove_reader(self.listener)
        self.listener.close()


class Door:
    """`on_frame` and `on_lost` as of a FrameStream; `respond(method, target, authorization)` answers all other HTTP."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        on_frame: Callable[[FrameStream, bytes, bytes], None],
        on_lost: Callable[[FrameStream, str], None],
        respond: Callable[[str, str, str], Answer],
        max_connections: int,
    ) -> None:
        self.loop = loop
        self.on_frame = on_frame
        self.on_lost = on_lost
        self.respond = respond
        self.max_connections = max_connections
        self.pending_limit = min(PENDING_LIMIT, max(1, max_connections // 2))
        self.tls: ssl.SSLContext | None = None
        self.addresses: list[str] = []
        self.visitors: dict[Visitor, None] = {}
        self.pending: dict[Visitor, None] = {}
        """Those without a token yet, the oldest first."""
        self._listeners: list[socket.socket] = []
        self._acceptors: list[Acceptor] = []
        self._certificates = ("", "")
        self._tell_again_at = 0.0

    def open(self, listen: str, cert: str = "", key: str = "") -> None:
        """Listen at `HOST:PORT`; who comes waits until `start`. Raises InvalidError for what cannot be listened at, or
        no certificate."""
        import h11  # noqa: F401  (loaded now, not in the first connection's time)

        if bool(cert) != bool(key):
            raise InvalidError("TLS needs both `tls_cert` and `tls_key`, and one of them is not set")
        if cert:
            self.tls, self._certificates = tls_context(cert, key), (cert, key)
        self._listeners = listening_sockets(listen)
        self.addresses = [address_text(listener.getsockname()) for listener in self._listeners]

    def start(self) -> None:
        """Let them in, once it is known who may."""
        self._acceptors = [Acceptor(self.loop, listener, self._arrive) for listener in self._listeners]

    def reload(self) -> None:
        """Read the certificate again: connections from now on are shown the new one."""
        if self.tls is not None:
            try:
                self.tls.load_cert_chain(*self._certificates)
                log.info("read the certificate again", cert=self._certificates[0])
            except OSError as error:
                log.error("the certificate cannot be read, the old one stays", error=str(error))

    def close(self) -> None:
        """Take nobody any more; who is inside stays."""
        for acceptor in self._acceptors:
            acceptor.close()
        for listener in self._listeners:
            listener.close()
        self._acceptors, self._listeners = [], []
        for visitor in list(self.pending):
            visitor.drop("the server is ending")

    # -- who comes and goes

    def _arrive(self, sock: socket.socket, address: Any) -> None:
        if len(self.visitors) >= self.max_connections and not self.pending:
            self._turn_away(sock, address)
            return
        if len(self.pending) >= self.pending_limit or len(self.visitors) >= self.max_connections:
            next(iter(self.pending)).drop("others came, and it had not said who it is")
        _tune(sock)
        visitor = Visitor(self, sock, address_text(address))
        self.visitors[visitor] = self.pending[visitor] = None
        visitor.start()

    def _turn_away(self, sock: socket.socket, address: Any) -> None:
        count("connections_refused")
        if self.loop.time() >= self._tell_again_at:  # a crowd must not fill the log instead
            self._tell_again_at = self.loop.time() + TELL_EVERY_S
            log.warning("refused a connection: there are as many as may be", peer=address_text(address))
        if self.tls is None:
            with contextlib.suppress(OSError):
                sock.send(_BUSY)
        sock.close()

    def admit(self, visitor: Visitor) -> None:
        """It has shown a token: from now on it is one of those who may stay."""
        self.pending.pop(visitor, None)
        visitor.settle()

    def gone(self, visitor: Visitor) -> None:
        self.visitors.pop(visitor, None)
        self.pending.pop(visitor, None)


class Visitor:
    """One connection: an asyncio protocol until it has become a stream of frames."""

    def __init__(self, door: Door, sock: socket.socket, address: str) -> None:
        self.door = door
        self.sock = sock
        self.address = address
        self.stream: FrameStream | None = None
        self.transport: Any = None
        self._http: h11.Connection | None = None
        self._request: h11.Request | None = None
        self._body_bytes = 0
        self._task: asyncio.Task[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._deadline = self.door.loop.call_later(ARRIVAL_TIMEOUT, self.drop, "it took too long to say who it is")
        self._task = self.door.loop.create_task(self._connect())

    async def _connect(self) -> None:
        options: dict[str, Any] = {}
        if self.door.tls is not None:
            options = {"ssl": self.door.tls, "ssl_handshake_timeout": ARRIVAL_TIMEOUT}
        try:
            await self.door.loop.connect_accepted_socket(_as_protocol(self), self.sock, **options)
        except OSError as error:  # ssl.SSLError is one too: it speaks no TLS, or none that is any good
            log.debug("a connection came to nothing", peer=self.address, error=str(error))
            self._end()
        except BaseException:
            self._end()
            raise

    def drop(self, reason: str) -> None:
        """End it at once, in whatever state it is."""
        log.debug("dropped a connection", peer=self.address, reason=reason)
        if self.stream is not None:
            self.stream.abort(reason)
        elif self.transport is not None:
            self.transport.abort()
        elif self._task is not None:
            self._task.cancel()
        self._end()

    def settle(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if self.stream is not None:
            self.stream.allow(FRAME_LIMIT_BYTES)

    def _end(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if self.transport is None:
            self.sock.close()
        self.door.gone(self)

    # -- an asyncio protocol

    def connection_made(self, transport: Any) -> None:
        import h11

        self.transport = transport
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_LIMIT_BYTES)

    def data_received(self, data: bytes) -> None:
        import h11

        if self._http is None or self.transport.is_closing():
            return
        try:
            self._http.receive_data(data)
            self._go_on()
        except h11.RemoteProtocolError as error:
            self._answer(error.error_status_hint or 400, {"code": "invalid", "message": f"no HTTP request: {error}"})
        except Error as error:
            self._answer(*refused(error))

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        """Nothing is written here that would fill a buffer."""

    def resume_writing(self) -> None:
        """See `pause_writing`."""

    def connection_lost(self, error: BaseException | None) -> None:
        self._end()

    def _go_on(self) -> None:
        import h11

        assert self._http is not None
        while True:
            event = self._http.next_event()
            if isinstance(event, h11.Request):
                self._request = event
                if _wants_frames(event):
                    self._become_stream()
                    return
            elif isinstance(event, h11.Data):
                self._body_bytes += len(event.data)
                if self._body_bytes > BODY_LIMIT_BYTES:
                    raise InvalidError(f"a body of more than {BODY_LIMIT_BYTES} bytes is not read here")
            elif isinstance(event, h11.EndOfMessage):
                self._respond()
                return
            else:
                return

    def _respond(self) -> None:
        assert self._request is not None
        headers = dict(self._request.headers)
        authorization = headers.get(b"authorization", b"").decode("latin-1")
        target = self._request.target.decode("latin-1")
        status, body = self.door.respond(self._request.method.decode("latin-1"), target, authorization)
        self._answer(status, body)

    def _answer(self, status: int, body: dict[str, Any] | str) -> None:
        """Answer, and close: what comes here once comes seldom."""
        if self.transport.is_closing():
            return
        kind = TEXT if isinstance(body, str) else JSON
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode() + b"\n"
        if self._request is not None and self._request.method == b"HEAD":
            data = b""
        self.transport.write(_head(status, len(data), kind) + data)
        self.transport.close()

    def _become_stream(self) -> None:
        """From HTTP to frames, on the same connection."""
        import h11

        assert self._http is not None
        headers = [("Upgrade", "squall"), ("Connection", "Upgrade")]
        event = self._http.next_event()
        if not isinstance(event, h11.EndOfMessage):
            raise InvalidError("a request for an upgrade has no body")
        answer = self._http.send(h11.InformationalResponse(status_code=101, headers=headers))
        rest, _ = self._http.trailing_data
        self._http = None
        stream = self.stream = FrameStream(self.door.loop, self.door.on_frame, self._on_stream_lost, HELLO_LIMIT_BYTES)
        stream.owner = self
        self.transport.write(answer)
        self.transport.pause_reading()  # how it is read is settled when that begins: a stream has its own way
        self.transport.set_protocol(stream)
        stream.connection_made(self.transport)
        self.transport.resume_reading()
        if rest:
            stream.data_received(rest)

    def _on_stream_lost(self, stream: FrameStream, reason: str) -> None:
        self._end()
        self.door.on_lost(stream, reason)


def _as_protocol(visitor: Visitor) -> Callable[[], Any]:
    return lambda: visitor


def _wants_frames(request: h11.Request) -> bool:
    values: dict[bytes, bytes] = {}
    for name, value in request.headers:
        values[name] = values.get(name, b"") + b"," + value.lower()
    tokens = [token.strip() for token in values.get(b"connection", b"").split(b",")]
    return request.method == b"GET" and values.get(b"upgrade") == b",squall" and b"upgrade" in tokens


_REASONS = {
    200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 405: "Method Not Allowed",
    413: "Content Too Large", 431: "Request Header Fields Too Large", 501: "Not Implemented",
    503: "Service Unavailable",
}  # fmt: skip


JSON = "application/json"
TEXT = "text/plain; version=0.0.4; charset=utf-8"
"""As Prometheus wants it."""


def _head(status: int, size: int, kind: str = JSON) -> bytes:
    challenge = "WWW-Authenticate: Bearer\r\n" if status == 401 else ""
    return (
        f"HTTP/1.1 {status} {_REASONS.get(status, 'Error')}\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {size}\r\nCache-Control: no-store\r\n{challenge}Connection: close\r\n\r\n"
    ).encode()


_BUSY = _head(503, 0)


def bearer_of(authorization: str) -> str:
    """The credentials in an `Authorization` header, or nothing."""
    scheme, _, credentials = authorization.partition(" ")
    return credentials.strip() if scheme.lower() == "bearer" else ""


def respond(target: str, facts: dict[str, Any], check: Callable[[], None]) -> Answer:
    """What is answered to HTTP that asks for no upgrade. `check` raises AuthError where no valid token was shown."""
    path = target.partition("?")[0]
    if path == "/healthz":
        return (503, {"status": "draining"}) if facts["draining"] else (200, {"status": "ok"})
    try:
        check()
    except AuthError as error:
        return refused(error)
    if path == "/version":
        return 200, {"version": facts["version"], "protocol": facts["protocol"], "server_id": facts["server_id"]}
    hint = "there are `/healthz`, `/version` and `/metrics`; this release has no JSON API: use the `squall` command"
    return refused(NotFoundError(f"nothing is at `{path[:80]}`", hint=hint))


def refused(error: Error) -> Answer:
    """An error, as it is answered over HTTP."""
    return error.status, {"code": error.code, "message": error.message, "hint": error.hint}


def tls_context(cert: str, key: str) -> ssl.SSLContext:
    """TLS 1.2 and later with this certificate. Raises InvalidError."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(cert, key)
    except OSError as error:
        raise InvalidError(
            f"cannot use the certificate `{cert}` with the key `{key}`: {error.strerror or error}",
            hint="both are PEM files, the certificate first in its chain, the key without a passphrase",
        ) from None
    return context


def listening_sockets(listen: str) -> list[socket.socket]:
    """Sockets that listen at `HOST:PORT`, `[V6]:PORT`. Raises InvalidError."""
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdigit() or int(port) > 65535:
        raise InvalidError(
            f"cannot listen at `{listen}`: it is no address and port",
            hint="write it as `127.0.0.1:7777`, `0.0.0.0:7777` or `[::]:7777`",
        )
    made: list[socket.socket] = []
    try:
        flags = socket.AI_PASSIVE | socket.AI_NUMERICSERV
        for family, kind, proto, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags):
            made.append(_listen(family, kind, proto, address))
    except OSError as error:
        for listener in made:
            listener.close()
        raise InvalidError(
            f"cannot listen at `{listen}`: {error.strerror or error}",
            hint="another program may have the port: `ss -ltnp` shows which" if error.errno == errno.EADDRINUSE else "",
        ) from None
    return made


def _listen(family: int, kind: int, proto: int, address: Any) -> socket.socket:
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _tune(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def address_text(address: Any) -> str:
    """`127.0.0.1:7777`, `[::1]:7777`."""
    host, port = address[0], address[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
