"""Images: a base made cold, packages on it, nothing changed, first calls; and the same with `podman build`."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import squall
from squall.protocol.messages import LogChunk, Notice

if squall.is_local():  # a container sees this file alone
    import common

PYTHON = "3.11"
ROUNDS = 5
MANY_FILES = 20_000


class Silent:
    def log(self, chunk: LogChunk, data: bytes) -> None:
        pass

    def notice(self, notice: Notice) -> None:
        pass


def base() -> squall.Image:
    return squall.Image.debian_slim(PYTHON)


def packages(force: bool) -> squall.Image:
    return base().uv_pip_install("numpy", "pandas", force_build=force)


def build(image: squall.Image) -> float:
    return common.timed(lambda: image.build(Silent()))


def first_call(image: squall.Image) -> float:
    """From a running app to the first result, in milliseconds."""
    app = squall.App("bench-image", image=image)

    def nothing() -> int:
        return 1

    function = app.function(serialized=True, name="nothing")(nothing)
    with app.run(output=Silent()):
        return common.timed(function.remote) * 1000


def main() -> None:
    with common.own_home():
        squall.Client.current()
        print(f"debian_slim, nothing cached: {build(base()):.1f} s")
        print(f"numpy and pandas, empty package cache: {build(packages(False)):.1f} s")
        common.row("numpy and pandas, warm package cache", [build(packages(True)) for _ in range(ROUNDS)], "s")
        common.row("nothing changed", [build(packages(False)) for _ in range(ROUNDS)], "s")
        calls = []
        for number in range(ROUNDS):
            image = base().run_commands(f"echo {number} > /number")
            build(image)
            calls.append(first_call(image))
        common.row("first call on a new image, right after its build", calls, "ms")
        many = base().run_commands(f"mkdir /many && cd /many && seq {MANY_FILES} | xargs touch")
        build(many)
        common.row("first call, 20,000 files more", [first_call(many) for _ in range(ROUNDS)], "ms")
    compare()


def compare() -> None:
    """The same with podman, where it is installed and has a base image at hand."""
    if shutil.which("podman") is None:
        print("podman is not installed; no comparison")
        return
    if subprocess.run(["podman", "image", "exists", "debian-python"], check=False).returncode:
        print("podman has no image `debian-python`; no comparison")
        return
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "Containerfile")
        times = []
        for number in range(ROUNDS):
            file.write_text(
                f"FROM debian-python\nARG N={number}\n"
                "RUN --mount=type=cache,target=/uv UV_CACHE_DIR=/uv uv pip install --system numpy pandas\n"
            )
            began = time.perf_counter()
            subprocess.run(["podman", "build", "-q", directory], check=True, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - began)
        common.row("podman build, warm package cache", times, "s")


if __name__ == "__main__":
    main()
