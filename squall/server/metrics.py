"""Metrics of the server in the text format of Prometheus.

`exposition` is a pure function of samples; `samples_of` reads them off a server, without waiting for anything: what it
costs grows with functions and containers, never with inputs. Every name has a row in `FAMILIES`, so that nothing is
exported that is not explained. Tested in `tests/unit/test_metrics.py`.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

from squall import __version__
from squall._observe import counters
from squall.server.objects import FunctionRecord, Scope

if TYPE_CHECKING:
    from squall.server.main import Server

FUNCTION_LIMIT = 2000
"""Functions with series of their own; a machine that asks every few seconds shall not be sent megabytes."""
LABEL_LIMIT = 200

FAMILIES: dict[str, tuple[Literal["gauge", "counter"], str]] = {
    "squall_info": ("gauge", "The server; always 1."),
    "squall_uptime_seconds": ("gauge", "Seconds since the server was started."),
    "squall_draining": ("gauge", "1 while the server is ending and takes nothing new."),
    "squall_connections": ("gauge", "Clients that are connected."),
    "squall_clients_away": ("gauge", "Clients whose connection broke and who may come back."),
    "squall_clients_silent": ("gauge", "Clients of this machine that do not answer."),
    "squall_connections_broken_total": ("counter", "Connections that broke of clients who may come back."),
    "squall_clients_returned_total": ("counter", "Clients that came back after their connection broke."),
    "squall_nodes": ("gauge", "Machines that run containers."),
    "squall_nodes_suspected": ("gauge", "Those of them that are not heard of and get no new containers."),
    "squall_nodes_lost_total": ("counter", "Nodes that were given up: what they ran was given to others."),
    "squall_nodes_returned_total": ("counter", "Nodes whose connection broke and that came back before that."),
    "squall_node_cpus": ("gauge", "Cores that a node offers."),
    "squall_node_memory_bytes": ("gauge", "Memory that a node offers."),
    "squall_apps": ("gauge", "Apps that run, by state."),
    "squall_containers": ("gauge", "Containers, by state."),
    "squall_function_inputs": ("gauge", "Inputs of a function that wait, wait to be tried again, or run."),
    "squall_function_containers": ("gauge", "Containers of a function, by state."),
    "squall_function_inputs_ended_total": ("counter", "Inputs of a function that have ended, by result."),
    "squall_function_start_failures": ("gauge", "Times in a row that containers of a function failed to start."),
    "squall_function_next_start_seconds": ("gauge", "Seconds until that is tried again, of functions that fail to."),
    "squall_spawned_inputs": ("gauge", "Inputs of spawned calls that have not ended."),
    "squall_schedules": ("gauge", "Schedules of deployed apps, by whether they are paused."),
    "squall_schedule_next_seconds": ("gauge", "Seconds until the next firing of any schedule; below 0: it is late."),
    "squall_log_bytes": ("gauge", "Output of containers that is kept."),
    "squall_log_segments": ("gauge", "Files that it is kept in."),
    "squall_log_bytes_dropped_total": ("counter", "Output that was not kept, as the disk was full."),
    "squall_log_lines_lost_total": ("counter", "Lines of the server's own log that could not be written."),
    "squall_containers_ended_total": ("counter", "Containers that have ended."),
    "squall_schedules_fired_total": ("counter", "Calls that schedules have made."),
    "squall_schedules_late_total": ("counter", "Those of them that came late, or made up for others."),
    "squall_schedules_skipped_total": ("counter", "Firings that were left out, as too many before had not ended."),
    "squall_connections_refused_total": ("counter", "Connections refused as there were too many."),
    "squall_hellos_refused_total": ("counter", "Connections refused for their credentials, version or words."),
    "squall_accepts_paused_total": ("counter", "Times that no connection was taken for want of descriptors."),
    "squall_stale_outputs_total": ("counter", "Results that came late or twice and were dropped."),
    "process_cpu_seconds_total": ("counter", "Processor time that the server has used."),
    "process_resident_memory_bytes": ("gauge", "Memory of the server."),
    "process_open_fds": ("gauge", "Descriptors that the server has open."),
    "squall_store_records_dropped_total": ("counter", "Records of usage that the Store's queue had no room for."),
}


class Sample(NamedTuple):
    name: str
    value: float
    labels: tuple[tuple[str, str], ...] = ()


def metrics_text(server: Server, scope: Scope | None = None) -> str:
    """All metrics of a server, as text. With a `scope`, functions and apps of other workspaces are left out."""
    return exposition(samples_of(server, scope))


def exposition(samples: Iterable[Sample]) -> str:
    """Samples in Prometheus' text format, those of a family together."""
    families: dict[str, list[Sample]] = {}
    for sample in samples:
        families.setdefault(sample.name, []).append(sample)
    lines: list[str] = []
    for name, found in families.items():
        kind, told = FAMILIES.get(name) or ("counter" if name.endswith("_total") else "gauge", "Not described.")
        lines += [f"# HELP {name} {told}", f"# TYPE {name} {kind}"]
        lines += [f"{name}{_labels(sample.labels)} {_number(sample.value)}" for sample in found]
    return "\n".join(lines) + "\n"


def _labels(labels: tuple[tuple[str, str], ...]) -> str:
    return "{" + ",".join(f'{key}="{_escaped(value)}"' for key, value in labels) + "}" if labels else ""


def _escaped(value: str) -> str:
    return value[:LABEL_LIMIT].replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) else repr(float(value))


def samples_of(server: Server, scope: Scope | None = None) -> Iterator[Sample]:
    info = (("version", __version__), ("server_id", server.server_id))
    yield Sample("squall_info", 1, info)
    yield Sample("squall_uptime_seconds", round(time.time() - server.started_at, 3))
    yield Sample("squall_draining", server.draining)
    yield Sample("squall_connections", len(server.peers))
    yield Sample("squall_clients_away", len(server.absences.away))
    yield Sample("squall_clients_silent", server.access.silent())
    yield from _of_nodes(server)
    yield from _of_apps(server, scope)
    yield from _of_functions(server, scope)
    yield Sample("squall_spawned_inputs", sum(server.calls.durable.unfinished.values()))
    yield from _of_schedules(server, scope)
    size, segments = server.logs.usage()
    yield Sample("squall_log_bytes", size)
    yield Sample("squall_log_segments", segments)
    yield Sample("squall_stale_outputs_total", server.dispatch.stale_outputs)
    found = counters()
    for name in sorted({*_COUNTERS, *found}):  # one that has counted nothing yet is 0, not missing
        yield Sample(f"squall_{name}_total", found.get(name, 0))
    yield from _of_process()


_COUNTERS = frozenset(
    name.removeprefix("squall_").removesuffix("_total")
    for name, (kind, _) in FAMILIES.items()
    if kind == "counter" and name.startswith("squall_") and "function" not in name and "stale" not in name
)


def _of_nodes(server: Server) -> Iterator[Sample]:
    nodes = server.nodes.nodes.values()
    yield Sample("squall_nodes", len(nodes))
    yield Sample("squall_nodes_suspected", sum(node.health != "up" for node in nodes))
    for node in nodes:
        label = (("node", node.node_id),)
        yield Sample("squall_node_cpus", node.machine.cpus, label)
        yield Sample("squall_node_memory_bytes", node.machine.memory_mib << 20, label)


def _of_apps(server: Server, scope: Scope | None) -> Iterator[Sample]:
    apps: Counter[str] = Counter(app.state for app in server.objects.apps.values() if _is_in(app.scope, scope))
    for state in ("running", "stopping"):
        yield Sample("squall_apps", apps[state], (("state", state),))
    containers: Counter[str] = Counter(
        record.state for record in server.reconciler.containers.values() if _is_in(record.function.app.scope, scope)
    )
    for state in ("creating", "starting", "ready", "draining"):
        yield Sample("squall_containers", containers[state], (("state", state),))


def _of_functions(server: Server, scope: Scope | None) -> Iterator[Sample]:
    """Those with the same name, as the versions of an app have them, are one."""
    inputs: dict[tuple[tuple[str, str], ...], Counter[str]] = {}
    waits: dict[tuple[tuple[str, str], ...], float] = {}
    now = time.monotonic()
    for function_id, state in server.dispatch.functions.items():
        record = server.objects.functions.get(function_id)
        if record is None or not _is_in(record.app.scope, scope) or len(inputs) >= FUNCTION_LIMIT:
            continue
        counts = inputs.setdefault(_names_of(record), Counter())
        ready = sum(container.state == "ready" for container in state.containers.values())
        counts["queued"] += state.queued + state.suspected
        counts["backoff"] += state.waiting
        counts["running"] += len(state.running)
        counts["ok"] += state.finished - state.failed
        counts["failed"] += state.failed
        counts["starting"] += len(state.starting)
        counts["ready"] += ready
        counts["draining"] += len(state.containers) - len(state.starting) - ready
        counts["start_failures"] += state.start_failures
        if state.start_failures:
            waits[_names_of(record)] = max(0.0, state.blocked_until - now)
    for family, key, values in _FUNCTION_FAMILIES:
        for names, counts in inputs.items():
            for value in values:
                yield Sample(family, counts[value], (*names, (key, value)))
    for names, counts in inputs.items():
        yield Sample("squall_function_start_failures", counts["start_failures"], names)
    for names, left in waits.items():
        yield Sample("squall_function_next_start_seconds", round(left, 3), names)


_FUNCTION_FAMILIES = (
    ("squall_function_inputs", "state", ("queued", "backoff", "running")),
    ("squall_function_containers", "state", ("starting", "ready", "draining")),
    ("squall_function_inputs_ended_total", "result", ("ok", "failed")),
)


def _names_of(record: FunctionRecord) -> tuple[tuple[str, str], ...]:
    app = record.app
    return (
        ("workspace", app.scope.workspace),
        ("environment", app.scope.environment),
        ("app", app.name),
        ("function", record.spec.tag),
    )


def _of_schedules(server: Server, scope: Scope | None) -> Iterator[Sample]:
    found = server.firings.all_next(None if scope is None else scope.workspace)
    paused = sum(at is None for at in found)
    yield Sample("squall_schedules", paused, (("paused", "yes"),))
    yield Sample("squall_schedules", len(found) - paused, (("paused", "no"),))
    coming = [at for at in found if at is not None]
    if coming:
        yield Sample("squall_schedule_next_seconds", round(min(coming) - time.time(), 3))


def _is_in(found: Scope, scope: Scope | None) -> bool:
    return scope is None or found.workspace == scope.workspace


def _of_process() -> Iterator[Sample]:
    used = os.times()
    yield Sample("process_cpu_seconds_total", round(used.user + used.system, 2))
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            yield Sample("process_resident_memory_bytes", int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        yield Sample("process_open_fds", len(os.listdir("/proc/self/fd")))
    except OSError:  # not a Linux machine
        return
