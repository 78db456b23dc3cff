"""What user code can do to its container, and what its caller and its neighbours see of it."""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from squall import FunctionCall
from squall.exception import (
    CancelledError,
    ContainerLostError,
    FunctionTimeoutError,
    RemoteError,
    StartupError,
)
from squall.function import Function
from tests.conftest import leftovers, wait_until
from tests.integration import broken, faulty
from tests.integration.support import (
    Clock,
    Kept,
    Outcome,
    children_of,
    containers_of,
    inits,
    kept_logs,
    rows,
    wait_ended,
)

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def output() -> Kept:
    return Kept()


@pytest.fixture(scope="module", autouse=True)
def apps(shared_home: Path, output: Kept) -> Iterator[None]:
    with faulty.app.run(output=output), broken.app.run(output=output):
        yield


@pytest.fixture
def home(shared_home: Path) -> Path:
    return shared_home


# ---- containers that end ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "said", "hint"),
    [
        ("exit", "its container exited with code 3 (2 attempts)", "ended the process"),
        ("segfault", "its container was killed by signal SIGSEGV (2 attempts)", "native code crashed"),
        ("abort", "its container was killed by signal SIGABRT (2 attempts)", "native code crashed"),
    ],
)
def test_a_function_that_ends_its_process_fails_and_says_how(how: str, said: str, hint: str) -> None:
    with pytest.raises(ContainerLostError) as caught:
        faulty.die.remote(how)
    assert caught.value.message == f"`die` lost its container: {said}"
    assert hint in caught.value.hint
    assert faulty.neighbour.remote(1) == 2


def test_a_crash_in_native_code_shows_the_lines_that_were_running(output: Kept) -> None:
    with pytest.raises(ContainerLostError):
        faulty.die.remote("segfault")
    wait_until(lambda: b" in die" in output.text("die"), "its last lines have come")
    assert b"Segmentation fault" in output.text("die")


def test_sys_exit_in_a_function_is_an_error_of_that_call_and_keeps_the_container() -> None:
    with pytest.raises(RemoteError, match="`SystemExit`: 5"):
        faulty.die.remote("sys.exit")
    assert [row["state"] for row in containers_of("die")] == ["ready"]


def test_a_container_out_of_memory_dies_alone_and_says_its_limit() -> None:
    ours = Outcome(lambda: list(faulty.slowly.map(range(20))))
    with pytest.raises(ContainerLostError, match="ran out of memory: the limit is 96 MiB") as caught:
        faulty.hoard.remote(300)
    assert caught.value.hint == "raise the limit: `memory=(64, 192)`"
    assert ours.result() == [x * x for x in range(20)]
    assert faulty.hoard.remote(10) == 10


def test_a_fork_bomb_leaves_room_for_its_neighbours(output: Kept) -> None:
    bomb = faulty.bomb.spawn()
    wait_until(lambda: b"lit" in output.text("bomb"), "the bomb was lit")
    times = []
    for _ in range(3):
        clock = Clock()
        assert faulty.fresh.remote(1) == 2
        times.append(clock())
    bomb.cancel(terminate_containers=True)
    with pytest.raises(CancelledError):
        bomb.get(timeout=20)
    wait_ended("bomb")
    assert min(times) < 1.0, times


def test_a_poisonous_input_fails_alone_among_a_hundred() -> None:
    results: list[Any] = list(faulty.poisonous.map(range(101), return_exceptions=True))
    assert [x for x in results if isinstance(x, int)] == [x for x in range(101) if x != 50]
    assert isinstance(results[50], ContainerLostError)
    assert "exited with code 9" in results[50].message


def test_a_generator_that_yielded_is_not_run_again_when_its_container_dies(output: Kept) -> None:
    values = faulty.yields_then_dies.remote_gen(5)
    assert [next(values) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ContainerLostError, match="exited with code 6"):
        next(values)
    wait_ended("yields_then_dies")
    assert output.text("yields_then_dies") == b"attempt\n"


@pytest.mark.parametrize("runner", [True, False], ids=["runner", "init"])
def test_an_input_whose_container_was_killed_is_run_again_in_another(home: Path, runner: bool) -> None:
    call = Outcome(lambda: faulty.slowly.remote(7, 1.0))
    wait_until(lambda: any(row["running"] for row in containers_of("slowly")), "the input runs")
    before = {row["container_id"] for row in containers_of("slowly") if row["running"]}
    kill_container(home, "slowly", runner=runner)
    assert call.result() == 49
    assert not before & {row["container_id"] for row in containers_of("slowly")}


def kill_container(home: Path, function: str, *, runner: bool) -> None:
    [row] = [row for row in containers_of(function) if row["running"]]
    init = inits(home)[row["container_id"]]
    os.kill(children_of(init)[0] if runner else init, signal.SIGKILL)


def test_threads_that_go_on_keep_no_call_from_ending() -> None:
    assert faulty.leave_threads.remote() >= 6


# ---- time ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [faulty.spin, faulty.hold_the_interpreter], ids=["python", "in C"])
def test_a_busy_loop_is_ended_at_its_timeout(function: Function[[], None]) -> None:
    clock = Clock()
    with pytest.raises(FunctionTimeoutError, match="longer than the function's timeout of 1 s"):
        function.remote()
    assert 1.0 <= clock() < 4.0
    wait_ended(function._tag)


def test_retries_wait_longer_each_time_and_are_counted(output: Kept) -> None:
    with pytest.raises(ValueError, match="again"):
        faulty.fail_and_tell.remote()
    wait_until(lambda: output.text("fail_and_tell").count(b"\n") == 4, "four attempts were told")
    at = [float(line) for line in output.text("fail_and_tell").split()]
    waits = [later - earlier for earlier, later in itertools.pairwise(at)]
    assert all(wait >= least for wait, least in zip(waits, (0.19, 0.39, 0.79), strict=True)), waits


def test_a_crash_uses_the_users_retries_up(output: Kept) -> None:
    with pytest.raises(ContainerLostError, match=r"exited with code 4 \(3 attempts\)"):
        faulty.exit_and_tell.remote()
    wait_until(lambda: output.text("exit_and_tell") == b"attempt\n" * 3, "three attempts were told")


def test_a_container_that_ignores_sigterm_is_killed_with_its_app(home: Path) -> None:
    kept = Kept()
    with faulty.stubborn.run(output=kept):
        call = Outcome(faulty.deaf.remote)
        wait_until(lambda: kept.text("deaf"), "the container is deaf")
        clock = Clock()
    assert clock() < 5.0
    assert isinstance(call.error(), CancelledError)


# ---- output -------------------------------------------------------------------------------------------------------


def test_a_flood_of_output_arrives_or_is_counted(output: Kept) -> None:
    size = 50 << 20
    assert faulty.flood.remote(size) == size
    wait_until(lambda: told(output, "flood") >= size, lambda: f"{size} bytes are told, {told(output, 'flood')} were")
    assert told(output, "flood") == size


def told(output: Kept, function: str) -> int:
    """Bytes of a function's output that came, and that were said not to."""
    came = len(output.text(function, "stdout"))
    notes = output.text(function, "system").decode().splitlines()
    return came + sum(int(note.split()[0].lstrip("[")) for note in notes)


def test_a_line_of_100_mb_passes(output: Kept) -> None:
    before = told(output, "flood")
    size = 100 << 20
    assert faulty.flood.remote(size, size) == size
    wait_until(lambda: told(output, "flood") >= before + size, "the line is told of")
    assert told(output, "flood") == before + size


@pytest.mark.parametrize(
    "data", [b"\x00nul\x00\n", b"\xff\xfe\xc3(\n", b"\x1b[31mred\x1b[0m\x1b]0;title\x07\n", b"50%\r100%\r\n"]
)
def test_strange_bytes_arrive_as_they_were_written(output: Kept, data: bytes) -> None:
    faulty.write.remote(data)
    wait_until(lambda: output.text("write").endswith(data), "the bytes have come")
    assert data in kept_logs("faulty")


# ---- containers that do not start ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (broken.raises, "ValueError: not today"),
        (broken.misses, "ModuleNotFoundError: No module named 'no_such_module'"),
        (broken.leaves, "the module ended the process while it was imported: sys.exit(7)"),
    ],
    ids=["raises", "misses", "leaves"],
)
def test_a_module_that_fails_to_import_fails_its_calls_at_once(function: Function[[], int], said: str) -> None:
    clock = Clock()
    with pytest.raises(StartupError) as caught:
        function.remote()
    assert clock() < 5.0
    tag = function._tag
    assert caught.value.message == f"`{tag}` could not start: its container could not load `{tag}`: {said}"
    cause = caught.value.__cause__
    assert cause is not None
    shown = traceback.format_exception(cause)
    assert "break_down(os.environ.get" in shown[1]
    assert not any("importlib" in line for line in shown)


def test_a_hint_of_squall_is_told_once() -> None:
    with pytest.raises(StartupError) as caught:
        broken.moved.remote()
    assert str(caught.value).count("hint:") == 1
    assert "hint" not in caught.value.message


def test_a_module_that_ends_its_process_is_tried_three_times_and_backed_off(output: Kept) -> None:
    clock = Clock()
    with pytest.raises(StartupError, match=r"its container exited with code 7 \(3 attempts\)"):
        broken.vanishes.remote()
    assert clock() < 5.0
    wait_until(lambda: len(backoffs(output, "vanishes")) >= 3, "three delays were told of")
    delays = [reason.rpartition("next start in ")[2] for reason in backoffs(output, "vanishes")]
    assert delays[:3] == ["0.5 s", "1 s", "2 s"]
    assert output.text("vanishes").count(b"vanishing") == 3


def backoffs(output: Kept, function: str) -> list[str]:
    return [
        str(notice.data["reason"])
        for notice in output.notices
        if notice.kind == "backoff" and notice.data["function"] == function
    ]


def test_an_import_without_end_is_ended_at_the_startup_timeout() -> None:
    with pytest.raises(StartupError, match="longer to start than the function's startup_timeout of 1 s"):
        broken.dawdles.remote()
    wait_ended("dawdles")


def test_a_sound_function_beside_broken_ones_works() -> None:
    assert broken.works.remote() == 1


# ---- cancelling ---------------------------------------------------------------------------------------------------


def test_cancelled_while_it_runs_a_call_ends_as_cancelled_and_its_container_goes_on() -> None:
    call = faulty.cancellable.spawn(600)
    wait_until(lambda: any(row["running"] for row in containers_of("cancellable")), "it runs")
    [container] = containers_of("cancellable")
    call.cancel()
    with pytest.raises(CancelledError):
        call.get(timeout=20)
    assert faulty.cancellable.remote(0) == "done"
    assert container["container_id"] in [row["container_id"] for row in containers_of("cancellable")]


def test_an_async_function_is_cancelled_while_it_waits() -> None:
    call: FunctionCall[Any] = faulty.cancellable_async.spawn(600)
    wait_until(lambda: any(row["running"] for row in containers_of("cancellable_async")), "it runs")
    call.cancel()
    with pytest.raises(CancelledError):
        call.get(timeout=20)


def test_each_of_200_calls_cancelled_at_random_ends_as_cancelled_or_with_its_result() -> None:
    seed = 20_240_601
    chance = random.Random(seed)
    calls = [faulty.cancellable.spawn(chance.choice([0.0, 0.0, 0.01, 0.05])) for _ in range(200)]
    gone = threading.Event()
    for call in chance.sample(calls, 150):
        call.cancel()
        gone.wait(chance.random() * 0.01)
    ends: dict[str, int] = {}
    for call in calls:
        try:
            end = call.get(timeout=30)
        except CancelledError:
            end = "cancelled"
        ends[end] = ends.get(end, 0) + 1
    assert set(ends) <= {"done", "cancelled"}, f"seed {seed}: {ends}"
    assert sum(ends.values()) == 200
    assert ends.get("done", 0) >= 50
    wait_until(lambda: not any(row["running"] for row in containers_of("cancellable")), "nothing runs any more")


def test_nothing_of_the_ended_containers_is_left_while_the_server_goes_on(home: Path) -> None:
    assert [row for row in leftovers(home) if row.startswith("mount")] == []
    wait_until(lambda: len(inits(home)) == len(rows("containers")), "each init belongs to a listed container")
