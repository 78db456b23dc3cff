"""Calling functions: what stands behind the verbs of a `Function`, and talks to the server.

Owns where a function's inputs go (`Target`) and turning one call into a `Submit` and its result back into a value.
Apart from `function.py`, because a program that only defines an app needs no connection: nothing that it loads may
import this. How results are streamed is `_map`'s part. Tested in `tests/unit/test_function.py` and
`tests/integration/test_calls.py`.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from squall import _map
from squall import client as clients
from squall._context import current_input_id
from squall.call import FunctionCall, FunctionStats
from squall.client import Client, Waiter, check_payload
from squall.exception import InvalidError
from squall.protocol import payload as payloads
from squall.protocol.frames import Packed, flat
from squall.protocol.messages import BindFunction, CancelCall, GetStats, InputItem, Submit, new_id
from squall.protocol.transport import Pending

if TYPE_CHECKING:
    from squall.app import App
    from squall.function import Function, Variant

SPAWN_BATCH = 512
SPAWN_WINDOW = 8
"""Batches of a `spawn_map` that are on their way to the server's disk at a time: they share its syncs."""

Args = tuple[Any, ...]


@dataclass
class Target:
    """Where a function's inputs go, resolved once per call."""

    client: Client
    function_id: str
    source_map: dict[str, str]
    main_by_value: bool
    method: str = ""


def _not_running(tag: str, app: App | None) -> InvalidError:
    running = None if app is None else app._running
    if running is not None:
        return InvalidError(
            f"`{tag}` was added to the app after it was started", hint="define all functions before `app.run()`"
        )
    return InvalidError(
        f"`{tag}` cannot be called: its app is not running",
        hint="start it with `squall run file.py`, or call inside `with app.run():`",
    )


async def bind(variant: Variant, target: Target) -> str:
    """The id of a variant's pool."""
    found = variant._ids.get(target.function_id)
    if found is None:
        asked = BindFunction(target.function_id, variant.options)
        reply, _ = await target.client.request(asked, variant.parameters)
        found = variant._ids[target.function_id] = str(reply.data["function_id"])
        target.client.pools[found] = (asked, variant.parameters)
    return found


class Caller:
    """The verbs of one function, each as the coroutine behind both its faces."""

    __slots__ = ("function",)

    def __init__(self, function: Function[..., Any]) -> None:
        self.function = function

    def resolve(self) -> Target:
        """Where its inputs go, as far as that is known here. Raises InvalidError while its app does not run."""
        function = self.function
        if function._base is not None:
            target = Caller(function._base).resolve()
            target.method = function._method
            return target
        app, tag = function._app, function._tag
        running = None if app is None else app._running
        if running is not None and tag in running.functions:
            client = running.client if running.client.pid == os.getpid() else Client.current()
            return Target(client, running.functions[tag], running.source_map, not running.main_shared(tag))
        known = function._known_id()
        if not known:
            raise _not_running(tag, app)
        return Target(Client.current(), known, {}, True)

    async def target(self) -> Target:
        """As `resolve`, with the help of the server."""
        await self._find()
        function, target = self.function, self.resolve()
        if function._variant is not None:
            target.function_id = await bind(function._variant, target)
        return target

    async def _find(self) -> None:
        """Make sure that a function looked up by name was found."""
        function = self.function
        if function._lookup is not None:
            await function._lookup.find()
            if not function._method:
                function._is_generator = function._lookup.is_generator

    async def _refuse_generator(self, cannot: str) -> None:
        await self._find()
        if self.function._is_generator:
            raise InvalidError(
                f"`{self.function._tag}` is a generator and cannot be {cannot}", hint="use `.remote_gen(...)`"
            )

    # -- one call

    async def remote(self, args: Args, kwargs: dict[str, Any]) -> Any:
        await self._find()
        tag = self.function._tag
        if self.function._is_generator:
            raise InvalidError(f"`{tag}` is a generator", hint=f"use `{tag}.remote_gen(...)`")
        target = await self.target()
        item, payload = await self._pack(target, 0, args, kwargs)
        call_id, client = new_id("fc"), target.client
        waiter = client.sinks[call_id] = Waiter(client.link)
        try:
            waiter.send(_submit(call_id, target, [item], "remote"), payload)
            output, data = await waiter.pending
        except BaseException:
            _cancel_quietly(client, call_id)
            raise
        finally:
            client.sinks.pop(call_id, None)
        return await client.value_of(output, data, tag, target.source_map)

    async def remote_gen(self, args: Args, kwargs: dict[str, Any]) -> AsyncGenerator[Any, None]:
        """The values to come."""
        await self._find()
        tag = self.function._tag
        if not self.function._is_generator:
            raise InvalidError(f"`{tag}` is not a generator", hint=f"use `{tag}.remote(...)`")
        target = await self.target()
        item, payload = await self._pack(target, 0, args, kwargs)
        stream = _map.YieldStream(target.client, new_id("fc"), tag, target.source_map)
        return stream.values(_submit(stream.call_id, target, [item], "gen"), payload)

    async def spawn(self, key: str, args: Args, kwargs: dict[str, Any]) -> FunctionCall[Any]:
        await self._refuse_generator("spawned")
        target = await self.target()
        item, payload = await self._pack(target, 0, args, kwargs)
        submit = _submit(new_id("fc"), target, [item], "spawn")
        if key:
            submit.key, submit.digest = key, payloads.digest_call(args, kwargs, payload or item.blob.encode())
        reply, _ = await target.client.request(submit, payload)
        call_id = str(reply.data.get("call_id", submit.call_id))
        return FunctionCall(call_id, self.function._tag, target.source_map)

    async def _pack(self, target: Target, idx: int, args: Args, kwargs: dict[str, Any]) -> tuple[InputItem, Packed]:
        """One input for the wire; its arguments are uploaded first when they are too large to travel inline."""
        by_value, function = target.main_by_value, self.function
        data = payloads.pack_call_in_pieces(args, kwargs, function._tag, function._parameters, main_by_value=by_value)
        if check_payload(data, f"the arguments of `{function._tag}`"):
            return InputItem(idx, len(data)), data
        return InputItem(idx, 0, await target.client.put_blob.aio(data)), b""

    # -- many

    async def map(
        self, verb: str, iterators: Args, kwargs: dict[str, Any] | None, ordered: bool, return_exceptions: bool
    ) -> AsyncGenerator[Any, None]:
        """The results to come of an input for each item, or for one of each iterator."""
        return await self._map(_map.zip_inputs(iterators, verb), kwargs, ordered, return_exceptions)

    async def starmap(
        self, iterator: Any, kwargs: dict[str, Any] | None, ordered: bool, return_exceptions: bool
    ) -> AsyncGenerator[Any, None]:
        inputs = _map.Inputs(iterator, spread=True, verb="starmap")
        return await self._map(inputs, kwargs, ordered, return_exceptions)

    async def _map(
        self, inputs: _map.Inputs, kwargs: dict[str, Any] | None, ordered: bool, return_exceptions: bool
    ) -> AsyncGenerator[Any, None]:
        await self._refuse_generator("mapped")
        function, target = self.function, await self.target()
        order = _map.Order(
            function._tag, function._parameters, kwargs or {}, ordered, return_exceptions, target.main_by_value
        )
        submit = _submit(new_id("fc"), target, [], "map")
        return _map.Mapping(target.client, submit, inputs, order, target.source_map).results()

    async def spawn_map(self, iterators: Args, kwargs: dict[str, Any]) -> FunctionCall[Any]:
        await self._refuse_generator("spawned")
        target = await self.target()
        call_id = new_id("fc")
        inputs = _map.zip_inputs(iterators, "spawn_map")
        under_way: deque[Pending[Any]] = deque()
        items: list[InputItem] = []
        parts: list[Packed] = []
        count = size = 0
        try:
            async for args in inputs.stream():
                item, data = await self._pack(target, count, args, kwargs)
                items.append(item)
                parts.append(data)
                count += 1
                size += len(data)
                if len(items) >= SPAWN_BATCH or size > _map.FRAME_TARGET_BYTES:
                    under_way.append(_send_spawned(target, call_id, items, parts))
                    items, parts, size = [], [], 0
                    if len(under_way) >= SPAWN_WINDOW:
                        await under_way.popleft().within(clients.REQUEST_TIMEOUT)
            if items or not count:
                under_way.append(_send_spawned(target, call_id, items, parts))
            while under_way:
                await under_way.popleft().within(clients.REQUEST_TIMEOUT)
        except BaseException:  # nobody has a handle of what was spawned so far
            _cancel_spawned(target.client, call_id)
            raise
        return FunctionCall(call_id, self.function._tag, target.source_map, count)

    # -- the function itself

    async def stats(self) -> FunctionStats:
        target = await self.target()
        reply, _ = await target.client.request(GetStats(target.function_id))
        known = {key: int(value) for key, value in reply.data.items() if key in FunctionStats.__dataclass_fields__}
        return FunctionStats(**known)


def _submit(call_id: str, target: Target, items: list[InputItem], kind: str) -> Submit:
    parent = current_input_id() or ""
    sent_at = time.time()
    return Submit(call_id, target.function_id, items, kind=kind, parent=parent, sent_at=sent_at, method=target.method)


def _send_spawned(target: Target, call_id: str, items: list[InputItem], parts: list[Packed]) -> Pending[Any]:
    return target.client.link.request(_submit(call_id, target, items, "spawn"), b"".join(flat(parts)))


def _cancel_spawned(client: Client, call_id: str) -> None:
    try:
        client.link.request(CancelCall(call_id))
    except Exception:  # the reason why is on its way to the user already
        pass


def _cancel_quietly(client: Client, call_id: str) -> None:
    """Tell the server that nobody waits any more; the reason is on its way to the user already."""
    try:
        client.link.send(CancelCall(call_id))
    except Exception:  # the connection is gone, and the server cancels what belonged to it
        pass
