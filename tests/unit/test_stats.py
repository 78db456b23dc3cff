"""Counting how calls went."""

from __future__ import annotations

from squall.server.stats import counted, quantiles
from squall.server.timelines import InputTimeline


def ended(function_id: str, status: str = "ok", done_at: float = 100.0, took: float = 1.0) -> InputTimeline:
    began = done_at - took
    return InputTimeline(
        "fc-1", 0, "f", "remote", status, 0, began, began, began, began, done_at, done_at, "co-1", function_id
    )  # fmt: skip


def test_ends_are_counted_by_status_within_the_window() -> None:
    inputs = [ended("fu-1"), ended("fu-1", "timeout"), ended("fu-1", done_at=10.0), ended("fu-2", "error")]
    found = counted(inputs, {"fu-1"}, after=50.0)
    assert found.keys() == {"fu-1"} and found["fu-1"]["counts"] == {"ok": 1, "timeout": 1}
    assert found["fu-1"]["latency_ms"]["p50"] == 1000.0


def test_a_function_that_was_not_called_has_no_times() -> None:
    assert counted([], {"fu-1"}, 0.0) == {"fu-1": {"counts": {}, "latency_ms": {}, "execution_ms": {}}}


def test_quantiles_are_of_the_values_there_are() -> None:
    found = quantiles([float(n) for n in range(1, 101)])
    assert found == {"p50": 51_000.0, "p90": 91_000.0, "p99": 100_000.0, "max": 100_000.0}
