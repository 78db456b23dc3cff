"""BRAIN: which inputs of a container run now, where several run at a time or in batches.

Synchronous and clock-free: it is told what arrived and what ended, and says what to start. The server never sends more
than a container has slots for, so without batches an input starts when it arrives. With batches up to `size` inputs
are one, collected until it is full or the oldest has waited for `wait` seconds; at most `parallel` run at a time, and
what arrives meanwhile is collected for the next. Tested in `tests/unit/test_slots.py`.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Slots(Generic[T]):
    def __init__(self, parallel: int, size: int = 1, wait: float = 0.0) -> None:
        self.parallel = parallel
        self.size = size
        self.wait = wait
        self.running = 0
        """Batches under way."""
        self._waiting: deque[tuple[T, float]] = deque()
        """What arrived, and when its patience ends."""

    def arrive(self, now: float, one: T) -> None:
        self._waiting.append((one, now + self.wait))

    def ended(self) -> None:
        """A batch has ended."""
        self.running -= 1

    def drop(self, one: T) -> bool:
        """Forget one that waits; whether it did."""
        kept = deque(entry for entry in self._waiting if entry[0] is not one)
        found = len(kept) < len(self._waiting)
        self._waiting = kept
        return found

    def clear(self) -> None:
        self._waiting.clear()

    def take(self, now: float) -> list[list[T]]:
        """The batches to start now."""
        batches = []
        while self._waiting and self.running < self.parallel:
            if len(self._waiting) < self.size and now < self._waiting[0][1]:
                break
            count = min(self.size, len(self._waiting))
            batches.append([self._waiting.popleft()[0] for _ in range(count)])
            self.running += 1
        return batches

    def due(self) -> float | None:
        """When `take` has something to start although nothing arrives or ends."""
        if not self._waiting or self.running >= self.parallel:
            return None
        return self._waiting[0][1]
