"""Results of spawned inputs on their way to the Store: however many end at once, and when it is full."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from squall._clock import ManualClock
from squall.exception import ServiceError
from squall.server import calls, durable
from squall.server.dispatch import Dispatch, FunctionOptions
from squall.server.durable import Durable
from squall.server.inputs import Finish
from squall.server.journal import Row


class Store:
    """Takes ends of inputs, the first `failures` times not; keeps how many rows each write was about."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.writes: list[int] = []

    def finish(self, rows: Sequence[Row]) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if len(self.writes) < self.failures:
            self.writes.append(0)
            future.set_exception(ServiceError("database or disk is full"))
        else:
            self.writes.append(len(rows))
            future.set_result(None)
        return future


class Owner:
    def __init__(self) -> None:
        self.told = 0

    def stored(self, rows: Sequence[Row]) -> None:
        self.told += len(rows)


def end_inputs(store: Store, count: int) -> int:
    """Spawn `count` inputs and cancel each in one turn of the loop; how many ends were told once the Store has them."""

    async def main() -> int:
        dispatch, owner = Dispatch(), Owner()
        loop = asyncio.get_running_loop()
        kept = Durable(dispatch, cast(Any, store), cast(Any, owner), ManualClock(), loop)
        dispatch.add_function(0.0, "fu-1", FunctionOptions())
        data = SimpleNamespace(function_id="fu-1")
        dispatch.submit(0.0, "fc-1", "fu-1", [(i, b"") for i in range(count)], "spawn", data=data)
        for instruction in dispatch.cancel(0.0, "fc-1", range(count), "cancelled"):
            if isinstance(instruction, Finish):
                kept.finish(instruction.input, instruction.status, instruction.message, instruction.hint, b"")
        for _ in range(1000):
            if owner.told >= count:
                break
            await asyncio.sleep(0)
        return owner.told

    return asyncio.run(main())


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


def test_inputs_that_end_together_are_a_few_large_writes() -> None:
    store = Store()
    assert end_inputs(store, 5000) == 5000
    assert store.writes == [durable.FINISH_LIMIT, durable.FINISH_LIMIT, 5000 - 2 * durable.FINISH_LIMIT]


def test_a_result_that_could_not_be_stored_is_stored_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "RETRY_S", 0.0)
    store = Store(failures=2)
    assert end_inputs(store, 10) == 10
    assert store.writes == [0, 0, 10]
