"""Durable calls over a disk that is cut off: at drawn points, at every point, and with mutants that must be found."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from squall.outages import Plan, Rehearsal, main, rehearse
from squall.server import lines
from squall.server.adoption import Adoption
from squall.server.durable import Durable
from squall.server.inputs import Container, Function, Input, Instructions
from squall.server.journal import Added, Entry, Row
from squall.server.starts import Backoff, Starts
from squall.testing import InvariantError

SEEDS = int(os.environ.get("SQUALL_TEST_SEEDS", "2000"))
BLOCK = 50
CALLS = Plan(
    retries=(2,), calls=2, call_size=12, duration=0.3, cuts=0, outage_odds=0.0, cancels=2, whole=1.0, tidy_limit=2,
    replay_limit=5,
)  # fmt: skip
SMALL = Plan(retries=(1,), calls=3, call_size=3, duration=0.5, cuts=0, outage_odds=0.0, cancels=1, held_limit=0)


@pytest.mark.parametrize("first", range(0, SEEDS, BLOCK))
def test_every_acknowledged_input_ends_once_whatever_is_cut(first: int) -> None:
    for seed in range(first, min(first + BLOCK, SEEDS)):
        rehearse(seed)


@pytest.mark.parametrize("after", [False, True])
def test_a_cut_at_every_commit_loses_nothing(after: bool) -> None:
    calm = Rehearsal(5, SMALL)
    calm.run()
    assert calm.commits > 10
    for number in range(1, calm.commits + 1):
        found = rehearse(5, Plan(**{**vars(SMALL), "cut_at": ((number, after),), "cuts": 1}))
        assert found["cuts"] == 1


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("seed", [0, 2, 3, 4])
def test_a_cancelled_call_stays_so_whichever_of_its_commits_is_the_last(seed: int, after: bool) -> None:
    calm = Rehearsal(seed, CALLS)
    found = calm.run()
    assert found.get("cancelled", 0) > 2, "it is about calls that are cancelled"
    for number in range(1, calm.commits + 1):
        rehearse(seed, Plan(**{**vars(CALLS), "cut_at": ((number, after), (number + 3, not after)), "cuts": 2}))


def test_same_seed_gives_the_same_run() -> None:
    assert rehearse(12) == rehearse(12)


def test_without_faults_each_input_runs_once() -> None:
    calm = Plan(retries=(0,), error_odds=0.0, cuts=0, outage_odds=0.0, cancels=0)
    found = rehearse(3, calm)
    assert set(found) == {"cuts", "executions", "ok"} and found["executions"] == found["ok"]


def test_replay_prints_the_story_of_a_seed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "3"]) == 0
    assert "replay: python -m squall.outages --seed 3" in capsys.readouterr().out
    assert main(["--seeds", "2"]) == 0


# ---- it finds what it is there to find ----------------------------------------------------------------------------


def queues_twice(self: Durable, batch: list[Any], outcomes: list[Any]) -> None:
    """Queues what is new although the reading of the journal comes to it too."""
    for (entry, told), outcome in zip(batch, outcomes, strict=True):
        self._count(entry.function_id, -len(entry.items))
        if isinstance(outcome, Added) and outcome.items:
            self._enqueue(entry, outcome)
        told(outcome)


def tells_too_early(self: Durable, row: Row) -> None:
    self.owner.stored([row])
    self._rows.append(row)
    if not self._finishing:
        self._finishing = True
        self.loop.call_soon(self._write_rows)


def acknowledges_too_early(self: Durable, entry: Entry, told: Any) -> None:
    told(Added(entry.call_id, 1, entry.items))
    self._count(entry.function_id, len(entry.items))
    self._entries.append((entry, lambda outcome: None))
    if not self._adding:
        self._adding = True
        self.loop.call_soon(self._write_entries)


def forgets_cancels(self: Durable, what: Any, told: Any) -> None:
    self.owner.apply(self.dispatch.cancel(self.clock.monotonic(), what.call_id, what.idxs, "asked", what.terminate))
    told(1)


def forgets_attempts(self: Durable, instruction: Any) -> None:
    pass


def tidies_what_runs(self: Durable, task: Any) -> None:
    task.spared = ()
    TIDY(self, task)


def tidies_what_has_just_ended(self: Durable, task: Any) -> None:
    task.barrier = 0
    TIDY(self, task)


def leaves_the_rest_to_nobody(self: Durable, done: Any, task: Any) -> None:
    self._tidying.pop(task.call_id, None)


def says_it_of_all(self: Durable, call_id: str, idx: int) -> bool:
    return True


TIDY = Durable._tidy


def ends_what_can_wait(self: Starts, now: float, function: Function, out: Instructions) -> None:
    if self.is_failing(now, function):
        for input_ in list(lines.waiting(function.queue)):
            self.finish_failing(now, input_, out)


def forgets_backoffs(self: Starts, now: float, function_id: str, backoff: Backoff) -> None:
    pass


@pytest.mark.parametrize(("method", "mutant"), [("fail_queued", ends_what_can_wait), ("resume", forgets_backoffs)])
def test_broken_backoff_is_found(monkeypatch: pytest.MonkeyPatch, method: str, mutant: Callable[..., Any]) -> None:
    monkeypatch.setattr(Starts, method, mutant)
    with pytest.raises(InvariantError, match=r"replay: python -m squall.outages --seed \d+"):
        rehearse_all(100)


def runs_again_what_runs(self: Adoption, now: float, input_: Input, out: Instructions) -> bool:
    return False


def knows_only_its_own_version(self: Adoption, input_: Input, container: Container, attempt: int) -> bool:
    return input_.attempt <= attempt and input_.call.function is container.function and not input_.cancelling


@pytest.mark.parametrize(
    ("method", "mutant"), [("take", runs_again_what_runs), ("_is_same", knows_only_its_own_version)]
)
def test_broken_adoption_is_found(monkeypatch: pytest.MonkeyPatch, method: str, mutant: Callable[..., Any]) -> None:
    busy = Plan(calls=12, cuts=6, versions=20, survival=1.0, outage_odds=0.0, cancels=0)
    rehearse(0, busy)
    monkeypatch.setattr(Adoption, method, mutant)
    with pytest.raises(InvariantError, match=r"replay: python -m squall.outages --seed \d+"):
        rehearse_all(100, busy)


def rehearse_all(seeds: int, plan: Plan | None = None) -> None:
    for seed in range(seeds):
        rehearse(seed, plan)


@pytest.mark.parametrize(
    ("method", "mutant"),
    [
        ("_settle", queues_twice),
        ("_record", tells_too_early),
        ("submit", acknowledges_too_early),
        ("cancel", forgets_cancels),
        ("retried", forgets_attempts),
        ("_tidy", tidies_what_runs),
        ("_tidy", tidies_what_has_just_ended),
        ("_tidied", leaves_the_rest_to_nobody),
        ("is_left_out", says_it_of_all),
    ],
)
def test_broken_journal_is_found(monkeypatch: pytest.MonkeyPatch, method: str, mutant: Callable[..., Any]) -> None:
    monkeypatch.setattr(Durable, method, mutant)
    with pytest.raises(InvariantError, match=r"replay: python -m squall.outages --seed \d+"):
        rehearse_all(300)
