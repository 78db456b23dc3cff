"""Clients whose connection broke and who may come back: what they have here is kept, for as long as they try.

A connection over a network breaks without anybody having gone. So a client is one `Peer` over all its connections:
its apps and calls go on without it, what is pushed to it meanwhile is kept, and on another connection it goes on where
the last one broke, to the frame. A client of the same machine is gone when its connection is, as the kernel closes that
with the process, unless it said that it would return; one from elsewhere is gone when it said so, when its token ended,
or when its patience is over. `Pushes` and the rules are plain code; `Absences` is the hand with the timers. Tested in
`tests/unit/test_absence.py` and `tests/integration/test_network.py`.
"""

from __future__ import annotations

import asyncio
import functools
import json
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from squall._observe import Logger, count
from squall.protocol.messages import Hello
from squall.server.objects import Scope

if TYPE_CHECKING:
    from squall.server.api import Peer

log = Logger("server")

PATIENCE_LIMIT = 3600.0
"""Whatever a client says that its patience is."""
BEATS_APART = 3
"""By so many beats client and server may differ in when they notice that their connection broke."""
CONNECTED_BYTES = 32 << 20
"""Of what a connected client has not confirmed, beyond what still waits here for it to read."""
AWAY_BYTES = 512 << 20
"""What is kept for one that is away; if more comes, it is given up."""
AWAY_LOG_BYTES = 1 << 20
"""Of an app's output, which is on disk too, no more than this."""

Key = tuple[str, int]


class Pushes:
    """The frames pushed to a client that it has not confirmed, in their order; counted over all its connections."""

    def __init__(self) -> None:
        self.frames: deque[tuple[bytes, tuple[bytes, ...]]] = deque()
        self.size = 0
        self.gone = 0
        """Frames before those that are kept."""
        self.trimmed = 0
        """The last frame that was dropped although nobody said that it came."""

    def add(self, header: bytes, parts: tuple[bytes, ...]) -> None:
        self.frames.append((header, parts))
        self.size += _size(header, parts)

    def confirm(self, received: int) -> None:
        """The client has had so many. Whatever it says, no more than there were can be gone."""
        while self.gone < received and self.frames:
            self._drop()

    def trim(self, limit: int) -> None:
        """Keep the memory bounded: what was sent longest ago is the likeliest to have come."""
        while self.size > limit and self.frames:
            self._drop()
            self.trimmed = self.gone

    def _drop(self) -> None:
        self.size -= _size(*self.frames.popleft())
        self.gone += 1


def _ended_in(header: bytes) -> set[Key]:
    """The inputs whose results are in a frame."""
    items = json.loads(header).get("items", ())
    return {(item["call_id"], item["idx"]) for item in items if item["status"] != "yield"}


def _size(header: bytes, parts: tuple[bytes, ...]) -> int:
    return len(header) + sum(map(len, parts))


def may_return(peer: Peer) -> bool:
    """Whether a client whose connection broke may be about to come back."""
    if peer.patience <= 0 or peer.leaving == "for good":
        return False
    return bool(peer.remote) or peer.leaving == "for another connection"


def grace_of(patience: float, heartbeat: float) -> float:
    """Seconds to wait for it, from when the server noticed; the client may have noticed later."""
    return min(patience, PATIENCE_LIMIT) + BEATS_APART * heartbeat


class Absences:
    def __init__(self, loop: asyncio.AbstractEventLoop, heartbeat: float) -> None:
        self.loop = loop
        self.heartbeat = heartbeat
        self.clients: dict[str, Peer] = {}
        """By their own ids, those that may come back, whether here or away."""
        self.away: dict[Peer, asyncio.TimerHandle] = {}
        self.gone: Callable[[Peer, str], None]
        """Set by `main`: ends what a client has here that will not come back."""
        self.holds: Callable[[Peer], bool]
        """Set by `main`: whether it has anything."""

    def expect(self, peer: Peer, hello: Hello) -> None:
        """A client has come that may come back."""
        peer.client_id, peer.patience = hello.client_id, hello.patience
        if not hello.client_id or hello.patience <= 0:
            return
        self.clients[hello.client_id] = peer
        if peer.remote:
            overflow = functools.partial(self.give_up, peer, "more came for it than is kept")
            peer.keep_pushes(functools.partial(self.loop.call_soon, overflow))

    def find(self, hello: Hello, token_id: str, scope: Scope) -> Peer | None:
        """The client that says hello, if it was here before. Its id is its own secret, but does not stand for a
        token."""
        peer = self.clients.get(hello.client_id) if hello.client_id else None
        if peer is None or (peer.token_id, peer.scope) != (token_id, scope):
            return None
        return peer

    def leave(self, peer: Peer, reason: str) -> bool:
        """Its connection broke; whether it is waited for."""
        if not may_return(peer) or not self.holds(peer):
            self.forget(peer)
            return False
        grace = grace_of(peer.patience, self.heartbeat)
        log.info("a client is away", peer=peer.remote, reason=reason, grace=grace)
        count("connections_broken")
        peer.away_since = time.time()
        self.away[peer] = self.loop.call_later(grace, self.give_up, peer, f"it did not come back within {grace:g} s")
        return True

    def back(self, peer: Peer, hello: Hello) -> None:
        """It is here again, on the connection that it was given by now; to be called after the welcome."""
        timer = self.away.pop(peer, None)
        if timer is not None:
            timer.cancel()
        count("clients_returned")
        log.info("a client is back", peer=peer.remote, away=round(time.time() - (peer.away_since or time.time()), 1))
        peer.patience, peer.leaving, peer.away_since = hello.patience, "", 0.0
        peer.resume(hello.received)

    def give_up(self, peer: Peer, reason: str) -> None:
        """Harmless for one that is not away."""
        timer = self.away.pop(peer, None)
        if timer is None:
            return
        timer.cancel()
        self.forget(peer)
        log.info("a client is gone", peer=peer.remote, reason=reason)
        self.gone(peer, "its client went away")

    def forget(self, peer: Peer) -> None:
        """It would come as a new one."""
        if self.clients.get(peer.client_id) is peer:
            del self.clients[peer.client_id]

    def token_ended(self, has_ended: Callable[[str], bool]) -> None:
        """Who came in by a token that counts no more needs not come back."""
        for peer in [peer for peer in self.away if peer.token_id and has_ended(peer.token_id)]:
            self.give_up(peer, "its token counts no more")


class Returning:
    """What a client that came back has named so far; until it has `Settled`."""

    def __init__(self, pushes: Pushes | None) -> None:
        self.named: set[str] = set()
        self._answered: set[Key] = set()
        self._is_whole = pushes is not None and not pushes.trimmed
        for header, _ in pushes.frames if pushes is not None else ():
            self.answered(header)

    def answered(self, header: bytes) -> None:
        """A frame is on its way to the client; it may not have had it when it says again what it waits for."""
        self._answered |= _ended_in(header)

    def wanted(self, call: Any, call_id: str, items: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
        """Of inputs that it says again, those to be run: not what is under way, nor what it has just been told.
        What has ended and is on no list went lost with the connection, and is run once more."""
        self.named.add(call_id)
        wanted = []
        for idx, data in items:
            if (call_id, idx) in self._answered or (call is not None and idx in call.inputs):
                continue
            if call is not None and call.is_done(idx):
                call.reopen(idx)
            wanted.append((idx, data))
        return wanted

    def lacks_values(self, call: Any, items: list[tuple[int, Any]]) -> bool:
        """Whether generators it waits for have yielded what it will never get."""
        if self._is_whole or call is None:
            return False
        return any(call.inputs[idx].yielded for idx, _ in items if idx in call.inputs)
