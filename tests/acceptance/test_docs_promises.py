"""What the first page promises and no page can show: that nothing was installed, and that nothing stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import mounts_under, processes_of, wait_until

ROOT = Path(__file__).parents[2]
SECONDS = 60.0


def squall(*words: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one command to its end, with these variables."""
    return subprocess.run(
        [sys.executable, "-m", "squall.cli", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": python_path(), **environment},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def python_path() -> str:
    """So that Squall is found from other directories too, installed or not."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))


def test_server_and_agent_end_by_themselves_when_nobody_needs_them(home: Path) -> None:
    run = squall("run", "examples/hello.py", "--n", "10", SQUALL_IDLE_TIMEOUT="0.5")
    assert (run.returncode, run.stdout) == (0, "285\n"), run.stderr
    wait_until(lambda: not processes_of(home), "server, agent and containers have ended")
    assert mounts_under(home) == []
    assert list((home / "run").glob("*.sock")) == []


def test_process_runtime_says_what_it_does_not_protect(home: Path) -> None:
    run = squall("run", "examples/hello.py", "--n", "10", SQUALL_RUNTIME="process")
    assert (run.returncode, run.stdout) == (0, "285\n"), run.stderr
    assert "containers are plain processes" in run.stderr
    assert "limits are not enforced" in run.stderr


SECRETS = """
import os
import squall
app = squall.App("secrets")

@app.function(secrets=[squall.Secret.from_local_environ(["A_SECRET"])])
def named(): return os.environ["A_SECRET"][:4]

@app.function()
def other(): return "A_SECRET" in os.environ

@app.local_entrypoint()
def main(): print(named.remote(), other.remote())
"""


def test_secret_reaches_only_the_function_that_names_it_and_is_written_nowhere(home: Path, tmp_path: Path) -> None:
    (tmp_path / "secrets_app.py").write_text(SECRETS)
    run = squall("run", "secrets_app.py", cwd=tmp_path, A_SECRET="only-in-memory-9f3c")
    assert (run.returncode, run.stdout) == (0, "only False\n"), run.stderr
    assert squall("down", cwd=tmp_path).returncode == 0
    written = [path for path in home.rglob("*") if path.is_file() and b"in-memory-9f3c" in path.read_bytes()]
    assert written == []
