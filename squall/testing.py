"""Public tools for tests: a deterministic simulator of a whole cluster, and checks of the brains' invariants.

`simulate(seed)` runs the brains that run in production (dispatch, autoscaler, scheduler) against a clock, nodes,
containers and callers made up from one seed: random latencies and execution times, outputs that come late, twice or in
another order, containers that die, hang or never start, nodes that are lost or only cut off, callers that cancel or go
away, scale-downs that race with submits. After every event the state must be sound, and at the end every input must
have had exactly one result that some execution really produced. It touches no file, socket, process or real clock;
the same seed gives the same run, to the byte.

    >>> from squall.testing import simulate
    >>> simulate(seed=7).finished > 0
    True

`python -m squall.testing --seeds 1000` runs many; a failing seed prints itself and its last events, and
`python -m squall.testing --seed N` replays it. The contract is tested in `tests/unit/test_simulation.py`.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any

from squall.server import dispatch as brain
from squall.server import lines
from squall.server.autoscaler import decide
from squall.server.dispatch import Dispatch
from squall.server.inputs import (
    BackoffChanged,
    Call,
    CancelRunning,
    Container,
    DemandChanged,
    Dropped,
    Fault,
    Finish,
    Function,
    FunctionOptions,
    Input,
    Instructions,
    KillContainer,
    Notice,
    Push,
    StopContainer,
)
from squall.server.scheduler import Node, Placement, Refusal, Request, Scheduler

CROWD_RETRIES = 1
BYSTANDER_RETRIES = brain.INFRA_RETRIES // 2 + 1
STARVED_AFTER = 180.0
"""Simulated seconds within which a function without any container gets one, whatever the others ask for."""
SETTLED_WITHIN = 7200.0
"""Simulated seconds after the last fault within which everything must have ended."""


class InvariantError(AssertionError):
    """A brain broke one of its rules; the message says which, and from a simulation also the seed that shows it."""


def require(condition: object, rule: str, *facts: object) -> None:
    """Raise InvariantError naming the rule and the facts unless the condition holds."""
    if not condition:
        raise InvariantError(rule + "".join(f"; {fact!r}" for fact in facts))


# ---- invariants of one moment -----------------------------------------------------------------------------------


def check_dispatch(dispatch: Dispatch) -> None:
    """Raise InvariantError when the state of dispatch contradicts its rules. Costs O(everything it holds)."""
    for call in dispatch.calls.values():
        for idx, input_ in call.inputs.items():
            require(input_.idx == idx and input_.call is call, "a call holds its own inputs", input_)
            require(input_.state != "done", "a call holds no input that is done", input_)
        require(call.inputs or not call.last, "a call that has ended is forgotten", call.call_id)
        _check_line(call)
    by_function: dict[Function, list[Input]] = {}
    for call in dispatch.calls.values():
        for input_ in call.inputs.values():
            where = call.function if input_.container is None else input_.container.function
            by_function.setdefault(where, []).append(input_)
        waiting = any(input_.container is None for input_ in call.inputs.values())
        require(not waiting or call.function.successor is None, "what waits moves to the successor", call.call_id)
    for input_ in dispatch.adoption.stand_ins():
        require(input_.state == "running", "a stand-in runs", input_)
        by_function.setdefault(input_.call.function, []).append(input_)
    for function in dispatch.functions.values():
        _check_function(function, by_function.get(function, []))
    for container_id, container in dispatch.containers.items():
        known = container.function.containers.get(container_id)
        require(known is container, "a container belongs to its function", container)


def _check_line(call: Call) -> None:
    if call.line is None:
        return
    in_runs = [one.idx for run in call.line.runs for one in lines.waiting([run])]
    outside = call.line.outside
    require(len(in_runs) == len(set(in_runs)), "an input is in one run", call.call_id)
    require(not set(in_runs) & set(outside), "what is in a run is not outside", call.call_id)
    require({*in_runs, *outside} == set(call.inputs), "a line knows where each input is", call.call_id)


def _check_function(function: Function, inputs: list[Input]) -> None:
    states = Counter(input_.state for input_ in inputs)
    queued = list(lines.waiting(function.queue))
    suspects = [input_ for input_ in function.suspects if input_.state == "queued"]
    name = function.function_id
    if function.closed:
        require(not function.pending() or function.ending, "a function that was stopped has nothing waiting", name)
        require(function.containers or function.ending, "and is forgotten with its last container", name)
    require(function.queued == len(queued), "`queued` counts the queue", name, function.queued, len(queued))
    require(function.suspected == len(suspects), "`suspected` counts the suspects", name)
    require(states["queued"] == len(queued) + len(suspects), "what is queued is in a queue once", name, states)
    require(function.waiting == states["backoff"], "`waiting` counts backoffs", name)
    require(set(function.running) == {i for i in inputs if i.state == "running"}, "running is in `running`", name)
    if function.queued and function.free:
        require(len(function.running) >= function.crowd, "nothing waits while a slot is free", name)
        require(function.crowd_timer, "what is held back is looked at again", name)
    is_patient = all(input_.call.kind == "spawn" for input_ in (*queued, *suspects))
    require(function.hurries or is_patient, "`hurries` says that a caller waits", name)
    running: list[Input] = []
    for container in function.containers.values():
        _check_container(container)
        running += container.running
    require(len(running) == len(function.running), "what runs runs in one container", name)
    if function.running and function.options.timeout > 0:
        require(function.timeout_timer, "what runs has a timeout", name)
    began = list(function.running.values())
    require(began == sorted(began), "`running` is in the order of its deadlines", name)


def _check_container(container: Container) -> None:
    function = container.function
    for input_ in container.running:
        require(input_.container is container and input_.state == "running", "a lease has two ends", input_)
    require(len(container.running) <= container.slots, "a container holds no more inputs than slots", container)
    if any(input_.alone for input_ in container.running):
        require(len(container.running) == 1, "a suspect runs alone", container)
    if container.state != "ready":
        require(container not in function.free and not container.open_slots, "only ready ones are filled", container)
    if container.state == "starting":
        require(not container.running, "a container holds nothing before it is ready", container)
    if container.state == "draining" and not container.running:
        require(container.stop_asked, "a drained container is stopped", container)
    has_room = container.state == "ready" and len(container.running) < container.open_slots
    expected = has_room and function.reserved is not container
    require((container in function.free) == expected, "`free` holds those with room", container)


def check_scheduler(scheduler: Scheduler) -> None:
    """Raise InvariantError when a node is overbooked."""
    for node in scheduler.nodes.values():
        require(0 <= node.free_millicpu <= node.millicpu, "CPUs are not overbooked", node.node_id)
        require(0 <= node.free_memory <= node.memory_mib, "memory is not overbooked", node.node_id)
        require(0 <= node.starting <= scheduler.starts_per_node, "starts are bounded", node.node_id, node.starting)
        require(node.starting <= node.containers, "what starts is on the node", node.node_id)


# ---- the simulated world ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nature:
    """What a simulated function's code does: the odds of an input's fate at each attempt."""

    duration: float = 0.1
    """Mean seconds, exponentially distributed."""
    error: float = 0.0
    crash: float = 0.0
    """Takes its container with it."""
    hang: float = 0.0
    deaf: float = 0.0
    """Odds that it does not answer a cancellation."""
    poison: float = 0.0
    """Odds that an input crashes its container whenever it runs."""
    start_time: float = 0.05
    start_crash: float = 0.0
    start_hang: float = 0.0
    init_error: float = 0.0


@dataclass(frozen=True)
class Scenario:
    """A world to simulate. `draw` makes one up; build your own to ask a particular question."""

    functions: tuple[tuple[FunctionOptions, Nature, Request], ...]
    nodes: tuple[tuple[float, int], ...] = ((4.0, 8192),)
    """CPUs and MiB of each."""
    calls: int = 20
    call_size: int = 20
    """Inputs of a call, at most."""
    duration: float = 20.0
    """Seconds in which calls come and faults happen."""
    latency: float = 0.002
    duplicates: float = 0.0
    """Odds that a message arrives twice."""
    faults: int = 0
    """How many things go wrong from outside: containers killed, nodes lost, drains, cancels, callers gone."""

    @classmethod
    def draw(cls, seed: int) -> Scenario:
        """The scenario of a seed."""
        rng = random.Random(f"scenario {seed}")
        functions = tuple(_draw_function(rng) for _ in range(rng.randint(1, 3)))
        return cls(
            functions,
            nodes=tuple((rng.choice((2.0, 4.0, 16.0)), 4096) for _ in range(rng.randint(1, 3))),
            calls=rng.randint(1, 16),
            call_size=rng.choice((1, 4, 30)),
            duration=rng.choice((1.0, 10.0, 40.0)),
            latency=rng.choice((0.0002, 0.005, 0.2)),
            duplicates=rng.choice((0.0, 0.0, 0.2)),
            faults=rng.choice((0, 3, 12, 40)),
        )


def _draw_function(rng: random.Random) -> tuple[FunctionOptions, Nature, Request]:
    most = rng.choice((0, 0, 1, 2, 5))
    options = FunctionOptions(
        timeout=rng.choice((2.0, 10.0, 60.0)),
        startup_timeout=rng.choice((3.0, 20.0)),
        max_retries=rng.choice((0, 0, 1, 3)),
        backoff_coefficient=rng.choice((1.0, 2.0)),
        initial_delay=rng.choice((0.0, 1.0)),
        max_delay=10.0,
        min_containers=rng.choice((0, 0, 0, 1)),
        max_containers=most,
        buffer_containers=rng.choice((0, 0, 1)),
        scaledown_window=rng.choice((0.5, 2.0, 10.0)),
        single_use=rng.random() < 0.15,
        concurrency=rng.choice((1, 1, 3, 10)),
        is_generator=rng.random() < 0.2,
        max_pending=rng.choice((2_000_000, 2_000_000, 40)),
        persists=rng.random() < 0.4,
    )
    odds = (0.0, 0.0, 0.0, 0.1)
    nature = Nature(
        duration=rng.choice((0.0005, 0.05, 1.0)),
        error=rng.choice(odds),
        crash=rng.choice(odds) / 3,
        hang=rng.choice(odds) / 5,
        deaf=rng.choice((0.0, 0.5)),
        poison=rng.choice(odds),
        start_time=rng.choice((0.01, 0.3)),
        start_crash=rng.choice((0.0, 0.0, 0.2, 1.0 if rng.random() < 0.2 else 0.0)),
        start_hang=rng.choice((0.0, 0.0, 0.0, 0.1)),
        init_error=rng.choice((0.0, 0.0, 0.0, 0.1, 1.0 if rng.random() < 0.2 else 0.0)),
    )
    return options, nature, Request(cpu=rng.choice((0.125, 0.5)), memory_mib=128)


@dataclass(slots=True)
class Record:
    """What really happened to one input, kept apart from what the brain believes."""

    call_id: str
    idx: int
    function: int
    poison: bool
    pushes: int = 0
    attempts: set[int] = field(default_factory=set)
    answers: set[tuple[int, str]] = field(default_factory=set)
    """(attempt, status) that an execution sent."""
    executions: int = 0
    hung: bool = False
    hurt: bool = False
    """A container died or was killed while it was there."""
    yielded: bool = False
    cancelled: bool = False
    status: str = ""
    finished_at: float = 0.0


@dataclass(slots=True, repr=False)
class _Machine:
    """A simulated container's real state."""

    container_id: str
    function: int
    node_id: str
    is_alive: bool = True
    is_cut_off: bool = False
    was_stopped: bool = False
    running: dict[tuple[str, int], int] = field(default_factory=dict)
    given: list[tuple[str, int]] = field(default_factory=list)

    def __repr__(self) -> str:
        return self.container_id


@dataclass(frozen=True)
class Summary:
    """What a simulation came to."""

    seed: int
    finished: int
    statuses: dict[str, int]
    executions: int
    containers: int
    events: int
    stale_outputs: int
    seconds: float
    """Simulated."""
    latencies: tuple[float, ...]
    """Of the inputs, from submit to finish, sorted."""


class Simulation:
    """One run of one seed. `run` it once; afterwards `dispatch`, `scheduler` and `records` may be looked at."""

    def __init__(self, seed: int, scenario: Scenario | None = None, check_every: int = 1) -> None:
        self.seed = seed
        self.scenario = scenario or Scenario.draw(seed)
        self.check_every = check_every
        self.rng = random.Random(seed)
        self.now = 1000.0
        self.dispatch = Dispatch()
        self.dispatch.endings.step = self.rng.choice((2, 1000))
        self.scheduler = Scheduler()
        self.records: dict[tuple[str, int], Record] = {}
        self.machines: dict[str, _Machine] = {}
        self.made = 0
        self.events = 0
        self.unfinished = 0
        self.story: deque[tuple[float, str, tuple[Any, ...]]] = deque(maxlen=60)
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._seq = itertools.count()
        self._calls: list[tuple[str, int, str]] = []
        self._submitted_at: dict[tuple[str, int], float] = {}
        self._closed: set[int] = set()
        self._orphans: set[str] = set()
        """Calls of which no more comes: their caller is gone, or the journal refuses it as they were cancelled."""
        self._starved: dict[int, float] = {}
        self._versions: dict[int, int] = {}
        """Of each function: how often it was superseded."""
        self._node_number = 0
        self._wake_at = float("inf")
        self._quiet_at = self.now + self.scenario.duration

    # ---- the loop -----------------------------------------------------------------------------------------------

    def run(self) -> Summary:
        """Run to the end. Raises InvariantError, naming the seed and the last events, when a rule was broken."""
        try:
            self._begin()
            while self._queue and not self._is_settled():
                self.now, _, action, arguments = heappop(self._queue)
                self.story.append((self.now, action.__name__, arguments))
                self.events += 1
                action(*arguments)
                if self.events % self.check_every == 0:
                    self._check()
                if self.now > self._quiet_at + SETTLED_WITHIN:
                    require(False, "everything ends", self._left())
            self._check()
            self._check_end()
        except Exception as error:
            raise InvariantError(f"seed {self.seed}: {type(error).__name__}: {error}\n{self.tell()}") from error
        return self._summary()

    def tell(self) -> str:
        """The last events, for people."""
        lines = [f"{at - 1000:10.4f}  {name.strip('_')} {arguments}" for at, name, arguments in self.story]
        return "\n".join(["the last events:", *lines, f"replay: python -m squall.testing --seed {self.seed}"])

    def _at(self, delay: float, action: Callable[..., None], *arguments: Any) -> None:
        heappush(self._queue, (self.now + delay, next(self._seq), action, arguments))

    def _lag(self) -> float:
        return self.rng.expovariate(1 / self.scenario.latency)

    def _begin(self) -> None:
        rng, scenario = self.rng, self.scenario
        for cpus, memory_mib in scenario.nodes:
            self._join(cpus, memory_mib)
        for number, (options, _, _) in enumerate(scenario.functions):
            self._carry_out(self.dispatch.add_function(self.now, self._pool(number), options))
        for number in range(scenario.calls):
            self._at(rng.uniform(0, scenario.duration), self._submit, number)
        faults = (
            self._kill_some,
            self._lose_some_node,
            self._drain_some,
            self._cancel_some,
            self._lose_some_caller,
            self._repeat_some,
            self._update_some,
            self._close_some,
            self._supersede_some,
            self._mend_some,
        )
        for fault in rng.choices(faults, weights=(8, 2, 6, 8, 3, 4, 2, 0.5, 2, 1), k=scenario.faults):
            self._at(rng.uniform(0, scenario.duration), fault)
        self._at(0, self._round)

    def _is_settled(self) -> bool:
        if self.unfinished or self.now <= self._quiet_at:
            return False
        return not any(self._alive(number) > self._least(number) for number in range(len(self.scenario.functions)))

    def _least(self, number: int) -> int:
        """Containers that may stay for ever."""
        options = self.scenario.functions[number][0]
        return 0 if number in self._closed else options.min_containers

    def _alive(self, number: int) -> int:
        function = self.dispatch.functions.get(self._pool(number))
        return len(function.containers) if function is not None else 0

    def _pool(self, number: int) -> str:
        """The id of the version of a function that takes inputs."""
        return f"fu-{number}.{self._versions.get(number, 0)}"

    def _wake(self) -> None:
        """The hand's timer."""
        self._wake_at = float("inf")
        self._carry_out(self.dispatch.tick(self.now))

    def _round(self) -> None:
        """The hand's periodic look at all functions."""
        for function_id in list(self.dispatch.functions):
            self._scale(function_id)
        self._at(1.0, self._round)

    # ---- the hand -----------------------------------------------------------------------------------------------

    def _carry_out(self, instructions: Instructions) -> None:
        for instruction in instructions:
            if isinstance(instruction, KillContainer):
                for key in self.machines[instruction.container_id].given:
                    self.records[key].hurt = True
        for instruction in instructions:
            match instruction:
                case Push():
                    self._push(instruction)
                case Finish():
                    self._finish(instruction)
                case Dropped():
                    self._drop(instruction)
                case CancelRunning():
                    self._at(self._lag(), self._hear_cancel, instruction.container_id, _key(instruction.input))
                case KillContainer():
                    self._at(self._lag(), self._die, instruction.container_id, "was killed", "infra")
                case StopContainer():
                    self._stop(instruction)
                case DemandChanged():
                    self._scale(instruction.function_id)
                case Notice():
                    require(instruction.message, "a notice says something")
                case BackoffChanged():
                    options = self.dispatch.functions[instruction.function_id].options
                    require(options.persists, "only what persists is written down", instruction.function_id)
        deadline = self.dispatch.next_deadline()
        if deadline is not None and deadline < self._wake_at:
            self._wake_at = deadline
            self._at(max(0.0, deadline - self.now), self._wake)

    def _push(self, push: Push) -> None:
        machine = self.machines[push.container_id]
        require(not machine.was_stopped, "a stopped container gets nothing", push.container_id)
        for input_ in push.inputs:
            record = self.records[_key(input_)]
            record.pushes += 1
            require(input_.attempt not in record.attempts, "an attempt is pushed once", input_)
            record.attempts.add(input_.attempt)
            machine.given.append(_key(input_))
            require(not record.status, "what is done is not pushed", input_)
            require(not record.yielded, "a generator that has yielded is not tried again", input_)
            require(record.pushes <= self._allowed(record), "attempts stay within their budget", input_)
            self._at(self._lag(), self._execute, machine, _key(input_), input_.attempt)

    def _allowed(self, record: Record) -> int:
        options = self.scenario.functions[record.function][0]
        tries = 1 + max(brain.CRASH_RETRIES, options.max_retries)
        return tries + brain.INFRA_RETRIES + CROWD_RETRIES + BYSTANDER_RETRIES

    def _finish(self, finish: Finish) -> None:
        record = self.records[_key(finish.input)]
        require(not record.status, "an input is finished once", finish.input, record.status, finish.status)
        record.status = finish.status
        record.finished_at = self.now
        self.unfinished -= 1
        if finish.status in ("ok", "error"):
            require(finish.output == (finish.input.attempt, finish.status), "a result is its attempt's", finish.input)
            require(finish.output in record.answers, "a result was really sent", finish.input)
            require(record.executions >= 1, "a result comes from an execution", finish.input)
        elif finish.status == "cancelled":
            require(record.cancelled, "only what someone cancelled is cancelled", finish.input)
        elif finish.status == "timeout":
            require(record.hung or self._is_slow(record), "only slow attempts time out", finish.input)
        elif finish.status == "lost":
            require(record.hurt and finish.message, "only what a container died under is lost", finish.input)
        else:
            require(finish.message, "a refusal has a reason", finish.status)
            waits = self.scenario.functions[record.function][0].persists and finish.input.call.kind == "spawn"
            require(finish.status != "init_error" or not waits, "what is spawned waits for a start", finish.input)

    def _drop(self, dropped: Dropped) -> None:
        self._orphans.add(dropped.call.call_id)
        keys = [(dropped.call.call_id, idx) for idx in dropped.inputs if idx not in dropped.spared]
        require(len(keys) == dropped.count and dropped.message, "what is dropped is counted", keys, dropped.count)
        for key in keys:
            record = self.records[key]
            require(not record.status and record.cancelled, "what someone cancelled is dropped, once", key)
            record.status, record.finished_at = "cancelled", self.now
            self.unfinished -= 1

    def _is_slow(self, record: Record) -> bool:
        # A delayed push or answer counts as execution time: the server cannot tell.
        options, nature, _ = self.scenario.functions[record.function]
        return (nature.duration + 2 * self.scenario.latency) * 25 > min(options.timeout, 2.0) or record.hurt

    def _stop(self, stop: StopContainer) -> None:
        machine = self.machines[stop.container_id]
        machine.was_stopped = True
        require(stop.reason, "a stop has a reason", stop.container_id)
        delay = self._lag() + self.rng.choice((0.0, 0.05, 5.0))
        self._at(delay, self._die, stop.container_id, "stopped", "infra")

    def _scale(self, function_id: str) -> None:
        if function_id not in self.dispatch.functions:
            return
        number = _number_of(function_id)
        function = self.dispatch.functions[function_id]
        decision = decide(self.now, self.dispatch.demand(self.now, function_id), function.options)
        require(decision.reason, "a decision has a reason", function_id)
        for container_id in decision.stop:
            self._at(self._lag(), self._drain, container_id)
        self.scheduler.want(self.now, function_id, decision.start, self.scenario.functions[number][2])
        plan = self.scheduler.plan(self.now, self._new_container_ids(), self.dispatch.surplus)
        for grant in plan.grants:
            self._start(grant.function_id, grant.placement)
        for refused, refusal in plan.refusals.items():
            require(refusal.reason and not refusal.permanent, "a refusal says why", refused, refusal)
        for reclaim in plan.reclaims:
            require(reclaim.container_id in self.dispatch.containers, "what is reclaimed is there", reclaim)
            self._at(self._lag(), self._drain, reclaim.container_id)
        self._watch_starvation(plan.refusals)

    def _new_container_ids(self) -> Iterator[str]:
        while True:
            self.made += 1
            yield f"co-{self.made}"

    def _watch_starvation(self, refusals: dict[str, Refusal]) -> None:
        for number in range(len(self.scenario.functions)):
            refused = self._pool(number) in refusals and not self._alive(number) and self.scheduler.nodes
            if not refused:
                self._starved.pop(number, None)
                continue
            since = self._starved.setdefault(number, self.now)
            require(self.now - since < STARVED_AFTER, "no function starves", number, refusals)

    def _start(self, function_id: str, placement: Placement) -> None:
        number = _number_of(function_id)
        machine = _Machine(placement.container_id, number, placement.node_id)
        self.machines[placement.container_id] = machine
        options = self.dispatch.functions[function_id].options
        self._carry_out(self.dispatch.container_starting(self.now, placement.container_id, function_id))
        if options.max_containers and options is self.scenario.functions[number][0]:
            require(self._alive(number) <= options.max_containers, "max_containers holds", function_id)
        nature = self.scenario.functions[number][1]
        self._at(self._lag() + self.rng.expovariate(1 / nature.start_time), self._stand, machine)

    def _drain(self, container_id: str) -> None:
        self._carry_out(self.dispatch.drain(self.now, container_id, "not needed"))

    # ---- containers and their code ------------------------------------------------------------------------------

    def _stand(self, machine: _Machine) -> None:
        nature = self.scenario.functions[machine.function][1]
        if not machine.is_alive:
            return
        fate = self.rng.random()
        options = self.scenario.functions[machine.function][0]
        if options.persists and self.now > self._quiet_at:
            fate = 9.0  # what it failed of is put right in the end
        if fate < nature.start_crash:
            self._die(machine.container_id, "exited with code 3", "container")
        elif fate < nature.start_crash + nature.init_error:
            self._die(machine.container_id, "failed to import", "container", ImportError.__name__)
        elif fate >= nature.start_crash + nature.init_error + nature.start_hang:
            self._at(self._lag(), self._ready, machine)

    def _ready(self, machine: _Machine) -> None:
        if machine.is_cut_off:
            return
        self.scheduler.started(machine.container_id)
        if machine.is_alive:
            self._carry_out(self.dispatch.container_ready(self.now, machine.container_id))

    def _die(self, container_id: str, reason: str, fault: Fault, init_error: Any = None) -> None:
        """The container is gone now; the server hears of it a little later."""
        machine = self.machines.get(container_id)
        if machine is None or not machine.is_alive:
            return
        machine.is_alive = False
        machine.running.clear()
        if not machine.is_cut_off:
            self._at(self._lag(), self._gone, container_id, reason, fault, init_error)

    def _gone(self, container_id: str, reason: str, fault: Fault, init_error: Any) -> None:
        container = self.dispatch.containers.get(container_id)
        for input_ in container.running if container is not None else ():
            self.records[_key(input_)].hurt = True
        self.scheduler.release(container_id)
        self._carry_out(
            self.dispatch.container_gone(self.now, container_id, reason, fault=fault, init_error=init_error)
        )

    def _execute(self, machine: _Machine, key: tuple[str, int], attempt: int) -> None:
        """The runner got an input."""
        if not machine.is_alive:
            return
        record = self.records[key]
        options, nature, _ = self.scenario.functions[machine.function]
        record.executions += 1
        require(record.executions <= record.pushes, "an attempt is executed at most once", key)
        machine.running[key] = attempt
        spent = self.rng.expovariate(1 / nature.duration)
        if options.is_generator and self.rng.random() < 0.5:
            self._at(self._lag() + spent / 2, self._yield, machine, key, attempt)
        fate = self.rng.random()
        if record.poison or fate < nature.crash:
            self._at(spent, self._die, machine.container_id, "exited with code 3", "container")
        elif fate < nature.crash + nature.hang:
            record.hung = True
        else:
            status = "error" if fate < nature.crash + nature.hang + nature.error else "ok"
            self._at(spent, self._answer, machine, key, attempt, status)

    def _answer(self, machine: _Machine, key: tuple[str, int], attempt: int, status: str) -> None:
        if not machine.is_alive or machine.running.get(key) != attempt:
            return
        del machine.running[key]
        self.records[key].answers.add((attempt, status))
        self._at(self._lag(), self._deliver, machine, key, attempt, status)
        if self.rng.random() < self.scenario.duplicates:
            self._at(self._lag() * 3, self._deliver, machine, key, attempt, status)

    def _deliver(self, machine: _Machine, key: tuple[str, int], attempt: int, status: str) -> None:
        """An output reaches the server, even one whose container is dead or given up by now."""
        self._carry_out(self.dispatch.output(self.now, machine.container_id, *key, status, attempt, (attempt, status)))

    def _yield(self, machine: _Machine, key: tuple[str, int], attempt: int) -> None:
        if machine.is_alive and self.dispatch.yielded(machine.container_id, *key, attempt) is not None:
            self.records[key].yielded = True

    def _hear_cancel(self, container_id: str, key: tuple[str, int]) -> None:
        machine = self.machines[container_id]
        attempt = machine.running.get(key)
        if attempt is not None and self.rng.random() >= self.scenario.functions[machine.function][1].deaf:
            self._answer(machine, key, attempt, "cancelled")

    # ---- callers ------------------------------------------------------------------------------------------------

    def _submit(self, number: int) -> None:
        rng = self.rng
        function = rng.randrange(len(self.scenario.functions))
        call_id = f"fc-{number}"
        owner = f"client-{rng.randrange(3)}"
        kind = rng.choice(("remote", "map", "spawn"))
        self._calls.append((call_id, function, owner))
        size = rng.randint(1, self.scenario.call_size)
        cut = rng.randint(1, size)
        self._send(call_id, function, range(cut), kind, owner, cut == size)
        if cut < size:
            self._at(rng.uniform(0, 1), self._send, call_id, function, range(cut, size), kind, owner, True)

    def _send(self, call_id: str, number: int, idxs: Sequence[int], kind: str, owner: str, last: bool) -> None:
        if call_id in self._orphans:
            return
        poison = self.scenario.functions[number][1].poison
        for idx in idxs:
            if (call_id, idx) not in self.records:
                self.records[call_id, idx] = Record(call_id, idx, number, self.rng.random() < poison)
                self._submitted_at[call_id, idx] = self.now
                self.unfinished += 1
        items = [(idx, None) for idx in idxs]
        self._carry_out(self.dispatch.submit(self.now, call_id, self._pool(number), items, kind, owner, last))

    # ---- faults -------------------------------------------------------------------------------------------------

    def _kill_some(self) -> None:
        alive = [machine.container_id for machine in self.machines.values() if machine.is_alive]
        if alive:
            fault: Fault = self.rng.choice(("infra", "container"))
            self._die(self.rng.choice(alive), "was killed by SIGKILL", fault)

    def _join(self, cpus: float, memory_mib: int) -> None:
        self._node_number += 1
        self.scheduler.add_node(Node(f"no-{self._node_number}", cpus, memory_mib))

    def _lose_some_node(self) -> None:
        """The server gives a node up. Either it is dead, or only cut off: then its containers work on for nothing."""
        if not self.scheduler.nodes:
            return
        node = self.scheduler.nodes[self.rng.choice(sorted(self.scheduler.nodes))]
        is_dead = self.rng.random() < 0.5
        for container_id in self.scheduler.remove_node(node.node_id):
            machine = self.machines[container_id]
            machine.is_cut_off = True
            machine.is_alive = machine.is_alive and not is_dead
            self._gone(container_id, "was on a node that was lost", "infra", None)
        self._at(self.rng.uniform(0, 5), self._join, node.millicpu / 1000, node.memory_mib)

    def _drain_some(self) -> None:
        if self.dispatch.containers:
            self._drain(self.rng.choice(sorted(self.dispatch.containers)))

    def _some_call(self) -> str:
        return self.rng.choice(self._calls)[0] if self._calls else "fc-unknown"

    def _cancel_some(self) -> None:
        call_id = self._some_call()
        known = [record.idx for record in self.records.values() if record.call_id == call_id]
        idxs = None if self.rng.random() < 0.5 else [idx for idx in known if self.rng.random() < 0.5] + [10**9]
        for idx in known if idxs is None else idxs:
            if (call_id, idx) in self.records:
                self.records[call_id, idx].cancelled = True
        terminate = self.rng.random() < 0.3
        self._carry_out(self.dispatch.cancel(self.now, call_id, idxs, "the caller asked", terminate))

    def _lose_some_caller(self) -> None:
        owner = f"client-{self.rng.randrange(3)}"
        for call_id, _, its_owner in self._calls:
            call = self.dispatch.calls.get(call_id)
            if its_owner != owner:
                continue
            self._orphans.add(call_id)
            if call is not None and call.kind != "spawn":
                for idx in call.inputs:
                    self.records[call_id, idx].cancelled = True
        self._carry_out(self.dispatch.owner_gone(self.now, owner, "the caller went away"))

    def _repeat_some(self) -> None:
        """A client that was reconnected sends again what it has no answer for."""
        call_id = self._some_call()
        call = self.dispatch.calls.get(call_id)
        if call is not None:
            idxs = [record.idx for record in self.records.values() if record.call_id == call_id]
            self._send(call_id, _number_of(call.function_id), idxs, call.kind, str(call.owner), call.last)

    def _update_some(self) -> None:
        number = self.rng.randrange(len(self.scenario.functions))
        if number not in self._closed:
            options = self.scenario.functions[number][0]
            self._carry_out(self.dispatch.update_function(self.now, self._pool(number), options))

    def _supersede_some(self) -> None:
        """A new version of a function takes over: no input is lost, or run by both."""
        number = self.rng.randrange(len(self.scenario.functions))
        if number in self._closed:
            return
        old_id = self._pool(number)
        self._versions[number] = self._versions.get(number, 0) + 1
        options = self.scenario.functions[number][0]
        before = [_key(input_) for input_ in _waiting(self.dispatch.functions[old_id])]
        self._carry_out(self.dispatch.add_function(self.now, self._pool(number), options))
        new = self.dispatch.functions[self._pool(number)]
        instructions = self.dispatch.supersede(self.now, old_id, self._pool(number), "a new version")
        ended = {_key(one.input) for one in instructions if isinstance(one, Finish)}
        after = [_key(input_) for input_ in _waiting(new)]
        require(after == [key for key in before if key not in ended], "inputs move in their order", before, after)
        self.scheduler.want(self.now, old_id, 0, Request())
        self._carry_out(instructions)

    def _mend_some(self) -> None:
        """A secret is changed, or so they hope."""
        number = self.rng.randrange(len(self.scenario.functions))
        self._carry_out(self.dispatch.starts.try_again(self.now, self._pool(number)))

    def _close_some(self) -> None:
        number = self.rng.randrange(len(self.scenario.functions))
        self._closed.add(number)
        for record in self.records.values():
            record.cancelled = record.cancelled or record.function == number
        self.scheduler.want(self.now, self._pool(number), 0, Request())
        self._carry_out(self.dispatch.close_function(self.now, self._pool(number), "the app was stopped"))

    # ---- judgement ----------------------------------------------------------------------------------------------

    def _check(self) -> None:
        check_dispatch(self.dispatch)
        check_scheduler(self.scheduler)

    def _left(self) -> list[Record]:
        return [record for record in self.records.values() if not record.status][:3]

    def _check_end(self) -> None:
        require(not self._left(), "no input is lost", self._left())
        for function in self.dispatch.functions.values():
            require(not function.pending() and not function.running, "nothing is left over", function.function_id)
        require(not any(call.inputs for call in self.dispatch.calls.values()), "no call is left over")
        held = sum(node.containers for node in self.scheduler.nodes.values())
        require(held == len(self.dispatch.containers), "reservations end with their containers", held)

    def _summary(self) -> Summary:
        records = self.records.values()
        waits = sorted(record.finished_at - self._submitted_at[key] for key, record in self.records.items())
        return Summary(
            seed=self.seed,
            finished=len(self.records),
            statuses=dict(sorted(Counter(record.status for record in records).items())),
            executions=sum(record.executions for record in records),
            containers=len(self.machines),
            events=self.events,
            stale_outputs=self.dispatch.stale_outputs,
            seconds=self.now - 1000.0,
            latencies=tuple(waits),
        )


def _number_of(function_id: str) -> int:
    return int(function_id[3:].partition(".")[0])


def _waiting(function: Function) -> list[Input]:
    """What is queued, in its order."""
    return [*(one for one in function.suspects if one.state == "queued"), *lines.waiting(function.queue)]


def _key(input_: Input) -> tuple[str, int]:
    return input_.call.call_id, input_.idx


def simulate(seed: int, scenario: Scenario | None = None, check_every: int = 1) -> Summary:
    """Run one seed to its end, in the scenario it draws or in yours, checking all invariants every so many events.

    Raises InvariantError, which names the seed and tells the last events.
    """
    return Simulation(seed, scenario, check_every).run()


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m squall.testing`."""
    parser = argparse.ArgumentParser(prog="python -m squall.testing", description="Simulate clusters from seeds.")
    parser.add_argument("--seed", type=int, help="run this seed and print all its events")
    parser.add_argument("--seeds", type=int, default=1000, help="run so many seeds")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--check-every", type=int, default=1, metavar="N", help="check the invariants every N events")
    options = parser.parse_args(arguments)
    if options.seed is not None:
        return _replay(options.seed)
    began = time.perf_counter()
    totals: Counter[str] = Counter()
    for seed in range(options.first, options.first + options.seeds):
        try:
            summary = simulate(seed, check_every=options.check_every)
        except InvariantError as error:
            print(error, file=sys.stderr)
            return 1
        totals.update(summary.statuses)
        totals["executions"] += summary.executions
        totals["events"] += summary.events
    spent = time.perf_counter() - began
    print(f"{options.seeds} seeds in {spent:.1f} s: " + ", ".join(f"{n} {name}" for name, n in sorted(totals.items())))
    return 0


def _replay(seed: int) -> int:
    simulation = Simulation(seed)
    simulation.story = deque()
    try:
        summary = simulation.run()
    except InvariantError as error:
        print(error)
        return 1
    print(simulation.tell())
    print(f"{simulation.scenario}\n{summary.finished} inputs: {summary.statuses}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
