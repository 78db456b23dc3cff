"""The server of `squall up` is away for a moment: programs wait for it, and none puts one of its own in its place."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from squall import Function
from squall.client import Client
from squall.exception import ServiceError
from squall.protocol.requests import GetServer
from tests.conftest import wait_until
from tests.faults import chaos
from tests.integration.staying import ask, here, squall
from tests.integration.support import Outcome, is_alive, pid_of

pytestmark = pytest.mark.root


def up() -> None:
    done = squall("up", "--detach")
    assert done.returncode == 0, done.stderr


def kill_server(home: Path) -> None:
    pid = pid_of(home, "server")
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid), "the server is gone")


def stays() -> bool:
    client = here()
    try:
        return bool(ask(client, GetServer())["stays"])
    finally:
        client.close()


def test_program_that_starts_while_the_server_is_away_waits_for_it(home: Path) -> None:
    up()
    chaos.app.deploy()
    kill_server(home)
    call = Outcome(lambda: Function.from_name("chaos", "work").remote("a", 1))
    up()
    assert call.result()[:2] == ("a", 1)
    assert stays()


def test_program_that_waited_in_vain_is_told_what_to_do(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    up()
    kill_server(home)
    monkeypatch.setenv("SQUALL_START_TIMEOUT", "0.3")
    with pytest.raises(ServiceError, match="`squall up` started for") as raised:
        Client.connect()
    assert "squall down" in raised.value.hint
    monkeypatch.delenv("SQUALL_START_TIMEOUT")
    assert squall("down").returncode == 0
    Client.connect().close()
    assert not stays()


def test_server_that_stays_takes_the_place_of_an_embedded_one_with_deployed_apps(home: Path) -> None:
    chaos.app.deploy()
    assert not stays()
    up()
    assert stays()
    assert Function.from_name("chaos", "work").remote("b", 2)[:2] == ("b", 2)
