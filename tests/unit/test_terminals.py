"""Terminals against a client that sends more than it was allowed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from squall.protocol.messages import ExecData, ExecExit, Interact, Message
from squall.server.terminals import KEYS_LIMIT_BYTES, Terminals


class Thing(SimpleNamespace):
    __hash__ = object.__hash__  # type: ignore[assignment]


class Peer:
    def __init__(self, owner: Any = None) -> None:
        self.stream = self
        self.owner = owner
        self.waiting = 0
        self.sent: list[Message] = []

    def send(self, message: Message, payload: bytes = b"") -> None:
        self.sent.append(message)

    def waiting_bytes(self) -> int:
        return self.waiting

    def reply(self, request_id: int, data: dict[str, Any]) -> None:
        self.sent.append(Message())


def test_input_that_a_container_does_not_read_ends_its_turn_before_it_fills_the_memory() -> None:
    client: Any = Peer()
    app = Thing(app_id="ap-1", terminal="xterm", owner=client)
    record = SimpleNamespace(container_id="co-1", function=SimpleNamespace(app=app, spec=SimpleNamespace(tag="f")))
    runner: Any = Peer(record)
    dispatch: Any = SimpleNamespace(attend=lambda *_: None)
    terminals = Terminals(dispatch, lambda record, reason: None)
    terminals.ask(runner, Interact(id=1), b"")
    exec_id = client.sent[0].exec_id
    terminals.from_client(client, ExecData(exec_id, "resize", rows=24, cols=80), b"")
    terminals.from_client(client, ExecData(exec_id, "stdin"), b"keys")
    assert isinstance(runner.sent[-1], ExecData)
    runner.waiting = KEYS_LIMIT_BYTES + 1
    terminals.from_client(client, ExecData(exec_id, "stdin"), b"keys")
    assert isinstance(runner.sent[-1], ExecExit)
    assert isinstance(client.sent[-1], ExecExit)
