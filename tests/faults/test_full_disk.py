"""The disk under a home is full, really: what is new is refused and says why, what runs goes on, and room is enough."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import squall
from squall.client import Client
from squall.exception import ResourceExhaustedError, StartupError
from squall.protocol.requests import PruneImages
from tests.conftest import Debian, wait_until
from tests.integration import workload
from tests.integration.conftest import DEBIAN_PYTHON, own_home
from tests.integration.support import Heard, Kept, containers_of, pid_of

pytestmark = pytest.mark.root

DISK_MIB = 3 << 10
"""More than what blobs leave free; nearly all of it is never written."""
LATE_APP = """
import squall

app = squall.App("late")


@app.function()
def hundred(number):
    return 100 * number
"""


@pytest.fixture
def small_home() -> Iterator[Path]:
    """A home on a filesystem of its own."""
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("there is no mkfs.ext4 to make a small disk with")
    place = Path(tempfile.mkdtemp(prefix="squall-d-"))
    with tempfile.NamedTemporaryFile() as file, pytest.MonkeyPatch.context() as patch:
        os.truncate(file.name, DISK_MIB << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", file.name], check=True, timeout=60)
        subprocess.run(["mount", "-o", "loop", file.name, place], check=True, timeout=60)
        try:
            patch.setattr(tempfile, "tempdir", str(place))
            with own_home() as home:
                yield home
        finally:
            subprocess.run(["umount", place], check=True, timeout=60)
            place.rmdir()


def import_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def free_bytes(home: Path) -> int:
    status = os.statvfs(home)
    return status.f_bavail * status.f_frsize


def fill(home: Path) -> Path:
    """Take all there is, to the last byte; the file that holds it."""
    filler = home.parent / "filler"
    with filler.open("wb", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, max(1, free_bytes(home) - (4 << 20)))
        file.seek(0, os.SEEK_END)
        for size in (1 << 20, 4096):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    return filler


def call_of_another_app() -> int:
    app = squall.App("another")
    function = app.function(serialized=True, name="increment")(lambda number: number + 1)
    with app.run(output=Kept()):
        return function.remote(1)  # type: ignore[no-any-return]


def test_full_disk_refuses_what_is_new_and_ends_nothing_that_runs(small_home: Path, tmp_path: Path) -> None:
    """And when there is room again all goes on, in the same processes."""
    (tmp_path / "late_app.py").write_text(LATE_APP)
    late = import_file(tmp_path / "late_app.py")
    with workload.app.run(output=Kept()), late.app.run(output=Kept()):
        assert workload.square.remote(3) == 9
        kept = workload.square.spawn(4)
        assert kept.get(timeout=30) == 16
        before = pid_of(small_home, "server"), pid_of(small_home, "node"), containers_of("square")[0]["container_id"]
        filler = fill(small_home)
        assert workload.square.remote(5) == 25 and list(workload.square.map(range(50))) == [n * n for n in range(50)]
        assert kept.get(timeout=30) == 16
        refused = partial(pytest.raises, ResourceExhaustedError)
        with refused(match="disk that holds `.*squall.db` is full"):
            workload.square.spawn(6)
        with refused(match="the disk of the server is nearly full") as caught:
            workload.count_bytes.remote(secrets.token_bytes(3 << 20))
        assert "free some space" in caught.value.hint
        with refused(match="the disk of the server is nearly full"):
            call_of_another_app()
        with refused(match="MiB left") as caught:
            squall.Image.debian_slim().build(Heard())
        assert "squall image prune" in caught.value.hint
        with pytest.raises(StartupError, match=r"the disk of `.*` is full"):
            late.hundred.remote(1)
        for number in range(4):  # two were made ahead
            with contextlib.suppress(StartupError):
                workload.square.with_options(memory=150 + number).remote(1)
        with pytest.raises(StartupError, match=r"the disk of `.*` is full"):
            workload.square.with_options(memory=160).remote(1)
        assert workload.square.remote(7) == 49
        filler.unlink()
        wait_until(partial(takes_spawns, 8), "the Store goes on")
        assert workload.count_bytes.remote(bytes(3 << 20)) == 3 << 20
        assert call_of_another_app() == 2
        assert late.hundred.remote(2) == 200 and workload.square.with_options(memory=161).remote(3) == 9
        assert containers_of("square")[0]["container_id"] == before[2]
        assert (pid_of(small_home, "server"), pid_of(small_home, "node")) == before[:2]


def takes_spawns(number: int) -> bool:
    try:
        return workload.square.spawn(number).get(timeout=30) == number * number
    except ResourceExhaustedError:
        return False


def has_pruned(home: Path) -> bool:
    """A layer that is being written out, or held, stays until the next time."""
    Client.current().link.request(PruneImages()).wait(60)
    return free_bytes(home) > 900 << 20


@pytest.mark.slow
def test_pruning_makes_room_on_a_full_disk_without_a_restart(small_home: Path, debian_layers: Debian) -> None:
    debian_layers.lend(small_home)
    base = squall.Image.debian_slim(DEBIAN_PYTHON)
    keeper = squall.App("keeper", image=base)  # or the base were removed too
    keeper.function(serialized=True, name="nothing")(lambda: None)
    with workload.app.run(output=Kept()), keeper.run(output=Kept()):
        assert workload.square.remote(3) == 9
        before = pid_of(small_home, "server"), pid_of(small_home, "node")
        base.run_commands("dd if=/dev/zero of=/large bs=1M count=700 status=none").build(Heard())
        filler = small_home.parent / "filler"
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free_bytes(small_home) - (300 << 20))
        with pytest.raises(ResourceExhaustedError, match="MiB left"):
            base.run_commands("true").build(Heard())
        with pytest.raises(ResourceExhaustedError, match="the disk of the server is nearly full"):
            workload.count_bytes.remote(secrets.token_bytes(3 << 20))
        wait_until(partial(has_pruned, small_home), "there is room again", 60)
        base.run_commands("true").build(Heard())
        os.truncate(filler, filler.stat().st_size - (400 << 20))
        assert workload.count_bytes.remote(bytes(3 << 20)) == 3 << 20
        assert workload.square.remote(4) == 16
        assert (pid_of(small_home, "server"), pid_of(small_home, "node")) == before
