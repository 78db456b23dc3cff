"""A server or a program of the same machine that was stopped: noticed, and nothing is lost when it goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from squall.client import Client
from squall.exception import ServiceError
from squall.protocol.requests import GetServer
from tests.conftest import wait_until
from tests.integration import durable
from tests.integration.staying import ask, here
from tests.integration.support import Kept, Outcome, kept_logs, pid_of, rows

pytestmark = pytest.mark.root

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def quick(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUALL_LOCAL_HEARTBEAT", "0.3")


def facts() -> dict[str, Any]:
    client = here()
    try:
        return ask(client, GetServer())
    finally:
        client.close()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def stopped(home: Path) -> Iterator[Any]:
    """Stops the server of the home; it goes on at the latest when the test ends."""
    pids: list[int] = []

    def stop() -> int:
        pids.append(pid_of(home, "server"))
        os.kill(pids[-1], signal.SIGSTOP)
        return pids[-1]

    yield stop
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def test_a_server_that_is_stopped_is_noticed_and_calls_complete_when_it_goes_on(home: Path, stopped: Any) -> None:
    with durable.app.run(output=Kept()):
        assert durable.step.remote(0.0, 0) == 0
        client, threads = Client.current(), threading.active_count()
        before = descriptors()
        for n in (1, 2):
            call = Outcome(lambda n=n: durable.step.remote(0.5, n))  # type: ignore[misc]
            wait_until(lambda n=n: f"ran {n}\n".encode() in kept_logs("durable"), "it runs")  # type: ignore[misc]
            pid = stopped()
            wait_until(lambda: client.link.lost, "the client has noticed")
            assert "nothing was heard of the server" in client.link.lost
            os.kill(pid, signal.SIGCONT)
            assert call.result() == n
        # A result that came while the server stood still went to the connection that was given up: it runs again.
        lines = kept_logs("durable").decode().splitlines()
        assert {"ran 0", "ran 1", "ran 2"} == set(lines)
        assert all(lines.count(line) <= 2 for line in lines)
        wait_until(lambda: threading.active_count() <= threads, "no thread is left over")
        assert descriptors() <= before + 1


def test_a_server_that_stays_stopped_is_given_up_at_the_deadline(
    home: Path, stopped: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQUALL_RECONNECT_TIMEOUT", "0.5")
    monkeypatch.setattr("squall._resume.ANSWER_TIMEOUT", 1.0)
    app = durable.app.run(output=Kept())
    app.__enter__()
    assert durable.step.remote(0.0, 0) == 0
    call = Outcome(lambda: durable.step.remote(600.0, 1))
    wait_until(lambda: b"ran 1" in kept_logs("durable"), "it runs")
    stopped()
    error = call.error()
    assert isinstance(error, ServiceError)
    assert "nothing was heard of the server for 0.9 s" in str(error)
    app.__exit__(None, None, None)


BODY = """
from tests.integration import durable
with durable.app.run():
    print(durable.step.remote(0.0, 1), flush=True)
    print(sum(durable.step.map([0.1] * 40, range(40))), flush=True)
"""


def test_a_program_that_is_stopped_is_told_of_and_keeps_its_app(home: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", BODY], stdout=subprocess.PIPE, text=True, env=env) as program:
        assert program.stdout is not None
        assert any(line == "1\n" for line in iter(program.stdout.readline, ""))
        program.send_signal(signal.SIGSTOP)
        wait_until(lambda: facts()["silent"] == 1, "the server has noticed")
        assert [row["state"] for row in rows("apps")] == ["running"]
        program.send_signal(signal.SIGCONT)
        assert any(line == f"{sum(range(40))}\n" for line in iter(program.stdout.readline, ""))
        assert program.wait(60) == 0
    assert facts()["silent"] == 0


def test_a_program_that_computes_without_a_pause_is_not_taken_for_dead(home: Path) -> None:
    with durable.app.run(output=Kept()):
        assert durable.step.remote(0.0, 1) == 1
        client = Client.current()
        total = sum(hash(str(n)) & 1 for n in range(3_000_000))  # a second or more of Python, the GIL held
        assert total > 0
        assert client.usable()
        assert not client.link.lost
        assert durable.step.remote(0.0, 2) == 2
