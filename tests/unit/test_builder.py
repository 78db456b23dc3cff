"""What a build may use of the disk, and how its failure is told."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from squall.exception import BuildError, NotFoundError, ResourceExhaustedError
from squall.node import builder
from squall.node.builder import Builder, Mask, failure, uv_mount
from squall.node.layers import Layer, Layers
from squall.node.runtime import Exit
from squall.protocol.images import Settings
from squall.protocol.messages import ImageSpec, ImageStep

STEP = ImageStep("run", {"commands": ["make"]})


def make(tmp_path: Path, quota: int = 1 << 40) -> Builder:
    layers = Layers(tmp_path / "layers")
    layers.root.mkdir()
    runtime: Any = SimpleNamespace(layers=layers)
    return Builder(runtime, lambda message, data: None, lambda digest: None, timeout=1.0, quota_bytes=quota)  # type: ignore[arg-type, return-value]


def with_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=free, f_frsize=1, f_files=0))


def told(tail: str, end: Exit | None = None, step: ImageStep = STEP) -> tuple[str, str]:
    work = builder._Work("k", step, 2, Settings(), (), ImageSpec("layers", [step, step]))
    error = failure(work, end or Exit(1, "exited with code 1"), tail)
    return error.message, error.hint


def test_build_does_not_begin_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(tmp_path)
    with_free(monkeypatch, builder.FREE_BYTES)
    with pytest.raises(ResourceExhaustedError, match="256 MiB left") as caught:
        made._check_room()
    assert "squall image prune" in caught.value.hint
    with_free(monkeypatch, 4 * builder.FREE_BYTES)
    made._check_room()


def test_build_that_fills_the_disk_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(tmp_path)
    monkeypatch.setattr(builder, "WATCH_INTERVAL", 0.001)
    with_free(monkeypatch, builder.FREE_BYTES - 1)
    said: list[str] = []
    asyncio.run(asyncio.wait_for(made._watch_disk(said.append), 5))
    assert "the disk is full" in said[0]


def test_build_that_fills_the_disk_with_empty_files_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(tmp_path)
    monkeypatch.setattr(builder, "WATCH_INTERVAL", 0.001)
    status = SimpleNamespace(f_bavail=1 << 40, f_frsize=1, f_files=1_000_000, f_favail=9_999)
    monkeypatch.setattr(os, "statvfs", lambda path: status)
    said: list[str] = []
    asyncio.run(asyncio.wait_for(made._watch_disk(said.append), 5))
    assert "no more files" in said[0]


def test_build_does_not_begin_above_the_quota(tmp_path: Path) -> None:
    made = make(tmp_path, quota=1 << 20)
    building = made.layers.begin()
    (building / "tree").mkdir()
    made.layers.publish(building, Layer("k", "large", building, size_bytes=2 << 20))
    with pytest.raises(ResourceExhaustedError, match="take 2 MiB of the 1 MiB"):
        made._check_room()


def test_sizes_are_told_when_they_change(tmp_path: Path) -> None:
    made = make(tmp_path)
    building = made.layers.begin()
    (building / "tree").mkdir()
    made.layers.publish(building, Layer("k", "a step", building, size_bytes=5))
    assert made.changed_sizes() == {"k": 5}
    assert made.changed_sizes() == {}


@pytest.mark.parametrize(
    ("tail", "hint"),
    [
        ("error: command 'gcc' failed: No such file or directory", "build-essential"),
        ("error: command 'x86_64-linux-gnu-gcc' failed: No such file or directory", "build-essential"),
        ("x: fatal error: Python.h: No such file or directory", "build-essential"),
        ("  x No solution found when resolving dependencies", "check the name"),
        ("E: Unable to locate package nonsense", "packages.debian.org"),
        ("write error: No space left on device", "squall image prune"),
        ("/bin/sh: 1: git: not found", "apt_install"),
        ("Temporary failure resolving 'deb.debian.org'", "nothing else of its network"),
        ("all is lost", ""),
    ],
)
def test_failure_has_a_hint_where_one_is_known(tail: str, hint: str) -> None:
    message, found = told(tail)
    assert message.startswith("image step 2 of 2, `run make`, failed: exited with code 1\n    ")
    assert hint in found
    assert bool(hint) == bool(found)


def test_base_whose_mirror_was_not_reached_says_where_another_is_named() -> None:
    _, hint = told("W: Failed to fetch http://mirror/debian", step=ImageStep("debian", {"suite": "bookworm"}))
    assert "SQUALL_DEBIAN_MIRROR" in hint


def test_failure_shows_the_end_of_a_long_output() -> None:
    message, _ = told("\n".join(f"line {number}" for number in range(1000)))
    assert "line 999" in message
    assert "line 900" not in message


def test_step_that_ran_out_of_memory_says_so() -> None:
    message, hint = told("", Exit(137, "killed", oom=True))
    assert "ran out of memory" in message
    assert hint


def test_node_without_uv_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert uv_mount(STEP) == []
    with pytest.raises(NotFoundError, match="the node has no uv") as caught:
        uv_mount(ImageStep("uv", {"packages": ["six"]}))
    assert "pip install uv" in caught.value.hint


# ---- secrets


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_secrets_are_struck_out_of_what_a_step_writes_however_it_comes(size: int) -> None:
    mask = Mask(["hunter22", "multi\nline-of-it", "", "abc"])
    said = b"the word hunter22 and hunter2 and line-of-it, abc; hunt"
    parts = [mask.feed(said[at : at + size]) for at in range(0, len(said), size)]
    assert b"".join([*parts, mask.rest()]) == b"the word *** and hunter2 and ***, abc; hunt"


@pytest.mark.parametrize("said", ["p%40ss0123", "p@ss0123"])
def test_the_password_of_a_url_is_struck_out_by_itself_too(said: str) -> None:
    mask = Mask(["https://user:p%40ss0123@index.example/simple", "https://t0ken0123@git.example"])
    text = f"could not log in as user with {said}; with t0ken0123\n".encode()
    assert mask.feed(text) + mask.rest() == b"could not log in as user with ***; with ***\n"


def test_output_without_secrets_is_passed_on_at_once() -> None:
    assert Mask([]).feed(b"anything") == b"anything"


def test_step_that_comes_without_its_secret_says_who_has_it() -> None:
    step = ImageStep("run", {"commands": ["make"], "secrets": ["TOKEN"]})
    work = builder._Work("k", step, 1, Settings(), (), ImageSpec("layers", [step]))
    with pytest.raises(BuildError, match="needs the secret `TOKEN`") as caught:
        builder.check_told(work)
    assert "deploy that program again" in caught.value.hint
    builder.check_told(builder._Work("k", step, 1, Settings(), (), ImageSpec("layers", [step]), {"TOKEN": "x"}))


# ---- scrubbing


def test_scrub_finds_a_changed_byte_and_takes_the_layer_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(tmp_path)
    monkeypatch.setattr(builder, "SCRUB_INTERVAL", 0.001)
    for key in ("good", "bad"):
        building = made.layers.begin()
        (building / "tree").mkdir()
        (building / "tree/file").write_text("hello")
        made.layers.settle(made.layers.publish(building, Layer(key, "a step", building)))
    bad = made.layers.find("bad")
    assert bad is not None
    (bad.tree / "file").write_text("hellp")

    gone = asyncio.Event()
    quarantine = made.layers.quarantine

    def told(layer: Layer, reason: str) -> None:
        quarantine(layer, reason)
        gone.set()

    monkeypatch.setattr(made.layers, "quarantine", told)

    async def run() -> None:
        made.start()
        await gone.wait()
        await made.close()

    asyncio.run(asyncio.wait_for(run(), 20))
    assert made.layers.find("good") is not None
    assert made.layers.prune(set())
