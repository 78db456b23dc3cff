"""Finds the user's function or class in a container: by import from the source mount, or from a pickle by value.

The one file of the runner that knows the SDK's nouns: it hydrates the handles of the app, so that functions call
functions. It never lets an exception of user code out as anything but itself. Tested in `tests/integration`.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from squall import _context as context
from squall import client as sdk
from squall.exception import Error, NotFoundError, VersionError
from squall.protocol import payload as payloads
from squall.protocol.messages import FunctionSpec, Load

__all__ = ["Callee", "UserCode", "context", "load", "sdk", "what_failed"]
"""`sdk` has the client of this process, through which user code calls functions, `context` what user code asks of where
it runs; the runner gets both from here."""

ReadBlob = Callable[[str], bytes]

TEXT_LIMIT = 2000

PLACE = {"SQUALL_REGION": "local", "SQUALL_CLOUD_PROVIDER": "self-hosted"}
"""Where a container runs, under the names that programs written for a cloud look at."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass
class Callee:
    """What to call, and how."""

    call: Callable[..., Any]
    is_async: bool
    is_generator: bool = False


@dataclass
class UserCode:
    """What a container runs: one function, or the methods and hooks of one object."""

    callees: dict[str, Callee]
    """By method; a function has the empty name."""
    enters: list[Callee]
    exits: list[Callee]
    steps: dict[str, float]
    """Name -> milliseconds."""


def load(message: Load, parameters: bytes, source: str | None, read_blob: ReadBlob) -> UserCode:
    """Import what `message` names. Raises whatever the user's code raises, or a `squall.exception.Error`."""
    spec = message.spec
    apply_environment(spec, message.environment)
    started = time.perf_counter()
    if source and source not in sys.path:
        sys.path.insert(0, source)
    for step in spec.image.steps:
        directory = step.args.get("python", "")
        if directory and directory not in sys.path:
            sys.path.insert(0, directory)
    raw = _load_by_value(spec, read_blob) if spec.serialized_blob else _load_by_name(message)
    _hydrate(message)
    if spec.methods:
        code = _load_class(message, raw, parameters)
    else:
        code = UserCode({"": Callee(raw, spec.is_async, spec.is_generator)}, [], [], {})
    code.steps["import"] = (time.perf_counter() - started) * 1000
    return code


def _load_class(message: Load, raw: Any, parameters: bytes) -> UserCode:
    """The container's one object of the class, not entered yet."""
    from squall import cls as classes

    shape = classes.shape_of(raw)
    instance = classes.make_here(raw, shape, message.spec.tag, message.function_id, parameters)
    missing = [name for name in message.spec.methods if name not in shape.methods]
    if missing:
        raise NotFoundError(
            f"class `{message.spec.tag}` has no method `{missing[0]}` in the container",
            hint="the class must be made the same way here and in your program",
        )

    def callee(name: str, is_generator: bool = False) -> Callee:
        call = classes.plain_method(instance, name)
        return Callee(call, classes.is_async(call), is_generator)

    return UserCode(
        {name: callee(name, is_generator) for name, is_generator in shape.methods.items()},
        [callee(name) for name in shape.enters],
        [callee(name) for name in shape.exits],
        {},
    )


def what_failed(error: BaseException) -> tuple[str, str]:
    """Message and hint for what loading raised."""
    if isinstance(error, Error):
        return error.message[:TEXT_LIMIT], error.hint[:TEXT_LIMIT]
    if isinstance(error, SystemExit):
        return f"the module ended the process while it was imported: sys.exit({error.code!r})"[:TEXT_LIMIT], ""
    try:
        text = str(error)
    except Exception:  # the user's own
        text = ""
    return f"{type(error).__name__}: {text}"[:TEXT_LIMIT] if text else type(error).__name__, ""


def apply_environment(spec: FunctionSpec, environment: str = "main") -> None:
    """The function's variables, and thread counts that fit the CPUs it asked for unless it sets them itself."""
    threads = str(max(1, int(spec.cpu_limit or spec.cpu or 1)))
    for name in THREAD_VARIABLES:
        os.environ[name] = threads
    os.environ.update(PLACE, SQUALL_ENVIRONMENT=environment)
    os.environ["SQUALL_IMAGE_ID"] = spec.image.image_id or "im-host"
    os.environ.update(spec.env)


def _load_by_value(spec: FunctionSpec, read_blob: ReadBlob) -> Callable[..., Any]:
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if spec.python and spec.python != here:
        raise VersionError(
            f"function `{spec.tag}` was sent by value from Python {spec.python}, its container runs Python {here}",
            hint="define it in a module so that it is imported, or use an image with the same Python",
        )
    value = payloads.unpack(read_blob(spec.serialized_blob), f"function `{spec.tag}`")
    return raw_function(value)


def _load_by_name(message: Load) -> Callable[..., Any]:
    spec = message.spec
    target: Any = import_user_module(spec)
    for part in spec.qualname.split("."):
        try:
            target = getattr(target, part)
        except AttributeError:
            raise NotFoundError(
                f"module `{spec.module}` has no `{spec.qualname}` in the container",
                hint="define the function at the top level of its module, or decorate it with serialized=True",
            ) from None
    return raw_function(target)


def import_user_module(spec: FunctionSpec) -> ModuleType:
    module = importlib.import_module(spec.module)
    if spec.main_alias:
        # Values pickled by the caller name their classes `__main__.X`.
        sys.modules["__main__"] = module
    return module


def _hydrate(message: Load) -> None:
    """Give the handles of the app that loading has just made the ids they have on the server."""
    if "squall.function" in sys.modules:  # else the code that was sent by value knows of no handle
        from squall.app import hydrate_apps

        hydrate_apps(message.app_name, message.app_id, message.functions)


def raw_function(target: Any) -> Callable[..., Any]:
    """The plain callable behind a decorated one."""
    raw = getattr(target, "raw_f", None) or getattr(target, "raw_cls", None)
    return raw if callable(raw) else target  # type: ignore[no-any-return]
