"""What holds of every schedule, whatever its expression, its time zone, and the jumps of the clock."""

from __future__ import annotations

import itertools
from datetime import datetime
from zoneinfo import ZoneInfo

from hypothesis import given, settings
from hypothesis import strategies as st

from squall.server.schedules import CronRule, PeriodRule, Rule, State, firing_call_id, look, next_firing

ZONES = [
    "UTC", "Europe/Berlin", "America/New_York", "America/Sao_Paulo", "Asia/Kolkata", "Asia/Kathmandu", "Africa/Cairo",
    "Australia/Lord_Howe", "Asia/Beirut", "Pacific/Apia", "America/St_Johns", "Africa/Casablanca", "Asia/Gaza",
]  # fmt: skip
begins = st.floats(946_684_800, 2_208_988_800).map(lambda at: round(at, 3))  # the years 2000 to 2039


def field(low: int, high: int) -> st.SearchStrategy[str]:
    number = st.integers(low, high)
    ranges = st.tuples(number, number).map(lambda pair: f"{min(pair)}-{max(pair)}")
    steps = st.integers(1, high).map(lambda step: f"*/{step}")
    return st.one_of(
        st.just("*"), number.map(str), ranges, steps, st.tuples(number, number).map(lambda p: f"{p[0]},{p[1]}")
    )


days = st.one_of(st.just("*"), st.integers(1, 28).map(str), st.just("L"))
crons = st.tuples(field(0, 59), field(0, 23), days, st.one_of(st.just("*"), st.just("3,10")), field(0, 7)).map(" ".join)
cron_rules = st.builds(CronRule, crons, st.sampled_from(ZONES))
periods = st.fixed_dictionaries(
    {"seconds": st.floats(1, 4000).map(lambda value: round(value, 3))},
    optional={"months": st.integers(0, 14), "days": st.integers(0, 40), "hours": st.integers(0, 30)},
)
rules: st.SearchStrategy[Rule] = st.one_of(cron_rules, st.builds(PeriodRule, periods, begins))


@settings(max_examples=100, deadline=None)
@given(rules, begins)
def test_moments_come_one_after_the_other(rule: Rule, at: float) -> None:
    for _ in range(5):
        following = rule.next_after(at)
        if following is None:
            return
        assert following > at
        at = following


@settings(max_examples=100, deadline=None)
@given(rules, begins, st.floats(0, 1))
def test_the_last_moment_until_a_time_has_none_after_it(rule: Rule, at: float, part: float) -> None:
    following = rule.next_after(at)
    assert following is not None
    found = rule.last_until(following)
    assert found == following
    between = rule.last_until(at + (following - at) * part * 0.999)
    assert between is None or between <= at


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 59), st.integers(0, 23), st.sampled_from(ZONES), begins)
def test_daily_job_runs_once_on_each_day_of_its_zone(minute: int, hour: int, zone: str, at: float) -> None:
    rule, seen = CronRule(f"{minute} {hour} * * *", zone), []
    for _ in range(20):
        following = rule.next_after(at)
        assert following is not None
        at = following
        seen.append(datetime.fromtimestamp(at, ZoneInfo(zone)).date())
    assert len(set(seen)) == len(seen)
    gaps = {(after - before).days for before, after in itertools.pairwise(seen)}
    assert gaps <= {1} or zone == "Pacific/Apia"  # which once left out a whole day


jumps = st.lists(
    st.one_of(
        st.floats(0.2, 100),
        st.floats(0.2, 2),
        st.sampled_from([3600.0, -3600.0, 86400.0, -86400.0, -0.3, 30 * 86400.0]),
    ),
    min_size=1,
    max_size=60,
)


@settings(max_examples=100, deadline=None)
@given(rules, begins, jumps)
def test_clock_that_jumps_causes_no_storm_and_no_call_twice(rule: Rule, begin: float, steps: list[float]) -> None:
    state, now, calls = State(begin), begin, set()
    for step in steps:
        now += step
        state, firing = look(rule, state, now)
        assert look(rule, state, now)[1] is None, "one look, at most one firing"
        if firing is not None:
            assert firing.at <= now and firing.late == now - firing.at
            call_id = firing_call_id("sc-1", firing.at, state.epoch)
            assert call_id not in calls
            calls.add(call_id)


@settings(max_examples=100, deadline=None)
@given(rules, begins, st.floats(-90_000, 90_000))
def test_after_a_jump_no_more_than_one_moment_is_left_out(rule: Rule, begin: float, jump: float) -> None:
    due = rule.next_after(begin)
    if due is None:
        return
    state, _ = look(rule, State(begin), due)
    now = due + jump
    state, _ = look(rule, state, now)
    first = rule.next_after(now)
    second = None if first is None else rule.next_after(first)
    following = next_firing(rule, state, now)
    assert second is None or following in (first, second)


@settings(max_examples=60, deadline=None)
@given(rules, begins, st.floats(1, 4e7))
def test_server_that_was_away_fires_once_at_most(rule: Rule, begin: float, away: float) -> None:
    now = begin + away
    expected = rule.next_after(begin)
    state, firing = look(rule, State(begin), now)
    assert (firing is None) == (expected is None or expected > now)
    assert look(rule, state, now)[1] is None
