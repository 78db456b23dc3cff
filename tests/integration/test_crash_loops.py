"""Deployed functions that do not start: callers hear why, what was spawned waits, and runs once they start again."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import squall
from squall.client import Client
from squall.exception import Error, OutputTimeoutError, StartupError
from squall.protocol.messages import GetCall
from squall.protocol.requests import DeleteSecret, GetApp, GetFunctionStats, ListObjects, PutSecret, RedeployApp
from tests.conftest import wait_until
from tests.integration.conftest import own_home, swap_client
from tests.integration.staying import ask
from tests.integration.staying import squall as command
from tests.integration.support import containers_of, pid_of

pytestmark = pytest.mark.root
FAIL_FAST_S = 5.0


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[Path]:
    """With plain processes: what starts fail of is a file, which containers would not see."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SQUALL_RUNTIME", "process")
        with own_home() as home:
            Client.current()
            yield home


def deploy(name: str, broken: Path, answer: str = "fine", **options: Any) -> Any:
    """A class whose containers start unless the file is there."""
    app = squall.App(name)
    flag = str(broken)

    @app.cls(serialized=True, name="Fragile", scaledown_window=2, **options)
    class Fragile:
        @squall.enter()
        def begin(self) -> None:
            import os

            if os.path.exists(flag):
                raise RuntimeError(f"the database is away: {os.environ.get('MODE', 'no mode')}")

        @squall.method()
        def work(self, x: int) -> str:
            return f"{answer} {x}"

        @squall.method()
        def count(self, n: int) -> Iterator[int]:
            yield from range(n)

    app.deploy()
    return squall.Cls.from_name(name, "Fragile")()


def break_it(name: str, broken: Path) -> None:
    """From now on no container of the app starts, and none is there."""
    broken.touch()
    wait_until(lambda: not rows(name)[0]["containers"], "its idle containers have ended")


def rows(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ask(Client.current(), ListObjects("functions", app=name))["rows"]
    return found


def restart(home: Path) -> None:
    """kill -9 the server; the next one is started by whoever asks."""
    server = pid_of(home, "server")
    os.kill(server, signal.SIGKILL)
    wait_until(lambda: pid_of(home, "server") != server, "it has ended")
    gone = swap_client(None)
    assert gone is not None
    gone.close()


def test_callers_fail_fast_with_the_traceback_and_what_was_spawned_runs_when_the_cause_is_gone(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    fragile = deploy("away", broken)
    assert fragile.work.remote(1) == "fine 1"
    break_it("away", broken)
    calls = [fragile.work.spawn(x) for x in range(20)]
    began = time.monotonic()
    with pytest.raises(StartupError, match="the database is away"):
        fragile.work.remote(1)
    with pytest.raises(StartupError, match="the database is away"):
        list(fragile.work.map(range(3)))
    with pytest.raises(StartupError, match="the database is away"):
        list(fragile.count.remote_gen(3))
    assert time.monotonic() - began < FAIL_FAST_S, "what waits fails fast instead of hanging"
    with pytest.raises(OutputTimeoutError, match=r"no container of its function starts.*the database is away"):
        calls[0].get(timeout=0)
    assert "the database is away" in ask(Client.current(), GetCall(calls[0].object_id))["waits"]
    broken.unlink()
    assert [call.get(timeout=60) for call in calls] == [f"fine {x}" for x in range(20)]
    assert fragile.work.remote(2) == "fine 2" and not rows("away")[0]["blocked"]


def test_reason_and_next_try_are_shown(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    fragile = deploy("shown", broken)
    break_it("shown", broken)
    fragile.work.spawn(1)
    wait_until(lambda: rows("shown")[0]["start_failures"] >= 2, "it has failed twice")
    app = ask(Client.current(), GetApp("shown"))["functions"][0]
    stats = ask(Client.current(), GetFunctionStats(app="shown"))["rows"][0]
    for row in (app, stats):
        assert "the database is away" in row["blocked"] and "next start in" in row["blocked"]
    for words in (["app", "info", "shown"], ["app", "stats", "shown"], ["function", "info", "shown.Fragile"]):
        assert "the database is away" in command(*words).stdout
    assert "`Fragile` does not start" in command("app", "logs", "shown").stderr
    broken.unlink()
    wait_until(lambda: not rows("shown")[0]["blocked"], "it starts again")


def test_new_version_and_rollover_begin_anew_with_what_waits(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    fragile = deploy("fixed", broken, min_containers=0)
    break_it("fixed", broken)
    first = fragile.work.spawn(1)
    wait_until(lambda: rows("fixed")[0]["start_failures"] >= 4, "the back-off has grown")
    with pytest.raises(StartupError, match="the database is away"):
        deploy("fixed", broken, "broken still")
    deploy("fixed", tmp_path / "never", "mended")
    assert first.get(timeout=20) == "mended 1" and not rows("fixed")[0]["start_failures"]
    deploy("fixed", broken := tmp_path / "again")
    break_it("fixed", broken)
    second = fragile.work.spawn(2)
    wait_until(lambda: rows("fixed")[0]["start_failures"] >= 4, "the back-off has grown again")
    broken.unlink()
    ask(Client.current(), RedeployApp("fixed", "rollover"))
    assert second.get(timeout=20) == "fine 2"


def keep_secret(name: str, **values: str) -> None:
    Client.current().link.request(PutSecret(name, True), json.dumps(values).encode()).wait(20)


def test_changed_secret_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUALL_RUNTIME", "native")
    with own_home():
        _fail_of_a_secret()


def _fail_of_a_secret() -> None:
    keep_secret("db", PASSWORD="right")
    app = squall.App("keyed")

    @app.cls(serialized=True, name="Keyed", secrets=[squall.Secret.from_name("db")], scaledown_window=2)
    class Keyed:
        @squall.enter()
        def begin(self) -> None:
            import os

            if os.environ["PASSWORD"] != "right":
                raise RuntimeError("the database refused the password")

        @squall.method()
        def work(self) -> str:
            return "fine"

    app.deploy()
    keyed = squall.Cls.from_name("keyed", "Keyed")()
    keep_secret("db", PASSWORD="wrong")
    wait_until(lambda: not rows("keyed")[0]["containers"], "its container of the trial has ended")
    call = keyed.work.spawn()
    wait_until(lambda: rows("keyed")[0]["start_failures"] >= 4, "the back-off has grown")
    keep_secret("db", PASSWORD="right")
    assert call.get(timeout=20) == "fine"
    Client.current().link.request(DeleteSecret("db")).wait(20)
    wait_until(lambda: not rows("keyed")[0]["containers"], "its containers have ended")
    waiting = keyed.work.spawn()
    with pytest.raises(Error, match="no secret `db`"):
        keyed.work.remote()
    wait_until(lambda: "no secret `db`" in rows("keyed")[0]["blocked"], "it is said what is missing")
    keep_secret("db", PASSWORD="right")
    assert waiting.get(timeout=20) == "fine", "a secret that is gone is nothing that spawned inputs end of"


def test_back_off_survives_a_restart_of_the_server(tmp_path: Path, home: Path) -> None:
    broken = tmp_path / "broken"
    fragile = deploy("lasting", broken)
    break_it("lasting", broken)
    call = fragile.work.spawn(1)
    wait_until(lambda: rows("lasting")[0]["start_failures"] >= 5, "the back-off has grown", 60)
    restart(home)
    row = rows("lasting")[0]
    assert row["start_failures"] >= 5 and "the database is away" in row["blocked"] and row["backlog"] == 1
    with pytest.raises(StartupError, match="the database is away") as caught:
        fragile.work.remote(2)
    assert isinstance(caught.value.__cause__, RuntimeError), "the traceback is that of the last start"
    assert not containers_of("Fragile", include_all=True), "nothing was started to find out"
    broken.unlink()
    assert call.get(timeout=60) == "fine 1"
    restart(home)
    assert not rows("lasting")[0]["start_failures"] and fragile.work.remote(3) == "fine 3"
