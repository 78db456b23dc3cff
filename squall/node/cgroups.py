"""Control groups of a node's containers, on cgroup v2 and v1 (also mixed): create, limit, join, read, kill, remove.

Owns one directory per hierarchy, named after the home, and all groups below it: whatever has that name is ours, and
`sweep` may kill it. Must never touch another group, nor believe a limit it has not written. Nothing is kept in
memory: the directories are the truth. Tested in `tests/kernel/test_cgroups.py`, on directories that look like either
version and on the real ones.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

from squall.protocol.messages import ContainerSpec

PERIOD_US = 100_000
UNLIMITED_V1 = -1
NEEDED = ("memory", "pids", "cpu")
ROOT = Path("/sys/fs/cgroup")


def parent_name(home: Path) -> str:
    """One name per home, so that two homes on a machine never touch each other's containers."""
    return f"squall-{hashlib.blake2b(os.fsencode(home.resolve()), digest_size=6).hexdigest()}"


def cpu_shares(cpu: float) -> int:
    return max(2, min(262_144, int(cpu * 1024)))


def cpu_weight(cpu: float) -> int:
    """v2's weight for v1's shares, by the formula container runtimes agree on."""
    return 1 + ((cpu_shares(cpu) - 2) * 9999) // 262_142


def _write(path: str, value: object) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, str(value).encode())
    finally:
        os.close(fd)


def _write_if_known(path: str, value: object) -> None:
    """For files that some kernels lack (swap accounting, `memory.oom.group`)."""
    with contextlib.suppress(FileNotFoundError):
        _write(path, value)


def _read(path: str) -> str:
    """All of a file, without the buffers and codecs that `open` makes: each container costs dozens of these."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = piece = os.read(fd, 4096)
        while piece:  # the kernel may give less than there is
            piece = os.read(fd, 65536)
            data += piece
    finally:
        os.close(fd)
    return data.decode("ascii")


def _table(path: str) -> dict[str, int]:
    """A file of `key value` lines; empty when the group is gone."""
    try:
        lines = _read(path).splitlines()
    except OSError:
        return {}
    return {key: int(value) for key, _, value in (line.partition(" ") for line in lines) if value.isdigit()}


def _number(path: str) -> int:
    try:
        text = _read(path).strip()
    except OSError:
        return 0
    return int(text) if text.isdigit() else 0


class Cgroup(ABC):
    """One group: a directory in each hierarchy of the machine."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def create(self) -> None:
        for path in self.paths:
            with contextlib.suppress(FileExistsError):
                os.mkdir(path)

    def join(self, pid: int) -> None:
        """Move a process in, all hierarchies. After a pause the kernel waits a grace period (6-28 ms): use a thread."""
        for path in self.paths:
            _write(f"{path}/cgroup.procs", pid)

    @abstractmethod
    def join_self(self) -> None:
        """Move the calling process, which has one thread, in; without the wait where the kernel allows it."""

    def pids(self) -> list[int]:
        found: set[int] = set()
        for path in self.paths:
            with contextlib.suppress(OSError):
                found.update(int(line) for line in _read(f"{path}/cgroup.procs").split())
        return sorted(found)

    @abstractmethod
    def holds(self, pid: int) -> bool:
        """Whether a process is in it, in every hierarchy with one of our limits, by the kernel's word."""

    def kill(self) -> None:
        """SIGKILL everything in it. New processes may be born meanwhile: repeat until `pids` is empty."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def remove(self, timeout: float = 5.0) -> None:
        """Kill what is left and delete it; a group stays busy for a moment after its last process."""
        deadline = time.monotonic() + timeout
        for path in self.paths:
            while not _remove_tree(path):
                if time.monotonic() > deadline:
                    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)
                self.kill()
                time.sleep(0.002)

    @abstractmethod
    def limit(self, spec: ContainerSpec) -> None: ...

    @abstractmethod
    def bound(self, *, memory_bytes: int = 0, pids: int = 0) -> None:
        """Limits of a group that is not a container's; 0 for none."""

    @abstractmethod
    def usage(self) -> dict[str, float]:
        """`cpu_seconds`, `memory_bytes`, `memory_peak_bytes`; what cannot be read is left out."""

    @abstractmethod
    def oom_kills(self) -> int: ...


def _remove_tree(path: str) -> bool:
    """Delete a group and the groups below it; false while one is busy."""
    with contextlib.suppress(OSError):
        os.rmdir(path)  # most have none below them, and dozens of files to look through
        return True
    try:
        for entry in os.scandir(path):
            if entry.is_dir(follow_symlinks=False) and not _remove_tree(entry.path):
                return False
        os.rmdir(path)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno in (errno.EBUSY, errno.ENOTEMPTY):
            return False
        raise
    return True


def _places(pid: int) -> dict[str, str]:
    """Controller -> the group a process is in; the controller of version two is the empty word."""
    places = {}
    for line in _read(f"/proc/{pid}/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        places.update(dict.fromkeys(controllers.split(","), path))
    return places


def _is_at(path: str, place: str | None) -> bool:
    """Whether a directory below the mount of a hierarchy is what the kernel calls `place`.

    The two begin differently where a cgroup namespace or a bind mount hides the upper levels; the home's own group
    and that of the container in it are at the end of both.
    """
    return place is not None and place.split("/")[-2:] == path.split("/")[-2:]


class CgroupV2(Cgroup):
    def holds(self, pid: int) -> bool:
        return _is_at(self.paths[0], _places(pid).get(""))

    def join_self(self) -> None:
        self.join(0)

    def limit(self, spec: ContainerSpec) -> None:
        path = self.paths[0]
        self.bound(memory_bytes=spec.memory_limit_mib << 20, pids=spec.pids_limit)
        _write_if_known(f"{path}/memory.oom.group", 1)
        _write(f"{path}/cpu.weight", cpu_weight(spec.cpu))
        quota = quota_us(spec)
        _write(f"{path}/cpu.max", f"{quota or 'max'} {PERIOD_US}")

    def bound(self, *, memory_bytes: int = 0, pids: int = 0) -> None:
        path = self.paths[0]
        _write(f"{path}/memory.max", memory_bytes or "max")
        _write_if_known(f"{path}/memory.swap.max", 0)
        _write(f"{path}/pids.max", pids or "max")

    def usage(self) -> dict[str, float]:
        path = self.paths[0]
        cpu = _table(f"{path}/cpu.stat").get("usage_usec", 0) / 1e6
        now = _number(f"{path}/memory.current")
        return _known(cpu_seconds=cpu, memory_bytes=now, memory_peak_bytes=_number(f"{path}/memory.peak") or now)

    def oom_kills(self) -> int:
        return _table(f"{self.paths[0]}/memory.events").get("oom_kill", 0)


class CgroupV1(Cgroup):
    """One directory per hierarchy; `by` maps each controller to the one that has it (they may be mounted together)."""

    def __init__(self, by: dict[str, str]) -> None:
        super().__init__(list(dict.fromkeys(by.values())))
        self.by = by

    def holds(self, pid: int) -> bool:
        places = _places(pid)
        return all(_is_at(path, places.get(controller)) for controller, path in self.by.items())

    def join_self(self) -> None:
        for path in self.paths:
            _write(f"{path}/tasks", 0)  # a single task that moves itself needs no lock against its own end

    def limit(self, spec: ContainerSpec) -> None:
        self.bound(memory_bytes=spec.memory_limit_mib << 20, pids=spec.pids_limit)
        cpu = self.by.get("cpu")
        if cpu is None:
            return
        _write(f"{cpu}/cpu.shares", cpu_shares(spec.cpu))
        quota = quota_us(spec)
        if quota:
            _write_if_known(f"{cpu}/cpu.cfs_period_us", PERIOD_US)
            _write_if_known(f"{cpu}/cpu.cfs_quota_us", quota)

    def bound(self, *, memory_bytes: int = 0, pids: int = 0) -> None:
        memory, tasks = self.by.get("memory"), self.by.get("pids")
        if memory is not None and memory_bytes:
            _write(f"{memory}/memory.limit_in_bytes", memory_bytes)
            # Memory and swap together at the same number: no swap. Only in this order may both shrink.
            _write_if_known(f"{memory}/memory.memsw.limit_in_bytes", memory_bytes)
        if tasks is not None and pids:
            _write(f"{tasks}/pids.max", pids)

    def usage(self) -> dict[str, float]:
        memory, cpu = self.by.get("memory"), self.by.get("cpuacct")
        return _known(
            cpu_seconds=_number(f"{cpu}/cpuacct.usage") / 1e9 if cpu else 0,
            memory_bytes=_number(f"{memory}/memory.usage_in_bytes") if memory else 0,
            memory_peak_bytes=_number(f"{memory}/memory.max_usage_in_bytes") if memory else 0,
        )

    def oom_kills(self) -> int:
        memory = self.by.get("memory")
        return _table(f"{memory}/memory.oom_control").get("oom_kill", 0) if memory else 0


def _known(**values: float) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if value}


def quota_us(spec: ContainerSpec) -> int:
    """CPU time per period; 0 when the limit is above what the machine has, and so no limit."""
    cores = spec.cpu_limit or spec.cpu + 16
    return 0 if cores >= (os.cpu_count() or 1) else max(1000, int(cores * PERIOD_US))


class Hierarchies:
    """What this machine has: where each controller is, and of which version."""

    def __init__(self, unified: str | None, v1: dict[str, str]) -> None:
        self.unified = unified
        self.v1 = v1

    @classmethod
    def detect(cls, mounts: str = "/proc/self/mounts") -> Hierarchies:
        """v2 when it has all we need, else v1: a hybrid machine leaves the v2 tree empty of controllers."""
        v1: dict[str, str] = {}
        for line in Path(mounts).read_text().splitlines():
            _, target, kind, options = line.split()[:4]
            if kind == "cgroup2" and not _missing(target):
                return cls(target, {})
            if kind == "cgroup":
                v1.update({c: target for c in (*NEEDED, "cpuacct") if c in options.split(",")})
        return cls(None, v1)

    @property
    def version(self) -> int:
        return 2 if self.unified else 1

    def problems(self) -> list[str]:
        places = [self.unified] if self.unified else list(self.v1.values())
        if not self.unified and not {"memory", "pids"} <= set(self.v1):
            return [
                "no cgroup hierarchy with the memory and pids controllers is mounted: mount cgroup2 at `/sys/fs/cgroup`"
            ]
        closed = sorted({place for place in places if not _is_writable(place)})
        if closed:
            return [
                f"`{closed[0]}` is read-only, so containers could not be limited: inside Docker, run with "
                "`--privileged --cgroupns=private`, or `mount -o remount,rw` it"
            ]
        return []

    def warnings(self) -> list[str]:
        if self.unified or "cpu" in self.v1:
            return []
        return ["the cpu cgroup controller is not mounted: containers share the processors without limits"]

    def group(self, *names: str) -> Cgroup:
        path = "/".join(names)
        if self.unified:
            return CgroupV2([f"{self.unified}/{path}"])
        return CgroupV1({controller: f"{place}/{path}" for controller, place in self.v1.items()})

    def prepare(self, parent: str) -> Cgroup:
        """Make the parent group and, on v2, let its children have the controllers."""
        group = self.group(parent)
        if self.unified:
            _enable(self.unified)
        group.create()
        if self.unified:
            _enable(group.paths[0])
        return group

    def children(self, parent: str) -> Iterator[str]:
        """Names of the groups below the parent, in any hierarchy."""
        names: set[str] = set()
        for path in self.group(parent).paths:
            with contextlib.suppress(FileNotFoundError):
                names.update(entry.name for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False))
        yield from sorted(names)


def _missing(unified: str) -> set[str]:
    try:
        return set(NEEDED) - set(_read(f"{unified}/cgroup.controllers").split())
    except OSError:
        return set(NEEDED)


def _is_writable(path: str) -> bool:
    return os.access(path, os.W_OK) and not os.statvfs(path).f_flag & os.ST_RDONLY


def _enable(path: str) -> None:
    """Hand the controllers to the groups below `path`."""
    if set(NEEDED) <= set(_read(f"{path}/cgroup.subtree_control").split()):
        return
    wanted = " ".join(f"+{controller}" for controller in NEEDED)
    try:
        _write(f"{path}/cgroup.subtree_control", wanted)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        # The root of a container's own cgroup namespace holds processes, and a group may have processes or
        # controllers for its children, not both ("no internal processes"): put them one level down.
        leaf = f"{path}/init"
        with contextlib.suppress(FileExistsError):
            os.mkdir(leaf)
        for pid in _read(f"{path}/cgroup.procs").split():
            with contextlib.suppress(ProcessLookupError):
                _write(f"{leaf}/cgroup.procs", pid)
        _write(f"{path}/cgroup.subtree_control", wanted)


def sweep(hierarchies: Hierarchies, parent: str) -> int:
    """Kill and remove all that an earlier agent of this home left. How many groups there were."""
    names = list(hierarchies.children(parent))
    for name in names:
        hierarchies.group(parent, name).kill()
    for name in names:
        hierarchies.group(parent, name).remove()
    return len(names)


def is_empty(group: Cgroup) -> bool:
    """Whether no process is in a group or below it, in any hierarchy."""
    for root in group.paths:
        for directory, _, files in os.walk(root):
            if "cgroup.procs" in files and _read(f"{directory}/cgroup.procs").strip():
                return False
    return True


def remove_empty(group: Cgroup) -> None:
    """Delete a group and those below it; raises where a process has come in, as the kernel does."""
    for path in group.paths:
        if not _remove_tree(path):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)
