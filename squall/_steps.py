"""What the methods of `Image` read of this program and this disk: words, options, requirements, modules, functions.

Everything here runs where an image is written; nothing decides what a step does. In a container, where an image only
stands for itself, files that are not there count as empty. Tested in `tests/unit/test_image.py`.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

from squall.exception import InvalidError


def is_remote() -> bool:
    return "SQUALL_IS_REMOTE" in os.environ


def words(method: str, values: Sequence[Any]) -> list[str]:
    """Arguments given one by one, in lists, or both."""
    found: list[str] = []
    for value in values:
        if isinstance(value, (list, tuple)):
            found += words(method, value)
        elif isinstance(value, str):
            found.append(value)
        else:
            raise InvalidError(f"`Image.{method}` takes strings, not {value!r:.80}")
    return found


def options(
    index_url: str | None, extra_index_url: str | None, find_links: str | None, pre: bool, extra_options: str
) -> dict[str, Any]:
    options = {
        "index_url": index_url,
        "extra_index_url": extra_index_url,
        "find_links": find_links,
        "pre": pre,
        "extra_options": extra_options,
    }
    return {name: value for name, value in options.items() if value}


def paths(files: Sequence[str]) -> list[str]:
    if isinstance(files, str):
        raise InvalidError(f"`requirements={files!r:.80}` takes a list of paths")
    return [os.fspath(path) for path in files]


def read_text(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        if is_remote():
            return ""
        raise InvalidError(f"cannot read the requirements in `{path}`: {error}") from None


def dependencies(path: str, extras: Sequence[str]) -> list[str]:
    """What a `pyproject.toml` says its project needs."""
    from squall.config import parse_toml  # pathlib, which it needs, is not for every program

    try:
        project = parse_toml(read_text(path)).get("project", {})
    except ValueError as error:
        raise InvalidError(f"cannot read the dependencies in `{path}`: {error}") from None
    found = list(project.get("dependencies", []))
    optional = project.get("optional-dependencies", {})
    for extra in [extras] if isinstance(extras, str) else extras:
        if extra not in optional and not is_remote():
            raise InvalidError(
                f"`{path}` has no optional dependencies `{extra}`", hint=f"it has: {', '.join(optional) or 'none'}"
            )
        found += optional.get(extra, [])
    return found


def module_path(module: str) -> tuple[str, bool]:
    """Where a module's source is, and whether it is a package."""
    import importlib.util

    if not module.isidentifier():
        raise InvalidError(
            f"`{module[:80]}` is not the name of a module", hint="give the top-level name, as in `import helpers`"
        )
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is not None and spec.submodule_search_locations:
        return next(iter(spec.submodule_search_locations)), True
    if is_remote():
        return module, False
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        raise InvalidError(f"there is no Python source of module `{module}` on the import path")
    return spec.origin, False


def pack_function(
    raw_f: Callable[..., Any], args: tuple[object, ...], kwargs: dict[str, Any]
) -> tuple[bytes, str, Callable[[], bytes]]:
    """The packed arguments, a digest of all that decides what the function does, and how to pack the function."""
    from squall.client import blob_digest
    from squall.protocol import payload as payloads

    name = f"`{getattr(raw_f, '__name__', 'function')}`"
    packed = payloads.pack_by_value((args, kwargs), f"the arguments of {name}")
    tag = blob_digest(packed + essence(raw_f, set()))
    return packed, tag, functools.partial(payloads.pack_by_value, raw_f, f"function {name}")


def essence(function: Any, seen: set[int]) -> bytes:
    """Source of a function and of the functions it refers to, and the values of its other globals."""
    import inspect

    from squall.protocol import payload as payloads

    if id(function) in seen:
        return b""
    seen.add(id(function))
    try:
        source = inspect.getsource(function).encode()
    except (OSError, TypeError):
        return payloads.pack_by_value(function, "a function")
    parts = [source]
    code = getattr(function, "__code__", None)
    named = {name: function.__globals__[name] for name in code.co_names if name in function.__globals__} if code else {}
    for name, value in sorted(named.items()):
        if inspect.isfunction(value) or inspect.isclass(value):  # by value a class is never the same bytes twice
            parts.append(essence(value, seen))
        elif inspect.ismodule(value):
            parts.append(value.__name__.encode())
        else:
            with contextlib.suppress(Exception):  # what cannot be packed is told when the function is
                parts.append(name.encode() + payloads.pack_by_value(value, name))
    return b"\0".join(parts)
