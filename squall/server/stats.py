"""How calls of functions went lately: counted from the timelines that are kept in memory of the newest inputs.

Pure reading, on request: nothing is counted as inputs pass. Latency is from the call to its result, execution what the
runner measured. Tested in `tests/unit/test_stats.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from squall.server.timelines import InputTimeline

SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def counted(timelines: Iterable[InputTimeline], function_ids: set[str], after: float) -> dict[str, dict[str, Any]]:
    """By function: `counts` by status, `latency_ms` and `execution_ms`, of the inputs that ended after that moment."""
    found: dict[str, list[InputTimeline]] = {}
    for one in timelines:
        if one.done_at > after and one.function_id in function_ids:
            found.setdefault(one.function_id, []).append(one)
    return {function_id: _summary(found.get(function_id, [])) for function_id in function_ids}


def _summary(inputs: list[InputTimeline]) -> dict[str, Any]:
    return {
        "counts": dict(sorted(Counter(one.status for one in inputs).items())),
        "latency_ms": quantiles([one.done_at - (one.sent_at or one.queued_at) for one in inputs]),
        "execution_ms": quantiles([one.finished_at - one.started_at for one in inputs if one.started_at]),
    }


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Nearest-rank quantiles in milliseconds; none of nothing."""
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return {name: ordered[min(last, int(share * len(ordered)))] * 1000 for name, share in SHARES.items() if ordered}
