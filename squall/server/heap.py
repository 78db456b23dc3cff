"""Keeps Python's garbage collector from walking over all that waits, again and again.

A queued input is an object or two; a full collection looks at each, and with a million of them that is a third of a
second in which nobody is served, a dozen times while they come in. They are freed by their counts, so the walk finds
nothing. Where a full collection took long, what it has seen is set aside (`gc.freeze`); when most of what waited then
is gone, it is given back, so that rare cycles of that time are found after all. Decides by time and by counts only.
Tested in `tests/unit/test_heap.py`.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

SLOW_S = 0.03
"""A full collection that took longer was a pause."""
MANY = 10_000
"""Below so many inputs nothing is given back: what is set aside is code, and small."""


class Heap:
    def __init__(self, waiting: Callable[[], int], clock: Callable[[], float] = time.perf_counter) -> None:
        self.waiting = waiting
        """How many inputs there are at the moment."""
        self.clock = clock
        self.set_aside = 0
        """How many there were when something was set aside last; 0 when that was given back."""
        self._began = 0.0
        self._was_slow = False

    def watch(self) -> None:
        gc.callbacks.append(self.collected)

    def close(self) -> None:
        gc.callbacks.remove(self.collected)

    def collected(self, phase: str, info: dict[str, int]) -> None:
        """The collector begins, or has ended."""
        if info["generation"] != 2:
            return
        if phase == "start":
            self._began = self.clock()
        else:
            self._was_slow = self._was_slow or self.clock() - self._began > SLOW_S

    def look(self) -> None:
        """Called every second or so."""
        if self._was_slow:
            self._was_slow = False
            self.set_aside = max(1, self.waiting())
            gc.freeze()
        elif self.set_aside >= MANY and self.waiting() * 4 < self.set_aside:
            self.set_aside = 0
            gc.unfreeze()
