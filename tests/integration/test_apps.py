"""Apps: what is made, who owns it, how it ends."""

from __future__ import annotations

from pathlib import Path

import pytest

import squall
from squall.client import Client
from squall.exception import CancelledError, InvalidError, NotFoundError, ResourceExhaustedError
from squall.protocol.messages import CreateApp, FunctionSpec, RetryPolicy, StopApp
from tests.conftest import wait_until
from tests.integration import workload
from tests.integration.support import Clock, Kept, Outcome, Wire, containers_of, inits, rows

pytestmark = pytest.mark.root


@pytest.fixture(scope="module", autouse=True)
def server(shared_home: Path) -> Path:
    Client.current()
    return shared_home


def test_an_app_is_listed_while_it_runs_and_after_it_with_the_reason_of_its_end() -> None:
    with workload.app.run(output=Kept()):
        [row] = [row for row in rows("apps") if row["name"] == "workload"]
        assert (row["state"], row["detached"]) == ("running", False)
        assert row["functions"] == len(workload.app.registered_functions)
    assert rows("apps") == []
    row = rows("apps", include_all=True)[-1]
    assert (row["state"], row["reason"]) == ("stopped", "the program is done with it")


def test_leaving_the_app_ends_its_containers_before_it_returns(shared_home: Path) -> None:
    with workload.app.run(output=Kept()):
        workload.square.remote(2)
        assert len(inits(shared_home)) == 1
    assert inits(shared_home) == {}
    assert rows("containers") == []


def test_calls_under_way_are_cancelled_when_someone_else_stops_the_app() -> None:
    kept = Kept()
    with workload.app.run(output=kept):
        call = Outcome(lambda: workload.nap.remote(600))
        wait_until(lambda: any(row["running"] for row in containers_of("nap")), "it runs")
        with Wire() as other:
            other.ask(StopApp("workload", reason="somebody said so"))
        error = call.error(10)
        assert isinstance(error, CancelledError)
        assert "somebody said so" in error.message
        wait_until(lambda: kept.reasons("stopped") == ["somebody said so"], "its follower was told")
        with pytest.raises(NotFoundError, match=r"has ended with its app `workload` \(somebody said so\)"):
            workload.square.remote(1)


def test_a_call_to_a_stopped_app_says_that_it_has_ended() -> None:
    with workload.app.run(output=Kept()) as app:
        handle = squall.Function.from_id(workload.square.object_id)
        assert handle.remote(3) == 9
        Client.current().link.request(StopApp(app.app_id or "", "somebody said so")).wait(60)
        for call in (workload.square.remote, handle.remote, handle.spawn):
            with pytest.raises(NotFoundError, match="has ended with its app `workload`") as caught:
                call(3)
            assert "run the app again" in caught.value.hint


def test_stopping_an_app_twice_is_harmless_and_one_that_never_was_is_an_error() -> None:
    with workload.app.run(output=Kept()), Wire() as other:
        for _ in range(2):
            answer, _ = other.ask(StopApp("workload"))
            assert answer.TAG == "reply"
    with Wire() as other:
        answer, _ = other.ask(StopApp("no-such-app"))
    assert (answer.code, answer.message) == ("not_found", "no app `no-such-app`")


def test_two_apps_of_one_name_run_beside_each_other() -> None:
    with workload.app.run(name="twin", output=Kept()), workload.scaling.run(name="twin", output=Kept()):
        assert len([row for row in rows("apps") if row["name"] == "twin"]) == 2
        assert workload.square.remote(3) == 9
        assert workload.once.remote().startswith("co-")


def test_an_interrupted_app_ends_at_once_though_its_function_goes_on() -> None:
    run = workload.app.run(output=Kept())
    run.__enter__()
    workload.nap.spawn(600)
    wait_until(lambda: any(row["running"] for row in containers_of("nap")), "it runs")
    clock = Clock()
    run.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert clock() < 5.0
    assert rows("containers") == []


def test_what_no_node_can_hold_is_refused_with_what_there_is() -> None:
    with workload.scaling.run(output=Kept()), pytest.raises(ResourceExhaustedError) as caught:
        workload.too_wide.remote()
    assert "it asks for 64 CPUs and the largest node has" in caught.value.message
    assert caught.value.hint.startswith("ask for at most `cpu=")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (FunctionSpec("f", cpu=-1.0), "cpu=-1.0"),
        (FunctionSpec("f", cpu=1e9), "cpu="),
        (FunctionSpec("f", memory_mib=0), "memory=0"),
        (FunctionSpec("f", timeout=0.0), "timeout=0.0"),
        (FunctionSpec("f", startup_timeout=1e9), "startup_timeout="),
        (FunctionSpec("f", max_containers=-1), "max_containers=-1"),
        (FunctionSpec("f", concurrency=0), "concurrency=0"),
        (FunctionSpec("f", cpu_limit=-1.0), "cpu limit -1.0"),
        (FunctionSpec("f", memory_limit_mib=-1), "memory limit -1"),
        (FunctionSpec("f", gpu=["H100:x"]), "H100:x"),
        (FunctionSpec("f", gpu=["any"] * 1000), "1000 GPUs"),
        (FunctionSpec("f", retries=RetryPolicy(3, backoff_coefficient=1e200)), "backoff_coefficient="),
        (FunctionSpec("f", retries=RetryPolicy(3, initial_delay=-1)), "delay of -1"),
        (FunctionSpec("a b"), "space"),
        (FunctionSpec("a\nb"), "function name"),
        (FunctionSpec(""), "function name"),
    ],
)
def test_the_server_checks_options_itself(spec: FunctionSpec, said: str) -> None:
    with Wire() as client:
        answer, _ = client.ask(CreateApp("checked", [spec]))
    assert answer.code == InvalidError.code
    assert said in answer.message


@pytest.mark.parametrize("name", ["", "a b", "../up", "x" * 65, "new\nline", "quo`te", "-first"])
def test_the_server_refuses_names_that_are_none(name: str) -> None:
    with Wire() as client:
        answer, _ = client.ask(CreateApp(name, []))
    assert answer.code == InvalidError.code
