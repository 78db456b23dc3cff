"""The `squall` command as a user meets it: real processes, a real server, real containers."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SQUALL = [sys.executable, "-m", "squall.cli"]
SECONDS = 60.0

SCRIPT = """
import os, sys, threading, time
import squall
app = squall.App("many")

class MyError(Exception): ...

@app.function()
def square(x: int): return x * x

@app.function()
def ticks(n: int = 1000):
    for i in range(n):
        print(f"tick {i}", flush=True)
        time.sleep(0.05)

@app.function()
def bar(n: int = 3):
    for i in range(n):
        print(f"\\r{i}/{n}", end="", file=sys.stderr, flush=True)
    print("\\rdone", file=sys.stderr)

@app.function()
def count(n: int):
    yield from range(n)

@app.function(timeout=1)
def late(): time.sleep(30)

@app.function()
def fail(how: str):
    if how == "own": raise MyError("mine")
    if how == "deep": helper()
    if how == "exit": os._exit(7)
    if how == "segfault": os.kill(os.getpid(), 11)
    if how == "result": return threading.Lock()

def helper(): return 1 / 0

@app.local_entrypoint()
def spawned(n: int = 1000):
    print(ticks.spawn(n).object_id)

@app.local_entrypoint()
def mapped(n: int = 20):
    print(sum(square.map(range(n))))

@app.local_entrypoint()
def words(*args):
    return " ".join(args)
"""


@pytest.fixture(scope="module")
def script(shared_home: Path) -> Path:
    path = shared_home / "many.py"
    path.write_text(SCRIPT)
    return path


def squall(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    command = [*SQUALL, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False, **options)


def listed(*words: str) -> Any:
    run = squall(*words, "--json")
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def started(*words: object) -> subprocess.Popen[str]:
    """Start one command and wait for the first line on its stdout."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([*SQUALL, *map(str, words)], stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.readline(), process.communicate()
    return process


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=SECONDS)
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("words", "printed"),
    [
        (["examples/hello.py", "--n", "100"], "328350\n"),
        (["examples/hello.py::square", "--x", "7"], "49\n"),
        (["examples/generator.py", "--limit", "20"], "2 3 5 7 11 13 17 19 \n"),
    ],
)
def test_example_prints_its_result_and_nothing_else(shared_home: Path, words: list[str], printed: str) -> None:
    run = squall("run", *words, cwd=ROOT)
    assert (run.returncode, run.stdout) == (0, printed), run.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["examples/montecarlo.py", "--batches", "5", "--points", "2000"], "5 batches: pi is about 3."),
        (["examples/async_calls.py", "--seconds", "0.2"], "four calls waited "),
    ],
)
def test_example_says_what_it_promises(shared_home: Path, words: list[str], said: str) -> None:
    run = squall("run", *words, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert said in run.stdout


@pytest.mark.parametrize("page", ["README.md", "docs/guide/first-steps.md"])
def test_program_of_the_page_runs_as_the_page_says(shared_home: Path, tmp_path: Path, page: str) -> None:
    program = (ROOT / page).read_text().split("```python\n")[1].split("```")[0]
    (tmp_path / "hello.py").write_text(program)
    run = squall("run", "hello.py", "--n", "100", cwd=tmp_path)
    assert (run.returncode, run.stdout) == (0, "328350\n"), run.stderr


def test_entrypoint_with_raw_arguments_gets_all_words_and_its_result_is_written(script: Path, tmp_path: Path) -> None:
    run = squall("run", "-w", tmp_path / "out", f"{script}::words", "-x", "--y", "z")
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "out").read_text() == "-x --y z"


def test_what_a_generator_yields_is_printed(script: Path) -> None:
    assert squall("run", f"{script}::count", "--n", "3").stdout == "0\n1\n2\n"


def test_module_is_run_by_its_name(script: Path) -> None:
    run = squall("run", "-m", "many::square", "--x", "3", cwd=script.parent)
    assert (run.returncode, run.stdout) == (0, "9\n"), run.stderr


def test_progress_bar_reaches_a_pipe_byte_for_byte(script: Path) -> None:
    run = subprocess.run([*SQUALL, "run", "-q", f"{script}::bar"], capture_output=True, timeout=SECONDS, check=True)
    assert (run.stdout, run.stderr) == (b"", b"\r0/3\r1/3\r2/3\rdone\n")


def test_exception_of_a_function_shows_the_users_lines_and_none_of_ours(script: Path) -> None:
    run = squall("run", f"{script}::fail", "--how", "deep")
    assert run.returncode == 1
    assert "in helper" in run.stderr
    assert "ZeroDivisionError: division by zero" in run.stderr
    assert "squall/" not in run.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fail", "--how", "own"], "many.MyError: mine"),
        (["fail", "--how", "exit"], "error: `fail` lost its container"),
        (["fail", "--how", "segfault"], "SIGSEGV"),
        (["fail", "--how", "result"], "error: cannot pickle"),
        (["late"], "error: `late` took longer than its timeout"),
    ],
)
def test_failure_in_a_container_is_one_clear_error(script: Path, words: list[str], said: str) -> None:
    run = squall("run", f"{script}::{words[0]}", *words[1:])
    assert run.returncode == 1
    assert said in run.stderr
    assert f"{ROOT / 'squall'}/" not in run.stderr
    assert run.stdout == ""


def test_interrupt_stops_the_app_cleanly_and_exits_with_130(script: Path) -> None:
    process = started("run", "-n", "once", f"{script}::ticks")
    process.send_signal(signal.SIGINT)
    code, _, err = ended(process)
    assert (code, "stopping app `once`" in err) == (130, True)
    assert [row["state"] for row in listed("app", "list", "--all") if row["name"] == "once"] == ["stopped"]


def test_second_interrupt_leaves_at_once_and_the_server_stops_the_app(script: Path) -> None:
    process = started("run", "-n", "twice", f"{script}::ticks")
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    while "stopping" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    assert ended(process)[0] == 130
    deadline = time.monotonic() + SECONDS
    while any(row["name"] == "twice" for row in listed("app", "list")):
        assert time.monotonic() < deadline, "the app is still running"


def on_a_terminal(*words: object) -> tuple[int, str]:
    """Exit code and everything that one command writes to a terminal of its own."""
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "90", "LINES": "24"}
    with subprocess.Popen([*SQUALL, *map(str, words)], stdin=theirs, stdout=theirs, stderr=theirs, env=env) as process:
        os.close(theirs)
        written = bytearray()
        with contextlib.suppress(OSError):  # EIO: the last process that had the terminal open has ended
            while piece := os.read(ours, 65536):
                written += piece
        os.close(ours)
    return process.returncode, written.decode()


def test_long_call_on_a_terminal_has_a_live_view_that_leaves_only_the_output(script: Path) -> None:
    code, written = on_a_terminal("run", f"{script}::ticks", "--n", "40")
    assert code == 0
    assert "ticks  0 queued  1 running  0 done  1 container" in written
    assert written.count("tick 39") == 1
    assert written.rstrip().endswith("\x1b[2K")


def test_short_call_on_a_terminal_writes_only_its_output(script: Path) -> None:
    squall("run", f"{script}::square", "--x", "1")
    assert on_a_terminal("run", f"{script}::square", "--x", "3") == (0, "9\r\n")


def test_reader_that_goes_away_ends_no_run_badly(script: Path) -> None:
    line = f"{' '.join(SQUALL)} run {script}::ticks --n 3 | head -n 1"
    run = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=SECONDS, check=True)
    assert (run.stdout, "Traceback" in run.stderr) == ("tick 0\n", False)


def test_detached_app_runs_on_until_it_is_stopped(script: Path) -> None:
    run = squall("run", "-d", "-n", "left", f"{script}::spawned")
    assert run.returncode == 0, run.stderr
    assert "app `left` is left running" in run.stderr
    follower = started("app", "logs", "-f", "left")
    assert [row["detached"] for row in listed("app", "list") if row["name"] == "left"] == [True]
    assert squall("app", "stop", "lef").returncode == 1
    assert squall("app", "stop", "left").returncode == 0
    assert ended(follower)[0] == 0
    assert squall("app", "logs", "left", "-n", "2").stdout.count("tick") == 2
    assert squall("app", "logs", "left", "--search", "tick 1", "--since", "1h", "-n", "1").stdout != ""
    assert squall("app", "logs", "left", "--until", "1d").stdout == ""
    assert squall("app", "logs", "left", "--source", "stderr").stdout == ""
    found = [json.loads(line) for line in squall("app", "logs", "left", "--json", "-n", "3").stdout.splitlines()]
    assert [(row["function"], row["stream"]) for row in found] == [("ticks", "stdout")] * 3


def test_call_is_listed_and_its_output_and_result_are_had_by_its_id(script: Path) -> None:
    squall("run", f"{script}::ticks", "--n", "2")
    call = next(row for row in reversed(listed("call", "list")) if row["function"] == "ticks")
    assert squall("call", "logs", call["call_id"]).stdout == "tick 0\ntick 1\n"
    missing = squall("call", "get", "fc-0000", "--timeout", "0")
    assert (missing.returncode, "no spawned call `fc-0000`" in missing.stderr) == (1, True)
    wrong = squall("call", "logs", "fc-0000")
    assert (wrong.returncode, "error: no call `fc-0000`" in wrong.stderr) == (1, True)


def test_schedules_are_told_to_be_those_of_deployed_apps(script: Path) -> None:
    run = squall("schedule", "list")
    assert (run.returncode, run.stdout) == (0, "")
    assert "squall deploy" in run.stderr
    assert squall("schedule", "pause", "nothing").returncode == 1


@pytest.fixture
def container(script: Path) -> Iterator[str]:
    """The id of a container that is at work."""
    process = started("run", "-n", "busy", f"{script}::ticks")
    found = [row["container_id"] for row in listed("container", "list", "--app", "busy")]
    yield found[0]
    process.send_signal(signal.SIGINT)
    ended(process)


def test_command_in_a_container_has_its_streams_and_exit_code(container: str) -> None:
    run = squall("container", "exec", container, "--", "sh", "-c", "cat; echo err >&2; exit 5", input="hello")
    assert (run.returncode, run.stdout, run.stderr) == (5, "hello", "err\n")


def test_command_that_does_not_exist_in_a_container_exits_with_127(container: str) -> None:
    run = squall("container", "exec", container, "nosuchprogram", stdin=subprocess.DEVNULL)
    assert run.returncode == 127
    assert "nosuchprogram" in run.stderr


def test_container_is_found_by_the_beginning_of_its_id_and_stopped(container: str) -> None:
    assert "tick 0" in squall("container", "logs", container[:-4]).stdout
    run = squall("container", "stop", "--grace", "0", container[:-4])
    assert (run.returncode, run.stderr) == (0, f"container `{container}` is stopping\n")
    deadline = time.monotonic() + SECONDS
    while any(row["container_id"] == container for row in listed("container", "list")):
        assert time.monotonic() < deadline, "the container is still there"


def test_container_that_does_not_exist_is_one_clear_error(script: Path) -> None:
    squall("run", f"{script}::square", "--x", "1")
    run = squall("container", "exec", "co-zzzz", "ls")
    assert run.returncode == 1
    assert run.stderr.startswith("error: no container `co-zzzz`\nhint: ")


def test_spans_of_a_trace_add_up_to_the_whole_within_five_percent(script: Path) -> None:
    assert squall("run", f"{script}::mapped", "--n", "5").returncode == 0
    assert "your function" in squall("trace").stdout
    for entry in listed("trace")["inputs"]:
        parts = sum(1000 * (span["end"] - span["start"]) for span in entry["spans"])
        assert parts == pytest.approx(entry["total_ms"], rel=0.05)


def test_status_tells_of_the_server_and_its_node(script: Path) -> None:
    squall("run", f"{script}::square", "--x", "1")
    facts = listed("status")
    assert (facts["running"], facts["home"], len(facts["nodes"])) == (True, str(script.parent), 1)
    assert "running" in squall("status").stdout


def test_down_stops_a_detached_app_and_leaves_nothing(home: Path) -> None:
    run = squall("run", "-d", "examples/hello.py", "--n", "3", cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert squall("down").stderr == "the server has stopped\n"
    assert listed("status")["running"] is False
    told = squall("app", "list")
    assert told.stdout == "" and "no server is running" in told.stderr


def test_doctor_names_a_runtime_that_works(home: Path) -> None:
    run = squall("doctor", "--json")
    assert run.returncode == 0, run.stdout
    assert json.loads(run.stdout)["runtime"] in ("native", "process")


def test_names_are_completed_from_the_running_server(script: Path) -> None:
    squall("deploy", "--name", "completed", script)  # it stays, whatever runs
    env = {**os.environ, "_SQUALL_COMPLETE": "bash_complete", "COMP_WORDS": "squall app stop comp", "COMP_CWORD": "3"}
    program = "from squall.cli.main import cli; cli(prog_name='squall')"
    run = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert "completed" in run.stdout
    assert squall("app", "stop", "completed").returncode == 0
