"""Warm calls and maps, Squall and Ray alternately in one sitting."""

from __future__ import annotations

import subprocess
import sys
import time

import squall

if squall.is_local():  # a container sees this file alone
    import common

app = squall.App("bench-calls")
ROUNDS = 3
CALLS = 2000


@app.function(cpu=0.5, memory=64)
def noop(x: object = None) -> object:
    return x


@app.function(memory=64)
def noop_many(x: object = None) -> object:
    return x


RAY = """
import sys, time, ray, json
ray.init(num_cpus=2, include_dashboard=False, logging_level='ERROR', log_to_driver=False)
@ray.remote
class Actor:
    def call(self, x=None): return x
@ray.remote
def task(x=None): return x
actor = Actor.remote(); ray.get(actor.call.remote())
ray.get([task.remote(i) for i in range(200)])
print('ready', flush=True)
for line in sys.stdin:
    case = line.strip()
    began = time.perf_counter()
    if case == 'call':
        out = []
        for _ in range(%d):
            t = time.perf_counter(); ray.get(actor.call.remote()); out.append(time.perf_counter() - t)
    elif case == 'map':
        ray.get([task.remote(i) for i in range(10000)]); out = [time.perf_counter() - began]
    elif case == 'bytes':
        data = [bytes([i %% 256]) * 100_000 for i in range(1000)]
        began = time.perf_counter()
        ray.get([task.remote(d) for d in data]); out = [time.perf_counter() - began]
    print(json.dumps(out), flush=True)
"""


class Ray:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", RAY % CALLS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        line = self._line()
        if line != "ready":
            raise RuntimeError(f"ray did not start: {line}")

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def measure(self, case: str) -> list[float]:
        import json

        assert self.process.stdin is not None
        self.process.stdin.write(case + "\n")
        self.process.stdin.flush()
        return [float(value) for value in json.loads(self._line())]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def latency() -> list[float]:
    out = []
    for _ in range(CALLS):
        began = time.perf_counter()
        noop.remote()
        out.append(time.perf_counter() - began)
    return out


def mapped() -> float:
    began = time.perf_counter()
    assert sum(noop_many.map(range(10_000))) == 49_995_000  # type: ignore[arg-type]
    return time.perf_counter() - began


def mapped_bytes() -> float:
    data = [bytes([i % 256]) * 100_000 for i in range(1000)]
    began = time.perf_counter()
    assert sum(len(value) for value in noop_many.map(data)) == 100_000_000  # type: ignore[arg-type, misc]
    return time.perf_counter() - began


def main() -> None:
    ray = None
    try:
        import ray as _ray  # noqa: F401

        ray = Ray()
    except ImportError:
        print("ray is not installed: Squall alone")
    ours: dict[str, list[float]] = {"call": [], "map": [], "bytes": []}
    theirs: dict[str, list[float]] = {"call": [], "map": [], "bytes": []}
    with common.own_home(), app.run():
        noop.remote()
        list(noop_many.map(range(500)))
        for _ in range(ROUNDS):
            ours["call"] += latency()
            if ray is not None:
                theirs["call"] += ray.measure("call")
            ours["map"].append(mapped())
            if ray is not None:
                theirs["map"] += ray.measure("map")
            ours["bytes"].append(mapped_bytes())
            if ray is not None:
                theirs["bytes"] += ray.measure("bytes")
    if ray is not None:
        ray.close()
    for name, series in (("squall .remote()", ours), ("ray actor call / tasks", theirs)):
        if series["call"]:
            common.row(f"warm call, {name}", [v * 1e6 for v in series["call"]], "us")
            common.row(f"map 10,000 no-op, {name}", [10_000 / v for v in series["map"]], "items/s")
            common.row(f"map 1,000 x 100 KB both ways, {name}", [1000 / v for v in series["bytes"]], "items/s")


if __name__ == "__main__":
    main()
