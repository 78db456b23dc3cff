"""In which order inputs wait for the containers of their function, and how many of them leave at once.

A function's queue is first in, first out. The inputs of one spawned call that follow each other are a single entry of
it, a `Run`: so a call with a million of them is dropped, or handed to another version, in one step. Single inputs, and
all those of `remote` and `map`, are entries themselves. Whoever wants to know what waits asks here.

Part of the brain in `dispatch`, which calls it and has the rules; pure state changes, no clock, no I/O. Events are
O(1), amortised. Tested with dispatch and in `tests/unit/test_lines.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

from squall.server.inputs import Call, Function, Input, Line, Run

E = TypeVar("E", bound=Input | Run)
SHED_ABOVE = 1024
"""Places at the head of a run that are given back together."""


def enter(input_: Input, first: bool = False) -> None:
    """Put an input into the queue of its function: at its end, or in front of all."""
    call = input_.call
    function = call.function
    queue = function.queue
    function.queued += 1
    line = call.line
    if line is None:
        if call.kind != "spawn" or len(call.inputs) < 2:
            (queue.appendleft if first else queue.append)(input_)
            return
        line = call.line = Line(call)
    line.outside.pop(input_.idx, None)
    last = queue[-1] if queue and not first else None
    if last is not None and last.state == "run" and last in line.runs:  # one that was cleared is nobody's any more
        last.inputs.append(input_)
        return
    run = Run(line)
    run.inputs.append(input_)
    line.runs[run] = None
    (queue.appendleft if first else queue.append)(run)


def take(function: Function, room: int) -> list[Input]:
    """Up to `room` inputs from the head of the queue, which they leave."""
    queue = function.queue
    batch: list[Input] = []
    while room > 0 and function.queued:
        entry = queue.popleft()
        if entry.state == "queued":
            function.queued -= 1
            room -= 1
            batch.append(entry)
        elif entry.state == "run":
            taken = _take_of(entry, room)
            function.queued -= len(taken)
            room -= len(taken)
            batch += taken
            if entry.at < len(entry.inputs):
                queue.appendleft(entry)
            else:
                entry.line.runs.pop(entry, None)
    if not function.queued:
        function.ask_at = 1
        queue.clear()
    return batch


def _take_of(run: Run, room: int) -> list[Input]:
    inputs, outside = run.inputs, run.line.outside
    taken: list[Input] = []
    at, end = run.at, len(inputs)
    while room > len(taken) and at < end:
        input_ = inputs[at]
        inputs[at] = None
        at += 1
        if input_ is not None and input_.state == "queued":
            taken.append(input_)
            outside[input_.idx] = input_
    if at >= SHED_ABOVE and 2 * at >= end:
        del inputs[:at]
        at = 0
    run.at = at
    return taken


def first_of(run: Run) -> Input | None:
    """The first that waits in a run, which it leaves; it is counted by the caller. None at the end of the run."""
    found = _take_of(run, 1)
    if found:
        return found[0]
    run.line.runs.pop(run, None)
    return None


def remove(input_: Input) -> None:
    """Take one input out of the queue, wherever it is there; it is counted by the caller."""
    call = input_.call
    if call.line is None:
        call.function.queue.remove(input_)
        return
    for run in call.line.runs:
        try:
            at = run.inputs.index(input_, run.at)
        except ValueError:
            continue
        run.inputs[at] = None  # a hole, as closing the gap would cost the length of what follows
        call.line.outside[input_.idx] = input_
        return
    call.function.queue.remove(input_)  # it was there before the call had a line


def drop(call: Call) -> tuple[dict[int, Input], list[list[Input | None]]]:
    """Take all that waits of a call with a line out of the queue; what is outside stays. Gives back the call's inputs
    as they were, and its runs."""
    line = call.line
    assert line is not None  # asked by the caller
    inputs = call.inputs
    call.inputs = dict(line.outside)
    call.function.queued -= len(inputs) - len(call.inputs)
    return inputs, clear(line)


def clear(line: Line) -> list[list[Input | None]]:
    """Empty its runs, which stay in the queue until their turn comes; what they held."""
    held = []
    for run in line.runs:
        del run.inputs[: run.at]
        held.append(run.inputs)
        run.inputs, run.at = [], 0
    line.runs = {}
    return held


def swept(queue: deque[E], alive: int) -> deque[E]:
    """The queue without inputs that are done, once they are the greater part: amortised O(1) an ended input."""
    if len(queue) < 2 * alive + 64:
        return queue
    return deque(entry for entry in queue if entry.state == "queued" or (isinstance(entry, Run) and entry.inputs))


def waiting(queue: Iterable[Input | Run]) -> Iterator[Input]:
    """What waits, in its order. The queue must not change meanwhile."""
    for entry in queue:
        if entry.state == "queued":
            yield entry
        elif entry.state == "run":
            for input_ in islice(entry.inputs, entry.at, None):
                if input_ is not None and input_.state == "queued":
                    yield input_


def probe(function: Function, ahead: int) -> Input | None:
    """Some input about half of `ahead` places from the head, found without counting; None where that place is empty."""
    queue = function.queue
    if not queue:
        return None
    entry = queue[0]
    if entry.state != "run":
        entry = queue[min(ahead, len(queue)) // 2]
    if entry.state != "run":
        return entry
    left = len(entry.inputs) - entry.at
    return entry.inputs[entry.at + min(ahead, left) // 2] if left else None


def move(old: Function, new: Function) -> None:
    """Put all that is in one queue behind all that is in another, in its order."""
    for entry in old.queue:
        if entry.state == "queued":
            entry.call.function = new
        elif entry.state == "run" and entry.at < len(entry.inputs):
            entry.line.call.function = new
        else:
            continue
        new.queue.append(entry)
    new.queued += old.queued
    old.queued = 0
    old.queue.clear()
