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
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import squall

if squall.is_local():  # a container sees this file alone
    import common
    import spawn

app, backlogged = squall.App("bench-backlog-beside"), squall.App("bench-backlog")
CALLS = 200
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


CALLER = """
import os, statistics, sys, time
import squall
from squall.client import Client

quick = squall.Function.from_name("bench-backlog-beside", "quick")
times = []
print("ready", quick.remote(0), flush=True)
while not os.path.exists(sys.argv[1]):
    time.sleep(0.002)
    began = time.perf_counter()
    quick.remote(1)
    times.append((time.perf_counter() - began) * 1000)
times.sort()
print(f"{len(times)} p50 {statistics.median(times):.2f} p99 {times[int(len(times) * 0.99)]:.1f} max {times[-1]:.0f} ms")
"""


@contextlib.contextmanager
def others(what: str) -> Iterator[None]:
    """Somebody else's calls while something goes on, from a program of their own."""
    with tempfile.TemporaryDirectory() as directory:
        end = Path(directory, "end")
        command = [sys.executable, "-c", CALLER, str(end)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as caller:
            assert caller.stdout is not None
            caller.stdout.readline()
            try:
                yield
            finally:
                end.touch()
                print(f"  other calls while {what}: {caller.stdout.read().strip()}")


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
        wait_until_idle()
        print(f", tidied up within {time.perf_counter() - began:.0f} s")
    print(f"server memory then: {rss_mib(common.server_pid()):.0f} MiB")


def wait_until_idle() -> None:
    """Until the server has done little for three seconds: somebody else's calls are a tenth of a processor."""
    path = Path(f"/proc/{common.server_pid()}/stat")
    tick, spent, quiet = os.sysconf("SC_CLK_TCK"), -1e9, 0
    while quiet < 3:
        fields = path.read_text().rpartition(")")[2].split()
        now = (int(fields[11]) + int(fields[12])) / tick
        quiet = quiet + 1 if now - spent < 0.35 else 0
        spent = now
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
        wait_until_idle()
        print(f", tidied up within {time.perf_counter() - began:.0f} s")


def measure(count: int, home: Path) -> None:
    app.deploy()
    with backlogged.run(detach=True):
        call = spawned(count)
        restarted(call, count)
        cancelled(call, count)
        stopped(count)
    path = home / "state" / "squall.db"
    if path.exists():
        print(f"the Store: {path.stat().st_size >> 20} MiB")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    options = parser.parse_args()
    os.environ["SQUALL_SPAWN_LIMIT"] = str(2 * options.count)
    with contextlib.ExitStack() as stack:
        if options.database == "postgresql":
            os.environ["SQUALL_DATABASE_URL"] = stack.enter_context(spawn.postgres())
        measure(options.count, stack.enter_context(common.own_home()))


if __name__ == "__main__":
    main()
