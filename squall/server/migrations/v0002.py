"""From the first release to the one with deployed apps, durable calls, schedules and tokens.

Not released yet: add to it what you add to `tables.py`, a function for each part of the server.
"""

from __future__ import annotations


def upgrade() -> None:
    """The parts, each in a function of its own, in an order that leaves every row valid."""
