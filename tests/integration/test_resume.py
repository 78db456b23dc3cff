"""A program goes on when its server is killed or ended under it: nothing is lost, doubled or out of order."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import squall
from squall.client import Client
from squall.exception import CancelledError, ServiceError
from squall.protocol.requests import StopServer
from tests.conftest import wait_until
from tests.integration import durable
from tests.integration.support import Kept, Outcome, containers_of, kept_logs, pid_of, rows

pytestmark = pytest.mark.root

ROOT = Path(__file__).parents[2]


def end_server(home: Path, signum: int = signal.SIGKILL) -> int:
    """Send the home's server a signal; its pid."""
    pid = pid_of(home, "server")
    assert pid, "there is no server"
    os.kill(pid, signum)
    return pid


def under_way(function: str) -> None:
    wait_until(lambda: any(row["running"] for row in containers_of(function)), f"`{function}` runs")


def lines_of(app: str) -> list[str]:
    return kept_logs(app).decode().splitlines()


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_map_completes_in_order_when_the_server_ends_under_it(home: Path, signum: int) -> None:
    with durable.app.run(output=Kept()):
        call = Outcome(lambda: list(durable.step.map([0.02] * 200, range(200))))
        under_way("step")
        end_server(home, signum)
        assert call.result() == list(range(200))


def test_an_unordered_map_gives_each_result_once_over_two_servers(home: Path) -> None:
    with durable.app.run(output=Kept()):
        call = Outcome(lambda: list(durable.step.map([0.03] * 150, range(150), order_outputs=False)))
        for _ in range(2):
            under_way("step")
            end_server(home)
            wait_until(lambda: pid_of(home, "server"), "another server is there")
        assert sorted(call.result()) == list(range(150))


def test_results_that_were_delivered_are_not_run_again(home: Path) -> None:
    with durable.app.run(output=Kept()):
        results = durable.one_by_one.map([0.0] * 20 + [1.0] * 5, range(25))
        assert [next(results) for _ in range(20)] == list(range(20))
        wait_until(lambda: len(lines_of("durable")) >= 20, "their output was kept")
        end_server(home)
        assert list(results) == list(range(20, 25))
        wait_until(lambda: "ran 24" in lines_of("durable"), "the rest has run")
        runs = lines_of("durable")
        assert [runs.count(f"ran {n}") for n in range(20)] == [1] * 20


def test_a_call_from_a_lazy_iterator_goes_on(home: Path) -> None:
    feed = threading.Event()

    def inputs() -> Iterator[int]:
        yield from range(5)
        feed.wait(60)
        yield from range(5, 10)

    with durable.app.run(output=Kept()):
        call = Outcome(lambda: list(durable.step.starmap((0.0, n) for n in inputs())))
        wait_until(lambda: lines_of("durable").count("ran 4"), "what was fed has run")
        end_server(home)
        feed.set()
        assert call.result() == list(range(10))


def test_a_single_call_and_an_async_one_complete(home: Path) -> None:
    import asyncio

    async def both() -> list[int]:
        return list(await asyncio.gather(durable.step.remote.aio(1.0, 1), durable.step.remote.aio(1.0, 2)))

    with durable.app.run(output=Kept()):
        calls = [Outcome(lambda: durable.step.remote(1.0, 3)), Outcome(lambda: asyncio.run(both()))]
        under_way("step")
        end_server(home)
        assert [call.result() for call in calls] == [3, [1, 2]]


def test_a_generator_that_has_yielded_says_that_it_is_not_run_again(home: Path) -> None:
    with durable.app.run(output=Kept()):
        values = durable.count.remote_gen(1000, 0.05)
        assert next(values) == 0
        end_server(home)
        with pytest.raises(ServiceError, match="broke while `count` yielded"):
            list(values)
        assert list(durable.count.remote_gen(3, 0.0)) == [0, 1, 2]


def test_a_generator_that_has_not_yielded_starts_over(home: Path) -> None:
    with durable.app.run(output=Kept()):
        call = Outcome(lambda: list(durable.count.remote_gen(2, 1.0)))
        under_way("count")
        end_server(home)
        assert call.result() == [0, 1]


def test_handles_and_variants_are_good_after_a_restart(home: Path) -> None:
    with durable.app.run(output=Kept()):
        variant = durable.step.with_options(cpu=0.2)
        before = durable.step.object_id
        assert (durable.step.remote(0.0, 1), variant.remote(0.0, 2)) == (1, 2)
        end_server(home)
        assert (durable.step.remote(0.0, 3), durable.step.object_id) == (3, before)
        assert variant.remote(0.0, 4) == 4
        assert variant.spawn(0.0, 5).get(timeout=30) == 5


def test_waiting_for_a_result_outlives_the_server(home: Path) -> None:
    with durable.app.run(output=Kept()):
        calls = [durable.step.spawn(1.0, n) for n in range(4)]
        waiting = Outcome(lambda: squall.FunctionCall.gather(*calls))
        under_way("step")
        end_server(home)
        assert waiting.result() == [0, 1, 2, 3]


def test_an_upload_is_begun_again(home: Path) -> None:
    with durable.app.run(output=Kept()):
        durable.reveal.remote(0.0, b"")
        data = os.urandom(32 << 20)
        call = Outcome(lambda: durable.reveal.remote(0.0, data))
        wait_until(lambda: any((home / "blobs" / "incoming").iterdir()), "the upload has begun")
        end_server(home)
        assert call.result() == (11, 32 << 20)


def test_a_server_that_is_told_to_end_is_not_started_again(home: Path) -> None:
    with durable.app.run(output=Kept()):
        call = Outcome(lambda: durable.step.remote(600.0, 1))
        under_way("step")
        with contextlib.closing(Client.connect(autostart=False)) as other:
            other.link.request(StopServer("a test")).wait(20)
        assert isinstance(call.error(), CancelledError)
        wait_until(lambda: not pid_of(home, "server"), "the server has ended")
    assert not pid_of(home, "server")


def test_without_patience_a_call_fails_at_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUALL_RECONNECT_TIMEOUT", "0")
    with durable.app.run(output=Kept()):
        call = Outcome(lambda: durable.step.remote(600.0, 1))
        under_way("step")
        end_server(home)
        assert isinstance(call.error(), ServiceError)


def test_a_client_that_is_killed_ends_its_app_and_cancels_its_inputs(home: Path) -> None:
    body = "from tests.integration import durable\nwith durable.app.run():\n    durable.step.remote(0.0, 1)\n"
    body += "    print('ready', flush=True)\n    list(durable.step.map([600.0] * 50, range(50)))\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", body], stdout=subprocess.PIPE, text=True, env=environment) as program:
        assert program.stdout is not None
        assert any(line == "ready\n" for line in iter(program.stdout.readline, ""))
        under_way("step")
        program.send_signal(signal.SIGKILL)
        wait_until(lambda: not rows("apps") and not rows("containers"), "the app and its containers are gone", 20)
