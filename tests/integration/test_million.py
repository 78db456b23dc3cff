"""Very many spawned inputs that wait: who else is served, and how all of them end. In CI there are MANY of them; what a
million costs is for `benchmarks/backlog.py` to say."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from squall import FunctionCall
from squall.client import Client
from squall.exception import CancelledError, ConflictError, OutputTimeoutError
from squall.protocol.messages import GetCall, InputItem, Submit
from tests.conftest import wait_until
from tests.integration import crowds
from tests.integration.support import Kept, containers_of
from tests.integration.test_restarts import executions, kill_server
from tests.stores import Cluster

pytestmark = pytest.mark.root

MANY = int(os.environ.get("SQUALL_TEST_MANY", "30000"))


def waiting(seconds: float = 600.0, count: int = MANY) -> FunctionCall[int]:
    """A call of which one input runs, for so long, and the others wait."""
    call: FunctionCall[int] = crowds.crowded.spawn_map([seconds] * count, range(count))
    wait_until(lambda: any(row["running"] for row in containers_of("crowded")), "the first one runs")
    return call


def backlog() -> int:
    stats = crowds.crowded.get_current_stats()
    return stats.backlog + stats.num_running_inputs


def counts(call: FunctionCall[Any]) -> dict[str, int]:
    reply, _ = Client.current().link.request(GetCall(call.object_id)).wait(20)
    return dict(reply.data["counts"])


def rows_by_status(home: Path, call: FunctionCall[Any]) -> dict[str, int]:
    """Past the server, from the Store's file."""
    connection = sqlite3.connect(f"file:{home / 'state' / 'squall.db'}?mode=ro", uri=True)
    try:
        query = "SELECT coalesce(status, ''), count(*) FROM inputs WHERE call_id = ? GROUP BY status"
        return dict(connection.execute(query, (call.object_id,)).fetchall())
    finally:
        connection.close()


def assert_cancelled(call: FunctionCall[Any], *idxs: int) -> None:
    for idx in idxs:
        with pytest.raises(CancelledError):
            call.get(timeout=20, index=idx)


# ---- who else is served ---------------------------------------------------------------------------------------------


def test_other_functions_are_served_while_very_many_inputs_of_one_wait(home: Path) -> None:
    with crowds.app.run(output=Kept()), crowds.beside.run(output=Kept()):
        waiting()
        assert [crowds.neighbour.remote(n) for n in range(20)] == list(range(20)), "of the same app"
        assert list(crowds.elsewhere.map(range(200))) == list(range(200)), "of another app"
        spawned = crowds.neighbour.spawn_map(range(50))
        assert list(spawned.iter()) == list(range(50))
        assert backlog() == MANY


def test_inputs_of_one_function_run_in_the_order_in_which_they_came(home: Path) -> None:
    with crowds.app.run(output=Kept()):
        first = crowds.crowded.spawn_map([0.0] * 300, range(300))
        last = crowds.crowded.spawn(0.0, 300)
        assert crowds.crowded.remote(0.0, 301) == 301, "behind what waits, whoever called"
        assert last.get(timeout=20) == 300 and first.get(timeout=20, index=299) == 299
        wait_until(lambda: len(executions("crowds")) == 302, "the output is kept")
        assert executions("crowds") == list(range(302))


# ---- cancelled ------------------------------------------------------------------------------------------------------


def test_all_inputs_of_a_cancelled_call_are_cancelled_at_once(home: Path) -> None:
    with crowds.app.run(output=Kept()):
        call = waiting()
        call.cancel(terminate_containers=True)
        assert_cancelled(call, 0, 1, MANY // 2, MANY - 1)
        assert backlog() == 0 and counts(call) == {"cancelled": MANY}
        with pytest.raises(CancelledError):
            next(call.iter(MANY // 3))
        with pytest.raises(CancelledError):
            FunctionCall.gather(call, crowds.neighbour.spawn(1))
        assert {node.status for node in call.get_call_graph()} == {"cancelled"}
        assert crowds.crowded.remote(0.0, 7) == 7, "what comes after it runs"
        wait_until(lambda: rows_by_status(home, call) == {"cancelled": MANY}, "each has a row in the end", 60)


def test_who_waits_for_a_result_hears_of_the_cancel(home: Path) -> None:
    with crowds.app.run(output=Kept()):
        call = waiting(1.5)
        asked = [Client.current().link.request(_get(call, idx)) for idx in (0, 5, MANY - 1)]
        call.cancel()
        found = [pending.wait(30)[0].data for pending in asked]
        assert [one["item"]["status"] for one in found] == ["cancelled"] * 3


def _get(call: FunctionCall[Any], idx: int) -> Any:
    from squall.protocol.messages import GetOutput

    return GetOutput(call.object_id, idx, -1.0)


def test_a_cancelled_call_takes_no_more_inputs(home: Path) -> None:
    with crowds.app.run(output=Kept()):
        call = waiting(count=100)
        call.cancel()
        function_id = str(Client.current().link.request(GetCall(call.object_id)).wait(20)[0].data["function_id"])
        more = Submit(call.object_id, function_id, [InputItem(100, 1)], kind="spawn")
        with pytest.raises(ConflictError, match="was cancelled"):
            Client.current().link.request(more, b"x").wait(20)


def test_a_failed_input_of_a_cancelled_call_is_not_tried_again(home: Path) -> None:
    with crowds.app.run(output=Kept()):
        call = crowds.crowded.spawn_map([-1.0] * 50, range(50))  # `sleep` refuses that
        wait_until(lambda: 3 in executions("crowds"), "some have failed and wait to be tried again")
        call.cancel()
        assert_cancelled(call, 49)
        ran = executions("crowds")
        assert crowds.crowded.remote(0.0, 99) == 99
        wait_until(lambda: 99 in executions("crowds"), "the output is kept")
        assert len(set(executions("crowds")) - set(ran)) <= 2, (
            "nothing but what ran at that moment, and what came after"
        )


@pytest.mark.parametrize("when", ["at once", "while it is tidied up"])
def test_a_cancel_of_very_many_holds_over_a_killed_server(home: Path, when: str) -> None:
    with crowds.app.run(detach=True, output=Kept()):
        call = waiting()
        call.cancel()
        if when != "at once":
            wait_until(lambda: rows_by_status(home, call).get("cancelled", 0) > MANY // 10, "some have their rows")
        kill_server(home)
        assert_cancelled(call, MANY - 1, 1)
        assert crowds.crowded.remote(0.0, MANY) == MANY
        assert counts(call) == {"cancelled": MANY}
        wait_until(lambda: rows_by_status(home, call) == {"cancelled": MANY}, "each has a row in the end", 60)
        assert set(executions("crowds")) <= {0, MANY}


def test_very_many_are_cancelled_in_postgresql(home: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUALL_DATABASE_URL", cluster.create())
    with crowds.app.run(detach=True, output=Kept()):
        call = waiting()
        call.cancel()
        kill_server(home)
        assert_cancelled(call, MANY - 1, 1)
        assert counts(call) == {"cancelled": MANY}


# ---- the app is stopped, or a new version of it comes ---------------------------------------------------------------


def test_inputs_of_a_stopped_app_are_cancelled(home: Path) -> None:
    with crowds.beside.run(output=Kept()):
        with crowds.app.run(output=Kept()):
            call = waiting()
            singles = [crowds.crowded.spawn(0.0, n) for n in range(20)]
            _stop(str(crowds.app.app_id))
        assert_cancelled(call, 1, MANY - 1)
        for single in singles:
            assert_cancelled(single, 0)
        with pytest.raises(CancelledError, match="the function was stopped"):
            call.get(timeout=20, index=MANY // 2)
        assert crowds.elsewhere.remote(3) == 3
        wait_until(lambda: rows_by_status(home, call) == {"cancelled": MANY}, "each has a row in the end", 60)
        kill_server(home)
        with pytest.raises(CancelledError, match="the function was stopped"):
            FunctionCall.from_id(call.object_id).get(timeout=20, index=MANY // 2)


def _stop(app_id: str) -> None:
    from squall.protocol.messages import StopApp

    Client.current().link.request(StopApp(app_id)).wait(60)


def test_what_waits_goes_to_a_new_version_and_is_cancelled_there(home: Path) -> None:
    crowds.app.deploy()
    call = waiting()
    crowds.app.deploy()
    wait_until(lambda: backlog() == MANY - 1, lambda: f"all that waits is with the new version: {backlog()}")
    with pytest.raises(OutputTimeoutError):
        call.get(timeout=0, index=MANY - 1)
    call.cancel(terminate_containers=True)
    assert_cancelled(call, 0, MANY - 1)
    _stop("crowds")
