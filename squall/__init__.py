"""Squall: serverless compute for Python and AI that you run yourself.

The public names, each loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from squall._marks import batched, concurrent, enter, exit, method, parameter
    from squall.app import App, LocalEntrypoint
    from squall.client import Client, current_function_call_id, current_input_id, is_local
    from squall.cls import Cls
    from squall.exception import Error, InputCancellation
    from squall.file_pattern_matcher import FilePatternMatcher
    from squall.function import Function, FunctionCall
    from squall.image import Image
    from squall.options import Retries
    from squall.secret import Secret

__version__ = "0.1.0"

__all__ = [
    "App",
    "Client",
    "Cls",
    "Error",
    "FilePatternMatcher",
    "Function",
    "FunctionCall",
    "Image",
    "InputCancellation",
    "LocalEntrypoint",
    "Retries",
    "Secret",
    "__version__",
    "batched",
    "concurrent",
    "current_function_call_id",
    "current_input_id",
    "enter",
    "exception",
    "exit",
    "is_local",
    "method",
    "parameter",
]

_HOMES = {
    "App": "app",
    "Client": "client",
    "Cls": "cls",
    "Error": "exception",
    "FilePatternMatcher": "file_pattern_matcher",
    "Function": "function",
    "FunctionCall": "function",
    "Image": "image",
    "InputCancellation": "exception",
    "LocalEntrypoint": "app",
    "Retries": "options",
    "Secret": "secret",
    "batched": "_marks",
    "concurrent": "_marks",
    "current_function_call_id": "client",
    "current_input_id": "client",
    "enter": "_marks",
    "exit": "_marks",
    "is_local": "client",
    "method": "_marks",
    "parameter": "_marks",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is not None:
        value = getattr(importlib.import_module(f"squall.{home}"), name)
    elif name == "exception":
        value = importlib.import_module("squall.exception")
    else:
        raise AttributeError(f"module `squall` has no attribute `{name}`")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
