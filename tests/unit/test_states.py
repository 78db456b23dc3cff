"""The tables of legal moves are closed and end."""

from __future__ import annotations

import pytest

from squall.protocol.states import CONTAINER_MOVES, INPUT_MOVES


@pytest.mark.parametrize("moves", [CONTAINER_MOVES, INPUT_MOVES])
def test_every_state_that_can_be_reached_is_defined(moves: dict[str, frozenset[str]]) -> None:
    for targets in moves.values():
        assert targets <= set(moves)


@pytest.mark.parametrize(("moves", "end"), [(CONTAINER_MOVES, "exited"), (INPUT_MOVES, "done")])
def test_the_end_can_be_reached_from_everywhere_and_never_left(moves: dict[str, frozenset[str]], end: str) -> None:
    assert moves[end] == frozenset()
    for state in moves:
        assert state == end or end in moves[state]
