"""What a new version of a function does to the one before it, event by event."""

from __future__ import annotations

from typing import Any

import pytest

from squall.server.dispatch import Dispatch
from squall.server.inputs import Finish, FunctionOptions, Instructions, Push, StopContainer
from squall.testing import check_dispatch


class Pair:
    """An old pool with a ready container `co-old`, and a new one with `co-new`."""

    def __init__(self, **options: Any) -> None:
        self.dispatch = Dispatch()
        self.last: Instructions = []
        for name in ("old", "new"):
            self.do(self.dispatch.add_function(0.0, f"fu-{name}", FunctionOptions(**options)))
            self.do(self.dispatch.container_starting(0.0, f"co-{name}", f"fu-{name}"))
            self.do(self.dispatch.container_ready(0.0, f"co-{name}"))

    def do(self, instructions: Instructions) -> None:
        self.last = instructions
        check_dispatch(self.dispatch)

    def submit(self, count: int = 1, call_id: str = "fc-1", first: int = 0, last: bool = True) -> None:
        items = [(idx, b"") for idx in range(first, first + count)]
        self.do(self.dispatch.submit(1.0, call_id, "fu-old", items, last=last))

    def supersede(self) -> None:
        self.do(self.dispatch.supersede(2.0, "fu-old", "fu-new", "version 2 took over"))

    def gone(self, container_id: str, **more: Any) -> None:
        self.do(self.dispatch.container_gone(3.0, container_id, "ended", **more))

    @property
    def pushed(self) -> list[tuple[str, int]]:
        return [(one.container_id, input_.idx) for one in self.last if isinstance(one, Push) for input_ in one.inputs]

    @property
    def ended(self) -> list[tuple[int, str]]:
        return [(one.input.idx, one.status) for one in self.last if isinstance(one, Finish)]


def test_what_waits_goes_to_the_new_version_in_its_order() -> None:
    pair = Pair()
    pair.submit(4)
    pair.supersede()
    assert pair.pushed == [("co-new", 1)]
    pair.do(pair.dispatch.output(3.0, "co-new", "fc-1", 1, "ok", 0))
    assert pair.pushed == [("co-new", 2)]


def test_what_runs_ends_where_it_runs() -> None:
    pair = Pair()
    pair.submit(1)
    pair.supersede()
    assert not [one for one in pair.last if isinstance(one, StopContainer)]
    pair.do(pair.dispatch.output(3.0, "co-old", "fc-1", 0, "ok", 0))
    assert pair.ended == [(0, "ok")]
    assert [one.container_id for one in pair.last if isinstance(one, StopContainer)] == ["co-old"]
    pair.gone("co-old", fault="infra")
    assert set(pair.dispatch.functions) == {"fu-new"}


def test_an_idle_container_of_the_old_version_is_stopped_at_once() -> None:
    pair = Pair()
    pair.supersede()
    assert [one.container_id for one in pair.last if isinstance(one, StopContainer)] == ["co-old"]


@pytest.mark.parametrize("fault", ["infra", "container"])
def test_what_the_old_version_loses_is_tried_again_by_the_new_one(fault: Any) -> None:
    pair = Pair()
    pair.submit(1)
    pair.supersede()
    pair.gone("co-old", fault=fault)
    assert pair.pushed == [("co-new", 0)]


def test_what_fails_in_the_old_version_is_tried_again_by_the_new_one() -> None:
    pair = Pair(max_retries=1, initial_delay=5.0)
    pair.submit(1)
    pair.supersede()
    pair.do(pair.dispatch.output(3.0, "co-old", "fc-1", 0, "error", 0))
    assert pair.dispatch.functions["fu-new"].waiting == 1
    pair.do(pair.dispatch.tick(9.0))
    assert pair.pushed == [("co-new", 0)]


def test_what_waits_out_a_delay_goes_on_in_the_new_version() -> None:
    pair = Pair(max_retries=1, initial_delay=5.0)
    pair.submit(1)
    pair.do(pair.dispatch.output(1.5, "co-old", "fc-1", 0, "error", 0))
    pair.supersede()
    pair.do(pair.dispatch.tick(9.0))
    assert pair.pushed == [("co-new", 0)]


def test_a_timeout_in_the_old_version_is_tried_again_by_the_new_one() -> None:
    pair = Pair(max_retries=1, initial_delay=0.0, timeout=10.0)
    pair.submit(1)
    pair.supersede()
    pair.do(pair.dispatch.tick(20.0))
    assert pair.pushed == [("co-new", 0)]


def test_the_rest_of_a_call_follows_it_to_the_new_version() -> None:
    pair = Pair()
    pair.submit(1, last=False)
    pair.do(pair.dispatch.output(1.5, "co-old", "fc-1", 0, "ok", 0))
    pair.supersede()
    pair.submit(1, first=1)
    assert pair.pushed == [("co-new", 1)]


def test_a_call_follows_through_several_versions() -> None:
    pair = Pair()
    pair.submit(1)
    pair.supersede()
    pair.do(pair.dispatch.add_function(2.0, "fu-3", FunctionOptions()))
    pair.do(pair.dispatch.container_starting(2.0, "co-3", "fu-3"))
    pair.do(pair.dispatch.container_ready(2.0, "co-3"))
    pair.do(pair.dispatch.supersede(2.5, "fu-new", "fu-3", "version 3 took over"))
    pair.gone("co-old", fault="infra")
    assert pair.pushed == [("co-3", 0)]


def test_stopping_the_new_version_ends_what_still_runs_in_the_old_one() -> None:
    pair = Pair()
    pair.submit(2)
    pair.supersede()
    pair.do(pair.dispatch.close_function(3.0, "fu-new", "the app was stopped"))
    assert pair.ended == [(1, "cancelled"), (0, "cancelled")]


def test_superseding_twice_or_by_what_has_ended_does_nothing() -> None:
    pair = Pair()
    pair.supersede()
    pair.supersede()
    assert pair.last == []
    pair.do(pair.dispatch.close_function(3.0, "fu-new", "the app was stopped"))
    pair.do(pair.dispatch.add_function(4.0, "fu-4", FunctionOptions()))
    pair.do(pair.dispatch.supersede(4.0, "fu-4", "fu-new", "nobody"))
    assert pair.last == [] and not pair.dispatch.functions["fu-4"].closed


def test_stopping_the_newest_version_ends_what_runs_in_the_oldest() -> None:
    """The one between them has no containers and is forgotten already."""
    pair = Pair()
    pair.do(pair.dispatch.add_function(0.0, "fu-3", FunctionOptions()))
    pair.submit(1)
    pair.supersede()
    pair.do(pair.dispatch.drain(2.0, "co-new", "not needed"))
    pair.gone("co-new")
    pair.do(pair.dispatch.supersede(2.5, "fu-new", "fu-3", "version 3 took over"))
    assert "fu-new" not in pair.dispatch.functions
    pair.do(pair.dispatch.close_function(3.0, "fu-3", "the app was stopped"))
    assert pair.ended == [(0, "cancelled")] and not pair.dispatch.calls
