"""Whether native containers can be made on this machine: what /proc tells is read, the rest is tried in a helper.

Each answer is a sentence with its fix, for `squall doctor` and for the agent's choice of a runtime. Must leave nothing
behind: what it makes lies in one directory and one short-lived process. Tested in `tests/kernel/test_native.py`.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

from squall import _linux, config
from squall.node import linux, privileges, rootfs
from squall.node.cgroups import Hierarchies
from squall.node.linux import StepError

_TIMEOUT = 10.0


def find_problems(home: Path | None) -> list[str]:
    """Why this runtime cannot work here, each with its fix. What no file tells is tried, and undone, in a helper."""
    if os.uname().sysname != "Linux":
        return [f"containers are made of Linux namespaces, and this is {os.uname().sysname}"]
    found: list[str] = []
    if os.geteuid() != 0:
        found.append("it needs root: run `squall` as root, or use the `process` runtime")
    if not privileges.is_supported_machine():
        found.append(f"no system call filter is known for `{os.uname().machine}` (x86_64 and aarch64 are)")
    if _kernel_version() < (5, 19):
        found.append(f"kernel {os.uname().release} cannot stack overlays on idmapped mounts: 5.19 or newer is needed")
    if "overlay" not in Path("/proc/filesystems").read_text():
        found.append("the kernel has no overlayfs: `modprobe overlay`")
    found += _namespace_problems() + Hierarchies.detect().problems()
    return found or _attempt_problems(home or config.load().home)


def _kernel_version() -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _namespace_problems() -> list[str]:
    path = Path("/proc/sys/user/max_user_namespaces")
    if not path.exists():
        return ["the kernel has no user namespaces (CONFIG_USER_NS)"]
    if int(path.read_text()) == 0:
        return ["user namespaces are switched off: `sysctl user.max_user_namespaces=65536`"]
    return []


_ATTEMPT_FIXES = {
    "private-mounts": "inside Docker, run with `--privileged`",
    "idmapped-mount": "set SQUALL_HOME to a directory on ext4, xfs, btrfs or tmpfs (an overlay, as Docker's, cannot)",
    "overlay": "set SQUALL_HOME to a directory on ext4, xfs, btrfs or tmpfs, on kernel 5.19 or newer",
    "mount-empty-proc": "inside Docker, run with `--privileged`: parts of its /proc are masked",
    "proc": "inside Docker, run with `--privileged`: parts of its /proc are masked",
}


def _attempt_problems(home: Path) -> list[str]:
    """Make the mounts of a container once, where they would be made, and say what failed."""
    place = next(path for path in (home, *home.resolve().parents) if path.is_dir())
    try:
        trial = Path(tempfile.mkdtemp(prefix=".squall-trial-", dir=place))
    except OSError as error:
        return [f"`{place}` is not writable ({error.strerror}): set SQUALL_HOME to a directory that is"]
    try:
        linux.close_fds(linux.run_helper("try-mounts", lambda answer: _attempt(trial, answer)))
    except StepError as error:
        step, _, cause = error.message.removeprefix("try-mounts: ").partition(": ")
        fix = _ATTEMPT_FIXES.get(step, "see what the kernel refused")
        return [f"a container's mounts cannot be made in `{place}` ({step}: {cause}): {fix}"]
    finally:
        rootfs.remove_tree(trial)
    return []


def _attempt(trial: Path, answer: socket.socket) -> None:
    """In a helper: the kernel's harder demands, in the order a container makes them."""
    for name in ("lower", "u", "w", "root", "proc"):
        (trial / name).mkdir()
    userns = linux.make_user_namespace(privileges.id_base(0))

    def idmap() -> None:
        _linux.bind(str(trial), str(trial), recursive=False, userns=userns)
        os.chdir(trial)

    def overlay() -> None:
        _linux.unshare(_linux.CLONE_NEWNS | _linux.CLONE_NEWPID | _linux.CLONE_NEWIPC | _linux.CLONE_NEWUTS)
        _linux.mount("overlay", "root", "overlay", 0, "lowerdir=lower,upperdir=u,workdir=w,userxattr")

    steps: list[tuple[str, Callable[[], object]]] = [
        ("private-mounts", lambda: _linux.unshare(_linux.CLONE_NEWNS)),
        ("private-mounts", lambda: _linux.mount(None, "/", None, _linux.MS_REC | _linux.MS_PRIVATE)),
        ("idmapped-mount", idmap),
        ("mount-empty-proc", lambda: _linux.attach(linux.make_empty_proc(), "proc")),
        ("user-namespace", lambda: linux.enter_user_namespace(userns)),
        ("overlay", overlay),
        ("no-new-privileges", _linux.no_new_privileges),
        ("zygote-filter", lambda: _linux.install_filter(privileges.zygote_filter())),
        ("proc", lambda: _in_child(lambda: _linux.mount("proc", "root", "proc", 0))),
        ("container-filter", lambda: _linux.install_filter(privileges.container_filter())),
    ]
    for name, step in steps:
        try:
            step()
        except OSError as error:
            answer.send(f"!{name}: {error}".encode())
            return


def _in_child(step: Callable[[], object]) -> None:
    if linux.reap(linux.fork_child(step), _TIMEOUT):
        raise PermissionError(errno.EPERM, "refused")
