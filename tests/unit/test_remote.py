"""The way to a server elsewhere: URLs, what is answered that is no Squall server, TLS, and silence."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from squall.exception import AuthError, InvalidError, ServiceError
from squall.protocol import remote
from squall.protocol.messages import Message, Ping, Reply, decode, encode
from squall.protocol.transport import FrameReader, Link
from tests import certificates
from tests.conftest import wait_until

SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: squall\r\nConnection: Upgrade\r\n\r\n"
Body = Callable[[socket.socket], None]


class Server:
    """Takes one connection, reads the request, and does with it what the test says."""

    def __init__(self, body: Body, files: certificates.Files | None = None) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.request = b""
        self._body, self._files = body, files
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        sock, _ = self.listener.accept()
        try:
            if self._files is not None:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(self._files.cert, self._files.key)
                sock = context.wrap_socket(sock, server_side=True)
            while b"\r\n\r\n" not in self.request:
                self.request += sock.recv(4096)
            self._body(sock)
        except OSError:
            pass
        finally:
            sock.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def start(body: Body, files: certificates.Files | None = None) -> Server:
        made.append(Server(body, files))
        return made[-1]

    yield start
    for server in made:
        server.listener.close()
        server.thread.join(10)


def echo(sock: socket.socket) -> None:
    """Change to frames; answer each with a reply of the same payload."""
    sock.sendall(SWITCH)
    reader = FrameReader()
    while data := sock.recv(1 << 16):
        for header, payload in reader.feed(data):
            sock.sendall(encode(Reply(re=decode(header).id), payload))


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("http://host", ("http", "host", 7777)),
        ("https://host:443/", ("https", "host", 443)),
        ("http://[::1]:9", ("http", "::1", 9)),
    ],
)
def test_a_url_names_scheme_host_and_port(url: str, found: tuple[str, str, int]) -> None:
    assert remote.parse_url(url) == found


@pytest.mark.parametrize(
    "url",
    ["", "host:7777", "ftp://host", "http://", "http://u:p@host", "http://host/x", "http://host:99999", "http://["],
)
def test_what_is_no_url_of_a_server_is_refused(url: str) -> None:
    with pytest.raises(InvalidError, match="not the URL of a server"):
        remote.parse_url(url)


def test_nobody_listening_is_a_service_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(ServiceError, match="cannot connect to the server at"):
        remote.connect(f"http://127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\nhello", "answered `HTTP/1.1 200 OK` to a Squall client"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "no Squall server"),
        (b"", "closed the connection"),
        (SWITCH + b"early", "spoke before it was greeted"),
        (b"x" * 100_000, "no Squall server"),
    ],
)
def test_another_kind_of_server_is_named_as_such(serve: Callable[..., Server], answer: bytes, said: str) -> None:
    server = serve(lambda sock: sock.sendall(answer))
    with pytest.raises(ServiceError, match=said):
        remote.connect(f"http://127.0.0.1:{server.port}")


def test_a_refusal_in_json_is_raised_as_what_it_is(serve: Callable[..., Server]) -> None:
    answer = b'HTTP/1.1 401 Unauthorized\r\n\r\n{"code": "auth", "message": "no", "hint": "h"}'
    server = serve(lambda sock: sock.sendall(answer))
    with pytest.raises(AuthError, match="no"):
        remote.connect(f"http://127.0.0.1:{server.port}")


def test_frames_go_both_ways_over_plain_tcp(serve: Callable[..., Server]) -> None:
    server = serve(echo)
    link = Link(remote.connect(f"http://127.0.0.1:{server.port}"), lambda message, payload: None)
    try:
        _, payload = link.request(Ping(), b"x" * 3_000_000).wait(20)
        assert len(payload) == 3_000_000
        assert b"Upgrade: squall" in server.request
    finally:
        link.close()


def test_frames_of_many_threads_go_both_ways_over_tls(serve: Callable[..., Server], tmp_path: Path) -> None:
    files = certificates.make(tmp_path, "127.0.0.1")
    server = serve(echo, files)
    link = Link(remote.connect(f"https://127.0.0.1:{server.port}", str(files.authority)), lambda message, payload: None)
    answers: list[bytes] = []

    def call(number: int) -> None:
        for size in (10, 400_000, 0):
            data = bytes([number]) * size
            assert link.request(Ping(), data).wait(30)[1] == data
        answers.append(data)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    link.close()
    assert len(answers) == 8
    wait_until(lambda: not [t for t in threading.enumerate() if t.name == "squall-tls"], "the pump has ended")


def test_what_was_sent_before_closing_still_leaves_over_tls(serve: Callable[..., Server], tmp_path: Path) -> None:
    files = certificates.make(tmp_path, "127.0.0.1")
    received = bytearray()

    def take(sock: socket.socket) -> None:
        sock.sendall(SWITCH)
        while data := sock.recv(1 << 16):
            received.extend(data)

    server = serve(take, files)
    sock = remote.connect(f"https://127.0.0.1:{server.port}", str(files.authority))
    sock.sendall(b"x" * 2_000_000)
    sock.close()
    server.thread.join(20)
    assert len(received) == 2_000_000


def test_a_server_that_nobody_vouches_for_is_not_trusted(serve: Callable[..., Server], tmp_path: Path) -> None:
    files = certificates.make(tmp_path, "127.0.0.1")
    server = serve(echo, files)
    with pytest.raises(ServiceError, match="cannot trust the server") as caught:
        remote.connect(f"https://127.0.0.1:{server.port}")
    assert "ca_file" in caught.value.hint


def test_a_certificate_for_another_name_is_not_trusted(serve: Callable[..., Server], tmp_path: Path) -> None:
    files = certificates.make(tmp_path, "elsewhere.example")
    server = serve(echo, files)
    with pytest.raises(ServiceError, match="cannot trust the server"):
        remote.connect(f"https://127.0.0.1:{server.port}", str(files.authority))


def test_a_server_without_tls_is_told_from_one_with(serve: Callable[..., Server]) -> None:
    server = serve(lambda sock: sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"))
    server.request = b"\r\n\r\n"
    with pytest.raises(ServiceError, match="no TLS connection"):
        remote.connect(f"https://127.0.0.1:{server.port}")


class Pair:
    """A link, and the bare socket at its other end."""

    def __init__(self) -> None:
        near, self.far = socket.socketpair()
        self.reasons: list[str] = []
        self.link = Link(near, lambda message, payload: None, self.reasons.append)
        self.far.settimeout(10)

    def received(self) -> Message:
        reader = FrameReader()
        while True:
            for header, _ in reader.feed(self.far.recv(4096)):
                return decode(header)


def test_a_silent_server_is_given_up_and_whoever_waits_is_told() -> None:
    pair = Pair()
    waiting = pair.link.request(Ping())
    remote.keep_alive(pair.link, 0.05)
    with pytest.raises(ServiceError, match=r"nothing was heard of the server for 0\.15 s"):
        waiting.wait(10)
    wait_until(lambda: pair.reasons, "the link says that it is closed")
    wait_until(lambda: not [t for t in threading.enumerate() if t.name == "squall-heartbeat"], "the beat has ended")
    pair.link.close()
    pair.far.close()


def test_a_server_that_says_anything_at_all_is_alive() -> None:
    pair = Pair()
    remote.keep_alive(pair.link, 0.05)
    for _ in range(10):
        assert isinstance(pair.received(), Ping)
        pair.far.sendall(encode(Ping()))
    assert not pair.link.closed
    pair.link.close()
    pair.far.close()


def test_a_beat_does_not_wait_for_a_server_that_reads_nothing() -> None:
    pair = Pair()
    remote.keep_alive(pair.link, 0.05)
    with pytest.raises(ServiceError):
        _send_without_end(pair.link)  # stuck in sending when the connection is given up
    assert "nothing was heard" in pair.link.closed
    pair.link.close()
    pair.far.close()


def _send_without_end(link: Link) -> None:
    while True:
        link.send(Ping(), b"x" * 1_000_000)


def test_the_beat_of_a_connection_ends_when_another_takes_its_place() -> None:
    pair = Pair()
    remote.keep_alive(pair.link, 0.05)
    assert isinstance(pair.received(), Ping)
    pair.link.epoch += 1
    wait_until(lambda: not [t for t in threading.enumerate() if t.name == "squall-heartbeat"], "the beat has ended")
    assert not pair.link.closed
    pair.link.close()
    pair.far.close()
