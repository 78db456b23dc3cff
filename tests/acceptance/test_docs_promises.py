"""What the first page promises and no page can show: that nothing was installed, and that nothing stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import mounts_under, processes_of, wait_until

ROOT = Path(__file__).parents[2]
SECONDS = 60.0


def run_hello(home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "squall.cli", "run", "examples/hello.py", "--n", "10"],
        cwd=ROOT,
        env={**os.environ, "SQUALL_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def test_server_and_agent_end_by_themselves_when_nobody_needs_them(home: Path) -> None:
    run = run_hello(home, SQUALL_IDLE_TIMEOUT="0.5")
    assert (run.returncode, run.stdout) == (0, "285\n"), run.stderr
    wait_until(lambda: not processes_of(home), "server, agent and containers have ended")
    assert mounts_under(home) == []
    assert list((home / "run").glob("*.sock")) == []


def test_process_runtime_says_what_it_does_not_protect(home: Path) -> None:
    run = run_hello(home, SQUALL_RUNTIME="process")
    assert (run.returncode, run.stdout) == (0, "285\n"), run.stderr
    assert "containers are plain processes" in run.stderr
    assert "limits are not enforced" in run.stderr
