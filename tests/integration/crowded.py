"""Functions that run several inputs at a time, for the tests of concurrency and batches."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator

import squall

app = squall.App("crowded")

meeting = threading.Barrier(4)


@app.function()
def square(x: int) -> int:
    return x * x


@app.function(max_containers=1)
@squall.concurrent(max_inputs=4)
def meet(x: int) -> tuple[int, str | None]:
    meeting.wait(30)
    return x, squall.current_input_id()


@app.function(max_containers=1)
@squall.concurrent(max_inputs=100)
async def rest(x: int) -> tuple[str, str | None, int]:
    before = squall.current_input_id()
    await asyncio.sleep(0.2)
    squared = await square.remote.aio(x) if x < 3 else x
    assert before == squall.current_input_id()
    return os.environ["SQUALL_TASK_ID"], before, squared


@app.function()
@squall.concurrent(max_inputs=8, target_inputs=2)
def hold(x: int) -> str:
    time.sleep(0.5)
    return os.environ["SQUALL_TASK_ID"]


@app.function(max_containers=1)
@squall.concurrent(max_inputs=3)
def spin(n: int) -> int:
    deadline = time.monotonic() + n
    while time.monotonic() < deadline:
        sum(range(100))
    return n


@app.function(max_containers=1)
@squall.concurrent(max_inputs=3)
async def nap(n: int) -> int:
    await asyncio.sleep(n)
    return n


@app.function(max_containers=1)
@squall.concurrent(max_inputs=3)
def count(n: int) -> Iterator[int]:
    yield from range(n)


@app.function(max_containers=1)
@squall.concurrent(max_inputs=3)
async def count_async(n: int) -> AsyncIterator[int]:
    for i in range(n):
        await asyncio.sleep(0)
        yield i


@app.function(max_containers=1)
@squall.concurrent(max_inputs=3)
def large(x: int) -> bytes:
    return bytes([x]) * (2 << 20)


@app.function(max_containers=1)
@squall.batched(max_batch_size=4, wait_ms=300)
def doubled(xs: list[int], ys: list[int]) -> list[object]:
    return [ValueError(f"bad {x}") if x < 0 else (2 * x + y, len(xs)) for x, y in zip(xs, ys, strict=True)]


@app.function(max_containers=1)
@squall.batched(max_batch_size=4, wait_ms=100)
async def doubled_async(xs: list[int]) -> list[int]:
    await asyncio.sleep(0)
    return [2 * x for x in xs]


@app.function(max_containers=1)
@squall.batched(max_batch_size=2, wait_ms=100)
def short(xs: list[int]) -> list[int]:
    return xs[:-1]


@app.cls(max_containers=1)
@squall.concurrent(max_inputs=4)
class Crowd:
    @squall.enter()
    async def begin(self) -> None:
        self.barrier = threading.Barrier(2)
        self.loop = asyncio.get_running_loop()

    @squall.method()
    def plain(self) -> bool:
        return self.barrier.wait(30) in (0, 1)

    @squall.method()
    async def is_same_loop(self) -> bool:
        return asyncio.get_running_loop() is self.loop

    @squall.exit()
    async def stop(self) -> None:
        print("left crowd", flush=True)


@app.cls(max_containers=1)
class Batcher:
    factor: int = squall.parameter(default=3)

    @squall.batched(max_batch_size=8, wait_ms=100)
    def multiply(self, xs: list[int]) -> list[int]:
        return [self.factor * x for x in xs]
