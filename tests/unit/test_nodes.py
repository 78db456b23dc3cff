"""The hand-over of runner sockets from an agent, when all is well and when it is not."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path

from squall.protocol.messages import Register
from squall.protocol.transport import FrameStream
from squall.server.nodes import SILENCE_LIMIT, Nodes

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


def test_a_node_that_says_nothing_for_long_is_found_and_one_that_speaks_is_not() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        nodes = Nodes(loop)
        hung, speaking = (
            nodes.register(FrameStream(loop, lambda *_: None, lambda *_: None), Register("host", 1.0, 100))
            for _ in range(2)
        )
        for _ in range(SILENCE_LIMIT):
            assert nodes.silent() == []
        speaking.silence = 0
        assert nodes.silent() == [hung]

    asyncio.run(main())
