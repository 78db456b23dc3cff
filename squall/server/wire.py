"""The server's ends of the wire: typed decoding with msgspec, and the hot messages written without a detour.

What arrives is hostile until it has passed `decode`. Ids and digests are checked against their patterns where they
enter, because they are written back into headers, paths and queries. Tested in `tests/unit/test_messages.py`.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

import msgspec

from squall.exception import Error, InvalidError, StartupError
from squall.protocol import requests, resumption  # noqa: F401  (their messages enter the table below)
from squall.protocol.messages import MESSAGES, Failure, Message, Reply
from squall.protocol.transport import FrameStream

ID = re.compile(r"[a-z]{2}-[0-9A-Za-z_-]{1,64}")
OUTBOX_FRAME_BYTES = 8 << 20

_PREFIX = b'{"t":"'
_DECODERS: dict[bytes, msgspec.json.Decoder[Any]] = {
    tag.encode(): msgspec.json.Decoder(cls) for tag, cls in MESSAGES.items()
}


def decode(header: bytes) -> Message:
    """A validated message. Raises ValueError."""
    if not header.startswith(_PREFIX):
        raise ValueError("frame header does not begin with its message's name")
    decoder = _DECODERS.get(header[6 : header.index(b'"', 6)])
    if decoder is None:
        raise ValueError(f"frame header names no known message: {header[:60]!r}")
    try:
        return decoder.decode(header)  # type: ignore[no-any-return]
    except (msgspec.MsgspecError, RecursionError) as error:  # the latter of what is nested too deep
        raise ValueError(f"message {header[6:40]!r}: {error}") from None


def check_id(value: str, prefix: str) -> str:
    if not ID.fullmatch(value) or not value.startswith(prefix + "-"):
        raise InvalidError(f"`{value[:80]}` is not an id of the form `{prefix}-…`")
    return value


class Outbox:
    """Results for one connection: all of one loop turn leave as one frame. `keep` is told of each frame, where another
    connection may have to carry it."""

    __slots__ = ("_bytes", "_heads", "_loop", "_parts", "keep", "stream")

    def __init__(self, loop: asyncio.AbstractEventLoop, stream: FrameStream) -> None:
        self._loop = loop
        self.stream = stream
        self.keep: Callable[[bytes, tuple[bytes, ...]], None] | None = None
        self._heads: list[str] = []
        self._parts: list[bytes] = []
        self._bytes = 0

    def add(self, head: str, data: bytes) -> None:
        if not self._heads:
            self._loop.call_soon(self.flush)
        self._heads.append(head)
        if data:
            self._parts.append(data)
            self._bytes += len(data)
            if self._bytes > OUTBOX_FRAME_BYTES:
                self.flush()

    def flush(self) -> None:
        if not self._heads:
            return
        header = ('{"t":"outputs","items":[' + ",".join(self._heads) + "]}").encode()
        self.stream.send_raw(header, *self._parts)
        if self.keep is not None:
            self.keep(header, tuple(self._parts))
        self._heads.clear()
        self._parts.clear()
        self._bytes = 0
        self.stream.flush()


def output_head(call_id: str, idx: int, status: str, size: int, blob: str, seq: int, message: str, hint: str) -> str:
    """An `OutputItem` as JSON. The ids and the digest were checked on their way in."""
    head = f'{{"call_id":"{call_id}","idx":{idx},"status":"{status}","size":{size}'
    if blob:
        head += f',"blob":"{blob}"'
    if seq:
        head += f',"seq":{seq}'
    if message:
        head += f',"message":{json.dumps(message)}'
    if hint:
        head += f',"hint":{json.dumps(hint)}'
    return head + "}"


def run_head(call_id: str, idx: int, size: int, blob: str, attempt: int, method: str = "") -> str:
    """A `RunItem` as JSON."""
    head = f'{{"call_id":"{call_id}","idx":{idx},"size":{size}'
    if blob:
        head += f',"blob":"{blob}"'
    if attempt:
        head += f',"attempt":{attempt}'
    if method:
        head += f',"method":{json.dumps(method)}'
    return head + "}"


def reply(stream: FrameStream, request_id: int, data: dict[str, Any] | None = None, payload: bytes = b"") -> None:
    stream.send(Reply(data or {}, re=request_id), payload)


def refuse(stream: FrameStream, request_id: int, error: Error) -> None:
    payload = error.packed if isinstance(error, StartupError) else b""
    stream.send(Failure(error.code, error.message or str(error), error.hint, re=request_id), payload)
