"""How a runner outlives its server: what it holds, what it said last, and how it goes on with the next one.

A server may be killed with results of this runner read and not recorded. So the latest of them are kept, as many as the
server can at most not have heard of and some more, and said again to the next server, which ignores those it knows. In
the moment of coming back each input is either held or answered, never neither: both change where the connection's order
is made (`note` of `Link.send_raw`). A generator cannot go on, as nobody knows which of its values arrived: it is
cancelled. Tested in `tests/unit/test_returning.py` and `tests/integration/test_reattach.py`.
"""

from __future__ import annotations

import os
import select
import socket
from collections import deque
from collections.abc import Callable, Iterable

from squall.protocol.frames import Packed
from squall.protocol.messages import Message, OutputItem, RunItem
from squall.protocol.resumption import HeldInput, OutputsAgain, RunnerBack

RECENT_LIMIT = 64
"""Results that are kept at least; the server can lack one for each slot, and what it had may not be on its disk yet."""
RECENT_BYTES = 1 << 20
"""Beyond this only those for which there is a slot are kept."""
LOOK_S = 0.5
CLOEXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
"""Commands that user code starts have no business with it, not even for the moment before it is marked."""

Key = tuple[str, int]


class Ledger:
    """What the server is owed."""

    def __init__(self) -> None:
        self.held: dict[Key, RunItem] = {}
        """Taken and not answered."""
        self.broken: set[Key] = set()
        """Of these, the generators whose connection was lost."""
        self.is_loaded = False
        self.slots = 1
        self._recent: deque[tuple[OutputItem, Packed]] = deque()
        self._recent_bytes = 0

    def give(self, items: Iterable[RunItem]) -> None:
        for item in items:
            self.held[item.call_id, item.idx] = item

    def answer(self, out: OutputItem, data: Packed) -> None:
        """An input has ended with this. To be called where the order of the connection is made."""
        key = (out.call_id, out.idx)
        self.held.pop(key, None)
        if key in self.broken:
            self.broken.discard(key)
            return
        recent = self._recent
        recent.append((out, data))
        self._recent_bytes += len(data)
        while len(recent) > self.slots and (len(recent) > RECENT_LIMIT or self._recent_bytes > RECENT_BYTES):
            self._recent_bytes -= len(recent.popleft()[1])

    def again(self) -> list[tuple[Message, Packed]]:
        """The first words to another server: results before all else, as it gives out inputs once it has the rest."""
        held = [HeldInput(*key, item.attempt, key in self.broken) for key, item in list(self.held.items())]
        words: list[tuple[Message, Packed]] = [(OutputsAgain([out]), data) for out, data in self._recent]
        words.append((RunnerBack(self.is_loaded, held), b""))
        return words


def await_socket(control: socket.socket, is_over: Callable[[], bool]) -> socket.socket | None:
    """Wait for another socket to a server, for as long as the agent is there, which sets the deadline and ends this
    container when it has passed. None when there will be none."""
    readable = select.poll()
    readable.register(control.fileno(), select.POLLIN)
    while not is_over():
        if not readable.poll(LOOK_S * 1000):
            continue
        try:
            data, fds, _, _ = socket.recv_fds(control, 16, 1, CLOEXEC)
        except OSError:
            return None
        if fds:
            os.set_inheritable(fds[0], False)
            return socket.socket(fileno=fds[0])
        if not data:
            return None
    return None
