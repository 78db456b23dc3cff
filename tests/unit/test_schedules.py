"""What is due when: missed firings, jumps of the clock, pauses, months, and the hours that come twice or never."""

from __future__ import annotations

from datetime import datetime
from zoneinfo import ZoneInfo

import pytest

from squall.exception import InvalidError
from squall.protocol.messages import FunctionSpec, ScheduleSpec
from squall.server import schedules
from squall.server.schedules import CronRule, Firing, PeriodRule, Rule, State, look

NOON = datetime(2026, 6, 1, 12, 0, tzinfo=ZoneInfo("UTC")).timestamp()
HOUR = 3600.0
MINUTELY = CronRule("* * * * *", "UTC")
HOURLY = CronRule("30 * * * *", "UTC")
DAILY = CronRule("30 11 * * *", "UTC")


def local(text: str, zone: str, *, second_time: bool = False) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone), fold=int(second_time)).timestamp()


def firings(rule: Rule, state: State, *moments: float) -> list[Firing]:
    found = []
    for now in moments:
        state, firing = look(rule, state, now)
        found += [firing] if firing is not None else []
    return found


def test_nothing_is_due_before_its_moment() -> None:
    state, firing = look(MINUTELY, State(NOON), NOON + 59.9)
    assert (state, firing) == (State(NOON), None)


def test_a_moment_is_fired_once() -> None:
    found = firings(MINUTELY, State(NOON), NOON + 60, NOON + 60.5, NOON + 119)
    assert found == [Firing(NOON + 60, 0.0, 0)]
    assert not found[0].is_late


def test_missed_firings_are_made_up_for_by_one_that_says_so() -> None:
    found = firings(MINUTELY, State(NOON), NOON + 600.5, NOON + 601)
    assert found == [Firing(NOON + 600, 0.5, 9)]
    assert found[0].is_late


def test_a_firing_missed_alone_comes_late() -> None:
    found = firings(DAILY, State(NOON - HOUR), NOON)
    assert found == [Firing(NOON - HOUR / 2, HOUR / 2, 0)]
    assert found[0].is_late


def test_many_missed_firings_are_counted_up_to_a_limit() -> None:
    (found,) = firings(MINUTELY, State(NOON - 400 * 86400), NOON)
    assert (found.at, found.missed) == (NOON, schedules.MISSED_COUNTED)


def test_clock_that_jumps_an_hour_ahead_causes_one_firing() -> None:
    found = firings(MINUTELY, State(NOON), NOON + HOUR, NOON + HOUR + 1, NOON + HOUR + 60)
    assert [one.at for one in found] == [NOON + HOUR, NOON + HOUR + 60]


def test_clock_that_jumps_an_hour_back_leaves_out_no_more_than_one_firing() -> None:
    state, _ = look(MINUTELY, State(NOON), NOON + HOUR)
    state, firing = look(MINUTELY, state, NOON)
    assert firing is None
    assert [one.at for one in firings(MINUTELY, state, NOON + 59, NOON + 60, NOON + 120)] == [NOON + 60, NOON + 120]
    assert state.epoch == 1


def test_clock_that_jumps_back_before_a_period_began_does_not_stop_it() -> None:
    rule = PeriodRule({"seconds": 10}, NOON)
    state, firing = look(rule, State(NOON), NOON + 20)
    assert firing is not None
    state, _ = look(rule, state, NOON - 3600 + 25)
    state, firing = look(rule, state, NOON - 3600 + 30)
    assert firing is not None and firing.at == NOON - 3600 + 30 and state.epoch == 1


def test_firing_after_a_jump_back_is_another_call_than_the_one_before_it() -> None:
    assert schedules.firing_call_id("sc-1", NOON, 0) != schedules.firing_call_id("sc-1", NOON, 1)


def test_daily_firing_is_not_repeated_when_the_clock_jumps_back_over_it() -> None:
    state, first = look(DAILY, State(NOON - HOUR), NOON)
    assert first is not None
    state, again = look(DAILY, state, NOON - HOUR)
    assert again is None
    assert [one.at for one in firings(DAILY, state, NOON - HOUR / 2, NOON, NOON + 86400)] == [NOON + 86400 - HOUR / 2]


def test_hourly_firing_is_left_out_once_when_the_clock_jumps_back() -> None:
    state, _ = look(HOURLY, State(NOON), NOON + HOUR / 2)
    found = firings(HOURLY, state, NOON - HOUR / 4, NOON + HOUR / 2, NOON + 1.5 * HOUR)
    assert [one.at for one in found] == [NOON + 1.5 * HOUR]


def test_a_paused_schedule_fires_nothing_and_goes_on_without_what_passed() -> None:
    paused = schedules.pause(State(NOON))
    assert firings(MINUTELY, paused, NOON + 60, NOON + HOUR) == []
    assert schedules.next_firing(MINUTELY, paused, NOON) is None
    resumed = schedules.resume(paused, NOON + HOUR)
    assert [one.missed for one in firings(MINUTELY, resumed, NOON + HOUR + 1, NOON + HOUR + 60)] == [0]


def test_next_firing_is_told_by_the_clock_as_it_is() -> None:
    assert schedules.next_firing(MINUTELY, State(NOON), NOON + 5) == NOON + 60
    assert schedules.next_firing(MINUTELY, State(NOON + HOUR), NOON) == NOON + 60


# ---- daylight saving time: Berlin goes ahead on 2026-03-29 at 2:00 and back on 2026-10-25 at 3:00 ------------------


def test_job_in_the_hour_that_is_left_out_runs_right_after_it() -> None:
    rule = CronRule("30 2 * * *", "Europe/Berlin")
    assert rule.next_after(local("2026-03-28T03:00", "Europe/Berlin")) == local("2026-03-29T03:00", "Europe/Berlin")


def test_job_in_the_hour_that_comes_twice_runs_once() -> None:
    rule = CronRule("30 2 * * *", "Europe/Berlin")
    first = rule.next_after(local("2026-10-24T12:00", "Europe/Berlin"))
    assert first == local("2026-10-25T02:30", "Europe/Berlin")
    assert first is not None
    assert rule.next_after(first) == local("2026-10-26T02:30", "Europe/Berlin")
    assert rule.next_after(local("2026-10-25T02:10", "Europe/Berlin", second_time=True)) == local(
        "2026-10-26T02:30", "Europe/Berlin"
    )


def test_job_of_every_hour_runs_in_both_hours_of_the_same_name() -> None:
    rule = CronRule("30 * * * *", "Europe/Berlin")
    first = local("2026-10-25T02:30", "Europe/Berlin")
    assert rule.next_after(first) == local("2026-10-25T02:30", "Europe/Berlin", second_time=True) == first + HOUR


# ---- periods ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cron", ["1 * L 10 *", "1,2 * 31 10 *"])
def test_a_clock_that_is_set_back_over_midnight_leads_nobody_round_in_circles(cron: str) -> None:
    zone = ZoneInfo("America/St_Johns")  # at 00:01 it became 23:01 of the day before
    rule = CronRule(cron, "America/St_Johns")
    before = datetime(1999, 10, 30, 12, tzinfo=zone).timestamp()
    following = rule.next_after(before)
    assert following is not None
    assert datetime.fromtimestamp(following, zone).date() == datetime(1999, 10, 31).date()
    assert rule.last_until(before) is not None


def test_months_go_by_the_calendar_and_do_not_drift() -> None:
    begin = datetime(2026, 1, 31, 8, tzinfo=ZoneInfo("UTC")).timestamp()
    rule, at, found = PeriodRule({"months": 1}, begin), begin, []
    for _ in range(4):
        at = rule.next_after(at) or 0.0
        found.append(datetime.fromtimestamp(at, ZoneInfo("UTC")).strftime("%m-%d %H"))
    assert found == ["02-28 08", "03-31 08", "04-30 08", "05-31 08"]


def test_first_moment_of_a_period_is_one_period_after_it_began() -> None:
    rule = PeriodRule({"minutes": 5}, NOON)
    assert rule.next_after(NOON) == NOON + 300
    assert rule.last_until(NOON + 300) == NOON + 300


# ---- what the server refuses --------------------------------------------------------------------------------------

BAD = [
    (ScheduleSpec(), "a cron expression or a period"),
    (ScheduleSpec(cron="* * * * *", period={"hours": 1}), "a cron expression or a period"),
    (ScheduleSpec(cron="* * * * * *"), "five fields"),
    (ScheduleSpec(cron="61 * * * *"), "Bad minute"),
    (ScheduleSpec(cron="0 0 30 2 *"), "Bad day-of-month"),
    (ScheduleSpec(cron="0 0 * * *", timezone="Mars/Base"), "no time zone `Mars/Base`"),
    (ScheduleSpec(cron="0 0 * * *", timezone="../../etc/passwd"), "no time zone"),
    (ScheduleSpec(period={"fortnights": 1}), "`fortnights`"),
    (ScheduleSpec(period={"seconds": 0.001}), "out of range"),
    (ScheduleSpec(period={"seconds": float("nan")}), "not a number"),
    (ScheduleSpec(period={"years": 10**9}), "out of range"),
    (ScheduleSpec(period={"hours": 1}, method="f"), "method"),
]


@pytest.mark.parametrize(("spec", "said"), BAD, ids=lambda value: str(value)[:60])
def test_bad_schedule_is_refused_by_the_server(spec: ScheduleSpec, said: str) -> None:
    with pytest.raises(InvalidError, match=said):
        schedules.check_schedules([FunctionSpec("f", schedules=[spec])], NOON)


def test_two_schedules_of_one_function_are_refused() -> None:
    twice = [ScheduleSpec(period={"hours": 1}), ScheduleSpec(cron="* * * * *")]
    with pytest.raises(InvalidError, match="two schedules"):
        schedules.check_schedules([FunctionSpec("f", schedules=twice)], NOON)
