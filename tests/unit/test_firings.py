"""Schedules are carried out once, whenever the server dies, and their state is that of before.

The journal, the dispatch and the Store are the real ones; there are no containers, so calls stay unfinished.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from squall._clock import ManualClock
from squall.exception import Error, InvalidError, NotFoundError, ResourceExhaustedError
from squall.protocol.messages import FunctionSpec, ScheduleSpec
from squall.protocol.payload import unpack_call
from squall.server import firings as firings_module
from squall.server.database import Database
from squall.server.dispatch import Dispatch
from squall.server.durable import Durable
from squall.server.firings import EMPTY_CALL, Firings, shown
from squall.server.inputs import FunctionOptions
from squall.server.journal import Journal
from squall.server.objects import AppRecord, FunctionRecord, Scope
from squall.server.schedules import OVERLAP_LIMIT

MINUTELY = ScheduleSpec(cron="* * * * *")
T0 = 1_700_000_000.0 - 1_700_000_000.0 % 60


class Owner:
    """What `durable` asks of whom it belongs to."""

    def pool_of(self, call: Any) -> str:
        return str(call.function_id)

    def why_stopped(self, call: Any) -> str:
        return ""

    def describe(self, call: Any) -> Any:
        return call

    def left_out(self, call_id: str, spared: Any, reason: str) -> None: ...

    def stored(self, rows: Any) -> None: ...

    def apply(self, instructions: Any) -> None: ...


class Life:
    """One life of a server, from the point of view of its schedules."""

    def __init__(self, directory: Path, clock: ManualClock, specs: list[ScheduleSpec]) -> None:
        loop = asyncio.get_running_loop()
        self.clock = clock
        self.database = Database.in_directory(directory, loop)
        dispatch = Dispatch()
        self.durable = Durable(dispatch, Journal(self.database), Owner(), clock, loop)
        self.firings = Firings(self.durable, self.database, clock)
        self.told: list[str] = []
        self.firings.tell = lambda app, tag, text: self.told.append(text)
        self.app = app_of(specs)
        for function in self.app.functions.values():
            dispatch.add_function(0.0, function.function_id, FunctionOptions())

    async def begin(self) -> None:
        self.durable.start()
        await until(lambda: not self.durable.replaying)
        await self.sync()

    async def sync(self) -> None:
        self.firings.switched(self.app)
        await until(lambda: not self.firings._syncing)

    async def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)
        await self.look()

    async def look(self) -> None:
        self.firings.look()
        await until(lambda: not any(live.submitting for live in self.firings._live.values()))

    def calls(self) -> list[str]:
        return list(self.durable.dispatch.calls)

    @property
    def row(self) -> dict[str, Any]:
        (row,) = self.firings.rows(self.app.scope)
        return row

    async def end(self) -> None:
        await self.database.close()


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(4000):
        if condition():
            return
        await asyncio.sleep(0.005)
    pytest.fail("the condition did not come true")


def app_of(specs: list[ScheduleSpec]) -> AppRecord:
    app = AppRecord("ap-1", "clock", False, T0, None)
    app.functions["tick"] = FunctionRecord("fu-1", app, FunctionSpec("tick", schedules=specs), "fu-1")
    return app


def lived(directory: Path, body: Callable[[Life], Awaitable[None]], *, clock: ManualClock | None = None,
          specs: list[ScheduleSpec] | None = None) -> ManualClock:  # fmt: skip
    clock = clock or ManualClock(T0)

    async def run() -> None:
        life = Life(directory, clock, [MINUTELY] if specs is None else specs)
        await life.begin()
        try:
            await body(life)
        finally:
            await life.end()

    asyncio.run(run())
    return clock


def test_arguments_of_a_firing_are_none() -> None:
    assert unpack_call(EMPTY_CALL) == ((), {})


def test_what_is_due_becomes_a_call_with_the_schedule_as_its_parent(tmp_path: Path) -> None:
    async def body(life: Life) -> None:
        await life.pass_time(30)
        assert life.calls() == []
        await life.pass_time(30)
        (call_id,) = life.calls()
        call = life.durable.dispatch.calls[call_id].data
        assert (call.parent, call.function_id) == (life.row["schedule_id"], "fu-1")
        assert (life.row["fired"], life.row["running"], life.row["next_at"]) == (1, 1, T0 + 120)
        await life.look()
        assert len(life.calls()) == 1
        assert life.told == []

    lived(tmp_path, body)


def test_firings_that_were_missed_while_no_server_ran_are_made_up_for_once_and_told_of(tmp_path: Path) -> None:
    async def first(life: Life) -> None:
        await life.pass_time(60)

    clock = lived(tmp_path, first)
    clock.advance(3600)

    async def second(life: Life) -> None:
        await life.look()
        await life.look()
        assert (life.row["fired"], len(life.calls())) == (2, 2)
        assert life.row["recent"][-1] == {
            "at": T0 + 3660, "fired_at": T0 + 3660, "missed": 59, "call_id": life.calls()[-1],
        }  # fmt: skip
        (said,) = life.told
        assert said.startswith("[schedule of `tick`: the firing of 2023-")
        assert "makes up for 59 before it that were missed" in said
        await life.pass_time(60)
        assert life.row["fired"] == 3

    lived(tmp_path, second, clock=clock)


def test_server_that_died_between_call_and_record_does_not_fire_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def first(life: Life) -> None:
        saved = asyncio.get_running_loop().create_future()
        saved.set_result(None)
        monkeypatch.setattr(life.firings, "_save", lambda live: saved)  # as if it had died before it came to that
        await life.pass_time(60)
        assert len(life.calls()) == 1

    clock = lived(tmp_path, first)
    monkeypatch.undo()

    async def second(life: Life) -> None:
        before = life.calls()
        assert len(before) == 1, "the journal has the call"
        await life.look()
        assert life.calls() == before
        await life.pass_time(60)
        assert len(life.calls()) == 2

    lived(tmp_path, second, clock=clock)


def test_clock_that_is_set_back_makes_calls_with_ids_of_their_own(tmp_path: Path) -> None:
    async def body(life: Life) -> None:
        for _ in range(3):
            await life.pass_time(60)
        life.clock.jump_wall(-3600)
        await life.look()
        await life.pass_time(60)
        assert life.row["fired"] == 4
        life.clock.jump_wall(3600)
        await life.look()
        assert life.row["fired"] == 5
        assert len(set(life.calls())) == 5

    lived(tmp_path, body)


def test_overlap_is_bounded_and_what_is_left_out_is_told(tmp_path: Path) -> None:
    async def body(life: Life) -> None:
        for _ in range(OVERLAP_LIMIT + 2):
            await life.pass_time(60)
        assert (life.row["fired"], life.row["skipped"]) == (OVERLAP_LIMIT, 2)
        assert f"{OVERLAP_LIMIT} firings before it have not ended" in life.told[-1]
        assert life.row["recent"][-1]["skipped"]

    clock = lived(tmp_path, body)

    async def second(life: Life) -> None:
        await life.pass_time(60)
        assert (life.row["fired"], life.row["skipped"]) == (OVERLAP_LIMIT, 3), "a restart forgets none of them"

    lived(tmp_path, second, clock=clock)


def test_paused_schedule_stays_so_over_a_restart_and_goes_on_without_what_passed(tmp_path: Path) -> None:
    async def first(life: Life) -> None:
        await life.firings.change(life.row["schedule_id"], "pause", life.app.scope)

    clock = lived(tmp_path, first)

    async def second(life: Life) -> None:
        await life.pass_time(600)
        assert (life.calls(), life.row["paused"], life.row["next_at"]) == ([], True, None)
        await life.firings.change(life.row["schedule_id"], "resume", life.app.scope)
        await life.look()
        assert life.calls() == []
        await life.pass_time(60)
        assert len(life.calls()) == 1

    lived(tmp_path, second, clock=clock)


def test_run_now_makes_a_call_beside_the_schedules_own(tmp_path: Path) -> None:
    async def body(life: Life) -> None:
        call_id = await life.firings.change(life.row["schedule_id"], "run", life.app.scope)
        assert life.calls() == [call_id]
        assert life.row["fired"] == 0

    lived(tmp_path, body)


def test_deploying_again_moves_no_firing_unless_the_schedule_has_changed(tmp_path: Path) -> None:
    async def body(life: Life) -> None:
        (before,) = life.firings.rows(life.app.scope)
        life.clock.advance(7)
        life.app.functions = app_of([ScheduleSpec(period={"minutes": 5})]).functions
        await life.sync()
        assert life.row["next_at"] == before["next_at"]
        life.app.functions = app_of([ScheduleSpec(period={"minutes": 6})]).functions
        await life.sync()
        assert life.row["next_at"] == T0 + 7 + 360
        life.app.functions = app_of([]).functions
        await life.sync()
        assert life.firings.rows(life.app.scope) == []
        assert await life.firings._rows("ap-1") == []

    lived(tmp_path, body, specs=[ScheduleSpec(period={"minutes": 5})])


def test_schedules_of_an_app_that_was_stopped_begin_anew(tmp_path: Path) -> None:
    async def body(life: Life) -> None:
        life.firings.stopped(life.app)
        life.clock.advance(600)
        await life.sync()
        await life.look()
        assert life.calls() == []

    lived(tmp_path, body)


def test_schedules_that_are_not_due_cost_next_to_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(life: Life) -> None:
        (live,) = life.firings._live.values()
        await life.look()
        asked: list[float] = []
        monkeypatch.setattr(live.rule, "next_after", lambda at: asked.append(at))
        for _ in range(50):
            await life.pass_time(1)
        assert asked == []

    lived(tmp_path, body)


def test_firing_that_cannot_be_written_down_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(life: Life) -> None:
        submit = life.durable.submit
        monkeypatch.setattr(life.durable, "submit", lambda entry, told: told(Error("the disk is full")))
        await life.pass_time(60)
        monkeypatch.setattr(life.durable, "submit", submit)
        await life.look()
        assert life.row["fired"] == 0, "not at once"
        await life.pass_time(firings_module.RETRY_S)
        assert (life.row["fired"], life.row["recent"][-1]["at"]) == (1, T0 + 60)

    lived(tmp_path, body)


def test_firing_for_which_there_is_no_room_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(entry: Any, told: Any) -> None:
        raise ResourceExhaustedError("1,000,000 wait")

    async def body(life: Life) -> None:
        monkeypatch.setattr(life.durable, "submit", refuse)
        await life.pass_time(60)
        assert life.row["skipped"] == 1

    lived(tmp_path, body)


def test_schedule_of_another_workspace_does_not_exist(tmp_path: Path) -> None:
    async def body(life: Life) -> None:
        stranger = Scope("other", "main")
        assert life.firings.rows(stranger) == []
        with pytest.raises(NotFoundError):
            await life.firings.change(life.row["schedule_id"], "pause", stranger)
        with pytest.raises(InvalidError, match="pause, resume or run"):
            await life.firings.change(life.row["schedule_id"], "delete", life.app.scope)

    lived(tmp_path, body)


def test_schedule_is_shown_as_people_say_it() -> None:
    assert shown(ScheduleSpec(cron="0 9 * * *")) == "0 9 * * *"
    assert shown(ScheduleSpec(cron="0 9 * * *", timezone="Asia/Tokyo")) == "0 9 * * * (Asia/Tokyo)"
    assert shown(ScheduleSpec(period={"hours": 1, "seconds": 0.5})) == "every 1 hour 0.5 seconds"
