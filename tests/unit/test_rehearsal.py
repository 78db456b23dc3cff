"""A zygote's rehearsal: it runs the whole runner, leaves no trace, and where it fails nothing else does."""

from __future__ import annotations

import os
import signal
import sys
import threading

import pytest

import squall
from squall.runner import execute, rehearsal


def traces() -> dict[str, object]:
    return {
        "threads": threading.active_count(),
        "descriptors": len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0,
        "environment": dict(os.environ),
        "path": list(sys.path),
        "modules": rehearsal.MODULE in sys.modules,
        "handlers": [signal.getsignal(signum) for signum in (execute.CANCEL_SIGNAL, signal.SIGTERM)],
        "is_local": squall.is_local(),
        "input": squall.current_input_id(),
    }


def test_a_rehearsal_runs_to_its_end_and_leaves_no_trace() -> None:
    assert rehearsal.rehearse(1) == ""  # what is loaded the first time stays loaded
    before = traces()
    assert rehearsal.rehearse(3) == ""
    assert traces() == before


def test_a_rehearsal_calls_what_it_imports_once_for_each_input(monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[tuple[str, int]] = []
    monkeypatch.setattr(execute.Runner, "send_output", lambda self, out, data: results.append((out.status, out.idx)))
    assert rehearsal.rehearse(2) == ""
    assert results == [("ok", 0), ("ok", 1)] * 2


def test_a_rehearsal_that_fails_says_why_and_leaves_no_trace_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "MODULE", "no_such_module_anywhere")
    rehearsal.rehearse(1)
    before = traces()
    assert "the runner ended with 1" in rehearsal.rehearse(1)
    assert traces() == before
