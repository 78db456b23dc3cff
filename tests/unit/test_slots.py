"""The runner's brain: what starts when, alone and in batches."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from squall.runner.slots import Slots


def test_without_batches_each_starts_when_it_arrives() -> None:
    slots: Slots[str] = Slots(2)
    for name in "abc":
        slots.arrive(0.0, name)
    assert slots.take(0.0) == [["a"], ["b"]]
    assert slots.take(0.0) == []
    slots.ended()
    assert slots.take(0.0) == [["c"]]


def test_full_batch_starts_at_once_and_a_part_when_the_oldest_has_waited() -> None:
    slots: Slots[int] = Slots(5, size=3, wait=1.0)
    for n in range(4):
        slots.arrive(n * 0.1, n)
    assert slots.take(0.4) == [[0, 1, 2]]
    assert slots.due() == 1.3
    assert slots.take(1.2) == []
    assert slots.take(1.3) == [[3]]
    assert slots.due() is None


def test_what_arrives_while_a_batch_runs_is_collected_for_the_next() -> None:
    slots: Slots[int] = Slots(1, size=2, wait=0.0)
    slots.arrive(0.0, 0)
    assert slots.take(0.0) == [[0]]
    for n in (1, 2, 3):
        slots.arrive(0.0, n)
    assert slots.take(9.0) == []
    assert slots.due() is None
    slots.ended()
    assert slots.take(9.0) == [[1, 2]]


def test_dropped_one_never_starts() -> None:
    slots: Slots[object] = Slots(1, size=2, wait=1.0)
    one, other = object(), object()
    slots.arrive(0.0, one)
    slots.arrive(0.5, other)
    assert slots.drop(one)
    assert not slots.drop(one)
    assert slots.due() == 1.5
    assert slots.take(1.5) == [[other]]


STEPS = st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=60)


@given(
    st.integers(1, 4),
    st.integers(1, 5),
    st.floats(0, 3),
    STEPS,
)
def test_everything_starts_once_in_order_and_within_the_limits(
    parallel: int, size: int, wait: float, steps: list[tuple[float, bool]]
) -> None:
    slots: Slots[int] = Slots(parallel, size, wait)
    now, started = 0.0, list[int]()
    for number, (delay, ends) in enumerate(steps):
        now += delay
        if ends and slots.running:
            slots.ended()
        slots.arrive(now, number)
        for batch in slots.take(now):
            assert 1 <= len(batch) <= size
            started += batch
        assert slots.running <= parallel
    while slots.running or slots.due() is not None:
        if slots.running:
            slots.ended()
        started += [one for batch in slots.take(now + wait + 1) for one in batch]
    assert started == list(range(len(steps)))
