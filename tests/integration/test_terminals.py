"""The server's side of terminals: who may have one, when, and what a container's or another client's word is worth."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from squall._session import prepare
from squall.client import Client
from squall.exception import InvalidError
from squall.protocol.messages import (
    CreateApp,
    ExecData,
    ExecExit,
    InputItem,
    Interact,
    Message,
    Outputs,
    StopApp,
    Submit,
)
from squall.protocol.payload import pack_call, unpack
from tests.conftest import wait_until
from tests.integration import workload
from tests.integration.support import Kept, Wire, containers_of, rows

pytestmark = pytest.mark.root


@pytest.fixture(scope="module", autouse=True)
def server(shared_home: Path) -> Path:
    Client.current()
    return shared_home


class Program(Wire):
    """A program that runs the workload in a terminal, and types into it."""

    def __init__(self, terminal: str = "xterm") -> None:
        super().__init__()
        prepared = prepare(workload.app)
        for data in prepared.blobs.values():
            Client.current().put_blob(data)
        answer, _ = self.ask(CreateApp("talks", prepared.specs, terminal=terminal, follow=False))
        assert answer.TAG == "reply", answer
        self.app_id, self.functions = answer.data["app_id"], answer.data["functions"]
        self.screen = b""
        self.result = b""

    def __enter__(self) -> Program:
        return self

    def call(self, call_id: str, *args: Any, function: str = "talk") -> None:
        data = pack_call(args, {}, function)
        self.send(Submit(call_id, self.functions[function], [InputItem(0, len(data))]), data)

    def next(self, *kinds: type[Message]) -> Any:
        """The next message of these kinds; what is written meanwhile goes to the screen."""
        while True:
            message, data = self.receive()
            if isinstance(message, ExecData) and message.stream == "stdout":
                self.screen += data
            if isinstance(message, Outputs):
                self.result = data
            if isinstance(message, kinds):
                return message

    def lend(self, message: Interact) -> str:
        self.send(ExecData(message.exec_id, "resize", rows=30, cols=90))
        return message.exec_id

    def read_until(self, text: bytes) -> None:
        while text not in self.screen:
            self.next(ExecData)


@pytest.fixture
def program() -> Iterator[Program]:
    with Program() as program:
        yield program
    wait_until(lambda: not rows("containers"), "its containers are gone")


def test_a_container_asks_for_the_terminal_and_gives_it_back(program: Program) -> None:
    program.call("fc-talk1", "name? ")
    asked = program.next(Interact)
    assert (asked.app_id, asked.function) == (program.app_id, "talk")
    assert asked.container_id.startswith("co-")
    exec_id = program.lend(asked)
    program.read_until(b"name? ")
    program.send(ExecData(exec_id, "stdin"), b"Ann\n")
    assert program.next(ExecExit).code == 0
    assert unpack(program.next(Outputs) and program.result, "it") == "Ann"


def test_keys_that_follow_at_once_are_not_lost(program: Program) -> None:
    program.call("fc-talk2", "name? ")
    exec_id = program.lend(program.next(Interact))
    program.send(ExecData(exec_id, "stdin"), b"early\n")
    assert program.next(Outputs).items[0].status == "ok"
    assert unpack(program.result, "it") == "early"


def test_a_second_container_waits_and_is_told_of(program: Program) -> None:
    program.call("fc-talk3", "one? ")
    first = program.next(Interact)
    exec_id = program.lend(first)
    program.call("fc-talk4", "two? ")
    waiting = program.next(Interact)
    assert (waiting.exec_id, waiting.container_id == first.container_id) == ("", False)
    program.send(ExecData(exec_id, "stdin"), b"1\n")
    second = program.next(Interact)
    assert (second.exec_id != exec_id, second.container_id) == (True, waiting.container_id)
    program.send(ExecData(program.lend(second), "stdin"), b"2\n")
    program.next(ExecExit)


def test_what_another_client_types_is_dropped(program: Program) -> None:
    program.call("fc-talk5", "name? ")
    exec_id = program.lend(program.next(Interact))
    program.read_until(b"name? ")
    with Wire() as other:
        other.send(ExecData(exec_id, "stdin"), b"not mine\n")
        other.send(ExecData(exec_id, "kill"))
        assert other.ask(StopApp("ap-0"))[0].code == "not_found"
    program.send(ExecData(exec_id, "stdin"), b"mine\n")
    program.next(Outputs)
    assert unpack(program.result, "it") == "mine"


def test_a_killed_container_gives_the_terminal_to_the_next(program: Program) -> None:
    program.call("fc-talk6", "one? ")
    exec_id = program.lend(program.next(Interact))
    program.call("fc-talk7", "two? ")
    waiting = program.next(Interact).container_id
    program.send(ExecData(exec_id, "kill"))
    assert program.next(ExecExit).message == "its container ended"
    second = program.next(Interact)
    assert second.container_id == waiting
    program.send(ExecData(program.lend(second), "stdin"), b"2\n")
    while program.next(Outputs).items[0].call_id != "fc-talk7":
        continue
    assert unpack(program.result, "it") == "2"


def test_a_container_ends_with_the_program_whose_terminal_it_has() -> None:
    with Program() as program:
        program.call("fc-talk8", "name? ")
        program.lend(program.next(Interact))
        program.read_until(b"name? ")
    wait_until(lambda: not containers_of("talk"), "the container has ended with its program")


def test_a_terminal_is_refused_where_the_app_has_none() -> None:
    with workload.app.run(output=Kept()), pytest.raises(InvalidError, match="was run without a terminal"):
        workload.talk.remote("name? ")


def test_a_container_that_asks_behind_the_sdks_back_is_refused_too() -> None:
    with workload.app.run(output=Kept()), pytest.raises(InvalidError, match="was run without a terminal"):
        workload.demand_terminal.remote(1)


def test_a_container_that_asks_twice_is_refused(program: Program) -> None:
    program.call("fc-talk9", 2, function="demand_terminal")
    program.next(Interact)
    assert program.next(Outputs).items[0].status == "error"
    assert b"has asked for the terminal already" in program.result
