"""One body, two faces: the blocking call and its `.aio` twin, from async code written once.

Inside the SDK every coroutine awaits only `Pending`s of a `Link` (or other such coroutines). The blocking face
therefore needs no event loop: `run` steps the coroutine in the calling thread and lets that thread itself wait on
the socket, which saves two thread switches a call and the import of asyncio. Under asyncio the same `Pending`
becomes a future of the running loop. Tested in `tests/unit/test_blocking.py`.
"""

from __future__ import annotations

import functools
import os
import sys
import types
import warnings
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from squall.exception import Error
from squall.protocol.driving import driver

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")


def run(coroutine: Coroutine[Any, Any, R]) -> R:
    """Drive a coroutine of the SDK to its end in this thread."""
    error: BaseException | None = None
    while True:
        before = getattr(driver, "blocking", False)
        driver.blocking = True
        try:
            waiting = coroutine.send(None) if error is None else coroutine.throw(error)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        finally:
            driver.blocking = before
        try:
            waiting.wait()
            error = None
        except BaseException as caught:
            error = caught


_OWN_DIR = os.path.dirname(os.path.abspath(__file__)) + os.sep


def trimmed(error: BaseException) -> BaseException:
    """`error` without Squall's frames in its traceback, where something is left: the user's frames in a container.

    One that is not from there keeps them all, unless Squall raises it on purpose or it is Ctrl-C."""
    theirs: list[types.TracebackType] = []
    step = error.__traceback__
    while step is not None:
        if not step.tb_frame.f_code.co_filename.startswith(_OWN_DIR):
            theirs.append(step)
        step = step.tb_next
    if not theirs and not isinstance(error, (Error, KeyboardInterrupt)):
        return error
    rebuilt: types.TracebackType | None = None
    for step in reversed(theirs):
        rebuilt = types.TracebackType(rebuilt, step.tb_frame, step.tb_lasti, step.tb_lineno)
    return error.with_traceback(rebuilt)


def run_generator(generator: AsyncGenerator[R, None]) -> Generator[R, None, None]:
    """Drive an async generator of the SDK from a plain `for`."""
    try:
        while True:
            try:
                value = run(generator.__anext__())
            except StopAsyncIteration:
                return
            except BaseException as error:
                raise trimmed(error)
            yield value
    finally:
        run(generator.aclose())


def is_notebook() -> bool:
    """Whether this runs in IPython, whose cells run inside an event loop that has nothing else to do meanwhile."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None


def warn_if_in_loop(name: str, instead: str = "") -> None:
    """Say so when a blocking call is made where a running event loop would stand still meanwhile."""
    asyncio = sys.modules.get("asyncio")
    if asyncio is not None and asyncio._get_running_loop() is not None and not is_notebook():
        warnings.warn(
            f"`{name}` blocks the running event loop; {instead or f'use `await {name}.aio(...)`'}",
            RuntimeWarning,
            stacklevel=3,
        )


class _Bound(Generic[P, R]):
    """A method's blocking face; `.aio` is the other."""

    __slots__ = ("_name", "aio")

    def __init__(self, aio: Callable[P, Coroutine[Any, Any, R]], name: str) -> None:
        self.aio = aio
        self._name = name

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        warn_if_in_loop(self._name)
        try:
            return run(self.aio(*args, **kwargs))
        except BaseException as error:
            raise trimmed(error)


class both(Generic[S, P, R]):
    """Decorator for an `async def` method: `obj.m(...)` blocks, `await obj.m.aio(...)` does not.

    class Call:
        @both
        async def get(self, timeout=None): ...
    """

    def __init__(self, body: Callable[Concatenate[S, P], Coroutine[Any, Any, R]]) -> None:
        self.body = body
        functools.update_wrapper(self, body)  # type: ignore[arg-type]

    def __get__(self, instance: S | None, owner: type | None = None) -> _Bound[P, R]:
        target = owner if instance is None else instance
        return _Bound(functools.partial(self.body, target), self.body.__name__)  # type: ignore[arg-type]


class _BoundGenerator(Generic[P, R]):
    __slots__ = ("_name", "aio")

    def __init__(self, aio: Callable[P, AsyncGenerator[R, None]], name: str) -> None:
        self.aio = aio
        self._name = name

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Generator[R, None, None]:
        warn_if_in_loop(self._name)
        return run_generator(self.aio(*args, **kwargs))


class both_generator(Generic[S, P, R]):
    """As `both`, for an `async def` method that yields: `for x in obj.m()` and `async for x in obj.m.aio()`."""

    def __init__(self, body: Callable[Concatenate[S, P], AsyncGenerator[R, None]]) -> None:
        self.body = body
        functools.update_wrapper(self, body)  # type: ignore[arg-type]

    def __get__(self, instance: S | None, owner: type | None = None) -> _BoundGenerator[P, R]:
        target = owner if instance is None else instance
        return _BoundGenerator(functools.partial(self.body, target), self.body.__name__)  # type: ignore[arg-type]
