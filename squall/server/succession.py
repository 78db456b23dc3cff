"""How one pool takes over the inputs of another: what a new version of a function does to the one before it.

Part of the brain in `dispatch`, which calls it and has the rules; pure state changes, no clock, no I/O. What runs stays
where it runs and is counted there; a call belongs to the pool in which its waiting inputs are. Tested with dispatch.
"""

from __future__ import annotations

from collections.abc import Iterable

from squall.server import lines
from squall.server.inputs import Call, Function, Input


def home_of(call: Call) -> Function:
    """The pool that takes what is to run of a call. A call without waiting inputs learns of successors only here."""
    function = call.function = last_of(call.function)
    return function


def last_of(function: Function) -> Function:
    """The pool at the end of the line: itself where nothing has taken over."""
    while function.successor is not None:
        function = function.successor
    return function


def in_backoff(function: Function, subjects: Iterable[object]) -> list[Input]:
    """Which of the timers' subjects are inputs of the function that wait to be tried again."""
    if not function.waiting:
        return []
    inputs = [subject for subject in subjects if isinstance(subject, Input)]
    return [input_ for input_ in inputs if input_.state == "backoff" and input_.call.function is function]


def move_waiting(old: Function, new: Function, in_backoff: Iterable[Input]) -> None:
    """Put all that waits for a container of `old`, in its order, behind what waits for one of `new`."""
    lines.move(old, new)
    for input_ in old.suspects:
        if input_.state == "queued":
            input_.call.function = new
            new.suspects.append(input_)
    for input_ in in_backoff:
        input_.call.function = new
    new.suspected += old.suspected
    new.waiting += old.waiting
    old.suspected = old.waiting = 0
    new.hurries = new.hurries or old.hurries
    old.suspects.clear()
    new.active_at = max(new.active_at, old.active_at)
