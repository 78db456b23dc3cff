"""The client's way to a server elsewhere: a TCP connection, TLS if the URL says so, and from HTTP over to frames.

`connect` gives a plain socket in every case. Under TLS that is one end of a socket pair, with a thread between it and
the network: all that reads and writes a `Link` then stays as it is, with its threads that take turns at a socket and
send while another receives, which one TLS connection does not allow. `keep_alive` has a dead server noticed that never
said goodbye. Imported only by programs that use a server elsewhere. Tested in `tests/unit/test_remote.py`.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
from collections.abc import Callable
from urllib.parse import urlsplit

from squall.exception import InvalidError, ServiceError, from_wire
from squall.protocol.messages import Ping
from squall.protocol.transport import Link

PORT = 7777
HEAD_LIMIT_BYTES = 64 << 10
PIECE_BYTES = 1 << 18
WAITING_BYTES = 1 << 20
"""What may wait on either side of a TLS connection before the other side is left unread."""
FLUSH_S = 10.0
"""What was sent before the connection was closed here may take so long to leave."""
BEATS_MISSED = 3


def connect(url: str, ca_file: str = "", timeout: float = 10.0) -> socket.socket:
    """A socket that speaks frames with the server at `url`. Raises ServiceError, InvalidError, or what it answers."""
    scheme, host, port = parse_url(url)
    try:
        sock = socket.create_connection((host, port), timeout)
    except OSError as error:
        raise ServiceError(
            f"cannot connect to the server at `{url}`: {error.strerror or error}",
            hint="is it running there with `squall up --listen ...`, and is its port open?",
        ) from None
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if scheme == "https":
            sock = _wrap(sock, host, url, ca_file)
        _upgrade(sock, url, host, port)
        return _pumped(sock) if scheme == "https" else sock
    except BaseException:
        sock.close()
        raise


def parse_url(url: str) -> tuple[str, str, int]:
    """Scheme, host and port. Raises InvalidError."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    wrong = parts.username is not None or parts.password is not None or parts.query or parts.fragment
    if parts.scheme not in ("http", "https") or not parts.hostname or wrong or parts.path not in ("", "/"):
        raise InvalidError(
            f"cannot connect to `{url}`: it is not the URL of a server",
            hint="write it as `https://host:7777`, or `http://host:7777` where it has no TLS; tokens go elsewhere",
        )
    return parts.scheme, parts.hostname, port or PORT


def _wrap(sock: socket.socket, host: str, url: str, ca_file: str) -> socket.socket:
    import ssl  # loads OpenSSL, which most programs never need

    try:
        context = ssl.create_default_context(cafile=ca_file or None)
    except OSError as error:
        raise InvalidError(f"cannot read the certificates `{ca_file}`: {error.strerror or error}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        return context.wrap_socket(sock, server_hostname=host)
    except ssl.SSLCertVerificationError as error:
        raise ServiceError(
            f"cannot trust the server at `{url}`: {error.verify_message}",
            hint="name the certificates that vouch for it in the setting `ca_file`",
        ) from None
    except OSError as error:
        raise ServiceError(
            f"no TLS connection to `{url}`: {error.strerror or error}",
            hint="a server without a certificate is at `http://`",
        ) from None


def _upgrade(sock: socket.socket, url: str, host: str, port: int) -> None:
    """Ask to change from HTTP to frames; the server says nothing after its answer until it is greeted."""
    name = f"[{host}]" if ":" in host else host
    request = f"GET / HTTP/1.1\r\nHost: {name}:{port}\r\nConnection: Upgrade\r\nUpgrade: squall\r\n\r\n"
    try:
        sock.sendall(request.encode("ascii", "replace"))
        head, rest = _read_head(sock)
    except OSError as error:
        raise ServiceError(f"the server at `{url}` broke off: {error.strerror or error}") from None
    status = head.split(b"\r\n", 1)[0].decode("latin-1")
    if status.split(" ")[1:2] != ["101"]:
        raise _refusal(url, status, rest)
    if rest:
        raise ServiceError(f"the server at `{url}` spoke before it was greeted: it is no Squall server")


def _read_head(sock: socket.socket) -> tuple[bytes, bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        piece = sock.recv(4096)
        data += piece
        if not piece or len(data) > HEAD_LIMIT_BYTES:
            raise OSError("it is no Squall server" if data else "it closed the connection")
    head, _, rest = data.partition(b"\r\n\r\n")
    return head, rest


def _refusal(url: str, status: str, body: bytes) -> Exception:
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        said = json.loads(body)
        return from_wire(str(said["code"]), str(said["message"]), str(said.get("hint", "")))
    return ServiceError(
        f"`{url}` answered `{status[:80]}` to a Squall client",
        hint="a proxy in front of the server has to pass on `Upgrade: squall`",
    )


# ---- TLS ----------------------------------------------------------------------------------------------------------


def _pumped(tls: socket.socket) -> socket.socket:
    """The near end of a socket pair whose far end is the TLS connection."""
    near, far = socket.socketpair()
    threading.Thread(target=_Pump(tls, far).run, name="squall-tls", daemon=True).start()
    return near


class _Pump:
    """Carries bytes between a TLS connection and a local socket; the only one to touch the former."""

    def __init__(self, tls: socket.socket, local: socket.socket) -> None:
        self.tls = tls
        self.local = local
        tls.setblocking(False)
        local.setblocking(False)
        self._outgoing = b""
        """One piece: OpenSSL wants the very same again when it could not send it."""
        self._incoming = b""
        self._tls_wants_write = False
        self._remote_ended = self._local_ended = False

    def run(self) -> None:
        try:
            while not (self._remote_ended and not self._incoming) and not (self._local_ended and not self._outgoing):
                if not self._turn():
                    self._wait()
        except OSError:  # broken on either side: the other learns it by the end of its own
            pass
        finally:
            self.local.close()
            self.tls.close()

    def _turn(self) -> bool:
        """Move what can be moved; whether that was anything."""
        moved = self._send_out()
        moved |= self._take_in()
        if self._local_ended:
            self._incoming = b""  # nobody is there to read it; what is on its way out still goes
        if self._incoming:
            with contextlib.suppress(BlockingIOError):
                self._incoming = self._incoming[self.local.send(self._incoming) :]
                moved = True
        if not self._outgoing and not self._local_ended:
            with contextlib.suppress(BlockingIOError):
                self._outgoing = self.local.recv(PIECE_BYTES)
                self._local_ended = not self._outgoing
                moved = True
        return moved

    def _send_out(self) -> bool:
        import ssl

        self._tls_wants_write = False
        if not self._outgoing:
            return False
        try:
            self._outgoing = self._outgoing[self.tls.send(self._outgoing) :]
        except ssl.SSLWantWriteError:
            self._tls_wants_write = True
            return False
        except ssl.SSLWantReadError:
            return False
        return True

    def _take_in(self) -> bool:
        import ssl

        if self._remote_ended or len(self._incoming) >= WAITING_BYTES:
            return False
        try:
            piece = self.tls.recv(PIECE_BYTES)
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLWantWriteError:
            self._tls_wants_write = True
            return False
        self._remote_ended = not piece
        self._incoming += piece
        return True

    def _wait(self) -> None:
        poll = select.poll()
        far = select.POLLIN if len(self._incoming) < WAITING_BYTES and not self._remote_ended else 0
        poll.register(self.tls, far | (select.POLLOUT if self._tls_wants_write else 0))
        near = select.POLLIN if not self._outgoing and not self._local_ended else 0
        poll.register(self.local, near | (select.POLLOUT if self._incoming else 0))
        if not poll.poll(FLUSH_S * 1000 if self._local_ended else None):
            raise TimeoutError("the server takes no more")


# ---- a sign of life -----------------------------------------------------------------------------------------------


def keep_alive(link: Link, interval: float, received: Callable[[], int] = int) -> None:
    """Send a `Ping` each `interval` seconds, with what was `received`, and give the connection up when nothing at all
    came for three of them."""
    threading.Thread(target=_beat, args=(link, interval, received), name="squall-heartbeat", daemon=True).start()


def _beat(link: Link, interval: float, received: Callable[[], int]) -> None:
    seen, missed, epoch = link.received, 0, link.epoch
    while not link.ended.wait(interval) and not link.lost and link.epoch == epoch:
        missed = missed + 1 if link.received == seen else 0
        seen = link.received
        if missed >= BEATS_MISSED:
            link.abort(f"nothing was heard of the server for {missed * interval:g} s")
            return
        link.send_nowait(Ping(received=received()))
