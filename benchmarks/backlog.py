"""What a backlog costs the server: memory, the calls that are made meanwhile, a restart with all of it waiting, and the
end of all of it: a call that is cancelled, an app that is stopped.

A second function is called all the time, one call after the other; the longest that one of these calls took is the
longest pause of the server, as somebody else feels it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import squall

if squall.is_local():  # a container sees this file alone
    import common

app, backlogged = squall.App("bench-backlog"), squall.App("bench-backlogged")
CALLS = 200
BEAT_S = 0.002
SINGLE = 2000


@backlogged.function(cpu=0.5, memory=64, max_containers=1)
def slow(x: int) -> int:
    time.sleep(3600)
    return x


@app.function(cpu=0.25, memory=64, min_containers=1)
def quick(x: int) -> int:
    return x


def rss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def warm_call_ms() -> float:
    quick.remote(0)
    return statistics.median(common.timed(lambda: quick.remote(1)) * 1000 for _ in range(CALLS))


@contextlib.contextmanager
def others(what: str) -> Iterator[None]:
    """Somebody else's calls while something goes on."""
    times: list[float] = []
    ended = threading.Event()

    def call() -> None:
        while not ended.wait(BEAT_S):
            times.append(common.timed(lambda: quick.remote(1)) * 1000)

    thread = threading.Thread(target=call)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(60)
        p50, longest = statistics.median(times or [0.0]), max(times, default=0.0)
        print(f"  {len(times)} other calls while {what}: p50 {p50:.2f} ms, max {longest:.0f} ms")


def restarted(call: squall.FunctionCall[int], count: int) -> None:
    os.kill(common.server_pid(), signal.SIGKILL)
    began = time.perf_counter()
    quick.remote(1)
    print(f"after kill -9 of the server: a call answered after {time.perf_counter() - began:.1f} s", end="")
    while slow.get_current_stats().backlog < count:
        time.sleep(0.05)
    print(f", the whole backlog queued after {time.perf_counter() - began:.1f} s")
    print(f"server memory then: {rss_mib(common.server_pid()):.0f} MiB; warm call {warm_call_ms():.2f} ms")


def cancelled(call: squall.FunctionCall[int], count: int) -> None:
    with others("it is cancelled and tidied up"):
        began = time.perf_counter()
        call.cancel()
        print(f"all of it cancelled, acknowledged in {(time.perf_counter() - began) * 1000:.0f} ms", end="")
        began = time.perf_counter()
        with contextlib.suppress(squall.exception.CancelledError):
            call.get(timeout=10, index=count - 1)
        print(f", the last one is known as cancelled {(time.perf_counter() - began) * 1000:.0f} ms later", end="")
        wait_for_disk()
        print(f", tidied up within {time.perf_counter() - began:.0f} s")
    print(f"server memory then: {rss_mib(common.server_pid()):.0f} MiB")


def wait_for_disk() -> None:
    """Until the server writes no more: it has nothing else to do."""
    path = Path(f"/proc/{common.server_pid()}/io")
    before = -1
    while (now := int(path.read_text().split("write_bytes: ")[1].split()[0])) != before:
        before = now
        time.sleep(1.0)


def spawned(count: int) -> squall.FunctionCall[int]:
    slow.spawn(0)  # loads the Store, so that its imports are not counted
    time.sleep(1)
    idle = warm_call_ms()
    pid = common.server_pid()
    before, mine = rss_mib(pid), rss_mib(os.getpid())
    with others("they are spawned"):
        began = time.perf_counter()
        call = slow.spawn_map(range(count))
        seconds = time.perf_counter() - began
    backlog = slow.get_current_stats().backlog
    now = rss_mib(pid)
    print(f"{backlog} inputs acknowledged and queued in {seconds:.1f} s ({count / seconds:.0f}/s)")
    print(f"server memory grew by {(now - before) * 1024 / backlog:.2f} KiB each, to {now:.0f} MiB", end="")
    print(f"; this program's by {rss_mib(os.getpid()) - mine:.0f} MiB")
    print(f"warm call p50: {idle:.2f} ms idle, {warm_call_ms():.2f} ms with the backlog")
    return call


def stopped(count: int) -> None:
    """As a map, which is dropped as one, and as calls of their own."""
    from squall.client import Client
    from squall.protocol.messages import StopApp

    slow.spawn_map(range(count))
    for _ in range(SINGLE):
        slow.spawn(0)
    with others("their app is stopped and they are tidied up"):
        began = time.perf_counter()
        Client.current().link.request(StopApp(str(backlogged.app_id))).wait(60)
        print(f"an app with {count} inputs of one call and {SINGLE} calls stopped in", end=" ")
        print(f"{time.perf_counter() - began:.1f} s", end="")
        wait_for_disk()
        print(f", tidied up within {time.perf_counter() - began:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=100_000)
    count = parser.parse_args().count
    os.environ["SQUALL_SPAWN_LIMIT"] = str(2 * count)
    with common.own_home() as home, app.run(detach=True), backlogged.run(detach=True):
        call = spawned(count)
        restarted(call, count)
        cancelled(call, count)
        stopped(count)
        print(f"the Store: {(home / 'state' / 'squall.db').stat().st_size >> 20} MiB")


if __name__ == "__main__":
    main()
