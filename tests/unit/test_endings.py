"""Many inputs that end at once: dropped in one step with their call, or some at a time with their function."""

from __future__ import annotations

from typing import Any

from squall.server.inputs import CancelRunning, DemandChanged, Dropped, Finish, FunctionOptions, KillContainer, Push
from tests.unit.test_dispatch import FN, Hand

MANY = 2500


def spawned(hand: Hand, count: int, call_id: str = "fc-1") -> Hand:
    return hand.submit(count, call_id, kind="spawn")


def dropped(hand: Hand) -> Dropped:
    [one] = hand.of(Dropped)
    assert isinstance(one, Dropped)
    return one


def cancel(hand: Hand, call_id: str = "fc-1", **more: Any) -> Hand:
    return hand.do(hand.dispatch.cancel(hand.now, call_id, None, "cancelled by the caller", **more))


def test_what_waits_of_a_cancelled_call_is_dropped_in_one_instruction() -> None:
    hand = spawned(Hand(), MANY)
    cancel(hand)
    one = dropped(hand)
    assert (one.count, one.spared, one.message) == (MANY - 1, frozenset({0}), "cancelled by the caller")
    assert hand.status(0) == "cancelled", "the first came alone and has an end of its own"
    assert not hand.dispatch.calls and hand.dispatch.functions[FN].pending() == 0


def test_what_runs_is_asked_and_ends_by_itself() -> None:
    hand = Hand(concurrency=2).container("co-1")
    spawned(hand, 100)
    cancel(hand)
    assert dropped(hand).count == 98 and [one.input.idx for one in hand.of(CancelRunning)] == [0, 1]
    hand.output("co-1", 0)
    assert hand.status(0) == "ok"
    hand.output("co-1", 1, "error")
    assert hand.status(1) == "cancelled" and not hand.dispatch.calls


def test_no_retry_begins_after_the_cancel() -> None:
    hand = Hand(max_retries=3, initial_delay=5.0, concurrency=2).container("co-1")
    spawned(hand, 10)
    hand.output("co-1", 0, "error")  # waits to be tried again
    cancel(hand)
    assert hand.status(0) == "cancelled" and dropped(hand).count == 7
    hand.output("co-1", 1, "error").output("co-1", 2, "error")
    hand.at(60.0)
    assert not hand.of(Push) and not hand.dispatch.calls


def test_containers_of_a_terminated_call_are_killed_and_others_go_on() -> None:
    hand = Hand().container("co-1")
    spawned(hand, 10)
    spawned(hand, 2, "fc-2")
    cancel(hand, terminate=True)
    assert [one.container_id for one in hand.of(KillContainer)] == ["co-1"]
    hand.gone("co-1", "was killed", fault="infra").container("co-2")
    assert hand.pushed == [("co-2", [0])] and hand.of(Push)[0].inputs[0].call_id == "fc-2"


def test_what_stood_behind_a_cancelled_call_comes_next() -> None:
    hand = Hand().container("co-1")
    spawned(hand, MANY)
    hand.submit(1, "fc-late")
    cancel(hand)
    hand.output("co-1", 0)
    assert [push.inputs[0].call_id for push in hand.of(Push)] == ["fc-late"]


def test_autoscaler_hears_that_the_backlog_is_gone() -> None:
    hand = spawned(Hand(), 10)
    cancel(hand)
    assert [one.function_id for one in hand.of(DemandChanged)] == [FN]
    assert hand.dispatch.demand(0.0, FN).backlog == 0


def test_a_call_that_was_dropped_takes_no_more() -> None:
    hand = Hand().container("co-1")
    spawned(hand, 10)
    cancel(hand)
    spawned(hand, 20)
    assert list(hand.dispatch.calls["fc-1"].inputs) == [0]
    hand.output("co-1", 0)
    assert not hand.of(Push) and not hand.dispatch.calls


def test_cancelling_twice_drops_once() -> None:
    hand = Hand().container("co-1")
    spawned(hand, 10)
    cancel(hand)
    cancel(hand)
    assert not hand.of(Dropped) and not hand.of(Finish) and not hand.of(CancelRunning)


def test_counts_include_what_was_dropped() -> None:
    hand = spawned(Hand(), 10)
    cancel(hand)
    function = hand.dispatch.functions[FN]
    assert (function.finished, function.failed) == (10, 10)


# ---- functions ------------------------------------------------------------------------------------------------------


def ends_of(hand: Hand) -> list[int]:
    """How many inputs end in each event until none does."""
    counts = []
    while ended := len(hand.of(Finish)) + sum(one.count for one in hand.of(Dropped)):
        counts.append(ended)
        hand.at(hand.now + 0.01)
    return counts


def test_a_stopped_function_ends_its_inputs_some_at_a_time() -> None:
    hand = Hand().submit(MANY, kind="map")
    hand.do(hand.dispatch.close_function(0.0, FN, "the app was stopped"))
    assert ends_of(hand) == [1000, 1000, 500]
    assert {one.status for one in hand.finished.values()} == {"cancelled"} and len(hand.finished) == MANY
    assert not hand.dispatch.functions and not hand.dispatch.calls


def test_a_stopped_function_drops_spawned_calls_whole() -> None:
    hand = spawned(Hand(), MANY)
    hand.do(hand.dispatch.close_function(0.0, FN, "the app was stopped"))
    assert dropped(hand).message == "the function was stopped: the app was stopped"
    assert ends_of(hand) == [MANY] and not hand.dispatch.functions


def test_a_stopped_function_takes_nothing_while_its_inputs_end() -> None:
    hand = Hand().submit(MANY, kind="map")
    hand.do(hand.dispatch.close_function(0.0, FN, "the app was stopped"))
    hand.submit(MANY + 1, kind="map")
    assert [one.input.idx for one in hand.of(Finish)] == [MANY], "what is said again has one end only"
    assert sum(ends_of(hand)) == MANY - 1000 + 1


def test_a_function_that_cannot_start_ends_its_inputs_some_at_a_time() -> None:
    hand = Hand().submit(MANY, kind="map")
    hand.do(hand.dispatch.container_starting(0.0, "co-1", FN))
    hand.gone("co-1", "could not load", init_error=b"packed")
    hand.now = 0.001
    hand.do(hand.dispatch.tick(hand.now))
    while hand.of(Finish):
        hand.at(hand.now + 0.001)
    assert len(hand.finished) == MANY and {one.status for one in hand.finished.values()} == {"init_error"}


def test_inputs_that_have_not_failed_yet_run_when_a_container_starts_after_all() -> None:
    hand = Hand(concurrency=10).submit(MANY, kind="map")
    for name in ("co-1", "co-2"):
        hand.do(hand.dispatch.container_starting(0.0, name, FN))
    hand.gone("co-1", "could not load", init_error=b"packed")
    hand.do(hand.dispatch.container_ready(0.0, "co-2"))
    hand.at(1.0)
    assert len(hand.finished) == 1000 and hand.dispatch.functions[FN].queued == MANY - 1010


def test_what_comes_after_a_refusal_is_not_refused_with_it() -> None:
    hand = Hand().submit(MANY, kind="map")
    hand.do(hand.dispatch.reject_queued(0.0, FN, "no node has a GPU"))
    hand.submit(3, "fc-2")
    while hand.of(Finish) or hand.dispatch.functions[FN].ending:
        hand.at(hand.now + 0.01)
    assert len(hand.finished) == MANY and hand.dispatch.functions[FN].queued == 3


def test_a_function_that_is_superseded_while_its_inputs_end_is_forgotten() -> None:
    hand = Hand().submit(MANY, kind="map")
    hand.do(hand.dispatch.reject_queued(0.0, FN, "no node has a GPU"))
    hand.do(hand.dispatch.add_function(0.0, "fu-2", FunctionOptions()))
    hand.do(hand.dispatch.supersede(0.0, FN, "fu-2", "version 2"))
    hand.at(1.0)
    assert list(hand.dispatch.functions) == ["fu-2"]
    assert hand.dispatch.functions["fu-2"].queued == MANY - 1000
