"""Many inputs: order, laziness, windows, early ends, and what goes wrong on the way."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

import squall
from squall import _map
from squall.exception import InvalidError, SerializationError, ServiceError
from squall.protocol import messages as m

if TYPE_CHECKING:
    from tests.unit.conftest import Peer


def square(x: int) -> int:
    return x * x


def add(x: int, y: int, z: int = 0) -> int:
    return x + y + z


def odd_only(x: int) -> int:
    if x % 2 == 0:
        raise ValueError(x)
    return x


def length(data: bytes) -> int:
    return len(data)


@pytest.fixture
def app(peer: Peer) -> squall.App:
    app = squall.App("test")
    for raw_f in (square, add, odd_only, length):
        app.function()(raw_f)
    return peer.run(app)


@pytest.fixture
def f(app: squall.App) -> Any:
    return app.registered_functions["square"]


def told(peer: Peer, kind: type) -> list[Any]:
    """What the peer was told, after it has read all that was sent."""
    peer.client.link.request(m.Ping()).wait(5)
    return peer.of(kind)


# ---- results


@pytest.mark.parametrize("make", [range, lambda n: list(range(n)), lambda n: (i for i in range(n))])
@pytest.mark.parametrize("n", [0, 1, 2, 127, 3000])
def test_results_come_in_the_order_of_the_inputs(f: Any, make: Any, n: int) -> None:
    assert list(f.map(make(n))) == [i * i for i in range(n)]


def test_unordered_results_come_as_they_are_done(f: Any, peer: Peer) -> None:
    peer.hold = True
    results = f.map([1, 2, 3], order_outputs=False)

    def answer_backwards() -> None:
        while len(peer.held) < 3:
            peer.client.link.request(m.Ping()).wait(5)
        for held in reversed(peer.held):
            peer.answer(*held)

    thread = threading.Thread(target=answer_backwards)
    thread.start()
    assert list(results) == [9, 4, 1]
    thread.join(10)


def test_ordered_results_wait_for_their_turn(f: Any, peer: Peer) -> None:
    peer.hold = True
    results = f.map([1, 2, 3])

    def answer_backwards() -> None:
        while len(peer.held) < 3:
            peer.client.link.request(m.Ping()).wait(5)
        for held in reversed(peer.held):
            peer.answer(*held)

    thread = threading.Thread(target=answer_backwards)
    thread.start()
    assert list(results) == [1, 4, 9]
    thread.join(10)


def test_result_that_comes_twice_counts_once(f: Any, peer: Peer) -> None:
    def twice(submit: m.Submit, payload: bytes) -> None:
        for item in submit.items:
            peer.answer(submit, item, payload)
            peer.answer(submit, item, payload)

    peer.answers[m.Submit] = twice
    assert list(f.map([3])) == [9]


def test_several_iterables_are_zipped_and_kwargs_are_constant(app: squall.App) -> None:
    add = app.registered_functions["add"]
    assert list(add.map([1, 2, 3], (10, 20), kwargs={"z": 100})) == [111, 122]
    assert list(add.starmap([(1, 2), (3, 4, 5)])) == [3, 12]


def test_for_each_waits_for_all_and_gives_nothing(f: Any, peer: Peer) -> None:
    assert f.for_each(range(10)) is None
    assert sum(len(s.items) for s in peer.of(m.Submit)) == 10


def test_for_each_can_ignore_exceptions(app: squall.App) -> None:
    odd = app.registered_functions["odd_only"]
    odd.for_each(range(5), ignore_exceptions=True)
    with pytest.raises(ValueError):
        odd.for_each(range(5))


def test_map_under_asyncio_takes_plain_and_async_iterables(f: Any) -> None:
    async def source() -> AsyncIterator[int]:
        for i in range(2500):
            yield i
            if i % 500 == 0:
                await asyncio.sleep(0)

    async def run(inputs: Any) -> list[int]:
        return [value async for value in f.map.aio(inputs)]

    expected = [i * i for i in range(2500)]
    assert asyncio.run(run(source())) == expected
    assert asyncio.run(run(range(2500))) == expected
    assert asyncio.run(run(i for i in range(2500))) == expected


def test_async_and_plain_iterables_can_be_zipped(app: squall.App) -> None:
    async def source() -> AsyncIterator[int]:
        for i in range(3):
            yield i

    async def run() -> list[int]:
        return [value async for value in app.registered_functions["add"].map.aio(source(), itertools.count(10))]

    assert asyncio.run(run()) == [10, 12, 14]


# ---- feeding


def test_inputs_travel_many_to_a_frame_and_the_first_alone(f: Any, peer: Peer) -> None:
    list(f.map(range(1000)))
    sizes = [len(s.items) for s in peer.of(m.Submit) if s.items]
    assert sizes[0] == 1
    assert 1000 / len(sizes) > 49
    assert told(peer, m.Submit)[-1].last


def test_input_leaves_though_the_iterator_blocks_after_it(f: Any, peer: Peer) -> None:
    answered = threading.Event()

    def slow() -> Iterator[int]:
        yield from range(5)
        assert answered.wait(10)  # until the first five results are there, which needs all five to be sent
        yield 5

    seen = []
    for value in f.map(slow()):
        seen.append(value)
        if len(seen) == 5:
            answered.set()
    assert seen == [0, 1, 4, 9, 16, 25]


def test_endless_iterator_is_taken_only_as_far_as_the_window(f: Any, peer: Peer) -> None:
    peer.hold = True
    taken = itertools.count()
    results = f.map(next(taken) for _ in itertools.repeat(None))
    consumer = threading.Thread(target=lambda: next(results, None))
    consumer.start()
    wait_for(lambda: len(peer.held) >= _map.IN_FLIGHT_LIMIT)
    assert next(taken) <= _map.IN_FLIGHT_LIMIT + 1
    peer.hold = False
    for held in list(peer.held):
        peer.answer(*held)
    consumer.join(10)
    assert not consumer.is_alive()
    results.close()


def test_slow_consumer_bounds_the_results_held_for_it(f: Any, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_map, "UNTAKEN_LIMIT", 100)
    results = f.map(i for i in itertools.count())
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    sent = None
    while sent != (sent := sum(len(s.items) for s in told(peer, m.Submit))):
        pass
    assert sent is not None and sent <= 100 + _map.IN_FLIGHT_LIMIT + 3
    assert [next(results) for _ in range(500)] == [i * i for i in range(3, 503)]
    results.close()


def test_large_inputs_are_bounded_by_their_bytes(app: squall.App, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_map, "BYTES_LIMIT", 1 << 20)
    peer.hold = True
    results = app.registered_functions["length"].map(b"x" * 100_000 for _ in range(1000))
    consumer = threading.Thread(target=lambda: next(results, None), daemon=True)
    consumer.start()
    wait_for(lambda: len(peer.held) >= 11)
    assert len(told(peer, m.Submit)) and len(peer.held) <= 12
    peer.hold = False
    for held in list(peer.held):
        peer.answer(*held)
    consumer.join(10)
    assert sum(results) == 99_900_000


def test_inputs_too_large_for_a_frame_travel_as_blobs(app: squall.App, peer: Peer) -> None:
    data = [b"a" * (2 << 20), b"b", b"c" * (2 << 20)]
    assert list(app.registered_functions["length"].map(data)) == [2 << 20, 1, 2 << 20]
    assert [bool(i.blob) for s in peer.of(m.Submit) for i in s.items] == [True, False, True]


# ---- failures


def test_first_failure_is_raised_and_the_rest_cancelled(app: squall.App, peer: Peer) -> None:
    results = app.registered_functions["odd_only"].map([1, 3, 4, 5])
    assert [next(results), next(results)] == [1, 3]
    with pytest.raises(ValueError) as error:
        next(results)
    assert error.value.args == (4,)
    assert len(told(peer, m.CancelCall)) == 1


def test_exceptions_can_be_had_in_place_of_results(app: squall.App) -> None:
    found = list(app.registered_functions["odd_only"].map(range(4), return_exceptions=True))
    assert [type(value) for value in found] == [ValueError, int, ValueError, int]


def test_exception_of_the_users_iterator_comes_after_the_results_before_it(f: Any) -> None:
    def broken() -> Iterator[int]:
        yield 1
        yield 2
        raise LookupError("no more")

    results = f.map(broken(), return_exceptions=True)
    assert [next(results), next(results)] == [1, 4]
    with pytest.raises(LookupError, match="no more"):
        next(results)


def test_exception_of_an_async_iterator_comes_after_the_results_before_it(f: Any) -> None:
    async def broken() -> AsyncIterator[int]:
        yield 1
        raise LookupError("no more")

    async def run() -> list[int]:
        return [value async for value in f.map.aio(broken())]

    with pytest.raises(LookupError, match="no more"):
        asyncio.run(run())


@pytest.mark.parametrize("make", [list, iter])
def test_unpicklable_input_is_the_failure_of_that_input(f: Any, make: Any) -> None:
    found = list(f.map(make([1, threading.Lock(), 3]), return_exceptions=True))
    assert (found[0], type(found[1]), found[2]) == (1, SerializationError, 9)
    assert "argument `x` of `square`" in str(found[1])
    with pytest.raises(SerializationError):
        list(f.map(make([1, threading.Lock(), 3])))


def test_consumer_that_stops_early_cancels_the_rest_and_ends_the_feeder(f: Any, peer: Peer) -> None:
    for value in f.map(i for i in itertools.count()):
        if value > 100:
            break
    told_last = told(peer, m.Submit)[-1]
    assert told_last.last and not told_last.items
    assert isinstance(peer.received[-2], m.CancelCall) and peer.received[-3] is told_last
    assert peer.client.sinks == {}
    wait_for(lambda: not [t for t in threading.enumerate() if t.name in ("squall-map", "squall-flush")])


def test_finished_map_cancels_nothing_and_leaves_no_thread(f: Any, peer: Peer) -> None:
    list(f.map(i for i in range(10)))
    assert told(peer, m.CancelCall) == []
    assert peer.client.sinks == {}
    wait_for(lambda: not [t for t in threading.enumerate() if t.name in ("squall-map", "squall-flush")])


def test_task_that_is_cancelled_cancels_its_map(f: Any, peer: Peer) -> None:
    peer.hold = True

    async def run() -> None:
        async for _ in f.map.aio(range(10)):
            pass

    async def give_up() -> None:
        await asyncio.wait_for(run(), 0.05)

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(give_up())
    assert len(told(peer, m.CancelCall)) == 1


def test_lost_connection_ends_the_map_even_when_exceptions_are_returned(f: Any, peer: Peer) -> None:
    peer.answers[m.Submit] = lambda message, payload: peer.sock.shutdown(2)
    with pytest.raises(ServiceError, match="connection to the server"):
        list(f.map((i for i in itertools.count()), return_exceptions=True))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda f: f.map(), "got nothing to iterate"),
        (lambda f: f.map(5), "got a `int`, which cannot be iterated"),
        (lambda f: f.starmap([1]), "where it needs a tuple of arguments"),
        (lambda f: f.map(agen()), r"use `map\.aio"),
    ],
)
def test_misuse_is_answered_with_the_right_use(f: Any, call: Any, said: str) -> None:
    with pytest.raises(InvalidError, match=said):
        list(call(f))


async def agen() -> AsyncIterator[int]:
    yield 1


def wait_for(condition: Any) -> None:
    ticks = threading.Event()
    for _ in range(2000):
        if condition():
            return
        ticks.wait(0.005)
    raise AssertionError("waited in vain")
