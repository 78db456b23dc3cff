"""`--json` as a program meets it: real processes; standard output is parsed, all of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.test_cli import SECONDS, SQUALL, ended, listed, squall, started
from tests.conftest import wait_until

SCRIPT = """
import atexit, os, subprocess, sys, time
import squall
print("imported")
app = squall.App("lines")

@app.function()
def square(x: int):
    print("squaring", x)
    return x * x

@app.function()
def ticks(n: int = 1000):
    for i in range(n):
        print(f"tick {i}", flush=True)
        time.sleep(0.05)

@app.function()
def count(n: int):
    yield from range(n)

@app.function()
def letters(): return set("a")

@app.function()
def fail(): helper()

def helper(): return 1 / 0

@app.local_entrypoint()
def local(n: int = 4):
    atexit.register(print, "on the way out")
    print("begun", end="")
    subprocess.run(["echo", " by a child"])
    print("complaint", file=sys.stderr)
    os.write(1, b"\\xff\\n")
    return {"sum": sum(square.map(range(n)))}

@app.local_entrypoint()
def leave(code: int):
    atexit.register(print, "on the way out")
    sys.exit(code)

@app.local_entrypoint()
def spawned(how: str):
    print({"letters": letters, "fail": fail, "square": square}[how].spawn(*[3] * (how == "square")).object_id)
"""


@pytest.fixture(scope="module")
def script(shared_home: Path) -> Path:
    path = shared_home / "lines.py"
    path.write_text(SCRIPT)
    return path


def run_lines(*words: object) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and the lines of `squall run --json`; each is an object with a type."""
    run = squall("run", "--json", *words)
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert all("type" in line for line in found), run.stderr
    return run.returncode, found


def did(*words: object, code: int = 0, **options: Any) -> Any:
    """The document of one command with `--json` among its words."""
    run = squall(*words, **options)
    assert run.returncode == code, (run.stdout, run.stderr)
    return json.loads(run.stdout)


def logs(lines: list[dict[str, Any]]) -> list[tuple[Any, str, str]]:
    return [(line["function"], line["stream"], line["text"]) for line in lines if line["type"] == "log"]


def test_run_gives_output_of_all_as_lines_and_the_result_last(script: Path) -> None:
    code, lines = run_lines("-q", f"{script}::local", "--n", 3)
    assert (code, lines[-1]) == (0, {"type": "result", "value": {"sum": 5}})
    found = logs(lines)
    mine = [(stream, text) for function, stream, text in found if function is None]
    out = ("stdout", "imported\n"), ("stdout", "begun by a child\n"), ("stderr", "complaint\n"), ("stdout", "\\xff\n")
    assert tuple(mine) == out
    for n in range(3):
        assert ("square", "stdout", f"squaring {n}\n") in found
    assert {line["type"] for line in lines} == {"log", "result"}
    containers = {line["container_id"] for line in lines if line.get("function") == "square"}
    assert all(container.startswith("co-") for container in containers)


def test_what_a_generator_yields_comes_value_by_value(script: Path) -> None:
    code, lines = run_lines(f"{script}::count", "--n", 3)
    assert [line["value"] for line in lines if line["type"] == "yield"] == [0, 1, 2]
    assert (code, lines[-1]) == (0, {"type": "result", "value": None})


def test_result_that_is_no_json_has_its_repr_and_type(script: Path) -> None:
    assert run_lines(f"{script}::letters")[1][-1] == {"type": "result", "repr": "{'a'}", "python_type": "builtins.set"}


def test_exception_of_the_users_code_is_the_last_line_with_their_traceback(script: Path) -> None:
    code, lines = run_lines(f"{script}::fail")
    error = lines[-1]["error"]
    assert (code, lines[-1]["type"], error["type"]) == (1, "error", "ZeroDivisionError")
    assert error["message"] == "division by zero"
    assert "in helper" in error["traceback"] and "squall/" not in error["traceback"]


def test_script_that_does_not_import_has_its_traceback_in_the_last_line(shared_home: Path) -> None:
    path = shared_home / "broken.py"
    path.write_text("print('so far')\n1 / 0\n")
    code, lines = run_lines(path)
    assert (code, lines[0]["text"], lines[-1]["error"]["type"]) == (1, "so far\n", "InvalidError")
    assert "line 2, in <module>" in lines[-1]["error"]["traceback"]
    assert did("deploy", "--json", path, code=1)["error"]["type"] == "InvalidError"


def test_wrong_usage_of_a_run_is_the_last_line(script: Path) -> None:
    for words in (["--name"], [], [f"{script}::square", "--x", "many"], ["-i", script]):
        code, lines = run_lines(*words)
        assert (code, lines[-1]["type"], lines[-1]["error"]["type"]) == (2, "error", "UsageError")


@pytest.mark.parametrize(("code", "last"), [(0, "result"), (5, "error")])
def test_program_that_exits_has_a_last_line_and_its_own_exit_code(script: Path, code: int, last: str) -> None:
    found, lines = run_lines(f"{script}::leave", "--code", code)
    assert (found, lines[-1]["type"]) == (code, last)


def test_interrupt_of_a_run_is_told_in_its_last_line(script: Path) -> None:
    process = started("run", "--json", "-n", "cut", f"{script}::ticks")
    assert process.stdout is not None
    assert any("tick" in line for line in process.stdout)  # the first line came while the script was imported
    process.send_signal(signal.SIGINT)
    code, out, err = ended(process)
    last = json.loads(out.splitlines()[-1])
    assert (code, err) == (130, "")
    assert (last["type"], last["error"]["type"]) == ("error", "KeyboardInterrupt")
    assert any("stopping app `cut`" in json.loads(line).get("text", "") for line in out.splitlines())


@pytest.mark.parametrize("name", ["fail", "ticks --n 3"])
def test_reader_that_goes_away_ends_no_run_badly(script: Path, name: str) -> None:
    line = f"{' '.join(SQUALL)} run --json {script}::{name} | head -n 1; echo ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=SECONDS, check=True)
    first, code = run.stdout.splitlines()
    assert (json.loads(first)["type"], code, run.stderr) == ("log", "141", "")


def test_json_after_the_reference_is_the_users(script: Path) -> None:
    run = squall("run", f"{script}::square", "--json")
    assert (run.returncode, run.stderr.startswith("error: ")) == (2, True)


@pytest.fixture
def container(script: Path) -> Iterator[str]:
    """The id of a container that is at work."""
    process = started("run", "-q", "-n", "busy", f"{script}::ticks")
    assert process.stdout is not None
    assert any("tick" in line for line in process.stdout)
    yield listed("container", "list", "--app", "busy")[0]["container_id"]
    process.send_signal(signal.SIGINT)
    ended(process)


def test_command_in_a_container_has_one_document(container: str) -> None:
    words = ["sh", "-c", "cat; printf '\\377' >&2; exit 5"]
    document = did("container", "exec", "--json", container, "--", *words, code=5, input="hello")
    found = {"container_id": container, "exit_code": 5, "stdout": "hello", "stderr": "\ufffd", "truncated": False}
    assert document == found
    document = did("shell", "--json", "-c", "echo $0", container, stdin=subprocess.DEVNULL)
    assert (document["exit_code"], document["stdout"]) == (0, "/bin/sh\n")


def test_too_much_output_of_a_command_is_cut(container: str) -> None:
    words = ["head", "-c", "3000000", "/dev/zero"]
    document = did("container", "exec", "--json", container, *words, stdin=subprocess.DEVNULL)
    assert (len(document["stdout"]), document["truncated"]) == (1 << 20, True)


def test_command_in_a_container_of_its_own_has_one_document(script: Path) -> None:
    words = ["--json", "-c", "echo $HOME >&2; exit 4", f"{script}::square"]
    document = did("shell", *words, code=4, stdin=subprocess.DEVNULL)
    assert (document["exit_code"], document["stdout"], document["stderr"] != "") == (4, "", True)


def test_container_and_app_that_are_stopped_are_named(container: str) -> None:
    (row,) = did("container", "stop", "--json", "--grace", 0, container[:-3])
    assert (row["container_id"], row["app"], row["function"]) == (container, "busy", "ticks")
    document = did("app", "stop", "--json", "busy")
    assert (document["app_id"], document["state"]) == (row["app_id"], "stopped")
    assert (document["name"], document["environment"]) == ("busy", "main")


def test_result_of_a_call_is_a_document(script: Path) -> None:
    def spawn(how: str) -> str:
        run = squall("run", "-q", "-d", f"{script}::spawned", "--how", how)
        return run.stdout.split()[-1]

    done = spawn("square")
    found = {"call_id": done, "index": 0, "status": "ok", "value": 9}
    assert did("call", "get", "--json", done) == found
    assert did("call", "get", "--json", spawn("letters"))["python_type"] == "builtins.set"
    error = did("call", "get", "--json", spawn("fail"), code=1)["error"]
    assert (error["type"], "in helper" in error["traceback"]) == ("ZeroDivisionError", True)
    assert did("call", "cancel", "--json", done) == [{"call_id": done, "cancelled": 0}]


def test_deploy_is_one_document_whatever_the_script_prints(script: Path) -> None:
    document = did("deploy", "--json", "--name", "kept", script)
    assert (document["name"], document["version"]) == ("kept", 1)
    assert did("app", "stop", "kept", "--json")["name"] == "kept"


@pytest.mark.parametrize(
    ("words", "document"),
    [
        ("environment create --json one", {"name": "one", "state": "created"}),
        ("environment rename --json one two", {"name": "two", "was": "one", "state": "renamed"}),
        ("environment delete --json two", {"name": "two", "state": "deleted"}),
        ("workspace create --json team", {"name": "team", "state": "created"}),
        ("workspace delete --json team", {"name": "team", "state": "deleted"}),
        ("secret create --json key A=1 B=2", {"name": "key", "keys": ["A", "B"]}),
        ("secret delete --json key", {"name": "key", "state": "deleted"}),
        ("image prune --json", {"images": [], "size_bytes": 0}),
        ("profile current --json", {"name": None}),
        ("profile activate --json -", {"name": None}),
    ],
)
def test_deed_is_told_in_one_document(script: Path, words: str, document: Any, tmp_path: Path) -> None:
    run = squall(*words.split(), env={**os.environ, "XDG_CONFIG_HOME": str(tmp_path), "HOME": str(tmp_path)})
    assert (run.returncode, run.stderr) == (0, "")
    assert json.loads(run.stdout) == document


def test_token_is_made_and_revoked_in_documents(script: Path) -> None:
    made = did("token", "new", "--json")
    revoked = did("token", "revoke", "--json", made["token_id"])
    assert (revoked["token_id"], revoked["state"]) == (made["token_id"], "revoked")


@pytest.mark.parametrize(
    "words",
    ["app stop nosuch", "container exec co-zzzz ls", "schedule run nosuch", "image why im-zzzz", "secret delete nosuch",
     "call info fc-0000", "function info nosuch", "app logs nosuch", "token revoke nosuch", "schedule pause nosuch"],
)  # fmt: skip
def test_what_does_not_exist_is_one_document(script: Path, words: str) -> None:
    squall("run", "-q", f"{script}::square", "--x", "1")  # so that a server runs
    noun, verb, *rest = words.split()
    run = squall(noun, verb, "--json", *rest)
    error = json.loads(run.stdout)["error"]
    assert (run.returncode, run.stderr, error["type"]) == (1, "", "NotFoundError")
    assert error["message"]


@pytest.mark.parametrize("words", ["app list", "container list", "status", "secret create s A=1", "token list"])
def test_server_that_cannot_be_reached_is_one_document(home: Path, words: str) -> None:
    place = {"SQUALL_SERVER": "http://127.0.0.1:9", "SQUALL_TOKEN_ID": "tk-1", "SQUALL_TOKEN_SECRET": "ts-1"}
    run = squall(*words.split(), "--json", env={**os.environ, **place})
    error = json.loads(run.stdout)["error"]
    assert (run.returncode, run.stderr, error["type"]) == (1, "", "ServiceError")
    assert "http://127.0.0.1:9" in error["message"] and error["hint"]


def test_server_that_stays_is_a_document_when_it_starts_and_when_it_ends(home: Path) -> None:
    facts = did("up", "-d", "--json")
    assert (facts["running"], facts["stays"], facts["home"]) == (True, True, str(home))
    assert did("up", "-d", "--json", code=1)["error"]["type"] == "ConflictError"
    assert did("down", "--json") == {"home": str(home), "running": False, "stopped": True}
    assert did("down", "--json")["stopped"] is False


def test_server_in_the_foreground_says_who_it_is_and_no_more(home: Path) -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen([*SQUALL, "up", "--json"], stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        head = "".join(process.stdout.readline() for _ in range(5))
        assert json.loads(head)["pid"] == process.pid
        wait_until(lambda: listed("status")["running"], lambda: "the server runs")
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=SECONDS)
    assert out == ""
