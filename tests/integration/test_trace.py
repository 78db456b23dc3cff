"""Where a call's time went: the parts add up to the whole, cold and warm."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from squall.client import Client
from squall.protocol.requests import GetTrace
from tests.integration import workload
from tests.integration.support import Kept, Wire

pytestmark = pytest.mark.root


@pytest.fixture(scope="module", autouse=True)
def app(shared_home: Path) -> Iterator[None]:
    with workload.app.run(output=Kept()):
        yield


def trace(call: str = "") -> dict[str, Any]:
    reply, _ = Client.current().link.request(GetTrace(call)).wait(20)
    return dict(reply.data)


def check_parts(entry: dict[str, Any]) -> None:
    """Spans touch each other and add up; what refines a span is not longer than it."""
    spans = entry["spans"]
    total = sum(span["end"] - span["start"] for span in spans) * 1000
    assert total == pytest.approx(entry["total_ms"], rel=0.05)
    for earlier, later in itertools.pairwise(spans):
        assert later["start"] == pytest.approx(earlier["end"], abs=1e-6)
    for span in spans:
        parts = sum(span["parts"].values())
        assert parts <= (span["end"] - span["start"]) * 1000 * 1.05 + 1.0, span


def test_the_parts_of_a_cold_call_add_up_to_what_its_caller_waited() -> None:
    began = time.perf_counter()
    workload.square.remote(3)
    waited = (time.perf_counter() - began) * 1000
    found = trace()
    assert found["function"] == "square"
    check_parts(found["inputs"][0])
    assert found["total_ms"] == pytest.approx(waited, rel=0.05, abs=3.0)
    names = [span["name"] for span in found["inputs"][0]["spans"]]
    assert names[0] == "submit"
    assert {"container", "import", "run"} <= set(names), names


def test_a_warm_call_has_no_part_of_a_start() -> None:
    workload.square.remote(1)
    workload.square.remote(2)
    found = trace()
    check_parts(found["inputs"][0])
    assert not {"container", "import"} & {span["name"] for span in found["inputs"][0]["spans"]}


def test_time_in_the_function_is_told_as_its_own() -> None:
    workload.nap.remote(0.3)
    spans = {span["name"]: span["end"] - span["start"] for span in trace()["inputs"][0]["spans"]}
    assert 0.29 <= spans["run"] <= 0.6


def test_a_map_is_traced_input_by_input() -> None:
    assert list(workload.square.map(range(30))) == [n * n for n in range(30)]
    found = trace()
    assert found["num_inputs"] == 30
    for entry in found["inputs"]:
        check_parts(entry)
    one = trace(f"in-{found['call_id'][3:]}-7")
    assert [entry["idx"] for entry in one["inputs"]] == [7]


@pytest.mark.parametrize("ref", ["fc-0000000000000000", "in-x-1", "in-0-²", "../../etc", 'x"y\n'])
def test_a_call_that_never_was_has_no_trace(ref: str) -> None:
    with Wire() as client:
        answer, _ = client.ask(GetTrace(ref))
    assert answer.code in ("not_found", "invalid")
