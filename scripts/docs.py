"""Writes `docs/reference/sdk.md`: every public name of `squall`, its signature and its docstring.

The docstrings are the source; nothing is said here that they do not say. `tests/docs/test_reference.py` fails when the
page is not what this makes.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import squall
from squall import call, exception, logs
from squall._blocking import both, both_generator

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "sdk.md"

HEAD = """\
# The SDK

Every public name, made from the docstrings by `scripts/docs`. In the examples `squall` is imported and `app` is a
`squall.App`; each is a program for `squall run`. Methods marked **and `.aio`** block the calling thread; their async
twin, `await f.remote.aio(...)` or `async for x in f.map.aio(...)`, takes the same arguments. Errors are in
[errors](errors.md).
"""

CLIENT = {"connect", "current", "close"}
"""What of the client is for users; the rest is for the other nouns."""
_EXAMPLE = re.compile(r"^Example:\n\n((?: {4}.*\n|\n)+)", re.MULTILINE)


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for name in squall.__all__:
        value = getattr(squall, name)
        if inspect.isclass(value):
            parts += class_parts(name, value)
        elif callable(value):
            parts.append(entry(f"## `squall.{name}`", f"squall.{name}", value))
    parts += class_parts("FunctionStats", call.FunctionStats, shown="What `Function.get_current_stats` gives")
    parts += class_parts("InputInfo", call.InputInfo, shown="What `FunctionCall.get_call_graph` gives")
    parts += class_parts("Logs", logs.Logs, shown="What `App.logs`, `Function.logs` and `FunctionCall.logs` are")
    parts += class_parts("LogEntry", logs.LogEntry, shown="What `Logs` gives")
    parts.append(f"## `squall.exception`\n\nThe module of all errors: {', '.join(_error_names())}.\n")
    parts.append(f'## `squall.__version__`\n\nThe release, such as `"{squall.__version__}"`.\n')
    return "\n".join(parts)


def _error_names() -> list[str]:
    return [f"`{name}`" for name, value in vars(exception).items() if inspect.isclass(value)]


def class_parts(name: str, cls: type, shown: str = "") -> Iterator[str]:
    """A class: what it is, how it is made when users make it, then its public members in the order of the source."""
    heading = f"## `squall.{name}`" if not shown else f"## `{name}`\n\n{shown}."
    makes_it = name in ("App", "Cron", "InputInfo", "Period", "Retries", "FunctionStats")
    yield entry(heading, f"squall.{name}" if makes_it and not shown else "", cls)
    for member, value in vars(cls).items():
        if (
            member.startswith("_")
            or cls.__module__ == "squall.exception"
            or (name == "Client" and member not in CLIENT)
        ):
            continue
        raw = unwrapped(value)
        if isinstance(raw, property) and raw.fget is not None:
            yield f"### `{name}.{member}`\n\nProperty. {rendered(raw.fget.__doc__ or '')}"
        elif inspect.isfunction(raw):
            twin = isinstance(value, (both, both_generator))
            yield entry(f"### `{name}.{member}`", f"{name}.{member}", raw, twin=twin)


def unwrapped(value: Any) -> Any:
    """The plain function or property behind a class's attribute."""
    if isinstance(value, (both, both_generator)):
        return value.body
    return value.__func__ if isinstance(value, (classmethod, staticmethod)) else value


def entry(heading: str, called: str, value: Any, twin: bool = False) -> str:
    """Heading, signature, docstring. `called` empty: users do not make it themselves."""
    signature = f"```text\n{called}{shown_signature(value)}\n```\n\n" if called else ""
    mark = "**and `.aio`**\n\n" if twin else ""
    return f"{heading}\n\n{signature}{mark}{rendered(value.__doc__ or '')}"


def shown_signature(value: Any) -> str:
    """Parameters with their defaults and annotations, without `self`; long ones a line each."""
    signature = inspect.signature(value)
    parameters = [
        parameter
        for parameter in signature.parameters.values()
        if parameter.name not in ("self", "cls", "wrong", "unknown", "_options")
    ]
    # What is annotated with a type variable of the function is the user's own; the name of the variable says nothing.
    texts = [re.sub(r": P\.\w+", "", str(parameter).replace("'", "")) for parameter in parameters]
    if not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        first = next((i for i, p in enumerate(parameters) if p.kind is p.KEYWORD_ONLY), None)
        if first is not None:
            texts.insert(first, "*")
    line = f"({', '.join(texts)})"
    return line if len(line) < 90 else "(\n    " + ",\n    ".join(texts) + ",\n)"


def rendered(text: str) -> str:
    """A docstring as Markdown."""
    clean = inspect.cleandoc(text) + "\n"
    return _EXAMPLE.sub(lambda found: f"```python\n{textwrap.dedent(found[1]).strip()}\n```\n", clean)


def main() -> None:
    PAGE.write_text(page())
    print(f"wrote {PAGE.name}")


if __name__ == "__main__":
    main()
