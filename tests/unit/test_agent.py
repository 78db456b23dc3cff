"""The agent against a runtime that fails in ways nobody foresaw: the server hears of each container's end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from squall import config
from squall.node.agent import Agent, Held
from squall.node.runtime import Container, ContainerIO, Exit, Runtime
from squall.protocol.messages import (
    BuildImage,
    ContainerEvent,
    ContainerSpec,
    ImageSpec,
    ImageStep,
    Message,
    StartContainer,
    StopContainer,
    encode_header,
)
from squall.protocol.requests import BuildDone, Pruned, VerifyImage
from squall.protocol.transport import FrameStream


class Sent:
    """A stream to the server that keeps what is sent."""

    paused = False
    closing = ""

    def __init__(self) -> None:
        self.events: list[ContainerEvent] = []
        self.resumed = asyncio.Event()

    async def drained(self) -> None:
        await self.resumed.wait()

    def send(self, message: Message, payload: bytes = b"") -> None:
        if isinstance(message, ContainerEvent):
            self.events.append(message)


class Standing(Container):
    """A container whose end cannot be told."""

    def __init__(self, container_id: str) -> None:
        self.container_id, self.pid, self.steps = container_id, 1, {}

    async def wait(self) -> Exit:
        raise ValueError("invalid wait status: 65535")

    def signal(self, signum: int) -> None: ...

    def kill(self, reason: str) -> None: ...

    def usage(self) -> dict[str, float]:
        return {}

    async def exec(self, argv: Any, **_: Any) -> int:
        raise AssertionError


class Broken(Runtime):
    name = "broken"

    def __init__(self, make: Callable[[str], Container]) -> None:
        self.make = make

    @classmethod
    def problems(cls) -> list[str]:
        return []

    def warnings(self) -> list[str]:
        return []

    async def start(self) -> None: ...

    async def create(
        self, spec: ContainerSpec, io: ContainerIO, source: Path | None, shown: Sequence[tuple[Path, str]] = ()
    ) -> Container:
        return self.make(spec.container_id)

    async def close(self) -> None: ...


def with_agent(tmp_path: Path, runtime: Runtime, body: Callable[[Agent, Sent], Awaitable[None]]) -> None:
    async def main() -> None:
        agent = Agent(config.load({"SQUALL_HOME": str(tmp_path)}), runtime)
        sent = Sent()
        agent.stream = cast(FrameStream, sent)
        agent.connected.set()
        agent.handoff, server = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.closing(agent.handoff), server:
            await asyncio.wait_for(body(agent, sent), 10)

    asyncio.run(main())


@pytest.mark.parametrize("error", [RecursionError("too deep"), KeyError("size"), OSError(24, "Too many open files")])
def test_a_container_that_cannot_be_made_is_reported_whatever_went_wrong(tmp_path: Path, error: Exception) -> None:
    def make(container_id: str) -> Container:
        raise error

    async def body(agent: Agent, sent: Sent) -> None:
        await agent._start(StartContainer(ContainerSpec("co-1")))
        assert [event.state for event in sent.events] == ["exited"]
        assert sent.events[0].reason.startswith("could not be made: ")
        assert not agent.held

    with_agent(tmp_path, Broken(make), body)


def test_pipes_that_somebody_keeps_open_are_closed_when_their_container_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    copies: list[int] = []

    class Keeping(Broken):
        async def create(
            self, spec: ContainerSpec, io: ContainerIO, source: Path | None, shown: Sequence[tuple[Path, str]] = ()
        ) -> Container:
            copies.extend(map(os.dup, (io.stdout, io.stderr)))
            os.write(copies[0], b"never read")
            return Standing(spec.container_id)

    async def body(agent: Agent, sent: Sent) -> None:
        before = os.listdir("/dev/fd")
        monkeypatch.setattr("squall.node.agent.DRAIN_SECONDS", 0.01)
        sent.paused = True
        await agent._start(StartContainer(ContainerSpec("co-1")))
        assert [event.state for event in sent.events] == ["starting", "exited"]
        assert len(os.listdir("/dev/fd")) == len(before) + len(copies)
        sent.resumed.set()
        await asyncio.gather(*agent._tasks)
        for copy in copies:
            with pytest.raises(BrokenPipeError):
                os.write(copy, b"x")
            os.close(copy)

    with_agent(tmp_path, Keeping(Standing), body)
    assert "lost" in (said := capfd.readouterr().err)
    assert "bytes=10" in said


def test_a_container_that_floods_waits_and_none_of_its_output_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("squall.node.agent.OUTPUT_WINDOW_BYTES", 100_000)
    monkeypatch.setattr("squall.node.agent.OUTPUT_WINDOW_S", 0.2)

    async def body(agent: Agent, sent: Sent) -> None:
        held, came = Held(ContainerSpec("co-1")), list[int]()
        monkeypatch.setattr(sent, "send", lambda message, payload: came.append(len(payload)))
        out, into = os.pipe()
        err, other = os.pipe()
        os.set_blocking(into, False)
        agent._read_output(held, "stdout", out)
        agent._read_output(held, "stderr", err)
        written, waits = 0, 0
        while written < 1_000_000:
            try:
                written += os.write(into, b"x" * 65_536)
            except BlockingIOError:
                waits += 1
                await asyncio.sleep(0.01)
            await asyncio.sleep(0)
        os.close(into)
        os.close(other)
        await held.drained.wait()
        assert sum(came) == written
        assert waits > 3, "the pipe was left full"

    with_agent(tmp_path, Broken(Standing), body)


def test_an_end_that_no_server_may_have_written_down_is_waited_with_as_a_container_is(tmp_path: Path) -> None:
    async def body(agent: Agent, sent: Sent) -> None:
        agent._lost_at = agent.loop.time()
        assert agent._grace() < agent.config.reattach_grace
        held = Held(ContainerSpec("co-1"))
        agent._report_exit(held, 0, "done")
        agent._lost_at = agent.loop.time()
        assert agent._grace() == agent.config.reattach_grace
        agent._lost_at += 60.0
        assert agent._grace() < agent.config.reattach_grace, "it is written by then"

    with_agent(tmp_path, Broken(Standing), body)


def test_a_message_the_agent_stumbles_over_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[str] = []

    def stop(message: StopContainer) -> None:
        stopped.append(message.container_id)
        raise OverflowError("timestamp too large")

    async def body(agent: Agent, sent: Sent) -> None:
        monkeypatch.setattr(agent, "_stop", stop)
        for container_id in ("co-1", "co-2"):
            agent._on_frame(agent.stream, encode_header(StopContainer(container_id, 1e300)), b"")
        assert stopped == ["co-1", "co-2"]

    with_agent(tmp_path, Broken(Standing), body)


def test_a_container_whose_end_cannot_be_told_is_reported_as_gone(tmp_path: Path) -> None:
    async def body(agent: Agent, sent: Sent) -> None:
        await agent._start(StartContainer(ContainerSpec("co-1")))
        assert [event.state for event in sent.events] == ["starting", "exited"]
        assert not agent.held

    with_agent(tmp_path, Broken(Standing), body)


def test_a_build_that_fails_in_a_way_nobody_foresaw_is_told_of(tmp_path: Path) -> None:
    """Its caller waits without an end for one that is not."""

    class Broken:
        async def ensure(self, image: ImageSpec, secrets: object) -> list[object]:
            raise RecursionError("too deep")

        async def verify(self, image: ImageSpec) -> list[object]:
            raise RecursionError("too deep")

    said: list[Message] = []
    agent: Any = Agent.__new__(Agent)
    agent.builder, agent.runtime = Broken(), cast(Any, None)
    agent.stream = cast(Any, Told(said))
    image = ImageSpec("layers", [ImageStep("debian", {"suite": "bookworm"})])
    asyncio.run(agent._build(BuildImage(image)))
    asyncio.run(agent._look_after(VerifyImage(image)))
    assert isinstance(said[0], BuildDone)
    assert "too deep" in said[0].message
    assert isinstance(said[1], Pruned)


class Told:
    def __init__(self, said: list[Message]) -> None:
        self.said = said

    def send(self, message: Message, payload: bytes = b"") -> None:
        self.said.append(message)
