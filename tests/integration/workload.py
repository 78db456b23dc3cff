"""Well-behaved functions for the tests of apps, spawning, logs, metering, scaling, networks and traces."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator

import squall
from squall.protocol.messages import Interact

app = squall.App("workload")


@app.function()
def square(x: int) -> int:
    return x * x


@app.function()
def echo(data: bytes) -> bytes:
    return data


@app.function()
def count_bytes(data: bytes) -> int:
    return len(data)


@app.function()
def fail(text: str) -> None:
    raise ValueError(text)


@app.function(max_containers=4)
def nap(seconds: float, x: int = 0) -> int:
    time.sleep(seconds)
    return x


@app.function(retries=0)
def talk(prompt: str) -> str:
    squall.interact()
    return input(prompt)


@app.function()
def demand_terminal(times: int) -> None:
    """Ask the server for a terminal without the SDK's leave, so often."""
    link = squall.Client.current().link
    for pending in [link.request(Interact()) for _ in range(times)][::-1]:
        pending.wait(20)


@app.function()
def whoami() -> tuple[str, int]:
    return os.environ["SQUALL_TASK_ID"], os.getpid()


@app.function()
def say(text: str, times: int = 1, pause: float = 0.0) -> str:
    """Write to stdout and stderr in turn."""
    for n in range(times):
        print(f"out {text} {n}", flush=True)
        print(f"err {text} {n}", file=sys.stderr, flush=True)
        time.sleep(pause)
    return os.environ["SQUALL_TASK_ID"]


@app.function()
def shout(size: int) -> str:
    left = size
    while left > 0:
        left -= os.write(1, b"x" * 79 + b"\n")
    return os.environ["SQUALL_TASK_ID"]


@app.function()
def progress() -> None:
    for percent in (0, 50, 100):
        sys.stderr.write(f"\r{percent:3d}%")
        sys.stderr.flush()
    sys.stderr.write("\n")


@app.function()
def burn(seconds: float) -> float:
    """Use a CPU and some memory."""
    kept = bytearray(os.urandom(1 << 20)) * 20
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    return len(kept) / (1 << 20)


@app.function()
def count_to(n: int) -> Iterator[int]:
    yield from range(n)


def reach(host: str, port: int) -> str:
    try:
        socket.create_connection((host, port), timeout=3).close()
    except OSError as error:
        return type(error).__name__
    return "reached"


@app.function()
def connect_to(host: str, port: int) -> str:
    return reach(host, port)


@app.function(block_network=True)
def connect_blocked(host: str, port: int) -> str:
    return reach(host, port)


@app.function()
def interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


@app.function(block_network=True)
def interfaces_blocked() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


speaking = squall.App("speaking")


@speaking.function()
def tell(text: str) -> str:
    print(text)
    return os.environ["SQUALL_TASK_ID"]


@speaking.function()
def listen() -> None:
    """Listen where neighbours might reach it, and say where."""
    with socket.create_server(("", 0)) as server, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        print(probe.getsockname()[0], server.getsockname()[1])
        server.accept()


# ---- scaling ------------------------------------------------------------------------------------------------------

scaling = squall.App("scaling")


@scaling.function(scaledown_window=2, max_containers=3)
def three_at_most(seconds: float) -> str:
    time.sleep(seconds)
    return os.environ["SQUALL_TASK_ID"]


@scaling.function(min_containers=2, scaledown_window=2)
def two_at_least() -> str:
    return os.environ["SQUALL_TASK_ID"]


@scaling.function(buffer_containers=1, scaledown_window=2)
def one_in_reserve(seconds: float) -> str:
    time.sleep(seconds)
    return os.environ["SQUALL_TASK_ID"]


@scaling.function(single_use_containers=True)
def once() -> str:
    return os.environ["SQUALL_TASK_ID"]


@scaling.function(cpu=1.0)
def wide(seconds: float) -> str:
    time.sleep(seconds)
    return os.environ["SQUALL_TASK_ID"]


@scaling.function(cpu=1.0)
def wide_too() -> str:
    return os.environ["SQUALL_TASK_ID"]


@scaling.function(cpu=64.0)
def too_wide() -> None: ...
