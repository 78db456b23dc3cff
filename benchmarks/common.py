"""What the benchmarks share: statistics, a table of rows, a Squall home of their own, the peers."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path


def row(case: str, values: list[float], unit: str, note: str = "") -> None:
    """Print one series: median, p99 (or maximum), minimum, count."""
    values = sorted(values)
    p99 = values[min(len(values) - 1, int(len(values) * 0.99))]
    print(
        f"{case:<58} p50 {statistics.median(values):>10.2f} {unit:<8} p99 {p99:>10.2f}  "
        f"min {values[0]:>10.2f}  n={len(values)} {note}",
        flush=True,
    )


def timed(body: Callable[[], object]) -> float:
    began = time.perf_counter()
    body()
    return time.perf_counter() - began


@contextlib.contextmanager
def own_home() -> Iterator[Path]:
    """A fresh SQUALL_HOME, whose server is stopped at the end."""
    home = Path(tempfile.mkdtemp(prefix="squall-bench-"))
    os.environ["SQUALL_HOME"] = str(home)
    try:
        yield home
    finally:
        stop_server()
        shutil.rmtree(home, ignore_errors=True)


def stop_server() -> None:
    from squall import client
    from squall.exception import Error
    from squall.protocol.messages import Ping
    from squall.protocol.requests import StopServer

    with contextlib.suppress(Error):
        connection = client.Client.connect(autostart=False)
        connection.link.request(StopServer("benchmark")).wait(30)
        for _ in range(3000):
            connection.link.request(Ping()).wait(5)
            time.sleep(0.01)
    deadline = time.monotonic() + 30
    while Path(os.environ["SQUALL_HOME"], "run/server.sock").exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def server_pid() -> int:
    """Pid of the server of this home."""
    wanted = os.environ["SQUALL_HOME"].encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_bytes()
            environment = (entry / "environ").read_bytes().split(b"\0")
            if b"squall.server" in command and b"SQUALL_HOME=" + wanted in environment:
                return int(entry.name)
    raise RuntimeError("no server found")


class Crun:
    """`crun run` of the machine's own Python on the machine's own root, read-only: the lean container to beat.

    crun refuses a hybrid cgroup set-up with a controller left in version 2, so hugetlb is mounted as version 1
    meanwhile; and it cannot pivot into `/` itself, so the root is a bind mount of it.
    """

    def __init__(self, directory: Path) -> None:
        self.bundle = directory / "bundle"
        self.root = directory / "root"
        self.hugetlb = directory / "hugetlb"
        for path in (self.bundle, self.root, self.hugetlb):
            path.mkdir(parents=True)
        self.counter = 0
        python = os.path.realpath(sys.executable)
        namespaces = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")]
        spec = {
            "ociVersion": "1.0.0",
            "process": {"user": {"uid": 0, "gid": 0}, "args": [python, "-c", "pass"], "cwd": "/",
                        "env": ["PATH=/usr/bin:/bin"], "noNewPrivileges": True},
            "root": {"path": str(self.root), "readonly": True},
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"},
                       {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"}],
            "linux": {"namespaces": namespaces},
        }  # fmt: skip
        (self.bundle / "config.json").write_text(json.dumps(spec))

    @staticmethod
    def present() -> bool:
        return shutil.which("crun") is not None and os.geteuid() == 0

    def __enter__(self) -> Crun:
        subprocess.run(["mount", "--bind", "/", str(self.root)], check=True)
        subprocess.run(["mount", "-t", "cgroup", "-o", "hugetlb", "none", str(self.hugetlb)], capture_output=True)
        return self

    def __exit__(self, *exc: object) -> None:
        for path in (self.hugetlb, self.root):
            subprocess.run(["umount", str(path)], capture_output=True)

    def start(self) -> subprocess.Popen[bytes]:
        self.counter += 1
        name = f"squall-bench-{os.getpid()}-{self.counter}"
        return subprocess.Popen(
            ["crun", "--cgroup-manager=disabled", "run", "-b", str(self.bundle), name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def finish(self, process: subprocess.Popen[bytes]) -> None:
        _, said = process.communicate(timeout=120)
        if process.returncode != 0:
            raise RuntimeError(f"crun failed: {said.decode(errors='replace').strip()}")

    def run(self) -> None:
        self.finish(self.start())


@contextlib.contextmanager
def crun_or_none() -> Iterator[Crun | None]:
    """crun where it is installed and this is root."""
    if not Crun.present():
        print("crun is not here: Squall alone")
        yield None
        return
    with tempfile.TemporaryDirectory() as scratch, Crun(Path(scratch)) as crun:
        yield crun
