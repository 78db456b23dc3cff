"""Dispatch under any order of events that hypothesis can think of, its invariants checked after each of them."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from squall.server import lines
from squall.server.dispatch import Dispatch
from squall.server.inputs import Dropped, Finish, FunctionOptions, Instructions, Push
from squall.testing import check_dispatch

OPTIONS = st.builds(
    FunctionOptions,
    timeout=st.sampled_from((0.0, 3.0, 30.0)),
    startup_timeout=st.sampled_from((0.0, 5.0)),
    max_retries=st.integers(0, 2),
    initial_delay=st.sampled_from((0.0, 1.0)),
    single_use=st.booleans(),
    concurrency=st.integers(1, 3),
    max_pending=st.sampled_from((3, 1000)),
)
CALLS = st.sampled_from(("fc-1", "fc-2", "fc-3"))
CONTAINERS = st.sampled_from([f"co-{number}" for number in range(6)])
FUNCTIONS = st.sampled_from(("fu-1", "fu-2", "fu-3"))
OWNERS = st.sampled_from(("client-1", None))
STATUSES = st.sampled_from(("ok", "ok", "error", "timeout", "cancelled", "nonsense"))
IDXS = st.lists(st.integers(0, 6), max_size=7)


class DispatchMachine(RuleBasedStateMachine):
    """Events come in any order, sensible or not: hands are late, containers lie, ids repeat."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.dispatch = Dispatch()
        self.dispatch.endings.step = 2  # what ends some at a time does so here too
        self.done: set[int] = set()
        self.seen: list[Any] = []  # keeps inputs alive, so that their ids stay theirs
        self.pushed: set[tuple[int, int]] = set()

    def do(self, instructions: Instructions) -> None:
        for instruction in instructions:
            if isinstance(instruction, Finish):
                assert id(instruction.input) not in self.done, "finished twice"
                assert instruction.input.state == "done"
                self.done.add(id(instruction.input))
                self.seen.append(instruction.input)
            elif isinstance(instruction, Dropped):
                mine = [one for idx, one in instruction.inputs.items() if idx not in instruction.spared]
                assert len(mine) == instruction.count and not {id(one) for one in mine} & self.done, "finished twice"
                assert sum(one in mine for run in instruction.runs for one in run if one is not None) == len(mine)
                self.done.update(id(one) for one in mine)
                self.seen += mine
            elif isinstance(instruction, Push):
                for input_ in instruction.inputs:
                    assert id(input_) not in self.done, "what has ended is run"
                    assert (id(input_), input_.attempt) not in self.pushed, "an attempt was pushed twice"
                    self.pushed.add((id(input_), input_.attempt))
                    self.seen.append(input_)

    @initialize(first=OPTIONS, second=OPTIONS)
    def add_functions(self, first: FunctionOptions, second: FunctionOptions) -> None:
        self.do(self.dispatch.add_function(self.now, "fu-1", first))
        self.do(self.dispatch.add_function(self.now, "fu-2", second))

    @rule(call=CALLS, function=FUNCTIONS, idxs=IDXS, owner=OWNERS, last=st.booleans(), spawn=st.booleans())
    def submit(self, call: str, function: str, idxs: list[int], owner: str | None, last: bool, spawn: bool) -> None:
        kind = "spawn" if spawn else "map"
        self.do(self.dispatch.submit(self.now, call, function, [(idx, None) for idx in idxs], kind, owner, last))

    @rule(container=CONTAINERS, function=FUNCTIONS)
    def start(self, container: str, function: str) -> None:
        self.do(self.dispatch.container_starting(self.now, container, function))

    @rule(container=CONTAINERS)
    def ready(self, container: str) -> None:
        self.do(self.dispatch.container_ready(self.now, container))

    @rule(container=CONTAINERS, infra=st.booleans(), init_error=st.sampled_from((None, b"packed")))
    def gone(self, container: str, infra: bool, init_error: bytes | None) -> None:
        fault: Any = "infra" if infra else "container"
        self.do(self.dispatch.container_gone(self.now, container, "ended", fault=fault, init_error=init_error))

    @rule(container=CONTAINERS)
    def drain(self, container: str) -> None:
        self.do(self.dispatch.drain(self.now, container, "not needed"))

    @rule(data=st.data(), status=STATUSES)
    def answer(self, data: st.DataObject, status: str) -> None:
        """One or all inputs of a container get their result."""
        busy = [container for container in self.dispatch.containers.values() if container.running]
        if busy:
            container = data.draw(st.sampled_from(busy))
            some = data.draw(st.lists(st.sampled_from(list(container.running)), min_size=1))
            results = [(one.call_id, one.idx, status, one.attempt, "result") for one in some]
            self.do(self.dispatch.outputs(self.now, container.container_id, results))

    @rule(container=CONTAINERS, call=CALLS, idx=st.integers(0, 6), attempt=st.integers(0, 3), status=STATUSES)
    def answer_out_of_place(self, container: str, call: str, idx: int, attempt: int, status: str) -> None:
        self.do(self.dispatch.output(self.now, container, call, idx, status, attempt))
        self.dispatch.yielded(container, call, idx, attempt)

    @rule(call=CALLS, idxs=st.none() | IDXS, terminate=st.booleans())
    def cancel(self, call: str, idxs: list[int] | None, terminate: bool) -> None:
        self.do(self.dispatch.cancel(self.now, call, idxs, "the caller asked", terminate))

    @rule()
    def lose_owner(self) -> None:
        self.do(self.dispatch.owner_gone(self.now, "client-1", "the caller went away"))

    @rule(seconds=st.sampled_from((0.0, 0.4, 1.0, 5.0, 40.0)))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.do(self.dispatch.tick(self.now))

    @rule(function=FUNCTIONS, options=OPTIONS)
    def update(self, function: str, options: FunctionOptions) -> None:
        if function in self.dispatch.functions:
            self.do(self.dispatch.update_function(self.now, function, options))

    @rule(function=FUNCTIONS, again=st.booleans(), options=OPTIONS)
    def close(self, function: str, again: bool, options: FunctionOptions) -> None:
        if again:
            self.do(self.dispatch.close_function(self.now, function, "the app ended"))

    @rule(old=FUNCTIONS, new=FUNCTIONS, options=OPTIONS)
    def supersede(self, old: str, new: str, options: FunctionOptions) -> None:
        if new not in self.dispatch.functions:
            self.do(self.dispatch.add_function(self.now, new, options))
        before = self.waiting(new) + (self.waiting(old) if old != new else [])
        instructions = self.dispatch.supersede(self.now, old, new, "a new version")
        self.do(instructions)
        moved = [one for one in before if one.call.function.function_id == new and one.state == "queued"]
        assert self.waiting(new) == moved, "inputs changed their order"

    def waiting(self, function_id: str) -> list[Any]:
        function = self.dispatch.functions.get(function_id)
        return list(lines.waiting(function.queue)) if function is not None else []

    @rule(function=FUNCTIONS)
    def reject(self, function: str) -> None:
        if function in self.dispatch.functions:
            self.do(self.dispatch.reject_queued(self.now, function, "no node has a GPU"))

    @invariant()
    def state_is_sound(self) -> None:
        check_dispatch(self.dispatch)

    def teardown(self) -> None:
        """Whatever happened: once everything is stopped, nothing is left of it."""
        for function in ("fu-1", "fu-2", "fu-3"):
            self.do(self.dispatch.close_function(self.now, function, "the app ended"))
        for container in list(self.dispatch.containers):
            self.do(self.dispatch.container_gone(self.now, container, "stopped", fault="infra"))
        for number in range(100):
            self.do(self.dispatch.tick(self.now + 1000 + number))
        check_dispatch(self.dispatch)
        assert not self.dispatch.functions and not self.dispatch.containers
        assert not any(call.inputs for call in self.dispatch.calls.values())


TestDispatch = DispatchMachine.TestCase
TestDispatch.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
