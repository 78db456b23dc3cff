"""A server on the same machine that says nothing: noticed by whoever reads the connection, without a thread of its own.

The kernel closes a local connection with the process at its other end, so silence means that the server was stopped or
hangs. It says something every `interval` seconds, a `Ping` if nothing else; who waits for longer counts. Looks are
counted, not seconds: if it was this process that was stopped, what came meanwhile is read first. Tested in
`tests/faults/test_stopped.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from squall.protocol.transport import Link

BEATS_MISSED = 3
FOR_EVER_S = 3600.0


class Silence:
    """Of one `Link`. Until `interval` is set nothing is missed."""

    __slots__ = ("_missed", "_seen", "interval")

    def __init__(self) -> None:
        self.interval = 0.0
        self._missed = 0
        self._seen = -1

    @property
    def wait_ms(self) -> float | None:
        """How long to wait for the server, who leads the reading, before `missed`."""
        return self.interval * 1000 or None

    def missed(self, link: Link) -> dict[Any, Any]:
        """Nothing came for a whole interval. Gives a link up that is silent for too long, and tells the server, which
        will read it when it goes on, that its client is about to come back. Nothing is ready, then."""
        if self.interval:
            self._missed = self._missed + 1 if self._seen == link.received else 1
            self._seen = link.received
            if self._missed >= BEATS_MISSED:
                from squall.protocol.resumption import Leaving  # which hardly any program needs

                self._missed = 0
                link.send_nowait(Leaving(returns=True))
                link.abort(f"nothing was heard of the server for {BEATS_MISSED * self.interval:g} s")
        return {}

    def look(self, link: Link, was_parked: bool) -> float:
        """A wait was in vain, which was a whole interval where the reader `was_parked`: how long the next one is."""
        if was_parked:
            self.missed(link)
        return self.interval or FOR_EVER_S
