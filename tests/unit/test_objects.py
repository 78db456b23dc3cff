"""What the server refuses of a function, whatever the SDK let through."""

from __future__ import annotations

import pytest

from squall.exception import InvalidError
from squall.protocol.messages import FunctionSpec, RetryPolicy
from squall.server.objects import check_spec


def test_what_the_sdk_sends_by_default_is_accepted() -> None:
    check_spec(FunctionSpec("f", gpu=["H100", "A100:2", "any"], retries=RetryPolicy(3, 10.0, 0.0, 60.0)))


@pytest.mark.parametrize(
    "spec",
    [
        FunctionSpec("f", gpu=["H100:0"]),
        FunctionSpec("f", gpu=[""]),
        FunctionSpec("f", gpu=["H100:9999999"]),
        FunctionSpec("f", retries=RetryPolicy(3, backoff_coefficient=1e300)),
        FunctionSpec("f", retries=RetryPolicy(3, initial_delay=-1.0)),
        FunctionSpec("f", retries=RetryPolicy(3, max_delay=float("inf"))),
        FunctionSpec("f", cpu_limit=-1.0),
        FunctionSpec("f", memory_limit_mib=-1),
    ],
    ids=lambda spec: f"{spec.gpu}{spec.retries}{spec.cpu_limit}{spec.memory_limit_mib}",
)
def test_values_that_would_break_a_brain_are_refused(spec: FunctionSpec) -> None:
    with pytest.raises(InvalidError, match="not allowed"):
        check_spec(spec)
