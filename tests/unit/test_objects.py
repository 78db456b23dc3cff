"""Ids of apps and functions: what callers name stays the same, and nothing of another workspace is found."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from squall.exception import InvalidError, NotFoundError
from squall.protocol.messages import CreateApp, FunctionSpec
from squall.server.database import Database
from squall.server.objects import Objects, Scope, check_specs, stable_id_of
from squall.server.sealing import Seal


@pytest.fixture
def objects(tmp_path: Path) -> Iterator[Objects]:
    loop = asyncio.new_event_loop()
    yield Objects(Database.in_directory(tmp_path, loop), Seal(tmp_path / "seal.key"))
    loop.close()


def hello(*tags: str) -> CreateApp:
    return CreateApp("hello", [FunctionSpec(tag, module="hello", qualname=tag) for tag in tags])


def test_a_functions_id_follows_from_its_app_and_name(objects: Objects) -> None:
    app = objects.create_app(hello("f", "g"), None, 1.0)
    assert app.functions["f"].stable_id == stable_id_of(app.app_id, "f")
    assert app.functions["f"].stable_id != app.functions["g"].stable_id
    assert objects.function(stable_id_of(app.app_id, "g")) is app.functions["g"]


def test_functions_of_two_apps_have_different_ids(objects: Objects) -> None:
    one, other = objects.create_app(hello("f"), None, 1.0), objects.create_app(hello("f"), None, 2.0)
    assert one.functions["f"].stable_id != other.functions["f"].stable_id


def test_a_function_of_another_workspace_is_not_found(objects: Objects) -> None:
    app = objects.create_app(hello("f"), None, 1.0, Scope("red"))
    assert objects.function(app.functions["f"].stable_id, Scope("red", "staging")) is app.functions["f"]
    with pytest.raises(NotFoundError):
        objects.function(app.functions["f"].stable_id, Scope("blue"))


def test_an_app_of_another_workspace_is_not_found_by_name_or_id(objects: Objects) -> None:
    app = objects.create_app(hello("f"), None, 1.0, Scope("red"))
    for ref in ("hello", app.app_id):
        assert objects.find_app(ref, Scope("red")) is app
        with pytest.raises(NotFoundError):
            objects.find_app(ref, Scope("blue"))


def test_a_name_means_the_app_of_the_own_environment(objects: Objects) -> None:
    staging = objects.create_app(hello("f"), None, 1.0, Scope("red", "staging"))
    main = objects.create_app(hello("f"), None, 2.0, Scope("red", "main"))
    assert objects.find_app("hello", Scope("red", "staging")) is staging
    assert objects.find_app("hello", Scope("red", "main")) is main


def test_a_variants_id_follows_from_what_callers_name(objects: Objects) -> None:
    app = objects.create_app(hello("f"), None, 1.0)
    named = app.functions["f"].stable_id
    variant = objects.bind(named, {"cpu": 1.0}, b"", trusted=True)
    assert objects.bind(named, {"cpu": 1.0}, b"", trusted=True) is variant
    assert objects.function(variant.stable_id) is variant
    with pytest.raises(NotFoundError):
        objects.bind(named, {"cpu": 1.0}, b"", trusted=True, scope=Scope("blue"))


@pytest.mark.parametrize("name", ["env", "image", "secrets", "secret_keys"])
def test_a_container_chooses_nothing_of_what_surrounds_code_of_another_app(objects: Objects, name: str) -> None:
    """It would run with that app's secrets, and with a proxy or a preloaded library of the container's."""
    app, other = objects.create_app(hello("f"), None, 1.0), objects.create_app(hello("g"), None, 1.0)
    named = app.functions["f"].stable_id
    with pytest.raises(InvalidError, match=f"cannot choose its `{name}`"):
        objects.bind(named, {name: {"HTTPS_PROXY": "http://mine"}}, b"", trusted=False, app=other)
    objects.bind(named, {"cpu": 2.0}, b"", trusted=False, app=other)
    objects.bind(named, {"env": {"A": "1"}}, b"", trusted=False, app=app)


def test_an_app_of_very_many_functions_is_refused() -> None:
    """Each is a pool that every round looks at."""
    with pytest.raises(InvalidError, match="5,001 functions"):
        check_specs("app", [FunctionSpec(f"f{n}", "m", "f") for n in range(5001)])


def test_a_stopped_apps_functions_are_not_found(objects: Objects) -> None:
    app = objects.create_app(hello("f"), None, 1.0)
    objects.set_stopped(app, 2.0)
    with pytest.raises(NotFoundError):
        objects.function(app.functions["f"].stable_id)
