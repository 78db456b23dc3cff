"""Nodes: the agents' connections, and the runner sockets they hand over.

An agent registers a machine over its frame stream and passes the server end of each runner's socket over a second,
SEQPACKET connection. A handed-over socket is accepted only for a container this server asked that agent for. Nothing a
runner says about who it is counts: it is the container whose socket it speaks on. An agent's stream may end without the
node being gone: `liveness` decides when it is lost, and what it was called is kept for when it comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from squall._observe import Logger
from squall.exception import ConflictError
from squall.protocol.messages import Message, Register, new_id
from squall.protocol.transport import FrameStream
from squall.server.liveness import NodeHealth

log = Logger("server")

HANDOFF_BYTES = 4096
NAMES_LIMIT = 1000
"""Agents whose nodes' ids are remembered."""
LOST_SHOWN = 16
"""Lost nodes that are listed."""


class Node:
    """One registered machine."""

    def __init__(self, node_id: str, stream: FrameStream, machine: Register) -> None:
        self.node_id = node_id
        self.stream = stream
        self.machine = machine
        self.containers: set[str] = set()
        self.used: dict[str, dict[str, float]] = {}
        self.health: NodeHealth = "up"
        self.reason = ""
        """Why it is not up."""
        self.since = 0.0
        """Wall-clock moment since which it is as it is."""

    def send(self, message: Message, payload: bytes = b"") -> None:
        self.stream.send(message, payload)


class Nodes:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.nodes: dict[str, Node] = {}
        self.changed = asyncio.Event()
        self.on_runner: Callable[[str, socket.socket | None], None]
        """Set by `main`: takes the socket of a container's runner, or None when there was no descriptor left for it:
        the kernel then drops it without an error."""
        self._handoff: socket.socket | None = None
        self._links: set[socket.socket] = set()
        self._names: dict[str, str] = {}
        """Agent -> id of its node, the latest last."""
        self.lost_ones: dict[str, Node] = {}
        """Those that were lost and have not come back, for people."""

    def of_agent(self, agent_id: str) -> Node | None:
        """The node of an agent that comes back before it was lost."""
        return self.nodes.get(self._names.get(agent_id, "")) if agent_id else None

    def _id_for(self, agent_id: str) -> str:
        node_id = self._names.pop(agent_id, "") or new_id("no")
        if agent_id:
            self._names[agent_id] = node_id
            if len(self._names) > NAMES_LIMIT:
                del self._names[next(iter(self._names))]
        return node_id

    def register(self, stream: FrameStream, machine: Register) -> Node:
        if stream.owner is not None:
            raise ConflictError("this connection has registered a node already")
        node = Node(self._id_for(machine.agent_id), stream, machine)
        self.lost_ones.pop(node.node_id, None)
        stream.owner = node
        self.nodes[node.node_id] = node
        self.changed.set()
        log.info("node registered", node=node.node_id, hostname=machine.hostname, runtime=machine.runtime)
        for warning in machine.warnings:
            log.warning(warning, node=node.node_id)
        return node

    def lost(self, node: Node) -> None:
        self.nodes.pop(node.node_id, None)
        self.lost_ones[node.node_id] = node
        if len(self.lost_ones) > LOST_SHOWN:
            del self.lost_ones[next(iter(self.lost_ones))]
        if not self.nodes:
            self.changed.clear()

    def any_up(self) -> Node:
        """Some node that is there, one that is heard of if there is any. Raises StopIteration."""
        return next(iter(sorted(self.nodes.values(), key=lambda node: node.health != "up")))

    # -- hand-over

    def listen(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(path))
        os.chmod(path, 0o600)
        listener.listen(8)
        listener.setblocking(False)
        self._handoff = listener
        self.loop.add_reader(listener, self._accept)

    def _accept(self) -> None:
        assert self._handoff is not None
        try:
            link, _ = self._handoff.accept()
        except OSError:
            return
        link.setblocking(False)
        self._links.add(link)
        self.loop.add_reader(link, self._receive, link)

    def _receive(self, link: socket.socket) -> None:
        for _ in range(64):
            try:
                data, fds, _, _ = socket.recv_fds(link, HANDOFF_BYTES, 4)
            except BlockingIOError:
                return
            except OSError:
                data, fds = b"", []
            if not data:
                self._close_link(link)
                return
            self._take(data, fds)

    def _take(self, data: bytes, fds: list[int]) -> None:
        sockets = [socket.socket(fileno=fd) for fd in fds]
        try:
            container_id = json.loads(data)["container_id"]
            if len(sockets) <= 1 and isinstance(container_id, str):
                self.on_runner(container_id, sockets.pop() if sockets else None)
        except (ValueError, KeyError, TypeError) as error:
            log.warning("a malformed hand-over was refused", error=str(error))
        finally:
            for sock in sockets:
                sock.close()

    def _close_link(self, link: socket.socket) -> None:
        self.loop.remove_reader(link)
        self._links.discard(link)
        link.close()

    def close(self) -> None:
        for link in list(self._links):
            self._close_link(link)
        if self._handoff is not None:
            self.loop.remove_reader(self._handoff)
            path = self._handoff.getsockname()
            self._handoff.close()
            with contextlib.suppress(OSError):
                os.unlink(path)

    def inventory(self) -> list[dict[str, Any]]:
        return [
            {
                "node_id": node.node_id,
                "hostname": node.machine.hostname,
                "cpus": node.machine.cpus,
                "memory_mib": node.machine.memory_mib,
                "gpus": [gpu.get("type", "") for gpu in node.machine.gpus],
                "runtime": node.machine.runtime,
                "warnings": node.machine.warnings,
                "containers": len(node.containers),
                "health": node.health,
                "reason": node.reason,
                "since": node.since or None,
            }
            for node in (*self.nodes.values(), *self.lost_ones.values())
        ]
