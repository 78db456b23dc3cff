"""What a function is and needs is told by its code as `inspect` would tell it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from squall._callables import kind_of, needed, static


def plain(a: int, b: int = 1, *rest: int, c: int, d: int = 2, **more: int) -> int:
    return a


def only_places(a: int, /, b: int, *, c: int = 1) -> int:
    return a + b + c


def nothing() -> None: ...


def generator() -> Iterator[int]:
    yield 1


async def coroutine(a: int) -> int:
    return a


async def async_generator(a: int = 1) -> AsyncIterator[int]:
    yield a


@functools.wraps(async_generator)
def wrapping(*args: Any, **kwargs: Any) -> Any:
    return async_generator(*args, **kwargs)


class Tool:
    name = "tool"

    def use(self, times: int) -> int:
        return times

    @staticmethod
    def idle() -> None: ...

    async def wait(self) -> None: ...

    def __call__(self, a: int) -> int:
        return a


class Hammer(Tool):
    name = "hammer"


CALLABLES: list[Callable[..., Any]] = [
    *(plain, only_places, nothing, generator, coroutine, async_generator, wrapping, lambda x: x),
    *(Tool.use, Tool.wait, Tool().wait, functools.partial(coroutine, 1), Tool()),
]


@pytest.mark.parametrize("call", CALLABLES, ids=map(str, range(len(CALLABLES))))
def test_kind_is_what_inspect_says(call: Callable[..., Any]) -> None:
    target = inspect.unwrap(call)
    is_async = inspect.iscoroutinefunction(target) or inspect.isasyncgenfunction(target)
    assert kind_of(call) == (inspect.isgeneratorfunction(target) or inspect.isasyncgenfunction(target), is_async)


@pytest.mark.parametrize("call", CALLABLES, ids=map(str, range(len(CALLABLES))))
def test_needed_arguments_are_what_inspect_says(call: Callable[..., Any]) -> None:
    collected = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(call).parameters.values()
    assert needed(call, 0) == [one.name for one in parameters if one.default is one.empty and one.kind not in collected]


def test_needed_arguments_leave_out_those_that_are_given_anyhow() -> None:
    assert needed(Tool.use, 1) == ["times"]
    assert needed(plain, 1) == ["c"]
    assert needed(nothing, 1) == []


def test_static_finds_what_was_written_in_a_class_or_its_bases() -> None:
    assert static(Hammer, "name") == "hammer"
    assert static(Hammer, "idle") is vars(Tool)["idle"]
    with pytest.raises(AttributeError, match="no attribute `absent`"):
        static(Hammer, "absent")
