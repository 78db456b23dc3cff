"""kill -9 of anything at any moment, 2,000 calls under way: what was acknowledged is done, once, and nothing is left.

A seed decides which calls are made, who is killed in which round, and after how many calls; the moment within a call is
the machine's. It is printed when the test fails, and `FAULTS_SEED` sets it; `FAULTS_ROUNDS` sets the number of kills.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from squall import FunctionCall
from squall.exception import Error
from squall.protocol.requests import ChangeSchedule
from tests.conftest import wait_until
from tests.faults import chaos
from tests.faults.program import MAP_INPUTS, Line, lines_of
from tests.faults.traces import traces_of
from tests.integration.conftest import own_home
from tests.integration.staying import ask, here
from tests.integration.support import children_of, inits, is_alive, kept_logs, pid_of, rows, zygotes

pytestmark = [pytest.mark.root, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
SEED = os.environ.get("FAULTS_SEED") or os.urandom(4).hex()
ROUNDS = int(os.environ.get("FAULTS_ROUNDS") or 50)
CALLS = 2000
PROGRAMS = 3
CAME_BACK_SECONDS = 60.0
"""Until something has come back that was killed."""


class Supervisor(threading.Thread):
    """Keeps a server of `squall up` running, as systemd does."""

    def __init__(self, home: Path) -> None:
        super().__init__(daemon=True)
        self.home = home
        self.log = home / "up.log"
        self.stopping = False
        self.start()
        wait_until(lambda: (home / "run/server.sock").exists(), "the server serves", CAME_BACK_SECONDS)

    def run(self) -> None:
        while not self.stopping:
            with self.log.open("ab") as log:
                command = [sys.executable, "-m", "squall.cli", "up"]
                subprocess.run(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, check=False)

    def stop(self) -> None:
        """End the server, for good. Idempotent."""
        if self.stopping:
            return
        self.stopping = True
        command = [sys.executable, "-m", "squall.cli", "down"]
        subprocess.run(command, check=True, capture_output=True, timeout=CAME_BACK_SECONDS)
        self.join(CAME_BACK_SECONDS)


class Programs:
    """Programs that make the calls, started again when they were killed."""

    def __init__(self, home: Path, executions: str) -> None:
        self.logs = [home / f"program-{n}.log" for n in range(PROGRAMS)]
        self._executions = executions
        self._home = home
        self._running: list[subprocess.Popen[bytes] | None] = [None] * PROGRAMS
        self.kills = 0
        for number in range(PROGRAMS):
            self._launch(number)

    def _launch(self, number: int) -> None:
        first, last = (CALLS * n // PROGRAMS for n in (number, number + 1))
        words = [SEED, str(first), str(last), str(self.logs[number]), self._executions]
        with (self._home / f"program-{number}.errors").open("ab") as errors:
            self._running[number] = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.program", *words],
                env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=errors, stderr=errors,
            )  # fmt: skip

    def lines(self) -> list[Line]:
        return [line for log in self.logs for line in lines_of(log)]

    def made(self) -> int:
        """Calls of which they know the end, or that they are on disk."""
        return sum(log.read_bytes().count(b'"op"') for log in self.logs if log.exists())

    def kill(self, rng: random.Random) -> bool:
        """Kill one and start it again."""
        running = [n for n, program in enumerate(self._running) if program is not None and program.poll() is None]
        if not running:
            return False
        number = rng.choice(running)
        program = self._running[number]
        assert program is not None
        program.kill()
        program.wait()
        self.kills += 1
        self._launch(number)
        return True

    def check(self) -> None:
        """None of them has failed."""
        for number, program in enumerate(self._running):
            if program is not None and program.poll() not in (None, 0):
                pytest.fail((self._home / f"program-{number}.errors").read_text())

    def have_ended(self) -> bool:
        self.check()
        return all(program is not None and program.poll() == 0 for program in self._running)

    def end(self) -> None:
        for program in self._running:
            if program is not None and program.poll() is None:
                program.kill()
                program.wait()


class Chaos:
    """The rounds, and what the schedule was seen to do meanwhile."""

    def __init__(self, home: Path, programs: Programs) -> None:
        self.home = home
        self.programs = programs
        self.rng = random.Random(SEED)
        self.kills: Counter[str] = Counter()
        self.firings: dict[float, set[str]] = {}

    def run(self, rounds: int) -> None:
        for number in range(rounds):
            after = (number + self.rng.random()) * CALLS / rounds
            wait_until(lambda at=after: self._has_made(at), f"{after:.0f} calls are made", CAME_BACK_SECONDS * 2)  # type: ignore[misc]
            self._kill_one()
        wait_until(self.programs.have_ended, lambda: f"all is made, not only {self.programs.made()}", 240)

    def _has_made(self, calls: float) -> bool:
        self.programs.check()
        return self.programs.made() >= calls

    def _kill_one(self) -> None:
        bodies: dict[str, Callable[[], bool]] = {
            "server": lambda: kill(pid_of(self.home, "server")),
            "restart": lambda: kill(pid_of(self.home, "server"), signal.SIGTERM),
            "agent": lambda: kill(pid_of(self.home, "node")),
            "zygote": lambda: kill(self._one_of(self._zygotes())),
            "container": lambda: kill(self._one_of(self._in_containers())),
            "program": lambda: self.programs.kill(self.rng),
        }
        who = self.rng.choice(list(bodies))
        wait_until(bodies[who], f"there is a {who} to kill", CAME_BACK_SECONDS)
        self.kills[who] += 1

    def _one_of(self, pids: list[int]) -> int:
        return self.rng.choice(sorted(pids)) if pids else 0

    def _zygotes(self) -> list[int]:
        return zygotes(self.home) if os.environ.get("SQUALL_RUNTIME") != "process" else self._in_containers()

    def _in_containers(self) -> list[int]:
        """Init and runner of each container; with plain processes, the runners."""
        if os.environ.get("SQUALL_RUNTIME") == "process":
            return children_of(pid_of(self.home, "node"))
        first = list(inits(self.home).values())
        return [*first, *(child for pid in first for child in children_of(pid))]

    def look_at_schedule(self) -> None:
        with contextlib.suppress(Error, TimeoutError):
            for row in rows("schedules"):
                for one in row["recent"]:
                    self.firings.setdefault(one["at"], set()).add(one.get("call_id", ""))


def kill(pid: int, signum: int = signal.SIGKILL) -> bool:
    """Wait until it is gone; False when there was nobody."""
    if not pid:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)
        wait_until(lambda: not is_alive(pid), f"{pid} is gone")
        return True
    return False


# ---- what must be true at the end -----------------------------------------------------------------------------------


class Executions:
    """What ran, by input: the tokens of its executions."""

    def __init__(self, text: str) -> None:
        self.tokens: dict[tuple[str, int], list[str]] = {}
        for line in text.splitlines():
            words = line.split()
            if len(words) == 4 and words[0] == "ran":
                self.tokens.setdefault((words[1], int(words[2])), []).append(words[3])

    def check(self, results: dict[tuple[str, int], str], kills: int) -> None:
        """Each result is of an execution that was; what ran more than once did so because something was killed."""
        for key, token in results.items():
            assert token in self.tokens.get(key, []), f"input {key} has a result of no execution that was seen"
        most = max(self.tokens, key=lambda key: len(self.tokens[key]))
        assert len(self.tokens[most]) <= 1 + kills, f"input {most} ran {len(self.tokens[most])} times"
        more = sum(len(tokens) - 1 for tokens in self.tokens.values())
        assert more <= kills * chaos.CONTAINERS, f"{more} executions beyond the first, of {kills} kills"
        assert len(set().union(*map(set, self.tokens.values()))) == sum(map(len, self.tokens.values()))


def check_calls(lines: list[Line]) -> None:
    """Each call was made once, and what was given at once is whole and in order."""
    assert sorted(line["op"] for line in lines) == list(range(CALLS))
    for line in lines:
        if line["kind"] in ("map", "remote"):
            count = MAP_INPUTS if line["kind"] == "map" else 1
            assert [result[:2] for result in line["results"]] == [[line["run"], idx] for idx in range(count)], line


def check_spawned(lines: list[Line]) -> dict[tuple[str, int], str]:
    """Each acknowledged input has its result, the same whenever it is read; the token of each."""
    got = {line["got"]: line["result"] for line in lines if "got" in line}
    found: dict[tuple[str, int], str] = {}
    for line in lines:
        for idx in range(line["inputs"] if "call_id" in line else 0):
            call = FunctionCall.from_id(line["call_id"])
            first, second = (call.get(timeout=CAME_BACK_SECONDS, index=idx) for _ in range(2))
            assert first == second, f"two results of {line}"
            assert list(first[:2]) == [line["run"], idx], f"{first} is the result of {line}"
            if idx == 0 and line["call_id"] in got:
                assert got[line["call_id"]] == list(first), f"{line} had another result before"
            found[line["run"], idx] = first[2]
    assert len(set(found.values())) == len(found), "two inputs have one result"
    return found


def check_store(home: Path, lines: list[Line], chaos_: Chaos) -> None:
    """What is on disk: one end for each input, one call for each id and key, one for each firing."""
    with contextlib.closing(sqlite3.connect(home / "state/squall.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        calls = dict(database.execute("SELECT call_id, coalesce(parent, '') FROM calls"))
        keys = dict(database.execute("SELECT key, call_id FROM keys"))
        ends = list(database.execute("SELECT status, count(*) FROM inputs GROUP BY status"))
        empty = list(database.execute("SELECT call_id FROM calls EXCEPT SELECT call_id FROM inputs"))
    assert [status for status, _ in ends] == ["ok"], ends
    assert not empty, f"calls without an input: {empty}"
    known = {line["call_id"] for line in lines if "call_id" in line}
    assert known <= set(calls), f"acknowledged, and not there: {known - set(calls)}"
    assert keys == {line["key"]: line["call_id"] for line in lines if "key" in line}
    fired = {call_id for call_id, parent in calls.items() if parent.startswith("sc-")}
    unknown = set(calls) - known - fired
    assert not [call_id for call_id in unknown if call_id.startswith("fc-beef")], "a key made two calls"
    assert len(unknown) <= chaos_.programs.kills, f"more than programs were killed as they spawned: {unknown}"
    assert all(len(call_ids) == 1 for call_ids in chaos_.firings.values()), chaos_.firings
    assert fired >= set().union(*chaos_.firings.values())


def end_schedule() -> None:
    """Have it fire no more, and wait for what it has fired."""
    (row,) = rows("schedules")
    client = here()
    ask(client, ChangeSchedule(row["schedule_id"], "pause"))
    client.close()
    wait_until(lambda: not rows("schedules")[0]["running"], "what was fired has ended", CAME_BACK_SECONDS)


def output_of() -> str:
    """What the containers wrote, as far as it was kept: the last moment before a kill is not."""
    (app,) = rows("apps")
    return kept_logs(app["app_id"]).decode(errors="replace")


@contextlib.contextmanager
def supervised() -> Iterator[Supervisor]:
    """A server that comes back, and the app deployed there. Nothing of it is left at the end."""
    with own_home() as home:
        supervisor = Supervisor(home)
        chaos.app.deploy()
        try:
            yield supervisor
        finally:
            supervisor.stop()
        wait_until(lambda: not traces_of(home), lambda: f"these are gone: {traces_of(home)}")


@pytest.mark.parametrize(("runtime", "share"), [("native", 0.7), ("process", 0.3)])
def test_nothing_acknowledged_is_lost_or_done_twice_whatever_is_killed(
    runtime: str, share: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    print(f"FAULTS_SEED={SEED} FAULTS_ROUNDS={ROUNDS}")
    monkeypatch.setenv("SQUALL_RUNTIME", runtime)
    executions = tmp_path / "executions" if runtime == "process" else ""
    with supervised() as supervisor:
        home = supervisor.home
        programs = Programs(home, str(executions))
        rounds = Chaos(home, programs)
        try:
            rounds.run(max(1, round(ROUNDS * share)))
        finally:
            programs.end()
        lines = programs.lines()
        assert "error:" not in supervisor.log.read_text(), "something kept the server from coming back"
        check_calls(lines)
        results = check_spawned(lines)
        end_schedule()
        rounds.look_at_schedule()
        text = Path(executions).read_text() if executions else output_of()
        supervisor.stop()
        check_store(home, lines, rounds)
        seen = Executions(text)
        kept = results if executions else {key: token for key, token in results.items() if key in seen.tokens}
        seen.check(kept, sum(rounds.kills.values()))
        print(f"killed: {dict(rounds.kills)}")
