"""Cold start: `.remote()` with no container of the function alive, against `crun run` of `python3 -c pass`."""

from __future__ import annotations

import time
from pathlib import Path

import squall

if squall.is_local():  # a container sees this file alone
    import common

app = squall.App("bench-cold")
ROUNDS = 60


@app.function(single_use_containers=True, cpu=0.1, memory=64)
def one() -> int:
    return 1


def wait_gone() -> None:
    while one.get_current_stats().num_total_runners:
        time.sleep(0.005)
    time.sleep(0.05)


def squall_call() -> float:
    wait_gone()
    return common.timed(one.remote) * 1000


def main() -> None:
    with common.own_home(), common.crun_or_none() as crun:
        began = time.perf_counter()
        with app.run():
            first = (time.perf_counter() - began) * 1000
            call = common.timed(one.remote) * 1000
            print(f"no server running: {first:.0f} ms to a running app, {call:.0f} ms more to the first result")
            ours, theirs = [], []
            for _ in range(ROUNDS):
                ours.append(squall_call())
                if crun is not None:
                    theirs.append(common.timed(crun.run) * 1000)
            common.row("cold start, zygote warm, .remote() to result", ours, "ms")
            if theirs:
                common.row("crun run python3 -c pass, same root", theirs, "ms")
            no_zygote = []
            for _ in range(10):
                wait_gone()
                if not kill_zygotes():
                    break
                no_zygote.append(common.timed(one.remote) * 1000)
            if no_zygote:
                common.row("cold start, no zygote alive", no_zygote, "ms")


def kill_zygotes() -> bool:
    """End the zygotes of this home from outside, as memory pressure would."""
    import os
    import signal

    found = False
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                home = Path(f"/proc/{parent}/environ").read_bytes()
            except (OSError, ValueError):
                continue
            if b"zygote" in command and os.environ["SQUALL_HOME"].encode() in home:
                os.kill(int(entry.name), signal.SIGKILL)
                found = True
    time.sleep(0.2)
    return found


if __name__ == "__main__":
    main()
