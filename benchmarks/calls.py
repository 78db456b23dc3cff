"""Warm calls and maps, Squall and Ray alternately in one sitting. `--only bytes --rounds 9` measures one case long."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

import squall

if squall.is_local():  # a container sees this file alone
    import common

app = squall.App("bench-calls")
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


def mapped() -> list[float]:
    began = time.perf_counter()
    assert sum(noop_many.map(range(10_000))) == 49_995_000  # type: ignore[arg-type]
    return [time.perf_counter() - began]


def mapped_bytes() -> list[float]:
    data = [bytes([i % 256]) * 100_000 for i in range(1000)]
    began = time.perf_counter()
    assert sum(len(value) for value in noop_many.map(data)) == 100_000_000  # type: ignore[arg-type, misc]
    return [time.perf_counter() - began]


CASES = {"call": latency, "map": mapped, "bytes": mapped_bytes}
ROWS = {
    "call": ("warm call", "us", lambda v: v * 1e6),
    "map": ("map 10,000 no-op", "items/s", lambda v: 10_000 / v),
    "bytes": ("map 1,000 x 100 KB both ways", "items/s", lambda v: 1000 / v),
}


def measure(ray: Ray | None, cases: list[str], rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """Squall's times and Ray's of each case, in turns."""
    times: dict[str, tuple[list[float], list[float]]] = {case: ([], []) for case in cases}
    for _ in range(rounds):
        for case, (ours, theirs) in times.items():
            ours += CASES[case]()
            if ray is not None:
                theirs += ray.measure(case)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=CASES, action="append", help="a case; without, all of them")
    asked = parser.parse_args()
    ray = None
    try:
        import ray as _ray  # noqa: F401

        ray = Ray()
    except ImportError:
        print("ray is not installed: Squall alone")
    with common.own_home(), app.run():
        noop.remote()
        list(noop_many.map(range(500)))
        times = measure(ray, asked.only or list(CASES), asked.rounds)
    if ray is not None:
        ray.close()
    for case, (ours, theirs) in times.items():
        name, unit, shown = ROWS[case]
        for who, series in (("squall", ours), ("ray actor call" if case == "call" else "ray tasks", theirs)):
            if series:
                common.row(f"{name}, {who}", [shown(value) for value in series], unit)


if __name__ == "__main__":
    main()
