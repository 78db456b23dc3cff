"""The app that the random kills are aimed at. Each execution gives a token of its own, so that executions can be told
apart and counted: a line in a file where the runtime lets a container write one, and a line of output everywhere."""

from __future__ import annotations

import os
import random
import time

import squall

app = squall.App("chaos")
RETRIES = squall.Retries(max_retries=8, initial_delay=0.0)
"""A kill of a container alone with an input is the input's own failure, and one input may meet several kills."""
CONTAINERS = 3


@app.function(max_containers=CONTAINERS, retries=RETRIES)
def work(run: str, idx: int, path: str = "") -> tuple[str, int, str]:
    token = os.urandom(8).hex()
    line = f"ran {run} {idx} {token}\n"
    if path:
        with open(path, "a") as file:
            file.write(line)
    print(line, end="", flush=True)
    time.sleep(random.random() * 0.02)
    return run, idx, token


@app.function(schedule=squall.Period(seconds=1), max_containers=1, retries=RETRIES)
def tick() -> str:
    return os.urandom(8).hex()


@app.function(max_containers=2)
def large(size: int) -> bytes:
    return bytes(size)


@app.function(max_containers=4)
def nap(seconds: float) -> str:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.005)
    return "done"
