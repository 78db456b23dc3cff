"""Several inputs of one container at a time, and in batches."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from squall.exception import CancelledError, Error
from tests.conftest import wait_until
from tests.integration import crowded
from tests.integration.support import Kept, containers_of

pytestmark = pytest.mark.root

Crowd: Any = crowded.Crowd
Batcher: Any = crowded.Batcher


@pytest.fixture(scope="module")
def output() -> Kept:
    return Kept()


@pytest.fixture(scope="module", autouse=True)
def running(shared_home: Path, output: Kept) -> Iterator[None]:
    with crowded.app.run(output=output):
        yield


def test_plain_inputs_run_beside_each_other_in_threads() -> None:
    results = list(crowded.meet.map(range(4)))
    assert [x for x, _ in results] == [0, 1, 2, 3]
    assert len({input_id for _, input_id in results}) == 4


def test_async_inputs_share_one_loop_and_keep_their_ids() -> None:
    results: Any = list(crowded.rest.map(range(60)))
    assert len({container for container, _, _ in results}) == 1
    assert len({input_id for _, input_id, _ in results}) == 60
    assert [squared for _, _, squared in results[:3]] == [0, 1, 4]


def test_autoscaler_aims_at_the_target() -> None:
    assert len(list(crowded.hold.map(range(8)))) == 8
    assert len(containers_of("hold", include_all=True)) == 4


@pytest.mark.parametrize("function", [crowded.spin, crowded.nap], ids=["thread", "task"])
def test_one_input_is_cancelled_and_its_neighbour_goes_on(function: Any) -> None:
    function.remote(0)
    (container,) = containers_of(function.tag)
    neighbour, call = function.spawn(3), function.spawn(60)
    wait_until(lambda: function.get_current_stats().num_running_inputs == 2, "both run")
    call.cancel()
    with pytest.raises(CancelledError):
        call.get(timeout=20)
    assert neighbour.get(timeout=30) == 3
    assert [row["container_id"] for row in containers_of(function.tag)] == [container["container_id"]]


@pytest.mark.parametrize("function", [crowded.count, crowded.count_async], ids=["thread", "task"])
def test_generators_run_beside_each_other_with_back_pressure(function: Any) -> None:
    one, other = function.remote_gen(1000), function.remote_gen(3)
    assert next(one) == 0
    assert list(other) == [0, 1, 2]
    assert list(one) == list(range(1, 1000))
    early = function.remote_gen(100_000)
    assert next(early) == 0
    early.close()
    assert function.remote_gen(1) is not None


def test_large_results_come_back() -> None:
    assert [data[:1] for data in crowded.large.map(range(3))] == [b"\x00", b"\x01", b"\x02"]


def test_variant_runs_several_inputs_at_a_time() -> None:
    handle = crowded.square.with_concurrency(max_inputs=5)
    assert list(handle.map(range(20))) == [x * x for x in range(20)]


def test_methods_share_the_slots_of_their_object(output: Kept) -> None:
    crowd = Crowd()
    calls = [crowd.plain.spawn(), crowd.plain.spawn()]
    assert [call.get(timeout=30) for call in calls] == [True, True]
    assert crowd.is_same_loop.remote()


# ---- batches ----------------------------------------------------------------------------------------------------


def test_inputs_are_given_as_lists_and_answered_one_by_one() -> None:
    results = list(crowded.doubled.map(range(8), [1] * 8))
    assert [value for value, _ in results] == [2 * x + 1 for x in range(8)]
    assert {size for _, size in results} == {4}


def test_batch_that_is_not_full_runs_when_its_wait_is_over() -> None:
    began = time.monotonic()
    assert crowded.doubled.remote(5, ys=0) == (10, 1)
    assert time.monotonic() - began > 0.29


def test_failure_of_one_input_is_its_own() -> None:
    results = list(crowded.doubled.map([1, -1, 2], [0, 0, 0], return_exceptions=True))
    assert [getattr(value, "args", value)[0] for value in results] == [2, "bad -1", 4]
    calls: Any = crowded.doubled
    wrong, right = calls.spawn(1, 2, 3), calls.spawn(1, 2)
    with pytest.raises(TypeError, match="too many"):
        wrong.get(timeout=30)
    assert right.get(timeout=30) == (4, 1)


def test_batch_must_return_one_result_for_each_input() -> None:
    with pytest.raises(Error, match="given 1 inputs and returned a list of 0"):
        crowded.short.remote(1)


def test_async_batches_and_methods_run() -> None:
    assert list(crowded.doubled_async.map(range(6))) == [0, 2, 4, 6, 8, 10]
    assert list(Batcher(factor=5).multiply.map(range(3))) == [0, 5, 10]


def test_exit_hooks_run_where_several_inputs_ran(output: Kept) -> None:
    Crowd.with_options(scaledown_window=2)().is_same_loop.remote()
    wait_until(lambda: b"left crowd" in output.text("Crowd"), "the exit hook ran", 30)
