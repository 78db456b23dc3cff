"""Cutting a byte stream into frames: `<u32 header length><u32 payload length>`, little endian, header, payload.

The same for threads and event loops, which `transport` has. Knows nothing of what a frame holds; refuses one that
announces more than the limit. Tested in `tests/unit/test_transport.py`.
"""

from __future__ import annotations

from typing import Any

from squall.protocol.messages import FRAME_LIMIT_BYTES

HEAD_BYTES = 8
HEADER_LIMIT_BYTES = 16 << 20
CHUNK_LIMIT = 1024
"""Pieces of a frame that are kept as they came; what comes in more is joined."""
LARGE_FRAME_BYTES = 1 << 16
"""From here on a frame is taken and sent without joining it to its neighbours: copying costs more than a call."""

Frame = tuple[bytes, Any]
"""Header and payload; a large payload is a memoryview."""


class FrameReader:
    """Cuts a byte stream into frames, `(header, payload)` pairs; raises ValueError on abuse.

    `feed` takes bytes that came. A large payload is received where it will lie: while one is under way, `room` is
    what is missing of it, and `filled` says how much of that has come. Such a payload is a `memoryview`, any other
    `bytes`.
    """

    __slots__ = ("_chunks", "_filled", "_have", "_header", "_need", "_payload", "_since_join", "limit")

    def __init__(self, limit: int = FRAME_LIMIT_BYTES) -> None:
        self._chunks: list[bytes] = []
        self._since_join = 0
        self._have = 0
        self._need = HEAD_BYTES
        self._header = b""
        self._payload: memoryview | None = None
        """Of the large frame under way, of which `_filled` bytes are there."""
        self._filled = 0
        self.limit = limit

    def room(self) -> memoryview | None:
        """Where the next bytes belong, when they are the rest of a large payload."""
        return None if self._payload is None else self._payload[self._filled :]

    def filled(self, count: int) -> list[Frame]:
        """`count` bytes were written to `room()`."""
        payload = self._payload
        assert payload is not None
        self._filled += count
        if self._filled < len(payload):
            return []
        self._payload = None
        return [(self._header, payload.toreadonly())]

    def feed(self, data: bytes) -> list[Frame]:
        frames: list[Frame] = []
        room = self.room()
        if room is not None:
            count = min(len(room), len(data))
            room[:count] = data[:count]
            frames = self.filled(count)
            data = data[count:]
        return frames + self._feed(data) if data else frames

    def feed_view(self, data: memoryview) -> list[Frame]:
        """As `feed`, for a buffer that is written to again afterwards: only what is kept of it is copied, once."""
        if not self._have and self._payload is None and len(data) >= LARGE_FRAME_BYTES // 2:
            header_len = int.from_bytes(data[:4], "little")
            payload_len = int.from_bytes(data[4:HEAD_BYTES], "little")
            body = HEAD_BYTES + header_len
            if body <= len(data) < body + payload_len and LARGE_FRAME_BYTES <= payload_len <= self.limit - body:
                self._begin_large(bytes(data[HEAD_BYTES:body]), payload_len, data[body:])
                return []
        return self.feed(bytes(data))

    def _feed(self, data: bytes) -> list[Frame]:
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
        self._payload = memoryview(bytearray(size))
        self._payload[: len(beginning)] = beginning
        self._filled = len(beginning)
