"""HAND: what clients read of the logs: finds what is meant, and gives page after page of it.

Owns the readers of all connections. Which app, containers and times a request means is decided here, on the loop; the
looking is `reading`'s, in a thread. Output belongs to a call by where and when it was written: in the container of its
input, while that ran. Tested in `tests/integration/test_logs.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from squall.exception import InvalidError, NotFoundError, ResourceExhaustedError
from squall.protocol.messages import new_id
from squall.protocol.requests import MoreLogs, ReadLogs
from squall.server.objects import AppRecord, FunctionRecord, Scope, slots_of
from squall.server.reading import Page, Query, Reader, Windows
from squall.server.timelines import InputTimeline, parse_call

if TYPE_CHECKING:
    from squall.server.main import Server

READER_LIMIT = 32
"""Readers a connection may have."""
PAGES_AT_ONCE = 2
WAIT_LIMIT_S = 30.0
LIVE_CHECK_S = 1.0
"""How often a follower looks whether more can come at all."""
LATE_S = 1.0
"""Output comes another way than results, and may be this much later; but it is not the next input's."""
EARLY_S = 0.005


@dataclass(eq=False)
class Open:
    """A reader with what else its next page takes."""

    reader: Reader
    app_id: str
    follow: bool
    is_live: Callable[[], bool]
    """Whether more may be written."""
    windows: Callable[[], Windows] | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One page at a time."""


class Readers:
    def __init__(self, server: Server) -> None:
        self.server = server
        self._of_peer: dict[Any, dict[str, Open]] = {}
        self._pages = asyncio.Semaphore(PAGES_AT_ONCE)

    async def read(self, peer: Any, message: ReadLogs) -> None:
        opened = await self._open(message, peer.scope)
        mine = self._of_peer.setdefault(peer, {})
        if len(mine) >= READER_LIMIT:
            raise ResourceExhaustedError(f"{READER_LIMIT} readers of logs are open on this connection already")
        reader_id = new_id("rd")
        mine[reader_id] = opened
        await self._answer(peer, message.id, reader_id, opened, 0.0)

    async def more(self, peer: Any, message: MoreLogs) -> None:
        mine = self._of_peer.get(peer, {})
        opened = mine.get(message.reader)
        if opened is None:
            raise NotFoundError(f"no reader `{message.reader[:80]}`")
        if message.close:
            self._forget(peer, message.reader)
            peer.reply(message.id)
            return
        await self._answer(peer, message.id, message.reader, opened, message.wait)

    def peer_lost(self, peer: Any) -> None:
        self._of_peer.pop(peer, None)

    def _forget(self, peer: Any, reader_id: str) -> None:
        mine = self._of_peer.get(peer, {})
        mine.pop(reader_id, None)
        if not mine:
            self._of_peer.pop(peer, None)

    # -- pages

    async def _answer(self, peer: Any, request_id: int, reader_id: str, opened: Open, wait: float) -> None:
        async with opened.lock:
            page, done = await self._next_page(opened, time.monotonic() + min(max(0.0, wait), WAIT_LIMIT_S))
        if done:
            self._forget(peer, reader_id)
        rows = [[r.at, r.container_id, r.function, r.stream, len(r.data)] for r in page.entries]
        data = {"entries": rows, "done": done, "gap": page.gaps > 0, "reader": reader_id, "app_id": opened.app_id}
        peer.reply(request_id, data, b"".join(record.data for record in page.entries))

    async def _next_page(self, opened: Open, deadline: float) -> tuple[Page, bool]:
        """A page that says something, or an empty one at the deadline; and whether it is the last."""
        while True:
            written = asyncio.Event()
            self.server.logs.wake_on_append(opened.app_id, written.set)  # before reading: nothing may come between
            try:
                is_live = opened.is_live()
                page = await self._page(opened, last=not (is_live and opened.follow))
                done = page.at_end and not (is_live and opened.follow)
                left = deadline - time.monotonic()
                if page.entries or page.gaps or done or left <= 0:
                    return page, done
                if page.at_end:
                    with contextlib.suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(written.wait(), min(left, LIVE_CHECK_S))
            finally:
                self.server.logs.forget_waker(opened.app_id, written.set)

    async def _page(self, opened: Open, *, last: bool) -> Page:
        segments = self.server.logs.segments(opened.app_id)
        if opened.windows is not None:
            opened.reader.query.windows = opened.windows()
        async with self._pages:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(None, lambda: opened.reader.page(segments, last=last))

    # -- what is meant

    async def _open(self, message: ReadLogs, scope: Scope) -> Open:
        query = Query(
            "",
            since=message.since,
            until=message.until or math.inf,
            search=message.search.encode(),
            source=message.source,
            tail=message.tail,
            lines=message.lines,
        )
        query.check()
        await self.server.objects.recall()
        if message.image_id:
            image_id = self.server.builds.find(message.image_id, scope.workspace).build_id
            query.app_id = image_id
            return Open(Reader(query), image_id, message.follow, lambda: False)
        if message.call:
            return await self._open_call(message, query, scope)
        if message.container_id:
            app_id = await self._app_of_container(message.container_id, scope)
            query.app_id, query.container_id = app_id, message.container_id
            containers = self.server.reconciler.containers
            return Open(Reader(query), app_id, message.follow, lambda: message.container_id in containers)
        app, query.function = self._app_and_function(message, scope)
        query.app_id = app.app_id
        return Open(Reader(query), app.app_id, message.follow, lambda: app.state != "stopped")

    def _app_and_function(self, message: ReadLogs, scope: Scope) -> tuple[AppRecord, str]:
        objects = self.server.objects
        if not message.function:
            if not message.app:
                raise InvalidError("nothing is named whose output is wanted")
            return objects.find_app(message.app, scope), ""
        if not message.app:
            function = self._function(message.function, scope)
            return function.app, function.spec.tag
        app = objects.find_app(message.app, scope)
        tags = sorted({function.spec.tag for function in app.pools()})
        if tags and message.function not in tags:
            raise NotFoundError(
                f"app `{app.name}` has no function `{message.function[:80]}`", hint=f"functions: {', '.join(tags[:10])}"
            )
        return app, message.function

    def _function(self, function_id: str, scope: Scope) -> FunctionRecord:
        """Also of an app that has stopped."""
        for app in self.server.objects.apps.values():
            if app.scope.workspace == scope.workspace:
                for function in app.pools():
                    if function_id in (function.function_id, function.stable_id):
                        return function
        raise NotFoundError(f"no function `{function_id[:80]}`", hint="name its app, and the function as its tag")

    async def _app_of_container(self, container_id: str, scope: Scope) -> str:
        reconciler = self.server.reconciler
        record = reconciler.containers.get(container_id) or reconciler.history.get(container_id)
        if record is not None:
            app_id = record.function.app.app_id
        else:
            app_id = await self.server.metering.app_of(container_id)
        if not self._may_see(app_id, scope):
            raise NotFoundError(f"no container `{container_id[:80]}`", hint="see `squall container list --all`")
        return app_id

    def _may_see(self, app_id: str, scope: Scope) -> bool:
        app = self.server.objects.apps.get(app_id)
        return app is not None and app.scope.workspace == scope.workspace

    # -- calls

    async def _open_call(self, message: ReadLogs, query: Query, scope: Scope) -> Open:
        call_id, idx = parse_call(message.call)
        app_id = await self._app_of_call(call_id)
        if not self._may_see(app_id, scope):
            raise NotFoundError(f"no call `{call_id[:80]}`", hint="what ran when is known while the server runs")
        query.app_id = app_id
        query.windows = self._windows(call_id, idx)
        if not self._is_running(call_id, idx) and not self.server.timelines.of_call(call_id):
            raise NotFoundError(
                f"where and when call `{call_id[:80]}` ran is not known any more",
                hint="it is while the server runs; `squall app logs` has all that its app wrote",
            )
        if query.windows:
            query.since = max(query.since, min(times[0][0] for times in query.windows.values()))
        windows = (lambda: self._windows(call_id, idx)) if message.follow else None
        return Open(Reader(query), app_id, message.follow, lambda: self._is_running(call_id, idx), windows)

    async def _app_of_call(self, call_id: str) -> str:
        call = self.server.dispatch.calls.get(call_id)
        if call is not None and call.data is not None:
            return str(call.data.function.app.app_id)
        for timeline in self.server.timelines.of_call(call_id):
            reconciler, container_id = self.server.reconciler, timeline.container_id
            record = reconciler.containers.get(container_id) or reconciler.history.get(container_id)
            if record is not None:
                return record.function.app.app_id
        return await self.server.calls.app_of(call_id)

    def _is_running(self, call_id: str, idx: int | None) -> bool:
        call = self.server.dispatch.calls.get(call_id)
        return call is not None and (idx is None or idx in call.inputs)

    def _windows(self, call_id: str, idx: int | None) -> Windows:
        """When and where the inputs of a call ran, or run."""
        timelines = self.server.timelines
        done = [t for t in timelines.of_call(call_id) if idx in (None, t.idx) and t.container_id]
        found: Windows = {}
        following = self._following(done)
        for timeline in done:
            begin = timeline.started_at or timeline.pushed_at
            end = (timeline.finished_at or timeline.done_at) + LATE_S
            key = (timeline.container_id, begin)
            found.setdefault(timeline.container_id, []).append((begin - EARLY_S, min(end, following.get(key, end))))
        call = self.server.dispatch.calls.get(call_id)
        offset = self.server.calls.offset
        unfinished = {} if call is None else call.inputs if call.line is None else call.line.outside
        for number, input_ in unfinished.items():
            if idx in (None, number) and input_.container is not None:
                times = found.setdefault(input_.container.container_id, [])
                times.append((input_.pushed_at + offset - EARLY_S, math.inf))
        for times in found.values():
            times.sort()
        return found

    def _following(self, done: list[InputTimeline]) -> dict[tuple[str, float], float]:
        """Of inputs in containers that run one at a time: container and begin -> when the next one began there."""
        wanted = {timeline.container_id for timeline in done if self._slots(timeline.container_id) == 1}
        begins: dict[str, list[float]] = {container_id: [] for container_id in wanted}
        for timeline in self.server.timelines.inputs if wanted else ():
            if timeline.container_id in wanted and timeline.started_at:
                begins[timeline.container_id].append(timeline.started_at)
        found = {}
        for container_id, times in begins.items():
            times.sort()
            found.update({(container_id, one): two for one, two in itertools.pairwise(times)})
        return found

    def _slots(self, container_id: str) -> int:
        reconciler = self.server.reconciler
        record = reconciler.containers.get(container_id) or reconciler.history.get(container_id)
        return slots_of(record.function.spec) if record is not None else 0
