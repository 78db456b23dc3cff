"""`squall schedule` finds a schedule by what people call it, and says when it fires."""

from __future__ import annotations

from typing import Any

import pytest

from squall.cli import manage, schedules
from squall.exception import InvalidError, NotFoundError

ROWS: list[dict[str, Any]] = [
    {"schedule_id": "sc-11aa", "app": "morning", "function": "poll"},
    {"schedule_id": "sc-11bb", "app": "evening", "function": "poll"},
    {"schedule_id": "sc-22cc", "app": "evening", "function": "Store.tidy"},
]


@pytest.fixture(autouse=True)
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "fetch", lambda link, noun: ROWS)


@pytest.mark.parametrize(
    ("word", "found"),
    [("sc-11aa", "sc-11aa"), ("sc-2", "sc-22cc"), ("Store.tidy", "sc-22cc"), ("evening.poll", "sc-11bb")],
)
def test_schedule_is_found_by_its_id_and_its_function(word: str, found: str) -> None:
    assert schedules.found(None, word)["schedule_id"] == found  # type: ignore[arg-type]


@pytest.mark.parametrize("word", ["poll", "sc-11"])
def test_what_means_several_schedules_is_refused_with_all_of_them(word: str) -> None:
    with pytest.raises(InvalidError, match="means 2 schedules") as caught:
        schedules.found(None, word)  # type: ignore[arg-type]
    assert "sc-11aa of `morning`" in caught.value.hint


def test_mistyped_schedule_is_answered_with_the_one_meant() -> None:
    with pytest.raises(NotFoundError, match="no schedule `pol`") as caught:
        schedules.found(None, "pol")  # type: ignore[arg-type]
    assert "did you mean `poll`?" in caught.value.hint


@pytest.mark.parametrize(
    ("seconds", "said"), [(-5, "in 0 s"), (119, "in 119 s"), (600, "in 10 min"), (7200, "in 2 h"), (200_000, "in 2 d")]
)
def test_time_that_is_to_come_is_said_in_the_unit_that_fits(seconds: float, said: str) -> None:
    assert manage.until(1000.0 + seconds, now=1000.0) == said
    assert manage.until(None) == ""
