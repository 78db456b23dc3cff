"""What attempts cost: their budgets, and what is left of them after a restart.

Part of the brain in `dispatch`, which calls it and has the other rules; pure state changes, no clock, no I/O. Tested
with dispatch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from squall.server.inputs import Call, Finish, History, Input, Instructions

INFRA_RETRIES = 8
CRASH_RETRIES = 1
EWMA_WEIGHT = 0.2


def average(known: float | None, spent: float) -> float:
    """A moving average with one value more."""
    return spent if known is None else known + EWMA_WEIGHT * (spent - known)


def resumed(now: float, call: Call, item: tuple[int, Any], history: History) -> Input:
    """An input that an earlier server has tried, in its call."""
    idx, payload = item
    input_ = call.inputs[idx] = Input(call, idx, payload, now)
    if call.line is not None:
        call.line.outside[idx] = input_
    call.submitted += 1
    input_.attempt, input_.failures, input_.infra_failures = history[:3]
    return input_


def turn_all_away(now: float, call: Call, items: Iterable[tuple[int, Any]], out: Instructions) -> None:
    """End the inputs of a function that is not there (any more)."""
    for idx, payload in items:
        if call.is_done(idx) or idx in call.inputs:
            continue
        call.mark_done(idx)
        input_ = Input(call, idx, payload, now)
        input_.state = "done"
        out.append(Finish(input_, "rejected", f"function `{call.function_id}` is not running", "", None))
