"""A trace's spans touch each other and add up to the whole."""

from __future__ import annotations

from itertools import pairwise

import pytest

from squall.server.timelines import ContainerTimeline, InputTimeline, spans

WARM = InputTimeline("fc-1", 0, "f", "remote", "ok", 0, 10.0, 10.001, 10.002, 10.003, 10.010, 10.011, "co-1")
COLD = WARM._replace(pushed_at=10.030, started_at=10.031, finished_at=10.040, done_at=10.041)
CONTAINER = ContainerTimeline(10.002, 10.015, {"fork": 3.0}, 10.016, 10.0165, 10.029, {"import": 12.0})


@pytest.mark.parametrize("container", [None, CONTAINER], ids=["warm", "cold"])
def test_the_parts_add_up_to_the_whole(container: ContainerTimeline | None) -> None:
    timeline = COLD if container else WARM
    parts = spans(timeline, container)
    assert parts[0]["start"] == timeline.sent_at
    assert parts[-1]["end"] == timeline.done_at
    for before, after in pairwise(parts):
        assert before["end"] == after["start"]


def test_a_cold_start_shows_where_it_went() -> None:
    names = [span["name"] for span in spans(COLD, CONTAINER)]
    assert names == ["submit", "place", "container", "runner", "import", "queue", "deliver", "run", "return"]


def test_a_warm_call_shows_no_container_that_was_there_before() -> None:
    assert "container" not in [span["name"] for span in spans(WARM, CONTAINER)]


def test_an_input_that_never_ran_still_has_a_timeline() -> None:
    parts = spans(WARM._replace(pushed_at=0.0, started_at=0.0, finished_at=0.0, status="cancelled"), None)
    assert [span["name"] for span in parts] == ["submit", "return"]
