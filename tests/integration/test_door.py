"""The TCP port by itself: HTTP and frames on one socket, TLS, and crowds, slow ones and rubbish at the door."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from squall.exception import AuthError, InvalidError
from squall.protocol import remote
from squall.protocol.messages import Hello, Ping, Reply, Welcome, decode, encode
from squall.protocol.transport import FrameReader, FrameStream
from squall.server import door as doors
from squall.server.door import Acceptor, Door, Visitor, listening_sockets
from tests import certificates
from tests.conftest import wait_until

SWITCH = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: keep-alive, Upgrade\r\nUpgrade: squall\r\n\r\n"


class House:
    """A door in a loop of its own, behind which everybody is greeted whose token is `right`."""

    def __init__(self, *, cert: str = "", key: str = "", max_connections: int = 100) -> None:
        self.frames: list[bytes] = []
        self.lost: list[str] = []
        self.loop = uvloop.new_event_loop()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.door = Door(self.loop, self._on_frame, lambda stream, reason: self.lost.append(reason), self._respond,
                         max_connections)  # fmt: skip
        self.thread.start()
        self.call(lambda: self.door.open("127.0.0.1:0", cert, key))
        self.call(self.door.start)
        self.port = int(self.door.addresses[0].rpartition(":")[2])

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def call(self, body: Any) -> Any:
        async def main() -> Any:
            return body()

        return asyncio.run_coroutine_threadsafe(main(), self.loop).result(10)

    def _on_frame(self, stream: FrameStream, header: bytes, payload: bytes) -> None:
        self.frames.append(header)
        message = decode(header)
        if isinstance(stream.owner, Visitor):
            if not isinstance(message, Hello) or message.token != "right":
                stream.close("wrong")
                return
            self.door.admit(stream.owner)
            stream.owner = "somebody"
            stream.send(Welcome("sv-1"))
        else:
            stream.send(Reply(re=message.id), payload)

    def _respond(self, method: str, target: str, authorization: str) -> Any:
        def check() -> None:
            if doors.bearer_of(authorization) != "right":
                raise AuthError("no")

        if target == "/metrics":
            return 200, "squall_apps 1\n"
        return doors.respond(target, {"draining": False, "version": "1", "protocol": [1], "server_id": "sv"}, check)

    def close(self) -> None:
        self.call(self.door.close)
        for visitor in list(self.door.visitors):
            self.loop.call_soon_threadsafe(visitor.drop, "the test is over")
        wait_until(lambda: not self.door.visitors, "everybody has left")
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()


@pytest.fixture
def house() -> Iterator[House]:
    made = House()
    yield made
    made.close()


def knock(house: House, data: bytes = b"") -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", house.port), 10)
    sock.sendall(data)
    return sock


def read_all(sock: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionError):
        while piece := sock.recv(65536):
            data += piece
    sock.close()
    return data


def ask(house: House, path: str, *headers: str) -> tuple[int, dict[str, Any]]:
    lines = [f"GET {path} HTTP/1.1", "Host: x", *headers, "", ""]
    head, _, body = read_all(knock(house, "\r\n".join(lines).encode())).partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def greeted(house: House, token: str = "right") -> tuple[socket.socket, FrameReader]:
    sock = remote.connect(f"http://127.0.0.1:{house.port}")
    sock.settimeout(10)
    sock.sendall(encode(Hello("client", token=token)))
    reader = FrameReader()
    [(header, _)] = reader.feed(sock.recv(4096))
    assert isinstance(decode(header), Welcome)
    return sock, reader


def test_health_needs_no_token_and_everything_else_does(house: House) -> None:
    assert ask(house, "/healthz") == (200, {"status": "ok"})
    for path in ("/version", "/", "/healthz/x", "/../healthz"):
        status, body = ask(house, path)
        assert (status, body["code"]) == (401, "auth")
    assert ask(house, "/version", "Authorization: Bearer right")[1]["version"] == "1"
    status, body = ask(house, "/v1/apps", "Authorization: Bearer right")
    assert (status, "no JSON API" in body["hint"]) == (404, True)


def test_metrics_are_text(house: House) -> None:
    head, _, body = read_all(knock(house, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")).partition(b"\r\n\r\n")
    assert b"Content-Type: text/plain; version=0.0.4; charset=utf-8" in head
    assert body == b"squall_apps 1\n"


def test_frames_follow_an_upgrade_also_in_the_same_packet(house: House) -> None:
    sock = knock(house, SWITCH + encode(Hello("client", token="right")))
    data = b""
    while b"welcome" not in data:
        data += sock.recv(4096)
    assert data.startswith(b"HTTP/1.1 101")
    sock.sendall(encode(Ping(id=5), b"x" * 1_000_000))
    [(header, payload)] = _next_frame(sock)
    assert decode(header).re == 5
    assert len(payload) == 1_000_000
    sock.close()


def _next_frame(sock: socket.socket) -> list[tuple[bytes, bytes]]:
    reader = FrameReader()
    while not (frames := reader.feed(sock.recv(1 << 18))):
        pass
    return frames


@pytest.mark.parametrize(
    "rubbish",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200,
        b"SSH-2.0-OpenSSH_9.2p1\r\n",
        b"\x00\x00\x00\x02\xff\xff\xff\x7f" + b"A" * 100,
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET  /  HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 5000 + b"\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"\r\n\r\n\r\n\r\n" * 10_000,
    ],
)
def test_rubbish_is_answered_with_an_error_or_dropped(
    house: House, rubbish: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doors, "ARRIVAL_TIMEOUT", 0.5)
    with contextlib.suppress(ConnectionError):
        answer = read_all(knock(house, rubbish))
        assert not answer or answer.split()[1] in (b"400", b"401", b"431"), answer
    assert ask(house, "/healthz")[0] == 200
    wait_until(lambda: not house.door.visitors, "it is gone")


def send_without_end(sock: socket.socket) -> None:
    for _ in range(10_000):
        sock.sendall(b"a" * 65536)


def test_an_endless_header_and_an_endless_body_are_cut_off(house: House) -> None:
    for start in (b"GET / HTTP/1.1\r\nX: ", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000000\r\n\r\n"):
        sock = knock(house, start)
        with pytest.raises(ConnectionError):
            send_without_end(sock)
        sock.close()
    wait_until(lambda: not house.door.visitors, "they are gone")


def test_a_frame_before_the_token_is_small(house: House) -> None:
    for size in (100_000, 0x7FFFFFFF):
        sock = knock(house, SWITCH + (20).to_bytes(4, "little") + size.to_bytes(4, "little"))
        assert read_all(sock).startswith(b"HTTP/1.1 101")
    assert house.frames == []


def test_a_frame_of_two_gigabytes_ends_the_connection(house: House) -> None:
    sock, _ = greeted(house)
    sock.sendall((20).to_bytes(4, "little") + (2 << 30).to_bytes(4, "little"))
    assert read_all(sock) == b""
    wait_until(lambda: house.lost, "the stream is lost")
    assert "announces 2147483676 bytes" in house.lost[0]


def test_nothing_after_a_wrong_hello_is_looked_at(house: House) -> None:
    sock = knock(house, SWITCH + encode(Hello("client", token="wrong")) + encode(Ping(id=1)) * 10)
    assert b"reply" not in read_all(sock)
    assert len(house.frames) == 1


def test_whoever_says_too_little_too_late_is_dropped(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doors, "ARRIVAL_TIMEOUT", 0.2)
    for said in (b"", b"GET / HT", SWITCH, SWITCH + b"\x10"):
        assert b"200" not in read_all(knock(house, said))
    wait_until(lambda: not house.door.visitors, "they are gone")


def test_a_connection_with_a_token_may_be_silent(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doors, "ARRIVAL_TIMEOUT", 0.1)
    silent, _ = greeted(house)
    read_all(knock(house))  # dropped for its silence: so much time has passed
    silent.sendall(encode(Ping(id=3)))
    assert decode(_next_frame(silent)[0][0]).re == 3
    silent.close()


def test_a_crowd_that_says_nothing_keeps_nobody_out(house: House) -> None:
    assert house.door.pending_limit == 50
    crowd = [knock(house, SWITCH[:30]) for _ in range(200)]
    mine = [greeted(house) for _ in range(10)]
    assert len(house.door.pending) <= 50
    wait_until(lambda: len(house.door.visitors) <= 60, "the oldest of the crowd are gone")
    for sock, _ in mine:
        sock.sendall(encode(Ping(id=1)))
        assert decode(_next_frame(sock)[0][0]).re == 1
    for sock in [*crowd, *(sock for sock, _ in mine)]:
        sock.close()


def test_more_than_there_may_be_are_turned_away() -> None:
    house = House(max_connections=5)
    try:
        inside = [greeted(house) for _ in range(5)]
        assert read_all(knock(house, b"GET /healthz HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 503")
        inside[0][0].close()
        wait_until(lambda: len(house.door.visitors) < 5, "one has left")
        assert ask(house, "/healthz")[0] == 200
        for sock, _ in inside[1:]:
            sock.close()
    finally:
        house.close()


def test_no_descriptor_left_pauses_and_does_not_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doors, "PAUSE_S", 0.2)
    tries = 0
    taken: list[socket.socket] = []

    class Exhausted:
        """A listening socket whose first accepts fail as they do when the process has no descriptor left."""

        def __init__(self) -> None:
            [self.inner] = listening_sockets("127.0.0.1:0")
            self.fileno, self.setblocking, self.close = self.inner.fileno, self.inner.setblocking, self.inner.close

        def accept(self) -> Any:
            nonlocal tries
            tries += 1
            if tries <= 3:
                raise OSError(errno.EMFILE, "Too many open files")
            return self.inner.accept()

    async def main() -> None:
        listener: Any = Exhausted()
        acceptor = Acceptor(asyncio.get_running_loop(), listener, lambda sock, address: taken.append(sock))
        client = socket.create_connection(listener.inner.getsockname()[:2], 10)
        while not taken:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        acceptor.close()
        client.close()

    asyncio.run(asyncio.wait_for(main(), 20))
    assert tries <= 6  # three that failed, the one that did not, and looks that found nothing
    taken[0].close()


def test_tls_is_spoken_with_the_certificate_and_nothing_else(tmp_path: Path) -> None:
    files = certificates.make(tmp_path, "127.0.0.1")
    house = House(cert=str(files.cert), key=str(files.key))
    try:
        sock = remote.connect(f"https://127.0.0.1:{house.port}", str(files.authority))
        sock.sendall(encode(Hello("client", token="right")))
        assert isinstance(decode(_next_frame(sock)[0][0]), Welcome)
        sock.sendall(encode(Ping(id=2), b"x" * 5_000_000))
        assert len(_next_frame(sock)[0][1]) == 5_000_000
        sock.close()
        assert b"200 OK" not in read_all(knock(house, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"))
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, ConnectionError)), knock(house) as plain:
            old.wrap_socket(plain)
        wait_until(lambda: not house.door.visitors, "they are gone")
    finally:
        house.close()


def test_a_new_certificate_is_shown_after_a_reload(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    first, second = certificates.make(tmp_path, "127.0.0.1"), certificates.make(tmp_path / "new", "127.0.0.1")
    house = House(cert=str(first.cert), key=str(first.key))
    try:
        first.cert.write_bytes(second.cert.read_bytes())
        first.key.write_bytes(second.key.read_bytes())
        house.call(house.door.reload)
        remote.connect(f"https://127.0.0.1:{house.port}", str(second.authority)).close()
        first.cert.write_text("rubbish")
        house.call(house.door.reload)  # keeps what it has
        remote.connect(f"https://127.0.0.1:{house.port}", str(second.authority)).close()
    finally:
        house.close()


@pytest.mark.parametrize(
    "listen", ["", "7777", "host:", "127.0.0.1:99999", "127.0.0.1:x", "nowhere.invalid:1", "192.0.2.1:1"]
)
def test_where_nobody_can_listen_is_said(listen: str) -> None:
    with pytest.raises(InvalidError, match="cannot listen at"):
        listening_sockets(listen)


def test_a_port_that_is_taken_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InvalidError, match="cannot listen at"):
        listening_sockets(f"127.0.0.1:{taken.getsockname()[1]}")


def test_a_certificate_that_is_none_is_said(tmp_path: Path) -> None:
    (tmp_path / "x.pem").write_text("rubbish")
    with pytest.raises(InvalidError, match="cannot use the certificate"):
        doors.tls_context(str(tmp_path / "x.pem"), str(tmp_path / "none.pem"))
