"""`squall run -i` as a user meets it: debuggers and prompts in a container, on a real terminal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from squall.client import Client
from tests.conftest import wait_until
from tests.integration.conftest import own_home, swap_client
from tests.integration.support import children_of, inits, pid_of, rows

pytestmark = pytest.mark.root

RUN = [sys.executable, "-m", "squall.cli", "run"]
SECONDS = 60.0

SCRIPT = """
import asyncio, os, sys, time
import squall
app = squall.App("talks")

@app.function(timeout=2)
def stops(x: int):
    y = x + 1
    breakpoint()
    z = y * 2
    return z

@app.function(timeout=2)
def asks():
    print("before")
    squall.interact()
    name = input("name? ")
    print("size", *os.get_terminal_size(), os.ttyname(0) == os.ttyname(1), os.environ["TERM"])
    return f"hello {name}"

@app.function()
def loops():
    squall.interact()
    print("looping")
    try:
        while True: time.sleep(0.05)
    except KeyboardInterrupt:
        return "interrupted"

@app.function()
def hangs():
    squall.interact()
    print("hanging", flush=True)
    time.sleep(0.2)  # what is printed leaves by a thread
    sum(range(10 ** 12))

@app.function()
async def waits():
    breakpoint()
    await asyncio.sleep(0)
    return "async done"

@app.function(max_containers=3)
def turn(n: int):
    squall.interact()
    word = input(f"turn of {n}? ")
    return word

@app.function(env={"PYTHONBREAKPOINT": "0"})
def passes():
    breakpoint()
    return "passed"

@app.cls()
class Entered:
    @squall.enter()
    def load(self):
        squall.interact()
        self.word = input("word? ")
    @squall.method()
    def say(self): return f"the word is {self.word}"

@app.function()
@squall.concurrent(max_inputs=2)
def threads(n: int):
    squall.interact()
    return input("thread? ")

@app.local_entrypoint()
def turns():
    print("all", sorted(turn.map([1, 2])))

@app.local_entrypoint()
def here():
    print(asks.local())

@app.local_entrypoint()
def twice():
    print("first", asks.remote())
    print("second", asks.remote(), input("mine? "))
"""


@pytest.fixture(scope="module", autouse=True)
def home() -> Iterator[Path]:
    with own_home() as path:
        yield path


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("talks") / "talks.py"
    path.write_text(SCRIPT)
    return path


class Terminal:
    """A `squall run` on a terminal of its own."""

    def __init__(self, *words: object, rows: int = 31, columns: int = 97) -> None:
        self.ours, theirs = pty.openpty()
        self.resize(rows, columns)
        env = {**os.environ, "TERM": "xterm"}
        self.process = subprocess.Popen(
            [*RUN, *map(str, words)], stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True
        )
        os.close(theirs)
        os.set_blocking(self.ours, False)
        self.text = ""

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def expect(self, text: str, seconds: float = 20) -> None:
        wait_until(lambda: text in self.read(), lambda: f"it shows {text!r}: {self.text!r}", seconds)
        self.text = self.text[self.text.index(text) + len(text) :]

    def read(self) -> str:
        with contextlib.suppress(OSError):  # nothing there, or the other end is closed
            self.text += os.read(self.ours, 65536).decode(errors="replace")
        return self.text

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def is_raw(self) -> bool:
        return not termios.tcgetattr(self.ours)[3] & termios.ICANON

    def ends(self, code: int) -> None:
        wait_until(lambda: self.read() is not None and self.process.poll() is not None, lambda: self.text, SECONDS)
        self.read()
        assert self.process.returncode == code, self.text

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.ours)


def test_breakpoint_opens_a_debugger_in_the_users_frame(script: Path) -> None:
    with Terminal("-i", f"{script}::stops", "--x", 20) as terminal:
        terminal.expect("z = y * 2")
        terminal.expect("(Pdb) ")
        terminal.type("p y, x\n")
        terminal.expect("(21, 20)")
        terminal.type("y = 50\n")
        terminal.type("c\n")
        terminal.expect("\n100\r\n")
        terminal.ends(0)
        assert not terminal.is_raw()


def test_stepping_out_of_the_function_ends_it(script: Path) -> None:
    with Terminal("-i", f"{script}::stops", "--x", 20) as terminal:
        for _ in range(3):
            terminal.expect("(Pdb) ")
            terminal.type("n\n")
        terminal.expect("\n42\r\n")
        terminal.ends(0)


def test_quitting_the_debugger_fails_the_call_and_nothing_else(script: Path) -> None:
    with Terminal("-i", f"{script}::stops", "--x", 20) as terminal:
        terminal.expect("(Pdb) ")
        terminal.type("q\n")
        terminal.expect("BdbQuit")
        terminal.ends(1)


def test_input_has_the_terminal_with_its_size_and_no_timeout_ends_it(script: Path) -> None:
    with Terminal("-i", f"{script}::asks") as terminal:
        terminal.expect("before")
        terminal.expect("name? ")
        (row,) = rows("containers", "talks")
        with pytest.raises(pytest.fail.Exception):  # its timeout is 2 s
            wait_until(lambda: not rows("containers", "talks"), "it is killed", 3)
        terminal.resize(44, 101)
        terminal.type("Ann\n")
        terminal.expect("size 101 44 True xterm")
        terminal.expect("hello Ann")
        terminal.ends(0)
        assert row["state"] == "ready"


def test_interrupt_key_goes_to_the_container(script: Path) -> None:
    with Terminal("-i", f"{script}::loops") as terminal:
        terminal.expect("looping")
        terminal.type("\x03")
        terminal.expect("interrupted")
        terminal.ends(0)


def is_busy(home: Path, container_id: str) -> bool:
    """Whether the container's runner has computed for a while."""
    (runner,) = children_of(inits(home)[container_id])
    return int(Path(f"/proc/{runner}/stat").read_text().rpartition(")")[2].split()[11]) > 50  # ticks of 10 ms


def test_quit_key_ends_what_waits(script: Path) -> None:
    with Terminal("-i", f"{script}::loops") as terminal:
        for _ in range(2):  # a container that died of itself is given one spare try
            terminal.expect("looping")
            terminal.type("\x1c")
        terminal.expect("SIGQUIT")
        terminal.ends(1)


def test_quit_key_ends_what_waits_also_of_a_server_that_was_started_in_the_background(script: Path) -> None:
    """Where a shell without job control starts it, it ignores the key itself."""
    before = signal.signal(signal.SIGQUIT, signal.SIG_IGN)
    try:
        with own_home():
            Client.current()  # starts it
            signal.signal(signal.SIGQUIT, before)
            test_quit_key_ends_what_waits(script)
    finally:
        signal.signal(signal.SIGQUIT, before)


def test_quit_key_kills_what_listens_to_nothing(script: Path, home: Path) -> None:
    with Terminal("-i", f"{script}::hangs") as terminal:
        terminal.expect("hanging")
        wait_until(lambda: is_busy(home, rows("containers", "talks")[0]["container_id"]), "it computes")
        terminal.type("\x1c")
        terminal.type("\x1c")
        terminal.expect("killed from the terminal")
        terminal.ends(1)
        assert not terminal.is_raw()


def test_async_function_is_debugged(script: Path) -> None:
    with Terminal("-i", f"{script}::waits") as terminal:
        terminal.expect("await asyncio.sleep(0)")
        terminal.expect("(Pdb) ")
        terminal.type("c\n")
        terminal.expect("async done")
        terminal.ends(0)


def test_one_container_has_the_terminal_and_others_wait(script: Path) -> None:
    with Terminal("-i", f"{script}::turns") as terminal:
        wait_until(lambda: "waits until this terminal is free" in terminal.read(), lambda: terminal.text)
        wait_until(lambda: "turn of " in terminal.read(), lambda: terminal.text)  # whichever of the two came first
        terminal.text = ""
        terminal.type("a\n")
        terminal.expect("turn of ")
        terminal.type("b\n")
        terminal.expect("all ['a', 'b']")
        terminal.ends(0)


def test_enter_hook_has_the_terminal(script: Path) -> None:
    with Terminal("-i", f"{script}::Entered.say") as terminal:
        terminal.expect("word? ")
        terminal.type("fish\n")
        terminal.expect("the word is fish")
        terminal.ends(0)


def test_function_with_several_inputs_at_a_time_has_the_terminal(script: Path) -> None:
    with Terminal("-i", f"{script}::threads", "--n", 1) as terminal:
        terminal.expect("thread? ")
        terminal.type("yes\n")
        terminal.expect("yes\r\nyes\r\n")
        terminal.ends(0)


def test_program_has_its_terminal_back_between_and_after(script: Path) -> None:
    with Terminal("-i", f"{script}::twice") as terminal:
        for name, place in (("Ann", "first"), ("Bob", "hello Bob")):
            terminal.expect("name? ")
            terminal.type(f"{name}\n")
            if place == "first":
                terminal.expect("first hello Ann")
        terminal.expect("mine? ")
        assert not terminal.is_raw()
        terminal.type("local\n")
        terminal.expect("second hello Bob local")
        terminal.ends(0)


def test_interact_here_does_nothing(script: Path) -> None:
    with Terminal(f"{script}::here") as terminal:
        terminal.expect("name? ")
        terminal.type("me\n")
        terminal.expect("hello me")
        terminal.ends(0)


def test_container_that_is_killed_gives_the_terminal_back(script: Path, home: Path) -> None:
    with Terminal("-i", f"{script}::asks") as terminal:
        terminal.expect("name? ")
        (row,) = rows("containers", "talks")
        os.kill(inits(home)[row["container_id"]], signal.SIGKILL)
        terminal.expect("the terminal came back: its container ended")
        terminal.expect("name? ")  # the other try
        terminal.type("again\n")
        terminal.expect("hello again")
        terminal.ends(0)


def test_client_that_is_killed_leaves_no_container(script: Path) -> None:
    with Terminal("-i", f"{script}::asks") as terminal:
        terminal.expect("name? ")
        assert rows("containers", "talks")
    wait_until(lambda: not rows("containers", "talks"), "no container is left")


def test_without_i_the_error_says_how(script: Path) -> None:
    command = [*RUN, f"{script}::asks"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 1
    assert "was run without a terminal" in done.stderr
    assert "hint: run it with `squall run -i`" in done.stderr


def test_breakpoint_without_i_says_how_unless_there_is_another_debugger(script: Path) -> None:
    command = [*RUN, f"{script}::stops", "--x", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert "`breakpoint()`: the app of this container was run without a terminal" in done.stderr
    command = [*RUN, f"{script}::passes"]
    assert subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True).stdout == "passed\n"


def test_breakpoints_that_are_turned_off_ask_for_no_terminal(script: Path) -> None:
    with Terminal("-i", f"{script}::passes") as terminal:
        terminal.expect("passed")
        terminal.ends(0)
        assert "has this terminal" not in terminal.text


def test_server_that_is_killed_gives_the_terminal_back(script: Path, home: Path) -> None:
    with Terminal("-i", f"{script}::asks") as terminal:
        terminal.expect("name? ")
        os.kill(pid_of(home, "server"), signal.SIGKILL)
        terminal.expect("the terminal came back: the connection to the server broke")
        terminal.ends(1)
        assert not terminal.is_raw()
    broken = swap_client(None)
    if broken is not None:  # the tests' own connection
        broken.close()


def test_client_that_is_asked_to_end_gives_the_terminal_back(script: Path) -> None:
    with Terminal("-i", f"{script}::asks") as terminal:
        terminal.expect("name? ")
        assert terminal.is_raw()
        terminal.process.terminate()
        terminal.expect("stopping app `talks`")
        terminal.ends(130)
        assert not terminal.is_raw()


def test_without_a_terminal_i_is_refused(script: Path) -> None:
    command = [*RUN, "-i", f"{script}::asks"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "an interactive run needs a terminal" in done.stderr
