"""What a queued input costs the server: memory at 100,000 inputs waiting."""

from __future__ import annotations

import threading
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
        pid = common.server_pid()
        time.sleep(5)  # the store's imports are done by then
        before = rss_kib(pid)
        began = time.perf_counter()
        thread = threading.Thread(target=lambda: slow.spawn_map(range(COUNT)), daemon=True)
        thread.start()
        thread.join(120)
        while slow.get_current_stats().backlog < COUNT - 1 and time.perf_counter() - began < 120:
            time.sleep(0.1)
        backlog = slow.get_current_stats().backlog
        grown = rss_kib(pid) - before
        print(f"{backlog} queued inputs in {time.perf_counter() - began:.1f} s: {grown / backlog:.2f} KiB of server memory each")


if __name__ == "__main__":
    main()
