"""What containers used is in the Store, exactly once, whatever ends them."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from squall.exception import ContainerLostError
from tests.conftest import wait_until
from tests.integration import faulty, workload
from tests.integration.support import Kept, containers_of, inits, pid_of, rows, wait_ended

pytestmark = pytest.mark.root


def metered(home: Path) -> list[dict[str, Any]]:
    path = home / "state" / "squall.db"
    if not path.exists():
        return []
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    connection.row_factory = sqlite3.Row
    try:
        return [dict(row) for row in connection.execute("select * from containers order by requested_at")]
    except sqlite3.OperationalError:  # no table yet
        return []
    finally:
        connection.close()


def wait_metered(home: Path, count: int) -> list[dict[str, Any]]:
    def closed() -> bool:
        found = metered(home)
        return len(found) == count and all(row["stopped_at"] for row in found)

    wait_until(closed, lambda: f"{count} containers are recorded to their end: {metered(home)}")
    return metered(home)


def test_a_containers_start_end_and_use_are_recorded(home: Path) -> None:
    with workload.app.run(output=Kept()):
        workload.burn.remote(0.3)
        app_id = rows("apps")[0]["app_id"]
    [row] = wait_metered(home, 1)
    assert row["app_id"] == app_id
    assert (row["cpu"], row["memory_mib"], row["gpus"]) == (0.125, 128, 0)
    assert row["requested_at"] < row["started_at"] < row["stopped_at"]
    assert 0.3 <= row["cpu_seconds"] < 3.0
    assert 20 << 20 < row["memory_peak_bytes"] < 200 << 20
    assert row["reason"] == "the program is done with it"
    assert json.loads(row["timeline"])["loaded_at"] >= row["started_at"]


def test_a_container_that_crashed_is_recorded_with_how_it_ended(home: Path) -> None:
    with faulty.app.run(output=Kept()):
        with pytest.raises(ContainerLostError):
            faulty.die.remote("exit")
        wait_ended("die")
    crashed = [row for row in wait_metered(home, 2) if row["exit_code"] == 3]
    assert [row["reason"] for row in crashed] == ["exited with code 3"] * 2


def test_intervals_are_closed_once_after_the_agent_was_killed(home: Path) -> None:
    with workload.app.run(output=Kept()):
        workload.square.remote(1)
        os.kill(pid_of(home, "node"), signal.SIGKILL)
        wait_until(lambda: not containers_of("square"), "the server knows")
        assert workload.square.remote(2) == 4
    first, second = wait_metered(home, 2)
    assert "lost with its node" in first["reason"]
    assert first["stopped_at"] <= second["requested_at"] + 1.0


def test_intervals_are_closed_by_the_next_server_after_one_was_killed(home: Path) -> None:
    with workload.app.run(output=Kept()):
        workload.square.remote(1)
        wait_until(lambda: len(metered(home)) == 1, "the start is recorded")
        assert inits(home)
        agent = pid_of(home, "node")
        os.kill(pid_of(home, "server"), signal.SIGKILL)
        os.kill(agent, signal.SIGKILL)  # alone it would keep the container for the next server
        assert workload.square.remote(2) == 4
    first, _ = wait_metered(home, 2)
    assert first["reason"] == "the server ended before the container's end was recorded"


def test_container_that_ended_while_there_was_no_server_is_recorded_as_it_ended(home: Path) -> None:
    with workload.app.run(output=Kept()):
        assert workload.square.remote(1) == 1
        [pid] = inits(home).values()
        os.kill(pid_of(home, "server"), signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        assert workload.square.remote(2) == 4
    first, _ = wait_metered(home, 2)
    assert "the server ended before" not in first["reason"], "that is a guess"
    assert first["cpu_seconds"] > 0
    assert first["requested_at"] <= first["started_at"] < first["stopped_at"]


def test_container_whose_server_was_killed_before_it_wrote_of_it_is_recorded_once(home: Path) -> None:
    with workload.app.run(output=Kept()):
        assert workload.square.remote(1) == 1
        # A start is written after a second, so most times this one is not.
        os.kill(pid_of(home, "server"), signal.SIGKILL)
        assert workload.square.remote(2) == 4
    [row] = wait_metered(home, 1)
    assert row["cpu_seconds"] > 0 and row["reason"] == "the program is done with it"
