"""How many containers there are, seen from outside: up at once, down after the window, within the limits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from squall.client import Client
from squall.protocol.messages import StopContainer
from tests.conftest import wait_until
from tests.integration import workload
from tests.integration.support import Clock, Kept, Outcome, containers_of

pytestmark = pytest.mark.root


@pytest.fixture(scope="module", autouse=True)
def app(shared_home: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SQUALL_NODE_CPUS", "4")  # the same on every machine
        with workload.scaling.run(output=Kept()):
            yield


def alive(function: str) -> list[str]:
    return [row["container_id"] for row in containers_of(function) if row["state"] != "draining"]


def test_inputs_that_wait_start_containers_at_once_and_never_more_than_the_limit() -> None:
    call = Outcome(lambda: list(workload.three_at_most.map([0.4] * 9)))
    most = 0
    while call.is_alive():
        most = max(most, len(containers_of("three_at_most")))
    assert len(set(call.result())) == 3
    assert most == 3


def test_idle_containers_end_after_their_window_and_not_before() -> None:
    workload.three_at_most.remote(0)
    clock = Clock()
    wait_until(lambda: not containers_of("three_at_most"), "all idle containers have ended")
    assert clock() >= 1.5
    ended = containers_of("three_at_most", include_all=True)
    assert {row["reason"] for row in ended} == {"idle for longer than scaledown_window=2 s"}


def test_min_containers_are_there_before_any_call_and_stay() -> None:
    wait_until(lambda: len(alive("two_at_least")) == 2, "two containers stand by")
    before = set(alive("two_at_least"))
    assert workload.two_at_least.remote() in before
    clock = Clock()
    wait_until(lambda: clock() > 3.0, "the window has passed")
    assert set(alive("two_at_least")) == before


def test_a_killed_container_of_the_minimum_is_replaced() -> None:
    wait_until(lambda: len(alive("two_at_least")) == 2, "two containers stand by")
    victim = alive("two_at_least")[0]
    Client.current().link.request(StopContainer(victim, 0.0, "by the test")).wait(20)
    wait_until(lambda: victim not in alive("two_at_least") and len(alive("two_at_least")) == 2, "there are two again")


def test_a_reserve_is_kept_while_there_is_work() -> None:
    call = Outcome(lambda: workload.one_in_reserve.remote(1.5))
    wait_until(lambda: len(alive("one_in_reserve")) == 2, "one more than needed is there")
    call.result()
    wait_until(lambda: not containers_of("one_in_reserve"), "nothing is kept without work")


def test_a_single_use_container_serves_one_input() -> None:
    ids = [workload.once.remote() for _ in range(3)]
    assert len(set(ids)) == 3
    wait_until(lambda: not containers_of("once"), "used containers end")


def test_idle_containers_make_room_for_another_function_at_once() -> None:
    assert len(list(workload.wide.map([0.3] * 8))) == 8
    assert len(alive("wide")) >= 3, "they fill the node"
    clock = Clock()
    calls = [Outcome(workload.wide_too.remote) for _ in range(2)]
    assert all(call.result() for call in calls)
    assert clock() < 3.0, "it waited for another function's window"
    reasons = {row["reason"] for row in containers_of("wide", include_all=True) if row["state"] == "exited"}
    assert reasons
    assert "idle for longer" not in str(reasons)
