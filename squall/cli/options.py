"""A function's signature as command-line options, by the types of its parameters.

Owns what a parameter's type means on the command line: `str`, `int`, `float`, `bool` (a pair of flags), `datetime`,
`Literal` of strings or of whole numbers, and any of them optional. Must never call the function or import what its
annotations name. A wrong value is click's usage error; a signature that cannot be put into options is an InvalidError
with the way out. Tested in `tests/unit/test_cli_options.py`.
"""

from __future__ import annotations

import datetime
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, Union

import click

from squall.exception import InvalidError

_UNIONS = (Union, types.UnionType)
_PLAIN: dict[object, type] = {str: str, int: int, float: float, bool: bool}
_FORMATS = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%S.%f", "%Y-%m-%dT%H:%M:%S%z"]


class Unsupported(Exception):
    """This type has no meaning on the command line."""


def takes_raw_arguments(signature: inspect.Signature) -> bool:
    """The function has `*args`: it gets the words of the command line as they are."""
    return any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values())


def command_for(name: str, function: Callable[..., Any], signature: inspect.Signature) -> click.Command:
    """A click command whose parsed parameters are the keyword arguments of `function`; it has no callback."""
    if takes_raw_arguments(signature):
        others = [p.name for p in signature.parameters.values() if p.kind is not p.VAR_POSITIONAL]
        if others:
            raise InvalidError(
                f"cannot make options for `{name}`: it has `*args` beside `{others[0]}`",
                hint="take either `*args` alone, which gets all words of the command line, or named parameters",
            )
        return _raw_command(name, function)
    hints = _type_hints(function)
    params = [_option(name, p, hints) for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    taken = any(p is not None and p.name == "help" for p in params)
    settings = {"help_option_names": ["-h"] if taken else ["-h", "--help"]}
    return click.Command(
        name, params=[p for p in params if p is not None], help=_help(function), context_settings=settings
    )


def _raw_command(name: str, function: Callable[..., Any]) -> click.Command:
    words = click.Argument(["args"], nargs=-1, type=click.UNPROCESSED)
    settings = {"ignore_unknown_options": True, "help_option_names": []}
    return click.Command(name, params=[words], help=_help(function), context_settings=settings)


def _help(function: Callable[..., Any]) -> str | None:
    return inspect.getdoc(function)


def _type_hints(function: Callable[..., Any]) -> Mapping[str, Any]:
    """Resolved annotations; those that name something unknown here stay text, and their parameters unsupported."""
    function = inspect.unwrap(function)
    try:
        return typing.get_type_hints(function)
    except Exception:  # any annotation may run any code; resolve one by one and keep the good ones
        namespace = {**vars(typing), **getattr(function, "__globals__", {})}
        return {name: _resolved(hint, namespace) for name, hint in function.__annotations__.items()}


def _resolved(hint: Any, namespace: dict[str, Any]) -> Any:
    if not isinstance(hint, str):
        return hint
    try:
        return eval(hint, namespace)  # what get_type_hints does, for one annotation
    except Exception:
        return hint


def _option(command: str, parameter: inspect.Parameter, hints: Mapping[str, Any]) -> click.Option | None:
    """The option of a parameter; None when its type has no meaning here but it has a default to fall back on."""
    required = parameter.default is parameter.empty
    hint = hints.get(parameter.name, _inferred(parameter))
    try:
        kind, optional = click_type(hint)
    except Unsupported:
        if not required:
            return None
        raise InvalidError(
            f"cannot make an option for parameter `{parameter.name}` of `{command}`: its type is {_type_name(hint)}",
            hint="use str, int, float, bool, datetime or a Literal, give it a default, or call it from an entrypoint",
        ) from None
    # click takes a default of None for a value, so a required option must not be given one.
    default: dict[str, Any] = {} if required and not optional else {"default": None if required else parameter.default}
    flag = parameter.name.replace("_", "-")
    names = [parameter.name, f"--{flag}"]
    if kind is bool:
        names[1] = f"--{flag}/--no-{flag}"
    elif flag != parameter.name:
        names.append(f"--{parameter.name}")
    return click.Option(
        names,
        type=kind,
        required=not default,
        show_default=default.get("default") is not None,
        metavar="DATETIME" if isinstance(kind, click.DateTime) else None,
        **default,
    )


def _inferred(parameter: inspect.Parameter) -> object:
    """Without an annotation the default tells the type; without either it is text."""
    kind = type(parameter.default)
    return kind if kind in _PLAIN else str


def click_type(hint: Any) -> tuple[click.ParamType[Any] | type, bool]:
    """What parses a value of this type, and whether None is one. Raises Unsupported."""
    if typing.get_origin(hint) in _UNIONS:
        members = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        if len(members) == 1:
            return click_type(members[0])[0], True
        raise Unsupported
    if typing.get_origin(hint) is typing.Annotated:
        return click_type(typing.get_args(hint)[0])
    if typing.get_origin(hint) is Literal:
        return _literal(typing.get_args(hint)), False
    if hint is datetime.datetime:
        return click.DateTime(_FORMATS), False
    if isinstance(hint, type) and hint in _PLAIN:
        return _PLAIN[hint], False
    raise Unsupported


def _literal(values: tuple[Any, ...]) -> click.ParamType[Any]:
    if all(type(value) is str for value in values):
        return click.Choice(values)
    if all(type(value) is int for value in values):
        return _IntChoice(values)
    raise Unsupported


class _IntChoice(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases of click only
    """One of some whole numbers."""

    name = "integer"

    def __init__(self, values: tuple[int, ...]) -> None:
        self.values = values

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"[{'|'.join(map(str, self.values))}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        for number in self.values:
            if value == number or str(value).strip() == str(number):
                return number
        self.fail(f"{value!r} is not one of {', '.join(map(str, self.values))}.", param, ctx)


def _type_name(hint: Any) -> str:
    return f"`{hint.__name__}`" if isinstance(hint, type) and not typing.get_args(hint) else f"`{hint}`"


def parse(command: click.Command, words: list[str], shown_as: str) -> dict[str, Any]:
    """Keyword arguments (or `{"args": ...}` for raw ones) from the command line's words."""
    if command.params and command.params[0].name == "args" and isinstance(command.params[0], click.Argument):
        return {"args": tuple(words)}
    try:
        with command.make_context(shown_as, list(words)) as ctx:
            return dict(ctx.params)
    except click.UsageError as error:
        # Errors of click's parser carry no context, and would be taken for errors of `squall run` itself.
        error.ctx = error.ctx or click.Context(command, info_name=shown_as)
        raise
