"""Many containers at once: 100 asked for together, each answered; 1,000 alive; their memory; all gone again."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from pathlib import Path

import squall

if squall.is_local():  # a container sees this file alone
    import common

app = squall.App("bench-fleet")
LIVE = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
PAUSE_S = 4.0
"""Between turns: the kernel takes down a hundred network namespaces of either side for seconds after their end."""


@app.function(single_use_containers=True, cpu=0.001, memory=1)
def one(i: int) -> int:
    return i


@app.function(cpu=0.001, memory=1, scaledown_window=300, max_containers=max(LIVE, 1))
def hold(i: int) -> int:
    time.sleep(600)
    return i


def crun_hundred(crun: common.Crun) -> float:
    began = time.perf_counter()
    running = [crun.start() for _ in range(100)]
    for process in running:
        crun.finish(process)
    return time.perf_counter() - began


def pss_mib(pids: list[int]) -> float:
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
    return total / 1024


def container_pids(server: int) -> list[int]:
    """Every process below the server but the agent's own and the zygote: the containers' inits and runners."""
    children: dict[int, list[int]] = {}
    uids: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                status = (entry / "status").read_text()
                fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
                children.setdefault(int(fields["PPid"]), []).append(int(entry.name))
                uids[int(entry.name)] = int(fields["Uid"].split()[0])
    found, pending = [], [server]
    while pending:
        for child in children.get(pending.pop(), []):
            pending.append(child)
            if uids.get(child, 0) != os.getuid():
                found.append(child)
    return found


def consume(count: int) -> None:
    with contextlib.suppress(squall.Error):  # the app ends first
        list(hold.map(range(count)))


def live(count: int) -> None:
    began = time.perf_counter()
    threading.Thread(target=consume, args=(count,), daemon=True).start()
    alive = 0
    while alive < count and time.perf_counter() - began < 240:
        time.sleep(0.1)
        alive = hold.get_current_stats().num_running_inputs
    print(f"0 to {alive} live containers: {time.perf_counter() - began:.2f} s")
    pids = container_pids(common.server_pid())
    print(f"{alive} live containers: {pss_mib(pids) / max(1, alive):.2f} MiB of PSS each ({len(pids)} processes)")


def main() -> None:
    with common.own_home(), common.crun_or_none() as crun:
        with app.run():
            one.remote(0)
            ours, theirs = [], []
            for _ in range(int(os.environ.get("ROUNDS", "5"))):
                ours.append(common.timed(lambda: list(one.map(range(100)))))
                time.sleep(PAUSE_S)
                if crun is not None:
                    theirs.append(crun_hundred(crun))
                    time.sleep(PAUSE_S)
            common.row("100 containers at once, each answered, wall", ours, "s")
            if theirs:
                common.row("crun run, 100 at once, wall", theirs, "s")
            if LIVE:
                live(LIVE)
            began = time.perf_counter()
        print(f"end of the app with its containers: {time.perf_counter() - began:.2f} s")


if __name__ == "__main__":
    main()
