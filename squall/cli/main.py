"""The `squall` command: its table of subcommands, and how one of them is run.

Subcommands are imported when they are called, so that `squall run` loads nothing of the others. Here is decided in
which form a failure is told, for people or with `--json`; what is said is in `failures`. Must never print by itself
where `--json` was asked for. Tested in `tests/unit/test_cli_main.py` and `tests/acceptance/test_cli.py`.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

import click

from squall import __version__, config
from squall.cli import failures

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


# ---- running one command ------------------------------------------------------------------------------------------


def execute(argv: list[str]) -> int:
    """Run one command; the exit code."""
    try:
        return _execute(argv)
    except BrokenPipeError:
        # Whoever read our output has gone. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _execute(argv: list[str]) -> int:
    try:
        result: Any = cli.main(args=argv, prog_name="squall", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except SystemExit as error:  # of the user's entrypoint, whose exit code is theirs
        if error.code and wants_json(argv):
            failures.tell(error, as_json=True, is_last_line=_first_word(argv) == "run")
        raise
    except (Exception, KeyboardInterrupt) as error:
        return failures.tell(error, as_json=wants_json(argv), is_last_line=_first_word(argv) == "run")


def _first_word(argv: list[str]) -> str:
    return next((word for word in argv if not word.startswith("-")), "")


def wants_json(argv: list[str]) -> bool:
    """Whether these words ask for JSON. They may be wrong usage that click gave up on, so they are read here; `--json`
    among the arguments of the user's own function or command is none of ours."""
    if "--json" not in argv:
        return False
    words = iter(argv)
    command: click.Command = cli
    for word in words:
        if word == "--json":
            return True
        if word == "--":
            return False
        if word.startswith("-"):
            if _needs_value(command, word):
                next(words, None)
        elif isinstance(command, click.Group):
            found = command.get_command(click.Context(command), word)
            if found is None:
                return True  # a mistyped command: nothing says whose it is
            command = found
        elif not command.context_settings.get("allow_interspersed_args", True):
            return False
    return False


def _needs_value(command: click.Command, word: str) -> bool:
    """Whether the word after this option is its value."""
    taking = {
        name
        for param in command.params
        for name in param.opts
        if isinstance(param, click.Option)
        if not param.is_flag and not param.count
    }
    if word.startswith("--"):
        return word in taking
    taken = next((i for i, letter in enumerate(word) if f"-{letter}" in taking), len(word))
    return taken == len(word) - 1  # else the value is in the same word, or there is none


def main() -> NoReturn:
    """The entry point of the `squall` script."""
    try:
        sys.exit(execute(sys.argv[1:]))
    finally:
        if wants_json(sys.argv[1:]):
            # What the user's code prints on its way out must not come after the document.
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os.dup2(2, 1)


if __name__ == "__main__":
    main()
