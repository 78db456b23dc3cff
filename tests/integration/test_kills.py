"""kill -9 of each of our processes: no result is lost or told twice, and nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from squall import FunctionCall
from squall.client import Client
from squall.exception import ServiceError
from tests.conftest import leftovers, wait_until
from tests.integration import faulty
from tests.integration.conftest import own_home
from tests.integration.support import (
    Kept,
    Outcome,
    containers_of,
    inits,
    is_alive,
    pid_of,
    rows,
    zygotes,
)

pytestmark = pytest.mark.root

ROOT = Path(__file__).parents[2]
SQUARES = [x * x for x in range(100)]


def kill(home: Path, part: str) -> list[int]:
    """Kill -9 the home's `server` or `node`; the pids of containers and zygotes that it had then."""
    had = [*inits(home).values(), *zygotes(home)]
    pid = pid_of(home, part)
    assert pid, f"there is no {part}"
    os.kill(pid, signal.SIGKILL)
    return had


def map_under_way() -> Outcome:
    """A map of 100 inputs, of which some have their result."""
    call = Outcome(lambda: list(faulty.slowly.map(range(100))))
    wait_until(lambda: len([row for row in containers_of("slowly") if row["running"]]) >= 2, "the map is under way")
    return call


def client_script(path: Path, body: str) -> subprocess.Popen[str]:
    """A program of its own that runs the app; it prints a line when `body` has got somewhere."""
    path.write_text(f"import time\nfrom tests.integration import faulty\n{body}\n")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True, env=environment)


# ---- the agent ----------------------------------------------------------------------------------------------------


def test_a_map_outlives_its_agent_and_gives_each_result_once(home: Path) -> None:
    with faulty.app.run(output=Kept()):
        faulty.square.remote(1)
        call = map_under_way()
        before = {row["container_id"] for row in rows("containers")}
        had = kill(home, "node")
        assert call.result() == SQUARES
        wait_until(lambda: not any(is_alive(pid) for pid in had), "what the dead agent had is gone", 10)
        assert not before & {row["container_id"] for row in rows("containers")}
        wait_until(lambda: len(inits(home)) == len(rows("containers")), "no container is there that nobody asked for")


def test_a_map_outlives_five_agents(home: Path) -> None:
    with faulty.app.run(output=Kept()):
        call = Outcome(lambda: list(faulty.slowly.map(range(200))))
        for _ in range(5):
            wait_until(lambda: any(row["running"] for row in containers_of("slowly")), "the map goes on")
            agent = pid_of(home, "node")
            kill(home, "node")
            wait_until(lambda: not is_alive(agent), "it is gone")  # noqa: B023 - called before the next round
            wait_until(lambda: pid_of(home, "node") and rows("nodes"), "another agent is there")
        assert call.result() == [x * x for x in range(200)]


def test_a_server_that_ends_right_after_its_agent_was_killed_leaves_nothing(home: Path) -> None:
    with faulty.app.run(output=Kept()):
        faulty.square.remote(1)
    assert groups_of(home)  # of its zygote, and of containers made ahead
    server = pid_of(home, "server")
    kill(home, "node")
    os.kill(server, signal.SIGTERM)
    wait_until(lambda: not is_alive(server), "the server has ended", 30)
    assert leftovers(home) == []


def test_an_input_that_lost_three_agents_has_lost_no_retry(home: Path) -> None:
    with faulty.app.run(output=Kept()):
        call = faulty.slowly.spawn(9, 1.0)
        lost: set[str] = set()

        def another() -> set[str]:
            return {row["container_id"] for row in containers_of("slowly") if row["running"]} - lost

        for _ in range(3):
            wait_until(another, "it runs in another container")
            lost.update(another())
            kill(home, "node")
        assert call.get(timeout=30) == 81


# ---- the server ---------------------------------------------------------------------------------------------------


def test_a_killed_server_takes_all_with_it_and_its_clients_are_told(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQUALL_RECONNECT_TIMEOUT", "0")  # else they would start another, see `test_resume.py`
    monkeypatch.setenv("SQUALL_REATTACH_GRACE", "0")  # else they would wait for it, see `test_reattach.py`
    with faulty.app.run(output=Kept()):
        call = map_under_way()
        had = kill(home, "server")
        error = call.error(10)
        assert isinstance(error, ServiceError)
        assert "connection to the server broke" in error.message
        assert error.hint
        wait_until(lambda: not any(is_alive(pid) for pid in had), "its containers and zygotes are gone", 10)
        wait_until(lambda: not leftovers(home), lambda: f"these are gone: {leftovers(home)}", 10)


# ---- the client ---------------------------------------------------------------------------------------------------


def test_a_killed_client_ends_its_app_and_all_that_ran_for_it(home: Path, tmp_path: Path) -> None:
    body = "with faulty.app.run():\n    for x in faulty.slowly.map(range(10_000)): print(x, flush=True)"
    with client_script(tmp_path / "mapper.py", body) as program:
        assert program.stdout is not None
        assert program.stdout.readline()
        had = list(inits(home).values())
        program.kill()
    wait_until(lambda: [row["state"] for row in rows("apps", include_all=True)] == ["stopped"], "the app has ended")
    assert rows("containers") == []
    wait_until(lambda: not any(is_alive(pid) for pid in had), "its containers are gone")
    assert Client.current().usable()


def test_spawned_calls_of_a_detached_app_go_on_without_their_client(home: Path, tmp_path: Path) -> None:
    body = "with faulty.app.run(detach=True):\n    print(faulty.slowly.spawn(12, 1.5).object_id, flush=True)\n"
    with client_script(tmp_path / "detached.py", body + "    time.sleep(600)") as program:
        assert program.stdout is not None
        call_id = program.stdout.readline().strip()
        program.kill()
    assert FunctionCall.from_id(call_id).get(timeout=20) == 144
    wait_until(lambda: rows("apps") == [], "an app with nothing left to do has ended")


# ---- the zygote ---------------------------------------------------------------------------------------------------


def test_calls_work_after_the_zygote_was_killed(home: Path) -> None:
    with faulty.app.run(output=Kept()):
        assert faulty.square.remote(2) == 4
        agent = pid_of(home, "node")
        running = inits(home)
        for pid in zygotes(home):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert [faulty.fresh.remote(n) for n in range(3)] == [1, 2, 3]
        assert faulty.square.remote(3) == 9
        assert pid_of(home, "node") == agent
        assert running.items() <= inits(home).items()


# ---- a home that is deleted ---------------------------------------------------------------------------------------


def test_groups_of_a_home_that_was_killed_and_deleted_go_with_the_next_start_of_any(tmp_path: Path) -> None:
    body = "with faulty.app.run():\n    print(faulty.square.remote(2), flush=True)\n    time.sleep(600)"
    with own_home() as home:
        with client_script(tmp_path / "program.py", body) as program:
            assert program.stdout is not None
            assert "4\n" in iter(program.stdout.readline, "")
            parts = [program.pid, pid_of(home, "server"), pid_of(home, "node")]
            had = [*parts[1:], *inits(home).values(), *zygotes(home)]
            for pid in parts:
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(map(is_alive, had)), "all are gone")
        shutil.rmtree(home)
        assert groups_of(home)
        with own_home(), faulty.app.run(output=Kept()):
            assert faulty.square.remote(3) == 9
            wait_until(lambda: not groups_of(home), "the groups of the home before are gone")


def groups_of(home: Path) -> list[str]:
    return [one for one in leftovers(home) if one.startswith("group ")]
