"""What one workspace must not see or do of another's, whatever ids it has learnt: an id is no permission."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from squall.protocol.messages import Failure, Hello, StartExec, StopContainer
from squall.protocol.requests import CreateWorkspace, GetTrace, ListObjects
from tests.integration import workload
from tests.integration.conftest import own_home
from tests.integration.support import Kept, Wire, containers_of, rows


@pytest.fixture(scope="module", autouse=True)
def app() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SQUALL_RUNTIME", "process")
        with own_home(), workload.app.run(output=Kept()):
            workload.square.remote(1)
            with Wire() as wire:
                wire.ask(CreateWorkspace("other"))
            yield


@pytest.fixture
def other() -> Iterator[Wire]:
    """A connection of another workspace."""
    with Wire(hello=False) as wire:
        wire.ask(Hello("client", workspace="other"))
        yield wire


def listed(wire: Wire, kind: str) -> list[dict[str, Any]]:
    answer, _ = wire.ask(ListObjects(kind, all=True))
    found: list[dict[str, Any]] = answer.data["rows"]
    return found


@pytest.mark.parametrize("kind", ["apps", "calls", "containers", "functions", "images", "schedules", "secrets"])
def test_a_workspace_lists_nothing_of_anothers(other: Wire, kind: str) -> None:
    assert listed(other, kind) == []


def test_a_workspace_traces_no_call_of_anothers(other: Wire) -> None:
    workload.square.remote(2)
    call_id = rows("calls")[-1]["call_id"]
    for named in (call_id, ""):
        answer, _ = other.ask(GetTrace(named))
        assert isinstance(answer, Failure)
        assert answer.code == "not_found"


def test_a_workspace_runs_no_command_in_anothers_container(other: Wire) -> None:
    [container, *_] = containers_of("square")
    answer, _ = other.ask(StartExec(container["container_id"], ["true"]))
    assert isinstance(answer, Failure)
    assert answer.code == "not_found"


def test_a_workspace_stops_no_container_of_anothers(other: Wire) -> None:
    [container, *_] = containers_of("square")
    answer, _ = other.ask(StopContainer(container["container_id"]))
    assert isinstance(answer, Failure)
    assert container["container_id"] in [row["container_id"] for row in containers_of("square")]
    assert workload.square.remote(3) == 9
