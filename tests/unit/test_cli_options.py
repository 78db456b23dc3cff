"""A signature as command-line options: what each type accepts, and what is said of a wrong value."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from datetime import datetime
from typing import Any, Literal, Optional

import click
import pytest

from squall.cli import options
from squall.exception import InvalidError


def parse(function: Callable[..., Any], line: str) -> dict[str, Any]:
    """The keyword arguments that `line` gives to `function`."""
    command = options.command_for("main", function, inspect.signature(function))
    return options.parse(command, line.split(), "squall run f.py")


def main(
    count: int,
    rate: float = 0.5,
    first_name: str = "x",
    fast: bool = False,
    at: datetime | None = None,
    kind: Literal["a", "b"] = "a",
    level: Literal[1, 2] = 1,
    maybe: Optional[int] = None,  # noqa: UP045  # the old spelling is what is tested
) -> None:
    """The words of the docstring."""


def test_each_type_is_converted() -> None:
    line = "--count 3 --rate 2 --first-name ann --fast --at 2026-01-31 --kind b --level 2 --maybe 7"
    assert parse(main, line) == {
        "count": 3,
        "rate": 2.0,
        "first_name": "ann",
        "fast": True,
        "at": datetime(2026, 1, 31),
        "kind": "b",
        "level": 2,
        "maybe": 7,
    }


def test_defaults_hold_for_what_is_left_out() -> None:
    given = parse(main, "--count 3")
    assert (given["rate"], given["fast"], given["at"], given["level"], given["maybe"]) == (0.5, False, None, 1, None)


def test_underscores_are_accepted_as_well_as_dashes() -> None:
    assert parse(main, "--count 3 --first_name bob")["first_name"] == "bob"


def test_bool_is_a_pair_of_flags() -> None:
    def f(cache: bool = True) -> None: ...

    assert parse(f, "--no-cache") == {"cache": False}
    assert parse(f, "") == {"cache": True}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "Missing option '--count'"),
        ("--count x", "'x' is not a valid integer"),
        ("--count 1 --rate x", "'x' is not a valid float"),
        ("--count 1 --kind c", "'c' is not one of 'a', 'b'"),
        ("--count 1 --level 3", "'3' is not one of 1, 2"),
        ("--count 1 --at soon", "'soon' does not match the format"),
        ("--count 1 --other 2", "No such option"),
        ("--count 1 stray", "unexpected extra argument"),
    ],
)
def test_wrong_value_is_a_usage_error_that_names_it(line: str, said: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        parse(main, line)
    assert said in caught.value.format_message()


def test_parameter_without_annotation_takes_the_type_of_its_default() -> None:
    def f(n=3, word="a", *, other): ...  # type: ignore[no-untyped-def]

    assert parse(f, "--n 4 --other 5") == {"n": 4, "word": "a", "other": "5"}


def test_raw_arguments_are_passed_on_as_they_are() -> None:
    def f(*args: str) -> None: ...

    assert parse(f, "--x 1 -h file") == {"args": ("--x", "1", "-h", "file")}


def test_raw_arguments_beside_others_are_refused() -> None:
    def f(n: int, *args: str) -> None: ...

    with pytest.raises(InvalidError, match=r"`\*args` beside `n`"):
        parse(f, "")


def test_type_that_has_no_meaning_here_is_refused_with_the_way_out() -> None:
    def f(names: list[str]) -> None: ...

    with pytest.raises(InvalidError, match=r"parameter `names` of `main`: its type is `list\[str\]`") as caught:
        parse(f, "")
    assert "give it a default" in caught.value.hint


def test_type_that_has_no_meaning_here_is_left_out_when_it_has_a_default() -> None:
    def f(n: int = 1, names: list[str] | None = None) -> None: ...

    assert parse(f, "--n 2") == {"n": 2}


def test_annotation_that_cannot_be_resolved_does_not_harm_the_others() -> None:
    def f(n: int, thing: Unknown = None) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    assert parse(f, "--n 2") == {"n": 2}


def test_parameter_named_help_keeps_its_option() -> None:
    def f(help: str = "") -> None: ...

    assert parse(f, "--help me") == {"help": "me"}


def test_help_shows_the_docstring_and_the_defaults() -> None:
    command = options.command_for("main", main, inspect.signature(main))
    with click.Context(command) as ctx:
        text = command.get_help(ctx)
    assert "The words of the docstring." in text
    assert "0.5" in text
    assert "[1|2]" in text
