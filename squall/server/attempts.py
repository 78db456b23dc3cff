"""What attempts and starts of containers cost: budgets, delays, and what is left of them after a restart.

Starts. A container that dies before it is ready delays the next start of its function by 0.5 s, doubling to 30 s.
Failures of containers that were asked for before the latest failure are the same wave and count once. After
START_FAILURES waves, or at once when the runner reported why the import failed (`init_error`), everything queued ends
as `init_error`, as does what comes in until the delay is over; then one container is tried again. As long as another
container of the function is ready nothing fails.

Part of the brain in `dispatch`, which calls it and has the other rules; pure state changes, no clock, no I/O. Tested
with dispatch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from squall.server.inputs import Call, Container, Fault, Finish, History, Input, Instructions

INFRA_RETRIES = 8
CRASH_RETRIES = 1
START_FAILURES = 3
START_DELAY = 0.5
START_DELAY_LIMIT = 30.0
EWMA_WEIGHT = 0.2


def average(known: float | None, spent: float) -> float:
    """A moving average with one value more."""
    return spent if known is None else known + EWMA_WEIGHT * (spent - known)


def count_failed_start(now: float, container: Container, fault: Fault) -> float:
    """Seconds until its function may start another. Failures of those asked for before the latest one are one wave."""
    function = container.function
    if fault != "container":
        return START_DELAY
    if container.started_at > function.start_failed_at:
        function.start_failures += 1
        function.start_failed_at = now
    return min(START_DELAY_LIMIT, START_DELAY * 2.0 ** min(function.start_failures - 1, 16))


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
