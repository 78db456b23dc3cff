"""The garbage collector does not walk over a backlog more than once, and gets it back in the end."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from squall.server.heap import MANY, SLOW_S, Heap


class World:
    """A backlog, and a clock for collections."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waiting = 0
        self.heap = Heap(lambda: self.waiting, lambda: self.now)

    def collect(self, seconds: float, generation: int = 2) -> None:
        self.heap.collected("start", {"generation": generation})
        self.now += seconds
        self.heap.collected("stop", {"generation": generation})
        self.heap.look()


@pytest.fixture
def world() -> Iterator[World]:
    gc.unfreeze()
    yield World()
    gc.unfreeze()


def test_what_a_slow_collection_has_seen_is_set_aside(world: World) -> None:
    world.waiting = 100 * MANY
    world.collect(SLOW_S * 2)
    assert gc.get_freeze_count() > 1000 and world.heap.set_aside == 100 * MANY


@pytest.mark.parametrize(("seconds", "generation"), [(SLOW_S / 2, 2), (SLOW_S * 2, 1)])
def test_quick_or_partial_collections_set_nothing_aside(world: World, seconds: float, generation: int) -> None:
    world.collect(seconds, generation)
    assert gc.get_freeze_count() == 0


def test_it_is_given_back_when_most_of_the_backlog_is_gone(world: World) -> None:
    world.waiting = 100 * MANY
    world.collect(SLOW_S * 2)
    world.waiting = 26 * MANY
    world.heap.look()
    assert gc.get_freeze_count() > 0
    world.waiting = 24 * MANY
    world.heap.look()
    assert gc.get_freeze_count() == 0


def test_without_a_backlog_nothing_is_given_back_so_that_it_does_not_go_to_and_fro(world: World) -> None:
    world.collect(SLOW_S * 2)
    world.heap.look()
    assert gc.get_freeze_count() > 1000


def test_a_real_collection_is_timed(world: World) -> None:
    world.now = -1000.0
    world.heap.watch()
    try:
        gc.collect()
    finally:
        world.heap.close()
    world.heap.look()
    assert gc.get_freeze_count() == 0 and world.heap.collected not in gc.callbacks
