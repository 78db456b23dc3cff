"""Dispatch and liveness between nodes that the network parts: from seeds, and with mutants that must be found."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from squall.partitions import main, part_ways
from squall.server.adoption import Adoption
from squall.server.liveness import AGENT_GIVES_UP_AFTER, LOST_AFTER, SUSPECT_AFTER
from squall.testing import InvariantError

SEEDS = int(os.environ.get("SQUALL_TEST_SEEDS", "1000"))
BLOCK = 50


@pytest.mark.parametrize("first", range(0, SEEDS, BLOCK))
def test_every_input_ends_once_however_nodes_are_cut_off_and_come_back(first: int) -> None:
    for seed in range(first, min(first + BLOCK, SEEDS)):
        part_ways(seed)


def test_same_seed_gives_the_same_run() -> None:
    assert part_ways(12) == part_ways(12)


def test_replay_tells_the_story_of_a_seed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "3"]) == 0
    assert "replay: python -m squall.partitions --seed 3" in capsys.readouterr().out
    assert main(["--seeds", "2"]) == 0


def test_an_agent_looks_for_its_server_before_it_is_given_up() -> None:
    assert AGENT_GIVES_UP_AFTER <= SUSPECT_AFTER < LOST_AFTER


# ---- it finds what it is there to find ----------------------------------------------------------------------------


def forgets_what_was_lost(self: Adoption, container_id: str) -> None:
    pass


def takes_no_attempt(self: Adoption, input_: Any, container: Any, attempt: int) -> bool:
    return False


def part_all(seeds: int) -> None:
    for seed in range(seeds):
        part_ways(seed)


@pytest.mark.parametrize(
    ("cls", "name", "mutant"),
    [
        (Adoption, "lose", forgets_what_was_lost),
        (Adoption, "_is_same", takes_no_attempt),
    ],
)
def test_a_brain_that_is_broken_is_found(
    monkeypatch: pytest.MonkeyPatch, cls: type, name: str, mutant: Callable[..., Any]
) -> None:
    monkeypatch.setattr(cls, name, mutant)
    with pytest.raises(InvariantError, match=r"replay: python -m squall.partitions --seed \d+"):
        part_all(300)
