"""`squall.enable_output()` in a script: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.integration.conftest import own_home

pytestmark = pytest.mark.root

SECONDS = 60.0
SCRIPT = """
import sys, time
import squall
app = squall.App("shown")

@app.function()
def work(x):
    print(f"working on {x}", flush=True)
    time.sleep(1.5)
    return x

if __name__ == "__main__":
    with squall.enable_output(**eval(sys.argv[1])):
        with app.run():
            print("sum", sum(work.map(range(2))))
    print("rich" in sys.modules)
"""


@pytest.fixture(scope="module", autouse=True)
def home() -> Iterator[Path]:
    with own_home() as path:
        yield path


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shown") / "shown.py"
    path.write_text(SCRIPT)
    return path


def on_a_terminal(script: Path, options: str) -> str:
    """All that the script writes there."""
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, script, options], stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    os.set_blocking(ours, False)
    shown = b""

    def has_ended() -> bool:
        nonlocal shown
        with contextlib.suppress(OSError):  # nothing there, or the other end is closed
            shown += os.read(ours, 65536)
            return False
        return process.poll() is not None

    wait_until(has_ended, lambda: f"it ends: {shown!r}", SECONDS)
    os.close(ours)
    assert process.returncode == 0, shown
    return shown.decode()


def test_on_a_terminal_there_is_a_live_view(script: Path) -> None:
    shown = on_a_terminal(script, "{}")
    assert "2 running" in shown
    assert "working on 0" in shown
    assert "sum 1" in shown
    assert "True\r\n" in shown


def test_without_progress_there_is_only_output(script: Path) -> None:
    shown = on_a_terminal(script, "{'show_progress': False}")
    assert sorted(shown.split("\r\n")) == ["", "False", "sum 1", "working on 0", "working on 1"]


def test_without_a_terminal_there_are_plain_lines(script: Path) -> None:
    command = [sys.executable, str(script), "{'timestamps': True}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    lines = sorted(line.partition(" ")[2].partition(" ")[2] for line in done.stdout.splitlines() if "working" in line)
    assert lines == ["working on 0", "working on 1"]
    assert done.stdout.endswith("sum 1\nFalse\n")
    assert done.stderr == ""
