"""Calls from async code: every method has an async twin under `.aio`, and an entrypoint may be async itself.

squall run examples/async_calls.py --seconds 0.5
"""

import asyncio
import time

import squall

app = squall.App("async-calls")


@app.function()
async def wait(seconds: float) -> float:
    """An async function in a container; its event loop is there, not here."""
    began = time.monotonic()
    await asyncio.sleep(seconds)
    return time.monotonic() - began


@app.local_entrypoint()
async def main(seconds: float = 0.5) -> None:
    began = time.monotonic()
    waited = await asyncio.gather(*[wait.remote.aio(seconds) for _ in range(4)])
    print(f"four calls waited {sum(waited):.1f} s in all, and took {time.monotonic() - began:.1f} s")
    async for value in wait.map.aio([seconds / 4, seconds / 2]):
        print(f"one more waited {value:.2f} s")
