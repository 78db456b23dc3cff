"""Commands in running containers: bytes both ways, terminals, exit codes, and what ends them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from squall.protocol.messages import ExecData, ExecExit, StartExec
from tests.conftest import wait_until
from tests.integration import workload
from tests.integration.support import Kept, Wire, children_of, inits, is_alive, pid_of

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def container(shared_home: Path) -> Iterator[str]:
    with workload.app.run(output=Kept()):
        yield workload.whoami.remote()[0]


class Command:
    """An exec under way, over a connection of its own."""

    def __init__(self, container_id: str, *argv: str, pty: bool = False, rows: int = 24, cols: int = 80) -> None:
        self.wire = Wire()
        answer, _ = self.wire.ask(StartExec(container_id, list(argv), pty=pty, rows=rows, cols=cols))
        assert answer.TAG == "reply", answer
        self.exec_id = answer.data["exec_id"]
        self.out = {"stdout": bytearray(), "stderr": bytearray()}
        self.taken = 0
        """Bytes of its input that the command has taken."""
        self.exit: ExecExit | None = None

    def write(self, data: bytes, *, eof: bool = False) -> None:
        self.wire.send(ExecData(self.exec_id, "stdin", eof=eof), data)

    def read(self) -> None:
        message, data = self.wire.receive()
        if isinstance(message, ExecData) and message.stream == "stdin":
            self.taken += message.credit
        elif isinstance(message, ExecData):
            self.out[message.stream] += data
        elif isinstance(message, ExecExit):
            self.exit = message

    def read_until(self, text: bytes) -> None:
        while text not in self.out["stdout"]:
            assert self.exit is None, self.out
            self.read()

    def ended(self) -> tuple[int, bytes, bytes]:
        while self.exit is None:
            self.read()
        self.wire.sock.close()
        return self.exit.code, bytes(self.out["stdout"]), bytes(self.out["stderr"])

    def resize(self, rows: int, cols: int) -> None:
        self.wire.send(ExecData(self.exec_id, "resize", rows=rows, cols=cols))


def test_a_commands_streams_and_exit_code_come_apart(container: str) -> None:
    assert Command(container, "sh", "-c", "echo out; echo err >&2; exit 3").ended() == (3, b"out\n", b"err\n")


def test_a_command_reads_its_stdin_to_the_end(container: str) -> None:
    command = Command(container, "wc", "-c")
    command.write(b"x" * 100_000)
    command.write(b"y" * 23, eof=True)
    assert command.ended() == (0, b"100023\n", b"")


def test_who_sends_input_hears_how_much_was_taken(container: str) -> None:
    command = Command(container, "sh", "-c", "read line; wc -c")
    command.write(b"x" * 300_000)
    while command.taken < 4096:
        command.read()
    assert command.taken <= 300_000
    command.write(b"\n" + b"y" * 500_000, eof=True)
    assert command.ended() == (0, b"500000\n", b"")
    assert command.taken == 800_001


def test_input_beyond_what_may_wait_ends_the_command_instead_of_being_lost(container: str) -> None:
    command = Command(container, "sleep", "100")
    command.write(bytes(5 << 20))
    assert command.ended()[0] == 137
    assert command.exit is not None
    assert command.exit.message == "its input came faster than it was read"


def test_a_megabyte_passes_through_a_command_both_ways(container: str) -> None:
    command = Command(container, "cat")
    data = bytes(range(256)) * 4096
    command.write(data, eof=True)
    assert command.ended() == (0, data, b"")


def test_a_command_that_is_not_there_says_so_with_127(container: str) -> None:
    code, _, said = Command(container, "no-such-command").ended()
    assert code == 127
    assert said == b"exec `no-such-command` in `/root`: No such file or directory\n"


def test_a_command_killed_by_a_signal_has_its_number(container: str) -> None:
    assert Command(container, "sh", "-c", "kill -9 $$").ended()[0] == 128 + signal.SIGKILL


def test_a_command_runs_in_the_container_and_without_privileges(container: str) -> None:
    code, out, _ = Command(container, "sh", "-c", "hostname; grep CapEff /proc/self/status").ended()
    assert (code, out.decode().split()) == (0, [container, "CapEff:", "0" * 16])


def test_a_terminal_has_its_size_and_follows_a_resize(container: str) -> None:
    command = Command(container, "sh", "-c", "stty size; read x; stty size", pty=True, rows=33, cols=101)
    command.read_until(b"33 101")
    command.resize(50, 120)
    command.write(b"\n")
    command.read_until(b"50 120")
    assert command.ended()[0] == 0


def test_a_terminals_interrupt_key_ends_the_command(container: str) -> None:
    script = "trap 'echo caught; exit 9' INT; echo ready; while :; do sleep 0.1; done"
    command = Command(container, "sh", "-c", script, pty=True)
    command.read_until(b"ready")
    command.write(b"\x03")
    assert command.ended()[0] == 9


@pytest.mark.parametrize("size", [(-1, -1), (1 << 40, 0), (70_000, 70_000)])
def test_a_senseless_terminal_size_harms_nobody(container: str, size: tuple[int, int], shared_home: Path) -> None:
    agent = pid_of(shared_home, "node")
    command = Command(container, "true", pty=True, rows=size[0], cols=size[1])
    command.resize(*size)
    assert command.ended()[0] == 0
    assert pid_of(shared_home, "node") == agent


def test_a_command_is_killed_with_what_it_started_when_its_client_goes(container: str, shared_home: Path) -> None:
    had = set(commands(shared_home))
    command = Command(container, "sh", "-c", "sleep 601 & echo on; sleep 602")
    command.read_until(b"on")
    wait_until(lambda: len(commands(shared_home) - had) >= 1, "the command is there")
    started = commands(shared_home) - had
    started |= {child for pid in started for child in children_of(pid)}
    assert len(started) == 3
    command.wire.sock.close()
    wait_until(lambda: not any(is_alive(pid) for pid in started), "the command and its children are gone")


def commands(home: Path) -> set[int]:
    """Pids of the agent's children that run a shell."""
    found = set()
    for pid in children_of(pid_of(home, "node")):
        try:
            if Path(f"/proc/{pid}/comm").read_text() == "sh\n":
                found.add(pid)
        except OSError:
            continue
    return found


def test_output_that_nobody_reads_makes_the_command_wait_and_nothing_else(container: str, shared_home: Path) -> None:
    command = Command(container, "sh", "-c", "yes | head -c 30000000; sleep 600")
    assert Command(container, "echo", "quick").ended() == (0, b"quick\n", b"")
    assert workload.square.remote(5) == 25
    while len(command.out["stdout"]) < 30_000_000:
        command.read()
    command.wire.sock.close()


@pytest.mark.parametrize("argv", [[], ["a\0b"], [""]])
def test_a_senseless_command_is_refused(container: str, argv: list[str]) -> None:
    with Wire() as wire:
        answer, _ = wire.ask(StartExec(container, argv))
    assert answer.code == "invalid"


def test_a_container_that_is_not_there_is_not_found(container: str) -> None:
    with Wire() as wire:
        answer, _ = wire.ask(StartExec("co-0000000000000000", ["true"]))
    assert (answer.code, answer.message) == ("not_found", "no running container `co-0000000000000000`")


def test_an_exec_belongs_to_the_connection_that_made_it(container: str) -> None:
    command = Command(container, "cat")
    with Wire() as other:
        other.send(ExecData(command.exec_id, "stdin"), b"not mine\n")
        other.send(ExecData(command.exec_id, "kill"))
        assert other.ask(StartExec("co-0000000000000000", ["true"]))[0].code == "not_found"
    command.write(b"mine\n", eof=True)
    assert command.ended() == (0, b"mine\n", b"")


def test_the_container_goes_on_after_all_this(container: str, shared_home: Path) -> None:
    assert container in inits(shared_home)
    assert workload.whoami.remote()[0] == container
