"""Calls: inputs on their way in, results on their way out, and who waits for them.

A result goes to the connection that waits for it, at once, or by `durable` into the journal when the call was spawned.
What a call's caller sees of an input happens in this file alone, once.
Tested in `tests/integration/test_spawn.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from itertools import islice
from typing import Any

from squall._clock import SystemClock
from squall._observe import Logger
from squall.exception import (
    Error,
    InvalidError,
    NotFoundError,
    OutputExpiredError,
    ResourceExhaustedError,
    ServiceError,
)
from squall.protocol.messages import CancelCall, GetCall, GetOutput, OutputItem, Submit, split_payload
from squall.protocol.messages import to_dict as message_dict
from squall.server import journal
from squall.server.database import Database
from squall.server.dispatch import Call, Dispatch, Finish, Input
from squall.server.durable import Cancel, Durable
from squall.server.inputs import Dropped, Retried
from squall.server.journal import RESULT_DAYS, Added, Entry, Journal, KeptCall, Payload, Row, Wanted
from squall.server.objects import MAIN, FunctionRecord, Objects, has_ended
from squall.server.outputs import Outputs
from squall.server.timelines import InputTimeline, Timelines, parse_call
from squall.server.wire import check_id, output_head
from squall.storage.blobs import check_digest

log = Logger("server")

UNREAD_RESULTS_BYTES = 1 << 30
"""More than the SDK ever lets wait: it reads whether its user takes the results or not."""
IDX_LIMIT = 1 << 31
WAIT_LIMIT = RESULT_DAYS * 86400.0
KEY_LIMIT = 200
EXPIRE_LIMIT = 5000
"""Results that are deleted in one write: others wait for the Store too."""
TOLD_LIMIT = 1000
"""Timelines of inputs that were cancelled together."""
MAP_LIMIT = 25_000
"""Inputs of one `map` that may be unfinished; the SDK's own window is 1,000."""


class CallInfo:
    """What the hand remembers of a call, in `Call.data`."""

    __slots__ = ("function", "function_id", "method", "parent", "sent_at")

    def __init__(
        self, function: FunctionRecord | None, function_id: str, sent_at: float, parent: str, method: str
    ) -> None:
        self.function = function
        self.function_id = function_id
        """What the caller named; `function` is what that was then."""
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
        self.why_waiting: Callable[[FunctionRecord], str] = lambda function: ""
        """Set by `main`: what keeps containers of a function from starting."""
        self.open_former: Callable[[FunctionRecord], None]
        """Set by `main`: has a function that is not in the current version end what was asked of it."""
        self.offset = time.time() - time.monotonic()
        """Added to a brain's monotonic moment it gives wall-clock time."""
        self.pending_limit = 25_000
        """Inputs of one function that may wait, beside those of maps and those on disk."""
        self.durable = Durable(dispatch, Journal(database), self, SystemClock(), asyncio.get_running_loop())
        self.outputs = Outputs(database)
        self._waiting: dict[tuple[str, int], list[asyncio.Future[Row]]] = {}

    # -- in

    def submit(self, peer: Any, message: Submit, payload: bytes) -> None:
        """Accept the inputs of a connection. Raises for what cannot be accepted."""
        parts = split_payload(message.items, payload)
        check_id(message.call_id, "fc")
        function = self.objects.function(message.function_id, peer.scope)
        check_method(function, message.method)
        if function.app.state != "running":
            raise has_ended(function)
        if message.parent and not self._is_of_workspace(message.parent, peer.scope.workspace):
            message.parent = ""
        items: list[tuple[int, Payload]] = []
        is_kept = message.kind == "spawn"
        for item, part in zip(message.items, parts, strict=True):
            if not 0 <= item.idx < IDX_LIMIT:
                raise InvalidError(f"input index {item.idx} of call `{message.call_id}` is out of range")
            data = check_digest(item.blob) if item.blob else part
            items.append((item.idx, bytes(data) if is_kept and type(data) is memoryview else data))
        call = self.dispatch.calls.get(message.call_id)
        if call is not None and (call.owner not in (peer, None) or not _is_of(call, function)):
            raise InvalidError(f"call `{message.call_id}` belongs to another caller or function")
        if is_kept:
            self._spawn(peer, message, function, items)
            return
        if peer.returning is not None:
            if peer.returning.lacks_values(call, items):
                raise ServiceError(
                    f"`{function.spec.tag}` yielded while the connection was broken, more than is kept",
                    hint="a generator that has yielded is not run again by itself: call it again",
                )
            peer.outbox.flush()  # results of this very turn count as told
            items = peer.returning.wanted(call, message.call_id, items)
            if not items and call is None:
                return
        self._check_room(function, call, message, len(items))
        self._enqueue(message, function, items, peer)
        if message.id:
            peer.reply(message.id)

    def _is_of_workspace(self, input_id: str, workspace: str) -> bool:
        """Whether an input runs, or waits, there: others would find in their graphs what never was theirs."""
        call = self.dispatch.calls.get(parse_call(input_id)[0])
        return call is not None and call.data is not None and _workspace_of(call) == workspace

    def _check_room(self, function: FunctionRecord, call: Call | None, message: Submit, count: int) -> None:
        """Inputs in memory are bounded: those of a map by its window, all others together."""
        if message.kind == "map":
            if call is not None and len(call.inputs) + count > MAP_LIMIT:
                raise ResourceExhaustedError(
                    f"a map has {len(call.inputs):,} inputs under way, the limit is {MAP_LIMIT:,}"
                )
            return
        state = self.dispatch.functions.get(function.function_id)
        waiting = 0 if state is None else state.pending()
        if waiting + count > self.pending_limit:
            waiting -= self.durable.unfinished.get(message.function_id, 0)
            if waiting + count > self.pending_limit:
                raise ResourceExhaustedError(
                    f"cannot call `{function.spec.tag}`: {waiting:,} of its inputs wait already, the limit is "
                    f"{self.pending_limit:,}",
                    hint="use `map`, which keeps within what can be taken, or `spawn`, whose inputs wait on disk",
                )

    def _enqueue(self, message: Submit, function: FunctionRecord, items: list[Any], owner: Any) -> None:
        info = None
        if message.call_id not in self.dispatch.calls:
            info = CallInfo(function, message.function_id, message.sent_at, message.parent, message.method)
            if message.parent:
                self.timelines.add_child(message.parent, message.call_id, title_of(info))
        instructions = self.dispatch.submit(
            time.monotonic(), message.call_id, function.function_id, items, message.kind, owner, message.last, info
        )
        self.apply(instructions)

    def _spawn(self, peer: Any, message: Submit, function: FunctionRecord, items: list[tuple[int, Payload]]) -> None:
        if len(message.key) > KEY_LIMIT or len(message.digest) > 64:
            raise InvalidError(f"an idempotency key of {len(message.key)} characters: the limit is {KEY_LIMIT}")
        app = function.app
        entry = Entry(
            message.call_id, message.function_id, app.app_id, app.scope.workspace, message.method,
            message.parent[:80], time.time(), items, message.key, message.digest,
        )  # fmt: skip

        def told(outcome: Added | Error) -> None:
            if isinstance(outcome, Added):
                peer.reply(message.id, {"call_id": outcome.call_id} if message.key else {})
            elif message.id:
                peer.refuse(message.id, outcome)

        self.durable.submit(entry, told)

    # -- out

    def finish(self, instruction: Finish) -> None:
        """Carry one ended input to whoever waits for it."""
        input_ = instruction.input
        call = input_.call
        result: Result | None = instruction.output
        data: Payload = b"" if result is None else result.data
        self._record(input_, call, instruction.status, result)
        if call.kind == "spawn":
            data = data if isinstance(data, str) else bytes(data)
            self.durable.finish(input_, instruction.status, instruction.message, instruction.hint, data)
            return
        input_.payload = None  # a cancelled input stays in its queue until it is reached
        if call.owner is not None:
            size, blob = (0, data) if isinstance(data, str) else (len(data), "")
            head = output_head(
                call.call_id, input_.idx, instruction.status, size, blob, 0, instruction.message, instruction.hint
            )
            _give(call.owner, head, b"" if isinstance(data, str) else data)

    def retried(self, instruction: Retried) -> None:
        self.durable.retried(instruction)

    def dropped(self, instruction: Dropped) -> None:
        """What waited of a spawned call was cancelled as one. Of very many, some stand for all in what is remembered of
        the latest inputs."""
        inputs = instruction.inputs.items()
        for input_ in islice((one for idx, one in inputs if idx not in instruction.spared), TOLD_LIMIT):
            self._record(input_, instruction.call, "cancelled", None)
        self.durable.dropped(instruction)

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
                info.function_id if info else "",
                info.function.app.scope if info and info.function else MAIN,
            )
        )

    # -- spawned calls: what `durable` asks

    def pool_of(self, call: KeptCall) -> str:
        function = self._pool_of(call)
        return function.function_id if function is not None and function.app.state == "running" else ""

    def why_stopped(self, call: KeptCall) -> str:
        app = self.objects.apps.get(call.app_id)
        return app.reason or "it ended" if app is not None and app.state != "running" else ""

    def _pool_of(self, call: KeptCall) -> FunctionRecord | None:
        """Of a function that the current version has not got, what is left of it takes what was asked before."""
        function = self.objects.find_function(call.function_id)
        if function is not None:
            return function
        retired = self.objects.retired(call.function_id)
        if retired is not None and retired.function_id not in self.dispatch.functions:
            self.open_former(retired)
        return retired

    def describe(self, call: KeptCall) -> CallInfo:
        function = self._pool_of(call)
        return CallInfo(function, call.function_id, call.created_at, call.parent, call.method)

    def stored(self, rows: Sequence[Row]) -> None:
        if not self._waiting:
            return
        for row in rows:
            for waiter in self._waiting.pop((row.call_id, row.idx), []):
                if not waiter.done():
                    waiter.set_result(row)

    def left_out(self, call_id: str, spared: Collection[int], reason: str) -> None:
        now = time.time()
        for key in [key for key in self._waiting if key[0] == call_id and key[1] not in spared]:
            self.stored([Row(*key, "cancelled", reason, "", b"", now)])

    # -- spawned calls: what clients ask

    async def get_output(self, peer: Any, message: GetOutput) -> None:
        """Answer with the output once it is there, or with `ready: false` when the time is up."""
        key = (check_id(message.call_id, "fc"), message.idx)
        if not 0 <= message.idx < IDX_LIMIT:
            raise NotFoundError(f"call `{message.call_id}` has no input {message.idx}")
        waiter: asyncio.Future[Row] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, []).append(waiter)
        try:
            found = None
            if not self._is_under_way(*key, peer.scope.workspace):
                found = await self._read_output(*key, peer.scope.workspace)
            if found is None and message.timeout != 0:
                await asyncio.wait([waiter], timeout=min(message.timeout, WAIT_LIMIT) if message.timeout > 0 else None)
            if found is None and waiter.done():
                row = waiter.result()
                found = _output(row.call_id, row.idx, row.status, row.message, row.hint, row.data)
        finally:
            self._forget_waiter(key, waiter)
        if found is None:
            peer.reply(message.id, {"ready": False, "waits": self._why(message)})
        else:
            peer.reply(message.id, {"ready": True, "item": message_dict(found[0])}, found[1])

    def _is_under_way(self, call_id: str, idx: int, workspace: str) -> bool:
        """Whether a spawned input has not ended for sure, which needs no look at the disk. One that has is in dispatch
        no more, and its end, if it is not on disk yet, is before any look."""
        call = self.dispatch.calls.get(call_id)
        return call is not None and call.kind == "spawn" and idx in call.inputs and _workspace_of(call) == workspace

    def _why(self, message: GetOutput) -> str:
        """What an input waits for that no container has; empty when that is just its turn."""
        call = self.dispatch.calls.get(message.call_id)
        input_ = call.inputs.get(message.idx) if call is not None else None
        if call is None or input_ is None or input_.container is not None:
            return ""
        function = self.objects.find_function(call.data.function_id)
        return self.why_waiting(function) if function is not None else ""

    def _forget_waiter(self, key: tuple[str, int], waiter: asyncio.Future[Row]) -> None:
        waiters = self._waiting.get(key)
        if waiters and waiter in waiters:
            waiters.remove(waiter)
            if not waiters:
                del self._waiting[key]

    async def _read_output(self, call_id: str, idx: int, workspace: str) -> tuple[OutputItem, bytes] | None:
        row = await self.outputs.find(Wanted(call_id, idx, workspace))
        if row is False:
            raise NotFoundError(f"no spawned call `{call_id}`", hint=f"results are kept for {RESULT_DAYS} days")
        if row is None:
            raise NotFoundError(f"call `{call_id}` has no input {idx}")
        if row.status is None and row.cancelled_at is not None and self.durable.is_left_out(call_id, idx):
            return _output(call_id, idx, "cancelled", row.cancel_reason or journal.CANCELLED, "", b"")
        if row.status is None:
            return None
        too_old = time.time() - RESULT_DAYS * 86400
        if row.status == "expired" or (row.finished_at or too_old) < too_old:  # the pruning comes to it later
            raise OutputExpiredError(f"the result of `{call_id}` was kept for {RESULT_DAYS} days and is gone")
        data = row.result_blob or row.result or b""
        return _output(call_id, idx, row.status, row.message or "", row.hint or "", data)

    async def app_of(self, call_id: str) -> str:
        """The app of a spawned call; empty when there is none."""

        def work(connection: Any) -> str:
            from squall.server import tables

            row = connection.execute(tables.calls.select().where(tables.calls.c.call_id == call_id)).first()
            return str(row.app_id) if row is not None else ""

        return await self.database.read(work)

    async def get_call(self, peer: Any, message: GetCall) -> None:
        call_id, workspace = check_id(message.call_id, "fc"), peer.scope.workspace

        def work(connection: Any) -> Any:
            row = journal.find_call(connection, call_id, workspace)
            return None if row is None else (row, journal.count_inputs(connection, call_id))

        found = await self.database.read(work)
        if found is None:
            raise NotFoundError(f"no spawned call `{call_id}`")
        row, by_status = found
        if row.cancelled_at is not None and "pending" in by_status:
            self._count_cancelled(call_id, by_status)
        function = self.objects.find_function(row.function_id)
        data = {"call_id": call_id, "function_id": row.function_id, "app_id": row.app_id, "kind": "spawn"}
        data["function"] = function.spec.tag if function is not None else ""
        data |= {"parent": row.parent or "", "created_at": row.created_at, "cancelled": row.cancelled_at is not None}
        data |= {"num_inputs": sum(by_status.values()), "counts": by_status}
        waits = function is not None and by_status.get("pending", 0) and self.why_waiting(function)
        peer.reply(message.id, {**data, "waits": waits} if waits else data)

    def _count_cancelled(self, call_id: str, by_status: dict[str, int]) -> None:
        """What has no end yet of a cancelled call is so, but for what still runs."""
        call = self.dispatch.calls.get(call_id)
        running = min(len(call.inputs) if call is not None else 0, by_status["pending"])
        by_status["cancelled"] = by_status.get("cancelled", 0) + by_status.pop("pending") - running
        if running:
            by_status["pending"] = running

    def cancel(self, peer: Any, message: CancelCall) -> None:
        check_id(message.call_id, "fc")
        call = self.dispatch.calls.get(message.call_id)
        if call is not None and call.owner not in (peer, None):
            raise InvalidError(f"call `{message.call_id}` belongs to another caller")
        idxs = message.idxs or None
        if call is None or call.kind == "spawn":
            if message.id:  # without, it is a call that has ended: of a spawned one the answer is waited for
                self._cancel_spawned(peer, message)
            return
        count = len(idxs) if idxs else len(call.inputs)
        now, reason = time.monotonic(), journal.CANCELLED
        self.apply(self.dispatch.cancel(now, message.call_id, idxs, reason, message.terminate_containers))
        if message.id:
            peer.reply(message.id, {"cancelled": count})

    def _cancel_spawned(self, peer: Any, message: CancelCall) -> None:
        """On disk before it is acknowledged, as a restart would run again what was cancelled."""

        def told(outcome: int | Error) -> None:
            if isinstance(outcome, Error):
                peer.refuse(message.id, outcome)
            else:
                peer.reply(message.id, {"cancelled": outcome})

        what = Cancel(message.call_id, message.idxs or None, peer.scope.workspace, message.terminate_containers)
        self.durable.cancel(what, told)

    def settled(self, peer: Any) -> None:
        """A client that came back has named what it waits for: the rest it has given up meanwhile."""
        returning = peer.settled()
        for call in list(self.dispatch.owners.get(peer, ())) if returning is not None else ():
            if call.kind != "spawn" and call.call_id not in returning.named:
                self.apply(self.dispatch.cancel(time.monotonic(), call.call_id, None, "cancelled by the caller"))

    async def expire(self, now_wall: float) -> None:
        """Delete results past their days, some at a time."""
        while await self.database.write(lambda connection: journal.expire(connection, now_wall, EXPIRE_LIMIT)):
            pass


def _workspace_of(call: Call) -> str:
    info: CallInfo = call.data
    return "" if info.function is None else info.function.app.scope.workspace


def _is_of(call: Call, function: FunctionRecord) -> bool:
    """Whether the call is one of the function's, in whatever version of it."""
    info: CallInfo | None = call.data
    return info is None or info.function is None or info.function.stable_id == function.stable_id


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
    tag = info.function_id if info.function is None else info.function.spec.tag
    return f"{tag}.{info.method}" if info.method else tag


def _output(call_id: str, idx: int, status: str, message: str, hint: str, data: Payload) -> tuple[OutputItem, bytes]:
    size, blob, inline = (0, data, b"") if isinstance(data, str) else (len(data), "", data)
    return OutputItem(call_id, idx, status, size, blob, message=message, hint=hint), inline


def _give(owner: Any, head: str, data: bytes) -> None:
    """Send a result to its caller; one that never reads is left, before what waits for it fills the memory."""
    owner.outbox.add(head, data)
    stream = owner.stream
    if stream.paused and stream.waiting_bytes() > UNREAD_RESULTS_BYTES:
        owner.leaving = "for good"
        stream.abort(f"it left {UNREAD_RESULTS_BYTES >> 20} MiB of results unread")
