"""How many containers a function gets, and why."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from squall.server.autoscaler import CONTAINER_LIMIT, EAGER_STARTS, FIRST_STARTS, PROBE_RUN_S, PROBE_S, Decision, decide
from squall.server.demand import Demand
from squall.server.inputs import FunctionOptions


def asked(now: float = 100.0, options: FunctionOptions | None = None, **demand: Any) -> Decision:
    return decide(now, Demand("fu-1", **demand), options or FunctionOptions())


def idle(count: int, since: float = 0.0) -> dict[str, Any]:
    return {"ready": count, "idle": tuple((f"co-{number}", since + number) for number in range(count))}


# ---- up ---------------------------------------------------------------------------------------------------------


def test_first_input_starts_a_container_at_once() -> None:
    assert asked(backlog=1).start == 1


def test_each_waiting_input_gets_a_slot_while_nothing_is_known() -> None:
    assert asked(backlog=4).start == 4
    assert asked(backlog=8, starting=1, oldest=0.0).start == 7
    assert asked(backlog=8, slots=3).start == 3


def test_containers_under_way_are_not_started_again() -> None:
    assert asked(backlog=8, starting=8, oldest=0.0).start == 0
    assert asked(backlog=8, starting=5, oldest=0.0).start == 3


def test_busy_slots_do_not_serve_the_backlog() -> None:
    assert asked(backlog=4, running=4, ready=4, exec_time=10.0).start == 4


def test_max_containers_holds_and_draining_ones_count() -> None:
    options = FunctionOptions(max_containers=3)
    assert asked(options=options, backlog=50).start == 3
    decision = asked(options=options, backlog=50, ready=1, draining=1)
    assert decision.start == 1 and "max_containers=3" in decision.reason
    assert asked(options=options, backlog=50, ready=2, draining=1).start == 0


def test_min_containers_start_without_any_input() -> None:
    decision = asked(options=FunctionOptions(min_containers=2))
    assert (decision.start, decision.target) == (2, 2) and "min_containers=2" in decision.reason


def test_buffer_is_kept_only_while_there_is_something_to_do() -> None:
    options = FunctionOptions(buffer_containers=2)
    assert asked(options=options, running=1, ready=1, exec_time=1.0).start == 2
    assert asked(options=options).start == 0


def test_ten_thousand_tiny_inputs_start_none_beside_eight_warm_containers() -> None:
    assert asked(backlog=10_000, running=8, ready=8, exec_time=0.0008, cold_start=0.05).start == 0
    assert asked(backlog=10_000, running=8, ready=8, exec_time=0.0016, cold_start=0.05).start == 0


def test_tiny_inputs_still_start_a_first_container() -> None:
    assert asked(backlog=1, exec_time=0.0001).start == 1


def test_short_inputs_get_only_containers_that_start_sooner_than_the_rest_drains() -> None:
    assert asked(backlog=100, exec_time=0.05, cold_start=0.5).target == 10
    assert asked(backlog=100, exec_time=5.0, cold_start=0.5).start == 100
    assert asked(backlog=100, exec_time=5.0, cold_start=5e-324).start == 100


def test_single_use_containers_start_for_each_input_however_tiny_it_is() -> None:
    options = FunctionOptions(single_use=True)
    assert asked(options=options, backlog=100, exec_time=0.0005, cold_start=0.02).start == 100


def test_inputs_that_turn_out_long_are_believed_before_they_end() -> None:
    forgotten: dict[str, Any] = {"backlog": 40, "running": 2, "ready": 2, "exec_time": 0.001}
    assert asked(**forgotten).start == 0
    assert asked(**forgotten, stalled_for=1.0).start == 40


def test_starts_under_way_are_bounded_until_something_is_known() -> None:
    assert asked(backlog=10_000, starting=1, oldest=0.0).start == EAGER_STARTS - 1
    assert asked(backlog=10_000, starting=EAGER_STARTS, oldest=0.0).start == 0
    assert asked(backlog=500, ready=10, running=10, stalled_for=2.0, oldest=0.0).start == 500


def test_a_flood_gets_a_few_containers_first_and_the_others_as_soon_as_it_may_not_be_tiny() -> None:
    first = asked(backlog=10_000)
    assert (first.start, first.again) == (FIRST_STARTS, PROBE_S)
    starting = asked(now=100.0, backlog=10_000, starting=FIRST_STARTS, oldest=100.0 - PROBE_S / 2)
    assert starting.start == 0 and 0 < starting.again <= PROBE_S and "how long an input takes" in starting.reason
    late = asked(now=100.0, backlog=10_000, starting=FIRST_STARTS, oldest=99.0)
    assert late.start == EAGER_STARTS - FIRST_STARTS and late.again == 0
    began = asked(
        now=100.0,
        backlog=9_999,
        running=1,
        ready=1,
        starting=FIRST_STARTS - 1,
        oldest=99.0,
        stalled_for=PROBE_RUN_S / 2,
    )
    assert began.start == 0 and 0 < began.again <= PROBE_RUN_S
    is_long = asked(now=100.0, backlog=9_999, running=1, ready=1, starting=3, oldest=99.9, stalled_for=PROBE_RUN_S)
    assert is_long.start > 1_000 and is_long.again == 0
    known = asked(now=100.0, backlog=50, running=1, ready=1, starting=3, oldest=100.0, exec_time=10.0)
    assert known.start == 47


def test_containers_that_are_wanted_in_any_case_do_not_wait_for_the_first_ones() -> None:
    assert asked(options=FunctionOptions(min_containers=20)).start == 20
    assert asked(options=FunctionOptions(single_use=True), backlog=30).start == 30


def test_inputs_that_must_run_alone_get_a_container_each() -> None:
    assert asked(backlog=10, alone=4, slots=10, oldest=0.0, starting=1).start == 4


def test_no_start_before_the_delay_after_a_failed_one() -> None:
    decision = asked(backlog=5, blocked_until=102.0, blocked_reason="a container exited with code 3")
    assert decision.start == 0 and "2.0 s" in decision.reason and "code 3" in decision.reason


def test_containers_start_one_at_a_time_after_a_failed_start() -> None:
    assert asked(backlog=5, start_failures=1).start == 1
    assert asked(backlog=5, start_failures=1, starting=1).start == 0


# ---- down -------------------------------------------------------------------------------------------------------


def test_container_idle_for_the_window_stops() -> None:
    assert asked(now=59.9, **idle(1)).stop == ()
    decision = asked(now=60.0, **idle(1))
    assert decision.stop == ("co-0",) and "scaledown_window=60 s" in decision.reason


def test_longest_idle_stop_first() -> None:
    assert asked(now=61.5, **idle(4)).stop == ("co-0", "co-1")


def test_min_containers_never_stop() -> None:
    assert asked(now=1000.0, options=FunctionOptions(min_containers=2), **idle(5)).stop == ("co-0", "co-1", "co-2")


def test_buffer_stays_while_something_runs_and_goes_afterwards() -> None:
    options = FunctionOptions(buffer_containers=1)
    busy: dict[str, Any] = {"ready": 3, "running": 1, "idle": (("co-1", 0.0), ("co-2", 1.0))}
    assert asked(now=1000.0, options=options, **busy).stop == ("co-1",)
    assert len(asked(now=1000.0, options=options, **idle(2)).stop) == 2


def test_more_than_the_maximum_stop_without_waiting_for_the_window() -> None:
    decision = asked(now=10.0, options=FunctionOptions(max_containers=1), **idle(3))
    assert decision.stop == ("co-0", "co-1") and "max_containers=1" in decision.reason


def test_stopped_function_starts_nothing() -> None:
    assert asked(options=FunctionOptions(min_containers=3), closed=True).start == 0


# ---- always -----------------------------------------------------------------------------------------------------

COUNTS = st.integers(0, 60)


@st.composite
def demands(draw: st.DrawFn) -> Demand:
    ready = draw(COUNTS)
    idle_ones = tuple((f"co-{number}", draw(st.floats(0, 200))) for number in range(draw(st.integers(0, ready))))
    backlog = draw(st.integers(0, 20_000))
    return Demand(
        "fu-1",
        backlog=backlog,
        running=draw(COUNTS) if ready > len(idle_ones) else 0,
        waiting=draw(COUNTS),
        alone=draw(st.integers(0, backlog)),
        ready=ready,
        starting=draw(COUNTS),
        draining=draw(COUNTS),
        slots=draw(st.integers(1, 100)),
        idle=tuple(sorted(idle_ones, key=lambda one: one[1])),
        exec_time=draw(st.none() | st.floats(0, 1000)),
        stalled_for=draw(st.floats(0, 1000)),
        cold_start=draw(st.none() | st.floats(0, 100)),
        blocked_until=draw(st.floats(0, 200)),
        start_failures=draw(st.integers(0, 5)),
    )


OPTIONS = st.builds(
    FunctionOptions,
    min_containers=st.integers(0, 5),
    max_containers=st.integers(0, 40),
    buffer_containers=st.integers(0, 5),
    scaledown_window=st.floats(0, 100),
)


@given(demands(), OPTIONS)
def test_decision_is_always_within_the_limits_and_has_a_reason(demand: Demand, options: FunctionOptions) -> None:
    decision = decide(100.0, demand, options)
    alive = demand.ready + demand.starting
    limit = options.max_containers or CONTAINER_LIMIT
    assert decision.reason
    assert decision.start >= 0 and not (decision.start and decision.stop)
    assert decision.start == 0 or alive + demand.draining + decision.start <= limit
    assert decision.target == alive + decision.start - len(decision.stop)
    assert set(decision.stop) <= {container_id for container_id, _ in demand.idle}
    if decision.stop:
        assert decision.target >= min(options.min_containers, limit)
    if demand.backlog and not alive and not demand.draining and demand.blocked_until <= 100.0:
        assert decision.start >= 1
