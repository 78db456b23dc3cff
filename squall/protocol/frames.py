"""Cutting a byte stream into frames: `<u32 header length><u32 payload length>`, little endian, header, payload.

The same for threads and event loops, which `transport` has. Knows nothing of what a frame holds; refuses one that
announces more than the limit. Tested in `tests/unit/test_transport.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from pickle import PickleBuffer
from typing import Any

from squall.protocol.messages import FRAME_LIMIT_BYTES

HEAD_BYTES = 8
HEADER_LIMIT_BYTES = 16 << 20
CHUNK_LIMIT = 1024
"""Pieces of a frame that are kept as they came; what comes in more is joined."""
LARGE_FRAME_BYTES = 1 << 16
"""From here on a frame is taken and sent without joining it to its neighbours: copying costs more than a call."""
SLACK_BYTES = 1 << 12
"""Of the next frame that may come together with the rest of a large one. Its header is then known, so that its payload
too is received where it will lie; and a read that brings less than it may says by that that there is no more."""
PEEK_BYTES = 1 << 12
"""Of the first read of a frame where those before were large: what comes along of its payload has to be copied."""
KEPT_BYTES = 8 << 20
"""Of large payloads' buffers, in all, that are used again: fresh memory costs as much as copying to it."""
KEPT_EACH = 1 << 20
KEPT_STEP = 1 << 16
KEPT_LOOKS = 3

Frame = tuple[bytes, Any]
"""Header and payload; a large payload is a memoryview."""


class Pieces:
    """Bytes to be sent that nobody has joined: most of them are a user's `bytes` object itself. Also what a pickler
    takes for a file, to which it gives what is large as it is. Of what may change later a copy is kept."""

    __slots__ = ("_size", "parts")

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self._size = 0

    def write(self, data: Any) -> None:
        if type(data) is not bytes:
            data = bytes(data.raw() if type(data) is PickleBuffer else data)
        self.parts.append(data)
        self._size += len(data)

    def __len__(self) -> int:
        return self._size

    def __bytes__(self) -> bytes:
        return b"".join(self.parts)


Packed = bytes | Pieces


def flat(payload: Iterable[Packed]) -> list[bytes]:
    """All of it piece by piece, as the kernel takes it."""
    parts: list[bytes] = []
    for data in payload:
        if type(data) is Pieces:
            parts += data.parts
        else:
            parts.append(data)  # type: ignore[arg-type]
    return parts


class Buffers:
    """The buffers of this process's large payloads. One is free again when no view of it is left; whoever takes one
    has it out of the queue for that moment, so threads need no lock."""

    def __init__(self) -> None:
        self._kept: deque[bytearray] = deque()
        self._kept_bytes = 0

    def take(self, size: int) -> memoryview:
        """At least `size` bytes with whatever they held before."""
        if size > KEPT_EACH:
            return memoryview(bytearray(size))
        for _ in range(min(KEPT_LOOKS, len(self._kept))):
            try:
                buffer = self._kept.popleft()
            except IndexError:  # another thread looks at it
                break
            view = memoryview(buffer) if len(buffer) >= size and _is_free(buffer) else None
            self._kept.append(buffer)
            if view is not None:
                return view
        size = -(-size // KEPT_STEP) * KEPT_STEP
        buffer = bytearray(size)
        view = memoryview(buffer)
        self._kept_bytes += size
        self._kept.append(buffer)
        while self._kept_bytes > KEPT_BYTES:
            self._kept_bytes -= len(self._kept.popleft())
        return view


def _is_free(buffer: bytearray) -> bool:
    """Whether there is no view of it: then, and only then, its size may change."""
    try:
        buffer.pop()
    except BufferError:
        return False
    buffer.append(0)
    return True


_buffers = Buffers()


class FrameReader:
    """Cuts a byte stream into frames, `(header, payload)` pairs; raises ValueError on abuse.

    `feed` takes bytes that came. A large payload is received where it will lie: while one is under way, `room` is
    where to receive what is missing of it and, behind that, a little of what follows; `filled` says how much has come.
    Such a payload is a `memoryview`, any other `bytes`.
    """

    __slots__ = ("_chunks", "_filled", "_have", "_header", "_need", "_payload", "_since_join", "_size", "limit", "peek")

    def __init__(self, limit: int = FRAME_LIMIT_BYTES) -> None:
        self._chunks: list[bytes] = []
        self._since_join = 0
        self._have = 0
        self._need = HEAD_BYTES
        self._header = b""
        self._payload: memoryview | None = None
        """Where the large frame under way lies, of whose `_size` bytes `_filled` are there."""
        self._filled = 0
        self._size = 0
        self.limit = limit
        self.peek = False
        """Whether to read no more than PEEK_BYTES where there is no `room`: the next frame is likely to be large."""

    def room(self) -> memoryview | None:
        """Where the next bytes belong, when they are the rest of a large payload."""
        return None if self._payload is None else self._payload[self._filled :]

    def filled(self, count: int) -> list[Frame]:
        """`count` bytes were written to `room()`."""
        payload, size = self._payload, self._size
        assert payload is not None
        self._filled += count
        if self._filled < size:
            return []
        self._payload = None
        self.peek = True
        frame = (self._header, payload[:size].toreadonly())
        return [frame, *self._feed(bytes(payload[size : self._filled]))] if self._filled > size else [frame]

    def feed(self, data: bytes) -> list[Frame]:
        frames: list[Frame] = []
        if self._payload is not None:
            count = min(self._size - self._filled, len(data))
            self._payload[self._filled : self._filled + count] = data[:count]
            frames = self.filled(count)
            data = data[count:]
        return frames + self._feed(data) if data else frames

    def feed_view(self, data: memoryview) -> list[Frame]:
        """As `feed`, for a buffer that is written to again afterwards: only what is kept of it is copied, once."""
        if not self._have and self._payload is None and len(data) >= PEEK_BYTES:
            header_len = int.from_bytes(data[:4], "little")
            payload_len = int.from_bytes(data[4:HEAD_BYTES], "little")
            body = HEAD_BYTES + header_len
            if body <= len(data) < body + payload_len and LARGE_FRAME_BYTES <= payload_len <= self.limit - body:
                self._begin_large(bytes(data[HEAD_BYTES:body]), payload_len, data[body:])
                return []
        return self.feed(bytes(data))

    def _feed(self, data: bytes) -> list[Frame]:
        self.peek = False
        self._have += len(data)
        if self._have < self._need and self._chunks:
            self._chunks.append(data)
            self._since_join += 1
            if self._since_join > CHUNK_LIMIT:
                self._join_latest()
            return []
        if self._chunks:
            self._chunks.append(data)
            data = b"".join(self._chunks)
            self._chunks.clear()
            self._since_join = 0
        return self._cut(data)

    def _join_latest(self) -> None:
        """A frame that comes byte by byte would cost forty times its size: an object each. Only what came since the
        last time is joined, so that no byte is copied again and again."""
        self._chunks[-self._since_join :] = [b"".join(self._chunks[-self._since_join :])]
        self._since_join = 0

    def _cut(self, data: bytes) -> list[Frame]:
        frames: list[Frame] = []
        offset, end = 0, len(data)
        need = HEAD_BYTES
        while end - offset >= HEAD_BYTES:
            header_len = int.from_bytes(data[offset : offset + 4], "little")
            payload_len = int.from_bytes(data[offset + 4 : offset + 8], "little")
            need = HEAD_BYTES + header_len + payload_len
            if need > self.limit or header_len > HEADER_LIMIT_BYTES:
                raise ValueError(f"frame announces {need} bytes, the limit is {self.limit}")
            body = offset + HEAD_BYTES + header_len
            if end - offset < need:
                if payload_len < LARGE_FRAME_BYTES:
                    break
                if end >= body:
                    self._begin_large(data[offset + HEAD_BYTES : body], payload_len, data[body:])
                    offset, need = end, HEAD_BYTES
                    break
                need = HEAD_BYTES + header_len  # look again when the header is there
                break
            frames.append((data[offset + HEAD_BYTES : body], data[body : offset + need]))
            offset += need
            need = HEAD_BYTES
        rest = data[offset:] if offset else data
        self._have, self._need = len(rest), need
        if rest:
            self._chunks.append(rest)
        return frames

    def _begin_large(self, header: bytes, size: int, beginning: bytes | memoryview) -> None:
        self._header = header
        self._size = size
        self._payload = _buffers.take(size + SLACK_BYTES)
        self._payload[: len(beginning)] = beginning
        self._filled = len(beginning)
