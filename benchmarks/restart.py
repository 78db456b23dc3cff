"""A restart of the server under load: how long clients get no answer, and what they see of it.

A deployed app is called steadily by two programs, one over the Unix socket and one over TCP, while the server is
killed (`kill -9`) or told to end (SIGTERM, so that it drains), and started again as soon as it is gone, as systemd
would. Printed are the longest time between two answers, the time until `/healthz` answered, the errors that callers
saw, and the latency of calls before and after.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common

PORT = 17777
THREADS = 4
BEFORE_S = 4.0
"""Of steady calls before the server goes: a connection that has held so long is tried again at once."""
AFTER_S = 6.0
APP = """
import squall

app = squall.App("bench-restart")


@app.function(cpu=0.25, memory=64, min_containers=2)
def echo(x):
    return x
"""


# ---- the programs that call -----------------------------------------------------------------------------------------


def call_steadily(until: float) -> None:
    """A client's whole life: what it got is printed as JSON."""
    import squall

    echo: Any = squall.Function.from_name("bench-restart", "echo")
    answers: list[tuple[float, float]] = []
    errors: list[str] = []

    def body(first: int) -> None:
        number = first
        while (began := time.monotonic()) < until:
            try:
                if echo.remote(number) != number:
                    errors.append("a wrong answer")
                answers.append((began, time.monotonic()))
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")
            number += THREADS

    threads = [threading.Thread(target=body, args=(first,)) for first in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps({"answers": answers, "errors": errors}))


@contextlib.contextmanager
def callers(until: float, places: dict[str, dict[str, str]]) -> Iterator[dict[str, subprocess.Popen[str]]]:
    command = [sys.executable, __file__, "--until", str(until)]
    pipe = subprocess.PIPE
    found = {
        name: subprocess.Popen(command, env={**os.environ, **settings}, stdout=pipe, text=True)
        for name, settings in places.items()
    }
    try:
        yield found
    finally:
        for process in found.values():
            process.kill()
            process.wait()


# ---- the server -----------------------------------------------------------------------------------------------------


class Supervisor:
    """Keeps a server of `squall up` running, as systemd does."""

    def __init__(self, home: Path) -> None:
        self.log = (home / "up.log").open("ab")
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "squall.cli", "up", "--listen", f"127.0.0.1:{PORT}"]
        return subprocess.Popen(command, stdout=self.log, stderr=self.log)

    def restart(self, signum: int) -> tuple[float, float, float]:
        """When the server was told, was gone, and answered a look at its health again."""
        told = time.monotonic()
        self.process.send_signal(signum)
        self.process.wait(60)
        gone = time.monotonic()
        self.process = self._start()
        wait_healthy()
        return told, gone, time.monotonic()

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def wait_healthy() -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", PORT), 1) as connection:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            if b" 200 " in connection.recv(100):
                return
        time.sleep(0.005)
    raise RuntimeError("the server did not come back within 60 s")


def squall_command(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "squall.cli", *words], capture_output=True, text=True, check=True)
    return done.stdout


# ---- what came of it ------------------------------------------------------------------------------------------------


def longest_gap(answers: list[tuple[float, float]], told: float) -> float:
    """Between two answers, of those that lie around the restart."""
    ends = sorted(end for _, end in answers)
    return max(later - earlier for earlier, later in itertools.pairwise(ends) if later > told)


def show(case: str, rounds: list[dict[str, Any]]) -> None:
    common.row(f"{case}: longest time without an answer", [one["gap"] for one in rounds], "s")
    common.row(f"{case}: call before", [ms for one in rounds for ms in one["before"]], "ms")
    common.row(f"{case}: call after", [ms for one in rounds for ms in one["after"]], "ms")
    errors = [error for one in rounds for error in one["errors"]]
    calls = sum(one["count"] for one in rounds)
    print(f"{case}: {len(errors)} errors in {calls} calls{': ' + errors[0][:300] if errors else ''}", flush=True)


def judge(said: dict[str, Any], told: float) -> dict[str, Any]:
    answers = said["answers"]
    settled = answers[-1][1] - 2  # the last seconds of calls
    return {
        "gap": longest_gap(answers, told),
        "before": [(end - began) * 1000 for began, end in answers if end < told],
        "after": [(end - began) * 1000 for began, end in answers if began > settled],
        "errors": said["errors"],
        "count": len(answers),
    }


def measure(supervisor: Supervisor, signum: int, places: dict[str, dict[str, str]]) -> dict[str, Any]:
    began = time.monotonic()
    with callers(began + BEFORE_S + AFTER_S, places) as processes:
        time.sleep(BEFORE_S)
        told, gone, healthy = supervisor.restart(signum)
        said = {name: json.loads(process.communicate(timeout=120)[0]) for name, process in processes.items()}
    return {"gone": gone - told, "healthy": healthy - told, **{name: judge(one, told) for name, one in said.items()}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.until:
        call_steadily(options.until)
        return
    with common.own_home() as home, tempfile.TemporaryDirectory() as scratch:
        supervisor = Supervisor(home)
        try:
            wait_healthy()
            module = Path(scratch, "bench_restart_app.py")
            module.write_text(APP)
            squall_command("deploy", str(module))
            token = json.loads(squall_command("token", "new", "--name", "bench", "--json"))
            elsewhere = {
                "SQUALL_SERVER": f"http://127.0.0.1:{PORT}",
                "SQUALL_TOKEN_ID": token["token_id"],
                "SQUALL_TOKEN_SECRET": token["secret"],
            }
            places = {"Unix": {}, "TCP": elsewhere}
            for how, signum in (("kill -9", signal.SIGKILL), ("SIGTERM", signal.SIGTERM)):
                rounds = [measure(supervisor, signum, places) for _ in range(options.rounds)]
                common.row(f"{how}: the server is gone after", [one["gone"] for one in rounds], "s")
                common.row(f"{how}: /healthz answers after", [one["healthy"] for one in rounds], "s")
                for name in places:
                    show(f"{how}, {name}", [one[name] for one in rounds])
        finally:
            supervisor.end()


if __name__ == "__main__":
    main()
