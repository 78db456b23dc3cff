"""What a queued input costs the server: its memory with 100,000 inputs waiting."""

from __future__ import annotations

import time
from pathlib import Path

import squall

if squall.is_local():  # a container sees this file alone
    import common

app = squall.App("bench-backlog")
COUNT = 100_000


@app.function(cpu=0.5, memory=64, max_containers=1)
def slow(x: int) -> int:
    time.sleep(3600)
    return x


def rss_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    return 0


def main() -> None:
    with common.own_home(), app.run():
        slow.spawn(0)  # loads the store, so that its imports are not counted
        time.sleep(1)
        pid = common.server_pid()
        before = rss_kib(pid)
        began = time.perf_counter()
        slow.spawn_map(range(COUNT))
        seconds = time.perf_counter() - began
        backlog = slow.get_current_stats().backlog
        grown = rss_kib(pid) - before
        print(f"{backlog} inputs acknowledged and queued in {seconds:.1f} s ({COUNT / seconds:.0f}/s)")
        print(f"server memory grew by {grown / backlog:.2f} KiB each, to {rss_kib(pid) / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
