"""The embedded server comes when needed, once, and goes when nobody uses it, with all that it had."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from squall.client import Client
from squall.exception import ServiceError
from tests.conftest import leftovers, processes_of, wait_until
from tests.integration import workload
from tests.integration.conftest import swap_client
from tests.integration.support import Clock, Kept, Wire, pid_of, rows

pytestmark = pytest.mark.root

ROOT = Path(__file__).parents[2]


def leave() -> None:
    """Close this process's connection."""
    client = swap_client(None)
    assert client is not None
    client.close()


def test_a_server_that_nobody_uses_ends_and_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUALL_IDLE_TIMEOUT", "0.5")
    with workload.app.run(output=Kept()):
        workload.square.remote(1)
        assert leftovers(home)
    leave()
    wait_until(lambda: not leftovers(home), lambda: f"these are gone: {leftovers(home)}", 15)
    assert list((home / "node" / "scratch").glob("*/*")) == []


def test_a_server_stays_while_a_client_is_there_though_it_asks_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQUALL_IDLE_TIMEOUT", "0.3")
    Client.current()
    pid = pid_of(home, "server")
    clock = Clock()
    wait_until(lambda: clock() > 1.5, "the idle timeout has passed some times")
    assert rows("apps") == []
    assert pid_of(home, "server") == pid


def test_clients_that_start_at_once_start_one_server(home: Path) -> None:
    code = "import time; from squall.client import Client; print(Client.current().server_id, flush=True); input()"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    pipe = subprocess.PIPE
    programs = [
        subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True, env=environment)
        for _ in range(4)
    ]
    answers = set()
    for program in programs:
        assert program.stdout is not None
        answers.add(program.stdout.readline().strip())
    servers = [command for command in processes_of(home).values() if "-m squall.server" in command]
    for program in programs:
        program.communicate("\n", timeout=20)
    assert len(answers) == 1
    assert answers != {""}
    assert len(servers) == 1


def test_a_stale_socket_file_is_no_obstacle(home: Path) -> None:
    path = home / "run" / "server.sock"
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.exists()
    with workload.app.run(output=Kept()):
        assert workload.square.remote(4) == 16


def test_a_second_server_of_a_home_refuses_and_harms_nothing(home: Path) -> None:
    Client.current()
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "squall.server"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert run.returncode == 1
    assert f"another server is using `{home}`" in run.stderr
    with Wire():
        assert rows("apps") == []


def test_a_server_that_cannot_start_says_why_to_the_client(home: Path) -> None:
    (home / "state").mkdir(parents=True)
    (home / "state" / "lock").mkdir()
    with pytest.raises(ServiceError) as caught:
        Client.connect()
    assert "the embedded server ended with exit code 1 when it started" in caught.value.message
    assert "server.log" in caught.value.hint


def test_a_store_that_is_no_store_is_left_alone_and_told_of(home: Path) -> None:
    (home / "state").mkdir(parents=True)
    (home / "state" / "squall.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(ServiceError, match="is not a database of SQLite"), workload.app.run(output=Kept()):
        workload.square.remote(3)
    assert (home / "state" / "squall.db").read_bytes() == b"this is no database" * 100
