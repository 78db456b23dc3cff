"""Clocks: the manual one stands still until it is told."""

from __future__ import annotations

import pytest

from squall._clock import Clock, ManualClock, SystemClock


def test_manual_clock_moves_both_faces_only_when_told() -> None:
    clock = ManualClock(wall=100.0)
    assert (clock.wall(), clock.monotonic()) == (100.0, 0.0)
    clock.advance(2.5)
    assert (clock.wall(), clock.monotonic()) == (102.5, 2.5)


def test_wall_clock_can_jump_without_time_passing() -> None:
    clock = ManualClock(wall=100.0)
    clock.jump_wall(-50.0)
    assert (clock.wall(), clock.monotonic()) == (50.0, 0.0)


def test_time_does_not_pass_backwards() -> None:
    with pytest.raises(ValueError, match="backwards"):
        ManualClock().advance(-1.0)


def test_system_clock_is_a_clock_that_never_goes_back() -> None:
    clock: Clock = SystemClock()
    before = clock.monotonic()
    assert clock.monotonic() >= before
    assert clock.wall() > 1_700_000_000
