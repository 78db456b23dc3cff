"""A server whose nodes are started by somebody else, and what runs on them. `python -m tests.faults.apart` serves."""

from __future__ import annotations

import asyncio
import os
import time

import uvloop

import squall
from squall import _observe, config
from squall.engines.provider import NodeProvider
from squall.server.main import Server

app = squall.App("apart")


@app.function(max_containers=8)
def hold(notes: str, x: int, until: str) -> tuple[int, str]:
    """Note each execution, and end once the file `until` is there."""
    token = os.urandom(8).hex()
    with open(notes, "a") as file:
        file.write(f"ran {x} {token}\n")
    while until and not os.path.exists(until):
        time.sleep(0.02)
    with open(notes, "a") as file:
        file.write(f"done {x} {token}\n")
    return x, token


class Elsewhere(NodeProvider):
    """Nodes that come by themselves, and of which nothing is known but what they say."""

    def start(self) -> None: ...

    def listening(self) -> None: ...

    def registered(self) -> None: ...

    def lost(self) -> None: ...

    async def stop(self) -> None: ...

    async def withdraw(self) -> None: ...


async def serve() -> None:
    settings = config.load()
    _observe.configure(settings.log_level, format=settings.log_format)
    server = Server(settings, stays=True)
    server.provider = Elsewhere()
    await server.run()


if __name__ == "__main__":
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    asyncio.run(serve())
