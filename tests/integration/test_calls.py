"""A program's calls, all the way: SDK, server, agent, container and back."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import squall
from squall import _session
from squall._context import state
from squall.exception import (
    CancelledError,
    ContainerLostError,
    FunctionTimeoutError,
    NotFoundError,
    OutputTimeoutError,
    RemoteError,
    SerializationError,
)
from squall.protocol.messages import LogChunk, Notice
from tests.conftest import wait_until
from tests.integration.support import Outcome

pytestmark = pytest.mark.root

PROGRAM = """
import asyncio, os, sys, threading, time
import squall

app = squall.App("calls", env={"GREETING": "hello"})


class Point:
    def __init__(self, x):
        self.x = x


class StrangeError(Exception):
    def __init__(self, code, *, why):
        super().__init__(f"{code} because {why}")
        self.code = code


@app.function()
def square(x):
    return x * x


@app.function()
def move(point):
    return Point(point.x + 1)


@app.function()
def divide(a, b):
    return a / b


@app.function()
def strange():
    raise StrangeError(7, why="it is")


@app.function()
def unpicklable():
    return threading.Lock()


@app.function()
def count(n):
    for i in range(n):
        yield i


@app.function()
async def count_async(n):
    for i in range(n):
        await asyncio.sleep(0)
        yield i


@app.function()
async def double(x):
    await asyncio.sleep(0)
    return 2 * x


@app.function()
def sum_of_squares(n):
    return sum(square.map(range(n)))


@app.function()
def call_handle(function, x):
    return function.remote(x)


@app.function(secrets=[squall.Secret.from_dict({"TOKEN": "t0"})])
def inside():
    return {
        "env": (os.environ["GREETING"], os.environ["TOKEN"]),
        "local": squall.is_local(),
        "input": squall.current_input_id(),
        "call": squall.current_function_call_id(),
        "module": __name__,
    }


@app.function()
def length(data):
    return len(data), data[:1] * (2 << 20)


class Tagged(bytes):
    pass


@app.function()
def mirror(value):
    if isinstance(value, bytearray) and value:
        value[0] = value[0]  # what came is the container's own, and may be written
    return value, os.getpid()


@app.function(timeout=1)
def too_slow():
    time.sleep(60)


@app.function()
def leave(code):
    os._exit(code)


@app.function()
def wait_long():
    time.sleep(60)


@app.function()
def stop_python():
    sys.exit("enough")


TRIES = 0


@app.function(retries=squall.Retries(max_retries=3, initial_delay=0.0, backoff_coefficient=1.0), max_containers=1)
def fail_twice():
    global TRIES
    TRIES += 1
    if TRIES < 3:
        raise LookupError(TRIES)
    return TRIES


@app.function()
def say(word):
    print(word, flush=True)
    print(word, file=sys.stderr, flush=True)
"""


@pytest.fixture
def program(shared_home: Path, tmp_path: Path) -> Iterator[ModuleType]:
    """The program above, imported, with its app running, in a home that the tests of this module share."""
    (tmp_path / "program_of_test.py").write_text(PROGRAM)
    module, _ = _session.import_ref(str(tmp_path / "program_of_test.py"))
    try:
        with module.app.run(output=Recorder.of(module)):
            yield module
    finally:
        if state.client is not None:
            state.client.close()
            state.client = None
        sys.modules.pop("program_of_test", None)
        sys.path.remove(str(tmp_path))


class Recorder:
    """Remembers what the containers wrote."""

    def __init__(self) -> None:
        self.written: dict[str, bytes] = {"stdout": b"", "stderr": b"", "system": b""}

    @classmethod
    def of(cls, module: ModuleType) -> Recorder:
        module.recorder = cls()  # type: ignore[attr-defined]
        recorder: Recorder = module.recorder
        return recorder

    def log(self, chunk: LogChunk, data: bytes) -> None:
        self.written[chunk.stream] += data

    def notice(self, notice: Notice) -> None: ...


def test_values_come_back_through_every_verb(program: ModuleType) -> None:
    assert program.square.remote(4) == 16
    assert program.square.local(4) == 16
    assert list(program.square.map(range(500))) == [i * i for i in range(500)]
    assert sorted(program.square.map(range(50), order_outputs=False)) == [i * i for i in range(50)]
    assert list(program.divide.starmap([(4, 2), (9, 3)])) == [2.0, 3.0]
    assert program.square.for_each(range(5)) is None
    assert list(program.count.remote_gen(600)) == list(range(600))
    assert list(program.count_async.remote_gen(5)) == [0, 1, 2, 3, 4]
    assert program.double.remote(4) == 8


def test_async_face_gives_the_same(program: ModuleType) -> None:
    async def use() -> None:
        assert await program.square.remote.aio(4) == 16
        assert [x async for x in program.square.map.aio(range(100))] == [i * i for i in range(100)]
        assert [x async for x in program.count.remote_gen.aio(5)] == [0, 1, 2, 3, 4]
        call = await program.square.spawn.aio(3)
        assert await call.get.aio(timeout=30) == 9

    asyncio.run(use())


def test_instance_of_the_scripts_class_comes_back_as_that_class(program: ModuleType) -> None:
    moved = program.move.remote(program.Point(1))
    assert type(moved) is program.Point
    assert moved.x == 2


def test_exception_comes_back_with_its_type_and_the_users_lines(program: ModuleType) -> None:
    with pytest.raises(ZeroDivisionError) as error:
        program.divide.remote(1, 0)
    text = "".join(traceback.format_exception(error.type, error.value, error.value.__traceback__))
    assert f'File "{program.__file__}", line' in text
    assert "return a / b" in text
    assert "runner/" not in text


def test_exception_with_a_signature_of_its_own_keeps_its_attributes(program: ModuleType) -> None:
    with pytest.raises(program.StrangeError, match="7 because it is") as error:
        program.strange.remote()
    assert error.value.code == 7


def test_failures_of_a_map_can_be_had_as_values(program: ModuleType) -> None:
    found = list(program.divide.starmap([(1, 1), (1, 0)], return_exceptions=True))
    assert found[0] == 1.0
    assert isinstance(found[1], ZeroDivisionError)


def test_result_that_cannot_be_pickled_is_named(program: ModuleType) -> None:
    with pytest.raises(SerializationError, match=r"_thread\.lock"):
        program.unpicklable.remote()


def test_system_exit_in_a_function_is_no_exit_of_the_caller(program: ModuleType) -> None:
    with pytest.raises(RemoteError, match="raised `SystemExit`: enough"):
        program.stop_python.remote()
    assert program.square.remote(2) == 4


def test_functions_call_functions(program: ModuleType) -> None:
    assert program.sum_of_squares.remote(20) == sum(i * i for i in range(20))
    assert program.call_handle.remote(program.square, 5) == 25


def test_code_in_a_container_knows_where_it_is(program: ModuleType) -> None:
    found = program.inside.remote()
    assert found["env"] == ("hello", "t0")
    assert found["local"] is False
    assert found["module"] == "program_of_test"
    assert found["input"] == f"in-{found['call'][3:]}-0"


def test_large_values_travel_both_ways(program: ModuleType) -> None:
    data = b"z" * (5 << 20)
    assert program.length.remote(data) == (5 << 20, b"z" * (2 << 20))
    assert [n for n, _ in program.length.map([data, b"small"])] == [5 << 20, 5]


def test_values_of_any_size_and_kind_come_back_from_a_map_as_they_went(program: ModuleType) -> None:
    sizes = [0, 1, 4096, 65_535, 65_536, 65_537, 100_000, 300_000, (1 << 20) - 60, 1 << 20, (1 << 20) + 1, 3 << 20]
    values: list[Any] = [os.urandom(size) for size in sizes] * 3
    values += [bytearray(os.urandom(size)) for size in sizes]
    values += [program.Tagged(os.urandom(100_000)) for _ in range(20)]
    kept = [bytes(value) for value in values]
    back = [value for value, _ in program.mirror.map(values)]
    assert [type(value) for value in back] == [type(value) for value in values]
    assert [bytes(value) for value in back] == kept
    assert [bytes(value) for value in values] == kept
    changed = back[-21]
    changed[:] = bytes(len(changed))  # the program's own, too


def test_large_results_of_many_calls_at_once_are_not_mixed_up(program: ModuleType) -> None:
    values = [bytes([number % 256]) * 150_000 for number in range(300)]
    with ThreadPoolExecutor(4) as threads:
        found = threads.map(lambda at: list(program.mirror.map(values[at::4])), range(4))
        assert [[value for value, _ in part] for part in found] == [values[at::4] for at in range(4)]
    assert program.mirror.remote(values[7])[0] == values[7]


def test_function_that_takes_too_long_is_ended(program: ModuleType) -> None:
    with pytest.raises(FunctionTimeoutError, match=r"`too_slow`.*1 s") as caught:
        program.too_slow.remote()
    assert "raise `timeout`" in caught.value.hint


def test_function_that_ends_its_process_is_told_of_with_the_exit_code(program: ModuleType) -> None:
    with pytest.raises(ContainerLostError, match="3"):
        program.leave.remote(3)


def test_failed_input_is_tried_again_as_its_retries_say(program: ModuleType) -> None:
    assert program.fail_twice.remote() == 3


def test_spawned_calls_are_kept_and_gathered(program: ModuleType) -> None:
    calls = [program.square.spawn(i) for i in range(5)]
    assert squall.FunctionCall.gather(*calls) == [0, 1, 4, 9, 16]
    assert squall.FunctionCall.from_id(calls[3].object_id).get(timeout=30) == 9
    many = program.square.spawn_map(range(700))
    assert many.num_inputs() == 700
    assert many.get(timeout=60, index=699) == 699 * 699


def test_spawned_call_without_a_result_yet_times_out_and_can_be_cancelled(program: ModuleType) -> None:
    call = program.wait_long.spawn()
    with pytest.raises(OutputTimeoutError):
        call.get(timeout=0)
    call.cancel(terminate_containers=True)
    with pytest.raises(CancelledError):
        call.get(timeout=30)


def test_unknown_call_is_not_found(program: ModuleType) -> None:
    with pytest.raises(NotFoundError):
        squall.FunctionCall.from_id("fc-0000000000000000").get(timeout=1)


def test_output_of_containers_arrives_on_its_own_stream(program: ModuleType) -> None:
    program.say.remote("spoken")
    written = program.recorder.written
    wait_until(lambda: b"spoken\n" in written["stdout"] and b"spoken\n" in written["stderr"], "it spoke on both")


def test_calls_from_threads_run_beside_each_other(program: ModuleType) -> None:
    results: list[int] = []
    threads = [threading.Thread(target=lambda i=i: results.append(program.square.remote(i))) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(results) == [i * i for i in range(8)]


# ---- programs of their own


def run_program(text: str, tmp_path: Path, *, name: str = "script.py", as_file: bool = True) -> str:
    """The output of a program run with this home; it must end well."""
    (tmp_path / name).write_text(textwrap.dedent(text))
    command = [sys.executable, name] if as_file else [sys.executable, "-c", textwrap.dedent(text)]
    env = {**os.environ, "PYTHONPATH": str(Path(squall.__file__).parents[1])}
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


SMALL = """
import squall
app = squall.App()

class Box:
    def __init__(self, value): self.value = value

@app.function()
def open_box(box): return Box(box.value + 1)

@app.function()
def through(box): return open_box.remote(box)

if __name__ == "__main__":
    with app.run():
        box = through.remote(Box(1))
        print(box.value, isinstance(box, Box))
"""


@pytest.mark.parametrize("as_file", [True, False], ids=["script", "python -c"])
def test_program_of_one_file_or_none_runs_as_it_is(home: Path, tmp_path: Path, as_file: bool) -> None:
    assert run_program(SMALL, tmp_path, as_file=as_file) == "2 True\n"


def test_script_that_runs_its_app_while_it_is_imported_is_told_so(shared_home: Path, tmp_path: Path) -> None:
    text = """
    import squall
    app = squall.App("unguarded")

    @app.function()
    def f(): return 1

    with app.run():
        try:
            f.remote()
        except squall.exception.StartupError as error:
            print(error.__cause__)
    """
    assert "was called in a container" in run_program(text, tmp_path)


def test_failed_import_in_the_container_is_shown_as_the_cause(shared_home: Path, tmp_path: Path) -> None:
    text = """
    import os, squall
    app = squall.App("broken")

    if "SQUALL_IS_REMOTE" in os.environ:
        raise LookupError("only in the container")

    @app.function()
    def f(): return 1

    if __name__ == "__main__":
        with app.run():
            try:
                f.remote()
            except squall.exception.StartupError as error:
                print(type(error.__cause__).__name__, error.__cause__)
    """
    assert run_program(text, tmp_path) == "LookupError only in the container\n"


def test_interrupt_stops_the_app_and_its_containers(shared_home: Path, tmp_path: Path) -> None:
    text = """
    import time, squall
    app = squall.App("interrupted")

    @app.function()
    def slow():
        print("running", flush=True)
        time.sleep(600)

    if __name__ == "__main__":
        with app.run():
            slow.remote()
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(text))
    env = {**os.environ, "PYTHONPATH": str(Path(squall.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "script.py"], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in errors
    assert "squall/protocol" not in errors


def test_handles_are_hydrated_when_what_they_name_exists(program: ModuleType) -> None:
    assert program.square.hydrate() is program.square
    call = program.square.spawn(3)
    assert call.hydrate() is call
    with pytest.raises(NotFoundError):
        squall.FunctionCall.from_id("fc-0000000000000000").hydrate()


def test_threads_that_upload_the_same_bytes_at_once_all_return(shared_home: Path) -> None:
    client = squall.Client.current()
    for _ in range(10):
        data, together = os.urandom(2000), threading.Barrier(3)

        def put(data: bytes = data, together: threading.Barrier = together) -> str:
            together.wait(10)
            return client.put_blob(data)

        puts = [Outcome(put) for _ in range(3)]
        assert len({outcome.result(10) for outcome in puts}) == 1
