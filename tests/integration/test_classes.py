"""Classes, all the way: pools for each set of parameters, hooks, inheritance, handles, and how containers leave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from squall.exception import FunctionTimeoutError, InvalidError, RemoteError, StartupError
from squall.protocol.messages import BindFunction, Reply, Submit
from tests.conftest import wait_until
from tests.integration import classy
from tests.integration.classy import square, stopping, use
from tests.integration.support import Kept, Outcome, Wire, containers_of, inits, rows, wait_ended

pytestmark = pytest.mark.root

# Type checkers see the plain classes that are decorated, not the handles made of them.
Model: Any = classy.Model
Careful: Any = classy.Careful


@pytest.fixture(scope="module")
def output() -> Kept:
    return Kept()


@pytest.fixture(scope="module", autouse=True)
def running(shared_home: Path, output: Kept) -> Iterator[None]:
    with classy.app.run(output=output):
        yield


# ---- pools ------------------------------------------------------------------------------------------------------


def test_methods_of_one_set_of_parameters_share_a_container() -> None:
    first, second = Model(name="a"), Model(name="a")
    name, container_id, entered = first.where.remote()
    assert (name, entered) == ("a", 1)
    assert second.where.remote() == ("a", container_id, 1)
    assert first.double.remote(4) == 8
    assert len(containers_of("Model")) == 1


def test_other_parameters_get_a_container_of_their_own() -> None:
    one, other = Model(name="p"), Model(name="p", size=4)
    assert one.where.remote()[1] != other.where.remote()[1]
    assert other.inherited.remote() == (4, ["base", "load"])


def test_all_kinds_of_parameters_arrive() -> None:
    assert Model(name="é\n", key=b"\x00\x01").given.remote() == (b"\x00\x01", "")


def test_same_pool_is_given_to_whoever_asks_for_the_same() -> None:
    function_id = Model(name="shared").where.object_id
    parameters = Model(name="shared").where._variant.parameters
    with Wire() as wire:
        reply, _ = wire.ask(BindFunction(Model.object_id), parameters)
    assert reply.data["function_id"] == function_id


def test_options_of_a_variant_arrive_and_give_a_pool() -> None:
    large = Model.with_options(env={"EXTRA": "yes"}, memory=200)(name="a")
    assert large.given.remote()[1] == "yes"
    assert large.where.remote()[1] != Model(name="a").where.remote()[1]
    assert square.with_options(memory=200).remote(5) == 25


def test_number_of_pools_is_bounded() -> None:
    with stopping.run(output=Kept()), Wire() as wire:
        function_id = Careful.object_id
        answers = [wire.ask(BindFunction(function_id, {"memory_mib": 128 + n}))[0] for n in range(1001)]
    assert all(isinstance(answer, Reply) for answer in answers[:-1])
    assert "1000 pools" in answers[-1].message


# ---- methods ----------------------------------------------------------------------------------------------------


def test_generators_and_async_methods_run() -> None:
    model = Model(name="g")
    assert list(model.values.remote_gen(3)) == [("g", 0), ("g", 1), ("g", 2)]
    assert list(model.values_async.remote_gen(2)) == [0, 1]
    assert model.is_same_loop.remote()


def test_methods_are_mapped_and_spawned() -> None:
    model = Model(name="a")
    assert list(model.double.map(range(50))) == [2 * x for x in range(50)]
    assert list(model.double.starmap([(1,), (2,)])) == [2, 4]
    assert model.double.spawn(21).get(timeout=30) == 42
    assert model.double.spawn_map([1, 2]).get(timeout=30, index=1) == 4


def test_method_raises_with_its_own_type_and_lines() -> None:
    with pytest.raises(KeyError) as caught:
        Model(name="a").fail.remote()
    assert "raise KeyError(self.name)" in "".join(traceback.format_exception(caught.value))


def test_methods_call_functions_their_own_class_and_other_instances() -> None:
    assert Model(name="n").nested.remote(3) == (9, 6, [0, 2, 4], "other")


def test_handles_are_arguments() -> None:
    model = Model(name="a")
    name, container_id, doubled, other = use.remote(model, Model(name="p").double, Model)
    assert (name, container_id, doubled, other) == ("a", model.where.remote()[1], 8, "new")


def test_trace_names_class_and_method() -> None:
    Model(name="a").double.remote(1)
    assert "Model.double" in {row["function"] for row in rows("calls")}


# ---- what is refused --------------------------------------------------------------------------------------------


def test_server_refuses_inputs_that_name_no_method() -> None:
    with Wire() as wire:
        for function_id, method, said in (
            (square.object_id, "double", "has no method `double`"),
            (Model(name="a").where.object_id, "", "names one of its methods"),
            (Model(name="a").where.object_id, "plain", "has no method `plain`"),
            (Model.object_id, "double", "go to an instance"),
        ):
            reply, _ = wire.ask(Submit("fc-1", function_id, [], method=method))
            assert said in reply.message


def test_server_refuses_variants_that_cannot_be() -> None:
    with Wire() as wire:
        for message, parameters, said in (
            (BindFunction(square.object_id, {"module": "os"}), b"", "`module` is its own"),
            (BindFunction(square.object_id, {"cpu": "lots"}), b"", "cpu"),
            (BindFunction(square.object_id, {"cpu": -1}), b"", "cpu=-1"),
            (BindFunction(square.object_id), b"[]", "has no parameters"),
            (BindFunction(Model.object_id), b"", "needs its parameters"),
            (BindFunction(Model.object_id), b"x" * 70_000, "the limit is"),
            (BindFunction(square.object_id, {"env": {"A": "x" * 200_000}}), b"", "options of a variant"),
            (BindFunction(square.object_id, {"batch_size": 2, "batch_wait": 400}), b"", "waiting 400 s for a batch"),
            (BindFunction("fu-0"), b"", "no running function"),
        ):
            reply, _ = wire.ask(message, parameters)
            assert said in reply.message


def test_container_cannot_lift_its_network_policy_by_a_variant() -> None:
    with pytest.raises(InvalidError, match="cannot lift `block_network`"):
        classy.Fenced().lift.remote()


# ---- enter ------------------------------------------------------------------------------------------------------


def test_enter_hook_that_raises_is_told_with_its_traceback() -> None:
    with pytest.raises(StartupError, match="no such weights") as caught:
        classy.Broken().predict.remote()
    assert isinstance(caught.value.__cause__, OSError)
    assert 'raise OSError("no such weights")' in "".join(traceback.format_exception(caught.value))


def test_startup_timeout_covers_enter_hooks() -> None:
    with pytest.raises(RemoteError, match="startup_timeout of 1 s"):
        classy.Slow().predict.remote()


# ---- exit -------------------------------------------------------------------------------------------------------


def test_exit_hooks_run_when_a_container_was_idle_for_long(output: Kept) -> None:
    assert Model(name="idle").double.remote(1) == 2
    wait_until(lambda: b"left idle\nleft base\n" in output.text("Model"), "the exit hooks ran", 30)


def test_exit_hooks_do_not_run_in_a_container_killed_by_a_timeout(output: Kept) -> None:
    with pytest.raises(FunctionTimeoutError):
        classy.Hanging().hang.remote()
    wait_ended("Hanging")
    assert b"left hanging" not in output.text("Hanging")


def test_exit_hooks_have_their_grace_when_the_app_stops(shared_home: Path) -> None:
    output = Kept()
    with stopping.run(output=output):
        waiting = Outcome(lambda: Careful().work.remote(60))
        wait_until(lambda: b"working" in output.text(), "it works")
    waiting.error()
    text = output.text(stream="stdout")
    assert text == b"working\ninterrupted\nleft careful\n"
    assert b"an exit hook that fails" in output.text(stream="stderr")


def test_exit_hooks_run_on_sigterm_once_the_input_has_ended(shared_home: Path) -> None:
    output = Kept()
    with stopping.run(output=output):
        waiting = Outcome(lambda: Careful().work.remote(1))
        wait_until(lambda: b"working" in output.text(), "it works")
        (row,) = containers_of("Careful")
        os.kill(inits(shared_home)[row["container_id"]], signal.SIGTERM)
        wait_until(lambda: b"left careful" in output.text(), "the exit hooks ran")
        assert waiting.result() is None


# ---- by value ---------------------------------------------------------------------------------------------------

BY_VALUE = """
import squall
app = squall.App("value")

@app.cls()
class Model:
    factor: int = squall.parameter(default=2)

    @squall.enter()
    def load(self):
        self.offset = 1

    @squall.method()
    def apply(self, x):
        return self.factor * x + self.offset + self.double(x) + self.double.remote(x)

    @squall.method()
    def double(self, x):
        return 2 * x + len(Model(factor=9).tag.remote())

    @squall.method()
    def tag(self):
        return "t" * self.factor

with app.run():
    print(Model(factor=3).apply.remote(10))
"""


def test_class_of_a_program_without_a_file_is_sent_by_value(shared_home: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(BY_VALUE)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.stdout, done.stderr) == ("89\n", "")
