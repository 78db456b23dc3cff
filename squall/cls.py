"""Cls: a class whose methods run in containers and share them, and the instances it makes.

Owns the handles of a class (`Cls`) and of an instance (`Obj`), whose methods are `Function` handles that name a method.
To the platform a class is a function with methods: one spec, one pool of containers, and a pool of its own for each set
of parameters (`BindFunction`). In a container the runner makes the one object of the class through `make_here`.
What is decorated how is `_marks`'s part. Tested in `tests/unit/test_cls.py` and `tests/integration/test_classes.py`.
"""

from __future__ import annotations

import functools
import sys
import types
from _thread import RLock  # that of `threading`, which takes a millisecond
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

from squall._blocking import both, run
from squall._callables import kind_of, static
from squall._lookup import Autoscaler, checked_lookup
from squall._marks import (
    MISSING,
    OWN,
    Shape,
    check_value,
    pack_parameters,
    shape_described,
    shape_of,
    unpack_parameters,
)
from squall._object import Handle
from squall.exception import InvalidError
from squall.function import Function, Variant, by_lookup, check_batched, derived
from squall.options import batch_fields, concurrency_fields, merged_fields, variant_fields

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from squall.app import App
    from squall.options import FunctionOptions

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

__all__ = ["Cls", "Method", "Obj", "is_async", "make_here", "plain_method", "shape_of"]


# ---- handles ----------------------------------------------------------------------------------------------------


class Cls(Handle, Generic[T]):
    """A class of an app; `@app.cls()` makes it. Call it for an instance, whose methods run in containers.

    A Cls and its instances may be passed to functions as arguments. A class may be derived from one.

    Example:

        @app.cls(cpu=0.5)
        class Model:
            @squall.enter()
            def load(self):
                self.weights = [1, 2, 3]

            @squall.method()
            def predict(self, x):
                return sum(w * x for w in self.weights)

        @app.local_entrypoint()
        def main():
            print(Model().predict.remote(2), list(Model().predict.map(range(3))))
    """

    _prefix = "fu-"

    def __init__(
        self, pool: Function[..., Any], shape: Shape | None, raw: type[T] | None, fields: dict[str, Any] | None = None
    ) -> None:
        self._pool = pool
        self._known_shape = shape
        self._raw = raw
        self._fields = fields or {}
        """Options of a variant."""
        if raw is not None:
            functools.update_wrapper(self, raw, updated=())
            del self.__wrapped__

    @property
    def _shape(self) -> Shape:
        """Its methods and parameters; of one looked up by name they are known once it was found."""
        if self._known_shape is None:
            run(self.hydrate.aio())
        assert self._known_shape is not None
        return self._known_shape

    @property
    def raw_cls(self) -> type[T]:
        """The plain class behind the decorator."""
        if self._raw is None:
            raise InvalidError(
                f"`{self.tag}` is a handle, its code is not here", hint="make an instance and use `.remote`"
            )
        return self._raw

    @property
    def tag(self) -> str:
        """Its name within its app."""
        return self._pool.tag

    @property
    def app(self) -> App | None:
        """The app it was defined in; None for a handle."""
        return self._pool.app

    @property
    def object_id(self) -> str:
        """Its id while its app runs. Raises InvalidError when it does not."""
        return self._pool.object_id

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of its methods."""
        return tuple(self._shape.methods)

    @property
    def needed(self) -> tuple[str, ...]:
        """The names of the parameters that have no default."""
        return tuple(name for name, one in self._shape.parameters.items() if one.init and one.default is MISSING)

    @classmethod
    def from_name(
        cls, app_name: str, name: str, *, version: int | None = None, environment_name: str | None = None
    ) -> Cls[Any]:
        """A handle for a class of a deployed app; the arguments are those of `Function.from_name`.

        Does no I/O; the class is looked up when an instance is made, or by `hydrate`.

        Example:

            app = squall.App("models")

            @app.cls()
            class Model:
                size: int = squall.parameter(default=1)

                @squall.method()
                def predict(self, x): return self.size * x

            if __name__ == "__main__":
                app.deploy()
                print(squall.Cls.from_name("models", "Model")(size=3).predict.remote(14))
        """
        return Cls(by_lookup(checked_lookup(app_name, name, version, environment_name, is_class=True)), None, None)

    @both
    async def hydrate(self) -> Cls[T]:
        """Make sure now that the class is there, instead of when an instance is made; returns the class itself.

        Raises InvalidError when its app does not run, NotFoundError for one looked up by name that is not there.
        """
        await self._pool._target()
        lookup = self._pool._lookup
        if lookup is not None and self._known_shape is None:
            self._known_shape = shape_described(lookup.shape)
        return self

    def with_options(self, **options: Unpack[FunctionOptions]) -> Cls[T]:
        """The same class with other options, and so with containers of its own; as `Function.with_options`.

        Example:

            @app.cls()
            class Model:
                @squall.method()
                def predict(self, x):
                    return 2 * x

            @app.local_entrypoint()
            def main():
                Large = Model.with_options(cpu=1, memory=512)
                print(Large().predict.remote(21))
        """
        fields = variant_fields(options, f"{self.tag}.with_options")
        return self._variant_with(fields)

    def with_concurrency(self, *, max_inputs: int, target_inputs: int | None = None) -> Cls[T]:
        """The same class with containers that run several inputs at a time, as with `@squall.concurrent`."""
        return self._variant_with(concurrency_fields(max_inputs, target_inputs, f"{self.tag}.with_concurrency"))

    def with_batching(self, *, max_batch_size: int, wait_ms: int) -> Cls[T]:
        """The same class, its one method run in batches, as with `@squall.batched`."""
        if len(self._shape.methods) != 1:
            raise InvalidError(
                f"`{self.tag}.with_batching` needs a class with one method, it has {len(self._shape.methods)}",
                hint=f"methods: {', '.join(self._shape.methods)}",
            )
        if self._raw is not None:
            check_batched(static(self._raw, self.methods[0]).raw_f, True)
        return self._variant_with(batch_fields(max_batch_size, wait_ms, f"{self.tag}.with_batching"))

    def _variant_with(self, fields: dict[str, Any]) -> Cls[T]:
        return Cls(self._pool, self._known_shape, self._raw, merged_fields(self._fields, fields))

    def __call__(self, *args: Any, **kwargs: Any) -> T:
        values = self._values(args, kwargs)
        packed = pack_parameters(self._shape, values) if self._shape.parameters else b""
        variant = Variant(self._fields, packed) if self._fields or packed else None
        return Obj(self._pool, self.tag, self._shape, variant, values, self._raw)  # type: ignore[return-value]

    def _values(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """What each parameter is. Raises InvalidError as Python would for a wrong call."""
        settable = {name: one for name, one in self._shape.parameters.items() if one.init}
        takes = f"it takes {', '.join(f'{name}: {one.kind}' for name, one in settable.items())}" if settable else ""
        takes = takes or "it has no parameters: declare them with `squall.parameter()`"
        if len(args) > len(settable):
            raise InvalidError(f"`{self.tag}` is given {len(args)} arguments, it takes {len(settable)}", hint=takes)
        given = dict(zip(settable, args, strict=False))
        for name, value in kwargs.items():
            if name not in settable or name in given:
                what = "is given twice" if name in given else "is not a parameter"
                raise InvalidError(f"`{self.tag}({name}=...)`: `{name}` {what}", hint=takes)
            given[name] = value
        for name, one in self._shape.parameters.items():
            if name in given:
                check_value(one, given[name], f"`{self.tag}({name}=...)`")
            elif one.default is not MISSING:
                given[name] = one.default
            elif one.init:
                raise InvalidError(f"`{self.tag}` needs its parameter `{name}`", hint=takes)
        return given

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (self.raw_cls,)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_known_shape" not in self.__dict__:
            raise AttributeError(name)
        if name in self._shape.methods:
            raise InvalidError(
                f"`{self.tag}.{name}` is a method of a class, and needs an instance",
                hint=f"make one first: `{self.tag}().{name}.remote(...)`",
            )
        if self._raw is not None:
            return getattr(self._raw, name)
        raise AttributeError(f"class `{self.tag}` has no `{name}`")

    def __reduce__(self) -> tuple[Any, ...]:
        return Cls, (self._pool, self._known_shape, None, self._fields)

    def __repr__(self) -> str:
        return f"<Cls `{self.tag}`>"


class Obj:
    """What calling a Cls gives: methods to call, and the values of the parameters.

    Anything else is looked up on an object of the class that is made, and entered, right here.
    """

    def __init__(
        self,
        pool: Function[..., Any],
        tag: str,
        shape: Shape,
        variant: Variant | None,
        values: dict[str, Any],
        raw: type | None,
    ) -> None:
        self._pool = pool
        self._tag = tag
        self._shape = shape
        self._variant = variant
        self._values = values
        self._raw = raw
        self._local: Any = None
        self._is_entered = False
        self._lock = RLock()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_lock" not in self.__dict__:
            raise AttributeError(name)
        is_generator = self._shape.methods.get(name)
        if is_generator is not None:
            handle: Method[..., Any] = Method(self, name, is_generator)
            self.__dict__[name] = handle
            return handle
        if name in self._values:
            return self._values[name]
        if self._raw is None:
            raise AttributeError(f"an instance of `{self._tag}` has no method or parameter `{name}`")
        return getattr(self._entered(), name)

    def _entered(self) -> Any:
        """The object of the class in this process, its enter hooks run, once."""
        with self._lock:
            instance = self._made()
            if not self._is_entered:
                for name in self._shape.enters:
                    hook = plain_method(instance, name)
                    if is_async(hook):
                        _run_here(hook(), f"{self._tag}.{name}")
                    else:
                        hook()
                self._is_entered = True
            return instance

    async def _entered_async(self) -> Any:
        """As `_entered`, inside a running event loop."""
        instance = self._made()
        if not self._is_entered:
            self._is_entered = True
            try:
                for name in self._shape.enters:
                    result = plain_method(instance, name)()
                    if isinstance(result, Awaitable):
                        await result
            except BaseException:
                self._is_entered = False
                raise
        return instance

    def _made(self) -> Any:
        if self._local is None:
            if self._raw is None:
                raise InvalidError(f"`{self._tag}` is a handle, its code is not here", hint="use `.remote(...)`")
            self._local = make_instance(self._raw, self._values, self._shape, self)
        return self._local

    @property
    def autoscaler(self) -> Autoscaler:
        """How many containers this instance has while it runs: `.settings()` and `.update(...)`."""
        return Autoscaler(derived(self._pool, self._tag, False, "", self._variant))

    @both
    async def update_autoscaler(self, /, **settings: float | None) -> dict[str, float]:
        """As `autoscaler.update`."""
        return await self.autoscaler.update.aio(**settings)

    def __reduce__(self) -> tuple[Any, ...]:
        return Obj, (self._pool, self._tag, self._shape, self._variant, self._values, None)

    def __repr__(self) -> str:
        return f"<{self._tag}({', '.join(f'{name}={value!r:.40}' for name, value in self._values.items())})>"


class Method(Function[P, R]):
    """A method of an instance, as a Function."""

    def __init__(self, obj: Obj, name: str, is_generator: bool) -> None:
        raw_f = None if obj._raw is None else static(obj._raw, name).raw_f
        super().__init__(f"{obj._tag}.{name}", raw_f, obj._pool.app, is_generator)
        self._parameters = self._parameters[1:]  # without `self`
        self._base, self._method, self._variant = obj._pool, name, obj._variant
        self._lookup = obj._pool._lookup
        self._obj = obj

    def local(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the method right here, on an object that is made and entered once for this instance."""
        raw_f: Any = self.raw_f
        result: Any
        if not is_async(raw_f):
            result = raw_f(self._obj._entered(), *args, **kwargs)
        elif kind_of(raw_f)[0]:
            result = self._generate_here(args, kwargs)
        else:
            result = self._run_here(args, kwargs)
        return result  # type: ignore[no-any-return]

    async def _run_here(self, args: Any, kwargs: Any) -> Any:
        return await self.raw_f(await self._obj._entered_async(), *args, **kwargs)  # type: ignore[misc]

    async def _generate_here(self, args: Any, kwargs: Any) -> Any:
        async for value in self.raw_f(await self._obj._entered_async(), *args, **kwargs):  # type: ignore[attr-defined]
            yield value

    def _variant_with(self, fields: dict[str, Any]) -> Function[P, R]:
        raise InvalidError(
            f"`{self._tag}` is a method, and options belong to its class",
            hint=f"use `{self._obj._tag}.with_options(...)` and so on, and make an instance of what it gives",
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return derived, (self._base, self._tag, self._is_generator, self._method, self._variant)


def _run_here(awaitable: Any, name: str) -> Any:
    asyncio = sys.modules.get("asyncio")
    if asyncio is not None and asyncio._get_running_loop() is not None:
        awaitable.close()
        raise InvalidError(
            f"async hook `{name}` cannot run for a plain method inside a running event loop",
            hint="make the method async as well",
        )
    import asyncio as loops  # only async hooks pay for it

    return loops.run(awaitable)


# ---- objects of the user's class ----------------------------------------------------------------------------------


def is_async(call: Callable[..., Any]) -> bool:
    return kind_of(call)[1]


def plain_method(instance: Any, name: str) -> Callable[..., Any]:
    """A decorated method or hook of an object, as the plain bound method."""
    mark = static(type(instance), name)
    return types.MethodType(mark.raw_f, instance)


def make_instance(raw: type, values: dict[str, Any], shape: Shape, obj: Obj) -> Any:
    """An object of the user's class with its parameters set, and not entered."""
    instance = raw()
    for name, one in shape.parameters.items():
        if name in values:
            setattr(instance, name, values[name])
        elif one.default is not MISSING:
            setattr(instance, name, one.default)
    try:
        object.__setattr__(instance, OWN, obj)
    except AttributeError:  # it has slots: its methods cannot be called remotely from its own code
        pass
    return instance


def make_here(raw: Any, shape: Shape, tag: str, function_id: str, parameters: bytes) -> Any:
    """For the runner: the object that this container is for; `self.method.remote()` goes to the same pool."""
    pool: Function[..., Any] = Function.from_id(function_id)
    pool._tag = tag
    values = unpack_parameters(parameters)
    obj = Obj(pool, tag, shape, None, values, raw)
    obj._local = make_instance(raw, values, shape, obj)
    obj._is_entered = True
    return obj._local
