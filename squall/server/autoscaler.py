"""BRAIN: how many containers a function should have, and which of its idle ones should stop.

`decide` is a pure function of one function's `Demand`, its options and the time; it keeps nothing, so that it can be
asked at any moment and as often as wished. It starts nothing itself: whether there is room is the scheduler's matter,
and a container that stops does so through `Dispatch.drain`, which loses no input that arrived meanwhile.

Up, at once: a slot for each waiting or running input, so from zero at the first input; plus `buffer_containers` while
anything is going on; within `min_containers` and `max_containers`. Of a function that has told nothing yet a few
containers start first, as a flood of tiny inputs needs no more; the others follow within PROBE_S at the latest. A
container that is still draining counts against `max_containers`. Two brakes: what a new container would earn must be
more than what its start costs (`_useful`), and a function whose containers die at the start gets one at a time, after
the delay that dispatch imposed.

Down: a container idle for `scaledown_window`, longest idle first, never below what the rule above asks for.

Tested in `tests/unit/test_autoscaler.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from squall.server.demand import Demand
from squall.server.inputs import FunctionOptions

CONTAINER_LIMIT = 4_000
"""Of one function, whatever its options say."""
COLD_START = 0.1
"""Seconds until a new container works, as long as none was measured."""
START_CPU = 0.02
"""Seconds of CPU a start takes. Inputs shorter than this are tiny."""
TINY_SHARE = 1.0
"""Seconds of tiny inputs that must be waiting for each container, so that one more pays."""
TINY_RATE = 5_000.0
"""Tiny inputs a second above which more containers only share the same CPUs and the server's time."""
FIRST_STARTS = 6
"""Containers as long as it may still turn out that the inputs are tiny and these few are enough."""
PROBE_S = 0.25
"""Seconds from the first start that the others wait for it at most: a cold start without a zygote."""
PROBE_RUN_S = 0.03
"""Seconds that the first input has been running after which it is not tiny."""
EAGER_STARTS = 32
"""Containers under way at once after that, as long as no input has told how long one takes."""


@dataclass(frozen=True, slots=True)
class Decision:
    """`target` containers in all (ready and starting), hence `start` new ones and the end of those in `stop`."""

    target: int
    start: int
    stop: tuple[str, ...]
    reason: str
    again: float = 0.0
    """Seconds after which to ask again, whatever happens; 0: no need."""


def decide(now: float, demand: Demand, options: FunctionOptions) -> Decision:
    """What to do about one function now."""
    alive = demand.ready + demand.starting
    if demand.closed:
        return Decision(0, 0, (), "the function was stopped")
    wanted, reason = _wanted(demand, options, alive)
    start, brake = _start(now, demand, options, wanted - alive)
    again = 0.0
    first = max(FIRST_STARTS, options.min_containers)
    if not options.single_use and wanted > first and (probing := _probing(now, demand)) > 0:
        start, again = max(0, min(start, first - alive)), probing
        brake += f"; no more than {first} until one has shown how long an input takes"
    if start or again:
        return Decision(alive + start, start, (), f"{reason}{brake}", again)
    stop, why = _stop(now, demand, options, alive, wanted)
    return Decision(alive - len(stop), 0, stop, why or f"{reason}{brake}")


def _wanted(demand: Demand, options: FunctionOptions, alive: int) -> tuple[int, str]:
    """Containers the load asks for, before the limits on starting them."""
    together = demand.backlog - demand.alone + demand.running
    needed = demand.alone + ceil(together / demand.slots)
    reason = f"{demand.backlog} inputs waiting, {demand.running} running, {demand.slots} a container"
    # Where each input has a container of its own, a start is the price of the input and not of going faster.
    useful = CONTAINER_LIMIT if options.single_use else _useful(demand, alive)
    if needed > useful:
        needed = useful
        reason += "; more containers would start for longer than the wait is"
    is_active = demand.backlog or demand.running or demand.waiting
    if options.buffer_containers and is_active:
        needed += options.buffer_containers
        reason += f", {options.buffer_containers} in reserve"
    if needed < options.min_containers:
        needed, reason = options.min_containers, f"min_containers={options.min_containers}"
    limit = options.max_containers or CONTAINER_LIMIT
    if needed > limit:
        needed, reason = limit, f"{reason}; at most max_containers={limit}"
    return needed, reason


def _useful(demand: Demand, alive: int) -> int:
    """Containers up to which one more pays: each has at least its own cold start's worth of waiting work to do.

    Tiny inputs need more: they are limited by the machine and by the server, not by slots, and what they were
    measured to take is mostly waiting for a CPU. How long inputs take is at least as long as none has ended.
    """
    if demand.exec_time is None or not demand.backlog:
        return CONTAINER_LIMIT
    if alive > demand.crowd:
        return demand.crowd
    exec_time = max(demand.exec_time, 1e-6)
    if demand.stalled_for >= START_CPU:  # less says nothing: the server, too, may have waited for a processor
        exec_time = max(exec_time, demand.stalled_for)
    share = max(demand.cold_start or COLD_START, 1e-3)
    if exec_time < START_CPU:
        if alive * demand.slots / exec_time >= TINY_RATE:
            return alive
        share = max(share, TINY_SHARE)
    return max(alive, 1, ceil(demand.backlog * exec_time / demand.slots / share))


def _probing(now: float, demand: Demand) -> float:
    """Seconds left in which the first containers may show that inputs are tiny."""
    if demand.exec_time is not None or demand.start_failures:
        return 0.0
    if demand.running:
        return max(0.0, PROBE_RUN_S - demand.stalled_for)
    return PROBE_S if demand.oldest is None else max(0.0, PROBE_S - (now - demand.oldest))


def _start(now: float, demand: Demand, options: FunctionOptions, missing: int) -> tuple[int, str]:
    """How many of the missing containers may start now, and what holds back the rest."""
    limit = options.max_containers or CONTAINER_LIMIT
    room = limit - demand.ready - demand.starting - demand.draining
    if missing <= 0:
        return 0, ""
    if now < demand.blocked_until:
        return 0, f"; none starts for {demand.blocked_until - now:.1f} s, as {demand.blocked_reason}"
    if missing > room:
        missing, brake = max(0, room), f"; {demand.draining} of max_containers={limit} are still ending"
    else:
        brake = ""
    if demand.start_failures and missing:
        return (0 if demand.starting else 1), "; one at a time, as the last start failed"
    if demand.exec_time is None and demand.stalled_for < START_CPU:
        missing = max(0, min(missing, EAGER_STARTS - demand.starting))
    return missing, brake


def _stop(now: float, demand: Demand, options: FunctionOptions, alive: int, wanted: int) -> tuple[tuple[str, ...], str]:
    """Idle containers that should end, longest idle first."""
    limit = options.max_containers or CONTAINER_LIMIT
    over = max(0, alive - limit)
    surplus = alive - wanted
    window = options.scaledown_window
    if not demand.idle or surplus <= 0:
        return (), ""
    aged = sum(1 for _, since in demand.idle if now - since >= window)
    stop = tuple(container_id for container_id, _ in demand.idle[: min(surplus, max(aged, over))])
    if not stop:
        return (), ""
    if len(stop) > aged:
        return stop, f"{over} more than max_containers={limit}"
    return stop, f"idle for longer than scaledown_window={window:g} s"
