"""Control groups: what is written where on either version, on trees that look like the kernel's and on the real one."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from squall.node import cgroups
from squall.node.cgroups import Cgroup, Hierarchies
from squall.protocol.messages import ContainerSpec
from tests.conftest import wait_until

V2_FILES = ("cgroup.procs", "memory.max", "memory.swap.max", "memory.oom.group", "cpu.weight", "cpu.max", "pids.max")
V1_FILES = {
    "memory": ("cgroup.procs", "tasks", "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"),
    "cpu": ("cgroup.procs", "tasks", "cpu.shares", "cpu.cfs_period_us", "cpu.cfs_quota_us"),
    "cpuacct": ("cgroup.procs", "tasks", "cpuacct.usage"),
    "pids": ("cgroup.procs", "tasks", "pids.max"),
}


def unified(root: Path, controllers: str = "cpuset cpu io memory pids") -> Hierarchies:
    """A machine with cgroup v2 alone, as far as files can tell."""
    tree = root / "unified"
    tree.mkdir()
    (tree / "cgroup.controllers").write_text(controllers + "\n")
    (tree / "cgroup.subtree_control").write_text("")
    (tree / "cgroup.procs").write_text("")
    mounts = root / "mounts"
    mounts.write_text(f"cgroup2 {tree} cgroup2 rw,nosuid 0 0\n")
    return Hierarchies.detect(str(mounts))


def hybrid(root: Path) -> Hierarchies:
    """A machine whose controllers are all v1, beside a v2 tree that has none."""
    (root / "unified").mkdir()
    (root / "unified" / "cgroup.controllers").write_text("\n")
    lines = [f"cgroup2 {root}/unified cgroup2 rw 0 0"]
    for controller in V1_FILES:
        (root / controller).mkdir()
        lines.append(f"cgroup {root}/{controller} cgroup rw,relatime,{controller} 0 0")
    (root / "mounts").write_text("\n".join(lines) + "\n")
    return Hierarchies.detect(str(root / "mounts"))


def made(group: Cgroup) -> Cgroup:
    """Create it, with the files a kernel would put into it."""
    group.create()
    for path in group.paths:
        for name in V1_FILES.get(Path(path).parent.parent.name, V2_FILES):
            (Path(path) / name).write_text("")
    return group


def files(group: Cgroup) -> dict[str, str]:
    return {
        file.name: file.read_text()
        for path in group.paths
        for file in Path(path).iterdir()
        if file.is_file() and file.read_text()
    }


def group_of(machine: Hierarchies) -> Cgroup:
    machine.group("squall-x").create()
    return made(machine.group("squall-x", "c1"))


def test_unified_tree_with_all_controllers_is_version_two(tmp_path: Path) -> None:
    machine = unified(tmp_path)
    assert (machine.version, machine.problems(), machine.warnings()) == (2, [], [])


def test_empty_unified_tree_is_passed_over_for_version_one(tmp_path: Path) -> None:
    machine = hybrid(tmp_path)
    assert (machine.version, machine.problems(), machine.warnings()) == (1, [], [])
    assert set(machine.v1) == {"memory", "cpu", "cpuacct", "pids"}


def test_controllers_mounted_together_share_a_directory(tmp_path: Path) -> None:
    (tmp_path / "both").mkdir()
    (tmp_path / "mounts").write_text(f"cgroup {tmp_path}/both cgroup rw,cpu,cpuacct 0 0\n")
    assert Hierarchies.detect(str(tmp_path / "mounts")).group("a", "b").paths == [f"{tmp_path}/both/a/b"]


def test_machine_without_memory_controller_is_a_problem_with_its_fix(tmp_path: Path) -> None:
    (tmp_path / "mounts").write_text("")
    assert "mount cgroup2 at" in Hierarchies.detect(str(tmp_path / "mounts")).problems()[0]


def test_limits_are_written_in_the_words_of_version_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    group = group_of(unified(tmp_path))
    group.limit(ContainerSpec("co-1", cpu=1.0, cpu_limit=2.5, memory_limit_mib=128, pids_limit=99))
    assert files(group) == {
        "memory.max": str(128 << 20),
        "memory.swap.max": "0",
        "memory.oom.group": "1",
        "cpu.weight": "39",
        "cpu.max": "250000 100000",
        "pids.max": "99",
    }


def test_limits_are_written_in_the_words_of_version_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    group = group_of(hybrid(tmp_path))
    group.limit(ContainerSpec("co-1", cpu=0.5, cpu_limit=0.25, memory_limit_mib=64, pids_limit=99))
    assert files(group) == {
        "memory.limit_in_bytes": str(64 << 20),
        "memory.memsw.limit_in_bytes": str(64 << 20),
        "cpu.shares": "512",
        "cpu.cfs_period_us": "100000",
        "cpu.cfs_quota_us": "25000",
        "pids.max": "99",
    }


def test_container_without_limits_gets_none(tmp_path: Path) -> None:
    group = group_of(unified(tmp_path))
    group.limit(ContainerSpec("co-1"))
    assert (files(group)["memory.max"], files(group)["cpu.max"]) == ("max", "max 100000")


def test_swap_accounting_may_be_missing(tmp_path: Path) -> None:
    group = group_of(hybrid(tmp_path))
    Path(f"{tmp_path}/memory/squall-x/c1/memory.memsw.limit_in_bytes").unlink()
    group.limit(ContainerSpec("co-1", memory_limit_mib=64))
    assert files(group)["memory.limit_in_bytes"] == str(64 << 20)


@pytest.mark.parametrize("make", [unified, hybrid])
def test_process_joins_every_hierarchy(tmp_path: Path, make: object) -> None:
    assert callable(make)
    group = group_of(make(tmp_path))
    group.join(4711)
    assert all((Path(path) / "cgroup.procs").read_text() == "4711" for path in group.paths)


def test_use_is_read_from_version_two(tmp_path: Path) -> None:
    group = group_of(unified(tmp_path))
    here = Path(group.paths[0])
    (here / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 1\n")
    (here / "memory.current").write_text("1000\n")
    (here / "memory.peak").write_text("3000\n")
    (here / "memory.events").write_text("low 0\noom 2\noom_kill 1\n")
    assert group.usage() == {"cpu_seconds": 2.5, "memory_bytes": 1000.0, "memory_peak_bytes": 3000.0}
    assert group.oom_kills() == 1


def test_use_is_read_from_version_one(tmp_path: Path) -> None:
    group = group_of(hybrid(tmp_path))
    (tmp_path / "cpuacct/squall-x/c1/cpuacct.usage").write_text("1500000000\n")
    (tmp_path / "memory/squall-x/c1/memory.usage_in_bytes").write_text("10\n")
    (tmp_path / "memory/squall-x/c1/memory.max_usage_in_bytes").write_text("20\n")
    (tmp_path / "memory/squall-x/c1/memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
    assert group.usage() == {"cpu_seconds": 1.5, "memory_bytes": 10.0, "memory_peak_bytes": 20.0}
    assert group.oom_kills() == 3


def test_use_of_a_group_that_is_gone_is_empty(tmp_path: Path) -> None:
    group = unified(tmp_path).group("squall-x", "gone")
    assert (group.usage(), group.oom_kills(), group.pids()) == ({}, 0, [])
    group.remove()


def test_preparing_hands_controllers_down_and_moves_processes_out_of_the_way(tmp_path: Path) -> None:
    machine = unified(tmp_path)
    tree = tmp_path / "unified"
    (tree / "squall-x").mkdir()
    (tree / "squall-x" / "cgroup.subtree_control").write_text("cpu memory pids")
    machine.prepare("squall-x")
    assert (tree / "cgroup.subtree_control").read_text() == "+memory +pids +cpu"
    assert (tree / "squall-x" / "cgroup.subtree_control").read_text() == "cpu memory pids"


def test_parent_is_named_after_the_home() -> None:
    one, other = cgroups.parent_name(Path("/a")), cgroups.parent_name(Path("/b"))
    assert one != other
    assert one == cgroups.parent_name(Path("/a/../a"))


def test_weight_follows_shares() -> None:
    assert [cgroups.cpu_weight(cpu) for cpu in (0.001, 1, 256)] == [1, 39, 10000]


@pytest.mark.root
def test_sweep_kills_and_removes_only_what_is_ours() -> None:
    machine = Hierarchies.detect()
    ours, others = "squall-test-ours", "squall-test-others"
    children = []
    try:
        for parent in (ours, others):
            machine.prepare(parent)
            group = machine.group(parent, "c1")
            group.create()
            children.append(subprocess.Popen(["sleep", "1000"]))
            group.join(children[-1].pid)
            assert group.pids() == [children[-1].pid]
        assert cgroups.sweep(machine, ours) == 1
        assert children[0].wait(5) == -signal.SIGKILL
        assert children[1].poll() is None
        assert list(machine.children(ours)) == []
    finally:
        for child in children:
            child.kill()
            child.wait()
        for parent in (ours, others):
            machine.group(parent).remove()
    wait_until(lambda: not any(Path(p).exists() for p in machine.group(ours).paths), "the group is gone")
