"""What is said when a connection is made again: by a client that comes back, and by containers of a killed server.

A client that comes back to the server it had says again what it waits for, and last that this was all (`Settled`). One
that will not come back says so (`Leaving`): else a server keeps the app of a client elsewhere for some time.

Where a server was killed, containers go on, and say to the next one what they hold. The agent registers with the
containers it has and hands over a new socket for each. A runner then sends its latest results again, as it cannot know
which of them were lost with the old server, and says what it runs. Part of the contract in `messages`; tested in
`tests/integration/test_network.py` and `test_reattach.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from squall.protocol.messages import ContainerSpec, Message, Outputs, Register


@dataclass
class HeldContainer:
    """A container that a node has. Which function it was made for stands in its spec."""

    NESTED: ClassVar[dict[str, type]] = {"spec": ContainerSpec}

    spec: ContainerSpec
    stands: bool = True
    """It passed the host's check; else it is being made, and its `ContainerEvent` follows."""
    requested_at: float = 0.0


@dataclass
class EndedContainer:
    """A container that ended while there was no server, or so shortly before that the old one may not have written it
    down. `usage` as in `ContainerEvent`."""

    NESTED: ClassVar[dict[str, type]] = {"spec": ContainerSpec}

    spec: ContainerSpec
    requested_at: float = 0.0
    started_at: float = 0.0
    """0: it never stood."""
    stopped_at: float = 0.0
    exit_code: int = -1
    reason: str = ""
    usage: dict[str, float] = field(default_factory=dict)


@dataclass(eq=False, repr=False)
class RegisterAgain(Register):
    """`Register` of an agent whose server was lost."""

    TAG = "register_again"
    NESTED = {"containers": HeldContainer, "ended": EndedContainer}
    containers: list[HeldContainer] = field(default_factory=list)
    ended: list[EndedContainer] = field(default_factory=list)


@dataclass
class HeldInput:
    """An input that a runner has and has not answered. `is_broken`: it streams its values, some of which are lost with
    the connection, so it is being cancelled and only its slot is meant."""

    call_id: str
    idx: int
    attempt: int = 0
    is_broken: bool = False


@dataclass(eq=False, repr=False)
class RunnerBack(Message):
    """A runner is ready to go on, on a new socket: whether it is `loaded`, and what it holds. `OutputsAgain` precede
    it."""

    TAG = "runner_back"
    NESTED = {"inputs": HeldInput}
    loaded: bool = False
    inputs: list[HeldInput] = field(default_factory=list)


@dataclass(eq=False, repr=False)
class OutputsAgain(Outputs):
    """Results that were sent to an earlier server, which may have recorded them or not."""

    TAG = "outputs_again"


@dataclass(eq=False, repr=False)
class Leaving(Message):
    """A client gives its connection up. Unless it `returns`, its apps end at once and not only after a grace."""

    TAG = "leaving"
    IS_FLEETING = True
    returns: bool = False


@dataclass(eq=False, repr=False)
class Settled(Message):
    """A client that came back has named all calls that it waits for; the others are over."""

    TAG = "settled"
    IS_FLEETING = True
