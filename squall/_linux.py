"""Linux calls the standard library does not make: mounts, namespaces, capabilities, seccomp. The only file with ctypes.

Part of the foundation because both sides of a container's wall need it: the agent (`node/linux.py` builds on it) and
the code that runs inside (`runner/main.py`). Importing it touches nothing; a failing call raises `KernelError`, which
carries the call as it was made. Must never decide anything: order and policy belong to its callers.
`recording()` replaces the kernel by a list of calls, so that an order can be tested without root.
The contract is tested in `tests/kernel/test_linux.py`.
"""

from __future__ import annotations

import ctypes
import errno as _errno
import os
import platform
import resource
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

CLONE_NEWNS = 0x00020000
CLONE_PARENT = 0x00008000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
SIGCHLD = 17

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REC, MS_PRIVATE, MS_SLAVE = 1 << 14, 1 << 18, 1 << 19
MNT_DETACH = 2

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_EMPTY_PATH = 4, 0x40
RESOLVE_NO_MAGICLINKS, RESOLVE_IN_ROOT = 0x02, 0x10
FSOPEN_CLOEXEC = FSMOUNT_CLOEXEC = 1
FSCONFIG_SET_FLAG, FSCONFIG_SET_STRING, FSCONFIG_CMD_CREATE = 0, 1, 6

ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV, ATTR_NOEXEC, ATTR_IDMAP = 1, 2, 4, 8, 0x00100000

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_NAME = 15
PR_SET_SECCOMP = 22
PR_CAPBSET_DROP = 24
PR_SET_SECUREBITS = 28
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
SECCOMP_MODE_FILTER = 2

SECUREBITS_LOCKED = 0b1110_1111
"""NOROOT, NO_SETUID_FIXUP and NO_CAP_AMBIENT_RAISE on, KEEP_CAPS off, all four locked: uid 0 means nothing any more."""

_MACHINE = platform.machine()
_NUMBERS = {
    "x86_64": {"clone": 56, "capset": 126, "pivot_root": 155},
    "aarch64": {"clone": 220, "capset": 91, "pivot_root": 41},
}
# The same on every architecture.
_OPENAT2 = 437
_OPEN_TREE, _MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT, _CLOSE_RANGE, _MOUNT_SETATTR = 428, 429, 430, 431, 432, 436, 442


class KernelError(OSError):
    """A kernel call that failed, with the call as it was made: `mount('overlay', '/x', ...): EINVAL`."""

    def __init__(self, number: int, call: str) -> None:
        super().__init__(number, call)
        self.call = call

    def __str__(self) -> str:
        name = _errno.errorcode.get(self.errno or 0, str(self.errno))
        return f"{self.call}: {name} ({os.strerror(self.errno or 0)})"

    def __reduce__(self) -> tuple[object, ...]:
        return KernelError, (self.errno or 0, self.call)


_libc: ctypes.CDLL | None = None
_recorded: list[tuple[object, ...]] | None = None


def _lib() -> ctypes.CDLL:
    global _libc
    if _libc is None:
        _libc = ctypes.CDLL(None, use_errno=True)
        _libc.syscall.restype = ctypes.c_long
    return _libc


def load() -> None:
    """Bind the C library now, so that a forked child need not."""
    _lib()


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_memory(size: int) -> None:
    """Have the allocator keep up to `size` bytes that were freed, rather than give them back and ask for them again:
    of a payload of 100 KB the pages would cost as much as copying it. Does nothing where the allocator has no such
    setting (it is glibc's)."""
    tune = getattr(ctypes.CDLL(None), "mallopt", None)
    if tune is not None:
        tune(M_MMAP_THRESHOLD, min(size, 32 << 20))
        tune(M_TRIM_THRESHOLD, size)


@contextmanager
def recording() -> Iterator[list[tuple[object, ...]]]:
    """Within the block no call reaches the kernel; each is appended to the list that is given, and succeeds with 0."""
    global _recorded
    previous, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = previous


def _show(argument: object) -> str:
    value = argument.value if isinstance(argument, ctypes._SimpleCData) else argument
    if isinstance(value, bytes):
        return repr(value.decode("utf-8", "replace"))
    return hex(value) if isinstance(value, int) and value > 4096 else repr(value)


def _call(name: str, function: Callable[..., int], *arguments: object, shown: Sequence[object] | None = None) -> int:
    if _recorded is not None:
        _recorded.append((name, *(arguments if shown is None else shown)))
        return 0
    result = function(*arguments)
    if result < 0:
        text = ", ".join(_show(argument) for argument in (arguments if shown is None else shown))
        raise KernelError(ctypes.get_errno(), f"{name}({text})")
    return result


def _syscall(name: str, number: int, *arguments: object, shown: Sequence[object] | None = None) -> int:
    longs = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _call(name, lambda *a: _lib().syscall(number, *longs), *arguments, shown=shown)


def _arch(name: str) -> int:
    table = _NUMBERS.get(_MACHINE)
    if table is None:
        raise KernelError(_errno.ENOSYS, f"{name} on `{_MACHINE}`")
    return table[name]


# ---- namespaces and processes -----------------------------------------------------------------------------------


def unshare(flags: int) -> None:
    _call("unshare", _lib().unshare, flags)


def setns(fd: int, kind: int = 0) -> None:
    _call("setns", _lib().setns, fd, kind)


def clone(flags: int) -> int:
    """`fork` with namespaces and, by CLONE_PARENT, another parent. 0 in the child.

    Goes around the C library, so the caller must have one thread, and the child keeps a stale thread id in the
    library until it forks. PyDLL keeps the interpreter's lock: the child must not wait for a thread that is not there.
    """
    if _recorded is not None:
        return _call("clone", lambda *_: 0, flags)
    library = ctypes.PyDLL(None, use_errno=True)
    library.syscall.restype = ctypes.c_long
    none = ctypes.c_long(0)
    pid = int(library.syscall(_arch("clone"), ctypes.c_long(flags | SIGCHLD), none, none, none, none))
    if pid < 0:
        raise KernelError(ctypes.get_errno(), f"clone({flags:#x})")
    return pid


def prctl(option: int, a: int = 0, b: int = 0, c: int = 0, d: int = 0) -> int:
    longs = [ctypes.c_ulong(value) for value in (a, b, c, d)]
    return _call("prctl", lambda *_: _lib().prctl(option, *longs), option, a, b, c, d)


def set_parent_death_signal(signum: int) -> None:
    prctl(PR_SET_PDEATHSIG, signum)


def set_name(name: str) -> None:
    """The name `ps` shows: at most 15 bytes."""
    buffer = ctypes.create_string_buffer(name.encode()[:15])
    _call("prctl", lambda *_: _lib().prctl(PR_SET_NAME, buffer, 0, 0, 0), PR_SET_NAME, name)


def sethostname(name: str) -> None:
    data = name.encode()
    _call("sethostname", _lib().sethostname, data, len(data))


def close_from(first: int) -> None:
    """Close every descriptor from `first` up."""
    if first <= 0xFFFFFFFF:
        _syscall("close_range", _CLOSE_RANGE, first, 0xFFFFFFFF, 0)


def close_all_but(keep: Sequence[int]) -> None:
    first = 0
    for fd in sorted(set(keep)):
        if fd > first:
            _syscall("close_range", _CLOSE_RANGE, first, fd - 1, 0)
        first = fd + 1
    close_from(first)


# ---- mounts -----------------------------------------------------------------------------------------------------


def mount(source: str | None, target: str, kind: str | None, flags: int = 0, data: str | None = None) -> None:
    def encode(text: str | None) -> bytes | None:
        return None if text is None else os.fsencode(text)

    def make(*_: object) -> int:
        return int(_lib().mount(encode(source), encode(target), encode(kind), ctypes.c_ulong(flags), encode(data)))

    _call("mount", make, source, target, kind, flags, data)


def umount(target: str, flags: int = MNT_DETACH) -> None:
    _call("umount2", _lib().umount2, os.fsencode(target), flags)


def pivot_root(new: str, old: str) -> None:
    _syscall("pivot_root", _arch("pivot_root"), os.fsencode(new), os.fsencode(old))


def open_tree(path: str, flags: int = OPEN_TREE_CLONE | AT_RECURSIVE, *, dir_fd: int = AT_FDCWD) -> int:
    """A descriptor of a detached copy of the mount at `path` (and, with AT_RECURSIVE, of those below it)."""
    return _syscall("open_tree", _OPEN_TREE, dir_fd, os.fsencode(path), flags | OPEN_TREE_CLOEXEC)


def open_inside(top: int, path: str) -> int:
    """A descriptor, for mounting at, of what `path` is in the tree whose root the descriptor `top` is: links lead to
    where they would lead whoever lives in that tree, and never out of it."""
    how = struct.pack("<QQQ", os.O_PATH | os.O_CLOEXEC, 0, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
    return _syscall("openat2", _OPENAT2, top, os.fsencode(path), how, len(how), shown=(top, path))


def move_mount(fd: int, target: str | int, *, dir_fd: int = AT_FDCWD) -> None:
    """Attach the detached tree `fd` at a path, or at what a descriptor stands for."""
    flags = MOVE_MOUNT_F_EMPTY_PATH
    if isinstance(target, int):
        dir_fd, target, flags = target, "", flags | MOVE_MOUNT_T_EMPTY_PATH
    _syscall("move_mount", _MOVE_MOUNT, fd, b"", dir_fd, os.fsencode(target), flags)


def mount_setattr(fd: int, attributes: int, *, recursive: bool = True, userns: int = 0) -> None:
    data = struct.pack("<QQQQ", attributes, 0, 0, userns)
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    shown = (fd, hex(attributes), "recursive" if recursive else "", userns)
    _syscall("mount_setattr", _MOUNT_SETATTR, fd, b"", flags, data, len(data), shown=shown)


def attach(fd: int, target: str | int) -> None:
    """Attach a detached tree and close its descriptor."""
    try:
        move_mount(fd, target)
    finally:
        if _recorded is None:
            os.close(fd)


def bind(source: str, target: str | int, attributes: int = 0, *, recursive: bool = True, userns: int = 0) -> None:
    """Show `source` at `target`, with attributes set before it is seen there."""
    fd = open_tree(source, OPEN_TREE_CLONE | (AT_RECURSIVE if recursive else 0))
    try:
        if attributes or userns:
            mount_setattr(fd, attributes | (ATTR_IDMAP if userns else 0), recursive=recursive, userns=userns)
        move_mount(fd, target)
    finally:
        if _recorded is None:
            os.close(fd)


def filesystem(kind: str, options: dict[str, str | None], attributes: int = 0) -> int:
    """A descriptor of a new detached mount of a file system; an option without value is a flag."""
    fd = _syscall("fsopen", _FSOPEN, kind.encode(), FSOPEN_CLOEXEC)
    try:
        for key, value in options.items():
            flag = value is None
            data = None if value is None else os.fsencode(value)
            _syscall(
                "fsconfig", _FSCONFIG, fd, FSCONFIG_SET_FLAG if flag else FSCONFIG_SET_STRING, key.encode(), data, 0
            )
        _syscall("fsconfig", _FSCONFIG, fd, FSCONFIG_CMD_CREATE, None, None, 0)
        return _syscall("fsmount", _FSMOUNT, fd, FSMOUNT_CLOEXEC, attributes)
    finally:
        if _recorded is None:
            os.close(fd)


def syncfs(fd: int) -> None:
    """Write out the whole file system of a descriptor."""
    _call("syncfs", _lib().syncfs, fd)


# ---- giving up privileges ---------------------------------------------------------------------------------------


def drop_bounding_set(keep: int = 0) -> None:
    """No later execve can give a capability back, but for those of the mask `keep`. Stops at the first number this
    kernel does not know."""
    if _recorded is not None:
        _recorded.append(("prctl", PR_CAPBSET_DROP, f"all but {keep:#x}" if keep else "all"))
        return
    drop = _lib().prctl
    for capability in range(64):
        if keep >> capability & 1:
            continue
        if drop(PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            number = ctypes.get_errno()
            if number == _errno.EINVAL and capability > 0:
                return
            raise KernelError(number, f"prctl(PR_CAPBSET_DROP, {capability})")


def drop_capabilities() -> None:
    """Empty effective, permitted and inheritable sets; needs CAP_SETPCAP for the bits it locks first."""
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    prctl(PR_SET_SECUREBITS, SECUREBITS_LOCKED)
    header = struct.pack("<Ii", 0x20080522, 0)
    _syscall("capset", _arch("capset"), header, bytes(24), shown=("all", 0))


def keep_capabilities(mask: int) -> None:
    """Empty all sets but for `mask`, which stays effective and permitted, and which uid 0 keeps over an execve."""
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    header = struct.pack("<Ii", 0x20080522, 0)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    _syscall("capset", _arch("capset"), header, struct.pack("<6I", low, low, 0, high, high, 0), shown=(hex(mask), 0))


def no_new_privileges() -> None:
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def install_filter(program: bytes) -> None:
    """Add a seccomp filter: `program` is an array of classic BPF instructions. Inherited, and never taken off again."""
    buffer = ctypes.create_string_buffer(program, len(program))
    fprog = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer)))

    def install(*_: object) -> int:
        return int(_lib().prctl(PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), fprog, 0, 0))

    _call("seccomp", install, shown=("SECCOMP_SET_MODE_FILTER", f"{len(program) // 8} instructions"))


def limit_resources(nofile: int) -> None:
    """No core dumps (they would leave the container by the host's core pattern) and a bound on descriptors."""
    if _recorded is not None:
        _recorded.append(("setrlimit", "core", 0, "nofile", nofile))
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    bound = nofile if hard == resource.RLIM_INFINITY else min(nofile, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (bound, bound))


def seal(filters: Sequence[bytes], nofile: int, *, bounding: bool = True, keep: int = 0) -> None:
    """Give up everything, for good. The order matters: each step needs what a later one takes away.

    `bounding=False` when the bounding set was dropped before. `keep`: a mask of capabilities that are left, as a
    build needs them.
    """
    limit_resources(nofile)
    if bounding:
        drop_bounding_set(keep)
    if keep:
        keep_capabilities(keep)
    else:
        drop_capabilities()
    no_new_privileges()
    for program in filters:
        install_filter(program)
