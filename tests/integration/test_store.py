"""The Store below a whole server: in PostgreSQL, on a full disk, from a backup, and when it cannot be used."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from squall import FunctionCall
from squall.exception import ResourceExhaustedError, ServiceError
from tests.conftest import wait_until
from tests.integration import durable, workload
from tests.integration.support import Kept, inits, pid_of
from tests.integration.test_restarts import kill_server
from tests.stores import Cluster, small_disk_at

pytestmark = pytest.mark.root

SECONDS = 60


def cli(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "squall.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)


def gather_elsewhere(call_id: str) -> str:
    """A call's result, as another program prints it; a server starts for it when none runs."""
    code = f"import squall; print(squall.FunctionCall.from_id({call_id!r}).get(timeout=20))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS, check=False)
    return run.stdout.strip() or run.stderr


@pytest.fixture
def postgres(home: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> str:
    """The home's Store shall be in PostgreSQL; its URL."""
    url = cluster.create()
    monkeypatch.setenv("SQUALL_DATABASE_URL", url)
    return url


def test_server_in_postgresql_keeps_calls_over_a_restart(home: Path, postgres: str, cluster: Cluster) -> None:
    with workload.app.run(output=Kept()):
        call = workload.square.spawn(12)
        assert call.get(timeout=30) == 144
        assert list(workload.square.map(range(5))) == [0, 1, 4, 9, 16]
    assert cli("down").returncode == 0
    assert gather_elsewhere(call.object_id) == "144"
    assert not (home / "state" / "squall.db").exists()


def test_spawned_inputs_in_postgresql_run_after_the_server_was_killed(home: Path, postgres: str) -> None:
    with durable.app.run(detach=True, output=Kept()):
        call = durable.step.spawn_map([0.05] * 40, range(40))
        single = durable.step.spawn(0.0, 100)
        kill_server(home)
        assert [call.get(timeout=60, index=i) for i in range(40)] == list(range(40))
        assert single.get(timeout=20) == 100


def test_server_that_cannot_open_its_store_leaves_no_agent_and_ends_none_that_was_there(
    home: Path, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQUALL_DATABASE_URL", postgres.replace("?", "-is-not-there?"))
    refused = cli("up")
    assert refused.returncode == 1 and "does not exist" in refused.stderr
    wait_until(lambda: not pid_of(home, "node"), "its agent has ended")
    monkeypatch.setenv("SQUALL_DATABASE_URL", postgres)
    with durable.app.run(detach=True, output=Kept()):
        call = durable.step.spawn(8.0, 1)
        wait_until(lambda: inits(home), "it runs")
        before = inits(home)
        monkeypatch.setenv("SQUALL_DATABASE_URL", postgres.replace("?", "-is-not-there?"))
        kill_server(home)
        assert cli("up").returncode == 1
        assert inits(home) == before
        monkeypatch.setenv("SQUALL_DATABASE_URL", postgres)
        assert call.get(timeout=60) == 1


def test_password_of_the_database_reaches_neither_agent_nor_container(home: Path, postgres: str) -> None:
    with workload.app.run(output=Kept()):
        workload.square.remote(2)
        mark = b"SQUALL_DATABASE_URL=" + postgres.encode()
        holders = [command_of(pid) for pid in pids() if mark in environment_of(pid)]
    assert all("squall.server" in command or "pytest" in command for command in holders)
    assert any("squall.server" in command for command in holders)


def pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def environment_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return "squall.server (gone)"


@pytest.fixture
def small_state(home: Path) -> Iterator[Path]:
    """The home's state is on a disk with little room."""
    with small_disk_at(home / "state", filler_bytes=8 << 20) as path:
        yield path
        cli("down")  # before the disk goes


def spawn_until_refused() -> list[FunctionCall[bytes]]:
    acknowledged: list[FunctionCall[bytes]] = []
    for _ in range(500):
        try:
            acknowledged.append(workload.echo.spawn(bytes(30_000)))
        except ResourceExhaustedError as error:
            said = str(error)
            break
    else:
        pytest.fail("the disk was never full")
    assert "disk that holds" in said and "free some space" in said
    return acknowledged


def test_full_disk_refuses_spawns_and_loses_none_that_was_acknowledged(small_state: Path) -> None:
    with workload.app.run(output=Kept()):
        acknowledged = spawn_until_refused()
        assert workload.square.remote(3) == 9  # what needs no disk goes on
        (small_state / "filler").unlink()
        assert workload.square.spawn(4).get(timeout=30) == 16
        for call in acknowledged:
            assert call.get(timeout=30) == bytes(30_000)


def test_server_with_a_deleted_database_does_not_start_and_says_why(home: Path) -> None:
    with workload.app.run(output=Kept()):
        assert workload.square.spawn(2).get(timeout=30) == 4
    assert cli("down").returncode == 0
    (home / "state" / "squall.db").unlink()
    with (
        pytest.raises(ServiceError, match=r"squall.db` is gone, and this home had one(.|\n)*restore it from a backup"),
        workload.app.run(output=Kept()),
    ):
        pytest.fail("it was started")
    assert not (home / "state" / "squall.db").exists()


def test_backup_of_a_running_server_restores_results(home: Path, tmp_path: Path) -> None:
    with workload.app.run(output=Kept()):
        call = workload.square.spawn(7)
        assert call.get(timeout=30) == 49
        large = workload.echo.spawn(bytes(3 << 20))  # travels as a blob
        wait_until(lambda: len(large.get(timeout=30)) == 3 << 20, "the large result is there")
        run = cli("backup", str(tmp_path / "copy"))
        assert run.returncode == 0, run.stderr
        assert "blobs  " in run.stdout
    assert cli("down").returncode == 0
    shutil.rmtree(home / "state")
    shutil.rmtree(home / "blobs")
    shutil.copytree(tmp_path / "copy", home, dirs_exist_ok=True)
    assert gather_elsewhere(call.object_id) == "49"
    assert gather_elsewhere(large.object_id) == str(bytes(3 << 20))
    assert os.listdir(tmp_path) == ["copy"]
