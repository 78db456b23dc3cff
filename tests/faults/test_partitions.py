"""Server and nodes parted from each other: what runs goes on, is given to others, or taken back; one result each."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from squall import FunctionCall
from squall.client import Client
from squall.exception import ServiceError
from squall.protocol.requests import ListObjects
from tests.conftest import wait_until
from tests.faults import apart
from tests.integration.staying import ask, here
from tests.integration.support import Kept, Outcome, is_alive, pid_of
from tests.relay import Relay

pytestmark = pytest.mark.root

BEAT = "0.3"


class Machine:
    """A node with a network between it and the server."""

    def __init__(self, server_home: Path, log: Any) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="squall-node-"))
        for name in ("run", "state", "node"):
            (self.home / name).mkdir(mode=0o700)
        self.net = Relay(str(server_home / "run/server.sock"), str(self.home / "run/server.sock"))
        self.net.carry_sockets(self.home / "run/handoff.sock", server_home / "run/handoff.sock")
        env = {**os.environ, "SQUALL_HOME": str(self.home), "SQUALL_RUNTIME": "process"}
        self.agent = subprocess.Popen([sys.executable, "-m", "squall.node"], env=env, stdout=log, stderr=log)

    def close(self) -> None:
        self.agent.terminate()
        self.agent.wait(30)
        self.net.close()
        shutil.rmtree(self.home)


class Cluster:
    def __init__(self, home: Path, directory: Path, stack: contextlib.ExitStack) -> None:
        self.home = home
        self.directory = directory
        self.notes = str(directory / "notes")
        Path(self.notes).touch()
        self.log = stack.enter_context((directory / "log").open("wb"))
        self.stack = stack
        env = {**os.environ, "SQUALL_NODE_HEARTBEAT": BEAT, "SQUALL_RUNTIME": "process"}
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.apart"], env=env, stdout=self.log, stderr=self.log
        )
        stack.callback(self._end_server)
        wait_until(self._serves, "it serves")

    def _serves(self) -> bool:
        try:
            return self.healths() == []
        except ServiceError:
            return False

    def _end_server(self) -> None:
        self.server.terminate()
        self.server.wait(30)

    def node(self) -> Machine:
        before = len(self.healths())
        machine = Machine(self.home, self.log)
        self.stack.callback(machine.close)
        wait_until(lambda: len(self.healths()) > before, "the node is there")
        return machine

    def nodes(self) -> list[dict[str, Any]]:
        client = here()
        try:
            found: list[dict[str, Any]] = ask(client, ListObjects("nodes"))["rows"]
            return found
        finally:
            client.close()

    def healths(self) -> list[str]:
        return [str(row["health"]) for row in self.nodes()]

    def noted(self, word: str) -> Counter[int]:
        """How often each input began (`ran`) or ended (`done`)."""
        lines = [line.split() for line in Path(self.notes).read_text().splitlines()]
        return Counter(int(x) for said, x, _ in lines if said == word)

    def tokens(self, x: int) -> list[str]:
        lines = [line.split() for line in Path(self.notes).read_text().splitlines()]
        return [token for said, n, token in lines if said == "ran" and int(n) == x]

    def said(self, text: str) -> int:
        return (self.directory / "log").read_text().count(text)

    def gate(self, name: str) -> Path:
        return self.directory / name


@pytest.fixture
def cluster(home: Path, tmp_path: Path) -> Iterator[Cluster]:
    with contextlib.ExitStack() as stack:
        yield Cluster(home, tmp_path, stack)


def hold(cluster: Cluster, gate: Path, *numbers: int) -> Outcome:
    """Calls that end once the gate is open."""
    return Outcome(
        lambda: list(apart.hold.starmap([(cluster.notes, n, str(gate)) for n in numbers], order_outputs=True))
    )


@pytest.mark.parametrize("directions", [("up", "down"), ("down",), ("up",)], ids="-".join)
def test_inputs_of_a_node_that_was_cut_off_go_on_and_what_they_gave_is_taken_when_it_is_back(
    cluster: Cluster, directions: tuple[str, ...]
) -> None:
    """Nobody else could run them meanwhile."""
    machine = cluster.node()
    with apart.app.run(output=Kept()):
        first, second = cluster.gate("first"), cluster.gate("second")
        called = hold(cluster, first, 1, 2)
        spawned = apart.hold.spawn(cluster.notes, 3, str(second))
        wait_until(lambda: set(cluster.noted("ran")) == {1, 2, 3}, "they run")
        machine.net.part(*directions)
        wait_until(lambda: cluster.healths() == ["lost"], "the node is lost")
        first.touch()
        wait_until(lambda: set(cluster.noted("done")) == {1, 2}, "what runs there goes on")
        machine.net.heal()
        assert [x for x, _ in called.result()] == [1, 2]
        second.touch()
        assert spawned.get(timeout=60)[0] == 3
        assert cluster.noted("ran") == {1: 1, 2: 1, 3: 1}
        wait_until(lambda: cluster.healths() == ["up"], "it is trusted again")
        assert apart.hold.remote(cluster.notes, 4, "")[0] == 4
        assert cluster.said("node lost") == 1


def test_inputs_are_given_to_another_node_and_what_the_lost_one_says_later_counts_no_more(cluster: Cluster) -> None:
    lost = cluster.node()
    with apart.app.run(output=Kept()):
        gate = cluster.gate("gate")
        spawned = apart.hold.spawn_map([cluster.notes] * 2, [1, 2], [str(gate)] * 2)
        single = hold(cluster, gate, 3)
        wait_until(lambda: set(cluster.noted("ran")) == {1, 2, 3}, "they run")
        cluster.node()
        lost.net.part()
        wait_until(
            lambda: set(cluster.noted("ran").values()) == {2}, "all of them run a second time, on the other node"
        )
        gate.touch()
        results = [spawned.get(timeout=60, index=0), spawned.get(timeout=60, index=1), *single.result()]
        assert [token for _, token in results] == [cluster.tokens(x)[1] for x in (1, 2, 3)]
        wait_until(lambda: set(cluster.noted("done").values()) == {2}, "they ended on the lost node too")
        lost.net.heal()
        wait_until(lambda: sorted(cluster.healths()) == ["up", "up"], "it is back")
        again = [FunctionCall.from_id(spawned.object_id).get(timeout=60, index=n) for n in (0, 1)]
        assert again == results[:2]
        assert cluster.noted("ran") == {1: 2, 2: 2, 3: 2}


def test_a_short_break_costs_nothing(cluster: Cluster) -> None:
    machine = cluster.node()
    with apart.app.run(output=Kept()):
        gate = cluster.gate("gate")
        called = hold(cluster, gate, 1, 2)
        wait_until(lambda: set(cluster.noted("ran")) == {1, 2}, "they run")
        machine.net.part()
        wait_until(lambda: cluster.healths() == ["suspected"], "it is suspected")
        machine.net.heal()
        wait_until(lambda: cluster.healths() == ["up"], "it is trusted again")
        machine.net.cut()  # also what runners say passes here: they find each other again
        gate.touch()
        assert [x for x, _ in called.result()] == [1, 2]
        assert cluster.noted("ran") == {1: 1, 2: 1}
        assert cluster.said("node lost") == 0


def open_descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_a_server_that_stands_still_is_noticed_by_its_agent_which_finds_it_again(cluster: Cluster) -> None:
    machine = cluster.node()
    with apart.app.run(output=Kept()):
        assert apart.hold.remote(cluster.notes, 0, "")[0] == 0
        gate = cluster.gate("gate")
        called = hold(cluster, gate, 1, 2)
        wait_until(lambda: set(cluster.noted("ran")) == {0, 1, 2}, "they run")
        descriptors = open_descriptors(machine.agent.pid)
        for n in range(1, 4):
            cluster.server.send_signal(signal.SIGSTOP)
            wait_until(lambda n=n: cluster.said("nothing was heard of it for") == n, "the agent has noticed")  # type: ignore[misc]
            cluster.server.send_signal(signal.SIGCONT)
            wait_until(lambda n=n: cluster.said("node back") == n, "it is back")  # type: ignore[misc]
        gate.touch()
        assert [x for x, _ in called.result()] == [1, 2]
        assert cluster.noted("ran") == {0: 1, 1: 1, 2: 1}
        assert cluster.said("node lost") == 0
        assert open_descriptors(machine.agent.pid) <= descriptors + 2


def test_an_agent_that_hangs_is_killed_and_its_inputs_run_with_the_next(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQUALL_NODE_HEARTBEAT", BEAT)
    monkeypatch.setenv("SQUALL_RUNTIME", "process")
    notes, gate = str(tmp_path / "notes"), tmp_path / "gate"
    with apart.app.run(output=Kept()):
        called = Outcome(lambda: apart.hold.remote(notes, 1, str(gate)))
        wait_until(lambda: Path(notes).exists(), "it runs")
        hung = pid_of(home, "node")
        os.kill(hung, signal.SIGSTOP)
        wait_until(lambda: not is_alive(hung), "it is killed")
        wait_until(lambda: Path(notes).read_text().count("ran 1") == 2, "its input runs again")
        gate.touch()
        assert called.result()[0] == 1
        assert Client.current().usable()
