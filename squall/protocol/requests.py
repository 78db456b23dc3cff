"""What clients ask of a server beside calling: messages that look at things and manage them.

Apart from `messages`, whose rules hold here too, so that a container and a program that only calls never load them.
Imported by the server and by the commands that send them. The contract is tested in `tests/unit/test_messages.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from squall.protocol.messages import Message

# ---- looking at things ------------------------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class ListObjects(Message):
    """`kind`: `apps`, `containers`, `functions`, `calls`, `nodes`. `Reply.data`: `{"rows": [dict, ...]}`."""

    TAG = "list_objects"
    kind: str
    app: str = ""
    all: bool = False
    limit: int = 100


@dataclass(eq=False, repr=False)
class GetLogs(Message):
    """Past output of an app or a container as `LogChunk` pushes carrying this request's id in `re`, then the `Reply`.
    With `follow`, pushes go on until the app stops or the connection closes."""

    TAG = "get_logs"
    app: str = ""
    container_id: str = ""
    follow: bool = False
    tail: int = 0
    image_id: str = ""
    """What the builds of this image said, instead."""


@dataclass(eq=False, repr=False)
class GetTrace(Message):
    """`call` is a call or input id, or empty for the latest. `Reply.data`: call_id, function, inputs: [{idx, status,
    attempts, spans: [{name, start, end, note}], events}], total_ms."""

    TAG = "get_trace"
    call: str = ""
    limit: int = 20


@dataclass(eq=False, repr=False)
class StopServer(Message):
    """End the server: its ephemeral apps stop, containers end. `Reply.data` `{}` before it goes."""

    TAG = "stop_server"
    reason: str = ""
