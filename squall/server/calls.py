"""Calls: inputs on their way in, results on their way out, and the journal of spawned calls.

A result goes to the connection that waits for it, at once, or into the Store when the call was spawned. A spawned
input is on disk before it is acknowledged, its result before anybody is told of it; results are kept 7 days. What a
call's caller sees of an input happens in this file alone, once. Tested in `tests/integration/test_spawn.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from squall._observe import Logger
from squall.exception import InvalidError, NotFoundError, OutputExpiredError
from squall.protocol.messages import CancelCall, GetCall, GetOutput, OutputItem, Submit, split_payload
from squall.protocol.messages import to_dict as message_dict
from squall.server.database import Database
from squall.server.dispatch import Call, Dispatch, Finish, Input
from squall.server.objects import FunctionRecord, Objects, has_ended
from squall.server.timelines import InputTimeline, Timelines
from squall.server.wire import check_id, output_head
from squall.storage.blobs import check_digest

log = Logger("server")

RESULT_DAYS = 7
RESULT_COLUMNS = ("result", "result_blob", "status", "message", "hint", "finished_at")
STORE_RETRY_S = 1.0
UNREAD_RESULTS_BYTES = 1 << 30
"""More than the SDK ever lets wait: it reads whether its user takes the results or not."""
IDX_LIMIT = 1 << 31
WAIT_LIMIT = RESULT_DAYS * 86400.0
Payload = bytes | str
"""An input's or output's bytes, or the digest of the blob that holds them."""


class CallInfo:
    """What the hand remembers of a call, in `Call.data`."""

    __slots__ = ("function", "method", "parent", "sent_at")

    def __init__(self, function: FunctionRecord, sent_at: float, parent: str, method: str) -> None:
        self.function = function
        self.method = method
        self.sent_at = sent_at
        self.parent = parent


class Result:
    """What a runner said of an input; travels through dispatch as its opaque `output`."""

    __slots__ = ("container_id", "data", "finished_at", "started_at")

    def __init__(self, data: Payload, container_id: str, started_at: float, finished_at: float) -> None:
        self.data = data
        self.container_id = container_id
        self.started_at = started_at
        self.finished_at = finished_at


class Calls:
    def __init__(self, dispatch: Dispatch, objects: Objects, database: Database, timelines: Timelines) -> None:
        self.dispatch = dispatch
        self.objects = objects
        self.database = database
        self.timelines = timelines
        self.apply: Callable[[list[Any]], None]
        """Set by `main`: carries out dispatch's instructions."""
        self.offset = time.time() - time.monotonic()
        """Added to a brain's monotonic moment it gives wall-clock time."""
        self._waiting: dict[tuple[str, int], list[asyncio.Future[None]]] = {}
        self._results: list[dict[str, Any]] = []
        """Of spawned inputs, not handed to the Store yet."""

    # -- in

    def submit(self, peer: Any, message: Submit, payload: bytes) -> None:
        """Accept the inputs of a connection. Raises for what cannot be accepted."""
        parts = split_payload(message.items, payload)
        check_id(message.call_id, "fc")
        function = self.objects.function(message.function_id, peer.scope)
        check_method(function, message.method)
        if function.app.state != "running":
            raise has_ended(function)
        items: list[tuple[int, Payload]] = []
        for item, part in zip(message.items, parts, strict=True):
            if not 0 <= item.idx < IDX_LIMIT:
                raise InvalidError(f"input index {item.idx} of call `{message.call_id}` is out of range")
            items.append((item.idx, check_digest(item.blob) if item.blob else part))
        call = self.dispatch.calls.get(message.call_id)
        if call is not None and (call.owner not in (peer, None) or not _is_of(call, function)):
            raise InvalidError(f"call `{message.call_id}` belongs to another caller or function")
        if message.kind == "spawn":
            self._journal(peer, message, function, items)
        else:
            self._enqueue(message, function, items, peer)
            if message.id:
                peer.reply(message.id)

    def _enqueue(self, message: Submit, function: FunctionRecord, items: list[Any], owner: Any) -> None:
        instructions = self.dispatch.submit(
            time.monotonic(), message.call_id, function.function_id, items, message.kind, owner, message.last
        )
        call = self.dispatch.calls.get(message.call_id)
        if call is not None and call.data is None:
            call.data = CallInfo(function, message.sent_at, message.parent, message.method)
        self.apply(instructions)

    def _journal(self, peer: Any, message: Submit, function: FunctionRecord, items: list[Any]) -> None:
        call_row = {
            "call_id": message.call_id,
            "function_id": message.function_id,
            "app_id": function.app.app_id,
            "created_at": time.time(),
        }
        rows = [{"call_id": message.call_id, "idx": idx, **_columns("args", data)} for idx, data in items]

        def work(connection: Any) -> list[int]:
            from squall.server import tables

            return _insert_call(connection, tables, call_row, rows)

        future = self.database.write(work)
        future.add_done_callback(lambda done: self._journalled(done, peer, message, function, items))

    def _journalled(
        self, done: asyncio.Future[list[int]], peer: Any, message: Submit, function: FunctionRecord, items: list[Any]
    ) -> None:
        error = done.exception()
        if error is not None:
            peer.refuse(message.id, error)
            return
        fresh = set(done.result())
        self._enqueue(message, function, [item for item in items if item[0] in fresh], None)
        peer.reply(message.id)

    # -- out

    def finish(self, instruction: Finish) -> None:
        """Carry one ended input to whoever waits for it."""
        input_ = instruction.input
        call = input_.call
        result: Result | None = instruction.output
        data: Payload = b"" if result is None else result.data
        self._record(input_, call, instruction.status, result)
        input_.payload = None  # a cancelled input stays in its queue until it is reached
        if call.kind == "spawn":
            self._store(call, input_.idx, instruction, data)
        elif call.owner is not None:
            size, blob = (0, data) if isinstance(data, str) else (len(data), "")
            head = output_head(
                call.call_id, input_.idx, instruction.status, size, blob, 0, instruction.message, instruction.hint
            )
            _give(call.owner, head, b"" if isinstance(data, str) else data)

    def give_yield(self, call: Call, item: OutputItem, data: Payload) -> None:
        """One value of a generator."""
        if call.owner is None:
            return
        size, blob = (0, data) if isinstance(data, str) else (len(data), "")
        head = output_head(call.call_id, item.idx, "yield", size, blob, item.seq, "", "")
        _give(call.owner, head, b"" if isinstance(data, str) else data)

    def _record(self, input_: Input, call: Call, status: str, result: Result | None) -> None:
        info: CallInfo | None = call.data
        offset = self.offset
        started, finished, container_id = (
            (result.started_at, result.finished_at, result.container_id) if result else (0.0, 0.0, "")
        )
        self.timelines.inputs.append(
            InputTimeline(
                call.call_id,
                input_.idx,
                title_of(info) if info else "",
                call.kind,
                status,
                input_.attempt,
                info.sent_at if info and not input_.idx else 0.0,
                input_.queued_at + offset,
                input_.pushed_at + offset if input_.pushed_at else 0.0,
                started,
                finished,
                time.monotonic() + offset,
                container_id,
                info.function.stable_id if info else "",
            )
        )

    # -- spawned calls

    def _store(self, call: Call, idx: int, instruction: Finish, data: Payload) -> None:
        """One row; those of one turn of the loop are one write, as the end of an app may end a million inputs."""
        if not self._results:
            asyncio.get_running_loop().call_soon(self._write_results)
        self._results.append(
            {
                **_columns("result", data),
                "status": instruction.status,
                "message": instruction.message,
                "hint": instruction.hint,
                "finished_at": time.time(),
                "of_call": call.call_id,
                "of_idx": idx,
            }
        )

    def _write_results(self) -> None:
        rows, self._results = self._results, []

        def work(connection: Any) -> None:
            import sqlalchemy as sa

            from squall.server import tables

            table = tables.inputs
            mine = (table.c.call_id == sa.bindparam("of_call")) & (table.c.idx == sa.bindparam("of_idx"))
            columns: dict[str, Any] = {name: sa.bindparam(name) for name in RESULT_COLUMNS}
            connection.execute(table.update().where(mine & table.c.status.is_(None)).values(columns), rows)

        if rows:
            self.database.write(work).add_done_callback(lambda done: self._stored(done, rows))

    def _stored(self, done: asyncio.Future[None], rows: list[dict[str, Any]]) -> None:
        error = done.exception()
        if error is not None:  # a full disk: what was promised to be kept is kept here until there is room
            log.error("results could not be stored and are tried again", results=len(rows), error=str(error))
            self._results += rows
            asyncio.get_running_loop().call_later(STORE_RETRY_S, self._write_results)
            return
        if not self._waiting:
            return
        for row in rows:
            for waiter in self._waiting.pop((row["of_call"], row["of_idx"]), []):
                if not waiter.done():
                    waiter.set_result(None)

    async def get_output(self, peer: Any, message: GetOutput) -> None:
        """Answer with the output once it is there, or with `ready: false` when the time is up."""
        key = (check_id(message.call_id, "fc"), message.idx)
        if not 0 <= message.idx < IDX_LIMIT:
            raise NotFoundError(f"call `{message.call_id}` has no input {message.idx}")
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, []).append(waiter)
        try:
            item, data = await self._read_output(*key)
            if item is None and message.timeout != 0:
                await asyncio.wait([waiter], timeout=min(message.timeout, WAIT_LIMIT) if message.timeout > 0 else None)
                item, data = await self._read_output(*key)
        finally:
            self._forget_waiter(key, waiter)
        if item is None:
            peer.reply(message.id, {"ready": False})
        else:
            peer.reply(message.id, {"ready": True, "item": message_dict(item)}, data)

    def _forget_waiter(self, key: tuple[str, int], waiter: asyncio.Future[None]) -> None:
        waiters = self._waiting.get(key)
        if waiters and waiter in waiters:
            waiters.remove(waiter)
            if not waiters:
                del self._waiting[key]

    async def _read_output(self, call_id: str, idx: int) -> tuple[OutputItem | None, bytes]:
        def work(connection: Any) -> Any:
            from squall.server import tables

            table = tables.inputs
            row = connection.execute(table.select().where((table.c.call_id == call_id) & (table.c.idx == idx))).first()
            if row is None:
                known = tables.calls
                return None if connection.execute(known.select().where(known.c.call_id == call_id)).first() else False
            return row

        row = await self.database.read(work)
        if row is False:
            raise NotFoundError(f"no spawned call `{call_id}`", hint="results are kept for 7 days")
        if row is None:
            raise NotFoundError(f"call `{call_id}` has no input {idx}")
        if row.status is None:
            return None, b""
        if row.status == "expired":
            raise OutputExpiredError(f"the result of `{call_id}` was kept for {RESULT_DAYS} days and is gone")
        data = row.result or b""
        item = OutputItem(call_id, idx, row.status, len(data), row.result_blob or "")
        item.message, item.hint = row.message or "", row.hint or ""
        return item, data

    async def get_call(self, peer: Any, message: GetCall) -> None:
        call_id = check_id(message.call_id, "fc")

        def work(connection: Any) -> Any:
            import sqlalchemy as sa

            from squall.server import tables

            row = connection.execute(tables.calls.select().where(tables.calls.c.call_id == call_id)).first()
            if row is None:
                return None
            inputs = tables.inputs
            counted = sa.select(inputs.c.status, sa.func.count()).where(inputs.c.call_id == call_id)
            return row, connection.execute(counted.group_by(inputs.c.status)).all()

        found = await self.database.read(work)
        if found is None:
            raise NotFoundError(f"no spawned call `{call_id}`")
        row, counts = found
        by_status = {status or "pending": n for status, n in counts}
        data = {"call_id": call_id, "function_id": row.function_id, "app_id": row.app_id, "kind": "spawn"}
        peer.reply(
            message.id,
            {**data, "created_at": row.created_at, "num_inputs": sum(by_status.values()), "counts": by_status},
        )

    def close_stale(self, started_at: float, now_wall: float) -> None:
        """Unfinished spawned inputs of an earlier server, whose app ended with it; and results past their days."""

        def work(connection: Any) -> None:
            from squall.server import tables

            table = tables.inputs
            lost = {
                "status": "lost",
                "message": "the server that ran it ended first",
                "hint": "spawn it again",
                "finished_at": now_wall,
            }
            earlier = tables.calls.select().with_only_columns(tables.calls.c.call_id)
            earlier = earlier.where(tables.calls.c.created_at < started_at)
            unfinished = table.c.status.is_(None) & table.c.call_id.in_(earlier)
            connection.execute(table.update().where(unfinished).values(lost))
            old = (table.c.finished_at < now_wall - RESULT_DAYS * 86400) & (table.c.status != "expired")
            gone = {"status": "expired", "result": None, "result_blob": None, "args": None, "args_blob": None}
            connection.execute(table.update().where(old).values(gone))

        self.database.write_soon(work)

    def cancel(self, peer: Any, message: CancelCall) -> None:
        check_id(message.call_id, "fc")
        call = self.dispatch.calls.get(message.call_id)
        if call is not None and call.owner not in (peer, None):
            raise InvalidError(f"call `{message.call_id}` belongs to another caller")
        before = len(call.inputs) if call is not None else 0
        idxs = message.idxs or None
        self.apply(
            self.dispatch.cancel(
                time.monotonic(), message.call_id, idxs, "cancelled by the caller", message.terminate_containers
            )
        )
        if message.id:
            peer.reply(message.id, {"cancelled": len(idxs) if idxs else before})


def _is_of(call: Call, function: FunctionRecord) -> bool:
    """Whether the call is one of the function's, in whatever version of it."""
    info: CallInfo | None = call.data
    return info is None or info.function.stable_id == function.stable_id


def check_method(function: FunctionRecord, method: str) -> None:
    """An input of a class names one of its methods, one of a function none."""
    spec = function.spec
    if spec.parameters and function.root is None:
        raise InvalidError(f"class `{spec.tag}` has parameters, its inputs go to an instance of it")
    if (method in spec.methods) if spec.methods else not method:
        return
    what = f"has no method `{method[:80]}`" if method else "is a class, and an input names one of its methods"
    raise InvalidError(f"`{spec.tag}` {what}", hint=f"methods: {', '.join(spec.methods)}" if spec.methods else "")


def title_of(info: CallInfo) -> str:
    """What a call calls, as its caller writes it."""
    return f"{info.function.spec.tag}.{info.method}" if info.method else info.function.spec.tag


def _give(owner: Any, head: str, data: bytes) -> None:
    """Send a result to its caller; one that never reads is left, before what waits for it fills the memory."""
    owner.outbox.add(head, data)
    stream = owner.stream
    if stream.paused and stream.waiting_bytes() > UNREAD_RESULTS_BYTES:
        stream.abort(f"it left {UNREAD_RESULTS_BYTES >> 20} MiB of results unread")


def _columns(prefix: str, data: Payload) -> dict[str, Any]:
    if isinstance(data, str):
        return {prefix: None, f"{prefix}_blob": data}
    return {prefix: data, f"{prefix}_blob": None}


def _insert_call(connection: Any, tables: Any, call_row: dict[str, Any], rows: list[dict[str, Any]]) -> list[int]:
    """Insert what is not there yet; the indexes that were new. A client may repeat a submit it has no answer to."""
    calls, inputs = tables.calls, tables.inputs
    call_id = call_row["call_id"]
    known = connection.execute(calls.select().where(calls.c.call_id == call_id)).first()
    have: set[int] = set()
    if known is None:
        connection.execute(calls.insert(), call_row)
    else:
        if known.function_id != call_row["function_id"]:
            raise InvalidError(f"call `{call_id}` belongs to another function")
        wanted = [row["idx"] for row in rows]
        for start in range(0, len(wanted), 500):
            some = inputs.c.idx.in_(wanted[start : start + 500])
            query = inputs.select().with_only_columns(inputs.c.idx).where((inputs.c.call_id == call_id) & some)
            have.update(row.idx for row in connection.execute(query))
    fresh = [row for row in rows if row["idx"] not in have]
    if fresh:
        connection.execute(inputs.insert(), fresh)
    return [row["idx"] for row in fresh]
