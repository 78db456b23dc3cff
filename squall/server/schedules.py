"""BRAIN: from a schedule, what was done so far, and the time: what is due, and what comes next.

Pure: no clock, no I/O, no waiting; all times are seconds since 1970 as a wall clock shows them, because that is what
schedules are about. The clock may jump, and the server may have been away, so these hold of every schedule:

- No moment is fired twice, and never before it has come.
- Moments that were missed, whyever, are made up for by one firing, for the latest of them, which says how many.
- When the clock was set back over at most one moment already fired, that one is left out; over several, the schedule
  goes on by the new clock, in a new *epoch*. So a jump back costs one firing at most.
- Changes to and from daylight saving time are those of Debian's cron, by the library that knows them (`cronsim`).

The hand is `firings`. Tested in `tests/unit/test_schedules.py` and `test_schedule_properties.py`.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Protocol

from squall.exception import InvalidError
from squall.protocol.messages import FunctionSpec, ScheduleSpec

if TYPE_CHECKING:
    from cronsim import CronSim

OVERLAP_LIMIT = 10
"""Firings of one schedule that may be unfinished; what is due beyond is left out and counted."""
MISSED_COUNTED = 100
"""Of more missed moments it is only said that there were this many."""
LATE_AFTER_S = 60.0
SHORTEST_PERIOD_S = 1.0
LONGEST_PERIOD_S = 101 * 366 * 86400.0
MONTH_S = 30.436875 * 86400
_LOOK_BACK_S = (3600.0, 86400.0, 32 * 86400.0, 367 * 86400.0, 5 * 366 * 86400.0, 41 * 366 * 86400.0)
_TICKS = 5000
"""Steps of a search for the next moment; a real one takes hundreds."""
_STUCK_TRIES = 3
_UNIT_S = {"weeks": 604800.0, "days": 86400.0, "hours": 3600.0, "minutes": 60.0, "seconds": 1.0}
_UNIT_MONTHS = {"years": 12, "months": 1}


class Rule(Protocol):
    """The moments of a schedule."""

    def next_after(self, at: float) -> float | None:
        """The first moment after `at`; None when there is none."""

    def last_until(self, at: float) -> float | None:
        """The latest moment that is not after `at`."""


@dataclass(frozen=True)
class State:
    """All that must be remembered of a schedule."""

    last: float
    """Everything until here is dealt with: fired, left out, or before its time."""
    epoch: int = 0
    paused: bool = False


@dataclass(frozen=True)
class Firing:
    at: float
    """When it was due."""
    late: float
    """Seconds since then."""
    missed: int
    """Earlier moments for which there was no firing and will be none; MISSED_COUNTED stands for that many or more."""

    @property
    def is_late(self) -> bool:
        return self.missed > 0 or self.late > LATE_AFTER_S


def look(rule: Rule, state: State, now: float) -> tuple[State, Firing | None]:
    """What is due now, and the state after it."""
    if state.paused:
        return state, None
    if state.last > now:
        return _clock_went_back(rule, state, now), None
    due = rule.next_after(state.last)
    if due is None or due > now:
        return state, None
    latest = max(due, rule.last_until(now) or due)
    return replace(state, last=latest), Firing(latest, now - latest, _count(rule, due, latest))


def next_firing(rule: Rule, state: State, now: float) -> float | None:
    """When it comes next, by this clock; in the past when it is due."""
    if state.paused:
        return None
    return rule.next_after(_clock_went_back(rule, state, now).last)


def pause(state: State) -> State:
    return replace(state, paused=True)


def resume(state: State, now: float) -> State:
    """Go on with the next moment: those that passed meanwhile were not missed, they were not wanted."""
    return replace(state, paused=False, last=max(state.last, now)) if state.paused else state


def firing_call_id(schedule_id: str, at: float, epoch: int) -> str:
    """The id of a firing's call, which follows from what it is, so that a firing that was recorded by half is found
    and not repeated."""
    return f"fc-{_digest(f'{schedule_id} {epoch} {at:.3f}')}"


def schedule_id_of(app_id: str, tag: str, method: str) -> str:
    return f"sc-{_digest(f'{app_id} {tag} {method}')}"


def title_of(tag: str, method: str) -> str:
    return f"{tag}.{method}" if method else tag


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _clock_went_back(rule: Rule, state: State, now: float) -> State:
    """The state by a clock that may show less than it did."""
    if state.last <= now:
        return state
    first = rule.next_after(now)
    second = None if first is None else rule.next_after(first)
    if second is None or second > state.last:
        return state
    return replace(state, last=now, epoch=state.epoch + 1)


def _count(rule: Rule, due: float, latest: float) -> int:
    """Moments from `due` up to `latest`, without it."""
    count, at = 0, due
    while at < latest and count < MISSED_COUNTED:
        count += 1
        following = rule.next_after(at)
        if following is None:
            break
        at = following
    return count


# ---- rules --------------------------------------------------------------------------------------------------------


class _StuckError(Exception):
    def __init__(self, at: datetime) -> None:
        super().__init__(at)
        self.at = at


@functools.cache
def _simulator() -> type[CronSim]:
    """The library's iterator over moments; it notices when it goes round in circles. Where a clock is set back over
    midnight from some minutes after it, as in Newfoundland until 2011, the first of a day that was just begun leads
    back to the day before, and from there to the first again."""
    from cronsim import CronSim  # with its time zones 5 ms, for servers that have a schedule

    class Simulator(CronSim):
        ticks = 0

        def tick(self, seconds: int = 1) -> None:
            self.ticks += 1
            if self.ticks > _TICKS:
                raise _StuckError(self.dt)
            super().tick(seconds)

    return Simulator


class CronRule:
    """A cron expression on the wall clock of a time zone."""

    def __init__(self, cron: str, zone: str) -> None:
        import zoneinfo

        from cronsim import CronSimError

        self._cron = cron
        self._sim = _simulator()
        try:
            self._zone = timezone.utc if zone == "UTC" else zoneinfo.ZoneInfo(zone)
        except (LookupError, ValueError, OSError):
            raise InvalidError(
                f"there is no time zone `{zone[:80]}`", hint='use an IANA name such as "Europe/Berlin"'
            ) from None
        if len(cron) > 1000 or len(cron.split()) != 5:
            raise InvalidError(f"cron expression `{cron[:80]}` does not have five fields")
        try:
            self._sim(cron, datetime(2000, 1, 1))
        except (CronSimError, ValueError) as error:
            raise InvalidError(f"cron expression `{cron[:80]}`: {error}") from None

    def next_after(self, at: float) -> float | None:
        begin = at
        for _ in range(_STUCK_TRIES):
            try:
                for moment in self._sim(self._cron, datetime.fromtimestamp(begin, self._zone)):
                    found = moment.timestamp()
                    if found > at:  # around a change of the clock it may offer one that is not
                        return found
            except _StuckError as stuck:
                begin = max(begin, stuck.at.timestamp()) + 2 * 3600.0  # further than any clock is set back
                continue
            except (OverflowError, ValueError):  # past the year 9999
                pass
            return None
        return None

    def last_until(self, at: float) -> float | None:
        """By looking ahead from further and further back: the same moments as `next_after`, around changes too."""
        for back in _LOOK_BACK_S:
            found = self.next_after(at - back)
            if found is not None and found <= at:
                return self._last_between(found, at)
        return None

    def _last_between(self, found: float, at: float) -> float:
        """The latest moment until `at`, by halving what lies between it and one that was `found`."""
        end = at
        while end - found > 0.5:
            middle = (found + end) / 2
            following = self.next_after(middle)
            if following is not None and following <= at:
                found = following
            else:
                end = middle
        return found


class PeriodRule:
    """`anchor` plus 1, 2, 3... periods; months by the calendar of UTC, the rest by the second. Moments before the
    anchor are for a clock that was set back to there: else nothing would happen until it shows the anchor again."""

    def __init__(self, period: dict[str, float], anchor: float) -> None:
        unknown = sorted(set(period) - {*_UNIT_S, *_UNIT_MONTHS})
        if unknown or not all(0 <= value < math.inf for value in period.values()):
            raise InvalidError(f"a Period cannot have `{unknown[0][:40]}`" if unknown else "a Period is not a number")
        self._anchor = anchor
        self._months = sum(factor * int(period.get(name, 0)) for name, factor in _UNIT_MONTHS.items())
        self._seconds = sum(factor * period.get(name, 0) for name, factor in _UNIT_S.items())
        self._about = self._months * MONTH_S + self._seconds
        if not SHORTEST_PERIOD_S <= self._about <= LONGEST_PERIOD_S:
            raise InvalidError(f"a Period of {self._about:g} s is out of range", hint="1 second to 100 years")

    def next_after(self, at: float) -> float | None:
        number = self._number_until(at) + 1
        return self._moment(number)

    def last_until(self, at: float) -> float | None:
        return self._moment(self._number_until(at))

    def _number_until(self, at: float) -> int:
        """How many moments there were until `at`, it included; less than nothing before the anchor."""
        number = math.floor((at - self._anchor) / self._about)
        while self._is_after(number, at):
            number -= 1
        while self._is_until(number + 1, at):
            number += 1
        return number

    def _is_until(self, number: int, at: float) -> bool:
        moment = self._moment(number)
        return moment is not None and moment <= at

    def _is_after(self, number: int, at: float) -> bool:
        moment = self._moment(number)
        return moment is not None and moment > at

    def _moment(self, number: int) -> float | None:
        try:
            return round(add_months(self._anchor, number * self._months) + number * self._seconds, 3)
        except (OverflowError, ValueError):  # past the year 9999
            return None


def add_months(at: float, months: int) -> float:
    """The same day and time, so many months later, in UTC; the last day of a month that has no such day."""
    if not months:
        return at
    moment = datetime.fromtimestamp(at, timezone.utc)
    count = moment.year * 12 + moment.month - 1 + months
    year, month = count // 12, count % 12 + 1
    day = min(moment.day, _days_in(year, month))
    return moment.replace(year=year, month=month, day=day).timestamp()


def _days_in(year: int, month: int) -> int:
    following = datetime(year + month // 12, month % 12 + 1, 1)
    return (following - datetime(year, month, 1)).days


def rule_of(spec: ScheduleSpec, anchor: float) -> Rule:
    """The rule of a schedule that began at `anchor`. Raises InvalidError."""
    if bool(spec.cron) == bool(spec.period):
        raise InvalidError("a schedule is a cron expression or a period")
    rule: Rule = CronRule(spec.cron, spec.timezone) if spec.cron else PeriodRule(spec.period, anchor)
    if rule.next_after(anchor) is None:
        raise InvalidError(f"cron expression `{spec.cron[:80]}` names a moment that never comes")
    return rule


def check_schedules(specs: Sequence[FunctionSpec], now: float) -> None:
    """The limits of the SDK once more, and what it cannot know. Raises InvalidError."""
    for spec in specs:
        methods = [one.method for one in spec.schedules]
        if any(method not in spec.methods if spec.methods else method for method in methods):
            raise InvalidError(f"`{spec.tag[:80]}` has a schedule of a method that it does not have")
        if len(set(methods)) != len(methods):
            raise InvalidError(f"`{spec.tag[:80]}` has two schedules for one function")
        if spec.schedules and (spec.parameters or spec.is_generator):
            raise InvalidError(f"`{spec.tag[:80]}` has a schedule, and cannot be called without more")
        for one in spec.schedules:
            try:
                rule_of(one, now)
            except InvalidError as error:
                raise InvalidError(f"function `{spec.tag[:80]}`: {error.message}", hint=error.hint) from None
