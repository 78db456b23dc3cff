"""Functions for which very many inputs wait."""

from __future__ import annotations

import time

import squall

app = squall.App("crowds")
beside = squall.App("beside")


@app.function(max_containers=1, retries=squall.Retries(max_retries=3, initial_delay=1.0))
def crowded(seconds: float, x: int) -> int:
    print(f"ran {x}", flush=True)
    time.sleep(seconds)
    return x


@app.function(max_containers=1)
def neighbour(x: int) -> int:
    return x


@beside.function()
def elsewhere(x: int) -> int:
    return x
