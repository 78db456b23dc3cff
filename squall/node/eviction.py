"""BRAIN: which zygotes of images go when all of them together take more memory than they may.

Sees what each takes and when it was last asked for, and names those that go, each with its reason. Never one that has
containers, as those share its memory and would keep it; never the one asked for last, as it would be made again at
once. Pure. Tested in `tests/unit/test_eviction.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

LIMIT = 64
"""Zygotes of images on a node, whatever little they take."""


@dataclass(frozen=True)
class Standing:
    """A zygote of an image, with the containers that were made ahead from it."""

    name: str
    used_at: float
    memory_bytes: int
    is_busy: bool
    """It has containers, or is being made."""


def evict(standing: Iterable[Standing], budget_bytes: int, limit: int = LIMIT) -> list[tuple[str, str]]:
    """Names of those that go, the one used longest ago first, each with the reason."""
    left = sorted(standing, key=lambda one: one.used_at)
    total, count = sum(one.memory_bytes for one in left), len(left)
    gone = []
    for one in left[:-1]:
        if total <= budget_bytes and count <= limit:
            break
        if one.is_busy:
            continue
        over = f"take {total >> 20} MiB of {budget_bytes >> 20}" if total > budget_bytes else f"are {count} of {limit}"
        gone.append((one.name, f"zygotes {over} and this one was used longest ago"))
        total, count = total - one.memory_bytes, count - 1
    return gone
