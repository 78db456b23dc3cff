"""What must be impossible from inside a build, whose command is root with a few capabilities in its namespace."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from squall.node import privileges, rootfs
from squall.node.native import NativeRuntime
from squall.node.runtime import Build, Exit
from squall.protocol.messages import ContainerSpec, new_id
from tests.kernel.containers import Node, a_node, make_native

pytestmark = pytest.mark.root

PYTHON = "/usr/bin/python3"


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with a_node(make_native) as node:
        yield node


class Outcome:
    def __init__(self, end: Exit, output: str, files: Path) -> None:
        self.end = end
        self.output = output
        self.files = files
        """What it wrote, as the node's root sees it."""


def build(node: Node, tmp_path: Path, *command: str, **fields: object) -> Outcome:
    runtime = node.runtime
    assert isinstance(runtime, NativeRuntime)
    place = runtime.node_dir / new_id("test")

    def harvest(scratch: Path) -> None:
        (scratch / "u").rename(place)

    async def run() -> Exit:
        with open(tmp_path / "output", "wb") as output:  # noqa: ASYNC230 - nothing else runs
            plan = Build(
                ContainerSpec(new_id("bd")), None, list(command), {"HOME": "/root"}, "/", [], output.fileno(), harvest
            )
            for name, value in fields.items():
                setattr(plan, name, value)
            container = await runtime.build(plan)
        return await asyncio.wait_for(container.wait(), 30)

    end = node.run(run())
    return Outcome(end, (tmp_path / "output").read_text(), place)


def python(node: Node, tmp_path: Path, code: str, **fields: object) -> Outcome:
    return build(node, tmp_path, PYTHON, "-c", code, **fields)


def refused(node: Node, tmp_path: Path, code: str) -> bool:
    """Whether the kernel refused what `code` tries."""
    tried = f"import os, ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n{code}\nprint('it was allowed')"
    return "it was allowed" not in python(node, tmp_path, tried).output


def test_build_runs_its_command_and_its_files_are_handed_over(node: Node, tmp_path: Path) -> None:
    outcome = build(node, tmp_path, "/bin/sh", "-c", "echo said; echo kept > /made; exit 3")
    assert (outcome.end.code, outcome.output) == (3, "said\n")
    assert (outcome.files / "made").read_text() == "kept\n"


def test_build_is_root_of_its_own_namespace_only(node: Node, tmp_path: Path) -> None:
    outcome = python(node, tmp_path, "import os; print(os.getuid(), open('/proc/self/uid_map').read().split()[1:])")
    uid, _, mapped = outcome.output.strip().partition(" ")
    assert uid == "0"
    assert int(json.loads(mapped.replace("'", '"'))[0]) >= privileges.id_base(0)


def test_build_has_the_few_capabilities_it_needs_and_no_more(node: Node, tmp_path: Path) -> None:
    outcome = python(node, tmp_path, "print(open('/proc/self/status').read())")
    lines = dict(line.split(":", 1) for line in outcome.output.splitlines() if ":" in line)
    for name in ("CapPrm", "CapEff", "CapBnd"):
        assert int(lines[name], 16) == privileges.BUILD_CAPABILITIES
    assert lines["NoNewPrivs"].strip() == "1"
    assert lines["Seccomp"].strip() == "2"


def test_build_may_give_files_owners_and_modes(node: Node, tmp_path: Path) -> None:
    code = "import os; open('/f', 'w').close(); os.chown('/f', 42, 43); os.chmod('/f', 0o4755)"
    outcome = python(node, tmp_path, code)
    assert outcome.end.code == 0, outcome.output
    status = (outcome.files / "f").stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (42, 43, 0o4755)


@pytest.mark.parametrize(
    "code",
    [
        "assert libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0",
        "assert libc.umount2(b'/proc', 2) == 0",
        "assert libc.unshare(0x10000000) == 0",
        "assert libc.unshare(0x00020000) == 0",
        "os.chroot('/tmp')",
        "assert libc.ptrace(16, 1, 0, 0) == 0",
        "os.mknod('/disk', 0o60666, os.makedev(8, 0))",
        "assert libc.syscall(321, 0, 0, 0) >= 0",
        "open('/proc/sysrq-trigger', 'w').write('h')",
        "open('/proc/sys/kernel/hostname', 'w').write('x')",
        "open('/usr/bin/nonsense', 'w')",
        "open('/etc/shadow').read()",
        "os.listdir('/proc/1/root/../home')[0]",
    ],
)
def test_build_cannot(node: Node, tmp_path: Path, code: str) -> None:
    assert refused(node, tmp_path, code)


def test_build_cannot_see_the_nodes_files(node: Node, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    tmp_path.chmod(0o777)
    outcome = python(
        node, tmp_path, f"import os; print(os.path.exists({str(tmp_path)!r}), os.listdir('/.squall/lower'))"
    )
    assert outcome.output == "False []\n"


def test_build_sees_no_process_but_its_own(node: Node, tmp_path: Path) -> None:
    outcome = python(node, tmp_path, "import os; print(sorted(int(p) for p in os.listdir('/proc') if p.isdigit()))")
    assert outcome.output == "[1, 2]\n"


def test_build_holds_no_descriptor_of_the_agents(node: Node, tmp_path: Path) -> None:
    code = "import os; print(sorted(map(int, os.listdir('/proc/self/fd'))))"
    assert python(node, tmp_path, code).output == "[0, 1, 2, 3]\n"  # 3 is the listing's own


def test_build_gets_none_of_the_agents_environment(node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert "secret" not in python(node, tmp_path, "import os; print(os.environ)").output


def test_what_is_shown_read_only_cannot_be_written_to(node: Node, tmp_path: Path) -> None:
    shown = tmp_path / "shown"
    shown.mkdir()
    (shown / "file").write_text("before")
    outcome = python(
        node, tmp_path, "open('/.squall/inputs/file', 'w').write('after')", mounts=[(shown, "/.squall/inputs", False)]
    )
    assert "Read-only file system" in outcome.output
    assert (shown / "file").read_text() == "before"


def test_layers_below_a_build_stay_as_they_are(node: Node, tmp_path: Path) -> None:
    runtime = node.runtime
    assert isinstance(runtime, NativeRuntime)
    layer = build(node, tmp_path, "/bin/sh", "-c", "mkdir /mine; echo before > /mine/file").files
    # The layer has no shell of its own: this machine's is shown beside it.
    shown = ["/usr", *(path for path in ("/lib", "/lib64") if os.path.isdir(path))]
    root = rootfs.image_root(runtime.node_dir, [layer], [(path, path) for path in shown], {})
    outcome = build(
        node, tmp_path, PYTHON, "-c", "open('/mine/file', 'w').write('after'); import os; os.mkdir('/new')",
        layers=root.layers, mounts=[(Path(path), path, False) for path in shown],
    )  # fmt: skip
    assert outcome.end.code == 0, outcome.output
    assert (layer / "mine/file").read_text() == "before\n"
    assert (outcome.files / "mine/file").read_text() == "after"
    assert (outcome.files / "new").is_dir()


def test_build_that_is_killed_leaves_no_process_and_no_scratch(node: Node, tmp_path: Path) -> None:
    runtime = node.runtime
    assert isinstance(runtime, NativeRuntime)

    async def run() -> Exit:
        with open(tmp_path / "output", "wb") as output:  # noqa: ASYNC230 - nothing else runs
            plan = Build(
                ContainerSpec(new_id("bd")), None, ["/bin/sh", "-c", "sleep 1000 & sleep 1000"], {}, "/", [],
                output.fileno(), lambda scratch: None,
            )  # fmt: skip
            container = await runtime.build(plan)
        container.kill("a test")
        return await asyncio.wait_for(container.wait(), 10)

    assert node.run(run()).reason == "a test"
    assert not list((runtime.node_dir / "scratch/main").glob("b*"))
