"""How the command line tells that it failed: `error: ...` for people, one JSON document for programs.

Owns what is said of an error, the user's frames in it, and the exit code: 1, 2 for wrong usage, 130 after Ctrl-C. For
people it goes to stderr; with `--json` to stdout, on one line, so that it is a document of its own and also the last of
JSON Lines. Must never show a traceback for a `squall.exception.Error`. Imported by every command, so it loads nothing
else of Squall's. Tested in `tests/unit/test_cli_failures.py` and `tests/acceptance/test_cli_json.py`.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import click

from squall import config, exception
from squall.exception import Error, InvalidError, StartupError

INTERRUPTED = 130


class UserError(Exception):
    """The user's own code raised; `cause` is what."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


class ScriptError(InvalidError):
    """The user's script cannot be imported; the exception that it raised is the `__cause__`."""


class Exits(Exception):
    """An error with an exit code of its own."""

    def __init__(self, cause: Error, code: int) -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.code = code


class Interrupted(Exception):
    """Ctrl-C, when it was answered already; click would add an empty line to a KeyboardInterrupt."""


@dataclass(frozen=True)
class Failure:
    """What there is to say of an error."""

    type: str
    """Name of the class: of Squall's own, or of the user's exception."""
    message: str
    hint: str = ""
    where: str = ""
    """The user's innermost line, or empty."""
    traceback: str = ""
    """Of the user's code, where that is what failed."""
    code: int = 1
    has_sentence: bool = True
    """People are told the message; else the traceback says it, or they did it themselves."""


def failure_of(error: BaseException) -> Failure:
    """What to say of an error, and the exit code."""
    if isinstance(error, Exits):
        return replace(failure_of(error.cause), code=error.code)
    if isinstance(error, UserError):
        cause = error.cause
        return Failure(_name_of(cause), str(cause), traceback=user_traceback(cause), has_sentence=False)
    if isinstance(error, (Interrupted, KeyboardInterrupt, click.Abort)):
        return Failure("KeyboardInterrupt", "interrupted", code=INTERRUPTED, has_sentence=False)
    if isinstance(error, SystemExit):
        return Failure("SystemExit", f"the program exited with {error.code!r}")
    if isinstance(error, click.UsageError):
        return _usage(error)
    if isinstance(error, Error):
        shown = isinstance(error, (StartupError, ScriptError)) and error.__cause__ is not None
        lines = user_traceback(error.__cause__) if shown and error.__cause__ is not None else ""
        return Failure(_name_of(error), error.message, error.hint, where_of(error), lines)
    if isinstance(error, click.ClickException):
        return Failure(_name_of(error), error.format_message())
    return _bug(error)


def _name_of(error: BaseException) -> str:
    """The public class of an error of Squall's, which may have been raised as a private one; else its own."""
    public = vars(exception)
    own = [cls.__name__ for cls in type(error).__mro__ if public.get(cls.__name__) is cls]
    return own[0] if own and type(error).__module__.startswith("squall.") else type(error).__name__


def _usage(error: click.UsageError) -> Failure:
    message = error.format_message().rstrip(".")
    hint = getattr(error, "hint", "")
    if not hint and error.ctx is not None:
        hint = f"`{error.ctx.command_path} --help` shows what it takes"
    return Failure("UsageError", message[:1].lower() + message[1:], hint, code=2)


def _bug(error: BaseException) -> Failure:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return Failure(
        type(error).__name__,
        f"a bug in Squall: {type(error).__name__}: {error}{place}",
        "please report it with what `SQUALL_TRACEBACK=1` in front of the same command prints",
    )


def tell(error: BaseException, *, as_json: bool = False, is_last_line: bool = False) -> int:
    """Say that a command failed, in the form that was asked for; its exit code. `is_last_line`: of JSON Lines whose
    objects have types."""
    failure = failure_of(error)
    if isinstance(error, (Error, Exits)) or failure.message.startswith("a bug in Squall"):
        _show_own_frames(error)
    if as_json:
        head = {"type": "error"} if is_last_line else {}
        print(json.dumps({**head, "error": document(failure)}), flush=True)
    else:
        if failure.traceback:
            print(failure.traceback, end="", file=sys.stderr)
        if failure.has_sentence:
            report(failure.message, failure.hint, failure.where)
    return failure.code


def document(failure: Failure) -> dict[str, Any]:
    """A failure for programs."""
    found = {"type": failure.type, "message": failure.message, "hint": failure.hint}
    more = {"where": failure.where, "traceback": failure.traceback}
    return {**found, **{key: value for key, value in more.items() if value}}


def _show_own_frames(error: BaseException) -> None:
    """All frames on stderr, for whoever asked for them with SQUALL_TRACEBACK."""
    try:
        wanted = config.load().traceback
    except Error:
        return
    if wanted:
        traceback.print_exception(error)


def report(message: str, hint: str = "", where: str = "") -> None:
    """An error for people, on stderr."""
    red, plain = ("\x1b[31m", "\x1b[0m") if sys.stderr.isatty() and not os.environ.get("NO_COLOR") else ("", "")
    lines = [f"{red}error:{plain} {message}"]
    if where:
        lines.append(f"  at {where}")
    if hint:
        lines.append(f"hint: {hint}")
    print("\n".join(lines), file=sys.stderr)


# ---- the user's frames --------------------------------------------------------------------------------------------


def is_ours(filename: str) -> bool:
    """A frame of Squall's own, or of what calls the user's code on its behalf."""
    return filename.startswith((_PACKAGE, "<frozen ", os.path.dirname(click.__file__)))


_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_STDLIB = os.path.dirname(os.path.abspath(os.__file__)) + os.sep


def user_frames(frames: Iterable[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    """Frames from the first of the user's on, without Squall's: what the user's code called stays."""
    kept: list[traceback.FrameSummary] = []
    for frame in frames:
        library = frame.filename.startswith(_STDLIB) and "site-packages" not in frame.filename
        if not is_ours(frame.filename) and (kept or not library):
            kept.append(frame)
    return kept


def user_traceback(error: BaseException) -> str:
    """The traceback of an error of the user's code, its causes included, with the user's frames only."""
    whole = traceback.TracebackException.from_exception(error)
    pending: list[traceback.TracebackException] = [whole]
    seen: set[int] = set()
    while pending:
        part = pending.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        kept = user_frames(part.stack)
        part.stack = traceback.StackSummary.from_list(kept) if kept else None  # type: ignore[assignment]
        pending += [inner for inner in (part.__cause__, part.__context__) if inner is not None]
        pending += getattr(part, "exceptions", None) or []
    return "".join(whole.format())


def where_of(error: BaseException) -> str:
    """`hello.py:14, in main` of the user's innermost frame, or empty."""
    frames = user_frames(traceback.extract_tb(error.__traceback__))
    if not frames:
        return ""
    frame = frames[-1]
    path = os.path.relpath(frame.filename)
    return f"{path if not path.startswith('..') else frame.filename}:{frame.lineno}, in {frame.name}"
