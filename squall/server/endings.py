"""How many inputs end at once without anybody having to wait for it.

What waits of a spawned call that is cancelled is *dropped*: it leaves its queue in one step, and the hand is told of
all of it together (`Dropped`), as the journal says it in one row. Where all that waits for a function ends (it was
stopped, it cannot start, no node could hold it) each input has an end of its own: STEP of them at once, the others in
the next ticks, so that a million of them are no pause for anybody else's call.

Part of the brain in `dispatch`, which has the rules; no clock, no I/O. Tested in `tests/unit/test_endings.py`.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Literal

from squall.server import lines
from squall.server.inputs import Call, Dropped, Function, Input, Instructions, Run
from squall.server.starts import impatient
from squall.server.succession import in_backoff

if TYPE_CHECKING:
    from squall.protocol.states import InputState
    from squall.server.dispatch import Dispatch

STEP = 1000
"""Inputs that end in one event."""
PAUSE = 0.001
"""Seconds until the next: whatever else is due comes in between."""
ALL_DONE = 1 << 62


class Ending:
    """What of a function is still to end, and how."""

    __slots__ = ("chosen", "function", "hint", "left", "message", "state", "why")

    def __init__(
        self, function: Function, why: Literal["closed", "rejected", "failing"], message: str = "", hint: str = ""
    ) -> None:
        self.function = function
        self.why = why
        self.message = message
        self.hint = hint
        self.chosen: list[Input] = []
        """The next ones from the end, in this order; those in another `state` by then are not meant any more."""
        self.state: InputState = "queued"
        self.left = 0
        """So many from the head of the queue, after these. What comes later is not meant, except where all is."""


class Endings:
    def __init__(self, dispatch: Dispatch) -> None:
        self.dispatch = dispatch
        self.step = STEP

    # ---- a call -----------------------------------------------------------------------------------------------------

    def drop(self, now: float, call: Call, reason: str, out: Instructions) -> None:
        """Leave out all that waits of a spawned call with several inputs; what is elsewhere of it is the caller's."""
        if call.line is None or len(call.line.outside) == len(call.inputs):
            return
        function, dispatch = call.function, self.dispatch
        inputs, runs = lines.drop(call)
        dropped = Dropped(call, reason or "cancelled", inputs, runs, frozenset(call.inputs))
        call.last = True
        call.done_below = ALL_DONE  # it takes no more: what is said again has ended
        for counted in (call, function):
            counted.finished += dropped.count
            counted.failed += dropped.count
        function.finished_at = now
        dispatch._unsettled[function] = None  # for its autoscaler to look
        dispatch._forget_if_done(call)
        out.append(dropped)

    # ---- a function -------------------------------------------------------------------------------------------------

    def close(self, now: float, function: Function, message: str, out: Instructions) -> None:
        """End all that a function has as cancelled: what runs and what waits of spawned calls now."""
        for input_ in list(function.running):
            self._cancel(now, input_, message, out)
        ending = Ending(function, "closed", message)
        ending.chosen, ending.state = in_backoff(function, (timer[3] for timer in self.dispatch._timers)), "backoff"
        function.ending = True
        self._go_on(now, ending, 0, out)

    def reject(self, now: float, function: Function, message: str, hint: str, out: Instructions) -> None:
        """End what waits now, and cannot wait for better days, as rejected."""
        if not function.ending and not function.closed:
            self._begin(now, Ending(function, "rejected", message, hint), out)

    def fail(self, now: float, function: Function, out: Instructions) -> None:
        """End what waits now, and cannot wait for a start that succeeds, as `init_error`; for as long as the function
        is failing."""
        if not function.ending:
            self._begin(now, Ending(function, "failing"), out)

    def _begin(self, now: float, ending: Ending, out: Instructions) -> None:
        function = ending.function
        if function.options.persists:
            ending.chosen = impatient(function)[::-1]
        else:
            ending.left = function.suspected + function.queued
        function.ending = True
        self._go_on(now, ending, 0, out)

    def _go_on(self, now: float, ending: Ending, _token: int, out: Instructions) -> None:
        function = ending.function
        if function.closed and ending.why != "closed":  # whoever closed it goes on, or its successor has all that waits
            function.ending = function.successor is None and function.ending
            self.dispatch._drop_if_empty(function)
            return
        for _ in range(self.step):
            input_ = self._next(now, ending, out)
            if input_ is None:
                function.ending = False
                self.dispatch._drop_if_empty(function)
                return
            self._end(now, ending, input_, out)
        function.hurries = True  # some of it may be queued still
        self.dispatch._at(now + PAUSE, self._go_on, ending, 0)

    def _next(self, now: float, ending: Ending, out: Instructions) -> Input | None:
        """An input that is to end, still counted where it waits; None when there is none any more."""
        function = ending.function
        if ending.why == "failing" and not self.dispatch.starts.is_failing(now, function):
            return None
        while ending.chosen:
            input_ = ending.chosen.pop()
            if input_.state == ending.state and input_.call.function is function:
                return input_
        if ending.left <= 0 and ending.why != "closed":
            return None
        ending.left -= 1
        return self._first(function.suspects) or self._of_queue(now, ending, out)

    def _first(self, queue: deque[Input | Run] | deque[Input]) -> Input | None:
        while queue:
            entry = queue.popleft()
            if entry.state == "queued":
                return entry
        return None

    def _of_queue(self, now: float, ending: Ending, out: Instructions) -> Input | None:
        function = ending.function
        while function.queue:
            entry = function.queue[0]
            if entry.state == "queued":
                function.queue.popleft()
                return entry
            if entry.state == "run":
                if ending.why == "closed":
                    self.drop(now, entry.line.call, ending.message, out)
                elif (input_ := lines.first_of(entry)) is not None:
                    return input_
            function.queue.popleft()
        return None

    def _end(self, now: float, ending: Ending, input_: Input, out: Instructions) -> None:
        if ending.why == "closed":
            self._cancel(now, input_, ending.message, out)
        elif ending.why == "failing":
            self.dispatch.starts.finish_failing(now, input_, out)
        else:
            self.dispatch._finish(now, input_, "rejected", ending.message, ending.hint, None, out)

    def _cancel(self, now: float, input_: Input, message: str, out: Instructions) -> None:
        input_.call.last = True
        self.dispatch._finish(now, input_, "cancelled", message, "", None, out)
