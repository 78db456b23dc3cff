"""BRAIN: which nodes are believed to live: suspected, lost, back, by signs of life that are counted, not timed.

Synchronous and clock-free: `look` is called at each beat with how much has come of each agent, and gives what has
changed, with reasons. Beats are counted rather than seconds: if it was this process that stood still, what agents said
meanwhile is read before the next beat. The rules:

- A node of which nothing came for SUSPECT_AFTER beats, or whose connection ended, is `suspected`: it gets no further
  container, and all it has stays its own.
- After LOST_AFTER beats, or once its process is known to have ended, it is `lost`: what it ran is given to others.
- A node that is heard again is trusted again once it was heard for TRUST_AFTER beats in a row, and for twice as many
  for each time that it was lost before: so a link that comes and goes does not have work come and go with it.
- An agent that comes back before it was lost is the same node. One that comes back later is the same node too, but
  what it says of work that was given to others since counts no more: `dispatch` and `adoption` see to that.

Tested in `tests/unit/test_liveness.py`, and with dispatch under partitions made up from seeds by `squall.partitions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

NodeHealth = Literal["up", "suspected", "lost"]

SUSPECT_AFTER = 3
LOST_AFTER = 6
TRUST_AFTER = 2
TRUST_LIMIT = 16
"""Beats in a row after which any node is trusted again."""
AGENT_GIVES_UP_AFTER = 3
"""Beats without a word of the server after which an agent looks for it anew; to be less than LOST_AFTER."""
REMEMBERED_LIMIT = 1000
"""Lost agents that are remembered."""


class Change(NamedTuple):
    node_id: str
    health: NodeHealth
    reason: str


class Pulse:
    """One node's."""

    __slots__ = ("health", "in_row", "is_connected", "losses", "missed", "received")

    def __init__(self) -> None:
        self.health: NodeHealth = "up"
        self.is_connected = True
        self.received = -1
        """What had come of it at the last beat."""
        self.missed = 0
        self.in_row = 0
        self.losses = 0

    def needs(self) -> int:
        """Beats in a row in which it must be heard to be trusted again."""
        return int(min(TRUST_LIMIT, TRUST_AFTER << min(self.losses, 8)))


class Liveness:
    """See the module. `pulses` may be read, never changed, from outside."""

    def __init__(self) -> None:
        self.pulses: dict[str, Pulse] = {}

    def joined(self, node_id: str) -> NodeHealth:
        """It registered, for the first time or again; how it is looked at."""
        pulse = self.pulses.get(node_id)
        if pulse is None:
            self.pulses[node_id] = Pulse()
            self._forget_some()
            return "up"
        if pulse.health != "up":
            pulse.health = "suspected"
        pulse.is_connected, pulse.received, pulse.missed, pulse.in_row = True, -1, 0, 0
        return pulse.health

    def _forget_some(self) -> None:
        lost = [node_id for node_id, pulse in self.pulses.items() if pulse.health == "lost"]
        for node_id in lost[: max(0, len(lost) - REMEMBERED_LIMIT)]:
            del self.pulses[node_id]

    def broken(self, node_id: str, reason: str) -> list[Change]:
        """Its connection ended; it may come back on another."""
        pulse = self.pulses[node_id]
        pulse.is_connected = False
        if pulse.health != "up":
            return []
        pulse.missed = max(pulse.missed, SUSPECT_AFTER)
        return [self._become(node_id, "suspected", f"its connection ended: {reason}")]

    def ended(self, node_id: str, reason: str) -> list[Change]:
        """Its process is known to be gone, with all that it had."""
        pulse = self.pulses.pop(node_id, None)
        return [Change(node_id, "lost", reason)] if pulse is not None and pulse.health != "lost" else []

    def look(self, received: Mapping[str, int]) -> list[Change]:
        """A beat: how many pieces have come of each agent so far, over the connection that it has now."""
        found: list[Change] = []
        for node_id, pulse in self.pulses.items():
            if pulse.health == "lost":
                continue
            came = received.get(node_id, pulse.received)
            if pulse.is_connected and came != pulse.received:
                pulse.received, pulse.missed, pulse.in_row = came, 0, pulse.in_row + 1
                if pulse.health == "suspected" and pulse.in_row >= pulse.needs():
                    found.append(self._become(node_id, "up", f"it was heard for {pulse.in_row} beats"))
                continue
            pulse.missed, pulse.in_row = pulse.missed + 1, 0
            if pulse.missed >= LOST_AFTER:
                found.append(self._become(node_id, "lost", f"nothing was heard of it for {pulse.missed} beats"))
            elif pulse.missed >= SUSPECT_AFTER and pulse.health == "up":
                found.append(self._become(node_id, "suspected", f"nothing was heard of it for {pulse.missed} beats"))
        return found

    def _become(self, node_id: str, health: NodeHealth, reason: str) -> Change:
        pulse = self.pulses[node_id]
        pulse.health, pulse.in_row = health, 0
        if health == "lost":
            pulse.losses, pulse.is_connected = pulse.losses + 1, False
        return Change(node_id, health, reason)
