"""Which homes have an agent on this machine, and the control groups of those that are gone for good.

A home's groups are named by a hash of its path, which does not lead back. So an agent keeps a record under `/run`,
which lasts as long as the groups do, until the machine is started anew: a file of the groups' name with the path in it,
locked while the agent lives. Where an agent and its server were killed at once and the home was deleted, nobody comes
to sweep; the next agent of any home then removes those groups. Must never kill, and never touch a group without a
record, with a process in it, or of a home that is there. Tested in `tests/kernel/test_claims.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from squall.node.cgroups import Hierarchies, is_empty, parent_name, remove_empty

RECORDS = Path("/run/squall")
PATH_LIMIT = 4096
CLAIM_SECONDS = 1.0
"""How long a sweep may look at the record, or a killed agent's lock take to be freed."""


def claim(home: Path, records: Path = RECORDS) -> int:
    """Say that this process is the agent of a home, for as long as the returned descriptor is open; -1 where the
    machine has no place to say so. Blocks for a moment."""
    path = records / parent_name(home)
    with contextlib.suppress(OSError):
        records.mkdir(mode=0o700, exist_ok=True)
        deadline = time.monotonic() + CLAIM_SECONDS
        while time.monotonic() < deadline:
            fd = _locked(path, home)
            if fd >= 0:
                return fd
            time.sleep(0.01)  # a sweep looks at it, or has removed it
    return -1


def _locked(path: Path, home: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(fd, path):
            os.ftruncate(fd, 0)
            os.pwrite(fd, os.fsencode(home.resolve()), 0)
            return fd
    except BlockingIOError:
        pass
    except OSError:
        os.close(fd)
        raise
    os.close(fd)
    return -1


def release(fd: int, home: Path, records: Path = RECORDS) -> None:
    """The agent ends and has removed its groups."""
    if fd >= 0:
        with contextlib.suppress(OSError):
            (records / parent_name(home)).unlink()
        os.close(fd)


def sweep(hierarchies: Hierarchies, records: Path = RECORDS) -> list[str]:
    """Remove the groups of homes that are gone; their names."""
    return [path.name for path in _records(records) if _sweep_one(hierarchies, path)]


def _records(records: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from sorted(path for path in records.iterdir() if path.name.startswith("squall-"))


def _sweep_one(hierarchies: Hierarchies, path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        home = Path(os.fsdecode(os.pread(fd, PATH_LIMIT, 0)))
        if not _is_at(fd, path) or parent_name(home) != path.name or home.exists():
            return False
        group = hierarchies.group(path.name)
        if not is_empty(group):
            return False
        remove_empty(group)
        path.unlink()
        return True
    except OSError:  # its agent lives, or a process has just come into the group
        return False
    finally:
        os.close(fd)


def _is_at(fd: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False
