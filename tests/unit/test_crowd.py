"""How many containers are filled at once where inputs are tiny, and that nothing waits for that in vain."""

from __future__ import annotations

import random
from typing import Any

import pytest

from squall.server import crowd
from squall.server.autoscaler import decide
from squall.server.crowd import FEW, SEEN, STUCK_S
from squall.server.dispatch import Dispatch
from squall.server.inputs import Finish, FunctionOptions, Instructions, Push
from squall.testing import check_dispatch

FN = "fu-1"
WAY = 0.0002
"""Seconds that an input is under way beside what it takes."""


class House:
    """A function with many containers in which inputs take what `takes` says, in time of its own."""

    def __init__(self, containers: int = 16, takes: float = 0.0001, way: float = WAY, **options: Any) -> None:
        self.now = 0.0
        self.takes, self.way = takes, way
        self.dispatch = Dispatch()
        self.running: list[tuple[float, str, int, int, float]] = []
        self.finished: set[int] = set()
        self.busiest = 0
        self.used: set[str] = set()
        self.do(self.dispatch.add_function(0.0, FN, FunctionOptions(**options)))
        for number in range(containers):
            self.container(f"co-{number}")

    @property
    def function(self) -> Any:
        return self.dispatch.functions[FN]

    def container(self, container_id: str) -> None:
        self.do(self.dispatch.container_starting(self.now, container_id, FN))
        self.do(self.dispatch.container_ready(self.now, container_id))

    def do(self, instructions: Instructions) -> None:
        check_dispatch(self.dispatch)
        for instruction in instructions:
            if isinstance(instruction, Push):
                self.used.add(instruction.container_id)
                for input_ in instruction.inputs:
                    took = input_.payload if input_.payload is not None else self.takes
                    due = self.now + took + self.way
                    self.running.append((due, instruction.container_id, input_.idx, input_.attempt, took))
            elif isinstance(instruction, Finish):
                assert instruction.input.idx not in self.finished
                self.finished.add(instruction.input.idx)
        self.busiest = max(self.busiest, len(self.function.running))

    def submit(self, count: int, first: int = 0, takes: float | None = None, last: bool = True) -> None:
        items = [(idx, takes) for idx in range(first, first + count)]
        self.do(self.dispatch.submit(self.now, "fc-1", FN, items, last=last))

    def step(self) -> None:
        """To the next result or timer."""
        due = min(self.running)[0] if self.running else float("inf")
        deadline = self.dispatch.next_deadline()
        if deadline is not None and deadline < due:
            self.now = deadline
            self.do(self.dispatch.tick(self.now))
            return
        self.running.sort()
        self.now, container_id, idx, attempt, took = self.running.pop(0)
        self.do(self.dispatch.outputs(self.now, container_id, [("fc-1", idx, "ok", attempt, None)], took))

    def run(self, count: int) -> None:
        """Until so many inputs have ended in all."""
        for _ in range(100_000):
            if len(self.finished) >= count:
                return
            self.step()
        raise AssertionError(f"{len(self.finished)} of {count} ended")

    def rest(self) -> None:
        """What is seen from now on."""
        self.busiest, self.used = 0, set()


def test_tiny_inputs_keep_a_few_containers_busy_and_the_others_rest() -> None:
    house = House()
    house.submit(2000)
    assert house.busiest == 16
    house.run(200)
    house.rest()
    house.run(2000)
    assert house.busiest == FEW
    assert len(house.used) <= FEW + 1


def test_inputs_that_take_longer_keep_all_containers_busy() -> None:
    house = House(takes=0.005)
    house.submit(2000)
    house.run(2000)
    assert house.busiest == 16


def test_a_longer_way_there_and_back_needs_more_containers() -> None:
    house = House(way=0.001)
    house.submit(3000)
    house.run(1500)
    house.rest()
    house.run(3000)
    assert FEW < house.busiest < 16


def test_containers_that_rest_take_over_when_inputs_turn_out_long() -> None:
    house = House()
    house.submit(500, last=False)
    house.run(500)
    began = house.now
    house.submit(16, first=500, takes=10.0)
    while house.busiest < 16:
        house.step()
        assert house.now <= began + 5 * STUCK_S
    house.run(516)
    assert house.now < began + 11


def test_containers_that_are_blocked_are_made_up_for() -> None:
    house = House(takes=0.0004)
    house.submit(500, last=False)
    house.run(500)
    blocked_at = house.now
    house.submit(3, first=500, takes=60.0, last=False)
    house.submit(2000, first=503)
    house.run(520)
    house.rest()
    while house.now < blocked_at + STUCK_S:
        assert house.busiest <= FEW
        house.step()
    house.run(2000)
    assert house.busiest == FEW + 3
    house.run(2503)


def test_a_container_that_becomes_ready_while_others_are_blocked_is_filled_soon() -> None:
    house = House(containers=FEW)
    house.submit(500, last=False)
    house.run(500)
    house.submit(20, first=500, takes=10.0)
    began = house.now
    house.container("co-late")
    while "co-late" not in house.used:
        house.step()
    assert house.now <= began + 2 * STUCK_S


@pytest.mark.parametrize("options", [{"concurrency": 4}, {"single_use": True}])
def test_containers_with_several_slots_or_one_use_are_all_filled(options: dict[str, Any]) -> None:
    house = House(containers=60, **options)
    house.submit(60)
    house.run(60)
    for number in range(60, 160):
        house.container(f"co-{number}")
    house.rest()
    house.submit(400, first=60, last=False)
    assert house.busiest == (400 if "concurrency" in options else 100)


@pytest.mark.parametrize("told", [-1.0, 1e9, float("nan"), float("inf")])
def test_what_a_runner_says_is_not_believed_beyond_what_was_measured(told: float) -> None:
    function = House().function
    brain = Dispatch().crowd
    for _ in range(2 * SEEN):
        function.finished += 1
        brain.note(function, 0.001, told)
    assert function.exec_time == pytest.approx(0.001)
    assert function.crowd == 10


def test_containers_that_rest_are_too_many_to_the_autoscaler() -> None:
    house = House()
    house.submit(5000)
    house.run(1000)
    demand = house.dispatch.demand(house.now, FN)
    assert demand.crowd == FEW and demand.backlog
    assert decide(house.now, demand, FunctionOptions()).start == 0
    late = decide(house.now + 100, demand, FunctionOptions(scaledown_window=60))
    assert late.target == FEW and len(late.stop) == 16 - FEW


@pytest.mark.parametrize("seed", range(30))
def test_whatever_takes_how_long_all_of_it_ends(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    monkeypatch.setattr(crowd, "SEEN", draw.choice([0, 5, 64]))
    monkeypatch.setattr(crowd, "FEW", draw.choice([1, 2, 4]))
    house = House(containers=draw.randint(1, 12), timeout=draw.choice([0.0, 30.0]))
    count, gone = 0, 0
    for _ in range(40):
        event = draw.random()
        if event < 0.5:
            many = draw.choice([1, 3, 40])
            house.submit(many, first=count, takes=draw.choice([None, None, 0.0, 0.01, 0.5, 20.0]), last=False)
            count += many
        elif event < 0.6 and len(house.dispatch.containers) > 1:
            container_id = draw.choice(list(house.dispatch.containers))
            house.running = [entry for entry in house.running if entry[1] != container_id]
            house.do(house.dispatch.container_gone(house.now, container_id, "was lost", fault="infra"))
        elif event < 0.7:
            gone += 1
            house.container(f"co-new-{gone}")
        else:
            for _ in range(draw.choice([1, 10, 60])):
                if house.running:
                    house.step()
    house.run(count)
    assert house.finished == set(range(count))
