"""What decorates the inside of a class, or a function beside `@app.function`: methods, hooks, parameters, concurrency.

Owns the rules of what may be decorated how, checked at the decorator's line, and `shape_of`, which reads off a class
what its decorators say, checked at `@app.cls()`. Must not know handles of classes (`cls.py`) or build specs (`app.py`).
Tested in `tests/unit/test_cls.py`.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Concatenate, Generic, Literal, ParamSpec, TypeVar, overload

from squall._callables import kind_of, needed, static
from squall.exception import InvalidError
from squall.function import Function, check_batched
from squall.options import batch_fields, concurrency_fields
from squall.protocol.records import Record, field, record, replaced
from squall.schedule import Schedule, schedule_fields

if TYPE_CHECKING:
    from squall.protocol.specs import ScheduleSpec

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

Kind = Literal["method", "enter", "exit"]
PARAMETER_KINDS: dict[str, type] = {"str": str, "int": int, "bytes": bytes, "bool": bool}
EXIT_GRACE = 30.0
"""Seconds that exit hooks are given."""
MISSING: Any = ...
"""The default of a parameter that has none; a singleton that survives pickling."""
OWN = "__squall_obj__"
"""Attribute of an object of the user's class: the `Obj` it is the object of."""
FIELDS = "__squall_fields__"
"""Attribute of a function or class: fields of its spec that a decorator below `@app.function` or `@app.cls` gave."""


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
        self.fields: dict[str, Any] = {}
        """Of the spec of its class, as `@squall.batched` gives them."""
        self.schedule: ScheduleSpec | None = None
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
        obj = getattr(self._instance, OWN, None)
        if obj is None:
            raise InvalidError(
                f"`{self._mark.__qualname__}.{name}` has no class of an app to go to: its object was made directly",
                hint="call the class that `@app.cls()` made",
            )
        return getattr(getattr(obj, self._mark.__name__), name)


def method(
    *wrong: Any, is_generator: bool | None = None, schedule: Schedule | None = None
) -> Callable[[Callable[Concatenate[Any, P], R]], Marked[P, R]]:
    """Make a method of an `@app.cls()` class callable in containers, as `instance.method.remote(...)` and so on.

    It may be async, a generator, or both. On an object in a container, `self.method(...)` is the plain call and
    `self.method.remote(...)` one that any container of the same pool may take.

    - `is_generator`: True for a plain method that returns a generator.
    - `schedule`: a `Cron` or a `Period`: when the app is deployed, the method is called at these times. All its
      arguments must have defaults, and its class no parameters.

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
    schedules: list[ScheduleSpec] = [] if schedule is None else schedule_fields(schedule)["schedules"]

    def decorate(raw_f: Callable[Concatenate[Any, P], R]) -> Marked[P, R]:
        _check_markable(raw_f, "method")
        found = kind_of(raw_f)[0] if is_generator is None else bool(is_generator)
        mark: Marked[P, R] = Marked("method", raw_f, is_generator=found)
        if schedules:
            check_schedulable(raw_f, raw_f.__qualname__, is_generator=mark.is_generator, skip=1)
            mark.schedule = schedules[0]
        return mark

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


def concurrent(*wrong: Any, max_inputs: int, target_inputs: int | None = None) -> Callable[[T], T]:
    """Let each container run several inputs at a time; stands below `@app.function()` or `@app.cls()`.

    An async function runs as tasks of one event loop, a plain one in threads, not in the main thread.

    - `max_inputs`: how many a container runs at most, 1 to 1,000.
    - `target_inputs`: how many the autoscaler counts on; what comes in a burst goes up to `max_inputs`. The same as
      `max_inputs` when left out.

    Raises InvalidError at this line for a wrong value or place.

    Example:

        @app.function(max_containers=1)
        @squall.concurrent(max_inputs=20)
        async def wait(seconds):
            import asyncio
            await asyncio.sleep(seconds)
            return seconds

        @app.local_entrypoint()
        def main():
            print(sum(wait.map([0.2] * 20)))
    """
    _check_parentheses("concurrent", wrong)
    fields = concurrency_fields(max_inputs, target_inputs, "@squall.concurrent")

    def decorate(raw: T) -> T:
        if isinstance(raw, Marked) or (isinstance(raw, types.FunctionType) and _is_in_class(raw)):
            raise InvalidError(
                f"`{raw.__qualname__}` is a method, and `@squall.concurrent()` belongs to its class",
                hint="put it between `@app.cls()` and the class: the methods share a container's slots",
            )
        _check_below(raw, "concurrent")
        return _with_fields(raw, fields)

    return decorate


def batched(*wrong: Any, max_batch_size: int, wait_ms: int) -> Callable[[Callable[..., Any]], Any]:
    """Collect inputs and run them in one call; below `@app.function()`, or in a class instead of `@squall.method()`.

    The function is called by its callers with single values, as if there were no batches, and is itself given a list
    for each argument. It returns a list with a result for each input in their order; an exception in the list is
    raised for that input alone.

    - `max_batch_size`: inputs of one call, 1 to 1,000.
    - `wait_ms`: milliseconds that an input waits for others, 0 to 600,000; a full batch starts at once.

    Raises InvalidError at this line for a wrong value or place, for a generator, and for arguments with defaults.

    Example:

        @app.function()
        @squall.batched(max_batch_size=8, wait_ms=50)
        def double(xs):
            return [2 * x for x in xs]

        @app.local_entrypoint()
        def main():
            print(list(double.map(range(5))))
    """
    _check_parentheses("batched", wrong)
    fields = batch_fields(max_batch_size, wait_ms, "@squall.batched")

    def decorate(raw: Callable[..., Any]) -> Any:
        if isinstance(raw, type):
            raise InvalidError(
                f"`@squall.batched()` decorates the class `{raw.__name__}`",
                hint="put it above the one method of the class",
            )
        _check_below(raw, "batched")
        in_class = isinstance(raw, types.FunctionType) and _is_in_class(raw)
        if in_class or isinstance(raw, Marked):
            _check_markable(raw, "batched")
        check_batched(raw, bool(in_class))
        if not in_class:
            return _with_fields(raw, fields)
        mark: Marked[..., Any] = Marked("method", raw)
        mark.fields = fields
        return mark

    return decorate


def _check_below(raw: Any, name: str) -> None:
    if isinstance(raw, Function) or hasattr(type(raw), "raw_cls"):
        raise InvalidError(
            f"`@squall.{name}()` stands above `@app.function()` or `@app.cls()` of `{raw.tag}`",
            hint=f"put `@squall.{name}()` below it, next to the `def` or `class`",
        )
    if not callable(raw) and not isinstance(raw, Marked):
        raise InvalidError(f"`@squall.{name}()` decorates {raw!r:.200}", hint="it takes a function")


def _with_fields(raw: T, fields: Mapping[str, Any]) -> T:
    setattr(raw, FIELDS, {**fields_of(raw), **fields})
    return raw


def fields_of(raw: Any) -> dict[str, Any]:
    """Fields of a spec that decorators gave to a function or, its bases apart, to a class."""
    return dict(vars(raw).get(FIELDS, {}))


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
    if not isinstance(raw_f, types.FunctionType) or "<lambda>" in raw_f.__qualname__:
        raise InvalidError(f"`{decorator}` decorates {raw_f!r:.200}", hint="it takes a method defined with `def`")
    if not _is_in_class(raw_f):
        raise InvalidError(
            f"`{decorator}` decorates `{raw_f.__name__}`, which is in no class",
            hint="use `@app.function()` for a function; methods belong in a class decorated with `@app.cls()`",
        )


def _is_in_class(raw_f: types.FunctionType) -> bool:
    scope = raw_f.__qualname__.rpartition(".")[0]
    return bool(scope) and not scope.endswith("<locals>")


def _check_hook(raw_f: Any, name: str) -> None:
    _check_markable(raw_f, name)
    missing = needed(raw_f, 1)
    if missing:
        raise InvalidError(
            f"{name} hook `{raw_f.__qualname__}` has the argument `{missing[0]}`",
            hint="a hook gets nothing but `self`; use `squall.parameter()` for what differs between instances",
        )
    if kind_of(raw_f)[0]:
        raise InvalidError(f"{name} hook `{raw_f.__qualname__}` is a generator", hint="a hook returns when it is done")


def check_schedulable(raw_f: Any, name: str, *, is_generator: bool, skip: int = 0) -> None:
    """Raises InvalidError for what cannot be called without arguments, or gives no single result."""
    missing = needed(raw_f, skip)
    if missing:
        raise InvalidError(
            f"`{name}` has a schedule and the argument `{missing[0]}`, which a schedule cannot give it",
            hint=f"give `{missing[0]}` a default, or put the schedule on a function without arguments that calls it",
        )
    if is_generator:
        raise InvalidError(f"generator `{name}` has a schedule", hint="nobody would take what it yields")


# ---- parameters -------------------------------------------------------------------------------------------------


@record
class Parameter(Record):
    """One parameter of a class; `kind` is its type's name."""

    default: Any
    init: bool
    name: str = ""
    kind: str = ""


def parameter(*, default: Any = MISSING, init: bool = True) -> Any:
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
        for name, value in vars(base).items():
            if isinstance(value, Parameter):
                found[name] = _parameter_of(raw, name, value, base.__annotations__.get(name))
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
    if value.default is not MISSING:
        check_value(made, value.default, f"the default of {where}")
    return made


def check_value(one: Parameter, value: Any, what: str) -> None:
    if type(value) is not PARAMETER_KINDS[one.kind]:
        raise InvalidError(f"{what} is {value!r:.80}, a `{type(value).__name__}`", hint=f"it takes {one.kind}")


def pack_parameters(shape: Shape, values: dict[str, Any]) -> bytes:
    """The values as bytes: the same for the same. JSON, with bytes as hexadecimal digits."""
    import json  # a program has reason to when it makes an instance

    rows = [
        [name, shape.parameters[name].kind, value.hex() if isinstance(value, bytes) else value]
        for name, value in sorted(values.items())
    ]
    return json.dumps(rows, separators=(",", ":")).encode()


def unpack_parameters(data: bytes) -> dict[str, Any]:
    import json

    rows = json.loads(data) if data else []
    return {name: bytes.fromhex(value) if kind == "bytes" else value for name, kind, value in rows}


# ---- the shape of a class ---------------------------------------------------------------------------------------


@record
class Shape(Record):
    """What is to be known of a class to make handles of it and to run it; plain values, so that it travels."""

    methods: dict[str, bool] = field(default_factory=dict)
    """Name -> whether it is a generator."""
    enters: list[str] = field(default_factory=list)
    exits: list[str] = field(default_factory=list)
    parameters: dict[str, Parameter] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    """Fields of the spec that decorators gave."""


def shape_of(raw: type) -> Shape:
    """Its methods, hooks and parameters with those of its bases. Raises InvalidError for what does not fit together."""
    enters = [(name, mark) for name, mark in _marks(raw, reversed(raw.__mro__)) if mark.kind == "enter"]
    methods = {name: mark for name, mark in _marks(raw, reversed(raw.__mro__)) if mark.kind == "method"}
    shape = Shape(
        {name: mark.is_generator for name, mark in methods.items()},
        [name for name, mark in sorted(enters, key=lambda pair: not pair[1].snap)],
        [name for name, mark in _marks(raw, iter(raw.__mro__)) if mark.kind == "exit"],
        _parameters_of(raw),
        fields_of(raw),
    )
    for name, mark in methods.items():
        if mark.fields and len(methods) > 1:
            raise InvalidError(
                f"class `{raw.__qualname__}` has the batched method `{name}` and {len(methods) - 1} more",
                hint="a class with a batched method has no other: make two classes",
            )
        shape.fields.update(mark.fields)
    _take_schedules(raw, shape, methods)
    _check_init(raw, shape)
    return shape


def _take_schedules(raw: type, shape: Shape, methods: Mapping[str, Marked[..., Any]]) -> None:
    schedules = [replaced(mark.schedule, method=name) for name, mark in methods.items() if mark.schedule is not None]
    if schedules and shape.parameters:
        raise InvalidError(
            f"class `{raw.__qualname__}` has parameters, and its method `{schedules[0].method}` a schedule",
            hint="put the schedule on a function that makes the instance and calls the method",
        )
    if schedules:
        shape.fields["schedules"] = schedules


def described(shape: Shape) -> dict[str, Any]:
    """What handles must know of a class, as JSON; for programs that look it up by name."""
    rows = []
    for name, one in shape.parameters.items():
        row: dict[str, Any] = {"name": name, "kind": one.kind, "init": one.init}
        if one.default is not MISSING:
            row["default"] = one.default.hex() if isinstance(one.default, bytes) else one.default
        rows.append(row)
    return {"methods": shape.methods, "parameters": rows}


def shape_described(said: Mapping[str, Any]) -> Shape:
    """What `described` described, as far as handles need it."""
    parameters: dict[str, Parameter] = {}
    for row in said["parameters"]:
        default = row.get("default", MISSING)
        if row["kind"] == "bytes" and isinstance(default, str):
            default = bytes.fromhex(default)
        parameters[row["name"]] = Parameter(default, bool(row["init"]), row["name"], row["kind"])
    return Shape(dict(said["methods"]), parameters=parameters)


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
            final = static(raw, name)
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
    missing = needed(raw.__init__, 1)  # type: ignore[misc]
    if missing:
        raise InvalidError(
            f"`{raw.__qualname__}.__init__` has the argument `{missing[0]}`, which a container cannot give it",
            hint=f"declare it in the class: `{missing[0]}: str = squall.parameter()`",
        )
