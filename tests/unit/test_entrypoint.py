"""Local entrypoints: found by name, with the signature the command line is made from."""

from __future__ import annotations

import pytest

import squall
from squall.exception import InvalidError


def main(n: int = 3, word: str = "x") -> str:
    return word * n


def other() -> None: ...


def test_entrypoint_is_registered_under_its_name_and_stays_callable() -> None:
    app = squall.App("a")
    entry = app.local_entrypoint()(main)
    assert app.registered_entrypoints == {"main": entry}
    assert entry(2, "ab") == "abab"
    assert entry.raw_f is main


def test_entrypoint_shows_its_parameters_with_their_types() -> None:
    entry = squall.App("a").local_entrypoint()(main)
    assert {name: p.annotation for name, p in entry.signature.parameters.items()} == {"n": int, "word": str}


def test_annotation_that_cannot_be_evaluated_stays_text() -> None:
    def strange(x: int) -> None: ...

    strange.__annotations__["x"] = "NoSuchType"
    entry = squall.App("a").local_entrypoint()(strange)
    assert entry.signature.parameters["x"].annotation == "NoSuchType"


def test_name_can_be_given() -> None:
    app = squall.App("a")
    app.local_entrypoint(name="start")(main)
    assert list(app.registered_entrypoints) == ["start"]


def test_two_entrypoints_of_one_name_are_refused() -> None:
    app = squall.App("a")
    app.local_entrypoint()(main)
    with pytest.raises(InvalidError, match="two local entrypoints named `main`"):
        app.local_entrypoint(name="main")(other)


def test_module_imported_again_registers_again() -> None:
    app = squall.App("a")
    app.local_entrypoint()(main)
    app.local_entrypoint()(main)
    assert list(app.registered_entrypoints) == ["main"]
