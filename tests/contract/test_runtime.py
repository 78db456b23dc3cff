"""What every runtime promises: a container runs, is fed, heard, signalled, measured, and ends with a reason."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from squall.exception import Error
from tests.conftest import wait_until
from tests.kernel.containers import Cell, Node, a_node, make_native, make_process


@pytest.fixture(scope="module", params=[pytest.param("native", marks=pytest.mark.root), "process"])
def shared(request: pytest.FixtureRequest) -> Iterator[Node]:
    with a_node(make_native if request.param == "native" else make_process) as node:
        yield node


@pytest.fixture
def node(shared: Node) -> Iterator[Node]:
    yield shared
    shared.close_cells()


def test_runtime_sees_no_problem_where_these_tests_run(node: Node) -> None:
    assert type(node.runtime).problems() == []


def test_container_serves_the_socket_it_was_given(node: Node) -> None:
    assert node.make().ask("result = 6 * 7") == 42


def test_container_knows_its_id_and_that_it_is_remote(node: Node) -> None:
    cell = node.make(container_id="co-known")
    assert cell.ask("result = os.environ['SQUALL_TASK_ID'], os.environ['SQUALL_IS_REMOTE']") == ["co-known", "1"]


def test_container_reads_its_source_tree(node: Node, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)  # the agent unpacks sources readable for all: inside they are nobody's
    (tmp_path / "mine.txt").write_text("hello")
    cell = node.make(tmp_path)
    assert cell.ask("result = open(source + '/mine.txt').read()") == "hello"


def test_container_without_source_is_told_so(node: Node) -> None:
    assert node.make().ask("result = source") is None


def test_output_arrives_on_the_stream_it_was_written_to(node: Node) -> None:
    cell = node.make()
    cell.ask("import sys; print('to out'); print('to err', file=sys.stderr)")
    assert os.read(cell.stdout, 100) == b"to out\n"
    assert os.read(cell.stderr, 100) == b"to err\n"


def test_output_ends_when_the_container_ends(node: Node) -> None:
    cell = node.make()
    cell.send("print('last words'); code = 0")
    assert cell.output() == b"last words\n"


def test_writable_directories_are_writable(node: Node) -> None:
    cell = node.make()
    cell.ask("import tempfile; open('here.txt', 'w').close(); tempfile.NamedTemporaryFile().write(b'x')")


@pytest.mark.parametrize(
    ("code", "exit_code", "reason"),
    [
        ("code = 0", 0, "exited with code 0"),
        ("code = 3", 3, "exited with code 3"),
        ("os._exit(4)", 4, "exited with code 4"),
        ("raise SystemExit(5)", 5, "exited with code 5"),
        ("os.kill(os.getpid(), 11)", 139, "killed by signal SIGSEGV"),
        ("os.abort()", 134, "killed by signal SIGABRT"),
        ("os._exit(139)", 139, "exited with code 139"),
    ],
)
def test_end_is_told_apart_by_code_and_reason(node: Node, code: str, exit_code: int, reason: str) -> None:
    cell = node.make()
    cell.send(code)
    end = cell.end()
    assert (end.code, end.reason, end.oom) == (exit_code, reason, False)


def test_end_reports_what_was_used(node: Node) -> None:
    cell = node.make()
    cell.send("sum(i * i for i in range(300_000)); block = bytearray(20_000_000); code = 0")
    usage = cell.end().usage
    assert usage["cpu_seconds"] > 0.005
    assert usage["memory_peak_bytes"] > 20_000_000


def test_use_of_a_running_container_can_be_read(node: Node) -> None:
    cell = node.make()
    cell.ask("sum(i * i for i in range(300_000))")
    usage = cell.container.usage()
    assert usage["cpu_seconds"] > 0.005
    assert usage["memory_bytes"] > 100_000


def test_kill_ends_it_with_the_given_reason(node: Node) -> None:
    cell = node.make()
    cell.container.kill("the input took longer than 3 s")
    end = cell.end()
    assert (end.code, end.reason) == (137, "the input took longer than 3 s")


def test_signal_reaches_the_runner(node: Node) -> None:
    cell = node.make()
    cell.ask("import signal; signal.signal(signal.SIGUSR1, lambda *_: os._exit(21)); result = 1")
    cell.container.signal(signal.SIGUSR1)
    assert cell.end().code == 21


def test_terminate_ends_a_container_that_does_not_care(node: Node) -> None:
    cell = node.make()
    cell.ask("result = 1")
    cell.container.signal(signal.SIGTERM)
    end = cell.end()
    assert (end.code, end.reason) == (143, "killed by signal SIGTERM")


def test_terminate_right_after_creation_is_not_lost(node: Node) -> None:
    cell = node.make()
    cell.container.signal(signal.SIGTERM)
    assert cell.end().code == 143


def test_calls_on_a_container_that_is_gone_are_harmless(node: Node) -> None:
    cell = node.make()
    cell.send("code = 0")
    first = cell.end()
    cell.container.signal(signal.SIGTERM)
    cell.container.kill("too late")
    assert cell.container.usage() == {}
    assert cell.end() == first


def test_exec_in_a_container_that_is_gone_says_so(node: Node) -> None:
    cell = node.make()
    cell.send("code = 0")
    cell.end()
    with pytest.raises(Error, match="is gone"):
        run_in(cell, ["true"])


def test_children_of_user_code_end_with_the_container(node: Node) -> None:
    cell = node.make()
    cell.ask("import subprocess; child = subprocess.Popen(['sleep', '1000']); result = 1")
    before = descendants(cell.container.pid)
    cell.send("code = 0")
    cell.end()
    wait_until(lambda: not any(is_alive(pid) for pid in before), "its children are gone")


def test_subprocess_statuses_are_the_users(node: Node) -> None:
    cell = node.make()
    assert cell.ask("import subprocess; result = [subprocess.run(['sh', '-c', 'exit 7']).returncode]") == [7]


def test_steps_say_how_long_each_part_took(node: Node) -> None:
    steps = node.make().container.steps
    assert steps and all(0 <= milliseconds < 20_000 for milliseconds in steps.values())


def test_many_containers_are_made_at_once(node: Node) -> None:
    import asyncio

    async def make() -> list[Cell]:
        return await asyncio.gather(*(node.make_one() for _ in range(12)))

    cells = node.run(make())
    assert [cell.ask("result = os.environ['SQUALL_TASK_ID']") for cell in cells] == [
        cell.container.container_id for cell in cells
    ]


def test_exec_runs_a_command_beside_the_runner(node: Node) -> None:
    code, out, _ = run_in(node.make(), ["sh", "-c", "echo $SQUALL_TASK_ID; pwd; exit 9"], workdir="/")
    assert code == 9
    assert out.splitlines()[-1] == "/"


def test_exec_of_an_unknown_command_fails_with_127_or_an_error(node: Node) -> None:
    try:
        code, _, err = run_in(node.make(), ["no-such-command"])
    except FileNotFoundError:
        return
    assert code == 127
    assert "no-such-command" in err


def test_exec_on_a_terminal_has_it_as_controlling_terminal(node: Node) -> None:
    cell = node.make()
    leader, follower = os.openpty()
    try:
        command = [sys.executable, "-c", "import os; os.write(1, b'yes' if os.tcgetpgrp(0) == os.getpgrp() else b'no')"]
        ends = {"stdin": follower, "stdout": follower, "stderr": follower}
        pid = node.run(cell.container.exec(command, **ends, workdir="/", tty=True))
        assert os.read(leader, 100) == b"yes"
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        os.close(leader)
        os.close(follower)


def run_in(cell: Cell, argv: list[str], workdir: str = "") -> tuple[int, str, str]:
    pipes = [os.pipe(), os.pipe()]
    with open(os.devnull, "rb") as null:
        try:
            ends = {"stdin": null.fileno(), "stdout": pipes[0][1], "stderr": pipes[1][1]}
            pid = cell.node.run(cell.container.exec(argv, **ends, workdir=workdir, tty=False))
        finally:
            for _, write in pipes:
                os.close(write)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    texts = []
    for read, _ in pipes:
        with open(read, encoding="utf-8") as file:
            texts.append(file.read())
    return code, texts[0], texts[1]


def descendants(pid: int) -> list[int]:
    from squall.node.linux import children_of

    found = [pid]
    for child in children_of(pid):
        found += descendants(child)
    return found


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
