"""What is said when a server is there again whose predecessor was killed: containers go on, and say what they hold.

The agent registers with the containers it has and hands over a new socket for each. A runner then sends its latest
results again, as it cannot know which of them were lost with the old server, and says what it runs. Part of the
contract in `messages`; tested in `tests/integration/test_reattach.py`.
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


@dataclass(eq=False, repr=False)
class RegisterAgain(Register):
    """`Register` of an agent whose server was lost."""

    TAG = "register_again"
    NESTED = {"containers": HeldContainer}
    containers: list[HeldContainer] = field(default_factory=list)


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
