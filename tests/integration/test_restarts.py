"""kill -9 of the server: what was acknowledged goes on with the next one, in its order, with the tries it has left."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from squall import FunctionCall
from squall.client import Client
from squall.exception import CancelledError, NotFoundError, OutputTimeoutError
from tests.conftest import wait_until
from tests.integration import durable
from tests.integration.support import Kept, containers_of, is_alive, kept_logs, pid_of, rows

pytestmark = pytest.mark.root


def kill_server(home: Path) -> None:
    """Kill -9 the home's server."""
    pid = pid_of(home, "server")
    assert pid, "there is no server"
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid), "the server is gone")


def executions(app: str) -> list[int]:
    """Which inputs were run, in the order in which they began."""
    return [int(word) for line in kept_logs(app).decode().splitlines() if (word := line.removeprefix("ran ")) != line]


def test_spawned_inputs_run_after_the_server_was_killed(home: Path) -> None:
    with durable.app.run(detach=True, output=Kept()):
        call = durable.step.spawn_map([0.05] * 60, range(60))
        single = durable.step.spawn(0.0, 100)
        wait_until(lambda: any(row["running"] for row in containers_of("step")), "it has begun")
        kill_server(home)
        assert [call.get(timeout=60, index=i) for i in range(60)] == list(range(60))
        assert single.get(timeout=20) == 100
        assert max(executions("durable").count(n) for n in range(60)) <= 2


def test_inputs_keep_their_order_over_a_restart(home: Path) -> None:
    with durable.app.run(detach=True, output=Kept()):
        calls = [durable.one_by_one.spawn(0.02, n) for n in range(30)]
        wait_until(lambda: any(row["running"] for row in containers_of("one_by_one")), "it has begun")
        kill_server(home)
        later = durable.one_by_one.spawn(0.0, 30)
        assert FunctionCall.gather(*calls, later) == list(range(31))
        seen = list(dict.fromkeys(executions("durable")))  # of the last moment before the kill nothing was kept
        assert seen == sorted(seen) and seen[-1] == 30


def test_a_result_that_was_recorded_is_not_run_again(home: Path) -> None:
    with durable.app.run(detach=True, output=Kept()):
        call = durable.step.spawn(0.0, 1)
        assert call.get(timeout=20) == 1
        wait_until(lambda: executions("durable") == [1], "its output was kept")
        kill_server(home)
        assert FunctionCall.from_id(call.object_id).get(timeout=20) == 1
        assert durable.step.spawn(0.0, 2).get(timeout=20) == 2
        assert executions("durable") == [1, 2]


def test_output_of_a_call_of_an_earlier_server_is_not_passed_off_as_none(home: Path) -> None:
    with durable.app.run(detach=True, output=Kept()):
        call = durable.step.spawn(0.0, 1)
        assert call.get(timeout=60) == 1
        assert [entry.message for entry in call.logs.stream(timeout=30)] == ["ran 1"]
        kill_server(home)
        with pytest.raises(NotFoundError, match="is not known any more"):
            call.logs.tail()


def test_who_follows_logs_goes_on_with_the_next_server(home: Path) -> None:
    with durable.app.run(detach=True, output=Kept()):
        call = durable.one_by_one.spawn_map([0.2] * 40, range(40))
        seen: list[str] = []
        for entry in durable.app.logs.stream(timeout=60):
            seen.append(entry.message)
            if len(seen) == 5:
                kill_server(home)
            if entry.message == "ran 39":
                break
        assert {f"ran {n}" for n in range(40)} <= set(seen)
        assert call.get(timeout=60, index=39) == 39


def test_a_wait_between_retries_and_the_tries_left_survive_a_restart(home: Path) -> None:
    with durable.app.run(detach=True, output=Kept()):
        call = durable.stubborn.spawn(7)
        wait_until(lambda: executions("durable") == [7], "the first try has failed")
        wait_until(lambda: not any(row["running"] for row in containers_of("stubborn")), "it waits")
        kill_server(home)
        with pytest.raises(OutputTimeoutError):
            call.get(timeout=0)
        with pytest.raises(ValueError, match="never 7"):
            call.get(timeout=60)
        assert executions("durable") == [7, 7]


def test_what_was_cancelled_stays_cancelled_over_a_restart(home: Path) -> None:
    with durable.app.run(detach=True, output=Kept()):
        running = durable.one_by_one.spawn(600, 0)
        wait_until(lambda: any(row["running"] for row in containers_of("one_by_one")), "it runs")
        waiting = durable.one_by_one.spawn(0.0, 1)
        many = durable.one_by_one.spawn_map([0.0] * 100, range(2, 102))
        waiting.cancel()
        many.cancel()
        kill_server(home)
        running.cancel(terminate_containers=True)
        for call in (waiting, many, running):
            with pytest.raises(CancelledError):
                call.get(timeout=30)
        assert set(executions("durable")) <= {0}


def test_arguments_and_secrets_of_an_app_are_there_after_a_restart(home: Path) -> None:
    with durable.app.run(detach=True, output=Kept()):
        blocker = durable.reveal.spawn(1.0, b"")
        call = durable.reveal.spawn(0.0, bytes(3 << 20))
        keeper: Any = durable.Keeper(name="k")  # type: ignore[call-arg]
        size = keeper.size.spawn(bytes(1000))
        kill_server(home)
        assert call.get(timeout=60) == (11, 3 << 20)
        assert size.get(timeout=30) == ("k", 1000)
        assert blocker.get(timeout=30) == (11, 0)
        assert b"open sesame" not in (home / "state" / "squall.db").read_bytes()
        assert b"open sesame" not in (home / "state" / "squall.db-wal").read_bytes()


def test_an_app_ends_after_a_restart_once_its_calls_have_ended(home: Path) -> None:
    app = durable.app.run(detach=True, output=Kept())
    app.__enter__()
    call = durable.step.spawn(1.0, 3)
    app.__exit__(None, None, None)
    kill_server(home)
    assert call.get(timeout=60) == 3
    wait_until(lambda: not rows("apps"), "the app has ended", 60)


def test_a_client_that_is_killed_leaves_its_spawned_calls_to_the_server(home: Path) -> None:
    call_id = durable.spawn_and_die(home)
    began = time.monotonic()
    assert FunctionCall.from_id(call_id).get(timeout=60) == 4
    assert time.monotonic() - began < 60
    wait_until(lambda: not rows("apps"), "the app has ended", 30)
    assert Client.current().usable()
