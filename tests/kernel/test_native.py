"""The native runtime beyond the contract: workspaces, the zygote, shells made ahead, and what a start adds up to."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from squall import _linux
from squall.exception import ConflictError, Error, InternalError, InvalidError
from squall.node import linux, native, removal, rootfs, zygote
from squall.node.native import NativeRuntime
from squall.protocol.messages import ContainerSpec, ImageSpec
from tests.kernel.containers import Cell, Node, a_node, make_native

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def shared() -> Iterator[Node]:
    with a_node(make_native) as node:
        yield node


@pytest.fixture
def node(shared: Node) -> Iterator[Node]:
    yield shared
    shared.close_cells()


def runtime_of(node: Node) -> NativeRuntime:
    assert isinstance(node.runtime, NativeRuntime)
    return node.runtime


def zygote_of(node: Node, workspace: str = "main") -> zygote.Zygote:
    found = runtime_of(node)._workspaces[workspace].nurseries["host"].zygote
    assert found is not None
    return found


def spares_of(node: Node) -> int:
    return len(runtime_of(node)._workspaces["main"].nurseries["host"].spares)


async def until(condition: object, seconds: float = 10.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.01)


def test_launch_enters_the_user_namespace_before_it_makes_the_others(node: Node) -> None:
    plan = zygote_of(node).plan
    assert [name for name, _ in zygote._launch_steps(plan, 3, 2)] == [
        "join-cgroup",
        "set-limits",
        "enter-tree",
        "enter-user-namespace",
        "new-namespaces",
        "change-root",
        "redirect-streams",
        "no-new-privileges",
        "install-filter",
        "die-with-parent",
    ]


def test_zygote_is_contained_too(node: Node) -> None:
    pid = zygote_of(node).pid
    status = linux.read_status(pid)
    assert min(status.uids) >= 1 << 30
    assert (status.no_new_privs, status.seccomp_mode, status.seccomp_filters >= 1) == (True, 2, True)
    for kind in ("user", "mnt", "net", "ipc", "uts"):
        assert linux.namespace_id(pid, kind) != linux.namespace_id(os.getpid(), kind), kind
    assert sorted(map(int, os.listdir(f"/proc/{pid}/fd"))) == [0, 1, 2, 3]
    assert status.threads == 1


def test_zygote_sees_neither_processes_nor_other_workspaces(node: Node) -> None:
    node.make(workspace="other")
    root = Path(f"/proc/{zygote_of(node).pid}/root")
    assert [name for name in os.listdir(root / "proc") if name.isdigit()] == []
    assert not (root / str(node.home)[1:]).exists()
    mine = {path.name for path in (node.home / "node" / "scratch" / "main").iterdir()}
    assert {path.name for path in (root / ".squall" / "scratch").iterdir()} == mine


def test_workspaces_have_ranges_of_their_own_that_are_kept(node: Node) -> None:
    first, other = node.make(), node.make(workspace="other")
    ids = [min(linux.read_status(cell.container.pid).uids) for cell in (first, other)]
    assert abs(ids[0] - ids[1]) == 65536
    known = json.loads((node.home / "node" / "ids.json").read_text())
    assert runtime_of(node)._id_number("main") == known["main"] != known["other"]


def test_container_outlives_its_zygote(node: Node) -> None:
    cell = node.make()
    parent = zygote_of(node)
    os.kill(parent.pid, signal.SIGKILL)
    node.run(asyncio.wait_for(asyncio.shield(parent.ended), 5))
    assert cell.ask("result = 'alive'") == "alive"


def test_shells_are_made_ahead_and_used(node: Node) -> None:
    node.make()
    node.run(until(lambda: spares_of(node) == native.SPARE_SHELLS))
    steps = node.make().container.steps
    assert "fork" not in steps
    assert spares_of(node) == native.SPARE_SHELLS - 1


def test_shell_that_died_while_waiting_is_not_handed_out(node: Node) -> None:
    node.make()
    node.run(until(lambda: spares_of(node) == native.SPARE_SHELLS))
    for shell in runtime_of(node)._workspaces["main"].nurseries["host"].spares:
        os.kill(shell.pid, signal.SIGKILL)
    assert node.make().ask("result = 'well'") == "well"


def test_steps_add_up_to_the_whole(node: Node) -> None:
    async def timed() -> tuple[Cell, float]:
        started = time.monotonic()
        cell = await node.make_one()
        return cell, (time.monotonic() - started) * 1000

    for _ in range(native.SPARE_SHELLS + 1):
        cell, took = node.run(timed())
        whole = sum(cell.container.steps.values())
        assert whole == pytest.approx(took, rel=0.05, abs=2.0)


def test_hostname_and_files_of_etc_are_the_containers_own(node: Node) -> None:
    cell = node.make(hostname="worker-7", network=False)
    assert cell.ask("import socket; result = socket.gethostname()") == "worker-7"
    assert "worker-7" in cell.ask("result = open('/etc/hosts').read()")
    assert cell.ask("result = open('/etc/resolv.conf').read()") == "# this container has no network\n"


def test_shared_memory_and_terminals_work_inside(node: Node) -> None:
    cell = node.make()
    cell.ask("import multiprocessing.shared_memory as m; s = m.SharedMemory(create=True, size=4096); s.unlink()")
    assert cell.ask("a, b = os.openpty(); os.write(a, b'x\\n'); result = os.read(b, 10).decode()") == "x\n"
    assert cell.ask("result = os.path.exists('/dev/stdin'), os.path.realpath('/dev/ptmx')") == [True, "/dev/pts/ptmx"]


def test_environment_is_built_from_scratch(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUALL_TEST_SECRET", "of the host")
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    seen = node.make().ask("result = dict(os.environ)")
    assert "SQUALL_TEST_SECRET" not in seen
    assert seen["https_proxy"] == "http://proxy:3128"
    assert (seen["HOME"], seen["LANG"]) == ("/root", "C.UTF-8")


def test_random_numbers_differ_between_containers(node: Node) -> None:
    drawn = [node.make().ask("import random; result = random.random()") for _ in range(3)]
    assert len(set(drawn)) == 3


def test_id_cannot_be_used_twice_or_be_a_path(node: Node) -> None:
    node.make(container_id="co-one")
    with pytest.raises(ConflictError, match="co-one"):
        node.make(container_id="co-one")
    for wrong in ("../x", "a/b", "", ".", "x" * 65, "a\n"):
        with pytest.raises(InvalidError):
            node.make(container_id=wrong)
        with pytest.raises(InvalidError):
            node.make(workspace=wrong)


def test_unknown_image_is_refused(node: Node) -> None:
    with pytest.raises(InvalidError, match="image kind `debian`"):
        node.make(image=ImageSpec("debian"))


def test_missing_source_fails_and_leaves_nothing(node: Node) -> None:
    runtime = runtime_of(node)
    node.run(until(lambda: spares_of(node) == native.SPARE_SHELLS))
    with pytest.raises(Error, match=r"open_tree\(.*/no/such/source"):
        node.make(Path("/no/such/source"))
    node.run(until(lambda: spares_of(node) == native.SPARE_SHELLS))
    names = {shell.name for shell in runtime._workspaces["main"].nurseries["host"].spares}
    assert {path.name for path in (node.home / "node" / "scratch" / "main").iterdir()} == names


def test_second_agent_of_a_home_is_refused(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_LOCK_TIMEOUT", 0.1)

    async def second() -> None:
        with pytest.raises(ConflictError, match="another agent uses it"):
            await NativeRuntime(node.home).start()

    node.run(second())
    assert node.make().ask("result = 1") == 1


def test_runtime_refuses_to_start_in_the_hosts_mount_namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux, "has_private_mounts", lambda: False)
    with pytest.raises(InternalError, match="private mount namespace"):
        asyncio.run(NativeRuntime(tmp_path).start())


def test_zygote_that_cannot_import_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    linux.enter_private_mounts()

    async def start() -> str:
        runtime = NativeRuntime(tmp_path, entry="no_such_module:serve")
        with pytest.raises(Error, match="No module named 'no_such_module'"):
            await runtime.start()
        return runtime.parent

    parent = asyncio.run(start())
    assert not list(Path("/sys/fs/cgroup").glob(f"*/{parent}"))
    assert f" {tmp_path}/" not in Path("/proc/self/mountinfo").read_text()


def test_trouble_is_named_with_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "needs root" in NativeRuntime.problems()[0]
    monkeypatch.undo()
    assert "SQUALL_HOME" in NativeRuntime.problems(Path("/proc/squall"))[0]


def test_default_spec_is_what_the_warm_zygote_is_for(node: Node) -> None:
    assert node.run(runtime_of(node)._nursery(ContainerSpec("co-x"))).zygote is not None


@pytest.mark.parametrize("claimed", [0xFFFF, 0x10000, -1, 0x137F, 0x00FF])
def test_wait_status_the_kernel_would_not_give_is_not_believed(claimed: int) -> None:
    assert native._believable(claimed, 0x0300) == 0x0300


def test_runners_wait_status_is_believed_when_init_ended_with_its_code() -> None:
    assert native._believable(9, (128 + 9) << 8) == 9
    assert native._believable(9, 0) == 0


def test_lease_is_given_back_even_when_a_failed_container_cannot_be_undone(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = runtime_of(node)
    released: list[object] = []
    undo, release = zygote.Shell.undo, runtime._empty.release

    async def fail(shell: zygote.Shell, *others: object) -> None:
        await undo(shell, *others)  # type: ignore[arg-type]
        raise OSError(16, "Device or resource busy")

    def note(lease: object) -> None:
        released.append(lease)
        release(lease)  # type: ignore[arg-type]

    monkeypatch.setattr(zygote.Shell, "undo", fail)
    monkeypatch.setattr(runtime._empty, "release", note)
    with pytest.raises(Error, match="busy"):
        node.make(source=Path("/does/not/exist"), network=False)
    assert len(released) == 1


def test_containers_are_made_while_files_of_others_are_still_being_deleted(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def slow(path: Path, deadline: float) -> None:
        go_on.wait(10)
        rootfs.remove_tree(path, deadline)

    monkeypatch.setattr(removal, "PATIENCE_SECONDS", 0.01)
    monkeypatch.setattr(removal, "remove_tree", slow)
    cells = [node.make() for _ in range(6)]
    scratches = [cell.container._shell.scratch for cell in cells]  # type: ignore[attr-defined]
    try:
        for cell in cells:
            cell.container.kill("enough")
            assert cell.end().reason == "enough"
        assert all(scratch.exists() for scratch in scratches)
        assert node.make().ask("result = 'made'") == "made"
    finally:
        go_on.set()
    node.run(until(lambda: not any(scratch.exists() for scratch in scratches)))


def test_command_that_cannot_join_in_time_fails_and_keeps_nobody_waiting(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = node.make()
    node.run(until(lambda: spares_of(node) == native.SPARE_SHELLS))
    monkeypatch.setattr(zygote, "SHELL_TIMEOUT", 0.1)
    monkeypatch.setattr(_linux, "setns", lambda *_: time.sleep(60))
    children = set(linux.children_of(os.getpid()))

    async def attempt(null: int) -> int:
        turns = 0
        ends = dict.fromkeys(("stdin", "stdout", "stderr"), null)
        starting = asyncio.ensure_future(cell.container.exec(["true"], workdir="/", tty=False, **ends))
        while not starting.done():
            await asyncio.sleep(0.01)
            turns += 1
        with pytest.raises(Error, match=r"did not answer within 0\.1 s"):
            await starting
        return turns

    with open(os.devnull, "r+b") as null:
        assert node.run(attempt(null.fileno())) > 5
    assert set(linux.children_of(os.getpid())) <= children
    assert runtime_of(node).joining == 0


def test_finished_command_is_left_to_whoever_started_it(node: Node) -> None:
    cell = node.make()
    with open(os.devnull, "r+b") as null:
        streams = {"stdin": null.fileno(), "stdout": null.fileno(), "stderr": null.fileno()}
        pid = node.run(cell.container.exec(["true"], workdir="/", tty=False, **streams))
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    runtime_of(node)._reap_strays()
    assert os.waitpid(pid, 0) == (pid, 0)
