"""Results of spawned inputs on their way to the Store: however many end at once, and when it is full."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from squall.exception import ServiceError
from squall.server import calls
from squall.server.calls import Calls
from squall.server.database import Database
from squall.server.dispatch import Dispatch, FunctionOptions
from squall.server.inputs import Finish
from squall.server.objects import Objects
from squall.server.timelines import Timelines


class Store:
    """Takes writes, the first `failures` of them not; keeps how many rows each was about."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.writes: list[int] = []

    def write(self, work: Callable[[Any], None]) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if len(self.writes) < self.failures:
            self.writes.append(0)
            future.set_exception(ServiceError("database or disk is full"))
            return future
        work(self)
        future.set_result(None)
        return future

    def execute(self, statement: object, rows: list[dict[str, Any]]) -> None:
        self.writes.append(len(rows))


def end_inputs(store: Store, count: int) -> None:
    """Spawn `count` inputs and cancel them in one turn of the loop; wait until the Store has taken as many."""

    async def main() -> None:
        dispatch = Dispatch()
        kept = Calls(dispatch, cast(Objects, None), cast(Database, store), Timelines())
        dispatch.add_function(0.0, "fu-1", FunctionOptions())
        dispatch.submit(0.0, "fc-1", "fu-1", [(i, b"") for i in range(count)], "spawn")
        for instruction in dispatch.cancel(0.0, "fc-1", None, "cancelled"):
            if isinstance(instruction, Finish):
                kept.finish(instruction)
        for _ in range(1000):
            if sum(store.writes) >= count:
                return
            await asyncio.sleep(0)

    asyncio.run(main())


class Deaf:
    """A caller that never reads."""

    paused = True
    aborted = ""

    def __init__(self) -> None:
        self.stream = self.outbox = self
        self.waiting = 0

    def add(self, head: str, data: bytes) -> None:
        self.waiting += len(data)

    def waiting_bytes(self) -> int:
        return self.waiting

    def abort(self, reason: str) -> None:
        self.aborted = reason


def test_a_caller_that_never_reads_is_left_before_its_results_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "UNREAD_RESULTS_BYTES", 4 << 20)
    caller = Deaf()
    for _ in range(4):
        calls._give(caller, "{}", bytes(1 << 20))
    assert not caller.aborted
    calls._give(caller, "{}", b"one more")
    assert caller.aborted.startswith("it left 4 MiB")


def test_inputs_that_end_together_are_one_write() -> None:
    store = Store()
    end_inputs(store, 5000)
    assert store.writes == [5000]


def test_a_result_that_could_not_be_stored_is_stored_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "STORE_RETRY_S", 0.0)
    store = Store(failures=2)
    end_inputs(store, 10)
    assert store.writes == [0, 0, 10]
