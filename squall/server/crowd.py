"""BRAIN: how many containers of a function are kept busy at once, where its inputs are tiny.

Once a function has many containers (a slow machine made its inputs look long, or they were long before), a flood of
tiny inputs would keep all of them busy: they share the same processors and throw each other's memory out of the
caches, and none ever ages out. So no more are filled than are needed for more inputs a second than a server can deal
with (CROWD_RATE). The others rest, most recently used last, and end after their window.

What counts is the time an input takes, as its runner says, and the least that the way there and back adds: what a
server measures beyond that is its own queue. A runner's word is the tenant's. It is believed for its own function only,
and never beyond what was measured here. Inputs that turn out long (STUCK_S) are not counted, so one that blocks a
container brings another one in. Of functions with several slots a container nothing is held back, nor before SEEN
inputs have ended.

Part of the brain in `dispatch`, which asks `has_room` before it fills a container. Tested in
`tests/unit/test_crowd.py`.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

from squall.server import attempts
from squall.server.inputs import Function, Instructions

if TYPE_CHECKING:
    from squall.server.dispatch import Dispatch

FEW = 6
"""Containers that are filled in any case: while the server looks at the result of one, others run."""
CROWD_RATE = 10_000.0
"""Inputs a second that those which are filled could do, if processors were no limit."""
SEEN = 64
"""Inputs that must have ended before anything is concluded from them."""
STUCK_S = 0.1
"""An input that has run for so long is not tiny, whatever those before it were."""
TYPICAL_WEIGHT = 0.02
LAG_DRIFT = 0.0001
"""How fast the least lag is forgotten, with each input that had little company: a way may become longer."""


class Crowd:
    """What dispatch knows of how busy each function's containers are. Keeps its numbers in the functions."""

    def __init__(self, dispatch: Dispatch) -> None:
        self._dispatch = dispatch

    def note(self, function: Function, span: float, took: float) -> None:
        """An input came back `span` seconds after it was pushed, of which its runner says it took `took`."""
        if not 0.0 <= took <= span:
            took = span
        lag = span - took
        if lag < function.lag:
            function.lag = lag
        elif len(function.running) <= FEW:
            function.lag += LAG_DRIFT * (lag - function.lag)
        function.exec_time = attempts.average(function.exec_time, took)
        weight = TYPICAL_WEIGHT if function.finished >= SEEN else attempts.EWMA_WEIGHT
        function.typical += weight * (min(took, STUCK_S) - function.typical)
        if span >= STUCK_S and function.stuck:
            function.stuck -= 1
        if function.finished >= SEEN:
            self._set(function)

    def has_room(self, now: float, function: Function) -> bool:
        """Whether one more of its containers may be filled. If not, that is looked at again soon."""
        if len(function.running) < function.crowd:
            return True
        if not function.crowd_timer:
            function.crowd_timer = True
            self._dispatch._at(now + STUCK_S, self._look, function, 0)
        return False

    def _set(self, function: Function) -> None:
        if function.options.concurrency == 1 and not function.options.single_use:
            function.crowd = max(FEW, ceil(CROWD_RATE * (function.typical + function.lag))) + function.stuck

    def _look(self, now: float, function: Function, _: int, out: Instructions) -> None:
        """Some waited for room: those that run for long meanwhile make place for others."""
        function.crowd_timer = False
        function.stuck = 0
        for since in function.running.values():  # the oldest first
            if now - since < STUCK_S:
                break
            function.stuck += 1
        self._set(function)
        self._dispatch._pump(now, function, out)
