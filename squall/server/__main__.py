"""`python -m squall.server`: the server of `$SQUALL_HOME`, in the foreground."""

from __future__ import annotations

import asyncio
import gc
import sys

import uvloop

from squall import _observe, config
from squall.exception import Error
from squall.server.main import Server


async def serve() -> None:
    settings = config.load()
    tune_collector()
    _observe.configure(settings.log_level, format=settings.log_format)
    await Server(settings).run()


def tune_collector() -> None:
    """Queued inputs are many, long-lived and without cycles: have the collector look at them rarely."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def main() -> int:
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    try:
        asyncio.run(serve())
    except Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
