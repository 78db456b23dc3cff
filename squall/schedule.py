"""Cron and Period: when a deployed function runs by itself.

What is written is checked here, at its line, with the standard library alone; the server, which has the rules of time
zones, checks again and works out the moments. Tested in `tests/unit/test_schedule.py`.
"""

from __future__ import annotations

import math
from typing import Any

from squall.exception import InvalidError
from squall.protocol.specs import ScheduleSpec

SHORTEST_S = 1.0
LONGEST_YEARS = 100
_UNITS = {"years": 365 * 86400, "months": 28 * 86400, "weeks": 604800, "days": 86400, "hours": 3600, "minutes": 60}
"""Name -> seconds that one has at least."""
_MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
_DAYS = ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT")
_FIELDS: tuple[tuple[str, int, int, tuple[str, ...], int], ...] = (
    ("minute", 0, 59, (), 0),
    ("hour", 0, 23, (), 0),
    ("day of the month", 1, 31, (), 0),
    ("month", 1, 12, _MONTHS, 1),
    ("day of the week", 0, 7, _DAYS, 0),
)
"""Name, lowest and highest value, names of values, value of the first name."""
_CRON_HINT = 'five fields: minute, hour, day of the month, month, day of the week, such as "*/5 9-17 * * MON-FRI"'


class Schedule:
    """What `schedule=` takes: a Cron or a Period."""

    def __init__(self, spec: ScheduleSpec) -> None:
        self._spec = spec

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and other._spec == self._spec

    def __hash__(self) -> int:
        return hash(repr(self))


class Cron(Schedule):
    """Run a function at the minutes that a cron expression names, for `@app.function(schedule=...)`.

    Five fields as in crontab(5): lists, ranges, steps and English names of months and days; `L` is the last day of a
    month, `LW` its last working day, `FRI#2` the second Friday, `5L` the last one. Where both days are given, either
    is enough. When a change of the clock leaves out the hour of a job, it runs right after the change; when an hour
    comes twice, a job with fixed hours runs once.

    - `timezone="UTC"`: an IANA name such as `Europe/Berlin`; the expression is of the wall clock there.

    Raises InvalidError for an expression or a time zone that does not exist.

    Example:

        @app.function(schedule=squall.Cron("30 2 * * MON-FRI", timezone="Europe/Berlin"))
        def report():
            print("good morning")
    """

    def __init__(self, cron_string: str, timezone: str = "UTC") -> None:
        if not isinstance(cron_string, str):
            raise InvalidError(f"`Cron({cron_string!r:.80})` takes a string", hint=_CRON_HINT)
        _check_cron(cron_string)
        _check_timezone(timezone)
        super().__init__(ScheduleSpec(cron=" ".join(cron_string.split()), timezone=timezone))

    def __repr__(self) -> str:
        return f"Cron({self._spec.cron!r}, timezone={self._spec.timezone!r})"


class Period(Schedule):
    """Run a function again and again, this long apart, for `@app.function(schedule=...)`.

    The first run is one period after the function was first deployed with it; deploying it again with the same period
    does not begin anew. Months and years go by the calendar, in UTC: a month after the 31st of January is the last
    day of February, and two months after it the 31st of March.

    - `years`, `months`, `weeks`, `days`, `hours`, `minutes`: whole numbers.
    - `seconds`: may have a fraction. All together are at least 1 second.

    Raises InvalidError for a period that is negative, too short, or longer than 100 years.

    Example:

        @app.function(schedule=squall.Period(hours=1, minutes=30))
        def poll():
            print("anything new?")
    """

    def __init__(
        self,
        *,
        years: int = 0,
        months: int = 0,
        weeks: int = 0,
        days: int = 0,
        hours: int = 0,
        minutes: int = 0,
        seconds: float = 0,
    ) -> None:
        given = {"years": years, "months": months, "weeks": weeks, "days": days, "hours": hours, "minutes": minutes}
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise InvalidError(f"`Period({name}={value!r:.40})` takes a whole number, 0 or more")
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < math.inf:
            raise InvalidError(f"`Period(seconds={seconds!r:.40})` takes a number, 0 or more")
        parts: dict[str, float] = {name: value for name, value in {**given, "seconds": seconds}.items() if value}
        length = sum(_UNITS.get(name, 1) * value for name, value in parts.items())
        if length < SHORTEST_S:
            raise InvalidError(
                f"a Period of {length:g} s is too short",
                hint="it is at least 1 second: `squall.Period(minutes=5)`",
            )
        if length > LONGEST_YEARS * _UNITS["years"]:
            raise InvalidError(f"a Period of more than {LONGEST_YEARS} years is too long")
        super().__init__(ScheduleSpec(period=parts))

    def __repr__(self) -> str:
        return f"Period({', '.join(f'{name}={value!r}' for name, value in self._spec.period.items())})"


def schedule_fields(value: Any) -> dict[str, Any]:
    """Fields of a spec for the option `schedule`. Raises InvalidError."""
    if not isinstance(value, Schedule):
        raise InvalidError(
            f"option `schedule` is {value!r:.80}",
            hint='give `squall.Cron("0 9 * * *")` or `squall.Period(hours=1)`',
        )
    return {"schedules": [value._spec]}


# ---- checks -------------------------------------------------------------------------------------------------------


def _check_cron(text: str) -> None:
    parts = text.upper().split()
    if len(parts) != len(_FIELDS):
        found = f"{len(parts)} fields" if len(text) < 200 else "too much text"
        raise InvalidError(f"cron expression `{text[:80]}` has {found}", hint=_CRON_HINT)
    for part, (name, low, high, words, first) in zip(parts, _FIELDS, strict=True):
        for term in part.split(","):
            if not _is_term(term, name, low, high, {word: n for n, word in enumerate(words, first)}):
                raise InvalidError(
                    f"cron expression `{text[:80]}`: `{part[:40]}` is no {name}",
                    hint=f"a number from {low} to {high}{f', a name such as {words[0]}' if words else ''}, a range "
                    "`a-b`, a list `a,b`, a step `*/n`, or `*`",
                )


def _is_term(term: str, field: str, low: int, high: int, words: dict[str, int]) -> bool:
    """One part of a comma separated list."""

    def number(word: str) -> int | None:
        if word in words:
            return words[word]
        return int(word) if _is_digits(word) and low <= int(word) <= high else None

    if field == "day of the month" and term in ("L", "LW"):
        return True
    if field == "day of the week" and term.endswith("L"):
        return _is_digits(term[:-1]) and number(term[:-1]) is not None
    if field == "day of the week" and "#" in term:
        day, _, nth = term.partition("#")
        return number(day) is not None and nth in ("1", "2", "3", "4", "5")
    body, slash, step = term.partition("/")
    if slash and not (_is_digits(step) and int(step) > 0):
        return False
    if body == "*":
        return True
    begin, dash, end = body.partition("-")
    left, right = number(begin), number(end) if dash else number(begin)
    return left is not None and right is not None and left <= right


def _is_digits(word: str) -> bool:
    return len(word) <= 4 and word.isascii() and word.isdigit()


def _check_timezone(name: Any) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= 64:
        raise InvalidError(f"time zone {name!r:.80} is not a name", hint='such as "UTC" or "Europe/Berlin"')
    if name == "UTC":
        return
    import zoneinfo  # 3 ms that most programs never need

    if not _has_zone(zoneinfo.ZoneInfo, name) and _has_zone(zoneinfo.ZoneInfo, "Europe/London"):
        raise InvalidError(f"there is no time zone `{name}`", hint='use an IANA name such as "Europe/Berlin"')


def _has_zone(load: Any, name: str) -> bool:
    """False for all names where there is no data of time zones, as in a slim image: there the server decides."""
    try:
        load(name)
    except (LookupError, ValueError, OSError):  # not there; no name; a directory of names
        return False
    return True
