"""Deleting what containers left on disk, apart from the work of making containers.

A tenant decides how many files there are, so deleting has threads of its own and an end: what is not gone by then is
reported, stays where it is, and is taken up again when the next agent of this home starts. Owns nothing but those
threads; must never delete anything it was not given. Tested in `tests/kernel/test_rootfs.py`.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from squall._observe import Logger
from squall.node.rootfs import REMOVE_SECONDS, remove_tree

PATIENCE_SECONDS = 1.0
"""Nobody who waits for the end of a container waits longer than this for its files."""
CLOSE_SECONDS = 5.0

_log = Logger("removal")


class Removals:
    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(2, thread_name_prefix="squall-removal")
        self._running: set[asyncio.Future[None]] = set()
        self._end = float("inf")

    def start(self, path: Path) -> asyncio.Future[None]:
        """Begin to delete a tree. The result never fails: what could not be deleted is logged."""
        running = asyncio.get_running_loop().run_in_executor(self._executor, self._remove, path)
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        return running

    async def remove(self, path: Path) -> None:
        """Delete a tree; returns when it is gone, or while it goes on when that takes long."""
        await asyncio.wait({self.start(path)}, timeout=PATIENCE_SECONDS)

    def _remove(self, path: Path) -> None:
        try:
            remove_tree(path, min(time.monotonic() + REMOVE_SECONDS, self._end))
        except OSError as error:
            _log.error("files of a container are left until the next start", path=str(path), error=str(error))

    async def close(self) -> None:
        """Give what is under way a last moment, and what waits for its turn none."""
        self._end = time.monotonic() + CLOSE_SECONDS
        if self._running:
            await asyncio.wait(set(self._running), timeout=CLOSE_SECONDS)
        self._executor.shutdown(wait=False, cancel_futures=True)
