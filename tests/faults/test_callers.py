"""Callers that change their mind a thousand times, or take what they asked for very slowly."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from squall import FunctionCall
from squall.client import Client
from squall.exception import CancelledError
from squall.protocol.messages import InputItem, Outputs, Submit
from squall.protocol.payload import pack_call
from tests.conftest import wait_until
from tests.faults import chaos
from tests.integration.support import Kept, Outcome, Wire, containers_of, pid_of

pytestmark = pytest.mark.root

SEED = os.environ.get("FAULTS_SEED") or os.urandom(4).hex()
RESULT_BYTES = 500_000
RESULTS = 60


@pytest.fixture(autouse=True)
def app(home: Path) -> Iterator[None]:
    with chaos.app.run(output=Kept()):
        yield


def end_of(call: FunctionCall[str], index: int = 0) -> str:
    try:
        return call.get(timeout=60, index=index)
    except CancelledError:
        return "cancelled"


def test_each_of_a_thousand_inputs_cancelled_at_random_ends_as_cancelled_or_with_its_result() -> None:
    """Queued, while its container starts, running, ending, ended; one by one and many at once, by two threads."""
    print(f"FAULTS_SEED={SEED}")
    rng = random.Random(SEED)
    calls: list[FunctionCall[str]] = []
    cancelled: set[str] = set()

    def cancel_some(number: int) -> None:
        for call in rng.sample(calls, min(number, len(calls))):
            cancelled.add(call.object_id)
            call.cancel(terminate_containers=rng.random() < 0.02)

    for _ in range(50):
        calls += [chaos.nap.spawn(rng.choice([0.0, 0.0, 0.002, 0.02])) for _ in range(10)]
        calls.append(chaos.nap.spawn_map([rng.choice([0.0, 0.01]) for _ in range(10)]))
        other = Outcome(lambda: cancel_some(5))
        cancel_some(5)
        other.result()
    ends = Counter(
        (call.object_id in cancelled, end_of(call, index)) for call in calls for index in range(call.num_inputs())
    )
    assert sum(ends.values()) == 1000
    assert not ends[False, "cancelled"], f"cancelled, and nobody asked for it: {ends}"
    assert {end for _, end in ends} <= {"done", "cancelled"}
    wait_until(lambda: not any(row["running"] for row in containers_of("nap")), "nothing runs any more")


def resident_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def test_caller_that_does_not_read_gets_all_later_and_disturbs_nobody(home: Path) -> None:
    data = pack_call((RESULT_BYTES,), {}, "large")
    items = [InputItem(idx, len(data)) for idx in range(RESULTS)]
    pid = pid_of(home, "server")
    chaos.large.remote(RESULT_BYTES)
    before = resident_mib(pid)
    with Wire() as wire:
        wire.send(Submit("fc-00000000000051de", chaos.large.object_id, items, "map"), data * RESULTS)
        wait_until(lambda: not any(row["running"] for row in containers_of("large")), "it has run")
        for n in range(100):
            assert chaos.work.remote("x", n)[:2] == ("x", n)
        assert Client.current().usable()
        grown = resident_mib(pid) - before
        assert grown < 3 * RESULTS * RESULT_BYTES / (1 << 20), f"{grown:.0f} MiB for what was not read"
        found: set[int] = set()
        while len(found) < RESULTS:
            message, _ = wire.receive()
            if isinstance(message, Outputs):
                found |= {item.idx for item in message.items if item.status == "ok"}
