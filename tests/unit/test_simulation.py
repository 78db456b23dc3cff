"""The brains together, in simulated clusters full of faults. A failing seed says how to replay it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import pytest

from squall.server.dispatch import Dispatch
from squall.server.inputs import FunctionOptions, Instructions
from squall.server.scheduler import Request
from squall.testing import Nature, Scenario, main, simulate

SEEDS = int(os.environ.get("SQUALL_TEST_SEEDS", "1000"))
BLOCK = 50


@pytest.mark.parametrize("first", range(0, SEEDS, BLOCK))
def test_every_input_has_one_result_whatever_goes_wrong(first: int) -> None:
    for seed in range(first, min(first + BLOCK, SEEDS)):
        simulate(seed)


def scenario(nature: Nature | None = None, options: FunctionOptions | None = None, **more: Any) -> Scenario:
    function = (options or FunctionOptions(), nature or Nature(), Request())
    return Scenario((function,), **{"nodes": ((16.0, 16384),), "calls": 10, **more})


def test_same_seed_gives_the_same_run() -> None:
    assert simulate(11) == simulate(11)


def test_calm_world_runs_every_input_once() -> None:
    summary = simulate(1, scenario())
    assert set(summary.statuses) == {"ok"} and summary.executions == summary.finished and summary.stale_outputs == 0


def test_messages_that_come_twice_do_no_harm() -> None:
    summary = simulate(2, scenario(Nature(duration=0.5), duplicates=0.3))
    assert set(summary.statuses) == {"ok"} and summary.stale_outputs > 0


def test_import_error_reaches_every_input_soon() -> None:
    summary = simulate(3, scenario(Nature(init_error=1.0)))
    assert set(summary.statuses) == {"init_error"} and summary.latencies[-1] < 5.0


def test_start_that_always_crashes_reaches_every_input_soon() -> None:
    summary = simulate(4, scenario(Nature(start_crash=1.0)))
    assert set(summary.statuses) == {"init_error"} and summary.latencies[-1] < 5.0


def test_poison_input_does_not_keep_the_others_from_their_results() -> None:
    summary = simulate(5, scenario(Nature(poison=0.05), FunctionOptions(concurrency=10), calls=20))
    assert set(summary.statuses) == {"ok", "lost"} and summary.statuses["ok"] > 5 * summary.statuses["lost"]


def test_function_on_a_full_node_is_not_starved_by_another() -> None:
    greedy = (FunctionOptions(scaledown_window=60.0), Nature(duration=3.0), Request(cpu=0.5))
    world = Scenario((greedy, greedy, greedy), nodes=((2.0, 4096),), calls=30, call_size=60, duration=5.0)
    summary = simulate(6, world)
    assert set(summary.statuses) == {"ok"}


def test_replay_prints_the_story_of_a_seed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "3"]) == 0
    assert "replay: python -m squall.testing --seed 3" in capsys.readouterr().out
    assert main(["--seeds", "2"]) == 0


# ---- the simulator itself finds what it is there to find --------------------------------------------------------


def broken_fence(self: Dispatch, now: float, container_id: str, *result: Any) -> Instructions:
    """Believes any output of a running input, whoever it comes from."""
    call_id, idx, status, _, output = result
    call = self.calls.get(call_id)
    input_ = call.inputs.get(idx) if call is not None else None
    if input_ is None or input_.container is None:
        return []
    lease = (call_id, idx, status, input_.attempt, output)
    return self.outputs(now, input_.container.container_id, [lease])


def forgetful_gone(self: Dispatch, now: float, container_id: str, reason: str, **_: Any) -> Instructions:
    """Drops what ran in a container that is gone."""
    container = self.containers.pop(container_id, None)
    if container is not None:
        del container.function.containers[container_id]
        self._detach(container)
    return []


def hasty_drain(self: Dispatch, now: float, container_id: str, reason: str) -> Instructions:
    """Stops a container without a look at what runs in it."""
    out: Instructions = []
    container = self.containers.get(container_id)
    if container is not None and container.state == "ready":
        self._stop(container, out)
    return out


@pytest.mark.parametrize(
    ("method", "mutant"), [("output", broken_fence), ("container_gone", forgetful_gone), ("drain", hasty_drain)]
)
def test_broken_dispatch_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], method: str, mutant: Callable[..., Any]
) -> None:
    monkeypatch.setattr(Dispatch, method, mutant)
    assert main(["--seeds", "300"]) == 1
    assert re.search(r"(?s)seed (\d+): .*replay: python -m squall.testing --seed \1\n", capsys.readouterr().err)
