"""Whatever is killed, each container is in the Store once, with its start, its end and what it used."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from collections import Counter
from pathlib import Path

import pytest

import squall
from tests.conftest import wait_until
from tests.integration.support import Kept, Outcome, containers_of, inits, is_alive, pid_of
from tests.integration.test_metering import metered

pytestmark = pytest.mark.root

SEED = int(os.environ.get("FAULTS_SEED", "7"), 16)
KILLS = ("container", "server", "container", "agent", "server", "container", "server", "agent")
GUESSED = "the server ended before"

app = squall.App("metered")


@app.function(max_containers=4, scaledown_window=2, retries=8)
def where(seconds: float) -> str:
    """Which container this is, after using some of a processor."""
    until = time.process_time() + seconds / 4
    while time.process_time() < until:
        pass
    time.sleep(seconds)
    return socket.gethostname()


def kill_one(home: Path, what: str, rng: random.Random) -> None:
    pids = {"server": [pid_of(home, "server")], "agent": [pid_of(home, "node")], "container": [*inits(home).values()]}
    pid = rng.choice([pid for pid in pids[what] if pid])
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid), f"the {what} is gone")


def is_working() -> bool:
    return any(row["running"] for row in containers_of("where"))


def test_starts_stops_and_use_of_every_container_are_recorded_once_whatever_is_killed(home: Path) -> None:
    rng = random.Random(SEED)
    seen: set[str] = set()
    with app.run(output=Kept()):
        for what in KILLS:
            work = Outcome(lambda: set(where.map([0.4] * 12)))
            wait_until(is_working, "it is under way")
            kill_one(home, what, rng)
            seen.update(work.result())
        seen.update(where.map([0.05] * 4))
    wait_until(lambda: all(row["stopped_at"] for row in metered(home)), lambda: f"all have ended: {metered(home)}")
    rows = metered(home)
    assert max(Counter(row["container_id"] for row in rows).values()) == 1
    by_id = {row["container_id"]: row for row in rows}
    assert seen <= by_id.keys(), "each that ran something is there"
    for container_id in seen:
        row = by_id[container_id]
        assert row["requested_at"] <= row["stopped_at"], row
        assert not row["reason"].startswith(GUESSED), row
        assert row["cpu_seconds"] or "lost with its node" in row["reason"], row
