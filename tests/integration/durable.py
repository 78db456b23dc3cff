"""Functions that say in their output what they ran, so that executions can be counted after a restart."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import squall

app = squall.App("durable")


@app.function(max_containers=4)
def step(seconds: float, x: int) -> int:
    print(f"ran {x}", flush=True)
    time.sleep(seconds)
    return x


@app.function(max_containers=1)
def one_by_one(seconds: float, x: int) -> int:
    print(f"ran {x}", flush=True)
    time.sleep(seconds)
    return x


@app.function(retries=squall.Retries(max_retries=1, initial_delay=4.0, backoff_coefficient=1.0))
def stubborn(x: int) -> None:
    print(f"ran {x}", flush=True)
    raise ValueError(f"never {x}")


@app.function(secrets=[squall.Secret.from_dict({"MAGIC_WORD": "open sesame"})], max_containers=1)
def reveal(seconds: float, data: bytes) -> tuple[int, int]:
    time.sleep(seconds)
    return len(os.environ["MAGIC_WORD"]), len(data)


@app.function()
def family(depth: int) -> int:
    """Calls `step` and, one below, itself."""
    found = step.remote(0.0, 1)
    return found + (family.spawn(depth - 1).get(timeout=30) if depth else 0)


@app.function()
def count(n: int, seconds: float) -> Iterator[int]:
    for i in range(n):
        time.sleep(seconds)
        yield i


@app.cls(max_containers=1)
class Keeper:
    name: str = squall.parameter()

    @squall.method()
    def size(self, data: bytes) -> tuple[str, int]:
        return self.name, len(data)


def spawn_and_die(home: Path, seconds: float = 2.0) -> str:
    """Have a program spawn a call, kill it while the call waits; the call's id."""
    root = Path(__file__).parents[2]
    body = (
        "import time\nfrom tests.integration import durable\n"
        "with durable.app.run():\n"
        "    durable.step.remote(0.0, 0)\n"
        f"    print(durable.step.spawn({seconds}, 4).object_id, flush=True)\n"
        "    time.sleep(600)\n"
    )
    program = subprocess.Popen(
        [sys.executable, "-c", body],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "SQUALL_HOME": str(home), "PYTHONPATH": str(root)},
    )
    assert program.stdout is not None
    with program:
        lines = iter(program.stdout.readline, "")
        call_id = next(line.strip() for line in lines if line.startswith("fc-"))
        program.send_signal(signal.SIGKILL)
    return call_id
