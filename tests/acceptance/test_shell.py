"""`squall shell` as a user meets it: a terminal in a container, its size, its keys, its exit code."""

from __future__ import annotations

import contextlib
import fcntl
import json
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

import squall
from squall.client import Client
from tests.conftest import Debian, wait_until
from tests.integration.conftest import own_home
from tests.integration.support import rows

pytestmark = pytest.mark.root

SHELL = [sys.executable, "-m", "squall.cli", "shell"]
SECONDS = 60.0

SCRIPT = """
import squall
app = squall.App("shown")

@app.function(env={"WORD": "it's $HOME"}, secrets=[squall.Secret.from_dict({"TOKEN": "t0"})], memory=(128, 300))
def square(x): return x * x

@app.cls(block_network=True)
class Model:
    name: str = squall.parameter()
    @squall.enter()
    def load(self): raise RuntimeError("no code of the class runs")
    @squall.method()
    def predict(self): ...
"""


@pytest.fixture(scope="module", autouse=True)
def home() -> Iterator[Path]:
    with own_home() as path:
        yield path


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shell") / "shown.py"
    path.write_text(SCRIPT)
    return path


def shell(*words: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [*SHELL, *map(str, words)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=SECONDS, check=False)


class Terminal:
    """A shell on a terminal of its own."""

    def __init__(self, *words: object, ahead: str = "") -> None:
        self.ours, theirs = pty.openpty()
        self.type(ahead)
        env = {**os.environ, "TERM": "xterm"}
        self.process = subprocess.Popen(
            [*SHELL, *map(str, words)], stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True
        )
        os.close(theirs)
        os.set_blocking(self.ours, False)
        self.text = ""
        self.expect("# ")

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def expect(self, text: str) -> None:
        wait_until(lambda: text in self.read(), lambda: f"it shows {text!r}: {self.text!r}", 20)
        self.text = self.text[self.text.index(text) + len(text) :]

    def read(self) -> str:
        with contextlib.suppress(OSError):  # nothing there, or the other end is closed
            self.text += os.read(self.ours, 65536).decode(errors="replace")
        return self.text

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.process.send_signal(signal.SIGWINCH)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.ours)


def test_command_runs_in_a_container_of_the_host_and_gives_its_exit_code() -> None:
    done = shell("-c", "id -u; pwd; exit 7")
    assert (done.stdout, done.returncode) == ("0\n/root\n", 7)


def test_function_is_stood_for_with_its_environment_and_source(script: Path) -> None:
    done = shell(f"{script}::square", stdin='echo "$WORD $TOKEN"; python -c "import shown; print(shown.square)"\n')
    assert done.stdout == "it's $HOME t0\n<Function `square`>\n"
    assert shell(f"{script}::square", "-c", "test -e /tmp/.squall-profile; echo $?").stdout == "1\n"


def test_class_is_stood_for_without_its_code(script: Path) -> None:
    done = shell(f"{script}::Model", "-c", "cut -d: -f1 -s /proc/net/dev | tr -d ' '; exit 3")
    assert (done.stdout, done.returncode) == ("lo\n", 3)


def test_what_there_is_not_is_told(script: Path) -> None:
    done = shell(f"{script}::nonsense")
    assert done.returncode == 1
    assert "has no function or class `nonsense`" in done.stderr
    assert "`square`" in done.stderr
    assert "several functions and classes" in shell(script).stderr


def test_terminal_has_a_size_takes_keys_and_ends_with_its_code() -> None:
    with Terminal() as terminal:
        terminal.type("test -t 0 && echo is a $((1+0)) terminal\n")
        terminal.expect("is a 1 terminal")
        terminal.resize(33, 99)
        terminal.type("stty size\n")
        terminal.expect("33 99")
        terminal.type("sh -c 'echo slee''ping; exec sleep 1000'; echo code $?\n")
        terminal.expect("sleeping")  # before that the key would be the shell's, which goes on
        (row,) = rows("containers", "shell")
        terminal.type("\x03")
        terminal.type("echo still $((40+2)) here\n")
        terminal.expect("still 42 here")
        terminal.type("exit 5\n")
        assert terminal.process.wait(SECONDS) == 5
    wait_until(lambda: row["container_id"] not in {r["container_id"] for r in rows("containers")}, "it has ended")


def test_what_is_typed_before_the_prompt_is_there_is_not_lost() -> None:
    with Terminal(ahead="echo typed $((1+1)) ahead\n") as terminal:
        terminal.expect("typed 2 ahead")


def test_running_container_is_entered(script: Path) -> None:
    with Terminal() as terminal:
        terminal.type("touch /tmp/mark; echo made $((1+1))\n")
        terminal.expect("made 2")
        (row,) = rows("containers", "shell")
        assert shell(row["container_id"], "-c", "ls /tmp/mark").stdout == "/tmp/mark\n"
        terminal.type("exit\n")
        assert terminal.process.wait(SECONDS) == 0


def test_container_ends_when_the_shell_is_killed() -> None:
    with Terminal() as terminal:
        terminal.type("echo up $((1+1))\n")
        terminal.expect("up 2")
        assert rows("containers", "shell")
    wait_until(lambda: not rows("containers"), "no container is left", SECONDS)
    assert Client.current().usable()


def test_shell_in_an_image_and_the_list_of_images_need_no_server_that_runs(debian_layers: Debian) -> None:
    with own_home() as home:
        debian_layers.lend(home)
        image = squall.Image.debian_slim("3.11").run_commands("echo made of steps > /made").build()
        down = [sys.executable, "-m", "squall.cli", "down"]
        subprocess.run(down, check=True, timeout=SECONDS)
        listed = subprocess.run(
            [*SHELL[:-1], "image", "list", "--json"], capture_output=True, check=True, timeout=SECONDS
        )
        shown = {row["image_id"]: row["size_bytes"] for row in json.loads(listed.stdout)}
        assert shown[image.image_id] > 1 << 20
        subprocess.run(down, check=True, timeout=SECONDS)
        inside = shell(image.image_id[:10], "-c", "cat /made; exit 7")
        assert (inside.stdout, inside.returncode) == ("made of steps\n", 7), inside.stderr
        assert "no image `im-none`" in shell("im-none", "-c", "true").stderr
