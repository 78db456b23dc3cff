"""Nodes: the agents' connections, and the runner sockets they hand over.

An agent registers a machine over its frame stream and passes the server end of each runner's socket over a second,
SEQPACKET connection. A handed-over socket is accepted only for a container this server asked that agent for. When an
agent's stream ends its node is lost, with every container on it. Nothing a runner says about who it is counts: it is
the container whose socket it speaks on.
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

log = Logger("server")

HANDOFF_BYTES = 4096
SILENCE_LIMIT = 30
"""Seconds; an agent reports every five."""


class Node:
    """One registered machine."""

    def __init__(self, node_id: str, stream: FrameStream, machine: Register) -> None:
        self.node_id = node_id
        self.stream = stream
        self.machine = machine
        self.containers: set[str] = set()
        self.used: dict[str, dict[str, float]] = {}
        self.silence = 0
        """Looks at it since it was last heard of."""

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

    def register(self, stream: FrameStream, machine: Register) -> Node:
        if stream.owner is not None:
            raise ConflictError("this connection has registered a node already")
        node = Node(new_id("no"), stream, machine)
        stream.owner = node
        self.nodes[node.node_id] = node
        self.changed.set()
        log.info("node registered", node=node.node_id, hostname=machine.hostname, runtime=machine.runtime)
        for warning in machine.warnings:
            log.warning(warning, node=node.node_id)
        return node

    def silent(self) -> list[Node]:
        """To be called every second: the nodes that have said nothing for so long that they must hang.

        Looks are counted, not seconds: if it was this process that stood still, what they said meanwhile is read
        before the next look.
        """
        for node in self.nodes.values():
            node.silence += 1
        return [node for node in self.nodes.values() if node.silence > SILENCE_LIMIT]

    def lost(self, node: Node) -> None:
        self.nodes.pop(node.node_id, None)
        if not self.nodes:
            self.changed.clear()

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
            }
            for node in self.nodes.values()
        ]
