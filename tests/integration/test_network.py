"""Programs whose connection to a server elsewhere breaks, and who come back: nothing is lost, doubled or run twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from squall import FunctionCall
from squall.exception import ServiceError
from squall.protocol.requests import GetServer, ListObjects, RevokeToken
from tests import certificates
from tests.conftest import wait_until
from tests.integration import durable
from tests.integration.staying import ask, client_of, here, new_token, up
from tests.integration.staying import squall as command
from tests.integration.support import Kept, Outcome, kept_logs, pid_of
from tests.relay import Relay, relay

pytestmark = pytest.mark.root

SEED = os.environ.get("FAULTS_SEED") or os.urandom(4).hex()


class Net:
    """A server that stays, and the way to it."""

    def __init__(self, home: Path, url: str, between: Relay, ca_file: str = "") -> None:
        self.home = home
        self.url = url
        self.between = between
        self.ca_file = ca_file
        self.token = new_token()

    @property
    def way(self) -> str:
        return self.between.url.replace("http", "https") if self.ca_file else self.between.url

    def client(self, **more: Any) -> Any:
        return client_of(self.way, self.token, ca_file=self.ca_file, **more)


@pytest.fixture
def net(home: Path, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Net]:
    words: tuple[str, ...] = ()
    ca_file = ""
    if getattr(request, "param", "") == "tls":
        files = certificates.make(tmp_path, "127.0.0.1")
        words, ca_file = ("--tls-cert", str(files.cert), "--tls-key", str(files.key)), str(files.authority)
    url = up(*words, SQUALL_HEARTBEAT="0.5")
    with relay(("127.0.0.1", int(url.rpartition(":")[2]))) as between:
        yield Net(home, url, between, ca_file)


def runs() -> Counter[int]:
    """How often each input was run."""
    lines = kept_logs("durable").decode().splitlines()
    return Counter(int(word) for line in lines if (word := line.removeprefix("ran ")) != line)


def listed(kind: str, **more: Any) -> list[dict[str, Any]]:
    """What the server lists, asked for on its own machine."""
    client = here()
    try:
        found: list[dict[str, Any]] = ask(client, ListObjects(kind, limit=1000, **more))["rows"]
        return found
    finally:
        client.close()


def containers_of(function: str) -> list[dict[str, Any]]:
    return [row for row in listed("containers") if row["function"] == function]


def under_way(function: str) -> None:
    wait_until(lambda: any(row["running"] for row in containers_of(function)), f"`{function}` runs")


@pytest.mark.parametrize("net", ["plain", "tls"], indirect=True)
def test_calls_complete_and_none_runs_twice_when_the_connection_breaks_again_and_again(net: Net) -> None:
    print(f"FAULTS_SEED={SEED}")
    rng = random.Random(SEED)
    left = [rng.randrange(2_000, 20_000)]

    def is_time() -> bool:
        left[0] -= 1000
        if left[0] > 0 or net.between.broken >= 25:
            return False
        left[0] = rng.randrange(2_000, 60_000)
        return True

    with net.client(), durable.app.run(output=Kept()):
        assert durable.step.remote(0.0, -1) == -1
        net.between.limit = is_time
        mapped = Outcome(lambda: list(durable.step.map([0.01] * 300, range(300))))
        unordered = Outcome(lambda: sorted(durable.step.map([0.01] * 100, range(300, 400), order_outputs=False)))
        single = Outcome(lambda: [durable.step.remote(0.0, n) for n in range(400, 440)])
        spawned = Outcome(lambda: [durable.step.spawn(0.0, n) for n in range(440, 460)])
        assert mapped.result() == list(range(300))
        assert unordered.result() == list(range(300, 400))
        assert single.result() == list(range(400, 440))
        assert FunctionCall.gather(*spawned.result()) == list(range(440, 460))
        wait_until(lambda: set(runs()) == {-1, *range(460)}, "all its output is there")
        assert {n: times for n, times in runs().items() if times > 1} == {}
        assert net.between.broken > 2


def test_output_comes_once_and_whole_over_a_connection_that_breaks(net: Net) -> None:
    with net.client():
        shown = Kept()
        with durable.app.run(output=shown):
            call = Outcome(lambda: list(durable.one_by_one.map([0.02] * 100, range(100))))
            for n in (10, 40, 70):
                wait_until(lambda n=n: f"ran {n}\n".encode() in shown.text(), "it has come so far")  # type: ignore[misc]
                net.between.cut()
            assert call.result() == list(range(100))
        assert shown.text().decode().splitlines() == [f"ran {n}" for n in range(100)]


def test_a_client_whose_grace_is_over_has_gone_and_what_it_spawned_goes_on(net: Net) -> None:
    shown = Kept()
    with net.client(reconnect_timeout=0.5) as client:
        app = durable.app.run(output=shown)
        app.__enter__()
        spawned = durable.step.spawn(4.0, 1)
        held = Outcome(lambda: durable.one_by_one.remote(600.0, 2))
        wait_until(lambda: set(runs()) == {1, 2}, "both run")
        net.between.part()
        wait_until(lambda: client.link.closed, "the client has given up")
        assert "could not be made again within 0.5 s" in client.link.closed
        assert isinstance(held.error(), ServiceError)
        app.__exit__(None, None, None)
    net.between.heal()
    assert FunctionCall.from_id(spawned.object_id).get(timeout=60) == 1
    wait_until(lambda: not containers_of("one_by_one"), "what it waited for is cancelled")
    wait_until(lambda: "its client went away" in reasons(), "its app has stopped, for a reason")


def reasons() -> set[str]:
    return {str(row["reason"]) for row in listed("apps", all=True)}


def program(net: Net, body: str) -> subprocess.Popen[str]:
    """A program of its own that comes over the relay."""
    env = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "SQUALL_SERVER": net.between.url,
        "SQUALL_TOKEN_ID": net.token["token_id"],
        "SQUALL_TOKEN_SECRET": net.token["secret"],
        "SQUALL_RECONNECT_TIMEOUT": "3",
    }
    return subprocess.Popen([sys.executable, "-c", body], stdout=subprocess.PIPE, text=True, env=env)


BODY = """
from tests.integration import durable
with durable.app.run():
    durable.step.remote(0.0, 1)
    print("ready", flush=True)
    list(durable.step.map([600.0] * 50, range(50)))
"""


def test_a_program_elsewhere_that_is_killed_is_waited_for_and_then_its_inputs_are_cancelled(net: Net) -> None:
    with program(net, BODY) as made:
        assert made.stdout is not None
        assert any(line == "ready\n" for line in iter(made.stdout.readline, ""))
        under_way("step")
        made.send_signal(signal.SIGKILL)
    assert away(net) == 1
    wait_until(lambda: not containers_of("step"), "its containers are gone")
    assert "its client went away" in reasons()


def away(net: Net) -> int:
    client = here()
    try:
        found = 0

        def looks() -> bool:
            nonlocal found
            found = ask(client, GetServer())["away"]
            return bool(found)

        wait_until(looks, "the server waits for it")
        return found
    finally:
        client.close()


def test_a_client_that_says_goodbye_is_not_waited_for(net: Net) -> None:
    with net.client() as client:
        app = durable.app.run(output=Kept())
        app.__enter__()
        held = Outcome(lambda: durable.step.remote(600.0, 1))
        wait_until(lambda: set(runs()) == {1}, "it runs")
        client.close()
        assert isinstance(held.error(), ServiceError)
    wait_until(lambda: not containers_of("step"), "its containers are gone", 10)
    durable.app._running = None


def test_a_token_that_is_revoked_meanwhile_ends_the_app_and_is_named(net: Net) -> None:
    with net.client() as client:
        app = durable.app.run(output=Kept())
        app.__enter__()
        held = Outcome(lambda: durable.step.remote(600.0, 1))
        wait_until(lambda: set(runs()) == {1}, "it runs")
        net.between.part()
        net.between.cut()
        assert away(net) == 1
        operator = here()
        ask(operator, RevokeToken(net.token["token_id"]))
        operator.close()
        wait_until(lambda: not containers_of("step"), "its app has ended")
        net.between.heal()
        assert isinstance(held.error(), ServiceError)
        assert "was revoked" in client.link.closed
    durable.app._running = None


def test_calls_that_were_given_up_while_the_connection_was_broken_are_cancelled(net: Net) -> None:
    with net.client(), durable.app.run(output=Kept()):
        results = durable.step.map([0.0] + [600.0] * 3, range(4))
        assert next(results) == 0
        wait_until(lambda: len(runs()) == 4, "they run")
        net.between.part()
        net.between.cut()
        assert away(net) == 1
        results.close()
        net.between.heal()
        wait_until(lambda: not any(row["running"] for row in containers_of("step")), "they are cancelled")
        assert durable.step.remote(0.0, 5) == 5


def test_calls_go_on_when_the_server_is_killed_and_comes_back_while_the_network_is_down(net: Net) -> None:
    with net.client(), durable.app.run(output=Kept()):
        assert durable.step.remote(0.0, 0) == 0
        call = Outcome(lambda: list(durable.step.map([1.0] * 8, range(1, 9))))
        wait_until(lambda: len(runs()) > 1, "it runs")
        net.between.part()
        os.kill(pid_of(net.home, "server"), signal.SIGKILL)
        net.between.cut()
        done = command("up", "--detach", "--listen", net.url.removeprefix("http://"))
        assert done.returncode == 0, done.stderr
        net.between.heal()
        assert call.result() == list(range(1, 9))


def test_a_server_that_is_somewhere_else_is_given_up_at_the_deadline_with_the_address(net: Net) -> None:
    with net.client(reconnect_timeout=1.0) as client:
        app = durable.app.run(output=Kept())
        app.__enter__()
        net.between.close()
        wait_until(lambda: client.link.closed, "the client has given up")
        assert "could not be made again within 1 s: cannot connect to the server at" in client.link.closed
        assert net.between.url in client.link.closed
    durable.app._running = None
