"""Metrics are in a form that Prometheus reads, each is explained, and none tells of another workspace."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from squall import _observe
from squall._clock import ManualClock
from squall.protocol.messages import FunctionSpec, Register
from squall.server import metrics
from squall.server.dispatch import Dispatch
from squall.server.inputs import FunctionOptions
from squall.server.metrics import FAMILIES, Sample, exposition, metrics_text
from squall.server.objects import AppRecord, FunctionRecord, Scope

LINE = re.compile(
    r"""[a-z_]+(\{[a-z_]+="(\\.|[^"\\\n])*"(,[a-z_]+="(\\.|[^"\\\n])*")*\})? (-?[0-9.e+-]+|NaN|[+-]Inf)"""
)
SERVER = Path(metrics.__file__).parent


def test_every_counter_of_the_server_is_explained() -> None:
    named = {name for path in SERVER.glob("*.py") for name in re.findall(r"\bcount\(\"([a-z_]+)\"", path.read_text())}
    assert "schedules_fired" in named
    assert sorted(name for name in named if f"squall_{name}_total" not in FAMILIES) == []


def test_strange_names_and_numbers_stay_in_their_lines() -> None:
    strange = 'a"b\\c\nd' + "x" * 1000
    text = exposition([Sample("squall_apps", math.inf, (("state", strange),)), Sample("squall_apps", 0.5)])
    head, kind, first, second, *rest = text.split("\n")
    assert (head, kind) == ("# HELP squall_apps Apps that run, by state.", "# TYPE squall_apps gauge")
    assert first.startswith('squall_apps{state="a\\"b\\\\c\\nd')
    assert first.endswith(" +Inf")
    assert len(first) < 300
    assert (second, rest) == ("squall_apps 0.5", [""])


@pytest.fixture
def server() -> Any:
    """What a server's metrics are read from."""
    dispatch, functions = Dispatch(), {}
    apps = {}
    for number, workspace in enumerate(["main", "other"]):
        app = AppRecord(f"ap-{number}", f"app{number}", False, 0.0, None, scope=Scope(workspace, "main"))
        apps[app.app_id] = app
        for version in range(2):  # two versions of one function
            pool = FunctionRecord(f"fu-{number}{version}", app, FunctionSpec("work"), f"fu-{number}")
            functions[pool.function_id] = pool
            dispatch.add_function(0.0, pool.function_id, FunctionOptions())
            dispatch.submit(0.0, f"fc-{number}{version}", pool.function_id, [(n, b"") for n in range(3)], "map", None)
    node = SimpleNamespace(node_id="no-1", health="up", machine=Register("host", 2.0, 1024))
    return SimpleNamespace(
        server_id="sv-1",
        started_at=ManualClock().wall(),
        draining=False,
        peers={1, 2},
        absences=SimpleNamespace(away={}),
        access=SimpleNamespace(silent=lambda: 0),
        nodes=SimpleNamespace(nodes={"no-1": node}),
        objects=SimpleNamespace(apps=apps, functions=functions),
        reconciler=SimpleNamespace(containers={}),
        dispatch=dispatch,
        calls=SimpleNamespace(durable=SimpleNamespace(unfinished={"fu-1": 7})),
        firings=SimpleNamespace(all_next=lambda workspace: [None, 1e10]),
        logs=SimpleNamespace(usage=lambda: (123, 4)),
    )


def test_text_is_what_prometheus_reads(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_observe, "_counters", {"schedules_fired": 3.0})  # not those of other tests' rooms
    lines = metrics_text(server).splitlines()
    plain = [line for line in lines if not line.startswith("#")]
    assert [line for line in plain if not LINE.fullmatch(line)] == []
    assert len(set(plain)) == len(plain)
    names = {line.split("{")[0].split()[0] for line in plain}
    assert names <= set(FAMILIES)
    assert {"squall_nodes 1", "squall_connections 2", "squall_log_bytes 123", "squall_spawned_inputs 7"} <= set(plain)


def test_versions_of_a_function_are_one(server: Any) -> None:
    wanted = 'squall_function_inputs{workspace="main",environment="main",app="app0",function="work",state="queued"} 6'
    assert wanted in metrics_text(server).splitlines()


def test_functions_of_another_workspace_are_left_out(server: Any) -> None:
    text = metrics_text(server, Scope("main", "main"))
    assert 'app="app0"' in text
    assert 'app="app1"' not in text
    assert 'squall_apps{state="running"} 1' in text


def test_functions_with_series_of_their_own_are_bounded(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "FUNCTION_LIMIT", 1)
    assert 'app="app1"' not in metrics_text(server)
