"""Roots of containers on a node: what an image shows, where it is mounted for a zygote, and scratch directories.

Owns `layers/`, `scratch/` and `mounts/` under the node's directory (0700: it holds tenants' files). All mounts are made
in the agent's private mount namespace, read-only where a container may not write, and copied into a zygote's with
their flags locked, so no tenant can change them. Files on disk have ids from 0 up; idmapped mounts show them to a
workspace as its own. Host files are not idmapped: they show as nobody's, so what only root may read stays unreadable.
Must never follow a path that a container could have made. Tested in `tests/kernel/test_rootfs.py`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import squall
from squall import _linux
from squall._linux import ATTR_NODEV, ATTR_NOEXEC, ATTR_NOSUID, ATTR_RDONLY
from squall.node import linux
from squall.node.linux import StepError

SKELETON_VERSION = 2
HIDDEN = ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV

_SYSTEM = ("/usr", "/etc", "/opt")
_MERGED = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
"""Directories of their own on old systems, links into /usr on new ones."""
_NEVER = frozenset(
    ("/", "/boot", "/dev", "/home", "/media", "/mnt", "/proc", "/root", "/run", "/src", "/srv", "/sys", "/tmp", "/var",
     "/var/lib", "/var/tmp", "/.squall")
)  # fmt: skip
"""Too much, or needed writable: an import path may lie in one of these but not be one."""

_DIRECTORIES = (
    "dev", "home", "media", "mnt", "opt", "proc", "root", "run", "src", "srv", "sys", "tmp", "var", "var/cache",
    "var/lib", "var/log", "var/tmp", ".squall", ".squall/box", ".squall/lower", ".squall/new", ".squall/scratch",
)  # fmt: skip
_MODES = {"tmp": 0o1777, "var/tmp": 0o1777, "root": 0o700, ".squall": 0o700}
_DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}
_DEVICE_LINKS = {"ptmx": "pts/ptmx", "fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}


@dataclass(frozen=True)
class Root:
    """What a container of one image sees before it writes anything."""

    key: str
    skeleton: Path
    binds: tuple[str, ...]
    """Host paths shown read-only at the same place, none below another."""
    overrides: dict[str, str]
    """`hosts`, `hostname`, `resolv.conf` -> the path the container's own is mounted over."""
    python: str
    import_paths: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    """Import paths that are not shown, because with them too much would be."""
    layers: tuple[Path, ...] = ()
    """Of an image that was built, the topmost first; its skeleton is the lowest. None for `Image.host()`."""
    mounts: tuple[tuple[str, str], ...] = ()
    """Host path and target of what is shown read-only in every container of an image that was built."""
    environment: tuple[tuple[str, str], ...] = ()
    """What its containers need to find those."""


# ---- Image.host() -----------------------------------------------------------------------------------------------


def _is_below(path: str, parents: Iterable[str]) -> bool:
    return any(path == parent or path.startswith(f"{parent}/") for parent in parents)


def _collapse(paths: Iterable[str]) -> tuple[str, ...]:
    kept: list[str] = []
    for path in sorted(set(paths)):
        if not _is_below(path, kept):
            kept.append(path)
    return tuple(kept)


def import_paths(home: Path, entries: list[str] | None = None) -> tuple[list[str], list[str]]:
    """What this Python imports from, less the directory of the script or the current one; and what is left out."""
    entries = list(sys.path) if entries is None else entries
    script = os.path.dirname(os.path.abspath(sys.argv[0])) if sys.argv and sys.argv[0] else ""
    named = [os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    is_safe = not entries or getattr(sys.flags, "safe_path", False) or entries[0] in named
    if not is_safe and (entries[0] == "" or os.path.abspath(entries[0]) in (os.getcwd(), script)):
        entries = entries[1:]
    shown: list[str] = []
    skipped: list[str] = []
    for path in dict.fromkeys(os.path.abspath(entry) for entry in entries if entry and os.path.exists(entry)):
        too_much = path in _NEVER or _is_below(str(home.resolve()), [os.path.realpath(path)])
        (skipped if too_much else shown).append(path)
    return shown, skipped


def _executable_paths() -> Iterator[str]:
    """The interpreter, as each link on the way to it names it."""
    path = os.path.abspath(sys.executable)
    for _ in range(40):
        yield os.path.dirname(path)
        if not os.path.islink(path):
            return
        path = os.path.abspath(os.path.join(os.path.dirname(path), os.readlink(path)))


def _python_paths(shown: list[str]) -> Iterator[str]:
    for prefix in (sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix):
        yield os.path.abspath(prefix)
        yield os.path.realpath(prefix)
    yield from shown
    yield str(Path(squall.__file__).resolve().parent)
    yield os.path.dirname(os.path.abspath(squall.__file__))
    yield from _executable_paths()


def host_root(node_dir: Path) -> Root:
    """`Image.host()`: the system's directories and exactly what this Python needs, even below a closed home."""
    shown, skipped = import_paths(node_dir.parent)
    links = {path: os.readlink(path) for path in _MERGED if os.path.islink(path)}
    system = [path for path in (*_SYSTEM, *_MERGED) if os.path.isdir(path) and path not in links]

    def through_links(path: str) -> str:
        return os.path.realpath(path) if _is_below(path, links) else path

    wanted = {through_links(path) for path in _python_paths(shown)} - _NEVER
    binds = _collapse([*system, *(path for path in wanted if os.path.exists(path))])
    overrides = {name: os.path.realpath(f"/etc/{name}") for name in ("hosts", "hostname", "resolv.conf")}
    overrides = {
        name: target
        for name, target in overrides.items()
        if os.path.isfile(target) or not _is_below(target, binds)  # nothing can be made below a read-only bind
    }
    key = _key([SKELETON_VERSION, binds, links, overrides])
    places = {path: os.path.isdir(path) for path in binds}
    skeleton = _make_skeleton(node_dir / "layers" / f"host-{key}", places, links, overrides)
    packages = str(Path(squall.__file__).resolve().parent.parent)
    return Root(key, skeleton, binds, overrides, sys.executable, (*shown, packages), tuple(skipped))


def _key(value: object) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


# ---- images that were built -------------------------------------------------------------------------------------

INSIDE = "/.squall"
IMAGE_OVERRIDES = {name: f"/etc/{name}" for name in ("hosts", "hostname", "resolv.conf")}


def image_root(
    node_dir: Path, layers: Iterable[Path], mounts: Iterable[tuple[str, str]], environment: Mapping[str, str]
) -> Root:
    """An image made of layers, the topmost first, with Squall and the host's package files shown in it.

    What is shown needs a place to be mounted at, and none of that may end up in a layer: it lies in a skeleton, the
    lowest layer of all.
    """
    wanted = tuple(sorted(set(mounts)))
    targets = {target: os.path.isdir(path) for path, target in wanted}
    key = _key([SKELETON_VERSION, sorted(targets.items())])
    skeleton = _make_skeleton(node_dir / "layers" / f"places-{key}", targets, {}, IMAGE_OVERRIDES)
    stacked = (*layers, skeleton)
    return Root(
        _key([key, [str(layer) for layer in stacked]]), skeleton, (), dict(IMAGE_OVERRIDES), "python3",
        (f"{INSIDE}/lib",), layers=stacked, mounts=wanted, environment=tuple(sorted(environment.items())),
    )  # fmt: skip


def squall_mounts() -> list[tuple[str, str]]:
    """Squall itself and the one package it loads in containers, for images that have neither."""
    import cloudpickle

    package = os.path.dirname(os.path.abspath(squall.__file__))
    pickler = os.path.dirname(os.path.abspath(cloudpickle.__file__))
    return [(package, f"{INSIDE}/lib/squall"), (pickler, f"{INSIDE}/lib/cloudpickle")]


def _make_skeleton(target: Path, places: Mapping[str, bool], links: dict[str, str], overrides: dict[str, str]) -> Path:
    """The layer below every container of the image: empty directories, links, and places (path -> is a directory) to
    mount on."""
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=target.parent))
    building.chmod(0o755)
    for name in _DIRECTORIES:
        _make_directory(building / name, _MODES.get(name, 0o755))
    for path, is_directory in places.items():
        _make_mount_point(building / path[1:], is_directory=is_directory)
    for path in overrides.values():
        if not _is_below(path, places):
            _make_mount_point(building / path[1:], is_directory=False)
    for path, where in links.items():
        (building / path[1:]).symlink_to(where)
    with contextlib.suppress(FileExistsError):
        (building / "var/run").symlink_to("../run")
    try:
        building.rename(target)
    except OSError:  # another agent of this home made it meanwhile
        shutil.rmtree(building)
    return target


def _make_directory(path: Path, mode: int = 0o755) -> None:
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(mode)


def _make_mount_point(path: Path, *, is_directory: bool) -> None:
    missing = [parent for parent in path.parents if not parent.exists()]
    for parent in reversed(missing):
        _make_directory(parent)
    if is_directory:
        path.mkdir(exist_ok=True)
    elif not path.exists():
        path.touch(0o644)


# ---- mounted for zygotes ----------------------------------------------------------------------------------------


def make_device_template(target: Path) -> None:
    """A tree with real device nodes, made by the node's root, that every container shows read-only as its /dev."""
    target.mkdir(parents=True, exist_ok=True)
    _linux.attach(_linux.filesystem("tmpfs", {"mode": "755", "size": "64k"}, ATTR_NOSUID | ATTR_NOEXEC), str(target))
    for name, (major, minor) in _DEVICES.items():
        os.mknod(target / name, stat.S_IFCHR | 0o666, os.makedev(major, minor))
        os.chmod(target / name, 0o666)
    for name, link in _DEVICE_LINKS.items():
        (target / name).symlink_to(link)
    for name in ("pts", "shm", "mqueue"):
        (target / name).mkdir()


def mount_tree(root: Root, target: Path, *, userns: int, scratch: Path, devices: Path) -> None:
    """Mount a zygote's whole root at `target`: skeleton, binds, devices, an empty proc, the layer, the scratch."""
    target.mkdir(parents=True, exist_ok=True)
    try:
        for name, step in _tree_steps(root, str(target), userns, str(scratch), str(devices)):
            try:
                step()
            except OSError as error:
                raise StepError(f"mount-tree {name}", error) from error
    except BaseException:
        unmount_tree(target)
        raise


def _tree_steps(
    root: Root, target: str, userns: int, scratch: str, devices: str
) -> Iterator[tuple[str, Callable[[], None]]]:
    skeleton = str(root.skeleton)
    if root.layers:
        yield from _layer_steps(root, target, userns)
    else:
        yield "skeleton", lambda: _linux.bind(skeleton, target, HIDDEN, recursive=False, userns=userns)

    def show(source: str, place: str, attributes: int, **how: Any) -> Callable[[], None]:
        return lambda: _show(source, target, place, attributes, **how)

    for path, place in root.mounts:
        yield place, show(path, place, HIDDEN, recursive=False)
    for path in root.binds:
        yield path, show(path, path, HIDDEN)
    yield "dev", show(devices, "/dev", ATTR_RDONLY | ATTR_NOSUID | ATTR_NOEXEC)
    yield "proc", lambda: _attach_inside(linux.make_empty_proc(), target, "/proc")
    if root.layers:
        yield "lower", lambda: _mount_lower_inside(root.layers, target, "/.squall/lower", userns)
    else:
        yield "lower", show(skeleton, "/.squall/lower", HIDDEN, recursive=False, userns=userns)
    yield "scratch", show(scratch, "/.squall/scratch", ATTR_NOSUID | ATTR_NODEV, recursive=False, userns=userns)


@contextlib.contextmanager
def _inside(target: str, place: str) -> Iterator[int]:
    """A place in a root that is being put together. The layers of an image are a tenant's: a link there, on the way to
    the place, must not have the node's root mount something elsewhere on the machine."""
    top = os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = _linux.open_inside(top, place)
    finally:
        os.close(top)
    try:
        yield found
    finally:
        os.close(found)


def _show(source: str, target: str, place: str, attributes: int, **how: Any) -> None:
    with _inside(target, place) as at:
        _linux.bind(source, at, attributes, **how)


def _attach_inside(fd: int, target: str, place: str) -> None:
    with _inside(target, place) as at:
        _linux.attach(fd, at)


def _mount_lower_inside(layers: Iterable[Path], target: str, place: str, userns: int) -> None:
    with _inside(target, place) as at:
        _linux.attach(_places(), at)
    with _inside(target, place) as mounted:  # again: what was there before lies below it now
        _fill_lower(layers, f"/proc/self/fd/{mounted}", userns)


def _layer_steps(root: Root, target: str, userns: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """The zygote's own root: the layers stacked, read-only. Mounted by the node's root over idmapped layers, an overlay
    cannot be written to anyway, which is all right here; a container's own is mounted inside, with an upper."""
    places = [f"{target}.lower/{n}" for n in range(len(root.layers))]

    def lower() -> None:
        os.makedirs(f"{target}.lower", exist_ok=True)
        _mount_lower(root.layers, f"{target}.lower", userns)

    def stack() -> None:
        options = {"lowerdir": ":".join(f"{n}" for n in range(len(places))), "userxattr": None}
        _stack(f"{target}.lower", options, target)

    yield "layers", lower
    yield "stack", stack


def _mount_lower(layers: Iterable[Path], target: str, userns: int) -> None:
    """Each layer at a place of its own, on a small tmpfs that has those places."""
    _linux.attach(_places(), target)
    _fill_lower(layers, target, userns)


def _places() -> int:
    return _linux.filesystem("tmpfs", {"mode": "755", "size": "256k"}, ATTR_NOSUID | ATTR_NODEV)


def _fill_lower(layers: Iterable[Path], target: str, userns: int) -> None:
    for number, layer in enumerate(layers):
        place = f"{target}/{number}"
        os.mkdir(place)
        _linux.bind(str(layer), place, HIDDEN, recursive=False, userns=userns)


def _stack(directory: str, options: dict[str, str | None], target: str) -> None:
    # By relative paths, as the kernel bounds the text of all of them together.
    here = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.chdir(directory)
        _linux.attach(_linux.filesystem("overlay", options, HIDDEN), target)
    finally:
        os.fchdir(here)
        os.close(here)


def layer_tree(path: Path, userns: int) -> int:
    """A detached read-only copy of a layer, shown to a workspace as its own, for one build."""
    fd = _linux.open_tree(str(path), _linux.OPEN_TREE_CLONE)
    try:
        _linux.mount_setattr(fd, HIDDEN | _linux.ATTR_IDMAP, recursive=False, userns=userns)
    except BaseException:
        os.close(fd)
        raise
    return fd


def cache_tree(path: Path, userns: int) -> int:
    """A detached writable copy of a workspace's cache directory, for one build."""
    fd = _linux.open_tree(str(path), _linux.OPEN_TREE_CLONE)
    try:
        attributes = ATTR_NOSUID | ATTR_NODEV | _linux.ATTR_IDMAP
        _linux.mount_setattr(fd, attributes, recursive=False, userns=userns)
    except BaseException:
        os.close(fd)
        raise
    return fd


def unmount_tree(target: Path) -> None:
    """Undo `mount_tree`."""
    for place in (target, Path(f"{target}.lower")):
        unmount(place)
        with contextlib.suppress(OSError):  # what is still mounted on keeps its directory
            place.rmdir()


def unmount(target: Path) -> None:
    """Undo every mount at `target`; harmless when there is none."""
    for _ in range(16):
        try:
            _linux.umount(str(target))
        except OSError:
            return


def source_tree(path: Path) -> int:
    """A detached read-only copy of the mount at `path`, for one container.

    Not idmapped: its files show as nobody's, so even a tenant that made it writable could change none of them.
    """
    fd = _linux.open_tree(str(path), _linux.OPEN_TREE_CLONE)
    try:
        _linux.mount_setattr(fd, HIDDEN, recursive=False)
    except BaseException:
        os.close(fd)
        raise
    return fd


# ---- scratch ----------------------------------------------------------------------------------------------------

_FS_IOC_GETFLAGS, _FS_IOC_SETFLAGS, _FS_TOPDIR_FL = 0x80086601, 0x40086602, 0x00020000


def spread_directories(path: Path) -> None:
    """Have ext4 put each new directory here into another block group.

    It steps over every inode of a group that was freed in the last five seconds, one by one: where containers come
    and go, all in one group, that would soon cost more than all the rest of a start. Elsewhere this does nothing.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        flags = int.from_bytes(fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(8)), sys.byteorder)
        fcntl.ioctl(fd, _FS_IOC_SETFLAGS, (flags | _FS_TOPDIR_FL).to_bytes(8, sys.byteorder))
    except OSError:
        pass  # another filesystem, without that flag or that trouble
    finally:
        os.close(fd)


REMOVE_SECONDS = 30.0


def remove_tree(path: Path, deadline: float | None = None) -> None:
    """Delete a tree a container made: by descriptors, following no link, and however deep. Harmless when it is gone.

    A directory that is not empty is first moved to the top, so neither recursion nor descriptors grow with the depth.
    Raises TimeoutError when there is more than can be deleted until `deadline` (of the monotonic clock).
    """
    deadline = time.monotonic() + REMOVE_SECONDS if deadline is None else deadline
    try:
        top = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    except OSError:  # not a directory any more
        os.unlink(path)
        return
    try:
        moved = 0
        while _has_entries(top):
            for name in os.listdir(top):
                moved = _remove_entry(top, name, moved, deadline)
    finally:
        os.close(top)
    os.rmdir(path)


def _has_entries(fd: int) -> bool:
    with os.scandir(fd) as entries:
        return next(entries, None) is not None


def _check_time(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(errno.ETIMEDOUT, "there is more than could be deleted in the time given")


def _remove_entry(top: int, name: str, moved: int, deadline: float) -> int:
    """Remove `name`, emptying it first when it is a directory. The number of directories moved to the top so far."""
    _check_time(deadline)
    try:
        os.unlink(name, dir_fd=top)
        return moved
    except IsADirectoryError:
        pass
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top)
    try:
        for inner in os.listdir(fd):
            _check_time(deadline)
            try:
                os.unlink(inner, dir_fd=fd)
            except IsADirectoryError:
                moved = _remove_inner(fd, inner, top, moved)
    finally:
        os.close(fd)
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(name, dir_fd=top)
    return moved


def _remove_inner(fd: int, name: str, top: int, moved: int) -> int:
    try:
        os.rmdir(name, dir_fd=fd)
        return moved
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
    while True:
        moved += 1
        try:
            os.rename(name, f".{moved}", src_dir_fd=fd, dst_dir_fd=top)
            return moved
        except OSError as error:  # that name is taken, by a file or a directory of the tenant's
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
                raise
