"""Images when things go wrong: commands that hang, disks that fill, layers that go while containers start on them."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import squall
from squall.client import Client
from squall.exception import BuildError, ResourceExhaustedError
from squall.protocol.requests import PruneImages
from tests.conftest import Debian, wait_until
from tests.integration.conftest import DEBIAN_PYTHON, own_home
from tests.integration.support import Heard, Outcome, content, inits, layers_in, pid_of

pytestmark = pytest.mark.root


def base() -> squall.Image:
    return squall.Image.debian_slim(DEBIAN_PYTHON)


@pytest.fixture(scope="module", autouse=True)
def debian(debian_home: Path) -> Path:
    """The home, with the base built in it, so that others can be lent its layers."""
    return debian_home


# ---- commands


def test_command_that_hangs_is_ended_at_the_deadline(debian_layers: Debian, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUALL_BUILD_TIMEOUT", "3")
    with own_home() as home:
        debian_layers.lend(home)
        before = layers_in(home)
        with pytest.raises(BuildError, match="it took longer than 3 s"):
            base().run_commands("echo begun; sleep 1000").build(Heard())
        assert layers_in(home) == before
        assert not list((home / "node/layers").glob(".building-*"))


def test_package_that_really_needs_a_compiler_has_a_hint() -> None:
    image = base().add_local_python_source("tests", copy=True, ignore=["**"])  # a layer of nothing
    setup = "from setuptools import setup, Extension; setup(name='ext', ext_modules=[Extension('ext', ['ext.c'])])"
    image = image.run_commands(f'mkdir /ext && cd /ext && echo "{setup}" > setup.py && echo "int x;" > ext.c')
    with pytest.raises(BuildError) as caught:
        image.run_commands("cd /ext && python3 setup.py build_ext").build(Heard())
    assert '.apt_install("build-essential", "python3-dev")' in caught.value.hint


def test_command_that_is_killed_from_outside_leaves_no_layer(debian: Path) -> None:
    before = layers_in(debian)
    heard = Heard()
    outcome = Outcome(lambda: base().run_commands("echo half > /half; echo begun; sleep 1000").build(heard))
    wait_until(lambda: b"begun" in heard.text, "the command runs")
    os.kill(inits(debian)["build"], 9)
    assert "killed by signal SIGKILL" in str(outcome.error())
    assert layers_in(debian) == before


# ---- the disk


@pytest.fixture
def small_disk(debian_layers: Debian) -> Iterator[Path]:
    """A home on a filesystem of its own that is nearly full with the base."""
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("there is no mkfs.ext4 to make a small disk with")
    place = Path(tempfile.mkdtemp(prefix="squall-d-"))
    with tempfile.NamedTemporaryFile() as file, pytest.MonkeyPatch.context() as patch:
        os.truncate(file.name, 3 << 30)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", file.name], check=True, timeout=60)
        subprocess.run(["mount", "-o", "loop", file.name, place], check=True, timeout=60)
        try:
            patch.setattr(tempfile, "tempdir", str(place))
            with own_home() as home:
                debian_layers.lend(home)
                yield home
        finally:
            subprocess.run(["umount", place], check=True, timeout=60)
            place.rmdir()


def free_mib(home: Path) -> int:
    status = os.statvfs(home)
    return status.f_bavail * status.f_frsize >> 20


@pytest.mark.slow
def test_full_disk_ends_builds_and_nothing_else_and_is_recovered_from_without_a_restart(small_disk: Path) -> None:
    home = small_disk
    app = squall.App("running", image=base())
    function = app.function(serialized=True, name="double")(lambda number: 2 * number)
    with app.run(output=Heard()):
        assert function.remote(1) == 2
        agent, before, free = pid_of(home, "node"), layers_in(home), free_mib(home)
        with pytest.raises(BuildError, match="the disk is full"):
            base().run_commands("dd if=/dev/zero of=/big bs=1M status=none").build(Heard())
        assert layers_in(home) == before
        wait_until(lambda: free_mib(home) > free - 50, "what the build wrote is gone")
        with (home / "filler").open("wb") as filler:
            os.posix_fallocate(filler.fileno(), 0, (free_mib(home) - 300) << 20)
        with pytest.raises(ResourceExhaustedError, match="MiB left") as caught:
            base().run_commands("true").build(Heard())
        assert "squall image prune" in caught.value.hint
        assert function.remote(2) == 4
        (home / "filler").unlink()
        assert content(base().run_commands("echo again > /again"), "/again") == "again\n"
        assert function.remote(3) == 6
        assert pid_of(home, "node") == agent


# ---- removing while containers start

ROUNDS = 4


def prune() -> None:
    Client.current().link.request(PruneImages()).wait(60)


def test_images_are_pruned_while_containers_start_on_them_and_none_fails() -> None:
    images = [base().run_commands(f"echo {number} > /number") for number in range(3)]
    stop = threading.Event()

    def start(image: squall.Image, number: int) -> list[str]:
        return [content(image, "/number") for _ in range(ROUNDS)]

    def keep_pruning() -> int:
        count = 0
        while not stop.is_set():
            prune()
            count += 1
        return count

    app = squall.App("kept", image=base())  # in use all the time: making a Debian again and again proves no more
    app.function(serialized=True, name="nothing")(lambda: None)
    with app.run(output=Heard()):
        pruning = Outcome(keep_pruning)
        try:
            starts = [Outcome(functools.partial(start, image, number)) for number, image in enumerate(images)]
            for number, outcome in enumerate(starts):
                assert outcome.result(240) == [f"{number}\n"] * ROUNDS
        finally:
            stop.set()
        assert pruning.result() > 0


# ---- memory of zygotes


def zygotes(home: Path) -> int:
    """How many trees of images are mounted in the agent, one for each zygote."""
    mounts = Path(f"/proc/{pid_of(home, 'node')}/mountinfo").read_text()
    return sum(f"{home}/node/mounts/main-" in line and " - overlay " in line for line in mounts.splitlines())


def test_zygotes_that_are_idle_go_when_all_take_more_than_they_may(
    debian_layers: Debian, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQUALL_ZYGOTES_MIB", "1")
    with own_home() as home:
        debian_layers.lend(home)
        images = [base().run_commands(f"echo {number} > /number") for number in range(4)]
        for _ in range(2):
            for number, image in enumerate(images):
                assert content(image, "/number") == f"{number}\n"
        wait_until(lambda: zygotes(home) == 1, lambda: f"one zygote is left, not {zygotes(home)}")
