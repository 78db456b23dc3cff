"""The hand-over of runner sockets from an agent, when all is well and when it is not."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path

from squall.protocol.messages import Register
from squall.protocol.transport import FrameStream
from squall.server.nodes import Node, Nodes

Taken = list[tuple[str, bool]]


def handed_over(tmp_path: Path, messages: list[tuple[bytes, int]]) -> Taken:
    """What the server takes of messages that come with so many descriptors each."""
    taken: Taken = []
    last = asyncio.Event()

    def take(container_id: str, sock: socket.socket | None) -> None:
        taken.append((container_id, sock is not None))
        if sock is not None:
            sock.close()
        if container_id == "co-last":
            last.set()

    async def main() -> None:
        nodes = Nodes(asyncio.get_running_loop())
        nodes.on_runner = take
        nodes.listen(tmp_path / "handoff.sock")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as agent:
            agent.connect(str(tmp_path / "handoff.sock"))
            for data, count in messages:
                socket.send_fds(agent, [data], [agent.fileno()] * count)
            socket.send_fds(agent, [named("co-last")], [agent.fileno()])
            await last.wait()
        nodes.close()

    asyncio.run(asyncio.wait_for(main(), 10))
    return taken[:-1]


def named(container_id: str) -> bytes:
    return json.dumps({"container_id": container_id}).encode()


def test_a_runners_socket_arrives_under_its_containers_name(tmp_path: Path) -> None:
    assert handed_over(tmp_path, [(named("co-1"), 1)]) == [("co-1", True)]


def test_a_socket_the_kernel_had_to_drop_is_told_of(tmp_path: Path) -> None:
    assert handed_over(tmp_path, [(named("co-1"), 0)]) == [("co-1", False)]


def test_malformed_hand_overs_are_passed_over(tmp_path: Path) -> None:
    assert handed_over(tmp_path, [(b"[]", 1), (b"{", 1), (b'{"container_id": 1}', 1), (named("co-1"), 2)]) == []


def test_an_agent_that_comes_back_is_the_same_node_and_a_lost_one_is_still_listed() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        nodes = Nodes(loop)

        def register(agent_id: str) -> Node:
            stream = FrameStream(loop, lambda *_: None, lambda *_: None)
            return nodes.register(stream, Register("host", 1.0, 100, agent_id=agent_id))

        first, other = register("a"), register("b")
        assert nodes.of_agent("a") is first
        assert nodes.of_agent("") is None
        first.health = "lost"
        nodes.lost(first)
        assert nodes.of_agent("a") is None
        assert {row["node_id"]: row["health"] for row in nodes.inventory()} == {
            first.node_id: "lost",
            other.node_id: "up",
        }
        assert register("a").node_id == first.node_id
        assert len(nodes.inventory()) == 2
        other.health = "suspected"
        assert nodes.any_up().node_id == first.node_id

    asyncio.run(main())
