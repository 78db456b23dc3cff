"""Spawned calls: on disk before they are acknowledged, results kept for whoever asks."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from squall import FunctionCall
from squall.client import Client
from squall.exception import CancelledError, NotFoundError, OutputTimeoutError
from tests.conftest import wait_until
from tests.integration import workload
from tests.integration.support import Clock, Kept, Outcome, containers_of, rows

pytestmark = pytest.mark.root

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def app(shared_home: Path) -> Iterator[None]:
    with workload.app.run(output=Kept()):
        yield


def stored(home: Path, query: str, *values: object) -> list[tuple[object, ...]]:
    """Ask the Store's file itself, past the server."""
    connection = sqlite3.connect(f"file:{home / 'state' / 'squall.db'}?mode=ro", uri=True)
    try:
        return connection.execute(query, values).fetchall()
    finally:
        connection.close()


def test_a_spawned_call_is_on_disk_when_its_handle_is_there(shared_home: Path) -> None:
    for n in range(20):
        call = workload.square.spawn(n)
        found = stored(shared_home, "select idx, length(args) > 0 from inputs where call_id = ?", call.object_id)
        assert found == [(0, 1)]


def test_a_result_is_read_by_another_program_after_the_app_has_ended(shared_home: Path) -> None:
    with workload.scaling.run(output=Kept()):
        call = workload.once.spawn()
        container_id = call.get(timeout=20)
    code = f"import squall; print(squall.FunctionCall.from_id({call.object_id!r}).get(timeout=10))"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert run.stdout.strip() == container_id, run.stderr


def test_an_exception_of_a_spawned_call_is_kept_as_what_it_was() -> None:
    call = workload.fail.spawn("kept")
    for _ in range(2):
        with pytest.raises(ValueError, match="kept"):
            call.get(timeout=20)


def listed(call_id: str) -> tuple[object, ...]:
    [row] = [row for row in rows("calls") if row["call_id"] == call_id]
    return row["app"], row["function"], row["kind"], row["state"], row["inputs"], row["failed"]


def test_calls_are_listed_while_they_run_and_when_they_have_ended() -> None:
    slow, failing = workload.nap.spawn(600), workload.fail.spawn("seen")
    several = workload.square.spawn_map(range(3))
    with pytest.raises(ValueError, match="seen"):
        failing.get(timeout=20)
    assert [several.get(timeout=20, index=n) for n in range(3)] == [0, 1, 4]
    waited = Outcome(lambda: workload.nap.remote(2.0, 9))
    wait_until(lambda: any(row["kind"] == "remote" and row["state"] == "running" for row in rows("calls")), "it runs")
    assert listed(slow.object_id) == ("workload", "nap", "spawn", "running", 1, 0)
    wait_until(lambda: listed(failing.object_id)[3:] == ("ended", 1, 1), lambda: str(listed(failing.object_id)))
    wait_until(lambda: listed(several.object_id)[3:] == ("ended", 3, 0), lambda: str(listed(several.object_id)))
    slow.cancel()
    wait_until(lambda: listed(slow.object_id)[3:] == ("cancelled", 1, 1), lambda: str(listed(slow.object_id)))
    assert waited.result() == 9
    [row] = [row for row in rows("calls") if row["kind"] == "remote" and row["function"] == "nap"]
    assert (row["state"], row["inputs"], row["failed"]) == ("ended", 1, 0)


def test_get_without_time_only_looks() -> None:
    call = workload.nap.spawn(0.5, 7)
    with pytest.raises(OutputTimeoutError):
        call.get(timeout=0)
    assert call.get() == 7
    assert call.get(timeout=0) == 7


def test_get_gives_up_at_its_timeout_and_the_call_goes_on() -> None:
    call = workload.nap.spawn(1.0, 8)
    clock = Clock()
    with pytest.raises(OutputTimeoutError):
        call.get(timeout=0.2)
    assert clock() < 0.9
    assert call.get(timeout=20) == 8


def test_gather_gives_results_in_the_order_of_the_calls() -> None:
    calls = [workload.nap.spawn(0.3 - 0.1 * n, n) for n in range(3)]
    assert FunctionCall.gather(*calls) == [0, 1, 2]


def test_gather_raises_a_failure_before_slower_calls_have_ended() -> None:
    slow = workload.nap.spawn(600)
    with pytest.raises(ValueError, match="early"):
        FunctionCall.gather(slow, workload.fail.spawn("early"))
    slow.cancel(terminate_containers=True)
    with pytest.raises(CancelledError):
        slow.get(timeout=20)


def test_a_call_cancelled_while_it_waits_never_runs() -> None:
    blockers = [workload.nap.spawn(600) for _ in range(4)]
    wait_until(lambda: sum(row["running"] for row in containers_of("nap")) == 4, "all containers are busy")
    waiting = workload.nap.spawn(0, 1)
    waiting.cancel()
    with pytest.raises(CancelledError):
        waiting.get(timeout=10)
    for call in blockers:
        call.cancel()
    for call in blockers:
        with pytest.raises(CancelledError):
            call.get(timeout=20)


def test_cancelling_what_has_ended_changes_nothing() -> None:
    call = workload.square.spawn(4)
    assert call.get(timeout=20) == 16
    call.cancel()
    assert call.get(timeout=20) == 16


def test_a_spawned_map_of_2000_has_every_result(shared_home: Path) -> None:
    call = workload.square.spawn_map(range(2000))
    assert FunctionCall.from_id(call.object_id).num_inputs() == 2000
    assert call.get(timeout=60, index=1999) == 1999**2

    def ended() -> int:
        query = "select count(*) from inputs where call_id = ? and status = 'ok'"
        [(count,)] = stored(shared_home, query, call.object_id)
        return int(str(count))

    wait_until(lambda: ended() == 2000, lambda: f"2000 results are stored, {ended()} are")
    assert [call.get(timeout=20, index=n) for n in range(0, 2000, 97)] == [n * n for n in range(0, 2000, 97)]


def test_a_large_argument_and_result_survive_in_the_store() -> None:
    data = os.urandom(3 << 20)
    assert workload.echo.spawn(data).get(timeout=30) == data


def test_a_call_that_never_was_is_not_found() -> None:
    call = FunctionCall.from_id("fc-0000000000000000")
    with pytest.raises(NotFoundError, match="no spawned call `fc-0000000000000000`"):
        call.get(timeout=5)
    with pytest.raises(NotFoundError):
        call.num_inputs()


def test_an_input_the_call_does_not_have_is_not_found() -> None:
    call = workload.square.spawn(2)
    with pytest.raises(NotFoundError, match="has no input 5"):
        call.get(timeout=5, index=5)
    assert Client.current().usable()
