"""Function: what a user calls; `call.py` has the handle of what was spawned.

Owns the calling verbs (`remote`, `local`, `map`, `spawn` ...) and turning one call into a `Submit` and its result
back into a value. Each verb is one coroutine with two faces (`_blocking`). Must never build specs (`app.py`) or know
how results are streamed (`_map.py`). Tested in `tests/unit/test_function.py` and `tests/integration/test_calls.py`.
"""

from __future__ import annotations

import functools
import inspect
import os
import time
import types
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

from squall import _map
from squall import client as clients
from squall._blocking import both, both_generator, run
from squall._lookup import Autoscaler, Lookup, checked_lookup
from squall._object import Handle, checked_id
from squall.call import FunctionCall
from squall.client import Client, Waiter, check_payload
from squall.exception import InvalidError, NotFoundError, SerializationError
from squall.options import FunctionOptions, batch_fields, concurrency_fields, merged_fields, variant_fields
from squall.protocol import payload as payloads
from squall.protocol.frames import Packed, flat
from squall.protocol.messages import (
    BindFunction,
    CancelCall,
    GetStats,
    InputItem,
    Submit,
    new_id,
)
from squall.protocol.transport import Pending

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from squall.app import App
    from squall.logs import Logs

P = ParamSpec("P")
R = TypeVar("R")

SPAWN_BATCH = 512
SPAWN_WINDOW = 8
"""Batches of a `spawn_map` that are on their way to the server's disk at a time: they share its syncs."""
KEY_LIMIT = 200


@dataclass(frozen=True)
class FunctionStats:
    """How busy a function is at this moment: inputs that wait (`backlog`), containers (`num_total_runners`), inputs
    that run (`num_running_inputs`), and how many more the ready containers could take (`input_headroom`)."""

    backlog: int = 0
    num_total_runners: int = 0
    num_running_inputs: int = 0
    input_headroom: int = 0


@dataclass
class Target:
    """Where a function's inputs go, resolved once per call."""

    client: Client
    function_id: str
    source_map: dict[str, str]
    main_by_value: bool
    method: str = ""


class Variant:
    """What gives a function a pool of its own: `options` that differ, as fields of its spec, and for a class its
    packed `parameters`. All handles with the same Variant ask for the pool's id once."""

    def __init__(self, options: dict[str, Any], parameters: bytes = b"") -> None:
        self.options = options
        self.parameters = parameters
        self._ids: dict[str, str] = {}
        """Base function's id -> the pool's."""

    async def bind(self, target: Target) -> str:
        """The id of the pool."""
        found = self._ids.get(target.function_id)
        if found is None:
            asked = BindFunction(target.function_id, self.options)
            reply, _ = await target.client.request(asked, self.parameters)
            found = self._ids[target.function_id] = str(reply.data["function_id"])
            target.client.pools[found] = (asked, self.parameters)
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return Variant, (self.options, self.parameters)


class Function(Handle, Generic[P, R]):
    """A function of an app, called in containers; `@app.function()` makes it.

    Every method that waits has an async twin under `.aio`: `await f.remote.aio(x)`,
    `async for y in f.map.aio(xs)`. A Function may be passed to another function as an argument.

    All calls raise InvalidError while the app does not run, SerializationError for an argument or result that
    cannot be pickled, and ServiceError when the server is gone.

    Example:

        @app.function(cpu=0.5)
        def square(x): return x * x

        @app.local_entrypoint()
        def main():
            print(square.remote(4), list(square.map(range(10))))
    """

    _prefix = "fu-"

    def __init__(self, tag: str, raw_f: Callable[P, R] | None, app: App | None, is_generator: bool) -> None:
        self._tag = tag
        self._raw_f = raw_f
        self._app = app
        self._is_generator = is_generator
        self._parameters: tuple[str, ...] = ()
        self._base: Function[..., Any] | None = None
        """Whose id this is called by: of a variant the function it was made from, of a method its class."""
        self._method = ""
        self._variant: Variant | None = None
        self._lookup: Lookup | None = None
        """Of a function looked up by name, and of what was made from it."""
        if raw_f is not None:
            functools.update_wrapper(self, raw_f)
            del self.__wrapped__  # type: ignore[attr-defined]  # `inspect` would take us for the plain function
            code = getattr(raw_f, "__code__", None)
            if isinstance(code, types.CodeType):
                self._parameters = code.co_varnames[: code.co_argcount]

    # -- what it is

    @property
    def raw_f(self) -> Callable[P, R]:
        """The plain function behind the decorator."""
        if self._raw_f is None:
            raise InvalidError(f"`{self._tag}` is a handle, its code is not here", hint="use `.remote()`")
        return self._raw_f

    @property
    def tag(self) -> str:
        """Its name within its app."""
        return self._tag

    @property
    def app(self) -> App | None:
        """The app it was defined in; None for a handle."""
        return self._app

    @property
    def is_generator(self) -> bool:
        """Whether it yields: call it with `remote_gen` then."""
        return self._is_generator

    @property
    def object_id(self) -> str:
        """Its id while its app runs, such as `fu-5f2c19d04be87a36`. Raises InvalidError when it does not."""
        return run(self._target()).function_id

    @classmethod
    def from_id(cls, function_id: str, *, is_generator: bool = False) -> Function[..., Any]:
        """A handle for a function of a running app, by its id. Does no I/O; a wrong id shows at the first call.

        `is_generator`: say True for a function that yields, as the id does not tell.
        """
        handle: Function[..., Any] = Function(checked_id(function_id, "fu-", "function"), None, None, is_generator)
        handle._object_id = function_id
        return handle

    @classmethod
    def from_name(
        cls, app_name: str, name: str, *, version: int | None = None, environment_name: str | None = None
    ) -> Function[..., Any]:
        """A handle for a function of a deployed app, from any program: none of the app's source is needed.

        Does no I/O; the function is looked up when it is first used, or by `hydrate`. The handle goes on to mean the
        function when its app is deployed again.

        - `version`: a number that `squall app history` shows: calls go to that version of the app, and so do the calls
          that its functions make to each other, even when a newer one is current. It has containers of its own.
        - `environment_name`: look in that environment instead of your own.

        First use raises NotFoundError when there is no such app, function or version.

        Example:

            app = squall.App("numbers")

            @app.function()
            def square(x): return x * x

            if __name__ == "__main__":
                app.deploy()
                print(squall.Function.from_name("numbers", "square").remote(7))
        """
        lookup = checked_lookup(app_name, name, version, environment_name, is_class=False)
        return by_lookup(lookup)

    def __repr__(self) -> str:
        return f"<Function `{self._tag}`>"

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        raise InvalidError(
            f"`{self._tag}` is a function of Squall and cannot be called like a plain one",
            hint=f"`{self._tag}.remote(...)` runs it in a container, `{self._tag}.local(...)` runs it right here",
        )

    def __reduce__(self) -> tuple[Any, ...]:
        if self._base is not None:
            return derived, (self._base, self._tag, self._is_generator, self._method, self._variant)
        if self._lookup is not None:
            return by_lookup, (self._lookup,)
        if not self._object_id and self._app is not None and self._app._packing:
            return _handle_by_tag, (self._tag, self._is_generator)
        try:
            return _handle_by_id, (self._resolve().function_id, self._tag, self._is_generator)
        except InvalidError as error:
            raise SerializationError(f"cannot pickle {self!r}: its app is not running", hint=error.hint) from None

    async def _target(self) -> Target:
        if self._lookup is not None:
            await self._find()
        target = self._resolve()
        if self._variant is not None:
            target.function_id = await self._variant.bind(target)
        return target

    async def _find(self) -> None:
        """Make sure that a function looked up by name was found."""
        lookup = self._lookup
        assert lookup is not None  # callers have looked
        await lookup.find()
        if not self._method:
            self._is_generator = lookup.is_generator

    def _resolve(self) -> Target:
        if self._base is not None:
            target = self._base._resolve()
            target.method = self._method
            return target
        app = self._app
        running = None if app is None else app._running
        if running is not None and self._tag in running.functions:
            client = running.client if running.client.pid == os.getpid() else Client.current()
            return Target(client, running.functions[self._tag], running.source_map, not running.main_shared(self._tag))
        if self._object_id:
            return Target(Client.current(), self._object_id, {}, True)
        if self._lookup is not None and self._lookup.function_id:
            return Target(Client.current(), self._lookup.function_id, {}, True)
        raise _not_running(self._tag, app)

    def with_options(self, **options: Unpack[FunctionOptions]) -> Function[P, R]:
        """A handle of the same function with other options, and so with containers of its own.

        Takes the options of `@app.function` but for `name`, `serialized`, `include_source` and `is_generator`. What is
        not given stays as it is; `env` and `secrets` are laid over the variables that the function has. May be
        repeated on what it gives. The same options give the same containers, whoever asks.

        Example:

            @app.function()
            def limit():
                import os
                return os.environ.get("SIZE", "small")

            @app.local_entrypoint()
            def main():
                print(limit.remote(), limit.with_options(cpu=1, env={"SIZE": "large"}).remote())
        """
        fields = variant_fields(options, f"{self._tag}.with_options")
        if self._is_generator and fields.get("retries") and fields["retries"].max_retries:
            raise InvalidError(f"generator `{self._tag}` cannot have `retries`")
        return self._variant_with(fields)

    def with_concurrency(self, *, max_inputs: int, target_inputs: int | None = None) -> Function[P, R]:
        """A handle whose containers run several inputs at a time, as with `@squall.concurrent`.

        Example:

            @app.function()
            def square(x): return x * x

            @app.local_entrypoint()
            def main():
                print(list(square.with_concurrency(max_inputs=4).map(range(8))))
        """
        return self._variant_with(concurrency_fields(max_inputs, target_inputs, f"{self._tag}.with_concurrency"))

    def with_batching(self, *, max_batch_size: int, wait_ms: int) -> Function[P, R]:
        """A handle whose inputs run in batches, as with `@squall.batched`: the function must be written for lists.

        Example:

            @app.function()
            def squares(xs): return [x * x for x in xs]

            @app.local_entrypoint()
            def main():
                print(list(squares.with_batching(max_batch_size=4, wait_ms=50).map(range(8))))
        """
        if self._is_generator:
            raise InvalidError(f"`{self._tag}` is a generator and cannot be batched")
        if self._raw_f is not None:
            check_batched(self._raw_f, False)
        return self._variant_with(batch_fields(max_batch_size, wait_ms, f"{self._tag}.with_batching"))

    def _variant_with(self, fields: dict[str, Any]) -> Function[P, R]:
        before = {} if self._variant is None else self._variant.options
        handle: Function[P, R] = Function(self._tag, self._raw_f, self._app, self._is_generator)
        handle._base, handle._lookup = self._base or self, self._lookup
        handle._variant = Variant(merged_fields(before, fields))
        return handle

    # -- one call

    def local(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the function right here, in this process: no container, no retries, no timeout."""
        return self.raw_f(*args, **kwargs)

    @both
    async def remote(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the function in a container and give back what it returns, or raise what it raises.

        Raises the function's own exception with its own type. When there is none to bring back:
        FunctionTimeoutError, ContainerLostError, StartupError, CancelledError (all RemoteError), or
        ResourceExhaustedError when the server refused the input, because no machine could hold it for instance.

        Example:

            @app.function()
            def divide(a, b): return a / b

            @app.local_entrypoint()
            def main():
                try:
                    divide.remote(1, 0)
                except ZeroDivisionError as error:
                    print("as if it had happened here:", error)
        """
        if self._lookup is not None:
            await self._find()
        if self._is_generator:
            raise InvalidError(f"`{self._tag}` is a generator", hint=f"use `{self._tag}.remote_gen(...)`")
        target = await self._target()
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
        return await client.value_of(output, data, self._tag, target.source_map)  # type: ignore[no-any-return]

    @both_generator
    async def remote_gen(self, /, *args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[Any, None]:
        """Run a generator in a container and yield its values as they come, in order.

        The generator is at most 256 values ahead of you. Leaving the loop early cancels it. A generator that has
        yielded is never tried again.

        Example:

            @app.function()
            def letters(word):
                yield from word

            @app.local_entrypoint()
            def main():
                for letter in letters.remote_gen("abc"):
                    print(letter)
        """
        if self._lookup is not None:
            await self._find()
        if not self._is_generator:
            raise InvalidError(f"`{self._tag}` is not a generator", hint=f"use `{self._tag}.remote(...)`")
        target = await self._target()
        item, payload = await self._pack(target, 0, args, kwargs)
        stream = _map.YieldStream(target.client, new_id("fc"), self._tag, target.source_map)
        submit = _submit(stream.call_id, target, [item], "gen")
        async for value in stream.values(submit, payload):
            yield value

    @both
    async def spawn(self, /, *args: P.args, **kwargs: P.kwargs) -> FunctionCall[R]:
        """Start a call and give back its handle; the result is kept 7 days for `FunctionCall.get`, from any process.

        Returns once the call is on the server's disk. It runs while its app runs: leave the app running with
        `squall run --detach` or `app.run(detach=True)` when the program ends first.

        Example:

            @app.function()
            def square(x): return x * x

            @app.local_entrypoint()
            def main():
                call = square.spawn(7)
                print(call.get(timeout=30))
        """
        return await self._spawn("", args, kwargs)

    @both
    async def spawn_once(self, key: str, /, *args: P.args, **kwargs: P.kwargs) -> FunctionCall[R]:
        """`spawn`, unless a call of this function was spawned under `key` within 7 days: then the handle of that one.

        For work that must be started once however often it is asked for: by a webhook that comes twice, or a program
        that died before it wrote down what it had spawned. `key` is up to 200 characters of yours, such as an order's
        number. Arguments are compared as they are packed; other ones under the same key raise ConflictError.

        Example:

            @app.function()
            def bill(order, cents): return f"{order}: {cents / 100:.2f}"

            @app.local_entrypoint()
            def main():
                first = bill.spawn_once("order-17", "17", 995)
                again = bill.spawn_once("order-17", "17", 995)
                print(first.object_id == again.object_id, again.get(timeout=30))
        """
        if not isinstance(key, str) or not 0 < len(key) <= KEY_LIMIT:
            raise InvalidError(
                f"`{self._tag}.spawn_once` got the key {key!r:.80}",
                hint=f"a key is text of 1 to {KEY_LIMIT} characters",
            )
        return await self._spawn(key, args, kwargs)

    async def _spawn(self, key: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FunctionCall[R]:
        if self._lookup is not None:
            await self._find()
        if self._is_generator:
            raise InvalidError(f"`{self._tag}` is a generator and cannot be spawned", hint="use `.remote_gen(...)`")
        target = await self._target()
        item, payload = await self._pack(target, 0, args, kwargs)
        submit = _submit(new_id("fc"), target, [item], "spawn")
        if key:
            submit.key, submit.digest = key, payloads.digest_call(args, kwargs, payload or item.blob.encode())
        reply, _ = await target.client.request(submit, payload)
        return FunctionCall(str(reply.data.get("call_id", submit.call_id)), self._tag, target.source_map)

    async def _pack(
        self, target: Target, idx: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[InputItem, Packed]:
        """One input for the wire; its arguments are uploaded first when they are too large to travel inline."""
        by_value = target.main_by_value
        data = payloads.pack_call_in_pieces(args, kwargs, self._tag, self._parameters, main_by_value=by_value)
        if check_payload(data, f"the arguments of `{self._tag}`"):
            return InputItem(idx, len(data)), data
        return InputItem(idx, 0, await target.client.put_blob.aio(data)), b""

    # -- many

    @both_generator
    async def map(
        self,
        *input_iterators: Any,
        kwargs: dict[str, Any] | None = None,
        order_outputs: bool = True,
        return_exceptions: bool = False,
    ) -> AsyncGenerator[R, None]:
        """Call the function with each item (or with one of each iterator) and yield the results.

        Inputs are taken lazily, at most 1,000 ahead of the results; they may be an async iterable for `.map.aio`.
        Leaving the loop early cancels the rest.

        - `kwargs`: keyword arguments that every input gets.
        - `order_outputs`: False yields what is done first first, instead of in the order of the inputs.
        - `return_exceptions`: True yields the exception of a failed input in its place; otherwise the first failure
          is raised and the rest is cancelled.

        Example:

            @app.function()
            def power(base, exponent, offset=0): return base ** exponent + offset

            @app.local_entrypoint()
            def main():
                print(list(power.map([2, 3], [10, 2], kwargs={"offset": 1})))
        """
        inputs = _map.zip_inputs(input_iterators, "map")
        async for value in await self._map(inputs, kwargs, order_outputs, return_exceptions):
            yield value

    @both_generator
    async def starmap(
        self,
        input_iterator: Any,
        *,
        kwargs: dict[str, Any] | None = None,
        order_outputs: bool = True,
        return_exceptions: bool = False,
    ) -> AsyncGenerator[R, None]:
        """As `map`, with each item spread over the arguments.

        Example:

            @app.function()
            def add(a, b): return a + b

            @app.local_entrypoint()
            def main():
                print(list(add.starmap([(1, 2), (3, 4)])))
        """
        inputs = _map.Inputs(input_iterator, spread=True, verb="starmap")
        async for value in await self._map(inputs, kwargs, order_outputs, return_exceptions):
            yield value

    @both
    async def for_each(
        self, *input_iterators: Any, kwargs: dict[str, Any] | None = None, ignore_exceptions: bool = False
    ) -> None:
        """Call the function with each item and wait for all; results are dropped.

        `ignore_exceptions=True` goes on when an input fails; otherwise the first failure is raised and the rest is
        cancelled.

        Example:

            @app.function()
            def greet(name): print("hello", name)

            @app.local_entrypoint()
            def main():
                greet.for_each(["Ada", "Grace"])
        """
        inputs = _map.zip_inputs(input_iterators, "for_each")
        async for _ in await self._map(inputs, kwargs, False, ignore_exceptions):
            pass

    async def _map(
        self, inputs: _map.Inputs, kwargs: dict[str, Any] | None, ordered: bool, return_exceptions: bool
    ) -> AsyncGenerator[Any, None]:
        if self._lookup is not None:
            await self._find()
        if self._is_generator:
            raise InvalidError(f"`{self._tag}` is a generator and cannot be mapped", hint="use `.remote_gen(...)`")
        target = await self._target()
        order = _map.Order(self._tag, self._parameters, kwargs or {}, ordered, return_exceptions, target.main_by_value)
        submit = _submit(new_id("fc"), target, [], "map")
        return _map.Mapping(target.client, submit, inputs, order, target.source_map).results()

    @both
    async def spawn_map(self, *input_iterators: Any, kwargs: dict[str, Any] | None = None) -> FunctionCall[R]:
        """Start one call with an input per item; gives back its handle once all inputs are on the server's disk.

        `kwargs` as for `map`. Results are had in turn, `for result in call.iter()`, or one by one: `call.get(index=3)`.

        Example:

            @app.function()
            def square(x): return x * x

            @app.local_entrypoint()
            def main():
                call = square.spawn_map(range(5))
                print(list(call.iter()))
        """
        if self._lookup is not None:
            await self._find()
        if self._is_generator:
            raise InvalidError(f"`{self._tag}` is a generator and cannot be spawned", hint="use `.remote_gen(...)`")
        target = await self._target()
        call_id = new_id("fc")
        inputs = _map.zip_inputs(input_iterators, "spawn_map")
        under_way: deque[Pending[Any]] = deque()
        items: list[InputItem] = []
        parts: list[Packed] = []
        count = size = 0
        try:
            async for args in inputs.stream():
                item, data = await self._pack(target, count, args, kwargs or {})
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
        return FunctionCall(call_id, self._tag, target.source_map, count)

    @both
    async def hydrate(self) -> Function[P, R]:
        """Make sure now that the function can be called, instead of at the first call; returns the function itself.

        Raises InvalidError when its app does not run, NotFoundError when it has ended, or is not there by its name.
        """
        target = await self._target()
        await target.client.request(GetStats(target.function_id))
        return self

    @both
    async def get_current_stats(self) -> FunctionStats:
        """How many inputs wait and run, and in how many containers, at this moment.

        Example:

            @app.function()
            def square(x): return x * x

            @app.local_entrypoint()
            def main():
                print(square.get_current_stats().backlog)
        """
        target = await self._target()
        reply, _ = await target.client.request(GetStats(target.function_id))
        known = {key: int(value) for key, value in reply.data.items() if key in FunctionStats.__dataclass_fields__}
        return FunctionStats(**known)

    @property
    def autoscaler(self) -> Autoscaler:
        """Its containers' number while it runs: `.settings()` and `.update(...)`."""
        return Autoscaler(self)

    @both
    async def update_autoscaler(self, /, **settings: float | None) -> dict[str, float]:
        """The same as `autoscaler.update`: `f.update_autoscaler(min_containers=2)` keeps two containers."""
        return await Autoscaler(self).update.aio(**settings)

    @property
    def logs(self) -> Logs:
        """What the function's containers have written; of a class, those of all its methods."""
        from squall.logs import Logs
        from squall.protocol.requests import ReadLogs

        async def target() -> tuple[Client, ReadLogs]:
            found = await self._target()
            return found.client, ReadLogs(function=found.function_id)

        return Logs(target)


def check_batched(raw_f: Any, is_method: bool) -> None:
    """Raises InvalidError for a function that cannot be given lists."""
    name = getattr(raw_f, "__qualname__", repr(raw_f))
    if inspect.isgeneratorfunction(raw_f) or inspect.isasyncgenfunction(raw_f):
        raise InvalidError(f"`{name}` is a generator and cannot be batched")
    parameters = list(inspect.signature(raw_f).parameters.values())[1 if is_method else 0 :]
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    for one in parameters:
        if one.default is not one.empty or one.kind not in plain:
            raise InvalidError(
                f"`{name}` is batched, and its argument `{one}` is not a plain one",
                hint="each argument becomes a list: no defaults, no `*args`, no keyword-only arguments",
            )
    if not parameters:
        raise InvalidError(f"`{name}` is batched and has no argument", hint="each argument becomes a list")


def _submit(call_id: str, target: Target, items: list[InputItem], kind: str) -> Submit:
    parent = clients.current_input_id() or ""
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


# ---- handles that travel ------------------------------------------------------------------------------------------


def _handle_by_id(function_id: str, tag: str, is_generator: bool) -> Function[..., Any]:
    handle: Function[..., Any] = Function(tag, None, None, is_generator)
    handle._object_id = function_id
    return handle


def by_lookup(lookup: Lookup) -> Function[..., Any]:
    """A handle for what a name stands for."""
    handle: Function[..., Any] = Function(lookup.name, None, None, lookup.is_generator)
    handle._lookup = lookup
    return handle


def derived(
    base: Function[..., Any], tag: str, is_generator: bool, method: str, variant: Variant | None
) -> Function[..., Any]:
    """A handle that is called by the id of another: a method of a class, or a variant."""
    handle: Function[..., Any] = Function(tag, None, None, is_generator)
    handle._base, handle._method, handle._variant = base, method, variant
    handle._lookup = base._lookup
    return handle


class _SiblingFunction(Function[..., Any]):
    """A function of the app whose container this is, met in code that was sent by value, before ids existed."""

    def _resolve(self) -> Target:
        from squall.app import sibling_id

        function_id = sibling_id(self._tag)
        if not function_id:
            raise NotFoundError(f"this container's app has no function `{self._tag}`")
        return Target(Client.current(), function_id, {}, True)


def _handle_by_tag(tag: str, is_generator: bool) -> Function[..., Any]:
    return _SiblingFunction(tag, None, None, is_generator)
