"""What the periodic look tells the followers of an app."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from squall.server.objects import FunctionRecord
from squall.server.reconciler import TELL_STALLED_AFTER, Reconciler

A_LONG_UPTIME = 90_000.0


def told(*looks: tuple[float, int]) -> list[str]:
    """What is told of a function whose inputs wait behind one busy container: (seconds, inputs ended) at each look."""
    state = SimpleNamespace(
        finished=0, queued=5, starting=0, containers={"co": 1}, options=SimpleNamespace(max_containers=0)
    )
    function = FunctionRecord.__new__(FunctionRecord)
    function.progress, function.told_stalled = FunctionRecord.progress, FunctionRecord.told_stalled
    dispatch: Any = SimpleNamespace(functions={"fu": state})
    objects: Any = SimpleNamespace(functions={"fu": function})
    rest: Any = SimpleNamespace()
    said: list[str] = []

    async def look() -> None:
        reconciler = Reconciler(dispatch, objects, rest, rest, rest)
        reconciler.notify = lambda function, kind, data: said.append(str(data["reason"]))
        for now, state.finished in looks:
            reconciler._tell_stalled(A_LONG_UPTIME + now, "fu")

    asyncio.run(look())
    return said


def test_function_that_has_just_begun_is_not_told_to_stall() -> None:
    assert told((0, 0), (1, 0), (TELL_STALLED_AFTER - 1, 0)) == []


def test_function_of_which_no_input_ends_is_told_once() -> None:
    assert len(told((0, 0), (TELL_STALLED_AFTER + 1, 0), (TELL_STALLED_AFTER + 2, 0))) == 1


def test_inputs_that_end_are_no_stall() -> None:
    assert told((0, 0), (TELL_STALLED_AFTER - 1, 1), (TELL_STALLED_AFTER + 1, 1)) == []
