"""Deploying as a user does: the command, a program elsewhere, the server killed, a second version, and back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import processes_of, wait_until

pytestmark = pytest.mark.root

APP = """
import os
import squall

app = squall.App("numbers", tags={{"team": "blue"}})


@app.function({options})
def which(x=0):
    {body}
"""
CALLER = """
import squall

print(squall.Function.from_name("numbers", "which").remote())
"""


@pytest.fixture
def here(home: Path, tmp_path: Path) -> Path:
    (tmp_path / "caller.py").write_text(CALLER)
    return tmp_path


def write(here: Path, body: str, options: str = "") -> None:
    (here / "numbers_app.py").write_text(APP.format(body=body, options=options))


def squall(here: Path, *words: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "squall.cli", *words]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=90, check=False)
    return done.returncode, done.stdout, done.stderr


def call(here: Path) -> str:
    done = subprocess.run(
        [sys.executable, "caller.py"], cwd=here, capture_output=True, text=True, timeout=90, check=False
    )
    return done.stdout.strip() or done.stderr


def test_a_deployed_app_outlives_its_program_and_its_server(here: Path, home: Path) -> None:
    write(here, "return 'first'")
    assert squall(here, "deploy", "numbers_app.py", "--tag", "one") == (
        0, "deployed `numbers` version 1\n  which\n", "",
    )  # fmt: skip
    assert call(here) == "first"
    [server] = [pid for pid, command in processes_of(home).items() if "-m squall.server" in command]
    os.kill(server, signal.SIGKILL)
    wait_until(lambda: server not in processes_of(home), "it is gone")
    assert call(here) == "first"
    assert squall(here, "down")[0] == 0
    assert call(here) == "first"


def test_versions_follow_each_other_and_come_back(here: Path) -> None:
    write(here, "return 'first'")
    squall(here, "deploy", "numbers_app.py")
    write(here, "return 'second'", "cpu=0.25")
    code, out, _ = squall(here, "deploy", "numbers_app.py")
    assert (code, out) == (0, "deployed `numbers` version 2\n  changed which: cpu, source\n")
    assert call(here) == "second"
    write(here, "return 'third'\n\n\nraise RuntimeError('no such file')")
    code, _, err = squall(here, "deploy", "numbers_app.py")
    assert code == 1 and "no such file" in err
    write(here, "return 'third'\n\n\nif not squall.is_local():\n    raise RuntimeError('no such weights')")
    code, _, err = squall(here, "deploy", "numbers_app.py")
    assert code == 1 and "no such weights" in err and "version 2 goes on serving" in err
    assert 'numbers_app.py", line' in err and "raise RuntimeError('no such weights')" in err
    assert call(here) == "second"
    code, out, _ = squall(here, "app", "rollback", "numbers")
    assert (code, out.splitlines()[0]) == (0, "deployed `numbers` version 3") and call(here) == "first"
    rows = json.loads(squall(here, "app", "history", "numbers", "--json")[1])
    assert [(row["version"], row["kind"], row["current"]) for row in rows] == [
        (3, "rollback", True), (2, "deploy", False), (1, "deploy", False),
    ]  # fmt: skip


def test_functions_and_apps_are_shown_and_scaled_by_name(here: Path) -> None:
    write(here, "return 'first'")
    squall(here, "deploy", "numbers_app.py")
    call(here)
    info = json.loads(squall(here, "app", "info", "numbers", "--json")[1])
    assert (info["version"], info["labels"]) == (1, {"team": "blue"})
    [row] = json.loads(squall(here, "app", "stats", "numbers", "--json")[1])
    assert row["counts"] == {"ok": 1}
    assert json.loads(squall(here, "function", "info", "which", "--json")[1])["app"] == "numbers"
    assert len(json.loads(squall(here, "function", "calls", "numbers.which", "--json")[1])) == 1
    assert squall(here, "function", "logs", "numbers.which", "--search", "nothing")[:2] == (0, "")
    updated = squall(here, "function", "autoscaler", "update", "which", "--max-containers", "2", "--json")[1]
    assert json.loads(updated)["settings"]["max_containers"] == 2
    code, _, err = squall(here, "function", "info", "wich")
    assert code == 1 and "no function `wich`" in err
    assert squall(here, "app", "stop", "numbers")[0] == 0
    assert "app `numbers` has stopped" in call(here)
    assert squall(here, "app", "rollback", "numbers")[0] == 0 and call(here) == "first"


def test_what_cannot_be_deployed_is_told_in_one_line(here: Path) -> None:
    (here / "nothing.py").write_text("import squall\n")
    assert "makes no squall.App" in squall(here, "deploy", "nothing.py")[2]
    (here / "two.py").write_text("import squall\n\na = squall.App('a')\nb = squall.App('b')\n")
    assert "two.py::a" in squall(here, "deploy", "two.py")[2]
