"""Which zygotes go when memory is short."""

from __future__ import annotations

import random

from squall.node.eviction import Standing, evict

MIB = 1 << 20


def zygote(name: str, used_at: float, memory_mib: int = 100, busy: bool = False) -> Standing:
    return Standing(name, used_at, memory_mib * MIB, busy)


def names(*standing: Standing, budget_mib: int, limit: int = 64) -> list[str]:
    return [name for name, _ in evict(standing, budget_mib * MIB, limit)]


def test_none_goes_within_the_budget() -> None:
    assert names(zygote("a", 1), zygote("b", 2), budget_mib=200) == []


def test_those_used_longest_ago_go_until_the_rest_fits() -> None:
    standing = [zygote("c", 3), zygote("a", 1), zygote("d", 4), zygote("b", 2)]
    assert names(*standing, budget_mib=200) == ["a", "b"]


def test_large_one_makes_room_alone() -> None:
    assert names(zygote("large", 1, 900), zygote("b", 2), zygote("c", 3), budget_mib=200) == ["large"]


def test_one_with_containers_stays_and_counts() -> None:
    standing = [zygote("a", 1, busy=True), zygote("b", 2), zygote("c", 3)]
    assert names(*standing, budget_mib=200) == ["b"]


def test_the_one_used_last_stays_even_above_the_budget() -> None:
    assert names(zygote("a", 1), zygote("b", 2, 900), budget_mib=200) == ["a"]
    assert names(zygote("only", 1, 900), budget_mib=200) == []


def test_there_is_a_limit_to_how_many_however_small() -> None:
    assert names(*(zygote(str(n), n, 0) for n in range(5)), budget_mib=200, limit=3) == ["0", "1"]


def test_reason_tells_what_they_take() -> None:
    [(_, reason)] = evict([zygote("a", 1), zygote("b", 2)], 150 * MIB)
    assert "take 200 MiB of 150" in reason


def test_whatever_stands_the_rest_fits_or_none_more_may_go() -> None:
    rng = random.Random(7)
    for _ in range(500):
        standing = [zygote(str(n), rng.random(), rng.randrange(300), rng.random() < 0.3) for n in range(12)]
        gone = set(names(*standing, budget_mib=600))
        left = [one for one in standing if one.name not in gone]
        last = max(standing, key=lambda one: one.used_at)
        assert last in left
        assert not any(one.is_busy for one in standing if one.name in gone)
        idle = [one for one in left if not one.is_busy and one is not last]
        assert sum(one.memory_bytes for one in left) <= 600 * MIB or not idle
