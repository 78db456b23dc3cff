"""What dispatch does when containers do not start: when the next one may, and what becomes of all that waits for it.

Part of the brain in `dispatch`, which has the other rules; no clock, no I/O, no random number.

A container that dies before it is ready delays the next start of its function by 0.5 s, doubling to 30 s. Failures of
containers that were asked for before the latest failure are the same wave and count once. After START_FAILURES waves,
or at once when the runner reported why the import failed (`init_error`), everything queued ends as `init_error`, as
does what comes in until the delay is over; then one container is tried again. As long as another container of the
function is ready nothing fails. One that dies of itself soon after it was ready, with nothing in it and nothing done,
delays the next one too, from the second in a row; but that fails nothing.

A function that `persists`, as those of deployed apps do, is never given up. Its callers that wait fail as above. What
is in the journal stays queued until a container starts, and the delay goes on to PERSISTENT_DELAY_LIMIT; up to a
quarter of it is taken off, by a number that follows from the function's id, so that those that failed together do not
start together. A new version begins anew, and so does `try_again`. Tested in `tests/unit/test_starts.py`.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, NamedTuple

from squall.server.inputs import (
    BackoffChanged,
    Call,
    Container,
    Fault,
    Function,
    Input,
    Instructions,
    Notice,
    StartFailure,
)

if TYPE_CHECKING:
    from squall.server.dispatch import Dispatch

START_FAILURES = 3
START_DELAY = 0.5
START_DELAY_LIMIT = 30.0
PERSISTENT_DELAY_LIMIT = 300.0
JITTER = 0.25
EARLY_END = 10.0
"""Seconds after it was ready within which a container that ends with nothing done ends early."""
RESTART_SPREAD = 10.0
"""Seconds over which the starts are spread that were due while the server was away."""

_STARTUP_HINT = "the container's output says more: `squall app logs`"


class Backoff(NamedTuple):
    """Where a function's starts stand, as a restart must know it."""

    failures: int
    delay: float
    """The whole of it."""
    left: float
    reason: str
    failing: StartFailure | None


class Starts:
    def __init__(self, dispatch: Dispatch) -> None:
        self.dispatch = dispatch

    # ---- events ---------------------------------------------------------------------------------------------------

    def failed(
        self, now: float, container: Container, reason: str, fault: Fault, hint: str, init_error: Any, out: Instructions
    ) -> None:
        """A container has ended before it was ready."""
        function = container.function
        if function.closed:
            return
        delay = _count_failure(now, container, fault)
        told = f"a container {reason}" + ("" if init_error is not None else " before it was ready")
        self._block(now, function, delay, told, out)
        if fault == "container" and (init_error is not None or function.start_failures >= START_FAILURES):
            tries = f" ({function.start_failures} attempts)" if function.start_failures > 1 else ""
            hint = hint or (_STARTUP_HINT if init_error is None else "")
            function.failing = StartFailure(f"its container {reason}{tries}", hint, init_error)
            self.fail_queued(now, function, out)
        if function.options.persists and function.start_failures:
            out.append(BackoffChanged(function.function_id))

    def ready_one_gone(self, now: float, container: Container, reason: str, fault: Fault, out: Instructions) -> None:
        """One that was ready has ended, and its inputs have not been told yet."""
        function = container.function
        is_early = now - container.ready_at < EARLY_END and function.finished_at <= container.ready_at
        if fault != "container" or container.running or not is_early:
            function.early_ends = 0
        elif not function.closed:
            function.early_ends += 1
            if function.early_ends > 1:
                delay = _delay(function, function.early_ends - 1)
                self._block(now, function, delay, f"a container {reason} soon after it was ready", out)

    def succeeded(self, function: Function, out: Instructions) -> None:
        """A container is ready."""
        if function.options.persists and function.start_failures:
            out.append(BackoffChanged(function.function_id))
        _begin_anew(function)

    def try_again(self, now: float, function_id: str) -> Instructions:
        """What its starts fail of has changed: the next one need not wait, and counts as the first."""
        out: Instructions = []
        function = self.dispatch.functions.get(function_id)
        if function is None or function.closed or function.blocked_until == float("-inf"):
            return out
        self.succeeded(function, out)
        function.early_ends = 0
        self.dispatch._ask(function, out, force=True)
        return out

    def resume(self, now: float, function_id: str, backoff: Backoff) -> None:
        """Go on where an earlier server was. What fell due meanwhile is spread: it may be all functions there are."""
        function = self.dispatch.functions[function_id]
        limit = _limit(function)
        spread = min(RESTART_SPREAD, backoff.delay) * _draw(function_id, backoff.failures)
        function.start_failures, function.failing = max(1, backoff.failures), backoff.failing
        function.start_failed_at = now
        function.blocked_until = now + min(limit, max(backoff.left, spread))
        function.blocked_for = min(limit, backoff.delay)
        function.blocked_reason = backoff.reason
        self.dispatch._at(function.blocked_until, self._end_block, function, 0)

    def _block(self, now: float, function: Function, delay: float, reason: str, out: Instructions) -> None:
        if now + delay >= function.blocked_until:
            function.blocked_until, function.blocked_for = now + delay, delay
        function.blocked_reason = reason
        self.dispatch._at(function.blocked_until, self._end_block, function, 0)
        left = function.blocked_until - now
        out.append(Notice(function.function_id, "backoff", f"{reason}; next start in {left:.3g} s"))

    def _end_block(self, now: float, function: Function, _: int, out: Instructions) -> None:
        if now >= function.blocked_until and not function.closed:
            self.dispatch._ask(function, out, force=True)

    # ---- what waits -------------------------------------------------------------------------------------------------

    def is_failing(self, now: float, function: Function) -> bool:
        """Whether inputs end as `init_error` at once instead of waiting for a start that will not succeed."""
        if function.failing is None or now >= function.blocked_until:
            return False
        return not any(container.state == "ready" for container in function.containers.values())

    def turns_away(self, now: float, call: Call) -> bool:
        """The same, of inputs of one call: what is in the journal can wait."""
        function = call.function
        if function.failing is None or (call.kind == "spawn" and function.options.persists):
            return False
        return self.is_failing(now, function)

    def fail_queued(self, now: float, function: Function, out: Instructions) -> None:
        if self.is_failing(now, function):
            self.dispatch.endings.fail(now, function, out)

    def finish_failing(self, now: float, input_: Input, out: Instructions) -> None:
        function = input_.call.function
        failure = function.failing
        assert failure is not None  # callers asked whether it is failing
        hint = failure.hint
        if function.options.persists and (left := function.blocked_until - now) > START_DELAY_LIMIT:
            hint += f"{'; ' if hint else ''}the next start is in {left:.0f} s, or at once with `squall app rollover`"
        self.dispatch._finish(now, input_, "init_error", failure.message, hint, failure.output, out)


def impatient(function: Function) -> list[Input]:
    """Of a function that persists, what is queued and ends when there will be no container: not what is in the journal.
    Looked for only where it may be: a million spawned inputs may wait, for days."""
    if not function.hurries:
        return []
    function.hurries = False
    entries = (*function.suspects, *function.queue)
    return [entry for entry in entries if entry.state == "queued" and entry.call.kind != "spawn"]


def backoff_of(function: Function, now: float) -> Backoff | None:
    """Where its starts stand; None when nothing holds them up."""
    left = function.blocked_until - now
    if not function.start_failures and left <= 0:
        return None
    return Backoff(
        function.start_failures, function.blocked_for, max(0.0, left), function.blocked_reason, function.failing
    )


def _begin_anew(function: Function) -> None:
    function.start_failures = 0
    function.failing = None
    function.blocked_until = float("-inf")


def _count_failure(now: float, container: Container, fault: Fault) -> float:
    """Seconds until its function may start another. Failures of those asked for before the latest one are one wave."""
    function = container.function
    if fault != "container":
        return START_DELAY
    if container.started_at > function.start_failed_at:
        function.start_failures += 1
        function.start_failed_at = now
    return _delay(function, function.start_failures)


def _delay(function: Function, failures: int) -> float:
    # The exponent is bounded because a float power overflows by raising.
    delay = min(_limit(function), START_DELAY * 2.0 ** min(failures - 1, 16))
    return delay * (1.0 - JITTER * _draw(function.function_id, failures)) if function.options.persists else delay


def _limit(function: Function) -> float:
    return PERSISTENT_DELAY_LIMIT if function.options.persists else START_DELAY_LIMIT


def _draw(function_id: str, number: int) -> float:
    """From 0 up to 1, the same for the same."""
    digest = hashlib.blake2b(f"{function_id} {number}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") / 2.0**32
