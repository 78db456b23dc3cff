"""Functions that go wrong in every way there is, for the tests of faults; imported here and in containers."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import squall

app = squall.App("faulty")


@app.function()
def square(x: int) -> int:
    return x * x


@app.function()
def neighbour(x: int) -> int:
    return x + 1


@app.function(max_containers=4)
def slowly(x: int, seconds: float = 0.05) -> int:
    time.sleep(seconds)
    return x * x


@app.function()
def die(how: str) -> None:
    """End this container in the given way."""
    if how == "exit":
        os._exit(3)
    if how == "segfault":
        ctypes.string_at(0)
    if how == "abort":
        os.abort()
    if how == "sys.exit":
        sys.exit(5)


@app.function(memory=(64, 96))
def hoard(mib: int) -> int:
    """Hold so much memory."""
    return len(bytearray(os.urandom(1 << 20)) * mib) >> 20


@app.function(single_use_containers=True)
def fresh(x: int) -> int:
    return x + 1


@app.function(cpu=(0.1, 0.5))
def bomb() -> int:
    """Fork until the kernel refuses."""
    children = 0
    print("lit", flush=True)
    while True:
        try:
            pid = os.fork()
        except OSError:
            return children
        if pid == 0:
            signal.pause()
        children += 1


@app.function(timeout=1)
def spin() -> None:
    while True:
        pass


@app.function(timeout=1)
def hold_the_interpreter() -> None:
    """A loop in C that never gives up the interpreter's lock."""
    sum(iter(int, 1))


stubborn = squall.App("stubborn")


@stubborn.function()
def deaf(seconds: float = 600) -> None:
    """Ignore what asks to end politely."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("deaf", flush=True)
    while seconds > 0:
        time.sleep(0.1)
        seconds -= 0.1


@app.function(max_containers=1)
def flood(size: int, line: int = 80) -> int:
    block = (b"x" * (line - 1) + b"\n") * max(1, (1 << 16) // line)
    left = size
    while left > 0:
        left -= os.write(1, block[:left])
    return size


@app.function()
def write(data: bytes, times: int = 1) -> None:
    """Write raw bytes to stdout."""
    for _ in range(times):
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(1, rest) :]


@app.function(max_containers=3)
def poisonous(x: int) -> int:
    if x == 50:
        os._exit(9)
    return x


@app.function(retries=squall.Retries(max_retries=3, backoff_coefficient=2.0, initial_delay=0.2))
def fail_and_tell() -> None:
    print(time.monotonic(), flush=True)
    raise ValueError("again")


@app.function(retries=squall.Retries(max_retries=2, initial_delay=0.0))
def exit_and_tell() -> None:
    print("attempt", flush=True)
    os._exit(4)


@app.function(max_containers=4)
def cancellable(seconds: float) -> str:
    """Sleep in one of the ways a program may."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)
    return "done"


@app.function()
async def cancellable_async(seconds: float) -> str:
    import asyncio

    await asyncio.sleep(seconds)
    return "done"


@app.function()
def leave_threads() -> int:
    """Threads that go on do not keep the function from ending."""
    for _ in range(5):
        threading.Thread(target=time.sleep, args=(600,)).start()
    return threading.active_count()


@app.function()
def yields_then_dies(n: int) -> Iterator[int]:
    print("attempt", flush=True)
    yield from range(n)
    os._exit(6)
