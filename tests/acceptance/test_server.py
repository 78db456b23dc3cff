"""`squall up` as an operator and a team meet it: another machine over TCP and TLS, draining, and its commands."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

from squall import _linux
from squall.node import netlink
from squall.node.netlink import LOOPBACK, End, Netlink
from tests import certificates
from tests.conftest import wait_until
from tests.integration.staying import as_json, here, new_token, server_log, squall
from tests.integration.support import is_alive, pid_of
from tests.kernel.fake_internet import new_namespace

pytestmark = pytest.mark.root

ROOT = Path(__file__).parents[2]
HERE, THERE = "198.18.200.1", "198.18.200.2"
"""This machine, and the other one: addresses for tests of networks, which nobody has."""
SECONDS = 90.0
SCRIPT = """
import os, time
import squall

app = squall.App("team")

@app.function()
def square(x: int):
    print("squaring", x)
    return x * x

@app.function()
def nap(seconds: float, path: str = ""):
    time.sleep(seconds)
    return "slept"

@app.local_entrypoint()
def main():
    print(square.remote(7), sum(square.map(range(100))), len(square.remote(2) * "x"))
"""


class Machine:
    """Another machine: a network namespace with a cable to this one. It has this one's files and nothing else."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.fd = new_namespace()
        self.near = f"sqt{os.getpid() % 100_000}"
        with Netlink() as here:
            here.run(netlink.add_veth(End(self.near), End("eth0", netns=self.fd), 1500))
            index = socket.if_nametoindex(self.near)
            here.run(netlink.add_address(index, IPv4Address(HERE), 30), netlink.set_link(index))
        self._inside(self._wire)

    def _wire(self) -> None:
        with Netlink() as there:
            index = socket.if_nametoindex("eth0")
            there.run(netlink.set_link(LOOPBACK), netlink.add_address(index, IPv4Address(THERE), 30))
            there.run(netlink.set_link(index))

    def _inside(self, body: Callable[[], Any]) -> Any:
        with ThreadPoolExecutor(1, initializer=_linux.setns, initargs=(self.fd, _linux.CLONE_NEWNET)) as thread:
            return thread.submit(body).result(SECONDS)

    def run(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        """A `squall` command there, with a home and a configuration of its own."""
        return self.python("-m", "squall.cli", *words, **env)

    def python(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        home = {"SQUALL_HOME": str(self.directory / "home"), "HOME": str(self.directory), "PYTHONPATH": str(ROOT)}
        left_out = ("SQUALL_", "XDG_")
        environ = {**{k: v for k, v in os.environ.items() if not k.startswith(left_out)}, **home, **env}
        command = [sys.executable, *words]
        options: dict[str, Any] = {"cwd": self.directory, "env": environ, "capture_output": True, "text": True}
        done: subprocess.CompletedProcess[str] = self._inside(
            lambda: subprocess.run(command, timeout=SECONDS, check=False, **options)
        )
        return done

    def close(self) -> None:
        subprocess.run(["ip", "link", "del", self.near], check=False, capture_output=True, timeout=10)
        os.close(self.fd)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    (tmp_path / "team.py").write_text(SCRIPT)
    made = Machine(tmp_path)
    yield made
    made.close()


def test_a_client_on_another_machine_runs_an_app_with_a_token_over_tls(home: Path, machine: Machine) -> None:
    files = certificates.make(machine.directory, HERE)
    words = ("--tls-cert", str(files.cert), "--tls-key", str(files.key))
    done = squall("up", "--detach", "--listen", f"{HERE}:0", *words)
    assert done.returncode == 0, done.stderr
    url = done.stdout.strip()
    assert url.startswith(f"https://{HERE}:")
    without = machine.run("run", "team.py", SQUALL_SERVER=url, SQUALL_CA_FILE=str(files.authority))
    assert (without.returncode, "without a token" in without.stderr) == (1, True), without.stderr
    distrusting = machine.run("run", "team.py", SQUALL_SERVER=url)
    assert (distrusting.returncode, "cannot trust the server" in distrusting.stderr) == (1, True), distrusting.stderr
    token = new_token(name="other machine")
    keep = ("--server", url, "--token-id", token["token_id"], "--token-secret", token["secret"])
    kept = machine.run("token", "set", *keep, "--ca-file", str(files.authority))
    assert (kept.returncode, "takes the token, for workspace `main`" in kept.stderr) == (0, True), kept.stderr
    ran = machine.run("run", "team.py")
    assert ran.returncode == 0, ran.stderr
    assert "49 328350 4" in ran.stdout
    assert "squaring 7" in ran.stdout
    status = as_json(machine.run("status", "--json"))
    assert (status["server"], status["listens"], status["workspace"]) == (url, url, "main")
    assert not (machine.directory / "home").exists()
    assert as_json(squall("token", "list", "--json"))[0]["used_at"] is not None


def test_a_client_on_another_machine_runs_an_app_with_a_token_over_tcp(home: Path, machine: Machine) -> None:
    done = squall("up", "--detach", "--listen", f"{HERE}:0")
    assert done.returncode == 0, done.stderr
    assert "tokens and values travel unencrypted" in server_log(home)
    token = new_token()
    env = {
        "SQUALL_SERVER": done.stdout.strip(), "SQUALL_TOKEN_ID": token["token_id"],
        "SQUALL_TOKEN_SECRET": token["secret"],
    }  # fmt: skip
    ran = machine.run("run", "team.py", **env)
    assert ran.returncode == 0, ran.stderr
    assert "49 328350 4" in ran.stdout
    (machine.directory / "values.env").write_text("PASSWORD=x\n")
    assert machine.run("secret", "create", "db", "--from-dotenv", "values.env", **env).returncode == 0
    assert as_json(machine.run("secret", "list", "--json", **env))[0]["keys"] == ["PASSWORD"]


def test_an_app_deployed_from_another_machine_is_called_from_there_and_from_here(home: Path, machine: Machine) -> None:
    done = squall("up", "--detach", "--listen", f"{HERE}:0")
    assert done.returncode == 0, done.stderr
    token = new_token()
    env = {
        "SQUALL_SERVER": done.stdout.strip(), "SQUALL_TOKEN_ID": token["token_id"],
        "SQUALL_TOKEN_SECRET": token["secret"],
    }  # fmt: skip
    deployed = machine.python("-c", "import team; team.app.deploy()", **env)
    assert deployed.returncode == 0, deployed.stderr
    call = "import squall; print(squall.Function.from_name('team', 'square').remote(12))"
    there = machine.python("-c", call, **env)
    assert (there.returncode, there.stdout.strip()) == (0, "144"), there.stderr
    here = subprocess.run(
        [sys.executable, "-c", call], capture_output=True, text=True, timeout=SECONDS, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (here.returncode, here.stdout.strip()) == (0, "144"), here.stderr


def test_a_second_server_is_refused_and_an_idle_embedded_one_makes_way(home: Path, tmp_path: Path) -> None:
    assert squall("secret", "create", "db", "A=1").returncode == 0  # starts an embedded one
    embedded = pid_of(home, "server")
    assert squall("up", "--detach").returncode == 0
    assert not is_alive(embedded)
    assert as_json(squall("secret", "list", "--json"))[0]["name"] == "db"
    again = squall("up", "--detach")
    assert (again.returncode, "runs already" in again.stderr) == (1, True), again.stderr
    status = as_json(squall("status", "--json"))
    assert (status["stays"], status["listens"]) == (True, "")


def test_a_port_that_cannot_be_had_is_said_by_up(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = squall("up", "--detach", "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
    assert done.returncode == 1
    assert "cannot listen at" in done.stderr
    wait_until(lambda: not pid_of(home, "server"), "the server has ended")


class Foreground:
    """`squall up` in the foreground, as in a terminal or under systemd."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "squall.cli", "up"], stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        wait_until(self._serves, "it serves")

    def _serves(self) -> bool:
        try:
            here().close()
        except Exception:
            return False
        return True

    def end(self) -> tuple[int, str]:
        said = self.process.communicate(timeout=SECONDS)[1]
        return self.process.returncode, said


def test_a_signal_lets_running_inputs_end_and_takes_no_new_ones(home: Path, tmp_path: Path) -> None:
    (tmp_path / "team.py").write_text(SCRIPT)
    server = Foreground()
    calling = subprocess.Popen(
        [sys.executable, "-m", "squall.cli", "run", "team.py::nap", "--seconds", "3"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until(lambda: running_inputs() == 1, "the input runs")
    server.process.send_signal(signal.SIGTERM)
    assert "slept" in calling.communicate(timeout=SECONDS)[0]
    code, said = server.end()
    assert code == 0
    assert 'ending reason="received SIGTERM" grace=30' in said


def running_inputs() -> int:
    done = squall("container", "list", "--json")
    return sum(row["running"] for row in json.loads(done.stdout)) if done.returncode == 0 and done.stdout else 0


def test_down_now_waits_for_nothing(home: Path, tmp_path: Path) -> None:
    (tmp_path / "team.py").write_text(SCRIPT)
    server = Foreground()
    calling = subprocess.Popen(
        [sys.executable, "-m", "squall.cli", "run", "team.py::nap", "--seconds", "600"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_until(lambda: running_inputs() == 1, "the input runs")
    try:
        assert squall("down", "--now").returncode == 0
        assert server.end()[0] == 0
    finally:
        calling.kill()
        calling.wait()
