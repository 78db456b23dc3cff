"""The server killed again and again in the middle of many spawns: what was acknowledged is there after each restart."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import threading
from pathlib import Path

import pytest

from squall import FunctionCall
from squall.client import Client
from squall.exception import Error
from squall.protocol.messages import InputItem, Submit, new_id
from squall.protocol.payload import pack_call
from tests.conftest import wait_until
from tests.faults import chaos
from tests.integration.support import Kept, is_alive, pid_of

pytestmark = pytest.mark.root

SEED = os.environ.get("FAULTS_SEED") or os.urandom(4).hex()
KILLS = 5
THREADS = 8


class Spawner(threading.Thread):
    """Spawns without a pause, each call under an id of its own that is on no disk unless the server puts it there."""

    def __init__(self, function_id: str) -> None:
        super().__init__(daemon=True)
        self.function_id = function_id
        self.acknowledged: list[str] = []
        self.ended = False
        self.start()

    def run(self) -> None:
        data = pack_call(("x", 0), {}, "work")
        while not self.ended:
            call_id = new_id("fc")
            # Not repeated: what matters is what a single answer is worth.
            with contextlib.suppress(Error):
                link = Client.current().link
                link.request(Once(call_id, self.function_id, [InputItem(0, len(data))], "spawn"), data).wait(30)
                self.acknowledged.append(call_id)


class Once(Submit):
    """It travels as what it is made of; without a tag of its own it does not take that one's place here."""

    IS_REPEATABLE = False


def test_no_spawn_that_was_acknowledged_is_lost_when_the_server_is_killed_among_them(home: Path) -> None:
    print(f"FAULTS_SEED={SEED}")
    rng = random.Random(SEED)
    with chaos.app.run(output=Kept(), detach=True):
        spawners = [Spawner(chaos.work.object_id) for _ in range(THREADS)]
        for _ in range(KILLS):
            more = sum(len(one.acknowledged) for one in spawners) + rng.randrange(20, 120)
            wait_until(lambda more=more: sum(len(one.acknowledged) for one in spawners) >= more, "spawns go on", 60)  # type: ignore[misc]
            pid = pid_of(home, "server")
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda pid=pid: not is_alive(pid), "the server is gone")  # type: ignore[misc]
        for one in spawners:
            one.ended = True
            one.join(60)
        acknowledged = [call_id for one in spawners for call_id in one.acknowledged]
        assert FunctionCall.from_id(acknowledged[-1]).get(timeout=120)[:2] == ("x", 0)
        with contextlib.closing(sqlite3.connect(home / "state/squall.db")) as database:
            there = {row[0] for row in database.execute("SELECT call_id FROM inputs")}
        lost = set(acknowledged) - there
        assert not lost, f"{len(lost)} of {len(acknowledged)} acknowledged calls are lost"
