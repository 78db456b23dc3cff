"""`python -m squall.server`: the server of `$SQUALL_HOME`, in the foreground. With `--stay` it does not end by idleness
and listens where the setting `listen` says."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import resource
import sys

import uvloop

from squall import _linux, _observe, config
from squall.exception import Error
from squall.server.main import Server

KEEP_BYTES = 32 << 20


async def serve(stays: bool) -> None:
    settings = config.load()
    tune_collector()
    _linux.keep_memory(KEEP_BYTES)
    allow_descriptors()
    _observe.configure(settings.log_level, format=settings.log_format)
    await Server(settings, stays=stays).run()


def tune_collector() -> None:
    """Queued inputs are many, long-lived and freed by their counts: have the collector look at each twice, in steps of
    a hundred thousand, which is a pause of 25 ms (of a million it was 0.2 s), and at all of them next to never."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 1000)


def allow_descriptors() -> None:
    """A container takes one here, and the usual soft limit of 1,024 is for programs that use `select`."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS has a lower limit that it does not name
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> int:
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    try:
        asyncio.run(serve("--stay" in sys.argv[1:]))
    except Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # All is closed. To take every module apart would be a tenth of a second that the next server waits for.
    os._exit(code)
