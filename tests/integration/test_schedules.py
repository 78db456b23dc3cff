"""Schedules of deployed apps fire, go on after the server was killed, and never twice."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import squall
from squall.client import Client
from squall.exception import InvalidError, NotFoundError
from squall.protocol.messages import FunctionSpec, ScheduleSpec, StopApp
from squall.protocol.requests import ChangeSchedule, DeployApp
from tests.conftest import wait_until
from tests.integration.conftest import own_home
from tests.integration.support import Kept, Wire, is_alive, kept_entries, pid_of, rows

pytestmark = pytest.mark.root


@pytest.fixture
def home() -> Iterator[Path]:
    with own_home() as path:
        Client.current()
        yield path


def clock_app(name: str = "clock", **options: Any) -> squall.App:
    app = squall.App(name)

    @app.function(serialized=True, name="tick", schedule=squall.Period(seconds=1), **options)
    def tick(n: int = 7) -> str:
        print("tick", flush=True)
        return f"ticked {n}"

    return app


def ask(message: Any) -> dict[str, Any]:
    reply, _ = Client.current().link.request(message).wait(30)
    found: dict[str, Any] = reply.data
    return found


def schedule() -> dict[str, Any]:
    (row,) = rows("schedules")
    return row


def test_deployed_function_is_called_when_its_time_has_come(home: Path) -> None:
    clock_app().deploy()
    wait_until(lambda: schedule()["fired"] >= 2, "it has fired twice")
    recent = schedule()["recent"]
    assert squall.FunctionCall.from_id(recent[0]["call_id"]).get(timeout=60) == "ticked 7"
    assert recent[1]["at"] - recent[0]["at"] >= 1.0
    (app,) = rows("apps")
    assert abs(app["next_firing_at"] - time.time()) < 5
    call = squall.FunctionCall.from_id(recent[0]["call_id"])
    assert [entry.message for entry in call.logs.stream(timeout=30)] == ["tick"]


def test_method_is_called_when_its_time_has_come(home: Path) -> None:
    app = squall.App("clock")

    @app.cls(serialized=True, name="Clock")
    class Clock:
        @squall.method(schedule=squall.Period(seconds=1))
        def strike(self) -> str:
            return "struck"

    app.deploy()
    wait_until(lambda: schedule()["fired"] >= 1, "it has fired")
    assert schedule()["function"] == "Clock.strike"
    assert squall.FunctionCall.from_id(schedule()["recent"][0]["call_id"]).get(timeout=60) == "struck"


def test_server_that_was_killed_makes_up_for_what_was_missed_once_and_goes_on(home: Path) -> None:
    clock_app().deploy()
    wait_until(lambda: schedule()["fired"] >= 2, "it has fired twice")
    before, app_id = schedule(), schedule()["app_id"]
    pid, client = pid_of(home, "server"), Client.current()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid) and not client.usable(), "the server is gone")
    wait_until(lambda: time.time() > before["next_at"] + 5, "firings were missed")
    wait_until(lambda: schedule_or_none() is not None and schedule()["fired"] >= before["fired"] + 3, "it goes on")
    after = schedule()
    fired = [one for one in after["recent"] if one["at"] > before["recent"][-1]["at"]]
    assert fired[0]["missed"] >= 3, "one for all that were missed"
    assert [one["at"] for one in fired] == sorted({one["at"] for one in fired})
    assert len({one["call_id"] for one in after["recent"]}) == len(after["recent"])
    assert after["schedule_id"] == before["schedule_id"]
    said = [data.decode() for entry, data in kept_entries(app=app_id, source="system")]
    assert sum(f"makes up for {fired[0]['missed']} before it" in line for line in said) == 1
    for one in after["recent"]:
        assert squall.FunctionCall.from_id(one["call_id"]).get(timeout=60) == "ticked 7"


def schedule_or_none() -> dict[str, Any] | None:
    found = rows("schedules")
    return found[0] if found else None


def test_schedules_of_an_app_that_only_runs_do_nothing(home: Path) -> None:
    app = clock_app("running")
    with app.run(output=Kept()):
        assert rows("schedules") == []
        assert app.registered_functions["tick"].remote() == "ticked 7"


def test_stopped_app_fires_no_more(home: Path) -> None:
    clock_app().deploy()
    wait_until(lambda: schedule()["fired"] >= 1, "it has fired")
    ask(StopApp("clock"))
    assert rows("schedules") == []


def test_schedule_is_paused_resumed_and_run_by_hand(home: Path) -> None:
    clock_app().deploy()
    schedule_id = schedule()["schedule_id"]
    ask(ChangeSchedule(schedule_id, "pause"))
    fired = schedule()["fired"]
    call_id = ask(ChangeSchedule(schedule_id, "run"))["call_id"]
    assert squall.FunctionCall.from_id(call_id).get(timeout=60) == "ticked 7"
    assert (schedule()["fired"], schedule()["paused"], schedule()["next_at"]) == (fired, True, None)
    clock_app(cpu=0.25).deploy()
    assert schedule()["paused"], "it stays so over a deploy"
    ask(ChangeSchedule(schedule_id, "resume"))
    wait_until(lambda: schedule()["fired"] > fired, "it goes on")
    with pytest.raises(NotFoundError, match="no schedule"):
        ask(ChangeSchedule("sc-0000", "pause"))


def test_schedule_that_makes_no_sense_is_refused_by_the_server(home: Path) -> None:
    spec = FunctionSpec("f", module="m", qualname="f", schedules=[ScheduleSpec(cron="0 0 30 2 *")])
    with Wire() as wire:
        answer, _ = wire.ask(DeployApp("never", [spec]))
    assert (answer.code, "Bad day-of-month" in answer.message) == ("invalid", True)
    app = squall.App("never")
    app.function(serialized=True, name="f", schedule=squall.Cron("0 0 31 4 *"))(lambda: None)
    with pytest.raises(InvalidError, match="Bad day-of-month"):
        app.deploy()
