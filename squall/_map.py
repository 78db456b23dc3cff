"""Streaming many inputs and results: `map` with back-pressure, and the values of a remote generator.

A `Mapping` has a feeder, which takes inputs and sends them in batches, and a consumer, the generator the user
iterates. The feeder is a thread (a task when the inputs are an async iterable), because a user's iterator may block
while results are waiting and the consumer may be busy while containers are idle; inputs that are known not to block
(lists, ranges) are first fed by the consumer itself, so that a small map needs no thread.

The window: at most `IN_FLIGHT_LIMIT` inputs without a result, at most `UNTAKEN_LIMIT` results that the consumer has
not taken, and `BYTES_LIMIT` of each. No input waits for a later one: what is not sent at once is sent `FLUSH_S`
later by a flusher. Costs are per batch, not per input: no lock and no thread switch per result. Ending the consumer
early, in any way, cancels the rest. Tested in `tests/unit/test_map.py`.
"""

from __future__ import annotations

import functools
import itertools
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from collections.abc import Mapping as MappingType
from dataclasses import dataclass
from typing import Any

from squall._blocking import run
from squall.client import Client, check_payload
from squall.exception import Error, InvalidError, SerializationError, ServiceError
from squall.protocol import payload as payloads
from squall.protocol.driving import driver
from squall.protocol.frames import Packed, flat
from squall.protocol.messages import (
    YIELD_WINDOW,
    CancelCall,
    InputItem,
    Message,
    OutputItem,
    Submit,
    YieldCredit,
    encode_header,
)
from squall.protocol.transport import Pending

IN_FLIGHT_LIMIT = 1000
UNTAKEN_LIMIT = 8000
BYTES_LIMIT = 64 << 20
BATCH_INPUTS = 128
FRAME_TARGET_BYTES = 1 << 19
FLUSH_S = 0.001
ROOM_CHECK_S = 5.0
"""How long a feeder sleeps at most before it looks again; it is woken when there is room."""
NAP_S = 0.002
NAP_ABOVE = 200
NAP_BATCH = 32
"""With more than `NAP_ABOVE` inputs under way, a consumer that found less than `NAP_BATCH` results lets `NAP_S` pass
before it looks again. Reading them two by two would take more of the machine than the work itself."""
NAP_INPUT_BYTES = 1 << 13
"""Mean size of the inputs under way above which nobody naps: what is large must be moved all the time."""
CREDIT_STEP = YIELD_WINDOW // 4

Args = tuple[Any, ...]
Pair = tuple[OutputItem, Any]


# ---- inputs -----------------------------------------------------------------------------------------------------


class Inputs:
    """Where a map's arguments come from: one iterable, plain or async, of arguments or of argument tuples."""

    def __init__(self, source: Any, *, spread: bool, verb: str) -> None:
        self.source = source
        self.spread = spread
        self.verb = verb
        self.is_async = hasattr(source, "__aiter__") and not hasattr(source, "__iter__")
        self.is_instant = type(source) in (list, tuple, range, set, frozenset, dict, str, bytes)
        if self.is_async and getattr(driver, "blocking", False):
            raise InvalidError(
                f"`{verb}` got an async iterable, which a blocking call cannot run", hint=f"use `{verb}.aio(...)`"
            )
        if not self.is_async and not hasattr(source, "__iter__") and not hasattr(source, "__getitem__"):
            raise InvalidError(f"`{verb}` got a `{type(source).__name__}`, which cannot be iterated")

    def iterate(self) -> Iterator[Args]:
        """Argument tuples of a plain iterable."""
        if self.spread:
            return map(self._as_args, self.source)
        return zip(self.source)

    async def stream(self) -> AsyncGenerator[Args, None]:
        """Argument tuples of either kind; a plain iterable is taken in this thread."""
        if not self.is_async:
            for args in self.iterate():
                yield args
            return
        async for value in self.source:
            yield self._as_args(value) if self.spread else (value,)

    def _as_args(self, value: Any) -> Args:
        try:
            return tuple(value)
        except TypeError:
            raise InvalidError(
                f"`{self.verb}` got the item {value!r:.80}, a `{type(value).__name__}`, "
                "where it needs a tuple of arguments"
            ) from None


def zip_inputs(iterators: tuple[Any, ...], verb: str) -> Inputs:
    """The inputs of `map(a, b, ...)`: one of each, until the shortest ends."""
    if not iterators:
        raise InvalidError(f"`{verb}` got nothing to iterate", hint=f"pass an iterable: `.{verb}(range(10))`")
    parts = [Inputs(source, spread=False, verb=verb) for source in iterators]
    if len(parts) == 1:
        return parts[0]
    if any(part.is_async for part in parts):
        return Inputs(_zip_async(parts), spread=True, verb=verb)
    zipped = Inputs(zip(*iterators), spread=True, verb=verb)  # noqa: B905  as the builtin `map`
    zipped.is_instant = all(part.is_instant for part in parts)
    return zipped


async def _zip_async(parts: list[Inputs]) -> AsyncIterator[Args]:
    streams = [part.stream() for part in parts]
    while True:
        args: Args = ()
        for stream in streams:
            try:
                args += await stream.__anext__()
            except StopAsyncIteration:
                return
        yield args


# ---- what both streams share --------------------------------------------------------------------------------------


class _Stream:
    """Results on their way from the connection's reader to the consumer: a queue, and at most one who waits."""

    def __init__(self, client: Client, call_id: str) -> None:
        self.client = client
        self.call_id = call_id
        self.ready: deque[Pair] = deque()
        self.broken: Error | None = None
        self._waiter: Pending[None] | None = None

    def fail(self, error: Error) -> None:
        self.broken = error
        self.wake()

    def wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            waiter.set(None)

    def has_ended(self) -> bool:
        return False

    def lost(self) -> None:
        """The connection broke, and another is being made."""

    async def changed(self) -> None:
        """Wait until there is something in `ready`, or the stream broke or ended."""
        pending: Pending[None] = Pending(self.client.link)
        self._waiter = pending
        if self.ready or self.broken or self.has_ended():  # it came before the waiter could be seen
            self._waiter = None
            return
        await pending

    def leave(self, cancel: bool) -> None:
        """Take no more; with `cancel`, tell the server that nobody waits for the rest."""
        self.client.sinks.pop(self.call_id, None)
        if cancel and not self.client.link.closed:
            try:
                self.client.link.send(CancelCall(self.call_id))
            except Error:  # the connection is gone, and the server cancels what belonged to it
                pass


# ---- map --------------------------------------------------------------------------------------------------------


@dataclass
class Order:
    """What a map was asked for."""

    name: str
    parameters: tuple[str, ...]
    kwargs: dict[str, Any]
    ordered: bool
    return_exceptions: bool
    main_by_value: bool


class Mapping(_Stream):
    """One running map. `results()` is the consumer; everything else happens behind it."""

    def __init__(
        self, client: Client, submit: Submit, inputs: Inputs, order: Order, source_map: MappingType[str, str]
    ) -> None:
        super().__init__(client, submit.call_id)
        self.submit = submit
        self.inputs = inputs
        self.order = order
        self.source_map = source_map
        self.what = f"the result of `{order.name}`"
        self.count = 0
        """Inputs taken from the iterator so far."""
        self.fed = False
        """The iterator has ended."""
        self.input_error: BaseException | None = None
        self.stopped = False
        self._sizes: dict[int, int] = {}
        """Bytes of each input that has no result yet; also tells a repeated result from a first one."""
        self._flight_bytes = 0
        self._arrived_bytes = 0
        self._held_bytes = 0
        self._untaken = 0
        self._items: list[InputItem] = []
        self._parts: list[Packed] = []
        self._part_bytes = 0
        self._flushed_at = 0.0
        self._told_last = False
        self._open: dict[int, tuple[InputItem, Packed]] = {}
        """What was sent and has no result."""
        self._batch_lock = threading.Lock()
        self._room = threading.Event()
        self._room_async: Pending[None] | None = None
        self._full = False
        self._late = threading.Event()
        self._task: Any = None

    # -- the consumer

    async def results(self) -> AsyncGenerator[Any, None]:
        self.client.sinks[self.call_id] = self
        finished = False
        try:
            self._start()
            outcomes = self._in_order() if self.order.ordered else self._as_they_come()
            async for item, data in outcomes:
                yield await self._outcome(item, data)
            finished = True
            if self.input_error is not None:
                raise self.input_error
        finally:
            self._stop_feeding()
            self.leave(cancel=not finished)

    async def _as_they_come(self) -> AsyncGenerator[Pair, None]:
        taken = before = 0
        ready = self.ready
        while True:
            while ready:
                taken += 1
                yield ready.popleft()
            if self.fed and taken == self.count:
                return
            self._raise_if_broken()
            self._let_feed()
            self._let_results_gather(taken - before)
            before = taken
            await self.changed()

    def _let_results_gather(self, found: int) -> None:
        under_way = len(self._sizes)
        if (
            found < NAP_BATCH
            and under_way > NAP_ABOVE
            and self._flight_bytes - self._arrived_bytes < under_way * NAP_INPUT_BYTES
            and getattr(driver, "blocking", False)
        ):
            time.sleep(NAP_S)

    async def _in_order(self) -> AsyncGenerator[Pair, None]:
        early: dict[int, Pair] = {}
        turn = 0
        async for pair in self._as_they_come():
            if pair[0].idx != turn:
                early[pair[0].idx] = pair
                continue
            yield pair
            turn += 1
            while turn in early:
                yield early.pop(turn)
                turn += 1

    async def _outcome(self, item: OutputItem, data: Any) -> Any:
        """The value to yield; raises instead when the input failed and exceptions are not to be returned."""
        self._untaken -= 1
        self._held_bytes -= item.size
        if item.status == "ok" and not item.blob:
            try:
                return payloads.unpack(data, self.what)
            except SerializationError as failure:
                error: BaseException = failure
        elif item.status == _UNSENT:
            error = data
        else:
            try:
                return await self.client.value_of(item, data, self.order.name, self.source_map)
            except Exception as failure:
                error = failure
        if self.order.return_exceptions and self.broken is None:
            return error
        raise error

    def _raise_if_broken(self) -> None:
        if self.broken is not None:
            raise self.broken

    def has_ended(self) -> bool:
        return self.fed and not self._sizes

    # -- results arrive; runs in whichever thread reads the connection

    def take(self, outputs: list[tuple[OutputItem, bytes]]) -> None:
        sizes = self._sizes
        for pair in outputs:
            item = pair[0]
            size = sizes.pop(item.idx, None)
            if size is None:
                continue
            self._open.pop(item.idx, None)
            self._arrived_bytes += size
            self._untaken += 1
            self._held_bytes += item.size
            self.ready.append(pair)
        self.wake()
        self._let_feed()

    def _let_feed(self) -> None:
        """Wake a feeder that waits for room, once half of the window is free."""
        if self._full and self._has_room(0.5):
            self._full = False
            self._room.set()
            waiter, self._room_async = self._room_async, None
            if waiter is not None:
                waiter.set(None)

    def _stop_feeding(self) -> None:
        with self._batch_lock:  # after this no frame of the feeder follows what is sent next
            self.stopped = True
        self._room.set()
        self._late.set()
        if self._task is not None:
            self._task.cancel()
        if self.count and not self._told_last and not self.client.link.closed:
            try:
                self._send([], [], last=True)
            except Error:  # the connection is gone, and the call with it
                pass

    def _has_room(self, share: float = 1.0) -> bool:
        if not self._sizes:
            return self._untaken < UNTAKEN_LIMIT and self._held_bytes < BYTES_LIMIT
        return (
            len(self._sizes) < IN_FLIGHT_LIMIT * share
            and self._flight_bytes - self._arrived_bytes < BYTES_LIMIT * share
            and self._untaken < UNTAKEN_LIMIT
            and self._held_bytes < BYTES_LIMIT
        )

    # -- the feeder

    def _start(self) -> None:
        if self.inputs.is_async:
            import asyncio  # whoever passes an async iterable has it loaded

            self._task = asyncio.get_running_loop().create_task(self._feed_async())
            return
        iterator = self.inputs.iterate()
        if self.inputs.is_instant:
            rest = self._feed_inline(iterator)
            if rest is None:
                return
            iterator = rest
        threading.Thread(target=self._feed, args=(iterator,), name="squall-map", daemon=True).start()

    def _feed_inline(self, iterator: Iterator[Args]) -> Iterator[Args] | None:
        """Send what fits at once; the rest of the iterator, or None when it has ended."""
        try:
            for args in iterator:
                data = self._pack(args)
                if data is not None:
                    if not check_payload(data, f"the arguments of `{self.order.name}`"):
                        self.count -= 1
                        return itertools.chain([args], iterator)
                    self._add(InputItem(self.count - 1, len(data)), data)
                if not self._has_room():
                    return iterator
        except Exception as error:
            self.input_error = error
        self._end()
        return None

    def _feed(self, iterator: Iterator[Args]) -> None:
        if not self.inputs.is_instant:
            threading.Thread(target=self._flush_late, name="squall-flush", daemon=True).start()
        try:
            self._wait_room()
            for args in iterator:
                if self.stopped:
                    return
                data = self._pack(args)
                if data is not None:
                    item = InputItem(self.count - 1, len(data))
                    if not check_payload(data, f"the arguments of `{self.order.name}`"):
                        item.size, item.blob, data = 0, run(self.client.put_blob.aio(data)), b""
                    self._add(item, data)
                if not self._has_room():
                    self._wait_room()
        except BaseException as error:  # the user's iterator may raise anything; it surfaces at the consumer
            self.input_error = error
        self._end()

    async def _feed_async(self) -> None:
        try:
            async for args in self.inputs.stream():
                data = self._pack(args)
                if data is not None:
                    item = InputItem(self.count - 1, len(data))
                    if not check_payload(data, f"the arguments of `{self.order.name}`"):
                        item.size, item.blob, data = 0, await self.client.put_blob.aio(data), b""
                    self._add(item, data)
                    self._flush_soon()
                while not self._has_room() and not self.stopped:
                    self.flush()
                    self._room_async = Pending(self.client.link)
                    self._full = True
                    self._let_feed()
                    if self._room_async is not None:
                        await self._room_async.within(None)
        except Exception as error:
            self.input_error = error
        self._end()

    def _pack(self, args: Args) -> Packed | None:
        """The arguments as bytes. One that cannot be pickled is the result of that input; None then."""
        order = self.order
        self.count += 1
        try:
            return payloads.pack_call_in_pieces(
                args, order.kwargs, order.name, order.parameters, main_by_value=order.main_by_value
            )
        except SerializationError as error:
            self._untaken += 1
            self.ready.append((OutputItem(self.call_id, self.count - 1, _UNSENT), error))
            self.wake()
            return None

    def _add(self, item: InputItem, data: Packed) -> None:
        self._sizes[item.idx] = item.size
        self._flight_bytes += item.size
        with self._batch_lock:
            self._items.append(item)
            self._parts.append(data)
            self._part_bytes += item.size
            waiting = len(self._items)
        if waiting >= BATCH_INPUTS or self._part_bytes >= FRAME_TARGET_BYTES or item.idx == 0:
            self.flush()
        elif not self.inputs.is_instant:
            if time.monotonic() - self._flushed_at >= FLUSH_S:
                self.flush()
            elif waiting == 1:
                self._late.set()

    def flush(self, last: bool = False) -> None:
        """Send what was collected."""
        with self._batch_lock:
            items, parts = self._items, self._parts
            if self.stopped or (not items and not last):
                return
            self._items, self._parts, self._part_bytes = [], [], 0
            self._flushed_at = time.monotonic()
            self._send(items, parts, last)

    def _send(self, items: list[InputItem], parts: list[Packed], last: bool) -> None:
        def note() -> None:
            self._told_last = last
            for item, data in zip(items, parts, strict=True):
                self._open[item.idx] = (item, data)

        self.client.link.send_raw(encode_header(self._frame(items, last)), *parts, note=note)

    def _frame(self, items: list[InputItem], last: bool) -> Submit:
        submit = self.submit
        return Submit(
            submit.call_id, submit.function_id, items, submit.kind, submit.parent, time.time(), last, submit.method
        )

    def again(self) -> Iterable[tuple[Message, Packed]]:
        """All that was sent and has no result, in its order."""
        frames: list[tuple[Submit, Packed]] = []
        left = sorted(self._open.values(), key=lambda pair: pair[0].idx)
        while left:
            size = count = 0
            while count < min(len(left), BATCH_INPUTS) and size < FRAME_TARGET_BYTES:
                size += left[count][0].size
                count += 1
            some, left = left[:count], left[count:]
            frame = self._frame([item for item, _ in some], self._told_last and not left)
            frames.append((frame, b"".join(flat(data for _, data in some))))
        return frames

    def _flush_soon(self) -> None:
        import asyncio

        if self._items:
            asyncio.get_running_loop().call_later(FLUSH_S, self._flush_quietly)

    def _flush_late(self) -> None:
        """Thread: whatever the feeder collected is on its way `FLUSH_S` later, however long its iterator blocks."""
        while not self.stopped and not self.fed:
            self._late.wait(ROOM_CHECK_S)
            self._late.clear()
            time.sleep(FLUSH_S)
            self._flush_quietly()

    def _flush_quietly(self) -> None:
        try:
            if not self.stopped:
                self.flush()
        except Error:  # the consumer learns it from the connection itself
            pass

    def _wait_room(self) -> None:
        while not self._has_room() and not self.stopped and self.broken is None:
            self.flush()
            self._room.clear()
            self._full = True
            self._let_feed()  # room may have come before `_full` could be seen
            self._room.wait(ROOM_CHECK_S)

    def _end(self) -> None:
        try:
            if self.count and not self.stopped and self.broken is None:
                self.flush(last=True)
        except Error as error:
            self.broken = self.broken or error
        self.fed = True
        self._late.set()
        self.wake()


_UNSENT = "unsent"
"""Status, here only, of an input that could not be packed; its data is the error."""


# ---- generators -------------------------------------------------------------------------------------------------


class YieldStream(_Stream):
    """The values of one remote generator, in order, with credit sent back as they are taken."""

    def __init__(self, client: Client, call_id: str, name: str, source_map: MappingType[str, str]) -> None:
        super().__init__(client, call_id)
        self.name = name
        self.source_map = source_map
        self._begun = False
        self._sent: tuple[Message, Packed] | None = None

    def take(self, outputs: list[tuple[OutputItem, bytes]]) -> None:
        self._begun = True
        self.ready.extend(outputs)
        self.wake()

    def lost(self) -> None:
        """What it would yield again from the beginning need not be the same."""
        if self._begun:
            self.client.sinks.pop(self.call_id, None)
            self.fail(
                ServiceError(
                    f"the connection to the server broke while `{self.name}` yielded",
                    hint="a generator that has yielded is not run again by itself: call it again",
                )
            )

    def again(self) -> Iterable[tuple[Message, Packed]]:
        return () if self._begun or self._sent is None else (self._sent,)

    async def values(self, submit: Submit, payload: Packed) -> AsyncGenerator[Any, None]:
        self.client.sinks[self.call_id] = self
        finished = False
        try:
            note = functools.partial(setattr, self, "_sent", (submit, payload))
            self.client.link.send_tracked(submit, payload, note)
            seq = owed = 0
            while True:
                while not self.ready:
                    if self.broken is not None:
                        raise self.broken
                    await self.changed()
                item, data = self.ready.popleft()
                if item.status != "yield":
                    finished = True
                    if item.status != "ok":
                        await self.client.value_of(item, data, self.name, self.source_map)  # raises what it was
                    return
                owed += 1
                if item.seq >= seq:  # else a lost container's successor starts over, and it was yielded already
                    seq = item.seq + 1
                    yield await self.client.value_of(item, data, self.name, self.source_map)
                if owed >= CREDIT_STEP:
                    self.client.link.send(YieldCredit(self.call_id, item.idx, owed))
                    owed = 0
        finally:
            self.leave(cancel=not finished)
