"""Connecting, being refused, starting a server that does not start, and pushes that come early."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import squall
from squall import _context as context
from squall.client import Client
from squall.config import Config
from squall.exception import ServiceError, VersionError
from squall.protocol import messages as m

if TYPE_CHECKING:
    from tests.unit.conftest import Peer


@pytest.fixture
def settings(tmp_path: Path) -> Config:
    return Config(home=tmp_path, start_timeout=5.0)


class Listener:
    """Answers the first frame of each connection with what it was given."""

    def __init__(self, settings: Config, answer: m.Message) -> None:
        settings.run_dir.mkdir(parents=True)
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.bind(str(settings.socket_path))
        self.sock.listen()
        self.answer = answer
        self.connections: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.sock.accept()
            except OSError:
                return
            connection.recv(1 << 16)
            connection.sendall(m.encode(self.answer))
            self.connections.append(connection)

    def close(self) -> None:
        for sock in (self.sock, *self.connections):
            sock.close()


@pytest.fixture
def listening(settings: Config) -> Iterator[Any]:
    made: list[Listener] = []

    def listen(answer: m.Message) -> None:
        made.append(Listener(settings, answer))

    yield listen
    for listener in made:
        listener.close()


def test_client_connects_to_a_server_that_listens(settings: Config, listening: Any) -> None:
    listening(m.Welcome("srv"))
    client = Client.connect(config=settings)
    assert client.server_id == "srv"
    client.close()
    client.close()
    assert not client.usable()


def test_refused_version_is_a_version_error(settings: Config, listening: Any) -> None:
    listening(m.Failure("version", "client speaks version 1, server 7", "upgrade"))
    with pytest.raises(VersionError, match=r"(?s)server 7.*hint: upgrade"):
        Client.connect(config=settings)


def test_without_autostart_nothing_is_started(settings: Config) -> None:
    with pytest.raises(ServiceError, match="no server listens"):
        Client.connect(autostart=False, config=settings)
    assert list(settings.home.iterdir()) == []


def test_socket_of_a_dead_server_counts_as_none(settings: Config) -> None:
    settings.run_dir.mkdir(parents=True)
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(settings.socket_path))
    dead.close()
    with pytest.raises(ServiceError, match="no server listens"):
        Client.connect(autostart=False, config=settings)


def test_server_that_ends_at_once_is_shown_with_the_end_of_its_log(
    settings: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'cannot open the database: disk full' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(ServiceError) as error:
        Client.connect(config=settings)
    assert "exit code 3" in str(error.value)
    assert "cannot open the database: disk full" in str(error.value)
    assert "server.log" in error.value.hint


def test_server_that_never_listens_is_given_up_and_ended(
    settings: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    silent = tmp_path / "python"
    silent.write_text("#!/bin/sh\necho $$ > " + str(tmp_path / "pid") + "\nexec sleep 60\n")
    silent.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(silent))
    with pytest.raises(ServiceError, match=r"did not listen at .* within 1 s"):
        Client.connect(config=Config(home=tmp_path, start_timeout=1.0))
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_home_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(squall.Error, match="cannot create"):
        Client.connect(config=Config(home=tmp_path / "file" / "home"))


class Recorder:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def log(self, chunk: m.LogChunk, data: bytes) -> None:
        self.seen.append(data)

    def notice(self, notice: m.Notice) -> None:
        self.seen.append(notice.kind)


def test_logs_that_come_before_the_apps_id_is_known_are_kept_in_order(peer: Peer) -> None:
    recorder = Recorder()
    peer.send(m.LogChunk("ap-1", "co-1", "f", "stdout"), b"first")
    peer.send(m.LogChunk("ap-2", "co-1", "f", "stdout"), b"another app's")
    peer.send(m.Notice("ap-1", "waiting"))
    peer.client.link.request(m.Ping()).wait(5)
    peer.client.follow("ap-1", recorder)
    peer.send(m.LogChunk("ap-1", "co-1", "f", "stdout"), b"later")
    peer.client.link.request(m.Ping()).wait(5)
    assert recorder.seen == [b"first", "waiting", b"later"]


def test_output_that_fails_fails_no_call(peer: Peer, capfd: pytest.CaptureFixture[str]) -> None:
    class Broken(Recorder):
        def log(self, chunk: m.LogChunk, data: bytes) -> None:
            raise LookupError("no place for it")

    peer.client.follow("ap-1", Broken())
    peer.send(m.LogChunk("ap-1", "co-1", "f", "stdout"), b"text")
    peer.client.link.request(m.Ping()).wait(5)
    assert "no place for it" in capfd.readouterr().err


def test_logs_of_an_app_that_is_over_are_dropped(peer: Peer) -> None:
    recorder = Recorder()
    peer.client.follow("ap-1", recorder)
    peer.client.unfollow("ap-1")
    peer.send(m.LogChunk("ap-1", "co-1", "f", "stdout"), b"late")
    peer.client.link.request(m.Ping()).wait(5)
    assert recorder.seen == []
    assert not peer.client._unclaimed


def test_answer_that_does_not_come_is_a_service_error(peer: Peer) -> None:
    from squall._blocking import run

    peer.answers[m.Ping] = lambda message, payload: None
    with pytest.raises(ServiceError, match=r"did not answer `ping` within 0\.01 s"):
        run(peer.client.request(m.Ping(), timeout=0.01))


def test_child_of_a_fork_does_not_use_its_parents_connection(peer: Peer) -> None:
    assert Client.current() is peer.client
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, b"yes" if peer.client.usable() else b"no")
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 10) == b"no"
    os.close(read)
    os.close(write)


def test_context_is_that_of_the_running_input() -> None:
    assert squall.is_local()
    assert squall.current_input_id() is None

    def work() -> None:
        context.set_context("in-1-0", "fc-1")
        found.extend([squall.current_input_id(), squall.current_function_call_id()])

    found: list[Any] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(5)
    assert found == ["in-1-0", "fc-1"]
    assert squall.current_function_call_id() is None
