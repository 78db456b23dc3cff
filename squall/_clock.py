"""Clock: the one way to read time, so that whatever reads it can be run against a clock moved by hand.

`wall` is for what people and records see (seconds since 1970); `monotonic` is for every duration, deadline and
lease, because the wall clock jumps. Brains never hold a clock: their events carry `now`. Nothing here sleeps.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def wall(self) -> float:
        """Seconds since 1970."""

    def monotonic(self) -> float:
        """Seconds since some moment; never goes back, never jumps."""


class SystemClock:
    """The machine's own."""

    def wall(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()


class ManualClock:
    """Stands still until told: for simulators and for tests of everything that takes a clock."""

    def __init__(self, wall: float = 1_700_000_000.0) -> None:
        self._wall = wall
        self._monotonic = 0.0

    def wall(self) -> float:
        return self._wall

    def monotonic(self) -> float:
        return self._monotonic

    def advance(self, seconds: float) -> None:
        """Let time pass on both faces."""
        if seconds < 0:
            raise ValueError(f"time cannot pass backwards: {seconds}")
        self._wall += seconds
        self._monotonic += seconds

    def jump_wall(self, seconds: float) -> None:
        """Set the wall clock forward or back without time passing, as an operator or NTP does."""
        self._wall += seconds
