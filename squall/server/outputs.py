"""Reads the ends of spawned inputs for those who ask for them: what is asked for meanwhile shares the next query.

A result that is waited for comes from `durable` without any reading. This is for those who come later, and each by
itself would be a task for a thread and two statements. Reads the journal's rows by `journal`; knows no peer.
Tested in `tests/contract/test_outputs.py`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from squall.server.database import Database
from squall.server.journal import Wanted, find_outputs

BATCH_LIMIT = 100
"""Results of one query: each may be as large as the journal holds itself."""


class Outputs:
    def __init__(self, database: Database) -> None:
        self.database = database
        self._asked: deque[tuple[Wanted, asyncio.Future[Any]]] = deque()
        self._reading = False

    def find(self, wanted: Wanted) -> asyncio.Future[Any]:
        """Resolves to the row of an input, or what `find_outputs` has in its place; as of now, or later."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._asked.append((wanted, future))
        if not self._reading:
            self._reading = True
            loop.call_soon(self._read)
        return future

    def _read(self) -> None:
        batch = [self._asked.popleft() for _ in range(min(BATCH_LIMIT, len(self._asked)))]
        wanted = [one for one, _ in batch]
        reading = self.database.read(lambda connection: find_outputs(connection, wanted))
        reading.add_done_callback(lambda done: self._found(done, [future for _, future in batch]))

    def _found(self, done: asyncio.Future[list[Any]], futures: list[asyncio.Future[Any]]) -> None:
        self._reading = bool(self._asked)
        if self._reading:
            self._read()
        error = done.exception()
        if error is not None:
            for future in futures:
                if not future.done():
                    future.set_exception(error)
            return
        for future, row in zip(futures, done.result(), strict=True):
            if not future.done():  # who asked may be gone
                future.set_result(row)
