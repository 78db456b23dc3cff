"""What a user may meet has its place in the documentation: settings, errors, commands; modules say what they own."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import get_args

import click
import pytest

import squall
from squall import config, exception
from squall.cli.main import cli
from squall.protocol.states import AppState, ContainerState, InputState, OutputStatus

ROOT = Path(__file__).parents[2]
MODULES = sorted(path for path in (ROOT / "squall").rglob("*.py") if path.name != "__init__.py")


def commands(command: click.Command, path: str = "squall") -> list[tuple[str, click.Command]]:
    """Every command with the words that call it."""
    found = [(path, command)]
    if isinstance(command, click.Group):
        with click.Context(command) as ctx:
            for name in command.list_commands(ctx):
                if inner := command.get_command(ctx, name):
                    found += commands(inner, f"{path} {name}")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_every_setting_is_documented_with_its_variable_and_default() -> None:
    page = (ROOT / "docs/reference/settings.md").read_text()
    missing = [s.env for s in config.settings() if f"`{s.env}`" not in page or s.help not in page]
    assert missing == []


def test_no_setting_is_read_outside_config() -> None:
    # The one is handed on to child processes, the other set in containers.
    names = {row.env for row in config.settings()} - {"SQUALL_HOME", "SQUALL_ENVIRONMENT"}
    readers = [p.name for p in MODULES if p.name != "config.py" and any(f'"{n}"' in p.read_text() for n in names)]
    assert readers == []


def test_every_error_is_documented_with_its_code() -> None:
    page = (ROOT / "docs/reference/errors.md").read_text()
    errors = [cls for cls in vars(exception).values() if isinstance(cls, type) and issubclass(cls, exception.Error)]
    missing = [cls.__name__ for cls in errors if f"`{cls.__name__}` | `{cls.code}`" not in page]
    assert missing == []


@pytest.mark.parametrize(("path", "command"), commands(cli), ids=lambda value: value if isinstance(value, str) else "")
def test_command_and_its_options_have_help(path: str, command: click.Command) -> None:
    assert command.help, f"`{path}` has no help"
    bare = [p.name for p in command.params if isinstance(p, click.Option) and not p.help]
    assert bare == []


@pytest.mark.parametrize(("path", "command"), commands(cli), ids=lambda value: value if isinstance(value, str) else "")
def test_command_has_json_for_programs(path: str, command: click.Command) -> None:
    if isinstance(command, click.Group) or path == "squall completion":  # which prints a script
        return
    assert any("--json" in param.opts for param in command.params), f"`{path}` has no --json"


def test_every_command_is_in_the_reference() -> None:
    page = (ROOT / "docs/reference/cli.md").read_text()
    missing = [
        path for path, command in commands(cli) if not isinstance(command, click.Group) and f"`{path}" not in page
    ]
    assert missing == []


def test_every_state_is_in_the_glossary() -> None:
    page = (ROOT / "docs/glossary.md").read_text()
    states = [*get_args(InputState), *get_args(OutputStatus), *get_args(ContainerState), *get_args(AppState)]
    assert [state for state in states if f"`{state}`" not in page] == []


def test_every_public_noun_is_in_the_glossary() -> None:
    page = (ROOT / "docs/glossary.md").read_text()
    nouns = [name for name in squall.__all__ if name[0].isupper() and name not in exception.__dict__]
    assert [name for name in nouns if f"`{name}`" not in page] == []
