"""Handles by name, before anybody was asked."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

import squall
from squall.exception import InvalidError


def test_a_handle_by_name_is_made_without_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(squall.Client, "connect", lambda *a, **k: pytest.fail("it connected"))
    function = squall.Function.from_name("numbers", "square", version=2, environment_name="staging")
    variant = function.with_options(cpu=1)
    assert repr(function) == "<Function `square`>" and variant.tag == "square"
    squall.Cls.from_name("numbers", "Model").with_options(cpu=1)


def test_a_handle_by_name_travels_as_its_name() -> None:
    function = squall.Function.from_name("numbers", "square", version=2)
    lookup: Any = pickle.loads(pickle.dumps(function))._lookup
    assert (lookup.app, lookup.name, lookup.version, lookup.is_class) == ("numbers", "square", 2, False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("a b", "f"), "app name"),
        (("a", ""), "takes the name of a function"),
        (("a", "Model.run"), "is a method"),
    ],
)
def test_a_wrong_name_is_refused_at_once(arguments: tuple[str, str], said: str) -> None:
    with pytest.raises(InvalidError, match=said):
        squall.Function.from_name(*arguments)


@pytest.mark.parametrize("version", [0, -1, True, "2"])
def test_a_wrong_version_is_refused_at_once(version: Any) -> None:
    with pytest.raises(InvalidError, match="no number of a version"):
        squall.Function.from_name("a", "f", version=version)
