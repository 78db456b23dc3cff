"""What a call has called: as trees, with what is running and what has ended."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from squall import FunctionCall
from squall.exception import ConflictError, InvalidError, NotFoundError
from tests.conftest import wait_until
from tests.integration import durable
from tests.integration.support import Kept, containers_of

pytestmark = pytest.mark.root


@pytest.fixture(scope="module", autouse=True)
def app(shared_home: Path) -> Iterator[None]:
    with durable.app.run(output=Kept()):
        yield


def test_a_graph_shows_what_was_called_below() -> None:
    call = durable.family.spawn(2)
    assert call.get(timeout=60) == 3
    [root] = call.get_call_graph()
    assert (root.function_name, root.status, root.function_call_id) == ("family", "ok", call.object_id)
    assert sorted(child.function_name for child in root.children) == ["family", "step"]
    below = next(child for child in root.children if child.function_name == "family")
    assert sorted(child.function_name for child in below.children) == ["family", "step"]
    assert root.task_id.startswith("co-")


def test_a_graph_shows_what_runs_and_what_waits() -> None:
    call = durable.one_by_one.spawn_map([600.0] * 3, range(3))
    wait_until(lambda: any(row["running"] for row in containers_of("one_by_one")), "one runs")
    wait_until(
        lambda: [node.status for node in call.get_call_graph()] == ["running", "pending", "pending"], "it is told so"
    )
    call.cancel(terminate_containers=True)
    wait_until(lambda: {node.status for node in call.get_call_graph()} == {"cancelled"}, "they are cancelled")


def test_a_graph_of_nothing_is_not_found() -> None:
    with pytest.raises(NotFoundError, match="no spawned call `fc-0000000000000000`"):
        FunctionCall.from_id("fc-0000000000000000").get_call_graph()


def test_results_of_a_spawned_map_are_iterated_in_order() -> None:
    call = durable.step.spawn_map([0.05, 0.0, 0.02, 0.0, 0.0], range(5))
    assert list(call.iter()) == [0, 1, 2, 3, 4]
    assert list(FunctionCall.from_id(call.object_id).iter(1, 3)) == [1, 2]
    assert list(call.iter(4, 100)) == [4]
    with pytest.raises(InvalidError, match="no range of inputs"):
        list(call.iter(3, 1))


def test_a_key_makes_one_call_of_many() -> None:
    first = durable.step.spawn_once("k1", 0.0, 5)
    again = durable.step.spawn_once("k1", 0.0, 5)
    assert first.object_id == again.object_id and again.get(timeout=30) == 5
    assert durable.step.spawn_once("k2", 0.0, 5).object_id != first.object_id
    assert durable.one_by_one.spawn_once("k1", 0.0, 5).object_id != first.object_id


def test_a_key_with_other_arguments_is_a_conflict() -> None:
    durable.step.spawn_once("k3", 0.0, 1).get(timeout=30)
    with pytest.raises(ConflictError, match=r"key `k3` was used for call `fc-.*` with other arguments"):
        durable.step.spawn_once("k3", 0.0, 2)


@pytest.mark.parametrize("key", ["", "x" * 201, 5])
def test_a_key_is_text_of_some_length(key: str) -> None:
    with pytest.raises(InvalidError, match="got the key"):
        durable.step.spawn_once(key, 0.0, 1)


def test_a_spawned_map_of_nothing_has_no_results() -> None:
    call = durable.step.spawn_map([], [])
    assert call.num_inputs() == 0 and list(call.iter()) == []
