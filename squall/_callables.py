"""What a function is and what a call of it must give, read off its code.

`inspect`, which takes 9 ms to load, is asked about the rest only: what is wrapped, marked or no plain function. Tested
in `tests/unit/test_callables.py`.
"""

from __future__ import annotations

import types
from typing import Any

_GENERATOR, _COROUTINE, _ASYNC_GENERATOR = 0x20, 0x80, 0x200
"""Flags of code; `inspect` calls them `CO_...`."""
_SAYS_OTHERWISE = frozenset({"__wrapped__", "__signature__", "_is_coroutine_mark"})


def _is_plain(raw_f: Any) -> bool:
    """Whether its code says all of it."""
    return type(raw_f) is types.FunctionType and _SAYS_OTHERWISE.isdisjoint(vars(raw_f))


def kind_of(raw_f: Any) -> tuple[bool, bool]:
    """Whether it is a generator, and whether it is async."""
    if isinstance(raw_f, types.MethodType):
        raw_f = raw_f.__func__
    if _is_plain(raw_f):
        flags = raw_f.__code__.co_flags
        return bool(flags & (_GENERATOR | _ASYNC_GENERATOR)), bool(flags & (_COROUTINE | _ASYNC_GENERATOR))
    import inspect

    target = inspect.unwrap(raw_f)
    if inspect.isasyncgenfunction(target):
        return True, True
    return inspect.isgeneratorfunction(target), inspect.iscoroutinefunction(target)


def needed(raw_f: Any, skip: int) -> list[str]:
    """Arguments that a call must give, but for the first `skip`."""
    if _is_plain(raw_f):
        code, optional = raw_f.__code__, raw_f.__kwdefaults__ or {}
        places = code.co_varnames[: code.co_argcount]
        keywords = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
        required = places[: len(places) - len(raw_f.__defaults__ or ())]
        return [*required[skip:], *(name for name in keywords if name not in optional)]
    import inspect

    rest = list(inspect.signature(raw_f).parameters.values())[skip:]
    collected = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [one.name for one in rest if one.default is one.empty and one.kind not in collected]


def static(cls: type, name: str) -> Any:
    """An attribute of a class as it was written there, or in a base. Raises AttributeError."""
    for base in cls.__mro__:
        if name in vars(base):
            return vars(base)[name]
    raise AttributeError(f"class `{cls.__qualname__}` has no attribute `{name}`")
