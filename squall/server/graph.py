"""The graph of a call: its inputs, what each of them called, and so on down, as far as that is known.

Spawned calls and their parents are in the journal. Of `remote` and `map` calls that containers made only what is in
memory is known: those that run, and the newest that have ended. So a graph is the best that can be said and may be cut
off, and says so. Reads only. Tested in `tests/integration/test_graph.py`.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

from squall.exception import NotFoundError
from squall.protocol.messages import input_id
from squall.server import journal
from squall.server.calls import CallInfo, title_of

if TYPE_CHECKING:
    from squall.server.calls import Calls

NODE_LIMIT = 2000
"""Inputs of one answer."""
DEPTH_LIMIT = 50

Node = dict[str, Any]


async def graph_of(calls: Calls, call_id: str, workspace: str) -> tuple[list[Node], bool]:
    """The inputs of a spawned call and of all below it, parents first; and whether some were left out."""
    if await calls.database.read(lambda connection: journal.find_call(connection, call_id, workspace)) is None:
        raise NotFoundError(f"no spawned call `{call_id}`")
    nodes: list[Node] = []
    level: dict[str, tuple[str, str]] = {call_id: ("", "")}
    for _ in range(DEPTH_LIMIT):
        found = await _inputs_of(calls, level, NODE_LIMIT + 1 - len(nodes))
        nodes += found
        level = await _below(calls, found)
        if not level or len(nodes) > NODE_LIMIT:
            break
    return nodes[:NODE_LIMIT], len(nodes) > NODE_LIMIT or bool(level)


async def _inputs_of(calls: Calls, level: dict[str, tuple[str, str]], room: int) -> list[Node]:
    """The inputs of some calls; `level` tells of each its parent and, where that is known, what it calls."""
    if room <= 0:
        return []
    rows = await calls.database.read(lambda connection: journal.find_inputs(connection, list(level), room))
    nodes = {(row.call_id, row.idx): _node(row.call_id, row.idx, row.status or "pending") for row in rows}
    for timeline in calls.timelines.inputs:
        if timeline.call_id in level:
            node = nodes.setdefault(
                (timeline.call_id, timeline.idx), _node(timeline.call_id, timeline.idx, timeline.status)
            )
            node["container_id"], node["function"] = timeline.container_id, timeline.function
    for call_id in level:
        call = calls.dispatch.calls.get(call_id)
        for input_ in list(islice(call.inputs.values(), room)) if call is not None else ():
            node = nodes.setdefault((call_id, input_.idx), _node(call_id, input_.idx, ""))
            node["status"] = "running" if input_.container is not None else "pending"
            node["container_id"] = input_.container.container_id if input_.container is not None else ""
    for (call_id, _), node in nodes.items():
        node["parent"], known = level[call_id]
        node["function"] = node["function"] or known or _function_of(calls, rows, call_id)
    return [nodes[key] for key in sorted(nodes)][:room]


def _node(call_id: str, idx: int, status: str) -> Node:
    return {
        "input_id": input_id(call_id, idx),
        "call_id": call_id,
        "idx": idx,
        "status": status,
        "function": "",
        "container_id": "",
    }


def _function_of(calls: Calls, rows: list[Any], call_id: str) -> str:
    for row in rows:
        if row.call_id == call_id:
            function = calls.objects.find_function(row.function_id)
            return title_of(CallInfo(function, row.function_id, 0.0, "", row.method))
    return ""


async def _below(calls: Calls, nodes: list[Node]) -> dict[str, tuple[str, str]]:
    """The calls that these inputs made."""
    ids = [node["input_id"] for node in nodes]
    below: dict[str, tuple[str, str]] = {}
    for node in nodes:
        for idx, call_id, function in calls.timelines.children.get(node["call_id"], ()):
            if idx == node["idx"]:
                below[call_id] = (node["input_id"], function)
    rows = await calls.database.read(lambda connection: journal.find_children(connection, ids))
    for row in rows:
        below.setdefault(row.call_id, (row.parent, ""))
    return below
