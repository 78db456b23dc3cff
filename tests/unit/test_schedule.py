"""What may be written as a schedule, and what is said of everything else."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

import squall
from squall.exception import InvalidError
from squall.options import variant_fields
from squall.protocol.messages import FunctionSpec, ScheduleSpec, build, to_dict
from squall.server.schedules import check_schedules

GOOD_CRONS = [
    "* * * * *",
    "*/5 * * * *",
    "0 9-17/2 * * mon-fri",
    "15,45 0 1,15 JAN-MAR *",
    "0 0 L * *",
    "0 0 LW * *",
    "0 0 * * 5L",
    "0 0 * * FRI#2",
    "0 0 * * 7",
    "5/20 * * * *",
    "  0   0  29 2 * ",
]


@pytest.mark.parametrize("text", GOOD_CRONS)
def test_cron_expression_of_client_is_one_of_server(text: str) -> None:
    schedule = squall.Cron(text, timezone="Europe/Berlin")
    check_schedules([FunctionSpec("f", schedules=[schedule._spec])], 1_700_000_000.0)


BAD_CRONS = [
    ("", "0 fields"),
    ("* * * *", "4 fields"),
    ("* * * * * *", "6 fields"),
    ("@daily", "1 fields"),
    ("60 * * * *", "`60` is no minute"),
    ("* 24 * * *", "`24` is no hour"),
    ("* * 0 * *", "`0` is no day of the month"),
    ("* * * 13 *", "`13` is no month"),
    ("* * * * 8", "`8` is no day of the week"),
    ("* * * FOO *", "`FOO` is no month"),
    ("*/0 * * * *", "`*/0`"),
    ("*/x * * * *", "`*/X`"),
    ("5-1 * * * *", "`5-1`"),
    ("1,,2 * * * *", "`1,,2`"),
    ("-1 * * * *", "`-1`"),
    ("²  * * * *", "is no minute"),
    ("* * * * FRI#6", "FRI#6"),
    ("1" * 5000 + " * * * *", "is no minute"),
]


@pytest.mark.parametrize(("text", "said"), BAD_CRONS, ids=lambda value: str(value)[:20])
def test_bad_cron_expression_is_told_at_its_line(text: str, said: str) -> None:
    with pytest.raises(InvalidError) as error:
        squall.Cron(text)
    assert said in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("name", ["Europe/Berlni", "", "../etc/passwd", "Europe", "x" * 100, None, 1])
def test_time_zone_that_does_not_exist_is_told_at_its_line(name: Any) -> None:
    with pytest.raises(InvalidError, match="time zone"):
        squall.Cron("* * * * *", timezone=name)


def test_cron_takes_a_string_and_nothing_else() -> None:
    with pytest.raises(InvalidError, match="takes a string"):
        squall.Cron(5)  # type: ignore[arg-type]


def test_period_becomes_its_units() -> None:
    assert squall.Period(hours=1, seconds=0.5)._spec == ScheduleSpec(period={"hours": 1, "seconds": 0.5})


BAD_PERIODS: list[tuple[dict[str, Any], str]] = [
    ({}, "too short"),
    ({"seconds": 0.5}, "too short"),
    ({"minutes": 1.5}, "whole number"),
    ({"hours": -1}, "0 or more"),
    ({"days": True}, "whole number"),
    ({"seconds": float("nan")}, "takes a number"),
    ({"seconds": float("inf")}, "takes a number"),
    ({"seconds": "1"}, "takes a number"),
    ({"years": 101}, "too long"),
]


@pytest.mark.parametrize(("parts", "said"), BAD_PERIODS, ids=str)
def test_bad_period_is_told_at_its_line(parts: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidError, match=said):
        squall.Period(**parts)


def test_function_takes_its_schedule_into_its_spec() -> None:
    app = squall.App("clock")

    @app.function(serialized=True, schedule=squall.Cron("0 9 * * *", timezone="Asia/Tokyo"))
    def morning(words: str = "good morning") -> None: ...

    spec = app._specs["morning"]
    assert spec.schedules == [ScheduleSpec(cron="0 9 * * *", timezone="Asia/Tokyo")]
    assert build(FunctionSpec, json.loads(json.dumps(to_dict(spec), default=to_dict))).schedules == spec.schedules


def test_method_takes_its_schedule_into_the_spec_of_its_class() -> None:
    app = squall.App("clock")

    @app.cls(serialized=True)
    class Clock:
        @squall.method(schedule=squall.Period(minutes=5))
        def tick(self) -> None: ...

        @squall.method()
        def tock(self, n: int) -> None: ...

    assert app._specs["Clock"].schedules == [ScheduleSpec(period={"minutes": 5}, method="tick")]


def test_what_needs_arguments_cannot_have_a_schedule() -> None:
    app = squall.App("clock")
    with pytest.raises(InvalidError, match="argument `city`"):

        @app.function(serialized=True, schedule=squall.Period(hours=1))
        def weather(city: str) -> None: ...

    with pytest.raises(InvalidError, match="argument `city`"):

        class Weather:
            @squall.method(schedule=squall.Period(hours=1))
            def of(self, city: str) -> None: ...


def test_generator_cannot_have_a_schedule() -> None:
    with pytest.raises(InvalidError, match="generator"):

        @squall.App("clock").function(serialized=True, schedule=squall.Period(hours=1))
        def many() -> Any:
            yield 1


def test_class_with_parameters_cannot_have_a_schedule() -> None:
    with pytest.raises(InvalidError, match="has parameters"):

        @squall.App("clock").cls(serialized=True)
        class Clock:
            city: str = squall.parameter(default="Rome")

            @squall.method(schedule=squall.Period(hours=1))
            def tick(self) -> None: ...


def test_schedule_belongs_to_a_method_and_not_to_its_class() -> None:
    with pytest.raises(InvalidError, match=r"@squall\.method\(schedule"):
        squall.App("clock").cls(schedule=squall.Period(hours=1))


def test_option_schedule_takes_a_schedule() -> None:
    with pytest.raises(InvalidError, match=r"squall\.Cron"):
        squall.App("clock").function(schedule="* * * * *")  # type: ignore[arg-type]


def test_variant_cannot_have_a_schedule_of_its_own() -> None:
    with pytest.raises(InvalidError, match="cannot change `schedule`"):
        variant_fields({"schedule": squall.Period(hours=1)}, "f.with_options")


def test_schedules_are_equal_when_they_say_the_same() -> None:
    assert squall.Period(hours=1) == squall.Period(hours=1) != squall.Period(hours=2)
    assert repr(squall.Cron("0 9 * * *")) == "Cron('0 9 * * *', timezone='UTC')"
    assert pickle.loads(pickle.dumps(squall.Period(days=1))) == squall.Period(days=1)
