"""kill -9 of the server: containers go on, the next server takes them over, and nothing that runs is run again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from squall import App, Function, FunctionCall
from squall.client import Client
from squall.exception import NotFoundError
from tests.conftest import leftovers, wait_until
from tests.integration import durable
from tests.integration.support import Kept, Outcome, containers_of, inits, is_alive, kept_logs, pid_of, rows

pytestmark = pytest.mark.root


def kill_server(home: Path) -> None:
    pid = pid_of(home, "server")
    assert pid, "there is no server"
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid), "the server is gone")


def runs(app: str = "durable") -> list[int]:
    """Which inputs were run, in the order in which they began."""
    return [int(word) for line in kept_logs(app).decode().splitlines() if (word := line.removeprefix("ran ")) != line]


def another_server(home: Path) -> None:
    wait_until(lambda: pid_of(home, "server") and Client.current().usable(), "another server is there")


def test_running_inputs_are_not_run_again_and_their_containers_stay(home: Path) -> None:
    with durable.app.run(output=Kept()):
        spawned = durable.step.spawn(5.0, 1)
        called = Outcome(lambda: durable.step.remote(5.0, 2))
        mapped = Outcome(lambda: list(durable.step.map([5.0, 5.0], [3, 4])))
        wait_until(lambda: sorted(runs()) == [1, 2, 3, 4], "all run")
        before, agent = inits(home), pid_of(home, "node")
        kill_server(home)
        assert (spawned.get(timeout=60), called.result(), mapped.result()) == (1, 2, [3, 4])
        assert sorted(runs()) == [1, 2, 3, 4]
        assert pid_of(home, "node") == agent
        assert before.items() <= inits(home).items()
        assert durable.step.remote(0.0, 5) == 5
        assert before.items() <= inits(home).items()


def test_containers_of_a_deployed_app_and_its_variants_go_on_with_what_they_run(home: Path) -> None:
    durable.app.deploy(output=Kept())
    step = Function.from_name("durable", "step")
    with_more = step.with_options(memory=256)
    spawned = step.spawn(5.0, 1)
    called = Outcome(lambda: step.remote(5.0, 2))
    varied = Outcome(lambda: with_more.remote(5.0, 3))
    wait_until(lambda: sorted(runs()) == [1, 2, 3], "all run")
    before = inits(home)
    kill_server(home)
    assert (spawned.get(timeout=60), called.result(), varied.result()) == (1, 2, 3)
    assert sorted(runs()) == [1, 2, 3]
    assert before.items() <= inits(home).items()
    [row] = [row for row in rows("calls") if row["call_id"] == spawned.object_id]
    assert (row["app"], row["function"], row["kind"], row["inputs"]) == ("durable", "step", "spawn", 1)


def test_a_result_that_comes_while_there_is_no_server_is_kept_for_the_next_one(home: Path) -> None:
    call_id = durable.spawn_and_die(home)
    wait_until(lambda: 4 in runs(), "it runs")
    kill_server(home)
    before, killed = inits(home), time.monotonic()
    wait_until(lambda: time.monotonic() - killed > 3, "it must have ended")
    assert FunctionCall.from_id(call_id).get(timeout=60) == 4
    assert runs() == [0, 4]
    assert before


def test_an_idle_container_serves_the_next_server(home: Path) -> None:
    with durable.app.run(detach=True, output=Kept()):
        assert durable.step.remote(0.0, 1) == 1
        before = inits(home)
        kill_server(home)
        assert durable.step.remote(0.0, 2) == 2
        assert inits(home) == before
        assert [row["running"] for row in containers_of("step")] == [0]


def test_twenty_restarts_under_load_lose_double_and_leave_nothing(home: Path) -> None:
    with durable.app.run(output=Kept()):
        call = Outcome(lambda: list(durable.step.map([0.4] * 160, range(160))))
        spawned = durable.step.spawn_map([0.4] * 40, range(1000, 1040))
        for _ in range(20):
            wait_until(lambda: any(row["running"] for row in containers_of("step")), "it is under way")
            kill_server(home)
            another_server(home)
        assert call.result() == list(range(160))
        assert [spawned.get(timeout=60, index=n) for n in range(40)] == list(range(1000, 1040))
        seen = runs()  # but for the last words before each kill
        assert len(seen) == len(set(seen))
        assert len(inits(home)) <= 4
    wait_until(lambda: not inits(home), "nothing of the app is left")


def test_a_generator_that_has_not_yielded_runs_anew_and_its_old_run_is_cancelled(home: Path) -> None:
    with durable.app.run(output=Kept()):
        call = Outcome(lambda: list(durable.count.remote_gen(2, 1.0)))
        wait_until(lambda: any(row["running"] for row in containers_of("count")), "it runs")
        kill_server(home)
        assert call.result() == [0, 1]
        wait_until(lambda: not any(row["running"] for row in containers_of("count")), "nothing of it is left")


def test_a_second_agent_of_a_home_is_refused(home: Path) -> None:
    with durable.app.run(output=Kept()):
        durable.step.remote(0.0, 1)
        agent = pid_of(home, "node")
        second = subprocess.run([sys.executable, "-m", "squall.node"], capture_output=True, text=True, timeout=60)
        assert second.returncode == 1
        assert f"another one, pid {agent}, serves it" in second.stderr
        assert durable.step.remote(0.0, 2) == 2
        assert pid_of(home, "node") == agent


def test_an_agent_whose_server_never_comes_back_ends_and_leaves_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQUALL_REATTACH_GRACE", "2")
    durable.spawn_and_die(home, seconds=600.0)
    had = list(inits(home).values())
    assert had
    kill_server(home)
    wait_until(lambda: not any(map(is_alive, had)), "its containers are gone", 20)
    wait_until(lambda: not leftovers(home), lambda: f"these are gone: {leftovers(home)}", 20)


def test_down_ends_what_waits_for_another_server(home: Path) -> None:
    durable.spawn_and_die(home, seconds=600.0)
    kill_server(home)
    assert inits(home)
    command = [sys.executable, "-m", "squall.cli", "down"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "which waited for another, were ended" in done.stderr
    wait_until(lambda: not leftovers(home), lambda: f"these are gone: {leftovers(home)}", 20)


# ---- while a version takes over -----------------------------------------------------------------------------------


def busy() -> list[dict[str, Any]]:
    return [row for row in containers_of("step") if row["running"]]


def replace_while_it_runs(home: Path, seconds: float) -> tuple[FunctionCall[int], Outcome]:
    """A deployed app is replaced while two containers run a spawned and a waited-for input, and the server killed."""
    durable.app.deploy(output=Kept())
    step = Function.from_name("durable", "step")
    spawned = step.spawn(seconds, 1)
    called = Outcome(lambda: step.remote(seconds, 2))
    wait_until(lambda: sorted(runs()) == [1, 2], "both run")
    durable.app.deploy(output=Kept())
    kill_server(home)
    return spawned, called


def test_containers_of_a_replaced_version_end_what_they_run_after_the_server_was_killed(home: Path) -> None:
    spawned, called = replace_while_it_runs(home, 6.0)
    another_server(home)
    wait_until(lambda: len(busy()) == 2, "the containers of the version before are here again, with what they run")
    old = {row["container_id"] for row in busy()}
    assert (spawned.get(timeout=60), called.result()) == (1, 2)
    assert sorted(runs()) == [1, 2], "nothing was run again"
    assert Function.from_name("durable", "step").remote(0.0, 3) == 3
    wait_until(lambda: not old & {row["container_id"] for row in containers_of("step")}, "they have ended")
    assert spawned.get(timeout=0) == 1


def test_what_a_replaced_version_ran_goes_to_the_new_one_when_its_containers_died_too(home: Path) -> None:
    spawned, called = replace_while_it_runs(home, 6.0)
    for pid in inits(home).values():
        os.kill(pid, signal.SIGKILL)
    assert (spawned.get(timeout=60), called.result()) == (1, 2)
    assert sorted(runs()) == [1, 1, 2, 2]


def test_function_that_the_new_version_has_not_got_ends_what_was_asked_of_it_after_a_restart(home: Path) -> None:
    durable.app.deploy(output=Kept())
    last = Function.from_name("durable", "one_by_one")
    running, waiting = last.spawn(4.0, 1), last.spawn(0.0, 2)
    wait_until(lambda: runs() == [1], "the first runs")
    smaller = App("durable")
    smaller.function(serialized=True, name="other")(lambda: 1)
    smaller.deploy(output=Kept())
    kill_server(home)
    assert (running.get(timeout=60), waiting.get(timeout=60)) == (1, 2)
    assert runs() == [1, 2]
    with pytest.raises(NotFoundError, match="has no function `one_by_one`"):
        last.remote(0.0, 3)
