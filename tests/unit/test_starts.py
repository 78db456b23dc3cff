"""Starts that fail, of functions that persist: callers are told at once, what is in the journal waits and runs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from squall.server import starts
from squall.server.dispatch import Dispatch
from squall.server.inputs import (
    BackoffChanged,
    DemandChanged,
    Finish,
    FunctionOptions,
    History,
    Instructions,
    Notice,
    Push,
    StartFailure,
)
from squall.server.starts import Backoff, backoff_of
from squall.testing import check_dispatch

FN = "fu-1"


class Hand:
    """Drives one function of a deployed app."""

    def __init__(self, **options: Any) -> None:
        self.now = 0.0
        self.dispatch = Dispatch()
        self.ended: dict[tuple[str, int], Finish] = {}
        self.pushed: list[tuple[str, int]] = []
        self.do(self.dispatch.add_function(0.0, FN, FunctionOptions(**{"persists": True, **options})))

    @property
    def function(self) -> Any:
        return self.dispatch.functions[FN]

    def do(self, instructions: Instructions) -> Hand:
        self.last = instructions
        for one in instructions:
            if isinstance(one, Finish):
                self.ended[one.input.call_id, one.input.idx] = one
            elif isinstance(one, Push):
                self.pushed += [(input_.call_id, input_.idx) for input_ in one.inputs]
        check_dispatch(self.dispatch)
        return self

    def submit(self, call_id: str, kind: str = "spawn", count: int = 1) -> Hand:
        return self.do(self.dispatch.submit(self.now, call_id, FN, [(idx, b"") for idx in range(count)], kind))

    def fail(self, container_id: str, **more: Any) -> Hand:
        """A start that fails, when it may begin."""
        self.now = max(self.now, self.function.blocked_until)
        self.do(self.dispatch.tick(self.now))
        self.do(self.dispatch.container_starting(self.now, container_id, FN))
        return self.do(self.dispatch.container_gone(self.now, container_id, "failed to import", **more))

    def start(self, container_id: str = "co-ok") -> Hand:
        self.do(self.dispatch.container_starting(self.now, container_id, FN))
        return self.do(self.dispatch.container_ready(self.now, container_id))

    def status(self, call_id: str, idx: int = 0) -> str:
        found = self.ended.get((call_id, idx))
        return found.status if found is not None else ""

    def has(self, kind: type[Any]) -> bool:
        return any(isinstance(one, kind) for one in self.last)


def test_callers_fail_at_once_and_spawned_inputs_wait_when_an_import_fails() -> None:
    hand = Hand().submit("fc-spawn").submit("fc-remote", "remote").submit("fc-map", "map", 3)
    hand.fail("co-1", init_error=b"packed")
    assert hand.status("fc-remote") == hand.status("fc-map", 2) == "init_error"
    assert hand.ended["fc-remote", 0].output == b"packed" and hand.status("fc-spawn") == ""
    assert hand.start().pushed == [("fc-spawn", 0)]


def test_spawned_inputs_wait_in_their_order_however_often_starts_fail() -> None:
    hand = Hand(concurrency=100)
    for number in range(30):
        hand.submit(f"fc-{number}").fail(f"co-{number}", init_error=b"packed")
    assert not hand.ended and hand.start().pushed == [(f"fc-{number}", 0) for number in range(30)]


def test_what_a_caller_sends_while_starts_fail_is_told_so_and_a_spawn_is_taken() -> None:
    hand = Hand().submit("fc-1").fail("co-1", init_error=b"packed")
    hand.submit("fc-2", "remote").submit("fc-3")
    assert hand.status("fc-2") == "init_error" and hand.status("fc-3") == ""
    assert not hand.start("co-2").do(hand.dispatch.submit(hand.now, "fc-4", FN, [(0, b"")], "remote")).status("fc-4")


def test_spawned_input_in_backoff_of_a_retry_waits_too() -> None:
    hand = Hand(max_retries=2, initial_delay=1.0, backoff_coefficient=1.0).start("co-1").submit("fc-1")
    hand.do(hand.dispatch.output(hand.now, "co-1", "fc-1", 0, "error", 0))
    hand.do(hand.dispatch.container_gone(hand.now, "co-1", "was killed"))
    hand.fail("co-2", init_error=b"packed")
    hand.now += 1.0
    hand.do(hand.dispatch.tick(hand.now))
    assert hand.status("fc-1") == "" and hand.start("co-3").pushed[-1] == ("fc-1", 0)


def test_function_of_an_app_that_only_runs_is_given_up_with_what_was_spawned() -> None:
    hand = Hand(persists=False).submit("fc-1").fail("co-1", init_error=b"packed")
    assert hand.status("fc-1") == "init_error" and not hand.has(BackoffChanged)


def test_delays_grow_to_five_minutes_with_at_most_a_quarter_taken_off() -> None:
    hand = Hand()
    for number in range(14):
        hand.fail(f"co-{number}")
        whole = min(starts.PERSISTENT_DELAY_LIMIT, starts.START_DELAY * 2.0**number)
        assert whole * (1 - starts.JITTER) <= hand.function.blocked_until - hand.now <= whole
        assert hand.has(Notice) and hand.has(BackoffChanged)


def test_functions_that_failed_together_are_not_tried_together() -> None:
    dispatch = Dispatch()
    due = set()
    for number in range(50):
        dispatch.add_function(0.0, f"fu-{number}", FunctionOptions(persists=True))
        dispatch.container_starting(0.0, f"co-{number}", f"fu-{number}")
        dispatch.container_gone(0.0, f"co-{number}", "failed to import")
        due.add(round(dispatch.functions[f"fu-{number}"].blocked_until, 2))
    assert len(due) > 8


def test_start_after_failures_begins_anew_and_says_so() -> None:
    hand = Hand().fail("co-1").fail("co-2", init_error=b"packed").start()
    assert hand.has(BackoffChanged) and backoff_of(hand.function, hand.now) is None
    assert not Hand().start().has(BackoffChanged)


def test_trying_again_ends_the_wait() -> None:
    hand = Hand().submit("fc-1")
    for number in range(9):
        hand.fail(f"co-{number}", init_error=b"packed")
    hand.do(hand.dispatch.starts.try_again(hand.now, FN))
    assert hand.has(DemandChanged) and hand.has(BackoffChanged)
    assert hand.dispatch.demand(hand.now, FN).blocked_until < hand.now
    assert hand.submit("fc-2", "remote").status("fc-2") == ""
    assert Hand().dispatch.starts.try_again(0.0, FN) == [] == Hand().dispatch.starts.try_again(0.0, "fu-none")


def test_new_version_begins_anew_with_what_waited() -> None:
    hand = Hand().submit("fc-1").fail("co-1", init_error=b"packed")
    hand.do(hand.dispatch.add_function(hand.now, "fu-2", FunctionOptions(persists=True)))
    hand.do(hand.dispatch.supersede(hand.now, FN, "fu-2", "version 2 took over"))
    assert backoff_of(hand.dispatch.functions["fu-2"], hand.now) is None
    hand.do(hand.dispatch.container_starting(hand.now, "co-2", "fu-2"))
    hand.do(hand.dispatch.container_ready(hand.now, "co-2"))
    assert hand.pushed == [("fc-1", 0)]


def test_callers_that_moved_to_a_new_version_hear_of_its_failure() -> None:
    hand = Hand().submit("fc-1", "remote")
    hand.do(hand.dispatch.add_function(hand.now, "fu-2", FunctionOptions(persists=True)))
    hand.do(hand.dispatch.supersede(hand.now, FN, "fu-2", "version 2 took over"))
    hand.do(hand.dispatch.container_starting(hand.now, "co-2", "fu-2"))
    hand.do(hand.dispatch.container_gone(hand.now, "co-2", "failed to import", init_error=b"packed"))
    assert hand.status("fc-1") == "init_error"


def test_caller_is_told_when_the_next_start_is_far_off() -> None:
    hand = Hand()
    for number in range(12):
        hand.fail(f"co-{number}", init_error=b"packed")
    hint = hand.submit("fc-1", "remote").ended["fc-1", 0].hint
    assert "the next start is in" in hint and "squall app rollover" in hint


def test_what_no_node_can_hold_fails_callers_only() -> None:
    hand = Hand().submit("fc-1").submit("fc-2", "remote")
    hand.do(hand.dispatch.reject_queued(hand.now, FN, "no node has a GPU"))
    assert hand.status("fc-2") == "rejected" and hand.status("fc-1") == ""


def test_restart_goes_on_where_the_server_before_was() -> None:
    hand = Hand(min_containers=1)
    kept = Backoff(7, 30.0, 20.0, "a container failed to import", StartFailure("its container failed", "", b"packed"))
    hand.dispatch.starts.resume(hand.now, FN, kept)
    assert hand.submit("fc-1", "remote").ended["fc-1", 0].output == b"packed"
    hand.do(hand.dispatch.resume(hand.now, "fc-2", FN, (0, b""), History(0, 0, 0, 0.0)))
    assert hand.status("fc-2") == ""
    hand.now = 19.9
    assert not hand.do(hand.dispatch.tick(hand.now)).has(DemandChanged)
    hand.now = 20.0
    assert hand.do(hand.dispatch.tick(hand.now)).has(DemandChanged)
    hand.fail("co-1")
    assert hand.function.start_failures == 8


def test_starts_that_were_due_while_the_server_was_away_are_spread() -> None:
    dispatch = Dispatch()
    due = []
    for number in range(60):
        dispatch.add_function(0.0, f"fu-{number}", FunctionOptions(persists=True))
        dispatch.starts.resume(0.0, f"fu-{number}", Backoff(8, 60.0, -500.0, "it failed", None))
        due.append(dispatch.functions[f"fu-{number}"].blocked_until)
    assert max(due) <= starts.RESTART_SPREAD
    assert max(sum(at <= one < at + 1 for one in due) for at in due) < 20


def test_clock_that_was_set_back_makes_no_wait_longer_than_the_longest() -> None:
    hand = Hand()
    hand.dispatch.starts.resume(0.0, FN, Backoff(9, 300.0, 9000.0, "it failed", None))
    assert hand.function.blocked_until == starts.PERSISTENT_DELAY_LIMIT


@pytest.mark.parametrize("persists", [False, True])
def test_containers_that_end_soon_after_they_are_ready_are_not_started_without_a_pause(persists: bool) -> None:
    hand = Hand(persists=persists, min_containers=1)
    delays = []
    for number in range(5):
        hand.now = max(hand.now, hand.function.blocked_until)
        hand.start(f"co-{number}")
        hand.do(hand.dispatch.container_gone(hand.now, f"co-{number}", "exited with code 1"))
        delays.append(max(0.0, hand.function.blocked_until - hand.now))
    assert delays[0] == 0.0 and all(later > sooner for sooner, later in itertools.pairwise(delays))
    assert hand.submit("fc-1", "remote").status("fc-1") == ""
    hand.now += 60.0
    hand.start("co-good").do(hand.dispatch.output(hand.now + 0.1, "co-good", "fc-1", 0, "ok", 0))
    hand.do(hand.dispatch.container_gone(hand.now + 1, "co-good", "exited with code 1"))
    assert hand.function.early_ends == 0


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(("spawn", "remote", "fail", "init_error", "ready", "gone", "wait", "again", "supersede")),
        max_size=40,
    )
)
def test_no_order_of_events_ends_a_spawned_input_for_a_start(events: list[str]) -> None:
    """And each of them runs once a container starts."""
    dispatch, now, pool, spawned = Dispatch(), 0.0, 0, []
    ended: list[Finish] = []
    pushed: set[str] = set()

    def do(instructions: Instructions) -> None:
        ended.extend(one for one in instructions if isinstance(one, Finish))
        pushed.update(i.call_id for one in instructions if isinstance(one, Push) for i in one.inputs)
        check_dispatch(dispatch)

    do(dispatch.add_function(now, "fu-0", FunctionOptions(persists=True, concurrency=1000)))
    for number, event in enumerate([*events, "wait", "ready"]):
        function, co = dispatch.functions[f"fu-{pool}"], f"co-{number}"
        if event in ("spawn", "remote"):
            spawned += [f"fc-{number}"] if event == "spawn" else []
            do(dispatch.submit(now, f"fc-{number}", f"fu-{pool}", [(0, b"")], event))
        elif event in ("fail", "init_error"):
            do(dispatch.container_starting(now, co, f"fu-{pool}"))
            error = b"packed" if event == "init_error" else None
            do(dispatch.container_gone(now, co, "failed", init_error=error))
        elif event == "ready":
            do(dispatch.container_starting(now, co, f"fu-{pool}"))
            do(dispatch.container_ready(now, co))
        elif event == "gone":
            for idle in [one for one in function.containers.values() if not one.running]:
                do(dispatch.container_gone(now, idle.container_id, "exited with code 1"))
        elif event == "again":
            do(dispatch.starts.try_again(now, f"fu-{pool}"))
        elif event == "supersede":
            pool += 1
            do(dispatch.add_function(now, f"fu-{pool}", FunctionOptions(persists=True, concurrency=1000)))
            do(dispatch.supersede(now, f"fu-{pool - 1}", f"fu-{pool}", "a new version"))
        else:
            now += 3.0
            do(dispatch.tick(now))
    assert {one.input.call.kind for one in ended} <= {"remote"}
    assert set(spawned) <= pushed
