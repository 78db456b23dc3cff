"""What every test may use: the markers' conditions, and `home`, a Squall of the test's own that must leave nothing.

Must stay small: builders belong in `squall.testing`, a room's own fixtures beside its tests.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from squall.cli.admin import down

ROOT = Path(__file__).parents[1]
STOP_SECONDS = 30.0


def pytest_configure() -> None:
    """A shell has what it starts in the background ignore two keys of the terminal, and all that this starts would."""
    for signum, wanted in ((signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL)):
        if signal.getsignal(signum) is signal.SIG_IGN:
            signal.signal(signum, wanted)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `root` are skipped, by name and with the reason, where the kernel would refuse them. Names must be
    the same in each process that collects them."""
    if unlike := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(f"an address in the name of a test, give its parameters other ids: {unlike[0]}")
    if sys.platform == "linux" and os.geteuid() == 0:
        return
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason="needs root on Linux"))


def wait_until(
    condition: Callable[[], object], what: str | Callable[[], object], seconds: float = STOP_SECONDS
) -> None:
    """Wait for a condition; on the deadline fail with `what` was waited for."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:g} s in vain until {what() if callable(what) else what}")
        time.sleep(0.02)  # the one sleep of the tests: everything that waits, waits here


def processes_of(home: Path) -> dict[int, str]:
    """Processes that have `home` as their SQUALL_HOME or among their arguments, this one left out."""
    mark = os.fsencode(home)
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes()
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # gone, or a kernel thread
            continue
        if b"SQUALL_HOME=" + mark in environment or mark in command:
            found[int(entry.name)] = command.replace(b"\0", b" ").decode(errors="replace").strip()
    return found


def mounts_under(home: Path) -> list[str]:
    """Mounts below `home` that the host's mount namespace can see."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if line.split()[4].startswith(f"{home}/")]


def leftovers(home: Path) -> list[str]:
    """What the machine still holds of this home, in words; nothing once its server has ended, however it ended."""
    name = hashlib.blake2b(os.fsencode(home.resolve()), digest_size=6).hexdigest()
    mark = hashlib.sha256(os.fsencode(home.resolve())).hexdigest()[:8]
    found = [f"process {pid}: {command}" for pid, command in processes_of(home).items()]
    found += [f"mount {line}" for line in mounts_under(home)]
    groups = Path("/sys/fs/cgroup")
    found += [f"group {path}" for pattern in ("", "*/") for path in groups.glob(f"{pattern}squall-{name}")]
    found += [f"link {path.name}" for path in Path("/sys/class/net").glob(f"sq{mark}*")]
    found += [f"socket {path}" for path in (home / "run").glob("*.sock")]
    if os.geteuid() == 0 and (nft := shutil.which("nft")):
        tables = subprocess.run([nft, "list", "tables"], capture_output=True, text=True, timeout=10, check=False)
        found += [f"rules {line}" for line in tables.stdout.splitlines() if f"squall_{mark}" in line]
    return found


@contextlib.contextmanager
def temporary_home() -> Iterator[Path]:
    """A new, empty SQUALL_HOME. At the end its server is stopped, and nothing of it may be left on the machine."""
    path = Path(tempfile.mkdtemp(prefix="squall-"))  # short: sockets live in it
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SQUALL_HOME", str(path))
        try:
            yield path
            _stop_server(path)
            wait_until(lambda: not leftovers(path), lambda: f"these are gone: {leftovers(path)}")
        finally:
            _kill(processes_of(path))
            shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def home() -> Iterator[Path]:
    """A Squall of this test's own."""
    with temporary_home() as path:
        yield path


@pytest.fixture(scope="module")
def shared_home() -> Iterator[Path]:
    """A Squall that the tests of a module share, where none of them depends on what another left."""
    with temporary_home() as path:
        yield path


class Debian:
    """The layers of `debian_slim("3.11")`, built once, in a home of their own, by the first process that wants them."""

    PROGRAM = "import squall; squall.Image.debian_slim('3.11').build()"

    def __init__(self, path: Path) -> None:
        self._path = path

    def lend(self, home: Path) -> None:
        """To a home whose server has not started yet. Building them takes some 20 s and needs a Debian mirror."""
        with (self._path / "lock").open("a") as file:
            wait_until(lambda: _lock_nowait(file.fileno()), "no other process builds them", 300.0)
            if not _of_base(self._path):
                self._build()
        (home / "node").mkdir(mode=0o711, exist_ok=True)
        (home / "node/layers").mkdir(exist_ok=True)
        # Linked where that can be, as it is 15,000 files: nothing writes into a layer, and a test that damages one has
        # built it itself.
        how = "-al" if self._path.stat().st_dev == home.stat().st_dev else "-a"
        subprocess.run(["cp", how, *_of_base(self._path), home / "node/layers"], check=True, timeout=120)

    def _build(self) -> None:
        with temporary_home() as home:
            done = subprocess.run(
                [sys.executable, "-c", self.PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
            layers = home / "node/layers"
            wait_until(lambda: all(map(_is_settled, _of_base(layers))), "they are written out", 120.0)
            _stop_server(home)
            for layer in _of_base(layers):
                shutil.move(layer, self._path)


def _lock_nowait(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _of_base(layers: Path) -> list[Path]:
    """The base has two layers, one key with and without `-files`."""
    keys = [path.name.partition("-files-")[0] for path in layers.glob("*-files-*")]
    return [path for key in keys for path in layers.glob(f"{key}-*")]


def _is_settled(layer: Path) -> bool:
    return bool(json.loads((layer / "meta.json").read_text())["settled"])


@pytest.fixture(scope="session")
def debian_layers() -> Iterator[Debian]:
    """One Debian for the whole run: in a directory of `scripts/test`, which runs several processes, else of our own."""
    if shared := os.environ.get("SQUALL_TEST_LAYERS"):
        yield Debian(Path(shared))
        return
    with tempfile.TemporaryDirectory(prefix="squall-debian-") as path:
        yield Debian(Path(path))


def _stop_server(home: Path) -> None:
    """As `squall down` does, without a process for it: there are hundreds of homes."""
    if (home / "run" / "server.sock").exists():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SQUALL_HOME", str(home))
            down.main([], standalone_mode=False)


def _kill(processes: dict[int, str]) -> None:
    for pid in processes:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
