"""The machine's clock is set an hour ahead, and back, under a server that serves. Needs libfaketime (Debian's package
of that name), which changes what a process reads of the wall clock while the monotonic one goes on as the kernel's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import squall
from tests.conftest import wait_until
from tests.faults import chaos
from tests.integration import durable
from tests.integration.support import Outcome, rows

pytestmark = pytest.mark.root

LIBRARIES = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))


@pytest.fixture
def clock(home: Path, tmp_path: Path) -> Iterator[Path]:
    """A server whose wall clock is the machine's and what the file says, such as `+3600`."""
    if not LIBRARIES:
        pytest.skip("needs libfaketime")
    offset = tmp_path / "offset"
    offset.write_text("+0\n")
    faked = {
        "LD_PRELOAD": str(LIBRARIES[0]), "FAKETIME_TIMESTAMP_FILE": str(offset), "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1",
    }  # fmt: skip
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "squall.server", "--stay"], env={**os.environ, **faked}, stdout=log, stderr=log
        )
    wait_until(lambda: (home / "run/server.sock").exists(), "it serves")
    yield offset
    server.terminate()
    server.wait(60)


def schedule() -> dict[str, Any]:
    (row,) = rows("schedules")
    return row


@pytest.mark.parametrize("jump", ["+3600\n", "-3600\n"], ids=["ahead", "back"])
def test_clock_set_by_an_hour_ends_no_call_and_storms_no_schedule(clock: Path, jump: str) -> None:
    chaos.app.deploy()
    with durable.app.run(detach=True):
        wait_until(lambda: schedule()["fired"] >= 2, "it fires")
        under_way = Outcome(lambda: list(durable.step.map([0.3] * 20, range(20))))
        spawned = durable.step.spawn(2.0, 7)
        retried = durable.stubborn.spawn(8)
        wait_until(lambda: any(row["running"] for row in rows("containers")), "it runs")
        before = schedule()
        clock.write_text(jump)
        assert under_way.result() == list(range(20))
        assert spawned.get(timeout=60) == 7
        with pytest.raises(ValueError, match="never 8"):
            retried.get(timeout=60)
        wait_until(lambda: schedule()["fired"] >= before["fired"] + 3, "it fires on")
        after = schedule()
        assert sum(one.get("missed", 0) > 5 for one in after["recent"]) <= 1, "made up for once at most"
        assert after["fired"] < before["fired"] + 120, "a storm"
        for one in after["recent"][-3:]:
            assert squall.FunctionCall.from_id(one["call_id"]).get(timeout=60)
