"""Dispatch by example: what the hand is told to do, event by event."""

from __future__ import annotations

from typing import Any

import pytest

from squall.server import dispatch as brain
from squall.server.dispatch import Dispatch
from squall.server.inputs import (
    CancelRunning,
    DemandChanged,
    Finish,
    FunctionOptions,
    Input,
    Instructions,
    KillContainer,
    Notice,
    Push,
    StopContainer,
)
from squall.testing import check_dispatch

FN = "fu-1"


class Hand:
    """Drives one function with short words, and keeps what was pushed and finished."""

    def __init__(self, **options: Any) -> None:
        self.now = 0.0
        self.dispatch = Dispatch()
        self.last: Instructions = []
        self.finished: dict[tuple[str, int], Finish] = {}
        self.do(self.dispatch.add_function(0.0, FN, FunctionOptions(**options)))

    def do(self, instructions: Instructions) -> Hand:
        self.last = instructions
        for instruction in instructions:
            if isinstance(instruction, Finish):
                key = instruction.input.call_id, instruction.input.idx
                assert key not in self.finished
                self.finished[key] = instruction
        check_dispatch(self.dispatch)
        return self

    def container(self, container_id: str, slots: int = 0) -> Hand:
        self.do(self.dispatch.container_starting(self.now, container_id, FN))
        return self.do(self.dispatch.container_ready(self.now, container_id, slots))

    def submit(self, count: int = 1, call_id: str = "fc-1", first: int = 0, **more: Any) -> Hand:
        items = [(idx, f"payload {idx}") for idx in range(first, first + count)]
        return self.do(self.dispatch.submit(self.now, call_id, FN, items, **more))

    def output(self, container_id: str, idx: int = 0, status: str = "ok", attempt: int = 0, call: str = "fc-1") -> Hand:
        return self.do(self.dispatch.output(self.now, container_id, call, idx, status, attempt, f"result {idx}"))

    def gone(self, container_id: str, reason: str = "exited with code 3", **more: Any) -> Hand:
        return self.do(self.dispatch.container_gone(self.now, container_id, reason, **more))

    def at(self, now: float) -> Hand:
        self.now = now
        return self.do(self.dispatch.tick(now))

    def of(self, kind: type[Any]) -> list[Any]:
        return [instruction for instruction in self.last if isinstance(instruction, kind)]

    @property
    def pushed(self) -> list[tuple[str, list[int]]]:
        return [(push.container_id, [input_.idx for input_ in push.inputs]) for push in self.of(Push)]

    def status(self, idx: int = 0, call_id: str = "fc-1") -> str:
        finish = self.finished.get((call_id, idx))
        return finish.status if finish is not None else ""

    def input(self, idx: int = 0, call_id: str = "fc-1") -> Input:
        return self.dispatch.calls[call_id].inputs[idx]


# ---- queue and slots --------------------------------------------------------------------------------------------


def test_input_is_pushed_at_once_when_a_container_is_free() -> None:
    assert Hand().container("co-1").submit().pushed == [("co-1", [0])]


def test_input_waits_and_demand_is_announced_when_no_container_is_there() -> None:
    hand = Hand().submit()
    assert hand.pushed == [] and [d.function_id for d in hand.of(DemandChanged)] == [FN]
    assert hand.container("co-1").pushed == [("co-1", [0])]


def test_inputs_of_a_function_are_pushed_first_in_first_out() -> None:
    hand = Hand().container("co-1").submit(3)
    order = [0]
    for _ in range(2):
        order += hand.output("co-1", order[-1]).pushed[0][1]
    assert order == [0, 1, 2]


def test_several_slots_are_filled_with_one_push() -> None:
    assert Hand(concurrency=3).container("co-1").submit(5).pushed == [("co-1", [0, 1, 2])]


def test_slots_that_came_free_in_one_frame_are_filled_with_one_push() -> None:
    hand = Hand(concurrency=3).container("co-1").submit(6)
    results = [("fc-1", idx, "ok", 0, None) for idx in range(3)]
    assert hand.do(hand.dispatch.outputs(1.0, "co-1", results)).pushed == [("co-1", [3, 4, 5])]


def test_most_recently_used_container_is_taken_first() -> None:
    hand = Hand().container("co-1").container("co-2").submit(2)
    hand.output("co-2", 0).output("co-1", 1)
    assert hand.submit(call_id="fc-2").pushed == [("co-1", [0])]


def test_result_ends_an_input_with_what_the_event_carried() -> None:
    hand = Hand().container("co-1").submit().output("co-1")
    assert hand.finished["fc-1", 0].output == "result 0" and hand.status() == "ok"
    assert hand.dispatch.calls == {}


def test_repeated_submit_of_a_known_idx_is_harmless() -> None:
    hand = Hand().container("co-1").submit(2, last=False).output("co-1", 0).submit(2)
    assert hand.pushed == []
    hand.output("co-1", 1)
    assert len(hand.finished) == 2 and hand.dispatch.calls == {}


def test_done_marks_of_a_long_call_do_not_grow_with_it() -> None:
    hand = Hand(concurrency=50).container("co-1").submit(1000, last=False)
    call = hand.dispatch.calls["fc-1"]
    while call.inputs:
        running = list(hand.dispatch.functions[FN].running)
        for input_ in reversed(running):
            hand.dispatch.output(1.0, "co-1", "fc-1", input_.idx, "ok", 0)
        assert len(call.done_ahead or ()) <= 100
    assert call.done_below == 1000 and not call.done_ahead


def test_input_is_rejected_when_too_many_wait() -> None:
    hand = Hand(max_pending=2).container("co-1").submit(4)
    assert [hand.status(idx) for idx in range(4)] == ["", "", "", "rejected"]
    assert "2 inputs" in hand.finished["fc-1", 3].message


def test_input_for_an_unknown_function_is_rejected() -> None:
    hand = Hand()
    hand.do(hand.dispatch.submit(0.0, "fc-1", "fu-none", [(0, None)]))
    assert hand.status() == "rejected" and "fu-none" in hand.finished["fc-1", 0].message


def test_what_no_node_can_hold_is_rejected_with_the_reason() -> None:
    hand = Hand().submit(2)
    hand.do(hand.dispatch.reject_queued(0.0, FN, "no node has a GPU"))
    assert hand.status(0) == hand.status(1) == "rejected"


# ---- fencing ----------------------------------------------------------------------------------------------------


def test_second_result_of_an_input_is_ignored() -> None:
    hand = Hand().container("co-1").submit(1, last=False).output("co-1").output("co-1", status="error")
    assert hand.status() == "ok" and hand.dispatch.stale_outputs == 1


def test_result_of_an_old_attempt_is_ignored() -> None:
    hand = Hand().container("co-1").submit().gone("co-1", fault="infra").container("co-2")
    hand.output("co-1", attempt=0)
    assert hand.status() == ""
    assert hand.output("co-2", attempt=0).status() == "" and hand.output("co-2", attempt=1).status() == "ok"


def test_result_from_a_container_that_does_not_hold_the_input_is_ignored() -> None:
    hand = Hand().container("co-1").submit().container("co-2").output("co-2")
    assert hand.status() == "" and hand.pushed == []


def test_runner_cannot_declare_statuses_that_are_the_servers() -> None:
    hand = Hand().container("co-1").submit().output("co-1", status="rejected")
    assert hand.status() == "error"


def test_result_from_an_unknown_container_for_a_waiting_input_is_ignored() -> None:
    hand = Hand().submit().output("co-none")
    assert hand.status() == "" and hand.input().state == "queued"


# ---- retries ----------------------------------------------------------------------------------------------------


def test_error_is_final_without_retries() -> None:
    hand = Hand().container("co-1").submit().output("co-1", status="error")
    assert hand.status() == "error" and hand.finished["fc-1", 0].output == "result 0"


def test_error_is_retried_after_growing_delays() -> None:
    hand = Hand(max_retries=2, initial_delay=1.0, backoff_coefficient=3.0, max_delay=60.0).container("co-1").submit()
    assert hand.output("co-1", status="error", attempt=0).pushed == []
    assert hand.at(0.9).pushed == [] and hand.at(1.0).pushed == [("co-1", [0])]
    hand.output("co-1", status="error", attempt=1)
    assert hand.at(3.9).pushed == [] and hand.at(4.0).pushed == [("co-1", [0])]
    assert hand.output("co-1", status="error", attempt=2).status() == "error"


@pytest.mark.parametrize(("failures", "delay"), [(1, 1.0), (2, 2.0), (3, 4.0), (10, 60.0), (10_000, 60.0)])
def test_retry_delay_is_bounded(failures: int, delay: float) -> None:
    options = FunctionOptions(max_retries=9, backoff_coefficient=2.0, initial_delay=1.0, max_delay=60.0)
    assert options.retry_delay(failures) == delay


def test_infrastructure_failure_is_retried_at_once_and_at_no_cost() -> None:
    hand = Hand().container("co-0").submit(2)
    for number in range(brain.INFRA_RETRIES):
        hand.gone(f"co-{number}", "was lost with its node", fault="infra")
        assert hand.container(f"co-{number + 1}").pushed == [(f"co-{number + 1}", [0])]
    hand.gone(f"co-{brain.INFRA_RETRIES}", "was lost with its node", fault="infra")
    assert hand.status() == "lost" and "was lost with its node (9 attempts)" in hand.finished["fc-1", 0].message


def test_input_that_kills_its_container_gets_one_more_try_and_then_fails_by_name() -> None:
    hand = Hand().container("co-1").submit().gone("co-1")
    assert hand.status() == "" and hand.container("co-2").gone("co-2", hint="look").status() == "lost"
    finish = hand.finished["fc-1", 0]
    assert finish.message == "its container exited with code 3 (2 attempts)" and finish.hint == "look"


def test_users_retries_hold_for_crashes_too() -> None:
    hand = Hand(max_retries=3, initial_delay=0.0).container("co-0").submit()
    for number in range(3):
        assert hand.gone(f"co-{number}").status() == ""
        hand.container(f"co-{number + 1}")
    assert hand.gone("co-3").status() == "lost"


def test_other_inputs_proceed_before_a_crashed_one_is_tried_again() -> None:
    hand = Hand().container("co-1").submit(3).gone("co-1")
    assert hand.container("co-2").pushed == [("co-2", [1])]
    assert hand.output("co-2", 1).pushed == [("co-2", [2])]
    assert hand.output("co-2", 2).pushed == [("co-2", [0])]


def test_inputs_that_shared_a_dead_container_are_tried_again_alone() -> None:
    hand = Hand(concurrency=3).container("co-1").submit(3).gone("co-1").container("co-2")
    assert hand.pushed == [("co-2", [0])]
    assert hand.gone("co-2").container("co-3").pushed == [("co-3", [1])]
    assert hand.output("co-3", 1, attempt=1).pushed == [("co-3", [2])]
    assert hand.output("co-3", 2, attempt=1).pushed == [("co-3", [0])]
    assert hand.gone("co-3").status() == "lost" and hand.status(1) == hand.status(2) == "ok"


def test_busy_container_empties_itself_for_an_input_that_must_run_alone() -> None:
    hand = Hand(concurrency=2).container("co-1").container("co-2").submit(4).gone("co-2").submit(2, "fc-2")
    assert hand.output("co-1", 2).pushed == []
    assert hand.output("co-1", 3).pushed == [("co-1", [0])]
    assert hand.output("co-1", 0, attempt=1).pushed == [("co-1", [1])]
    assert hand.output("co-1", 1, attempt=1).pushed == [("co-1", [0, 1])]


def test_generator_that_has_yielded_is_not_tried_again() -> None:
    hand = Hand(is_generator=True, max_retries=5).container("co-1").submit()
    assert hand.dispatch.yielded("co-1", "fc-1", 0, 0) is hand.input()
    assert hand.gone("co-1", fault="infra").status() == "lost"


def test_yield_of_an_old_attempt_is_refused() -> None:
    hand = Hand(is_generator=True).container("co-1").submit().gone("co-1", fault="infra").container("co-2")
    assert hand.dispatch.yielded("co-1", "fc-1", 0, 0) is None
    assert hand.dispatch.yielded("co-2", "fc-1", 0, 1) is not None


# ---- timeouts ---------------------------------------------------------------------------------------------------


def test_attempt_that_takes_too_long_ends_with_its_container() -> None:
    hand = Hand(timeout=5.0).container("co-1").submit()
    assert hand.dispatch.next_deadline() == 5.0
    assert hand.at(4.9).status() == "" and hand.at(5.0).status() == "timeout"
    assert [kill.container_id for kill in hand.of(KillContainer)] == ["co-1"]
    assert "5 s" in hand.finished["fc-1", 0].message


def test_each_attempt_has_a_fresh_timeout() -> None:
    hand = Hand(timeout=5.0, max_retries=1, initial_delay=1.0).container("co-1").submit().at(5.0)
    hand.gone("co-1").at(6.0).container("co-2")
    assert hand.at(10.9).status() == "" and hand.at(11.0).status() == "timeout"


def test_no_timeout_ends_what_runs_where_somebody_sits_at_a_terminal() -> None:
    hand = Hand(timeout=5.0, concurrency=2).container("co-1").container("co-2").submit(3)
    hand.dispatch.attend(1.0, "co-1", True)
    assert [hand.at(60.0).status(idx) for idx in range(3)] == ["timeout", "timeout", ""]
    hand.dispatch.attend(61.0, "co-1", False)
    assert hand.at(65.9).status(2) == "" and hand.at(66.0).status(2) == "timeout"


def test_no_startup_timeout_ends_where_somebody_sits_at_a_terminal() -> None:
    hand = Hand(startup_timeout=5.0).submit()
    hand.do(hand.dispatch.container_starting(0.0, "co-1", FN))
    hand.dispatch.attend(1.0, "co-1", True)
    assert not hand.at(60.0).of(KillContainer)
    hand.dispatch.attend(61.0, "co-1", False)
    assert hand.at(66.0).of(KillContainer)


def test_terminal_in_a_container_that_is_gone_is_nothing() -> None:
    Hand().dispatch.attend(1.0, "co-9", True)


def test_bystanders_of_a_timeout_are_requeued_at_no_cost() -> None:
    hand = Hand(timeout=5.0, concurrency=2).container("co-1").submit()
    hand.now = 3.0
    hand.submit(call_id="fc-2").at(5.0)
    assert hand.status() == "timeout" and hand.status(0, "fc-2") == ""
    assert hand.input(0, "fc-2").failures == 0 and hand.container("co-2").pushed == [("co-2", [0])]


def test_time_in_the_queue_does_not_count() -> None:
    hand = Hand(timeout=5.0).submit().at(100.0).container("co-1")
    assert hand.at(104.0).status() == "" and hand.output("co-1").status() == "ok"


def test_shorter_timeout_holds_for_what_is_running() -> None:
    hand = Hand(timeout=100.0).container("co-1").submit()
    hand.do(hand.dispatch.update_function(1.0, FN, FunctionOptions(timeout=2.0)))
    assert hand.at(2.0).status() == "timeout"


def test_timers_do_not_pile_up_with_inputs() -> None:
    hand = Hand().container("co-1")
    for number in range(500):
        hand.now = number / 100
        hand.submit(call_id=f"fc-{number}").output("co-1", call=f"fc-{number}")
    assert len(hand.dispatch._timers) <= 3


# ---- cancels ----------------------------------------------------------------------------------------------------


def test_cancel_ends_waiting_inputs_at_once_and_asks_running_ones() -> None:
    hand = Hand().container("co-1").submit(3)
    hand.do(hand.dispatch.cancel(0.0, "fc-1", None, "the caller asked"))
    assert [hand.status(idx) for idx in range(3)] == ["", "cancelled", "cancelled"]
    assert [(cancel.container_id, cancel.input.idx) for cancel in hand.of(CancelRunning)] == [("co-1", 0)]
    assert hand.output("co-1", status="cancelled").status() == "cancelled"


def test_result_that_was_under_way_wins_over_a_cancel() -> None:
    hand = Hand().container("co-1").submit()
    hand.do(hand.dispatch.cancel(0.0, "fc-1", [0], "the caller asked"))
    assert hand.output("co-1").status() == "ok"


def test_cancelled_input_is_not_retried() -> None:
    hand = Hand(max_retries=5).container("co-1").submit()
    hand.do(hand.dispatch.cancel(0.0, "fc-1", [0], "the caller asked"))
    assert hand.output("co-1", status="error").status() == "cancelled"


def test_container_that_does_not_answer_a_cancel_is_killed() -> None:
    hand = Hand().container("co-1").submit()
    hand.do(hand.dispatch.cancel(0.0, "fc-1", [0], "the caller asked"))
    assert hand.at(brain.CANCEL_GRACE - 0.1).status() == ""
    assert hand.at(brain.CANCEL_GRACE).status() == "cancelled" and hand.of(KillContainer)


def test_terminating_cancel_kills_containers_and_requeues_the_neighbours() -> None:
    hand = Hand(concurrency=2).container("co-1").submit().submit(call_id="fc-2")
    hand.do(hand.dispatch.cancel(0.0, "fc-1", None, "the caller asked", terminate=True))
    assert hand.status() == "cancelled" and hand.status(0, "fc-2") == "" and hand.of(KillContainer)
    assert hand.gone("co-1").container("co-2").pushed == [("co-2", [0])]


def test_input_in_backoff_can_be_cancelled() -> None:
    hand = Hand(max_retries=1).container("co-1").submit().output("co-1", status="error")
    hand.do(hand.dispatch.cancel(0.0, "fc-1", None, "the caller asked"))
    assert hand.status() == "cancelled" and hand.at(1.0).pushed == []


def test_calls_end_with_their_owner_except_spawned_ones() -> None:
    hand = Hand().submit(2, owner="client", kind="map").submit(1, "fc-2", owner="client", kind="spawn")
    hand.do(hand.dispatch.owner_gone(0.0, "client", "the caller went away"))
    assert hand.status(0) == hand.status(1) == "cancelled"
    assert hand.container("co-1").pushed == [("co-1", [0])] and list(hand.dispatch.calls) == ["fc-2"]


def test_cancelled_inputs_leave_the_queue() -> None:
    hand = Hand()
    for number in range(20):
        hand.submit(100, f"fc-{number}")
        hand.do(hand.dispatch.cancel(0.0, f"fc-{number}", None, "the caller asked"))
    assert len(hand.dispatch.functions[FN].queue) <= 64


# ---- draining, closing ------------------------------------------------------------------------------------------


def test_idle_container_is_stopped_when_drained() -> None:
    hand = Hand().container("co-1")
    hand.do(hand.dispatch.drain(0.0, "co-1", "idle"))
    assert [(stop.container_id, stop.reason) for stop in hand.of(StopContainer)] == [("co-1", "idle")]
    assert hand.submit().pushed == []


def test_busy_container_is_stopped_when_its_inputs_have_ended() -> None:
    hand = Hand().container("co-1").submit(2)
    assert hand.do(hand.dispatch.drain(0.0, "co-1", "not needed")).of(StopContainer) == []
    hand.output("co-1")
    assert hand.status() == "ok" and hand.pushed == [] and len(hand.of(StopContainer)) == 1


def test_single_use_container_runs_one_input_and_is_stopped() -> None:
    hand = Hand(single_use=True, concurrency=4).container("co-1").submit(2)
    assert hand.pushed == [("co-1", [0])]
    assert hand.output("co-1").pushed == [] and [s.reason for s in hand.of(StopContainer)] == ["used once"]


def test_closed_function_cancels_everything_and_stops_its_containers() -> None:
    hand = Hand(max_retries=1).container("co-1").submit(3).output("co-1", status="error")
    hand.do(hand.dispatch.close_function(0.0, FN, "the app ended"))
    assert [hand.status(idx) for idx in range(3)] == ["cancelled"] * 3 and len(hand.of(StopContainer)) == 1
    assert hand.submit(call_id="fc-2").status(0, "fc-2") == "rejected"
    hand.gone("co-1")
    assert hand.dispatch.functions == {} and hand.dispatch.calls == {}


def test_container_that_nobody_knows_is_killed() -> None:
    hand = Hand()
    assert hand.do(hand.dispatch.container_ready(0.0, "co-none")).of(KillContainer)
    assert hand.do(hand.dispatch.container_starting(0.0, "co-1", "fu-none")).of(KillContainer)


# ---- starts that fail -------------------------------------------------------------------------------------------


def failed_start(hand: Hand, container_id: str, **more: Any) -> Hand:
    hand.do(hand.dispatch.container_starting(hand.now, container_id, FN))
    return hand.gone(container_id, **more)


def test_failed_import_fails_what_waits_at_once_with_the_exception() -> None:
    hand = failed_start(Hand().submit(2), "co-1", reason="failed to import", init_error=b"packed")
    assert hand.status(0) == hand.status(1) == "init_error" and hand.finished["fc-1", 0].output == b"packed"
    assert "failed to import" in hand.finished["fc-1", 0].message


def test_what_comes_while_starts_fail_is_told_so_and_the_next_try_is_fresh() -> None:
    hand = failed_start(Hand().submit(), "co-1", init_error=b"packed")
    assert hand.submit(call_id="fc-2").status(0, "fc-2") == "init_error"
    assert hand.at(brain.START_DELAY).of(DemandChanged)
    assert hand.submit(call_id="fc-3").status(0, "fc-3") == ""
    assert hand.container("co-2").pushed == [("co-2", [0])]


def test_crashing_starts_fail_what_waits_after_three_tries_within_five_seconds() -> None:
    hand = Hand().submit()
    while not hand.status():
        hand.at(max(hand.now, hand.dispatch.functions[FN].blocked_until))
        failed_start(hand, f"co-{hand.now}")
    assert hand.status() == "init_error" and hand.now < 5.0
    assert "exited with code 3 (3 attempts)" in hand.finished["fc-1", 0].message


def test_containers_of_one_wave_count_as_one_failure() -> None:
    hand = Hand().submit()
    for number in range(8):
        hand.do(hand.dispatch.container_starting(0.0, f"co-{number}", FN))
    for number in range(8):
        hand.gone(f"co-{number}")
    assert hand.status() == "" and hand.dispatch.functions[FN].start_failures == 1


def test_delays_between_failing_starts_grow_and_are_announced() -> None:
    hand = Hand()
    delays = []
    for number in range(9):
        failed_start(hand, f"co-{number}")
        assert "exited with code 3" in hand.of(Notice)[0].message
        delays.append(hand.dispatch.functions[FN].blocked_until - hand.now)
        hand.at(hand.dispatch.functions[FN].blocked_until)
    assert delays == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]


def test_nothing_fails_for_a_start_while_another_container_is_ready() -> None:
    hand = failed_start(Hand().container("co-1").submit(2), "co-2", init_error=b"packed")
    assert hand.status(0) == hand.status(1) == "" and hand.output("co-1").pushed == [("co-1", [1])]


def test_node_lost_during_starts_fails_nothing() -> None:
    hand = Hand().submit()
    for number in range(5):
        failed_start(hand, f"co-{number}", fault="infra")
        hand.at(hand.now + 1)
    assert hand.status() == "" and hand.dispatch.functions[FN].start_failures == 0


def test_start_that_takes_too_long_is_killed_and_counts_as_failed() -> None:
    hand = Hand(startup_timeout=10.0).submit()
    hand.do(hand.dispatch.container_starting(0.0, "co-1", FN))
    assert hand.at(9.9).of(KillContainer) == []
    assert [kill.container_id for kill in hand.at(10.0).of(KillContainer)] == ["co-1"]
    assert hand.dispatch.functions[FN].start_failures == 1
    assert hand.gone("co-1").dispatch.functions[FN].start_failures == 1


# ---- demand -----------------------------------------------------------------------------------------------------


def test_flood_of_single_inputs_asks_the_autoscaler_rarely() -> None:
    hand = Hand()
    asked = sum(len(hand.submit(call_id=f"fc-{n}").of(DemandChanged)) for n in range(2000))
    assert 16 <= asked <= 80


def test_demand_is_what_is_there() -> None:
    hand = Hand(concurrency=2, max_retries=1).container("co-1").container("co-2").submit(6)
    hand.output("co-2", 0, status="error")
    hand.do(hand.dispatch.container_starting(0.0, "co-3", FN))
    demand = hand.dispatch.demand(0.0, FN)
    assert (demand.backlog, demand.running, demand.waiting) == (1, 4, 1)
    assert (demand.ready, demand.starting, demand.draining, demand.headroom) == (2, 1, 0, 0)


def test_demand_lists_idle_containers_longest_idle_first() -> None:
    hand = Hand().container("co-1").container("co-2").submit(2)
    for now, container_id, idx in ((1.0, "co-2", 0), (2.0, "co-1", 1)):
        hand.now = now
        hand.do(hand.dispatch.output(now, container_id, "fc-1", idx, "ok", 0))
    assert hand.dispatch.demand(3.0, FN).idle == (("co-2", 1.0), ("co-1", 2.0))
