"""Function: what a user calls; `call.py` has the handle of what was spawned, `_calling.py` what the verbs do.

Owns the handle: what it stands for, its variants, how it travels, and the verbs (`remote`, `local`, `map`, `spawn` ...)
as users see them, each one coroutine with two faces (`_blocking`). Must never build specs (`app.py`), nor import at its
head what talks to the server: decorating a function has to stay cheap. Tested in `tests/unit/test_function.py` and
`tests/integration/test_calls.py`.
"""

from __future__ import annotations

import functools
import types
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

from squall._blocking import both, both_generator, run
from squall._callables import kind_of
from squall._lookup import Autoscaler, Lookup, checked_lookup
from squall._object import Handle, checked_id
from squall.exception import InvalidError, NotFoundError, SerializationError
from squall.options import batch_fields, concurrency_fields, merged_fields, variant_fields

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from squall._calling import Caller, Target
    from squall.app import App
    from squall.call import FunctionCall, FunctionStats
    from squall.client import Client
    from squall.logs import Logs
    from squall.options import FunctionOptions

P = ParamSpec("P")
R = TypeVar("R")

KEY_LIMIT = 200


class Variant:
    """What gives a function a pool of its own: `options` that differ, as fields of its spec, and for a class its
    packed `parameters`. All handles with the same Variant ask for the pool's id once."""

    def __init__(self, options: dict[str, Any], parameters: bytes = b"") -> None:
        self.options = options
        self.parameters = parameters
        self._ids: dict[str, str] = {}
        """Base function's id -> the pool's."""

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
            return _handle_by_id, (self._caller().resolve().function_id, self._tag, self._is_generator)
        except InvalidError as error:
            raise SerializationError(f"cannot pickle {self!r}: its app is not running", hint=error.hint) from None

    def _caller(self) -> Caller:
        """Its other half, which talks to the server."""
        from squall._calling import Caller  # what calls functions is not needed to define them

        return Caller(self)

    async def _target(self) -> Target:
        return await self._caller().target()

    def _known_id(self) -> str:
        """Its id where that does not follow from its app's run; empty while there is none."""
        return self._object_id or ("" if self._lookup is None else self._lookup.function_id)

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
        return await self._caller().remote(args, kwargs)  # type: ignore[no-any-return]

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
        async for value in await self._caller().remote_gen(args, kwargs):
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
        return await self._caller().spawn("", args, kwargs)

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
        return await self._caller().spawn(key, args, kwargs)

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
        results = await self._caller().map("map", input_iterators, kwargs, order_outputs, return_exceptions)
        async for value in results:
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
        results = await self._caller().starmap(input_iterator, kwargs, order_outputs, return_exceptions)
        async for value in results:
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
        async for _ in await self._caller().map("for_each", input_iterators, kwargs, False, ignore_exceptions):
            pass

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
        return await self._caller().spawn_map(input_iterators, kwargs or {})

    @both
    async def hydrate(self) -> Function[P, R]:
        """Make sure now that the function can be called, instead of at the first call; returns the function itself.

        Raises InvalidError when its app does not run, NotFoundError when it has ended, or is not there by its name.
        """
        await self._caller().stats()
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
        return await self._caller().stats()

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
    import inspect  # 9 ms that only rarer decorators need

    name = getattr(raw_f, "__qualname__", repr(raw_f))
    if kind_of(raw_f)[0]:
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

    def _known_id(self) -> str:
        from squall.app import sibling_id

        function_id = sibling_id(self._tag)
        if not function_id:
            raise NotFoundError(f"this container's app has no function `{self._tag}`")
        return function_id


def _handle_by_tag(tag: str, is_generator: bool) -> Function[..., Any]:
    return _SiblingFunction(tag, None, None, is_generator)
