"""Which nodes are believed to live: beat by beat, and under random orders of everything that may happen."""

from __future__ import annotations

import random

import pytest

from squall.server.liveness import LOST_AFTER, REMEMBERED_LIMIT, SUSPECT_AFTER, TRUST_AFTER, TRUST_LIMIT, Liveness


class Hand:
    """One node that says something at a beat, or nothing."""

    def __init__(self) -> None:
        self.liveness = Liveness()
        self.received = 0
        assert self.liveness.joined("no-1") == "up"
        self.beats(1, heard=True)

    def beats(self, number: int, heard: bool) -> list[str]:
        """What it became at these beats."""
        found: list[str] = []
        for _ in range(number):
            self.received += heard
            found += [change.health for change in self.liveness.look({"no-1": self.received})]
        return found

    def come_back(self) -> str:
        self.received = 0  # of another connection
        return self.liveness.joined("no-1")


def test_a_node_that_says_nothing_is_suspected_and_then_lost() -> None:
    hand = Hand()
    assert hand.beats(20, heard=True) == []
    assert hand.beats(SUSPECT_AFTER - 1, heard=False) == []
    assert hand.beats(1, heard=False) == ["suspected"]
    assert hand.beats(LOST_AFTER - SUSPECT_AFTER - 1, heard=False) == []
    assert hand.beats(1, heard=False) == ["lost"]
    assert hand.beats(100, heard=False) == []


def test_a_suspected_node_is_trusted_again_only_when_it_was_heard_for_some_beats() -> None:
    hand = Hand()
    hand.beats(SUSPECT_AFTER, heard=False)
    assert hand.beats(TRUST_AFTER - 1, heard=True) == []
    assert hand.beats(1, heard=False) == []
    assert hand.beats(TRUST_AFTER, heard=True) == ["up"]


def test_a_connection_that_ends_is_suspicious_at_once_and_lost_when_no_other_comes() -> None:
    hand = Hand()
    hand.beats(3, heard=True)
    assert [change.health for change in hand.liveness.broken("no-1", "reset")] == ["suspected"]
    assert hand.beats(LOST_AFTER - SUSPECT_AFTER, heard=False) == ["lost"]


def test_who_comes_back_in_time_is_not_lost() -> None:
    hand = Hand()
    hand.liveness.broken("no-1", "reset")
    assert hand.come_back() == "suspected"
    assert hand.beats(TRUST_AFTER, heard=True) == ["up"]
    assert hand.beats(100, heard=True) == []


def test_a_node_that_was_lost_again_and_again_is_trusted_later_each_time() -> None:
    hand = Hand()
    took = []
    for _ in range(8):
        assert hand.beats(LOST_AFTER, heard=False)[-1] == "lost"
        assert hand.come_back() == "suspected"
        beats = 0
        while hand.beats(1, heard=True) != ["up"]:
            beats += 1
        took.append(beats + 1)
    assert took == sorted(took)
    assert took[0] > TRUST_AFTER
    assert took[-1] == TRUST_LIMIT


def test_an_agent_that_is_known_to_have_ended_is_lost_at_once() -> None:
    hand = Hand()
    assert [change.health for change in hand.liveness.ended("no-1", "killed")] == ["lost"]
    assert hand.liveness.ended("no-1", "killed") == []
    assert hand.beats(100, heard=False) == []


def test_no_more_than_so_many_lost_nodes_are_remembered() -> None:
    liveness = Liveness()
    for n in range(REMEMBERED_LIMIT + 50):
        liveness.joined(f"no-{n}")
        for _ in range(LOST_AFTER):
            liveness.look({})
    assert len(liveness.pulses) <= REMEMBERED_LIMIT + 1


@pytest.mark.parametrize("seed", range(50))
def test_in_any_order_of_events_each_node_goes_from_state_to_state_as_it_may(seed: int) -> None:
    rng = random.Random(seed)
    liveness = Liveness()
    received = dict.fromkeys(("no-1", "no-2", "no-3"), 0)
    healths = {node_id: liveness.joined(node_id) for node_id in received}
    for _ in range(400):
        changes = []
        node_id = rng.choice(sorted(received))
        match rng.randrange(8):
            case 0:
                if healths[node_id] != "lost":
                    changes = liveness.broken(node_id, "cut")
            case 1:
                healths[node_id] = liveness.joined(node_id)
                received[node_id] = 0
            case _:
                for name in received:
                    received[name] += rng.random() < 0.6
                changes = liveness.look({name: count for name, count in received.items() if rng.random() < 0.9})
        for change in changes:
            before = healths[change.node_id]
            assert (before, change.health) in {("up", "suspected"), ("suspected", "up"), ("suspected", "lost")}
            healths[change.node_id] = change.health
