"""Views of what dispatch holds: a function's demand, which the autoscaler decides on, and who could give room.

Pure reading of `inputs`; changes nothing. A view costs the containers of its function, never its inputs.
Tested with dispatch and the autoscaler.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from squall.server.inputs import Function

LAG_SEEN = 16
"""Inputs that must have ended before the way there and back counts."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What the autoscaler decides on: one function at one moment."""

    function_id: str
    backlog: int = 0
    running: int = 0
    waiting: int = 0
    """In backoff: neither backlog nor running yet."""
    alone: int = 0
    """How many of the backlog each need a container without company."""
    ready: int = 0
    starting: int = 0
    draining: int = 0
    headroom: int = 0
    """Free slots of ready containers."""
    slots: int = 1
    """Of one container, as far as they are counted on."""
    idle: tuple[tuple[str, float], ...] = ()
    """(container_id, idle since) of ready containers without an input, longest idle first."""
    exec_time: float | None = None
    """Seconds an input takes with its way there and back, as far as those that ended tell (a moving average)."""
    crowd: int = sys.maxsize
    """More containers than this would not be filled at once, see there."""
    stalled_for: float = 0.0
    """Seconds that something has been running and nothing ended: a lower bound of how long inputs take now."""
    cold_start: float | None = None
    oldest: float | None = None
    """When the first of its containers, of those that are starting or ready, was asked for."""
    active_at: float = 0.0
    blocked_until: float = float("-inf")
    blocked_reason: str = ""
    start_failures: int = 0
    closed: bool = False


def demand_of(function: Function, now: float) -> Demand:
    ready = [c for c in function.containers.values() if c.state == "ready"]
    alive = (c.started_at for c in function.containers.values() if c.state != "draining")
    idle = sorted((c.idle_since, c.container_id) for c in ready if not c.running)
    return Demand(
        function_id=function.function_id,
        backlog=function.queued + function.suspected,
        running=len(function.running),
        waiting=function.waiting,
        alone=function.suspected,
        ready=len(ready),
        starting=len(function.starting),
        draining=len(function.containers) - len(ready) - len(function.starting),
        headroom=sum(max(0, c.open_slots - len(c.running)) for c in ready),
        slots=1 if function.options.single_use else function.options.target or function.options.concurrency,
        idle=tuple((container_id, since) for since, container_id in idle),
        exec_time=_exec_time(function),
        crowd=function.crowd,
        stalled_for=_stalled_for(function, now),
        cold_start=function.cold_start,
        oldest=min(alive, default=None),
        active_at=function.active_at,
        blocked_until=function.blocked_until,
        blocked_reason=function.blocked_reason,
        start_failures=function.start_failures,
        closed=bool(function.closed),
    )


def _exec_time(function: Function) -> float | None:
    """In the first moments what is measured of the way is mostly the server taking in the flood that made it start."""
    if function.exec_time is None or function.finished < LAG_SEEN:
        return function.exec_time
    return function.exec_time + function.lag


def surplus_of(functions: Iterable[Function]) -> Iterator[str]:
    """Ids of idle containers that their functions need not keep."""
    for function in functions:
        containers = function.containers.values()
        alive = sum(1 for container in containers if container.state != "draining")
        idle = [c for c in containers if c.state == "ready" and not c.running]
        idle.sort(key=lambda c: c.idle_since)
        for container in idle[: max(0, alive - function.options.min_containers)]:
            yield container.container_id


def _stalled_for(function: Function, now: float) -> float:
    if not function.running:
        return 0.0
    return now - max(function.finished_at, next(iter(function.running)).pushed_at)
