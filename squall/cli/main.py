"""The `squall` command: its table of subcommands, and how every failure is told.

Owns the form of errors: `error: ...`, perhaps where in the user's file, `hint: ...`, all on stderr; exit code 1, 2
for wrong usage, 130 after Ctrl-C. Subcommands are imported when they are called, so that `squall run` loads nothing
of the others. Must never show a traceback for a `squall.exception.Error`. Tested in `tests/unit/test_cli_main.py` and
`tests/acceptance/test_cli.py`.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Iterable
from typing import Any, NoReturn

import click

from squall import __version__, config
from squall.exception import Error, StartupError

COMMANDS = {
    "run": "squall.cli.run:run",
    "deploy": "squall.cli.deploy:deploy",
    "shell": "squall.cli.shell:shell",
    "app": "squall.cli.apps:app",
    "function": "squall.cli.functions:function",
    "container": "squall.cli.manage:container",
    "call": "squall.cli.calls:call",
    "schedule": "squall.cli.schedules:schedule",
    "image": "squall.cli.images:image",
    "trace": "squall.cli.manage:trace",
    "secret": "squall.cli.access:secret",
    "environment": "squall.cli.access:environment",
    "up": "squall.cli.up:up",
    "status": "squall.cli.admin:status",
    "down": "squall.cli.admin:down",
    "token": "squall.cli.access:token",
    "workspace": "squall.cli.access:workspace",
    "profile": "squall.cli.access:profile",
    "config": "squall.cli.access:config_group",
    "backup": "squall.cli.backup:backup",
    "doctor": "squall.cli.admin:doctor",
    "completion": "squall.cli.admin:completion",
}
"""Name -> where it is. The order is that of `squall --help`."""


def did_you_mean(word: str, known: Iterable[str], *, several: str = "there are") -> str:
    """A hint for a name that does not exist, or empty."""
    names = sorted(known)
    if not names:
        return ""
    listing = f"{several}: {', '.join(f'`{name}`' for name in names[:10])}"
    if len(names) > 10:
        listing += f" and {len(names) - 10} more"
    close = difflib.get_close_matches(word, names, n=1)
    return f"did you mean `{close[0]}`? {listing}" if close and len(names) > 1 else listing


class Group(click.Group):
    """A group that says what a mistyped command may have meant."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            raise UsageHint(
                f"`{ctx.command_path}` has no command `{args[0]}`",
                did_you_mean(args[0], self.list_commands(ctx), several="commands"),
                ctx,
            )
        return super().resolve_command(ctx, args)


class LazyGroup(Group):
    """A group that imports a subcommand when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, name = COMMANDS[cmd_name].split(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command if cmd_name in HERE_ONLY else _placed(command)


HERE_ONLY = ("up", "down", "backup", "doctor", "completion", "profile", "config")
"""Commands about this machine, whatever server the profile names."""


def _placed(command: click.Command) -> click.Command:
    """Give a command, or each of a group, the options that say where it works."""
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            _placed(inner)
    else:
        taken = {option for param in command.params for option in param.opts}
        command.params += [option for option in _place_options() if not taken & set(option.opts)]
    return command


def _place_options() -> list[click.Option]:
    return [
        click.Option(
            ["squall_environment", "-e", "--env"], metavar="ENVIRONMENT", expose_value=False, is_eager=True,
            callback=lambda ctx, param, value: _choose(ctx, environment=value),
            help="Work in this environment; else SQUALL_ENVIRONMENT, the profile's, or `main`.",
        ),
        click.Option(
            ["squall_profile", "--profile"], metavar="PROFILE", expose_value=False, is_eager=True,
            callback=lambda ctx, param, value: _choose(ctx, profile=value),
            help="Use the server of this profile; else SQUALL_PROFILE, or the active one.",
        ),
    ]  # fmt: skip


def _choose(ctx: click.Context, *, profile: str | None = None, environment: str | None = None) -> None:
    if not ctx.resilient_parsing:
        config.choose(profile=profile or "", environment=environment or "")


class UsageHint(click.UsageError):
    """Wrong usage, with a hint of its own."""

    def __init__(self, message: str, hint: str, ctx: click.Context | None = None) -> None:
        super().__init__(message, ctx)
        self.hint = hint


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(f"squall {__version__}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Print the version."
)
def cli() -> None:
    """Serverless compute for Python that you run yourself."""


# ---- telling what went wrong --------------------------------------------------------------------------------------


def report(message: str, hint: str = "", where: str = "") -> None:
    """An error for people, on stderr."""
    red, plain = ("\x1b[31m", "\x1b[0m") if sys.stderr.isatty() and not os.environ.get("NO_COLOR") else ("", "")
    lines = [f"{red}error:{plain} {message}"]
    if where:
        lines.append(f"  at {where}")
    if hint:
        lines.append(f"hint: {hint}")
    print("\n".join(lines), file=sys.stderr)


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


def _wants_own_frames() -> bool:
    try:
        return config.load().traceback
    except Error:
        return False


def _report_bug(error: Exception) -> None:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{os.path.basename(frame.filename)}:{frame.lineno}"
    report(
        f"a bug in Squall: {type(error).__name__}: {error} ({place})",
        hint="please report it with what `SQUALL_TRACEBACK=1` in front of the same command prints",
    )


def _usage(error: click.UsageError) -> None:
    message = error.format_message().rstrip(".")
    hint = getattr(error, "hint", "")
    if not hint and error.ctx is not None:
        hint = f"`{error.ctx.command_path} --help` shows what it takes"
    report(message[:1].lower() + message[1:], hint)


def execute(argv: list[str]) -> int:
    """Run one command; the exit code."""
    try:
        result: Any = cli.main(args=argv, prog_name="squall", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        return 2
    except click.UsageError as error:
        _usage(error)
        return 2
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Error as error:
        if _wants_own_frames():
            traceback.print_exc()
        elif isinstance(error, StartupError) and error.__cause__ is not None:
            print(user_traceback(error.__cause__), end="", file=sys.stderr)
        report(error.message, error.hint, where_of(error))
        return 1
    except click.ClickException as error:
        report(error.format_message())
        return 1
    except Exception as error:
        if _wants_own_frames():
            traceback.print_exc()
        _report_bug(error)
        return 1


def main() -> NoReturn:
    """The entry point of the `squall` script."""
    sys.exit(execute(sys.argv[1:]))


if __name__ == "__main__":
    main()
