"""Where this code runs: in your program or in a container, of which app, for which input, with which client.

What user code asks of that it asks here, and loads no connection by it; the runner says it. Tested in
`tests/unit/test_client.py`.
"""

from __future__ import annotations

import contextvars
import os
import sys
from _thread import allocate_lock
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from squall.exception import InvalidError

if TYPE_CHECKING:
    from squall.client import Client


class _State:
    def __init__(self) -> None:
        self.client: Client | None = None
        self.lock = allocate_lock()
        self.in_container = False
        self.app_name = ""
        self.app_id = ""
        self.attach: Callable[[], None] | None = None
        """In a container whose app was run with a terminal: makes it this process's own."""


state = _State()
_input: contextvars.ContextVar[tuple[str, str]] = contextvars.ContextVar("squall_input", default=("", ""))

os.register_at_fork(after_in_child=lambda: setattr(state, "lock", allocate_lock()))


# ---- for the runner ---------------------------------------------------------------------------------------------


def set_app(name: str, app_id: str) -> None:
    """Which app this container belongs to."""
    state.in_container = True
    state.app_name, state.app_id = name, app_id


def set_attach(attach: Callable[[], None]) -> None:
    """How user code comes by a terminal."""
    state.attach = attach


def set_context(input_id: str, call_id: str) -> None:
    """Which input this thread or task runs from now on."""
    _input.set((input_id, call_id))


def refuse_breakpoint(*args: Any, **kwargs: Any) -> Any:
    """`breakpoint()` where there is no terminal, which else ends in an obscure `BdbQuit`."""
    if os.environ.get("PYTHONBREAKPOINT"):
        return sys.__breakpointhook__(*args, **kwargs)  # noqa: T100 - one that needs none, or nothing
    raise InvalidError(
        "`breakpoint()`: the app of this container was run without a terminal", hint="run it with `squall run -i`"
    )


def forget() -> None:
    """Undo what was set here and by `client.install`: of a rehearsal nothing may be left."""
    state.client, state.in_container = None, False
    state.app_name, state.app_id = "", ""
    _input.set(("", ""))


# ---- for user code ----------------------------------------------------------------------------------------------


def is_local() -> bool:
    """Whether this code runs in your program (True) or in a container of Squall (False).

    Example:

        if squall.is_local():
            print("imported by your program")
    """
    return not state.in_container and "SQUALL_IS_REMOTE" not in os.environ


def interact() -> None:
    """Attach your terminal to the container that this code runs in: `input()`, `code.interact()` and debuggers work.

    The app must run in a terminal with `squall run -i`, or `app.run(interactive=True)`. From here to the end of the
    input, standard input, output and error of the container are that terminal: keys go to it as they are, Ctrl-C
    raises KeyboardInterrupt there, and Ctrl-\\ kills the container. What it prints meanwhile is not in its logs, and
    no timeout of the function ends it. One container has the terminal at a time; others wait here, and say so.
    `breakpoint()` calls this by itself. In your own program, so under `.local()` too, it does nothing.

    Raises InvalidError in a container of an app that was run without a terminal, ServiceError when the terminal has
    gone.

    Example:

        @app.function()
        def shout(text):
            squall.interact()
            return text.upper()

        @app.local_entrypoint()
        def main():
            print(shout.local("hello"))
    """
    if state.attach is not None and state.client is not None and state.client.usable():
        state.attach()
    elif not is_local():
        raise InvalidError(
            "`squall.interact()`: the app of this container was run without a terminal, or this is a child process",
            hint="run it with `squall run -i`, and call this in the function's own process",
        )


def current_input_id() -> str | None:
    """Id of the input this code runs for, such as `in-5f2c19d04be87a36-0`; None outside a container.

    Example:

        @app.function()
        def who(): return squall.current_input_id()

        @app.local_entrypoint()
        def main():
            print(who.remote())
    """
    return _input.get()[0] or None


def current_function_call_id() -> str | None:
    """Id of the call this code runs for, such as `fc-5f2c19d04be87a36`; None outside a container.

    `squall trace` takes it, and for a spawned call `FunctionCall.from_id` does.
    """
    return _input.get()[1] or None
