"""Registration: what may be decorated, how it is called, and which spec comes of it."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

import squall
from squall.exception import InvalidError


def plain(x: int) -> int:
    return x


def generator(n: int) -> Iterator[int]:
    yield n


async def coroutine(n: int) -> int:
    return n


async def async_generator(n: int) -> AsyncIterator[int]:
    yield n


class Holder:
    def method(self) -> None: ...


def test_defaults_are_those_of_the_field() -> None:
    app = squall.App("a")
    app.function()(plain)
    spec = app._specs["plain"]
    assert (spec.cpu, spec.memory_mib, spec.timeout, spec.startup_timeout) == (0.125, 128, 300.0, 300.0)
    assert (spec.min_containers, spec.max_containers, spec.scaledown_window) == (0, 0, 60.0)
    assert (spec.module, spec.qualname, spec.tag) == (__name__, "plain", "plain")


def test_startup_timeout_falls_back_to_timeout() -> None:
    app = squall.App("a")
    app.function(timeout=10)(plain)
    assert app._specs["plain"].startup_timeout == 10.0


def test_name_becomes_the_tag_and_the_place_stays() -> None:
    app = squall.App("a")
    function = app.function(name="other")(plain)
    assert app.registered_functions == {"other": function}
    assert app._specs["other"].qualname == "plain"


@pytest.mark.parametrize(
    ("raw_f", "is_generator", "is_async"),
    [(plain, False, False), (generator, True, False), (coroutine, False, True), (async_generator, True, True)],
)
def test_kind_of_function_is_detected(raw_f: Any, is_generator: bool, is_async: bool) -> None:
    app = squall.App("a")
    function = app.function(name="f")(raw_f)
    assert function.is_generator is is_generator
    assert (app._specs["f"].is_generator, app._specs["f"].is_async) == (is_generator, is_async)


def test_env_and_secrets_merge_and_the_functions_win() -> None:
    app = squall.App("a", env={"A": "app", "B": "app"}, secrets=[squall.Secret.from_dict({"C": "app"})])
    app.function(env={"A": "own"}, secrets=[squall.Secret.from_dict({"C": "own"})])(plain)
    assert app._specs["plain"].env == {"A": "own", "B": "app", "C": "own"}


def test_function_keeps_the_name_and_text_of_what_it_wraps() -> None:
    function = squall.App("a").function()(plain)
    assert vars(function)["__name__"] == "plain"
    assert function.raw_f is plain
    assert function.local(3) == 3


def misuse_without_parentheses() -> None:
    squall.App("a").function(plain)


def misuse_entrypoint_without_parentheses() -> None:
    squall.App("a").local_entrypoint(plain)


def misuse_on_a_class() -> None:
    squall.App("a").function()(Holder)


def misuse_on_a_method() -> None:
    squall.App("a").function()(Holder.method)


def misuse_on_a_local_function() -> None:
    def inner() -> None: ...

    squall.App("a").function()(inner)


def misuse_on_a_lambda() -> None:
    squall.App("a").function()(lambda: 1)


def misuse_twice() -> None:
    app = squall.App("a")
    app.function()(app.function()(plain))


def misuse_on_an_entrypoint() -> None:
    app = squall.App("a")
    app.function()(app.local_entrypoint()(plain))


def misuse_on_a_value() -> None:
    squall.App("a").function()(5)  # type: ignore[call-overload]


def misuse_on_a_static_method() -> None:
    squall.App("a").function()(staticmethod(plain))


def misuse_generator_with_retries() -> None:
    squall.App("a").function(retries=1)(generator)


@pytest.mark.parametrize(
    ("misuse", "said"),
    [
        (misuse_without_parentheses, "write `@app.function()`"),
        (misuse_entrypoint_without_parentheses, "write `@app.local_entrypoint()`"),
        (misuse_on_a_class, "decorates the class `Holder`"),
        (misuse_on_a_method, "is a method of a class"),
        (misuse_on_a_local_function, "serialized=True"),
        (misuse_on_a_lambda, "decorates a lambda"),
        (misuse_twice, "twice"),
        (misuse_on_an_entrypoint, "is a local entrypoint"),
        (misuse_on_a_value, "decorates 5"),
        (misuse_on_a_static_method, "it takes a function defined with `def`"),
        (misuse_generator_with_retries, "has `retries`"),
    ],
)
def test_misused_decorator_is_answered_with_the_right_use(misuse: Any, said: str) -> None:
    with pytest.raises(InvalidError) as error:
        misuse()
    assert said in str(error.value)


def test_local_function_and_lambda_are_taken_by_value() -> None:
    app = squall.App("a")

    def inner() -> None: ...

    app.function(serialized=True)(inner)
    app.function(serialized=True, name="small")(lambda: 1)
    assert set(app.registered_functions) == {"inner", "small"}


def test_second_function_of_a_name_replaces_the_first_with_a_warning() -> None:
    app = squall.App("a")
    app.function()(plain)
    with pytest.warns(UserWarning, match="function `plain` replaces another"):
        app.function(name="plain")(coroutine)
    assert app._specs["plain"].is_async


def test_same_function_registered_again_is_no_news() -> None:
    app = squall.App("a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        app.function()(plain)
        app.function()(plain)


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, 5, "ä"])
def test_bad_app_name_is_refused(name: Any) -> None:
    with pytest.raises(InvalidError, match="app name"):
        squall.App(name)


def test_what_a_later_release_brings_says_so() -> None:
    app = squall.App("a")
    with pytest.raises(InvalidError, match=r"`App\.server` is not available in this release"):
        app.server()
    with pytest.raises(InvalidError, match=r"volumes.*not available in this release"):
        squall.App("a", volumes={})
    with pytest.raises(AttributeError):
        app.nonsense  # noqa: B018


def test_unknown_option_of_an_app_is_named() -> None:
    with pytest.raises(InvalidError, match="no option `imagee`"):
        squall.App("a", imagee=None)


def test_hydrate_gives_the_named_app_its_ids() -> None:
    from squall.app import hydrate_apps, sibling_id

    mine, other = squall.App("mine-h"), squall.App("other-h")
    function, stranger = mine.function()(plain), other.function()(plain)
    hydrate_apps("mine-h", "ap-1", {"plain": "fu-1"})
    assert (function._object_id, stranger._object_id, sibling_id("plain")) == ("fu-1", "", "fu-1")


def test_hydrate_finds_an_app_without_a_name_by_its_functions() -> None:
    from squall.app import hydrate_apps

    app = squall.App()
    function = app.function(name="only-here")(plain)
    hydrate_apps("script", "ap-1", {"only-here": "fu-2"})
    assert function._object_id == "fu-2"


def test_public_names_are_sorted_and_there() -> None:
    assert squall.__all__ == sorted(squall.__all__, key=str)
    for name in squall.__all__:
        assert getattr(squall, name) is not None
    assert set(squall.__all__) <= set(dir(squall))
    with pytest.raises(AttributeError, match="no attribute `Nope`"):
        squall.Nope  # noqa: B018


def test_types_of_calls_are_those_of_the_function(tmp_path: Path) -> None:
    api = pytest.importorskip("mypy.api")
    program = """
        import squall
        app = squall.App("typed")

        @app.function(cpu=0.5, memory=256)
        def square(x: int) -> int:
            return x * x

        with app.run():
            a: int = square.remote(4)
            b: list[int] = list(square.map(range(3)))
            c: squall.FunctionCall[int] = square.spawn(1)
            d: int = c.get(timeout=1)
            square.remote("wrong")
    """
    file = tmp_path / "typed.py"
    file.write_text(textwrap.dedent(program))
    out, _, _ = api.run(["--strict", "--no-error-summary", "--cache-dir", str(tmp_path / "cache"), str(file)])
    errors = [line for line in out.splitlines() if line.startswith(str(file))]
    assert len(errors) == 1
    assert 'incompatible type "str"; expected "int"' in errors[0]
