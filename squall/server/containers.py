"""One container as the server's hands see it: where it is, its runner's connection, its timeline."""

from __future__ import annotations

import asyncio
from typing import Any

from squall.protocol.states import CONTAINER_MOVES, ContainerState
from squall.protocol.transport import FrameStream
from squall.server.calls import Result
from squall.server.objects import FunctionRecord
from squall.server.timelines import ContainerTimeline


class ContainerRecord:
    __slots__ = (
        "container_id",
        "exit_code",
        "function",
        "gone",
        "gpus",
        "init_error",
        "is_adopted",
        "node",
        "peer",
        "reason",
        "said_hello",
        "state",
        "stop_reason",
        "stopped_by_operator",
        "stream",
        "timeline",
        "usage",
        "was_given_up",
    )

    def __init__(
        self, container_id: str, function: FunctionRecord, node: Any, gpus: list[int], now_wall: float
    ) -> None:
        self.container_id = container_id
        self.function = function
        self.node = node
        self.gpus = gpus
        self.state: ContainerState = "pending"
        self.stream: FrameStream | None = None
        self.said_hello = False
        self.is_adopted = False
        """It was made for an earlier server."""
        self.was_given_up = False
        """Its node was lost, and may come back with it."""
        self.peer: Any = None
        """Where its user code acts as a client."""
        self.timeline = ContainerTimeline(now_wall)
        self.stop_reason = ""
        self.stopped_by_operator = False
        self.init_error: Result | None = None
        self.reason = ""
        self.exit_code = -1
        self.usage: dict[str, float] = {}
        self.gone = asyncio.Event()

    def move(self, state: ContainerState) -> bool:
        """Go to `state` if that is a legal move; whether it was."""
        if state not in CONTAINER_MOVES[self.state]:
            return False
        self.state = state
        return True
