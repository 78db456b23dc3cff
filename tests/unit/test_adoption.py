"""What dispatch does with containers that outlived a server: event by event, then under random orders of events."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest

from squall.server.adoption import RESUME_GRACE, HeldInput
from squall.server.dispatch import CANCEL_GRACE, Dispatch
from squall.server.inputs import (
    CancelRunning,
    Finish,
    FunctionOptions,
    History,
    Instructions,
    KillContainer,
    Push,
    StopContainer,
)
from squall.testing import check_dispatch

FN = "fu-1"
OTHER = "fu-2"
OLD = "fu-0"
"""A version of `FN` that was replaced before the restart."""


class Hand:
    """Drives a dispatch of one function with short words, and keeps what was pushed and finished."""

    def __init__(self, **options: Any) -> None:
        self.now = 0.0
        self.dispatch = Dispatch()
        self.last: Instructions = []
        self.pushed: list[tuple[str, str, int]] = []
        self.finished: dict[tuple[str, int], Finish] = {}
        for function_id in (FN, OTHER):
            self.do(self.dispatch.add_function(0.0, function_id, FunctionOptions(**options)))

    def do(self, instructions: Instructions) -> Hand:
        self.last = instructions
        for instruction in instructions:
            if isinstance(instruction, Finish):
                key = instruction.input.call_id, instruction.input.idx
                assert key not in self.finished, "ended twice"
                self.finished[key] = instruction
            elif isinstance(instruction, Push):
                self.pushed += [(instruction.container_id, one.call_id, one.idx) for one in instruction.inputs]
        check_dispatch(self.dispatch)
        return self

    def back(self, container_id: str, *held: HeldInput, slots: int = 1, function_id: str = FN) -> Hand:
        self.do(self.dispatch.container_starting(self.now, container_id, function_id))
        return self.do(self.dispatch.adoption.adopt(self.now, [(container_id, slots, held)]))

    def former(self, container_id: str, *held: HeldInput, slots: int = 1, **options: Any) -> Hand:
        """A container of the version before comes back."""
        self.recall(container_id, **options)
        return self.do(self.dispatch.adoption.adopt(self.now, [(container_id, slots, held)]))

    def recall(self, container_id: str, **options: Any) -> None:
        made = FunctionOptions(**options)
        self.do(self.dispatch.adoption.recall(self.now, container_id, OLD, made, FN, "version 2 took over"))

    def again(self, container_id: str, *results: tuple[str, int, str, int]) -> Hand:
        """A container that comes back sends results, before it says what it holds."""
        if container_id not in self.dispatch.containers:
            self.do(self.dispatch.container_starting(self.now, container_id, FN))
        told = [(*result, f"again {result[1]}") for result in results]
        return self.do(self.dispatch.adoption.outputs_again(self.now, container_id, told))

    def submit(self, *idxs: int, call_id: str = "fc-1", function_id: str = FN, **more: Any) -> Hand:
        items = [(idx, f"payload {idx}") for idx in idxs]
        return self.do(self.dispatch.submit(self.now, call_id, function_id, items, **more))

    def output(self, container_id: str, idx: int = 0, status: str = "ok", attempt: int = 0, call: str = "fc-1") -> Hand:
        return self.do(self.dispatch.output(self.now, container_id, call, idx, status, attempt, f"result {idx}"))

    def at(self, now: float) -> Hand:
        self.now = now
        return self.do(self.dispatch.tick(now))

    def of(self, kind: type[Any]) -> list[Any]:
        return [instruction for instruction in self.last if isinstance(instruction, kind)]

    def end(self, idx: int = 0, call_id: str = "fc-1") -> tuple[str, Any]:
        finish = self.finished[call_id, idx]
        return finish.status, finish.output


def test_a_queued_input_runs_on_where_it_runs() -> None:
    hand = Hand().submit(0, 1).back("co-1", HeldInput("fc-1", 0, 0))
    assert hand.pushed == []
    hand.output("co-1")
    assert hand.end() == ("ok", "result 0")
    assert hand.pushed == [("co-1", "fc-1", 1)]


def test_an_input_that_comes_after_its_container_runs_on_there() -> None:
    hand = Hand().back("co-1", HeldInput("fc-1", 0, 2)).submit(0)
    assert hand.pushed == []
    assert hand.output("co-1", attempt=2).end() == ("ok", "result 0")


def test_a_result_that_comes_before_its_caller_is_given_to_it() -> None:
    hand = Hand().back("co-1", HeldInput("fc-1", 0, 0)).output("co-1")
    assert hand.finished == {}
    hand.submit(0)
    assert hand.end() == ("ok", "result 0")
    assert hand.pushed == []


def test_a_result_that_is_there_already_does_not_end_the_call_of_those_behind_it() -> None:
    hand = Hand().back("co-1", HeldInput("fc-1", 0, 0)).output("co-1").submit(0, 1, 2, last=True)
    assert hand.end() == ("ok", "result 0")
    assert hand.output("co-1", 1).end(1) == ("ok", "result 1") and hand.output("co-1", 2).end(2) == ("ok", "result 2")


def test_a_result_of_an_earlier_attempt_does_not_hide_the_attempt_that_runs() -> None:
    hand = Hand(max_retries=1, initial_delay=0.0).again("co-1", ("fc-1", 0, "error", 0))
    hand.do(hand.dispatch.adoption.adopt(hand.now, [("co-1", 1, [HeldInput("fc-1", 0, 1)])]))
    hand.do(hand.dispatch.resume(0.0, "fc-1", FN, (0, "payload"), History(1, 1, 0, 0.0)))
    assert hand.back("co-2").pushed == []
    assert hand.output("co-1", attempt=1).end() == ("ok", "result 0")


def test_a_container_that_holds_an_input_takes_no_other() -> None:
    hand = Hand().back("co-1", HeldInput("fc-1", 0, 0)).submit(5, call_id="fc-2")
    assert hand.pushed == []
    hand.output("co-1")
    assert hand.pushed == [("co-1", "fc-2", 5)]


def test_a_container_with_free_slots_is_filled() -> None:
    hand = Hand(concurrency=3).submit(0, 1, 2).back("co-1", HeldInput("fc-1", 0, 0), slots=3)
    assert [idx for _, _, idx in hand.pushed] == [1, 2]


def test_what_nobody_comes_back_for_is_cancelled_and_then_killed() -> None:
    hand = Hand().back("co-1", HeldInput("fc-1", 0, 0)).at(RESUME_GRACE + 0.1)
    assert [cancel.input.idx for cancel in hand.of(CancelRunning)] == [0]
    assert hand.at(RESUME_GRACE + CANCEL_GRACE + 0.2).of(KillContainer)
    assert hand.finished == {}


def test_a_result_that_nobody_came_back_for_is_forgotten_and_its_input_run_again() -> None:
    hand = Hand().back("co-1", HeldInput("fc-1", 0, 0)).output("co-1").at(2 * RESUME_GRACE + 1).submit(0)
    assert hand.pushed == [("co-1", "fc-1", 0)]


def test_an_input_of_a_later_attempt_is_not_the_one_that_runs() -> None:
    hand = Hand().back("co-1", HeldInput("fc-1", 0, 0), slots=1)
    hand.do(hand.dispatch.resume(0.0, "fc-1", FN, (0, "payload"), History(3, 1, 2, 0.0)))
    assert hand.pushed == []  # it waits for the slot
    hand.output("co-1", attempt=0)
    assert hand.finished == {}
    assert hand.pushed == [("co-1", "fc-1", 0)]
    assert hand.output("co-1", attempt=3).end() == ("ok", "result 0")


def test_a_journalled_input_with_attempts_runs_on_where_it_runs() -> None:
    hand = Hand().back("co-1", HeldInput("fc-1", 0, 3))
    hand.do(hand.dispatch.resume(0.0, "fc-1", FN, (0, "payload"), History(3, 1, 2, 5.0)))
    assert hand.output("co-1", attempt=3).end() == ("ok", "result 0")
    assert hand.pushed == []


def test_a_broken_generator_is_cancelled_and_run_again() -> None:
    hand = Hand().submit(0).back("co-1", HeldInput("fc-1", 0, 0, is_broken=True))
    assert hand.of(CancelRunning)
    assert hand.pushed == []
    hand.output("co-1", status="cancelled")
    assert hand.finished == {}
    assert hand.pushed == [("co-1", "fc-1", 0)]


def test_results_that_are_sent_again_end_what_is_queued() -> None:
    hand = Hand().submit(0, 1).again("co-1", ("fc-1", 0, "ok", 0))
    assert hand.end() == ("ok", "again 0")
    hand.do(hand.dispatch.adoption.adopt(0.0, [("co-1", 1, [])]))
    assert hand.pushed == [("co-1", "fc-1", 1)]


def test_a_result_that_is_sent_again_is_kept_for_its_caller() -> None:
    hand = Hand().again("co-1", ("fc-1", 0, "ok", 4)).submit(0)
    assert hand.end() == ("ok", "again 0")
    assert hand.submit(0).finished.keys() == {("fc-1", 0)}


def test_a_call_whose_first_input_has_ended_already_keeps_the_others() -> None:
    hand = Hand().again("co-1", ("fc-1", 0, "ok", 0)).submit(0, 1, 2)
    hand.do(hand.dispatch.container_ready(0.0, "co-1", 2))
    hand.output("co-1", 1).output("co-1", 2)
    assert [hand.finished["fc-1", idx].output for idx in range(3)] == ["again 0", "result 1", "result 2"]
    assert not hand.dispatch.calls


def lost_with_its_node(hand: Hand, container_id: str) -> Hand:
    hand.dispatch.adoption.lose(container_id)
    return hand.do(hand.dispatch.container_gone(hand.now, container_id, "was lost with its node", fault="infra"))


def running(hand: Hand, container_id: str, slots: int = 1) -> Hand:
    hand.do(hand.dispatch.container_starting(hand.now, container_id, FN))
    return hand.do(hand.dispatch.container_ready(hand.now, container_id, slots))


def test_what_was_lost_with_its_node_is_taken_back_where_nobody_else_has_it() -> None:
    hand = lost_with_its_node(running(Hand().submit(0), "co-1"), "co-1")
    hand.back("co-1", HeldInput("fc-1", 0, 0))
    assert hand.pushed == [("co-1", "fc-1", 0)]
    hand.output("co-1")
    assert hand.finished["fc-1", 0].output == "result 0"


def test_a_result_of_a_lost_node_is_taken_where_its_input_still_waits() -> None:
    hand = lost_with_its_node(running(Hand().submit(0), "co-1"), "co-1")
    hand.again("co-1", ("fc-1", 0, "ok", 0))
    assert hand.finished["fc-1", 0].output == "again 0"


def test_what_was_given_to_another_since_is_not_taken_back_and_its_first_run_cancelled() -> None:
    hand = running(lost_with_its_node(running(Hand().submit(0), "co-1"), "co-1"), "co-2")
    assert hand.pushed[-1] == ("co-2", "fc-1", 0)
    hand.again("co-1", ("fc-1", 0, "ok", 0))
    assert not hand.finished
    hand.do(hand.dispatch.adoption.adopt(hand.now, [("co-1", 1, [HeldInput("fc-1", 0, 0)])]))
    assert any(isinstance(one, CancelRunning) for one in hand.last)
    hand.output("co-1", status="cancelled")
    assert not hand.finished
    hand.output("co-2", attempt=1)
    assert hand.finished["fc-1", 0].output == "result 0"


def test_what_has_ended_since_its_node_was_lost_is_cancelled_there_at_once() -> None:
    hand = running(lost_with_its_node(running(Hand().submit(0), "co-1"), "co-1"), "co-2").output("co-2", attempt=1)
    hand.back("co-1", HeldInput("fc-1", 0, 0))
    assert any(isinstance(one, CancelRunning) for one in hand.last)
    hand.again("co-1", ("fc-1", 0, "ok", 0))
    assert len(hand.finished) == 1


def test_another_container_does_not_get_what_was_lost_by_naming_it() -> None:
    hand = lost_with_its_node(running(Hand().submit(0), "co-1"), "co-1")
    hand.again("co-9", ("fc-1", 0, "ok", 0))
    assert not hand.finished


def test_an_error_that_is_sent_again_costs_one_retry() -> None:
    hand = Hand(max_retries=1, initial_delay=0.0).again("co-1", ("fc-1", 0, "error", 0))
    hand.do(hand.dispatch.adoption.adopt(0.0, [("co-1", 1, [])]))
    hand.submit(0)
    assert hand.pushed == [("co-1", "fc-1", 0)]
    assert hand.output("co-1", status="error", attempt=1).end() == ("error", "result 0")


def test_a_container_gets_no_input_of_another_function_by_naming_it() -> None:
    hand = Hand().submit(0, function_id=OTHER).back("co-1", HeldInput("fc-1", 0, 0))
    hand.output("co-1")
    assert hand.finished == {}
    hand.again("co-2", ("fc-1", 0, "ok", 0), ("fc-9", 0, "ok", 0))
    hand.submit(0, call_id="fc-9", function_id=OTHER)
    assert hand.finished == {}
    hand.back("co-3", function_id=OTHER, slots=1)
    assert hand.pushed == [("co-3", "fc-1", 0)]


def test_a_container_that_names_more_than_its_slots_is_killed() -> None:
    hand = Hand().submit(0, 1).back("co-1", HeldInput("fc-1", 0, 0), HeldInput("fc-1", 1, 0), slots=1)
    assert hand.of(KillContainer)
    assert hand.dispatch.functions[FN].queued == 2


def test_what_runs_in_two_containers_counts_once() -> None:
    hand = Hand().back("co-1", HeldInput("fc-1", 0, 0)).back("co-2", HeldInput("fc-1", 0, 1))
    assert hand.of(CancelRunning)
    hand.submit(0).output("co-2", attempt=1)
    assert hand.finished == {}
    assert hand.output("co-1").end() == ("ok", "result 0")


def test_a_claimed_input_whose_container_dies_is_run_again_for_its_caller() -> None:
    hand = Hand().back("co-1", HeldInput("fc-1", 0, 0))
    hand.do(hand.dispatch.container_gone(0.0, "co-1", "was killed"))
    hand.submit(0)
    assert hand.finished == {}
    assert hand.back("co-2").pushed == [("co-2", "fc-1", 0)]


def test_a_single_use_container_that_comes_back_takes_nothing_more() -> None:
    hand = Hand(single_use=True).submit(0, 1).back("co-1", HeldInput("fc-1", 0, 0))
    assert hand.output("co-1").of(StopContainer)
    hand = Hand(single_use=True).submit(0).back("co-1")
    assert hand.of(StopContainer)
    assert hand.pushed == []


def test_an_app_that_stops_ends_what_is_claimed() -> None:
    hand = Hand().back("co-1", HeldInput("fc-1", 0, 0))
    assert hand.do(hand.dispatch.close_function(0.0, FN, "stopped")).of(StopContainer)
    assert hand.finished == {}
    hand.do(hand.dispatch.container_gone(0.0, "co-1", "exited"))
    assert FN not in hand.dispatch.functions


# ---- containers of a version that was replaced ------------------------------------------------------------------


def test_container_of_a_replaced_version_ends_what_it_has_and_gets_nothing_more() -> None:
    hand = Hand().submit(0, 1).former("co-1", HeldInput("fc-1", 0, 0))
    assert hand.pushed == []
    assert hand.output("co-1").end() == ("ok", "result 0")
    assert hand.pushed == [] and [stop.container_id for stop in hand.of(StopContainer)] == ["co-1"]
    hand.do(hand.dispatch.container_gone(0.0, "co-1", "exited"))
    assert OLD not in hand.dispatch.functions
    assert hand.back("co-2").pushed == [("co-2", "fc-1", 1)]


def test_container_of_a_replaced_version_without_work_is_stopped() -> None:
    hand = Hand().former("co-1")
    assert [stop.container_id for stop in hand.of(StopContainer)] == ["co-1"]


@pytest.mark.parametrize("answers_first", [False, True])
def test_what_a_replaced_version_runs_is_for_the_caller_who_names_the_new_one(answers_first: bool) -> None:
    hand = Hand().former("co-1", HeldInput("fc-1", 0, 0))
    if answers_first:
        hand.output("co-1").submit(0)
    else:
        hand.submit(0).output("co-1")
    assert hand.end() == ("ok", "result 0") and hand.pushed == []


def test_result_of_a_replaced_version_that_the_server_lost_is_taken() -> None:
    hand = Hand().submit(0)
    hand.recall("co-1")
    hand.do(hand.dispatch.adoption.outputs_again(hand.now, "co-1", [("fc-1", 0, "ok", 0, "again")]))
    assert hand.end() == ("ok", "again")
    hand.do(hand.dispatch.adoption.outputs_again(hand.now, "co-1", [("fc-2", 0, "ok", 0, "early")]))
    assert hand.submit(0, call_id="fc-2").end(0, "fc-2") == ("ok", "early")


def test_what_a_replaced_version_fails_at_is_tried_again_by_the_new_one() -> None:
    hand = Hand(max_retries=1, initial_delay=0.0).submit(0).former("co-1", HeldInput("fc-1", 0, 0)).back("co-2")
    hand.output("co-1", status="error")
    assert hand.pushed == [("co-2", "fc-1", 0)]
    assert hand.output("co-2", attempt=1).end() == ("ok", "result 0")


def test_what_a_replaced_version_runs_goes_to_the_new_one_when_its_container_is_gone() -> None:
    hand = Hand().submit(0).former("co-1", HeldInput("fc-1", 0, 0)).back("co-2")
    hand.do(hand.dispatch.container_gone(hand.now, "co-1", "was lost", fault="infra"))
    assert hand.pushed == [("co-2", "fc-1", 0)] and OLD not in hand.dispatch.functions


def test_a_deploy_after_the_restart_leaves_what_the_version_before_last_runs() -> None:
    hand = Hand().submit(0).former("co-1", HeldInput("fc-1", 0, 0))
    hand.do(hand.dispatch.supersede(hand.now, FN, OTHER, "version 3 took over"))
    assert hand.output("co-1").end() == ("ok", "result 0")


def test_timeout_of_a_replaced_version_holds_on() -> None:
    hand = Hand().submit(0).former("co-1", HeldInput("fc-1", 0, 0), timeout=5.0)
    assert hand.at(4.9).of(KillContainer) == [] and hand.at(5.1).of(KillContainer)
    assert hand.end()[0] == "timeout"


def test_app_that_stops_ends_what_a_replaced_version_runs() -> None:
    hand = Hand().submit(0).former("co-1", HeldInput("fc-1", 0, 0))
    hand.do(hand.dispatch.close_function(0.0, FN, "stopped"))
    assert hand.end()[0] == "cancelled"


def test_container_of_a_replaced_version_whose_app_has_ended_is_killed() -> None:
    hand = Hand()
    hand.do(hand.dispatch.close_function(0.0, FN, "stopped"))
    hand.recall("co-1")
    assert hand.of(KillContainer) and OLD not in hand.dispatch.functions


@pytest.mark.parametrize("seed", range(300))
def test_in_any_order_of_events_nothing_that_runs_is_run_again(seed: int) -> None:
    """Containers come back with inputs that run or have ended, callers with theirs, in any order; each ends once."""
    rng = random.Random(seed)
    slots = rng.choice([1, 1, 3])
    hand = Hand(concurrency=slots, max_retries=rng.choice([0, 1]), initial_delay=0.0)
    keys = [(f"fc-{number % 3}", number) for number in range(30)]
    rng.shuffle(keys)
    held = {f"co-{number}": [keys.pop() for _ in range(rng.randint(0, slots))] for number in range(4)}
    ended = {container_id: [keys.pop() for _ in range(rng.randint(0, 2))] for container_id in held}
    everything = [*keys, *(key for some in (*held.values(), *ended.values()) for key in some)]

    early = [partial(hand.submit, idx, call_id=call_id, last=False) for call_id, idx in everything]
    rng.shuffle(early)
    cut = rng.randint(0, len(early))
    for event in early[:cut]:
        event()
    replaced = {container_id for container_id in held if rng.random() < rng.choice([0.0, 0.5, 1.0])}
    for container_id in replaced:
        hand.recall(container_id, concurrency=slots)
    for container_id in held:
        hand.again(container_id, *[(*key, "ok", 0) for key in ended[container_id]])
    back = [(container_id, slots, [HeldInput(*key, 0) for key in keys]) for container_id, keys in held.items()]
    rng.shuffle(back)
    hand.do(hand.dispatch.adoption.adopt(hand.now, back))
    ends = [partial(hand.output, one, idx, call=call_id) for one, keys in held.items() for call_id, idx in keys]
    later = [*early[cut:], *ends]
    rng.shuffle(later)
    for event in later:
        event()
        hand.at(hand.now + rng.random() * 0.3)
    running = {key for some in held.values() for key in some}
    finished = {key for some in ended.values() for key in some}
    hand.back("co-new", slots=slots)
    _drain(hand, rng)
    assert set(hand.finished) == set(everything)
    again = {(call_id, idx) for _, call_id, idx in hand.pushed} & (running | finished)
    assert not again, "run again"
    assert not replaced & {container_id for container_id, _, _ in hand.pushed}, "a replaced version got something"


def _drain(hand: Hand, rng: random.Random) -> None:
    """Let all that is queued run to its end."""
    while any(call.inputs for call in hand.dispatch.calls.values()):
        busy = [input_ for call in hand.dispatch.calls.values() for input_ in call.inputs.values() if input_.container]
        assert busy, "something waits and nothing runs"
        one = rng.choice(busy)
        assert one.container is not None
        hand.output(one.container.container_id, one.idx, attempt=one.attempt, call=one.call_id)
