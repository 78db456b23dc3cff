"""What must be impossible from inside a container, each tried as an attack, and that nothing of one is ever left."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from squall.node import linux
from squall.node import zygote as zygote_module
from squall.node.linux import StepError
from squall.node.native import NativeContainer, NativeRuntime
from squall.node.zygote import Channel, Shell, check_walls
from tests.conftest import wait_until
from tests.kernel.containers import Cell, Node, a_node, make_native

pytestmark = pytest.mark.root

SYSCALL = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    value = libc.syscall(number, *arguments)
    if value < 0:
        raise OSError(ctypes.get_errno(), 'refused')
    return value
"""
REFUSED = {"EPERM", "ENOSYS", "EACCES"}


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with a_node(make_native) as node:
        yield node


@pytest.fixture(scope="module")
def cell(node: Node) -> Cell:
    """One container that all attacks share: none may succeed, so none may disturb the next."""
    return node.make()


@pytest.fixture
def own(node: Node) -> Iterator[Node]:
    """For attacks that end or exhaust their container."""
    before = len(node.cells)
    yield node
    for cell in node.cells[before:]:
        cell.close()
    del node.cells[before:]


# ---- files ------------------------------------------------------------------------------------------------------


def test_container_cannot_read_the_hosts_shadow_file(cell: Cell) -> None:
    assert cell.refusal("open('/etc/shadow').read()") == "EACCES"


def test_container_cannot_read_what_only_the_nodes_root_may_read(own: Node) -> None:
    secret = Path(sys.prefix) / "squall-test-secret"
    secret.write_text("secret")
    secret.chmod(0o600)
    try:
        assert own.make().refusal(f"open({str(secret)!r}).read()") == "EACCES"
    finally:
        secret.unlink()


def test_container_cannot_write_the_hosts_files(cell: Cell) -> None:
    assert cell.refusal("open('/usr/bin/squall-was-here', 'w')") == "EROFS"
    assert cell.refusal("open('/etc/passwd', 'a')") in {"EROFS", "EACCES"}
    assert cell.refusal("import sys; open(sys.prefix + '/squall-was-here', 'w')") == "EROFS"


def test_container_cannot_see_a_closed_home_beside_the_interpreter_in_it(cell: Cell) -> None:
    assert cell.ask("result = os.path.realpath('/proc/self/exe')") == os.path.realpath(sys.executable)
    shown = cell.ask("result = [os.path.join(d, f) for d in ('/root', '/home') for f in os.listdir(d)]")
    assert all(os.path.realpath(sys.executable).startswith(path) for path in shown), shown


def test_container_cannot_see_the_nodes_state(node: Node, cell: Cell) -> None:
    assert cell.ask(f"result = os.path.exists({str(node.home)!r})") is False


def test_container_cannot_reach_the_scratch_of_a_sibling(own: Node) -> None:
    sibling, cell = own.make(), own.make()
    sibling.ask("open('/root/mine', 'w').write('private'); result = 1")
    assert cell.ask("result = os.path.exists('/root/mine')") is False
    assert cell.ask("result = [name for name in os.listdir('/.squall') if os.listdir('/.squall/' + name)]") == []


def test_container_leaves_nothing_in_the_image_for_the_next(own: Node) -> None:
    own.make().ask("open('/root/left', 'w').close(); open('/tmp/left', 'w').close(); os.rmdir('/srv')")
    assert own.make().ask("result = [os.path.exists(p) for p in ('/root/left', '/tmp/left', '/srv')]") == [
        False,
        False,
        True,
    ]


def test_container_cannot_change_its_source(own: Node, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    (tmp_path / "code.py").write_text("x = 1")
    (tmp_path / "code.py").chmod(0o666)
    cell = own.make(tmp_path)
    assert cell.refusal("open('/src/code.py', 'a')") == "EROFS"


def test_container_cannot_make_or_use_a_device(cell: Cell) -> None:
    assert cell.refusal("import stat; os.mknod('/tmp/disk', stat.S_IFBLK | 0o666, os.makedev(254, 0))") == "EPERM"
    assert cell.refusal("os.unlink('/dev/null')") in {"EROFS", "EACCES", "EBUSY"}
    assert cell.refusal("os.symlink('/etc/passwd', '/dev/zero2')") in {"EROFS", "EACCES"}
    kinds = cell.ask(
        "result = {n: os.stat('/dev/' + n).st_mode for n in ('null', 'zero', 'full', 'random', 'urandom')}"
    )
    assert all(stat.S_ISCHR(mode) for mode in kinds.values())


def test_container_gains_nothing_from_a_setuid_file(cell: Cell) -> None:
    code = "import subprocess; result = subprocess.run(['su', '-c', 'id', 'nobody'], capture_output=True).returncode"
    assert cell.ask(code) != 0
    assert "nosuid" in cell.ask("result = open('/proc/self/mountinfo').read().splitlines()[0]")


# ---- processes --------------------------------------------------------------------------------------------------


def test_container_cannot_see_the_nodes_processes(cell: Cell) -> None:
    numbers = cell.ask("result = sorted(int(n) for n in os.listdir('/proc') if n.isdigit())")
    assert numbers == [1, cell.ask("result = os.getpid()")]


def test_container_cannot_signal_a_process_outside(cell: Cell) -> None:
    assert cell.refusal(f"os.kill({os.getpid()}, 0)") == "ESRCH"


def test_container_cannot_kill_its_own_init(cell: Cell) -> None:
    cell.ask("import signal; os.kill(1, signal.SIGKILL); os.kill(1, signal.SIGSEGV); result = 1")
    assert cell.ask("result = 'still here'") == "still here"


@pytest.mark.parametrize("name", ["mem", "environ", "fd/0", "root", "cwd", "exe", "maps", "auxv"])
def test_container_cannot_look_into_its_init(cell: Cell, name: str) -> None:
    look = "os.readlink" if name in ("fd/0", "root", "cwd", "exe") else "open"
    assert cell.refusal(f"{look}('/proc/1/{name}')") in {"EACCES", "EPERM"}


def test_container_cannot_trace_its_init(cell: Cell) -> None:
    assert cell.refusal(SYSCALL + "call(101, 16, 1, 0, 0)") == "EPERM"


def test_container_cannot_read_another_process_memory(cell: Cell) -> None:
    assert cell.refusal(SYSCALL + "call(310, 1, None, 0, None, 0, 0)") == "EPERM"


def test_container_inherits_no_descriptor_but_its_six(cell: Cell) -> None:
    # Streams, server, agent and the pipe for a crash; the seventh is the directory being listed.
    assert cell.ask("result = sorted(map(int, os.listdir('/proc/self/fd')))")[:6] == [0, 1, 2, 3, 4, 5]
    assert len(cell.ask("result = os.listdir('/proc/self/fd')")) == 7


def test_command_started_by_user_code_does_not_inherit_the_wire(cell: Cell) -> None:
    command = "['ls', '/proc/self/fd'], capture_output=True, text=True, close_fds=False"
    assert cell.ask(f"import subprocess; result = subprocess.run({command}).stdout").split() == [
        "0",
        "1",
        "2",
        "3",
    ]  # 3 is the directory ls reads


# ---- privileges -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"])
def test_container_has_no_capability_in_any_set(cell: Cell, name: str) -> None:
    lines = cell.ask("result = open('/proc/self/status').read()").splitlines()
    assert [int(line.split()[1], 16) for line in lines if line.startswith(name)] == [0]


def test_container_has_no_new_privs_and_both_filters(cell: Cell) -> None:
    text = cell.ask("result = open('/proc/self/status').read()")
    lines = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
    assert (lines["NoNewPrivs"], lines["Seccomp"], int(lines["Seccomp_filters"]) >= 2) == ("1", "2", True)


def test_container_is_root_only_in_its_own_eyes(cell: Cell) -> None:
    assert cell.ask("result = os.getuid(), os.getgid()") == [0, 0]
    assert min(linux.read_status(cell.container.pid).uids) >= 1 << 20


@pytest.mark.parametrize(
    ("what", "number", "arguments"),
    [
        ("mount", 165, "b'none', b'/mnt', b'tmpfs', 0, None"),
        ("umount", 166, "b'/proc/sys', 2"),
        ("pivot_root", 155, "b'/', b'/mnt'"),
        ("chroot", 161, "b'/tmp'"),
        ("open_tree", 428, "-100, b'/', 1"),
        ("fsopen", 430, "b'tmpfs', 0"),
        ("mount_setattr", 442, "-100, b'/proc/sys', 0, None, 0"),
        ("unshare a user namespace", 272, "0x10000000"),
        ("unshare a mount namespace", 272, "0x00020000"),
        ("clone into a user namespace", 56, "0x10000011, 0, 0, 0, 0"),
        ("clone3", 435, "None, 0"),
        ("setns", 308, "0, 0"),
        ("bpf", 321, "0, None, 0"),
        ("perf_event_open", 298, "None, 0, -1, -1, 0"),
        ("io_uring_setup", 425, "8, None"),
        ("userfaultfd", 323, "0"),
        ("keyctl", 250, "0, -3, 0"),
        ("add_key", 248, "b'user', b'x', b'y', 1, -3"),
        ("kexec_load", 246, "0, 0, None, 0"),
        ("init_module", 175, "None, 0, b''"),
        ("open_by_handle_at", 304, "-100, None, 0"),
        ("pidfd_getfd", 438, "0, 0, 0"),
        ("reboot", 169, "0, 0, 0, None"),
        ("settimeofday", 164, "None, None"),
        ("syslog", 103, "3, None, 0"),
        ("a vsock", 41, "40, 1, 0"),
        ("a packet socket", 41, "17, 3, 0"),
        ("a kernel crypto socket", 41, "38, 5, 0"),
        ("a netfilter socket", 41, "16, 3, 12"),
        ("personality", 135, "0x0040000"),
        ("the x32 ABI", 0x40000000 + 39, ""),
        ("a call no kernel has", 4000, ""),
    ],
)
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="system calls are given by their x86_64 numbers")
def test_container_is_refused(cell: Cell, what: str, number: int, arguments: str) -> None:
    assert cell.refusal(SYSCALL + f"call({number}, {arguments})") in REFUSED, what


def test_container_cannot_push_input_into_a_terminal(cell: Cell) -> None:
    code = "import fcntl, pty; a, b = pty.openpty(); fcntl.ioctl(b, 0x5412, b'x')"
    assert cell.refusal(code) == "EPERM"


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="its machine code is i386's")
def test_foreign_abi_is_killed(own: Node) -> None:
    cell = own.make()
    # mov eax, 20 (getpid of i386); int 0x80; ret
    cell.send(
        "import ctypes, mmap; m = mmap.mmap(-1, 4096, prot=7); m.write(bytes.fromhex('b814000000cd80c3'));"
        "result = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()"
    )
    assert cell.end().reason == "killed by signal SIGSYS"


def test_container_cannot_write_kernel_settings(cell: Cell) -> None:
    for path in ("/proc/sys/kernel/hostname", "/proc/sys/net/ipv4/ip_forward", "/proc/sys/kernel/core_pattern"):
        assert cell.refusal(f"open({path!r}, 'w')") in {"EROFS", "EACCES"}
    if Path("/proc/sysrq-trigger").exists():
        assert "/null /proc/sysrq-trigger ro" in cell.ask("result = open('/proc/self/mountinfo').read()")


def test_masked_files_of_proc_are_empty(cell: Cell) -> None:
    paths = [path for path in ("/proc/keys", "/proc/timer_list", "/proc/kmsg") if Path(path).exists()]
    assert cell.ask(f"result = [open(path, 'rb').read(10).hex() for path in {paths}]") == [""] * len(paths)


def test_container_sees_no_control_groups_and_cannot_leave_its_own(cell: Cell) -> None:
    assert cell.ask("result = os.listdir('/sys')") == []
    groups = cell.ask("result = open('/proc/self/cgroup').read()").splitlines()
    assert all("squall" not in line for line in groups), groups


def test_core_dumps_are_off(cell: Cell) -> None:
    assert cell.ask("import resource; result = resource.getrlimit(resource.RLIMIT_CORE)") == [0, 0]


def test_exec_has_the_same_walls(own: Node) -> None:
    cell = own.make()
    out_r, out_w = os.pipe()
    ends = {"stdin": out_w, "stdout": out_w, "stderr": out_w}
    pid = own.run(cell.container.exec(["cat", "/proc/self/status"], **ends, workdir="/", tty=False))
    status = linux.read_status
    os.waitpid(pid, 0)
    os.close(out_w)
    with open(out_r) as file:
        lines = dict(line.split(":", 1) for line in file)
    assert {int(lines[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert (lines["NoNewPrivs"].strip(), lines["Seccomp"].strip()) == ("1", "2")
    assert int(lines["Seccomp_filters"]) == status(cell.container.pid).seccomp_filters
    assert lines["NSpid"].split()[-1] != str(pid)


# ---- network ----------------------------------------------------------------------------------------------------


def test_container_without_network_has_only_loopback(own: Node) -> None:
    cell = own.make(network=False)
    assert cell.ask("import socket; result = socket.if_nameindex()") == [[1, "lo"]]
    assert cell.refusal("import socket; socket.create_connection(('192.0.2.1', 80), 2)") == "ENETUNREACH"


def test_loopback_of_a_container_is_its_own(own: Node) -> None:
    first, second = own.make(network=False), own.make(network=False)
    listen = "import socket; os.server = socket.create_server(('127.0.0.1', 0)); result = os.server.getsockname()[1]"
    port = first.ask(listen)
    assert (
        first.ask(f"import socket; result = socket.create_connection(('127.0.0.1', {port})).getpeername()[1]") == port
    )
    assert second.refusal(f"import socket; socket.create_connection(('127.0.0.1', {port}))") == "ECONNREFUSED"


def test_container_cannot_reach_abstract_sockets_of_the_node(own: Node) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0squall-test-abstract")
        server.listen()
        code = "import socket; socket.socket(socket.AF_UNIX).connect(chr(0) + 'squall-test-abstract')"
        assert own.make().refusal(code) == "ECONNREFUSED"


# ---- exhaustion -------------------------------------------------------------------------------------------------


def test_out_of_memory_stays_inside_and_is_told(own: Node) -> None:
    bystander = own.make(memory_limit_mib=64)
    cell = own.make(memory_limit_mib=64)
    cell.send("block = bytearray(b'x') * (200 << 20)")
    end = cell.end()
    assert (end.code, end.oom, end.reason) == (137, True, "out of memory: the limit is 64 MiB")
    assert bystander.ask("result = 'unharmed'") == "unharmed"


def test_fork_bomb_stays_inside(own: Node) -> None:
    cell = own.make(pids_limit=64)
    code = """
import time
count = 0
try:
    while True:
        if os.fork() == 0:
            time.sleep(1000)
        count += 1
except BlockingIOError:
    result = count
"""
    assert 50 <= cell.ask(code) <= 64
    started = time.monotonic()
    assert own.make().ask("result = 'room'") == "room"
    assert time.monotonic() - started < 2
    cell.container.kill("enough")
    assert cell.end().reason == "enough"


def test_processor_limit_holds(own: Node) -> None:
    if (os.cpu_count() or 1) < 2:
        pytest.skip("a limit below one core needs two cores to show")
    cell = own.make(cpu=0.1, cpu_limit=0.2)
    code = """
import time
started, used = time.monotonic(), time.process_time()
while time.monotonic() - started < 0.6:
    pass
result = (time.process_time() - used) / (time.monotonic() - started)
"""
    assert cell.ask(code) < 0.45


# ---- lies -------------------------------------------------------------------------------------------------------


def test_container_is_refused_when_its_check_fails(own: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_wall(*_: object) -> None:
        raise StepError("check-walls", "not true of process 1: no_new_privs is set")

    monkeypatch.setattr("squall.node.native.check_walls", no_wall)
    with pytest.raises(StepError, match="check-walls: not true of"):
        own.make(container_id="co-refused")
    assert isinstance(own.runtime, NativeRuntime)
    assert "co-refused" not in own.runtime._containers


def test_check_finds_every_wall_missing_in_a_plain_process(own: Node) -> None:
    runtime = own.runtime
    assert isinstance(runtime, NativeRuntime)
    zygote = runtime._workspaces["main"].nurseries["host"].zygote
    assert zygote is not None

    async def judge() -> None:
        shell = Shell("c0", runtime.hierarchies.group("none"), Path("none"), Channel(), pid=os.getpid())
        try:
            check_walls(shell, zygote, zygote.plan.userns)
        finally:
            shell.channel.close()

    with pytest.raises(StepError) as found:
        own.run(judge())
    for fact in (
        "it has no capability in any set",
        "no_new_privs is set",
        "both system call filters are on",
        "its ids are in the workspace's range",
        "it is in the workspace's user namespace",
        "it is in its own network namespace",
        "it shares no namespace with the node",
    ):
        assert fact in found.value.message


def test_zygote_itself_would_not_pass_for_a_container(own: Node) -> None:
    runtime = own.runtime
    assert isinstance(runtime, NativeRuntime)
    zygote = runtime._workspaces["main"].nurseries["host"].zygote
    assert zygote is not None

    async def judge() -> None:
        shell = Shell("c0", runtime.hierarchies.group("none"), Path("none"), Channel(), pid=zygote.pid)
        try:
            check_walls(shell, zygote, zygote.plan.userns)
        finally:
            shell.channel.close()

    with pytest.raises(StepError, match=r"no capability in any set.*both system call filters.*with its zygote"):
        own.run(judge())


def judged(own: Node, cell: Cell, group: str = "") -> None:
    """Judge a container that stands once more, as if it had been given this group."""
    runtime, container = own.runtime, cell.container
    assert isinstance(runtime, NativeRuntime)
    assert isinstance(container, NativeContainer)
    zygote = runtime._workspaces["main"].nurseries["host"].zygote
    assert zygote is not None
    shell = container._shell
    if group:
        shell = dataclasses.replace(shell, group=runtime.hierarchies.group(runtime.parent, group))
    network = os.open(f"/proc/{shell.pid}/ns/net", os.O_RDONLY)
    try:
        check_walls(shell, zygote, network)
    finally:
        os.close(network)


def test_container_in_the_group_of_another_is_refused(own: Node) -> None:
    cell = own.make()
    judged(own, cell)
    with pytest.raises(StepError, match=r"not true of process .*: it is in its own control group \("):
        judged(own, cell, "c0")


def test_every_process_of_a_container_is_judged(own: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    cell, sibling = own.make(), own.make().container.pid
    cell.ask("import subprocess; os.child = subprocess.Popen(['sleep', '100']); result = 1")
    found = list(zygote_module._descendants(cell.container.pid))
    assert len(found) == 2
    judged(own, cell)
    # One that was forked before its init had sealed itself, or joined its group, looks like the agent or the zygote.
    monkeypatch.setattr(zygote_module, "_descendants", lambda _: [*found, os.getpid()])
    with pytest.raises(StepError, match=f"process {os.getpid()} of container .* is in another pid namespace"):
        judged(own, cell)
    monkeypatch.setattr(zygote_module, "_descendants", lambda _: [sibling])
    with pytest.raises(StepError, match=f"process {sibling} of container .* is in another pid namespace"):
        judged(own, cell)


def test_ended_processes_of_a_container_are_no_reason_to_refuse_it(own: Node) -> None:
    cell = own.make()
    cell.ask("pid = os.fork() or os._exit(0); os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT); result = 1")
    dead = list(zygote_module._descendants(cell.container.pid))[-1]
    assert linux.is_ending(dead)
    assert not linux.is_ending(cell.container.pid)
    judged(own, cell)


def test_zygote_that_dies_is_made_anew(own: Node) -> None:
    runtime = own.runtime
    assert isinstance(runtime, NativeRuntime)
    survivor = own.make()
    zygote = runtime._workspaces["main"].nurseries["host"].zygote
    assert zygote is not None
    os.kill(zygote.pid, signal.SIGKILL)
    own.run(asyncio.wait_for(asyncio.shield(zygote.ended), 5))
    while runtime._workspaces["main"].nurseries["host"].spares:
        own.make()
    assert own.make().ask("result = 'new'") == "new"
    assert survivor.ask("result = 'alive'") == "alive"


def test_zygote_that_hangs_is_killed_and_replaced(own: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = own.runtime
    assert isinstance(runtime, NativeRuntime)
    monkeypatch.setattr("squall.node.zygote.SHELL_TIMEOUT", 0.3)
    nursery = runtime._workspaces["main"].nurseries["host"]
    zygote = nursery.zygote
    assert zygote is not None
    os.kill(zygote.pid, signal.SIGSTOP)
    while nursery.zygote is zygote:
        assert own.make().ask("result = 'made'") == "made"
    assert not Path(f"/proc/{zygote.pid}").exists()


# ---- nothing is left --------------------------------------------------------------------------------------------


def groups_of(name: str) -> list[str]:
    return [str(path) for path in Path("/sys/fs/cgroup").glob(f"*/{name}*")] + [
        str(path) for path in Path("/sys/fs/cgroup").glob(f"{name}*")
    ]


def mounts_below(home: Path) -> list[str]:
    return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {home}/" in line]


def test_nothing_is_left_after_a_container(own: Node) -> None:
    runtime = own.runtime
    assert isinstance(runtime, NativeRuntime)
    cell = own.make()
    cell.ask("os.makedirs('/tmp/' + '/'.join(['deep'] * 500)); open('/root/file', 'w').write('x' * 100_000)")
    pid, scratch = cell.container.pid, cell.container._shell.scratch  # type: ignore[attr-defined]
    assert scratch.exists()
    cell.send("code = 0")
    cell.end()
    assert not scratch.exists()
    assert not Path(f"/proc/{pid}").exists()
    assert not any(f"/{scratch.name}" in path for path in groups_of(runtime.parent))


def test_nothing_is_left_after_the_runtime_has_closed() -> None:
    others = set(linux.children_of(os.getpid()))
    with a_node(make_native) as node:
        runtime, home = node.runtime, node.home
        assert isinstance(runtime, NativeRuntime)
        cell = node.make()
        assert cell.container.pid in linux.children_of(os.getpid())
        pids = set(linux.children_of(os.getpid())) - others
        assert mounts_below(home)
        descriptors = len(os.listdir("/proc/self/fd"))
        node.close_cells()
        node.run(runtime.close())
        assert groups_of(runtime.parent) == []
        assert mounts_below(home) == []
        assert list((home / "node" / "scratch").iterdir()) == []
        assert len(os.listdir("/proc/self/fd")) < descriptors
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "its processes are gone")


def is_running(pid: int) -> bool:
    """Whether it lives; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


AGENT = """
import asyncio, os, socket, sys
from pathlib import Path
sys.path.append({here!r})
from squall.node import linux
linux.enter_private_mounts()
from squall.node.linux import StepError
from squall.node.native import NativeRuntime
from squall.node.zygote import Channel, Shell, check_walls
from squall.node.runtime import ContainerIO
from squall.protocol.messages import ContainerSpec
async def main():
    runtime = NativeRuntime(Path({home!r}), None, entry="probe:serve")
    await runtime.start()
    a, b = socket.socketpair()
    container = await runtime.create(ContainerSpec("co-orphan"), ContainerIO(b.fileno(), 1, 2), None)
    zygote = runtime._workspaces["main"].nurseries["host"].zygote.pid
    print(container.pid, zygote, flush=True)
    await asyncio.sleep(1000)
asyncio.run(main())
"""


def test_agents_death_ends_all_and_the_next_one_sweeps(tmp_path: Path) -> None:
    here = str(Path(__file__).parents[1] / "kernel")
    code = AGENT.format(here=here, home=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as agent:
        assert agent.stdout is not None
        pids = [int(word) for word in agent.stdout.readline().split()]
        agent.kill()
    wait_until(lambda: not any(is_running(pid) for pid in pids), "what the agent made is gone")
    assert (tmp_path / "node" / "scratch" / "main").exists()
    linux.enter_private_mounts()

    async def next_life() -> None:
        runtime = NativeRuntime(tmp_path, None, entry="probe:serve")
        await runtime._open_home()
        await asyncio.get_running_loop().run_in_executor(runtime.executor, runtime._sweep)
        assert list((tmp_path / "node" / "scratch").iterdir()) == []
        assert [path for path in groups_of(runtime.parent) if os.path.basename(path) != runtime.parent] == []
        await runtime.close()
        assert groups_of(runtime.parent) == []

    asyncio.run(next_life())
