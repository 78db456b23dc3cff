"""Plain processes instead of containers: the same calls, and a warning of what protection is missing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from squall.exception import ContainerLostError, FunctionTimeoutError, StartupError
from tests.conftest import wait_until
from tests.integration import broken, faulty, workload
from tests.integration.conftest import own_home
from tests.integration.support import Kept, containers_of, rows


@pytest.fixture(scope="module")
def output() -> Kept:
    return Kept()


@pytest.fixture(scope="module", autouse=True)
def apps(output: Kept) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SQUALL_RUNTIME", "process")
        with own_home(), workload.app.run(output=output), faulty.app.run(output=Kept()):
            yield


def test_calls_maps_and_generators_work(output: Kept) -> None:
    assert workload.square.remote(7) == 49
    assert list(workload.square.map(range(50))) == [n * n for n in range(50)]
    assert list(workload.count_to.remote_gen(5)) == [0, 1, 2, 3, 4]
    assert workload.square.spawn(9).get(timeout=20) == 81


def test_it_says_what_is_missing(output: Kept) -> None:
    workload.square.remote(1)
    assert [row["runtime"] for row in rows("nodes")] == ["process"]
    wait_until(lambda: output.reasons("warning"), "the app's followers were warned")
    said = " ".join(output.reasons("warning"))
    assert "they can read and write all that this user can" in said
    assert "the network is not restricted" in said


def test_an_exception_comes_back_as_itself() -> None:
    with pytest.raises(ValueError, match="as itself"):
        workload.fail.remote("as itself")


def test_output_comes_to_the_caller(output: Kept) -> None:
    workload.say.remote("plain", 3)
    wait_until(lambda: output.text("say").count(b"plain") == 6, "all lines came")


@pytest.mark.parametrize(("how", "said"), [("exit", "exited with code 3"), ("segfault", "SIGSEGV")])
def test_a_process_that_ends_is_told_of(how: str, said: str) -> None:
    with pytest.raises(ContainerLostError, match=said):
        faulty.die.remote(how)


def test_a_busy_loop_is_ended_at_its_timeout() -> None:
    with pytest.raises(FunctionTimeoutError):
        faulty.spin.remote()
    wait_until(lambda: not containers_of("spin"), "its process is gone")


def test_a_module_that_fails_to_import_says_why() -> None:
    with broken.app.run(output=Kept()), pytest.raises(StartupError, match="ValueError: not today"):
        broken.raises.remote()
