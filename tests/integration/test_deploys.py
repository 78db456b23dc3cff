"""Deployed apps: versions that take over, versions that do not, looking up, going back, and what a restart leaves."""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import squall
from squall.client import Client
from squall.exception import ConflictError, InvalidError, NotFoundError, ResourceExhaustedError, StartupError
from squall.protocol.messages import StartExec
from squall.protocol.requests import CreateEnvironment, ListVersions, RedeployApp
from tests.conftest import wait_until
from tests.integration.conftest import own_home, swap_client
from tests.integration.support import Outcome, containers_of, pid_of, rows

pytestmark = pytest.mark.root


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[Path]:
    with own_home() as home:
        Client.current()
        yield home


Make = Callable[..., squall.App]


def app_of(name: str, version: int, extra: str = "", **options: Any) -> squall.App:
    """An app whose functions say which version they are of."""
    app = squall.App(name)

    @app.function(serialized=True, name="which", **options)
    def which(x: int = 0) -> int:
        return version

    @app.function(serialized=True, name="slow", **options)
    def slow(go: str) -> int:
        import os
        import time

        while not os.path.exists(go):
            time.sleep(0.01)
        return version

    @app.function(serialized=True, name="through", **options)
    def through() -> tuple[int, int]:
        return version, which.remote()

    @app.function(serialized=True, name="count", **options)
    def count(n: int) -> Iterator[int]:
        yield from range(n)

    if extra:

        @app.function(serialized=True, name=extra, **options)
        def more() -> str:
            return extra

    return app


def of(name: str, function: str = "which", **more: Any) -> squall.Function[..., Any]:
    return squall.Function.from_name(name, function, **more)


def history(name: str) -> list[dict[str, Any]]:
    reply, _ = Client.current().link.request(ListVersions(name)).wait(20)
    found: list[dict[str, Any]] = reply.data["rows"]
    return found


def redeploy(name: str, kind: str, version: int = 0) -> dict[str, Any]:
    reply, _ = Client.current().link.request(RedeployApp(name, kind, version)).wait(60)
    return dict(reply.data)


def test_a_deployed_function_is_called_by_name() -> None:
    deployment = app_of("called", 1).deploy(tag="first")
    assert deployment.version == 1 and deployment.added == ("count", "slow", "through", "which")
    assert of("called").remote() == 1
    assert list(of("called").map(range(3))) == [1, 1, 1]
    assert of("called", "through").remote() == (1, 1)
    assert list(of("called", "count").remote_gen(3)) == [0, 1, 2]
    assert of("called").spawn().get(timeout=30) == 1


def test_deploying_again_makes_a_new_version_that_says_what_changed() -> None:
    first = app_of("again", 1).deploy()
    handle = of("again")
    assert handle.remote() == 1
    second = app_of("again", 2, "extra", memory=256).deploy()
    assert (second.app_id, second.version) == (first.app_id, 2)
    assert second.added == ("extra",) and "memory_mib" in second.changed["which"]
    assert handle.remote() == 2, "a handle means the function, not its version"


def test_a_function_that_cannot_start_leaves_the_version_before_serving() -> None:
    app_of("kept", 1).deploy()
    broken = app_of("kept", 2)

    @broken.cls(serialized=True, name="Broken")
    class Broken:
        @squall.enter()
        def enter(self) -> None:
            raise RuntimeError("no such weights")

        @squall.method()
        def run(self) -> None: ...

    with pytest.raises(
        StartupError, match=r"cannot deploy `kept`: `Broken`.*no such weights.*version 1 goes on"
    ) as caught:
        broken.deploy()
    cause = caught.value.__cause__
    assert isinstance(cause, RuntimeError) and str(cause) == "no such weights"
    assert traceback.extract_tb(cause.__traceback__)[-1].name == "enter"
    assert "the exception above" in caught.value.hint
    assert of("kept").remote() == 1
    assert [row["version"] for row in history("kept")] == [1]
    assert app_of("kept", 3).deploy().version == 2


def test_an_app_whose_first_deploy_fails_does_not_exist() -> None:
    app = squall.App("stillborn")

    @app.function(serialized=True, name="f", memory=1 << 29)
    def f() -> None: ...

    with pytest.raises(ResourceExhaustedError, match="nothing was deployed"):
        app.deploy()
    with pytest.raises(NotFoundError, match="no deployed app `stillborn`"):
        of("stillborn", "f").remote()


def test_no_call_fails_while_versions_follow_each_other_under_load() -> None:
    app_of("busy", 0).deploy()
    wrong: list[BaseException] = []
    seen: list[int] = []
    over = threading.Event()

    def call() -> None:
        handle = of("busy")
        while not over.is_set():
            try:
                seen.append(handle.remote())
                seen.extend(handle.map(range(20)))
            except BaseException as error:
                wrong.append(error)

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for version in range(1, 6):
        app_of("busy", version).deploy(strategy="recreate" if version == 3 else "rolling")
    over.set()
    for caller in callers:
        caller.join(60)
    assert wrong == [] and of("busy").remote() == 5
    assert set(seen) >= {5} or len(set(seen)) > 3


def test_what_runs_ends_where_it_runs_and_what_waits_goes_to_the_new_version() -> None:
    app_of("moved", 1, max_containers=1, image=squall.Image.host()).deploy()
    handle = of("moved", "slow")
    gate = "/tmp/go"
    running = Outcome(lambda: handle.remote(gate))
    wait_until(lambda: any(row["running"] for row in containers_of("slow")), "it runs")
    old = {row["container_id"] for row in containers_of("slow") if row["running"]}
    waiting = Outcome(lambda: handle.remote("/etc"))
    wait_until(lambda: handle.get_current_stats().backlog == 1, "the other waits")
    app_of("moved", 2, max_containers=1).deploy()
    assert waiting.result() == 2
    [container_id] = old
    Client.current().link.request(StartExec(container_id, ["/bin/sh", "-c", f"echo > {gate}"])).wait(20)
    assert running.result() == 1
    wait_until(lambda: not old & {row["container_id"] for row in rows("containers")}, "the old container has ended")


def test_recreate_ends_what_does_not_end_by_itself_and_runs_it_again() -> None:
    app_of("hasty", 1).deploy()
    call = Outcome(lambda: of("hasty", "slow").remote("/nowhere"))
    wait_until(lambda: any(row["running"] for row in containers_of("slow")), "it runs")
    app_of("hasty", 2).deploy(strategy="recreate")
    wait_until(
        lambda: any(row["running"] and row["version"] == 2 for row in containers_of("slow")), "it runs in version 2"
    )
    squall.App.lookup("hasty").stop()
    assert "cancelled" in str(call.error())


def test_a_version_can_be_called_by_its_number_and_its_functions_call_each_other() -> None:
    app_of("pinned", 1).deploy()
    app_of("pinned", 2).deploy()
    assert of("pinned", "through").remote() == (2, 2)
    assert of("pinned", "through", version=1).remote() == (1, 1)
    assert of("pinned", version=2).remote() == 2
    with pytest.raises(NotFoundError, match="no version 7"):
        of("pinned", version=7).remote()


def test_rollback_is_a_new_version_with_the_old_definition() -> None:
    app_of("back", 1).deploy(tag="good")
    app_of("back", 2).deploy(tag="bad")
    done = redeploy("back", "rollback")
    assert done["version"] == 3 and of("back").remote() == 1
    newest = history("back")[0]
    assert (newest["kind"], newest["from_version"], newest["tag"], newest["current"]) == ("rollback", 1, "good", True)
    assert redeploy("back", "rollback", 2)["version"] == 4 and of("back").remote() == 2
    with pytest.raises(NotFoundError, match="cannot go back to version 9"):
        redeploy("back", "rollback", 9)


def test_rollover_replaces_the_containers_and_nothing_else() -> None:
    app_of("over", 1).deploy()
    of("over").remote()
    before = {row["container_id"] for row in rows("containers", "over")}
    assert redeploy("over", "rollover")["changes"]["changed"] == {}
    assert of("over").remote() == 1
    wait_until(lambda: not before & {row["container_id"] for row in rows("containers", "over")}, "the old ones ended")


def test_a_stopped_app_says_so_and_can_be_deployed_again() -> None:
    app = app_of("ended", 1)
    app.deploy()
    handle = of("ended")
    assert handle.remote() == 1
    squall.App.lookup("ended").stop()
    assert rows("containers", "ended") == []
    with pytest.raises(NotFoundError, match="`ended`, whose function `which` is called, was stopped"):
        handle.remote()
    with pytest.raises(NotFoundError, match="has stopped"):
        of("ended").remote()
    assert app_of("ended", 2).deploy().version == 2
    assert handle.remote() == 2, "its name and ids are the same"


def test_a_removed_function_is_told_from_one_that_never_was() -> None:
    app_of("less", 1, "extra").deploy()
    handle = of("less", "extra")
    assert handle.remote() == "extra"
    assert app_of("less", 2).deploy().removed == ("extra",)
    with pytest.raises(NotFoundError, match="version 2 of app `less` has no function `extra`"):
        handle.remote()
    with pytest.raises(NotFoundError, match="has no function `extra`"):
        of("less", "extra").remote()


def test_variants_follow_their_function_to_the_next_version() -> None:
    app_of("varied", 1).deploy()
    large = of("varied").with_options(cpu=0.5)
    assert large.remote() == 1
    app_of("varied", 2).deploy()
    assert large.remote() == 2 and large.with_concurrency(max_inputs=2).remote() == 2


def test_classes_are_looked_up_with_their_parameters() -> None:
    app = squall.App("classes")

    @app.cls(serialized=True, name="Model")
    class Model:
        size: int = squall.parameter(default=2)

        @squall.method()
        def times(self, x: int) -> int:
            return self.size * x

        @squall.method()
        def count(self, n: int) -> Iterator[int]:
            yield from range(n)

    app.deploy()
    found = squall.Cls.from_name("classes", "Model")
    assert found().times.remote(4) == 8 and found(size=5).times.remote(4) == 20
    assert list(found().count.remote_gen(2)) == [0, 1]
    assert found.methods == ("times", "count")
    with pytest.raises(InvalidError, match=r"`Model\(size"):
        found(size="large")
    with pytest.raises(InvalidError, match="is a class"):
        of("classes", "Model").remote()
    with pytest.raises(InvalidError, match="is a method"):
        of("classes", "Model.times")
    found(size=5).update_autoscaler(min_containers=1)
    assert found(size=5).autoscaler.settings()["min_containers"] == 1


def test_handles_by_name_work_in_containers_and_as_arguments() -> None:
    app_of("inner", 7).deploy()
    app = squall.App("outer")

    @app.function(serialized=True, name="call")
    def call(handle: Any) -> tuple[int, int]:
        import squall

        return handle.remote(), squall.Function.from_name("inner", "which").remote()

    app.deploy()
    assert of("outer", "call").remote(of("inner")) == (7, 7)
    with app.run(output=None):
        assert call.remote(of("inner")) == (7, 7)


def test_the_autoscaler_is_told_otherwise_until_the_next_deploy() -> None:
    app_of("scaled", 1).deploy()
    function = of("scaled")
    assert function.autoscaler.update(min_containers=2, scaledown_window=120)["min_containers"] == 2
    wait_until(lambda: len([row for row in rows("containers", "scaled") if row["function"] == "which"]) == 2, "two")
    assert function.update_autoscaler(min_containers=None)["min_containers"] == 0
    assert function.autoscaler.settings()["scaledown_window"] == 120
    with pytest.raises(InvalidError, match="no setting `cpu`"):
        function.autoscaler.update(cpu=1)
    with pytest.raises(InvalidError, match="min_containers"):
        function.autoscaler.update(min_containers=3, max_containers=2)
    app_of("scaled", 2).deploy()
    assert function.autoscaler.settings()["scaledown_window"] == 60


def test_deploys_of_one_app_take_turns() -> None:
    deploys = [Outcome(app_of("turns", version).deploy) for version in range(4)]
    assert sorted(one.result().version for one in deploys) == [1, 2, 3, 4]


def test_two_environments_have_an_app_of_the_same_name() -> None:
    app_of("twice", 1).deploy()
    with pytest.raises(NotFoundError, match="no environment `stage`"):
        app_of("twice", 2).deploy(environment_name="stage")
    Client.current().link.request(CreateEnvironment("stage")).wait(20)
    with pytest.raises(NotFoundError, match="no deployed app `twice` in environment `stage`"):
        of("twice", environment_name="stage").remote()
    app_of("twice", 2).deploy(environment_name="stage")
    assert (of("twice").remote(), of("twice", environment_name="stage").remote()) == (1, 2)


def test_an_app_can_be_made_by_looking_it_up() -> None:
    with pytest.raises(NotFoundError):
        squall.App.lookup("empty")
    app = squall.App.lookup("empty", create_if_missing=True)
    app.set_tags({"team": "blue"})
    again = squall.App.lookup("empty")
    assert again.app_id == app.app_id and again.get_tags() == {"team": "blue"}
    assert again.info().state == "running"
    assert app_of("empty", 3).deploy().version == 1


def test_an_app_is_put_together_from_several() -> None:
    app = squall.App("whole", tags={"a": "1"}).include(app_of("part", 4))
    app.deploy()
    assert of("whole", "through").remote() == (4, 4)
    other = squall.App("other")

    @other.function(serialized=True, name="which")
    def unlike() -> None: ...

    with pytest.raises(InvalidError, match="both apps have a function"):
        app.include(other)


def test_stats_count_what_ended_and_how_long_it_took() -> None:
    app_of("counted", 1).deploy()
    list(of("counted").map(range(10)))
    with pytest.raises(TypeError):
        of("counted").remote(1, 2, 3)
    found = squall.App.lookup("counted").stats()["which"]
    assert found["counts"] == {"error": 1, "ok": 10}
    assert 0 < found["latency_ms"]["p50"] <= found["latency_ms"]["max"]


def test_too_many_waiting_deploys_are_refused() -> None:
    from squall.server.deploys import WAITING_LIMIT

    deploys = [Outcome(lambda: app_of("crowd", 1).deploy()) for _ in range(WAITING_LIMIT + 6)]
    ended = []
    for one in deploys:
        try:
            ended.append(one.result(120).version)
        except ConflictError as error:
            ended.append(str(error))
    assert len([one for one in ended if isinstance(one, int)]) >= WAITING_LIMIT + 1
    assert any("wait already" in str(one) for one in ended)


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_deployed_apps_are_there_after_a_restart(how: str) -> None:
    with own_home() as home:
        app_of("lasting", 1).deploy()
        app_of("lasting", 2, min_containers=1).deploy()
        squall.App.lookup("lasting").set_tags({"team": "blue"})
        of("lasting").autoscaler.update(max_containers=3)
        large = of("lasting").with_options(cpu=0.5)
        assert large.remote() == 2
        handle = of("lasting")
        assert handle.remote() == 2
        squall_ids = handle.object_id, large.object_id
        server = pid_of(home, "server")
        os.kill(server, signal.SIGKILL if how == "killed" else signal.SIGTERM)
        has_ended = {
            "killed": lambda: pid_of(home, "server") != server,  # its node stays for the next one
            "stopped": lambda: pid_of(home, "server") != server and not pid_of(home, "node"),
        }
        wait_until(has_ended[how], "it has ended")
        gone = swap_client(None)
        assert gone is not None
        gone.close()
        assert handle.remote() == 2 and large.remote() == 2
        assert (of("lasting").object_id, large.object_id) == squall_ids
        assert of("lasting", version=1).remote() == 1
        assert squall.App.lookup("lasting").get_tags() == {"team": "blue"}
        assert of("lasting").autoscaler.settings()["max_containers"] == 3
        wait_until(lambda: rows("containers", "lasting"), "`min_containers` are kept")
        assert [row["version"] for row in history("lasting")] == [2, 1]
        assert redeploy("lasting", "rollback")["version"] == 3 and handle.remote() == 1
