"""What a backlog costs the server: memory, the calls that are made meanwhile, and a restart with all of it waiting."""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import time
from pathlib import Path

import squall

if squall.is_local():  # a container sees this file alone
    import common

app = squall.App("bench-backlog")
CALLS = 200


@app.function(cpu=0.5, memory=64, max_containers=1)
def slow(x: int) -> int:
    time.sleep(3600)
    return x


@app.function(cpu=0.25, memory=64, min_containers=1)
def quick(x: int) -> int:
    return x


def rss_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    return 0


def warm_call_ms() -> float:
    quick.remote(0)
    return statistics.median(common.timed(lambda: quick.remote(1)) * 1000 for _ in range(CALLS))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=100_000)
    count = parser.parse_args().count
    with common.own_home(), app.run(detach=True):
        slow.spawn(0)  # loads the store, so that its imports are not counted
        time.sleep(1)
        idle = warm_call_ms()
        pid = common.server_pid()
        before = rss_kib(pid)
        began = time.perf_counter()
        call = slow.spawn_map(range(count))
        seconds = time.perf_counter() - began
        backlog = slow.get_current_stats().backlog
        grown = rss_kib(pid) - before
        print(f"{backlog} inputs acknowledged and queued in {seconds:.1f} s ({count / seconds:.0f}/s)")
        print(f"server memory grew by {grown / backlog:.2f} KiB each, to {rss_kib(pid) / 1024:.0f} MiB")
        print(f"warm call p50: {idle:.2f} ms idle, {warm_call_ms():.2f} ms with the backlog")
        os.kill(pid, signal.SIGKILL)
        began = time.perf_counter()
        quick.remote(1)
        print(f"after kill -9 of the server: a call answered after {time.perf_counter() - began:.1f} s", end="")
        while slow.get_current_stats().backlog < count:
            time.sleep(0.05)
        print(f", the whole backlog queued after {time.perf_counter() - began:.1f} s")
        print(f"server memory then: {rss_kib(common.server_pid()) / 1024:.0f} MiB; warm call {warm_call_ms():.2f} ms")
        began = time.perf_counter()
        call.cancel()
        print(f"all of it cancelled, acknowledged in {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
