"""Cls: a class whose methods run in containers and share them; the decorators of its methods and hooks, its parameters.

Owns the rules of what may be decorated how, checked at the decorator's line or at `@app.cls()`, and the handles of a
class (`Cls`) and of an instance (`Obj`), whose methods are `Function` handles that name a method. To the platform a
class is a function with methods: one spec, one pool of containers, and a pool of its own for each set of parameters
(`BindFunction`). In a container the runner makes the one object of the class through `make_here`.
Must not build specs (`app.py`). Tested in `tests/unit/test_cls.py` and `tests/integration/test_classes.py`.
"""

from __future__ import annotations

import functools
import inspect
import json
import sys
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Concatenate, Generic, Literal, ParamSpec, TypeVar, overload

from squall._object import Handle
from squall.exception import InvalidError
from squall.function import Function, Variant, derived
from squall.options import FunctionOptions, merged_fields, not_yet, variant_fields

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from squall.app import App

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

Kind = Literal["method", "enter", "exit"]
PARAMETER_KINDS: dict[str, type] = {"str": str, "int": int, "bytes": bytes, "bool": bool}
EXIT_GRACE = 30.0
"""Seconds that exit hooks are given."""
_MISSING: Any = ...
"""The default of a parameter that has none; a singleton that survives pickling."""
_OWN = "__squall_obj__"
"""Attribute of an object of the user's class: the `Obj` it is the object of."""


# ---- decorators -------------------------------------------------------------------------------------------------


class Marked(Generic[P, R]):
    """What `@squall.method`, `@squall.enter` and `@squall.exit` make of a function in a class's body.

    On an object of the class it is the function, bound; a method can be called remotely from there too.
    """

    def __init__(self, kind: Kind, raw_f: Callable[..., R], *, is_generator: bool = False, snap: bool = False) -> None:
        self.kind = kind
        self.raw_f = raw_f
        self.is_generator = is_generator
        self.snap = snap
        self.__name__ = raw_f.__name__
        self.__qualname__ = raw_f.__qualname__
        self.__doc__ = raw_f.__doc__

    @overload
    def __get__(self, instance: None, owner: type) -> Marked[P, R]: ...

    @overload
    def __get__(self, instance: object, owner: type) -> Function[P, R]: ...

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        if self.kind != "method":
            return types.MethodType(self.raw_f, instance)
        return _Here(self, instance)

    def __repr__(self) -> str:
        return f"<@squall.{self.kind}() `{self.__qualname__}`>"


class _Here:
    """A method on an object of the user's class: called it runs here, and `.remote` and the rest are its handle's."""

    __slots__ = ("_instance", "_mark")

    def __init__(self, mark: Marked[..., Any], instance: Any) -> None:
        self._mark = mark
        self._instance = instance

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._mark.raw_f(self._instance, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        obj = getattr(self._instance, _OWN, None)
        if obj is None:
            raise InvalidError(
                f"`{self._mark.__qualname__}.{name}` has no class of an app to go to: its object was made directly",
                hint="call the class that `@app.cls()` made",
            )
        return getattr(getattr(obj, self._mark.__name__), name)


def method(*wrong: Any, is_generator: bool | None = None) -> Callable[[Callable[Concatenate[Any, P], R]], Marked[P, R]]:
    """Make a method of an `@app.cls()` class callable in containers, as `instance.method.remote(...)` and so on.

    It may be async, a generator, or both. On an object in a container, `self.method(...)` is the plain call and
    `self.method.remote(...)` one that any container of the same pool may take.

    - `is_generator`: True for a plain method that returns a generator.

    Example:

        @app.cls()
        class Greeter:
            @squall.method()
            def greet(self, name):
                return f"hello {name}"

        @app.local_entrypoint()
        def main():
            print(Greeter().greet.remote("Ada"))
    """
    _check_parentheses("method", wrong)

    def decorate(raw_f: Callable[Concatenate[Any, P], R]) -> Marked[P, R]:
        _check_markable(raw_f, "method")
        target = inspect.unwrap(raw_f)
        found = inspect.isgeneratorfunction(target) or inspect.isasyncgenfunction(target)
        return Marked("method", raw_f, is_generator=found if is_generator is None else bool(is_generator))

    return decorate


def enter(*wrong: Any, snap: bool = False) -> Callable[[Callable[[Any], Any]], Marked[[], Any]]:
    """Make a method of an `@app.cls()` class run once in each container, before its first input.

    May be async. Hooks run in the order in which they are written, those of base classes first. What a hook
    raises comes out of the call as StartupError, with its traceback; `startup_timeout` limits import and hooks.

    - `snap`: True runs the hook before those with False. Memory snapshots are not in this release: the hook runs in
      each container all the same.

    Example:

        @app.cls()
        class Counter:
            @squall.enter()
            def load(self):
                self.words = {"to": 2, "be": 2}

            @squall.method()
            def count(self, word):
                return self.words.get(word, 0)

        @app.local_entrypoint()
        def main():
            print(Counter().count.remote("be"))
    """
    _check_parentheses("enter", wrong)
    if not isinstance(snap, bool):
        raise InvalidError(f"`@squall.enter(snap={snap!r})` takes True or False")

    def decorate(raw_f: Callable[[Any], Any]) -> Marked[[], Any]:
        _check_hook(raw_f, "enter")
        return Marked("enter", raw_f, snap=snap)

    return decorate


def exit(*wrong: Any) -> Callable[[Callable[[Any], Any]], Marked[[], Any]]:
    """Make a method of an `@app.cls()` class run once in each container, after its last input.

    May be async. Hooks run when a container is idle for too long, when its app stops, and on SIGTERM; together they
    have 30 s, then the container is killed. They do not run in a container that is killed: by a timeout, for want of
    memory, by a crash, or because an enter hook failed. Hooks of base classes run last; what one raises is printed
    and the others run all the same.

    Example:

        @app.cls(scaledown_window=2)
        class Log:
            @squall.exit()
            def close(self):
                print("closed")

            @squall.method()
            def write(self, line):
                print(line)

        @app.local_entrypoint()
        def main():
            Log().write.remote("hello")
    """
    _check_parentheses("exit", wrong)

    def decorate(raw_f: Callable[[Any], Any]) -> Marked[[], Any]:
        _check_hook(raw_f, "exit")
        return Marked("exit", raw_f)

    return decorate


def _check_parentheses(name: str, wrong: tuple[Any, ...]) -> None:
    if wrong:
        raise InvalidError(
            f"`@squall.{name}` was used without its parentheses", hint=f"write `@squall.{name}()` above the method"
        )


def _check_markable(raw_f: Any, name: str) -> None:
    decorator = f"@squall.{name}()"
    if isinstance(raw_f, Marked):
        raise InvalidError(
            f"`{raw_f.__qualname__}` is decorated with `@squall.{raw_f.kind}()` and `{decorator}`",
            hint="a function of a class is a method, an enter hook or an exit hook: keep one decorator",
        )
    if isinstance(raw_f, (staticmethod, classmethod, property)):
        raise InvalidError(
            f"`{decorator}` decorates a `{type(raw_f).__name__}`", hint="it takes a plain method, with `self`"
        )
    if isinstance(raw_f, Function):
        raise InvalidError(
            f"`{raw_f.tag}` is decorated with `@app.function()` and `{decorator}`",
            hint=f"in a class decorated with `@app.cls()`, use `{decorator}` alone",
        )
    if not inspect.isfunction(raw_f) or "<lambda>" in raw_f.__qualname__:
        raise InvalidError(f"`{decorator}` decorates {raw_f!r:.200}", hint="it takes a method defined with `def`")
    scope = raw_f.__qualname__.rpartition(".")[0]
    if not scope or scope.endswith("<locals>"):
        raise InvalidError(
            f"`{decorator}` decorates `{raw_f.__name__}`, which is in no class",
            hint="use `@app.function()` for a function; methods belong in a class decorated with `@app.cls()`",
        )


def _check_hook(raw_f: Any, name: str) -> None:
    _check_markable(raw_f, name)
    needed = _needed(raw_f)
    if needed:
        raise InvalidError(
            f"{name} hook `{raw_f.__qualname__}` has the argument `{needed[0]}`",
            hint="a hook gets nothing but `self`; use `squall.parameter()` for what differs between instances",
        )
    if inspect.isgeneratorfunction(raw_f) or inspect.isasyncgenfunction(raw_f):
        raise InvalidError(f"{name} hook `{raw_f.__qualname__}` is a generator", hint="a hook returns when it is done")


def _needed(raw_f: Any) -> list[str]:
    """Arguments beside `self` that a call must give."""
    rest = list(inspect.signature(raw_f).parameters.values())[1:]
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [one.name for one in rest if one.default is one.empty and one.kind not in optional]


# ---- parameters -------------------------------------------------------------------------------------------------


@dataclass
class Parameter:
    """One parameter of a class; `kind` is its type's name."""

    default: Any
    init: bool
    name: str = ""
    kind: str = ""


def parameter(*, default: Any = _MISSING, init: bool = True) -> Any:
    """Declare a parameter of an `@app.cls()` class: `name: str = squall.parameter()`.

    Its type is str, int, bytes or bool. Instances are made with it, `Model(name="small")`, and every distinct set of
    values has a pool of containers of its own, in which `self.name` is the value.

    - `default`: what it is when left out; without one it must be given.
    - `init`: False for one that cannot be given: it has its default, or what an enter hook sets.

    Raises InvalidError for an unknown type, at `@app.cls()`, and for a wrong value, where the instance is made.

    Example:

        @app.cls()
        class Model:
            name: str = squall.parameter(default="small")

            @squall.method()
            def describe(self):
                return f"the {self.name} model"

        @app.local_entrypoint()
        def main():
            print(Model().describe.remote(), Model(name="large").describe.remote())
    """
    if not isinstance(init, bool):
        raise InvalidError(f"`squall.parameter(init={init!r})` takes True or False")
    return Parameter(default, init)


def _parameters_of(raw: type) -> dict[str, Parameter]:
    found: dict[str, Parameter] = {}
    for base in reversed(raw.__mro__):
        annotations = inspect.get_annotations(base)
        for name, value in vars(base).items():
            if isinstance(value, Parameter):
                found[name] = _parameter_of(raw, name, value, annotations.get(name))
            elif name in found:  # a subclass has made it a plain attribute
                del found[name]
    return found


def _parameter_of(raw: type, name: str, value: Parameter, annotation: Any) -> Parameter:
    where = f"parameter `{name}` of class `{raw.__qualname__}`"
    if annotation is None:
        raise InvalidError(f"{where} has no type", hint=f"write `{name}: str = squall.parameter()`")
    kind = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", repr(annotation))
    known = PARAMETER_KINDS.get(kind)
    if known is None or (isinstance(annotation, type) and annotation is not known):
        raise InvalidError(f"{where} is a `{kind}`", hint="a parameter is a str, int, bytes or bool")
    made = Parameter(value.default, value.init, name, kind)
    if value.default is not _MISSING:
        _check_value(made, value.default, f"the default of {where}")
    return made


def _check_value(one: Parameter, value: Any, what: str) -> None:
    if type(value) is not PARAMETER_KINDS[one.kind]:
        raise InvalidError(f"{what} is {value!r:.80}, a `{type(value).__name__}`", hint=f"it takes {one.kind}")


def pack_parameters(shape: Shape, values: dict[str, Any]) -> bytes:
    """The values as bytes: the same for the same. JSON, with bytes as hexadecimal digits."""
    rows = [
        [name, shape.parameters[name].kind, value.hex() if isinstance(value, bytes) else value]
        for name, value in sorted(values.items())
    ]
    return json.dumps(rows, separators=(",", ":")).encode()


def unpack_parameters(data: bytes) -> dict[str, Any]:
    rows = json.loads(data) if data else []
    return {name: bytes.fromhex(value) if kind == "bytes" else value for name, kind, value in rows}


# ---- the shape of a class ---------------------------------------------------------------------------------------


@dataclass
class Shape:
    """What is to be known of a class to make handles of it and to run it; plain values, so that it travels."""

    methods: dict[str, bool] = field(default_factory=dict)
    """Name -> whether it is a generator."""
    enters: list[str] = field(default_factory=list)
    exits: list[str] = field(default_factory=list)
    parameters: dict[str, Parameter] = field(default_factory=dict)


def shape_of(raw: type) -> Shape:
    """Its methods, hooks and parameters with those of its bases. Raises InvalidError for what does not fit together."""
    enters = [(name, mark) for name, mark in _marks(raw, reversed(raw.__mro__)) if mark.kind == "enter"]
    shape = Shape(
        {name: mark.is_generator for name, mark in _marks(raw, reversed(raw.__mro__)) if mark.kind == "method"},
        [name for name, mark in sorted(enters, key=lambda pair: not pair[1].snap)],
        [name for name, mark in _marks(raw, iter(raw.__mro__)) if mark.kind == "exit"],
        _parameters_of(raw),
    )
    _check_init(raw, shape)
    return shape


def _marks(raw: type, bases: Iterator[type]) -> Iterator[tuple[str, Marked[..., Any]]]:
    """What is decorated, in the order of the classes and of their lines; an override counts where it was first."""
    seen: set[str] = set()
    for base in bases:
        for name, value in vars(base).items():
            inner = getattr(value, "__func__", None) if isinstance(value, (staticmethod, classmethod)) else None
            if isinstance(inner, Marked):
                raise InvalidError(
                    f"`{inner.__qualname__}` is a `{type(value).__name__}` with `@squall.{inner.kind}()`",
                    hint="it takes a plain method, with `self`",
                )
            final = inspect.getattr_static(raw, name)
            if isinstance(final, Marked) and isinstance(value, (Marked, types.FunctionType)) and name not in seen:
                seen.add(name)
                yield name, final


def _check_init(raw: type, shape: Shape) -> None:
    if raw.__init__ is object.__init__:  # type: ignore[misc]
        return
    if shape.parameters:
        raise InvalidError(
            f"class `{raw.__qualname__}` has parameters and an `__init__` of its own",
            hint="leave `__init__` (or `@dataclass`) out, and set up the object in a `@squall.enter()` hook",
        )
    needed = _needed(raw.__init__)  # type: ignore[misc]
    if needed:
        raise InvalidError(
            f"`{raw.__qualname__}.__init__` has the argument `{needed[0]}`, which a container cannot give it",
            hint=f"declare it in the class: `{needed[0]}: str = squall.parameter()`",
        )


def is_async(call: Callable[..., Any]) -> bool:
    target = inspect.unwrap(call)
    return inspect.iscoroutinefunction(target) or inspect.isasyncgenfunction(target)


def plain_method(instance: Any, name: str) -> Callable[..., Any]:
    """A decorated method or hook of an object, as the plain bound method."""
    mark = inspect.getattr_static(type(instance), name)
    return types.MethodType(mark.raw_f, instance)


def make_instance(raw: type, values: dict[str, Any], shape: Shape, obj: Obj) -> Any:
    """An object of the user's class with its parameters set, and not entered."""
    instance = raw()
    for name, one in shape.parameters.items():
        if name in values:
            setattr(instance, name, values[name])
        elif one.default is not _MISSING:
            setattr(instance, name, one.default)
    try:
        object.__setattr__(instance, _OWN, obj)
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
        self, pool: Function[..., Any], shape: Shape, raw: type[T] | None, fields: dict[str, Any] | None = None
    ) -> None:
        self._pool = pool
        self._shape = shape
        self._raw = raw
        self._fields = fields or {}
        """Options of a variant."""
        if raw is not None:
            functools.update_wrapper(self, raw, updated=())
            del self.__wrapped__

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
        return tuple(name for name, one in self._shape.parameters.items() if one.init and one.default is _MISSING)

    @classmethod
    def from_name(cls, app_name: str, name: str, **_options: object) -> Cls[Any]:
        """Classes of deployed apps; not in this release."""
        raise not_yet(f"Cls.from_name({app_name!r}, {name!r})", "apps live while they run: use `with app.run():`")

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
        return Cls(self._pool, self._shape, self._raw, merged_fields(self._fields, fields))

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
                _check_value(one, given[name], f"`{self.tag}({name}=...)`")
            elif one.default is not _MISSING:
                given[name] = one.default
            elif one.init:
                raise InvalidError(f"`{self.tag}` needs its parameter `{name}`", hint=takes)
        return given

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (self.raw_cls,)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_shape" not in self.__dict__:
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
        return Cls, (self._pool, self._shape, None, self._fields)

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
        self._lock = threading.RLock()

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
                    if inspect.isawaitable(result):
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

    def __reduce__(self) -> tuple[Any, ...]:
        return Obj, (self._pool, self._tag, self._shape, self._variant, self._values, None)

    def __repr__(self) -> str:
        return f"<{self._tag}({', '.join(f'{name}={value!r:.40}' for name, value in self._values.items())})>"


class Method(Function[P, R]):
    """A method of an instance, as a Function."""

    def __init__(self, obj: Obj, name: str, is_generator: bool) -> None:
        raw_f = None if obj._raw is None else inspect.getattr_static(obj._raw, name).raw_f
        super().__init__(f"{obj._tag}.{name}", raw_f, obj._pool.app, is_generator)
        self._parameters = self._parameters[1:]  # without `self`
        self._base, self._method, self._variant = obj._pool, name, obj._variant
        self._obj = obj

    def local(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the method right here, on an object that is made and entered once for this instance."""
        raw_f: Any = self.raw_f
        result: Any
        if not is_async(raw_f):
            result = raw_f(self._obj._entered(), *args, **kwargs)
        elif inspect.isasyncgenfunction(inspect.unwrap(raw_f)):
            result = self._generate_here(args, kwargs)
        else:
            result = self._run_here(args, kwargs)
        return result  # type: ignore[no-any-return]

    async def _run_here(self, args: Any, kwargs: Any) -> Any:
        return await self.raw_f(await self._obj._entered_async(), *args, **kwargs)  # type: ignore[misc]

    async def _generate_here(self, args: Any, kwargs: Any) -> Any:
        async for value in self.raw_f(await self._obj._entered_async(), *args, **kwargs):  # type: ignore[attr-defined]
            yield value

    def with_options(self, **options: Unpack[FunctionOptions]) -> Function[P, R]:
        """Options belong to the class: `Model.with_options(...)`."""
        raise InvalidError(
            f"`{self._tag}` is a method, and options belong to its class",
            hint=f"use `{self._obj._tag}.with_options(...)` and make an instance of what it gives",
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
