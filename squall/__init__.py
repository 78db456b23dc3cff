"""Squall: serverless compute for Python and AI that you run yourself.

The public names, each loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from squall._context import current_function_call_id, current_input_id, interact, is_local
    from squall._marks import batched, concurrent, enter, exit, method, parameter
    from squall._output import enable_output
    from squall.app import App, LocalEntrypoint
    from squall.call import FunctionCall
    from squall.client import Client
    from squall.cls import Cls
    from squall.exception import Error, InputCancellation
    from squall.file_pattern_matcher import FilePatternMatcher
    from squall.function import Function
    from squall.image import Image
    from squall.options import Retries
    from squall.schedule import Cron, Period
    from squall.secret import Secret

__version__ = "0.1.0"

__all__ = [
    "App",
    "Client",
    "Cls",
    "Cron",
    "Error",
    "FilePatternMatcher",
    "Function",
    "FunctionCall",
    "Image",
    "InputCancellation",
    "LocalEntrypoint",
    "Period",
    "Retries",
    "Secret",
    "__version__",
    "batched",
    "concurrent",
    "current_function_call_id",
    "current_input_id",
    "enable_output",
    "enter",
    "exception",
    "exit",
    "interact",
    "is_local",
    "method",
    "parameter",
]

_HOMES = {
    "App": "app",
    "Client": "client",
    "Cls": "cls",
    "Cron": "schedule",
    "Error": "exception",
    "FilePatternMatcher": "file_pattern_matcher",
    "Function": "function",
    "FunctionCall": "call",
    "Image": "image",
    "InputCancellation": "exception",
    "LocalEntrypoint": "app",
    "Period": "schedule",
    "Retries": "options",
    "Secret": "secret",
    "batched": "_marks",
    "concurrent": "_marks",
    "current_function_call_id": "_context",
    "current_input_id": "_context",
    "enable_output": "_output",
    "enter": "_marks",
    "exit": "_marks",
    "interact": "_context",
    "is_local": "_context",
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
