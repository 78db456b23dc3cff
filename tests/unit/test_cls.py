"""Classes: what may be decorated how, which spec comes of it, how instances are made, what runs locally."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import squall
from squall._marks import pack_parameters, shape_of, unpack_parameters
from squall.cls import make_here
from squall.exception import InvalidError
from squall.protocol import messages as m
from tests.unit.conftest import Peer

app = squall.App("classes")


class Base:
    size: int = squall.parameter(default=3)

    @squall.enter()
    def begin(self) -> None:
        self.order = ["base"]

    @squall.method()
    def inherited(self) -> int:
        return self.size

    @squall.exit()
    def end(self) -> None: ...


@app.cls(cpu=0.5, name="Model")
class _Model(Base):
    """Says what it is."""

    name: str = squall.parameter()
    key: bytes = squall.parameter(default=b"\x00\xff")
    hidden: bool = squall.parameter(default=True, init=False)

    @squall.enter()
    async def load(self) -> None:
        await asyncio.sleep(0)
        self.order.append("load")

    @squall.enter(snap=True)
    def freeze(self) -> None:
        self.order = ["freeze"]

    @squall.method()
    def describe(self, word: str = "") -> tuple[Any, ...]:
        return self.name, self.size, self.key, self.hidden, self.order, word

    @squall.method()
    def values(self, n: int) -> Iterator[int]:
        yield from range(n)

    @squall.method()
    async def later(self, x: int) -> tuple[int, list[str]]:
        return x, self.order

    @squall.exit()
    def stop(self) -> None: ...

    def plain(self) -> str:
        return "plain " + self.name


Model: Any = _Model
"""Type checkers see the plain class, not the handle."""


@app.cls()
class Simple:
    @squall.method()
    def double(self, x: int) -> int:
        return 2 * x

    @squall.method()
    def here_and_there(self, x: int) -> tuple[int, int]:
        return self.double(x), self.double.local(x)


def refused(body: Callable[[], Any], said: str, hint: str = "") -> None:
    with pytest.raises(InvalidError, match=said) as caught:
        body()
    assert hint in caught.value.hint


# ---- the spec ---------------------------------------------------------------------------------------------------


def test_class_becomes_one_spec_with_its_methods_and_parameters() -> None:
    spec = app._specs["Model"]
    assert (spec.tag, spec.module, spec.qualname, spec.cpu) == ("Model", __name__, "_Model", 0.5)
    assert spec.methods == ["inherited", "describe", "values", "later"]
    assert spec.parameters == ["size", "name", "key", "hidden"]
    assert (spec.exit_grace, app._specs["Simple"].exit_grace) == (30.0, 0.0)


def test_hooks_run_bases_first_on_the_way_in_and_last_on_the_way_out() -> None:
    shape = shape_of(Model.raw_cls)
    assert shape.enters == ["freeze", "begin", "load"]
    assert shape.exits == ["stop", "end"]


def test_generator_methods_are_known_as_such() -> None:
    model = Model(name="m")
    assert model.values.is_generator
    assert not model.describe.is_generator


def test_override_takes_the_place_of_what_it_overrides() -> None:
    class Child(Base):
        @squall.enter()
        def begin(self) -> None: ...

        def inherited(self) -> int:  # type: ignore[override]
            return 0

        @squall.method()
        def own(self) -> None: ...

    shape = shape_of(Child)
    assert (shape.enters, list(shape.methods)) == (["begin"], ["own"])


def test_class_may_be_derived_from_a_decorated_one() -> None:
    other = squall.App("other")

    class Child(Model):  # type: ignore[misc]
        @squall.method()
        def own(self) -> None: ...

    child = other.cls(serialized=True)(Child)
    assert list(child.methods) == ["inherited", "describe", "values", "later", "own"]
    assert child.needed == ("name",)


def test_parameters_survive_packing_and_equal_ones_pack_equally() -> None:
    shape = shape_of(Model.raw_cls)
    values = {"size": 1, "name": "é\n", "key": b"\x00", "hidden": False}
    data = pack_parameters(shape, values)
    assert unpack_parameters(data) == values
    assert data == pack_parameters(shape, dict(reversed(values.items())))


# ---- instances --------------------------------------------------------------------------------------------------


def test_instance_has_its_parameters_and_defaults() -> None:
    model = Model(name="a", size=5)
    assert (model.name, model.size, model.key, model.hidden) == ("a", 5, b"\x00\xff", True)
    assert repr(model).startswith("<Model(")


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        ((), {}, "needs its parameter `name`"),
        ((), {"name": 3}, "is 3, a `int`"),
        ((), {"name": "a", "size": True}, "is True, a `bool`"),
        ((), {"name": "a", "nam": "b"}, "`nam` is not a parameter"),
        ((), {"name": "a", "hidden": False}, "`hidden` is not a parameter"),
        ((1,), {"name": "a", "size": 2}, "`size` is given twice"),
        ((1, "a", b"", True), {}, "is given 4 arguments, it takes 3"),
    ],
)
def test_wrong_parameters_are_refused_where_the_instance_is_made(
    args: tuple[Any, ...], kwargs: dict[str, Any], said: str
) -> None:
    refused(lambda: Model(*args, **kwargs), said, "it takes ")


def test_method_of_a_class_needs_an_instance() -> None:
    refused(lambda: Model.describe, "needs an instance", "Model().describe.remote(...)")


def test_method_is_not_called_like_a_plain_one() -> None:
    refused(lambda: Model(name="a").describe(), "cannot be called like a plain one")


def test_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        Model(name="a").nonsense  # noqa: B018  # type: ignore[attr-defined]


def test_options_belong_to_the_class_not_to_a_method() -> None:
    refused(lambda: Simple().double.with_options(cpu=1), "options belong to its class")


@pytest.mark.parametrize("option", ["name", "serialized", "include_source", "is_generator"])
def test_variant_cannot_change_how_the_code_is_sent(option: str) -> None:
    refused(lambda: Model.with_options(**{option: "x"}), f"cannot change `{option}`")


def test_a_class_is_looked_up_by_name_without_asking_anybody_yet() -> None:
    assert repr(squall.Cls.from_name("app", "Model")) == "<Cls `Model`>"


# ---- running here -----------------------------------------------------------------------------------------------


def test_local_enters_once_and_runs_here() -> None:
    model = Model(name="a")
    assert model.describe.local("w") == ("a", 3, b"\x00\xff", True, ["base", "load"], "w")
    assert model.describe.local()[4] is model.describe.local()[4]
    assert model.plain() == "plain a"
    assert list(model.values.local(2)) == [0, 1]


def test_local_of_an_async_method_enters_inside_the_loop() -> None:
    assert asyncio.run(Model(name="a").later.local(4)) == (4, ["base", "load"])


def test_async_hook_cannot_run_for_a_plain_method_in_a_loop() -> None:
    async def body() -> None:
        Model(name="a").describe.local()

    refused(lambda: asyncio.run(body()), "async hook `Model.load` cannot run", "make the method async")


def test_own_methods_are_plain_on_the_object() -> None:
    assert Simple().here_and_there.local(4) == (8, 8)


def test_object_of_the_container_has_the_parameters_of_its_pool() -> None:
    shape = shape_of(Model.raw_cls)
    data = pack_parameters(shape, {"size": 1, "name": "x", "key": b"", "hidden": True})
    made = make_here(Model.raw_cls, shape, "Model", "fu-0", data)
    assert (made.size, made.name, made.key) == (1, "x", b"")
    assert made.describe.remote is not None


# ---- what goes over the wire ------------------------------------------------------------------------------------


def test_call_names_its_method_and_pools_are_asked_for_once(peer: Peer) -> None:
    peer.answers[m.BindFunction] = lambda message, _: peer._reply(message, {"function_id": "fu-Variant"})
    started = peer.run(app)
    try:
        peer.functions["fu-Variant"] = lambda *args: "answered"
        model = Model(name="a")
        assert [model.describe.remote("x"), model.inherited.remote()] == ["answered"] * 2
        assert list(model.describe.map(["x"])) == ["answered"]
    finally:
        started._running = None
    assert [bind.function_id for bind in peer.of(m.BindFunction)] == ["fu-Model"]
    assert [submit.method for submit in peer.of(m.Submit)][:2] == ["describe", "inherited"]
    assert {submit.method for submit in peer.of(m.Submit)[2:]} == {"describe"}


def test_handles_travel_with_their_parameters(peer: Peer) -> None:
    started = peer.run(app)
    try:
        model, method, cls = pickle.loads(pickle.dumps((Model(name="a"), Model(name="b").describe, Model)))
    finally:
        started._running = None
    assert (model.name, method.tag, cls.tag) == ("a", "Model.describe", "Model")
    assert method._variant.parameters == Model(name="b").describe._variant.parameters
    refused(lambda: model.describe.local(), "its code is not here")
    assert cls(name="c").name == "c"


def test_with_options_merges_what_is_said_in_steps() -> None:
    handle = Model.with_options(cpu=1, env={"A": "1"}).with_options(memory=256, env={"B": "2"})
    assert handle._fields["env"] == {"A": "1", "B": "2"}
    assert (handle._fields["cpu"], handle._fields["memory_mib"]) == (1.0, 256)


# ---- rules ------------------------------------------------------------------------------------------------------


def test_class_without_methods_is_refused() -> None:
    refused(lambda: squall.App("a").cls(serialized=True)(type("Empty", (), {})), "has nothing to call")


def test_class_decorator_wants_parentheses_and_a_class() -> None:
    refused(lambda: squall.App("a").cls(Base), "without its parentheses", "@app.cls()")
    refused(lambda: squall.App("a").cls()(test_class_without_methods_is_refused), "takes a class|decorates")  # type: ignore[arg-type]
    refused(lambda: squall.App("a").cls()(Model), "twice")
    refused(lambda: squall.App("a").function()(Base), "decorates the class `Base`", "@app.cls()")


@pytest.mark.parametrize("decorator", [squall.method, squall.enter, squall.exit])
def test_decorator_of_a_class_wants_parentheses_and_a_class_around(decorator: Any) -> None:
    refused(lambda: decorator(test_class_without_methods_is_refused), "without its parentheses")
    refused(lambda: decorator()(test_class_without_methods_is_refused), "is in no class")
    refused(lambda: decorator()(staticmethod(Base.__init__)), "`staticmethod`")
    refused(lambda: decorator()(3), "decorates 3")


def test_lifecycle_and_interface_cannot_be_stacked() -> None:
    def stacked() -> None:
        class Wrong:
            @squall.method()  # type: ignore[arg-type]
            @squall.enter()
            def both(self) -> None: ...

    refused(stacked, r"`@squall.enter\(\)` and `@squall.method\(\)`", "keep one decorator")


def test_hook_with_an_argument_is_refused() -> None:
    def wrong() -> None:
        class Wrong:
            @squall.enter()  # type: ignore[arg-type]
            def load(self, path: str) -> None: ...

    refused(wrong, "has the argument `path`", "squall.parameter()")


def test_function_inside_a_class_is_sent_to_the_class_decorator() -> None:
    def method(self: Any) -> None: ...

    method.__qualname__ = "Model.method"
    refused(lambda: squall.App("a").function()(method), "is a method of a class", "@squall.method()")


def test_static_method_cannot_be_a_method() -> None:
    class Wrong:
        @staticmethod
        @squall.method()  # type: ignore[arg-type]
        def static() -> None: ...

    refused(lambda: shape_of(Wrong), "is a `staticmethod`")


def test_init_with_arguments_is_refused_with_the_way_out() -> None:
    class Wrong:
        def __init__(self, path: str) -> None: ...

    refused(lambda: shape_of(Wrong), "has the argument `path`", "path: str = squall.parameter()")


def test_init_beside_parameters_is_refused() -> None:
    class Wrong:
        name: str = squall.parameter()

        def __init__(self) -> None: ...

    refused(lambda: shape_of(Wrong), "parameters and an `__init__`", "squall.enter()")


@pytest.mark.parametrize(
    ("annotations", "value", "said"),
    [
        ({}, squall.parameter(), "has no type"),
        ({"x": "float"}, squall.parameter(), "is a `float`"),
        ({"x": list}, squall.parameter(), "is a `list`"),
        ({"x": int}, squall.parameter(default="3"), "is '3', a `str`"),
        ({"x": int}, squall.parameter(default=True), "is True, a `bool`"),
    ],
)
def test_parameter_of_the_wrong_type_is_refused(annotations: dict[str, Any], value: Any, said: str) -> None:
    refused(lambda: shape_of(type("Wrong", (), {"__annotations__": annotations, "x": value})), said)


def test_class_inside_a_function_needs_to_be_sent_by_value() -> None:
    class Inner:
        @squall.method()
        def f(self) -> None: ...

    refused(lambda: squall.App("a").cls()(Inner), "inside another function", "serialized=True")
    squall.App("a").cls(serialized=True)(Inner)


def test_generator_option_belongs_to_the_method() -> None:
    refused(lambda: squall.App("a").cls(is_generator=True), "no option `is_generator`")


# ---- several inputs at a time -----------------------------------------------------------------------------------


def test_concurrency_and_batches_become_fields_of_the_spec() -> None:
    other = squall.App("other")

    @other.function(serialized=True)
    @squall.concurrent(max_inputs=8, target_inputs=2)
    @squall.batched(max_batch_size=4, wait_ms=250)
    def f(xs: list[int]) -> list[int]:
        return xs

    spec = other._specs["f"]
    assert (spec.concurrency, spec.target_concurrency, spec.batch_size, spec.batch_wait) == (8, 2, 4, 0.25)


def test_batched_method_is_the_only_one_of_its_class() -> None:
    class One:
        @squall.batched(max_batch_size=4, wait_ms=0)
        def f(self, xs: list[int]) -> list[int]:
            return xs

    assert shape_of(One).fields == {"batch_size": 4, "batch_wait": 0.0}

    class Two(One):
        @squall.method()
        def g(self) -> None: ...

    refused(lambda: shape_of(Two), "has the batched method `f` and 1 more", "make two classes")
    refused(lambda: Model.with_batching(max_batch_size=2, wait_ms=0), "needs a class with one method")


def test_concurrency_belongs_to_the_class_not_to_its_method() -> None:
    def stacked() -> None:
        class Wrong:
            @squall.concurrent(max_inputs=2)
            @squall.method()
            def f(self) -> None: ...

    refused(stacked, "belongs to its class", "between `@app.cls()` and the class")


def with_default(xs: int = 3) -> None: ...


def with_rest(*xs: int) -> None: ...


def without_arguments() -> None: ...


def generator(xs: int) -> Iterator[int]:
    yield xs


@pytest.mark.parametrize("raw_f", [with_default, with_rest, without_arguments, generator])
def test_function_that_cannot_be_given_lists_is_refused(raw_f: Any) -> None:
    refused(lambda: squall.batched(max_batch_size=2, wait_ms=0)(raw_f), "batched")
    function = squall.App("a").function()(raw_f)
    refused(lambda: function.with_batching(max_batch_size=2, wait_ms=0), "batched")


@pytest.mark.parametrize("decorator", [squall.concurrent(max_inputs=2), squall.batched(max_batch_size=2, wait_ms=0)])
def test_order_of_decorators_is_told(decorator: Any) -> None:
    function = squall.App("a").function()(generator)
    refused(lambda: decorator(function), "stands above", "below it")
    refused(lambda: decorator(Model), "stands above|decorates the class")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: squall.concurrent(max_inputs=0),
        lambda: squall.concurrent(max_inputs=4, target_inputs=5),
        lambda: squall.batched(max_batch_size=1001, wait_ms=0),
        lambda: squall.batched(max_batch_size=2, wait_ms=600_001),
        lambda: squall.batched(max_batch_size=2.5, wait_ms=0),  # type: ignore[arg-type]
    ],
)
def test_numbers_out_of_range_are_refused(wrong: Callable[[], Any]) -> None:
    refused(wrong, "@squall.")


def test_used_once_and_several_at_a_time_do_not_go_together() -> None:
    def wrong() -> None:
        squall.App("a").function(single_use_containers=True)(squall.concurrent(max_inputs=2)(alone))

    refused(wrong, "single_use_containers")


def alone(x: int) -> int:
    return x


def test_method_is_not_made_a_function_as_well() -> None:
    decorated: Any = _Marked.f
    refused(lambda: squall.App("a").function()(decorated), "is a method of a class and decorated with")


class _Marked:
    @squall.method()
    def f(self) -> None: ...
