"""Images: a base made cold, packages on it, nothing changed, first calls; and the same with `podman build`."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
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
    with common.own_home() as home:
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
        first_call(many)
        common.row("first call, 20,000 files more", [first_call(many) for _ in range(ROUNDS)], "ms")
        common.row("first call, without them", [first_call(base()) for _ in range(ROUNDS)], "ms")
        common.row("one line of source changed, to its result", changed_lines(packages(False)), "s")
        compare(base_layers(home))


def changed_lines(image: squall.Image) -> list[float]:
    """Nothing is built: from the edited source to the first result of the app that has it."""
    times = []
    for number in range(ROUNDS):
        app = squall.App("bench-line", image=image)
        source: dict[str, Callable[[], int]] = {}
        exec(f"def body():\n    return {number}\n", source)
        function = app.function(serialized=True, name="body")(source["body"])

        def run(app: squall.App = app, function: squall.Function[[], int] = function) -> None:
            with app.run(output=Silent()):
                function.remote()

        times.append(common.timed(run))
    return times


def base_layers(home: Path) -> list[Path]:
    """The two layers of the base, the topmost first."""
    files = next((home / "node/layers").glob("*-files-*"))
    key = files.name.partition("-files-")[0]
    whole = next(path for path in (home / "node/layers").glob(f"{key}-*") if path != files)
    return [whole / "tree", files / "tree"]


# ---- podman


def compare(layers: list[Path]) -> None:
    """The same steps by `podman build`, on a base made of the same files, with the same uv and a warm cache of its own.

    It does not compile what it installs, as Squall does.
    """
    if shutil.which("podman") is None:
        print("podman is not installed; no comparison")
        return
    with tempfile.TemporaryDirectory(prefix="squall-podman-") as directory, contextlib.ExitStack() as stack:
        podman = Podman(Path(directory))
        stack.callback(podman.close)
        podman.import_base(layers)
        podman.build("1")
        common.row("podman build, warm package cache", [podman.build(str(n)) for n in range(2, ROUNDS + 2)], "s")
        common.row("podman build, nothing changed", [podman.build("2") for _ in range(ROUNDS)], "s")
        lines = [podman.build("2", source=f"print({n})\n") for n in range(ROUNDS)]
        common.row("podman build, one line of source changed", lines, "s")


class Podman:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "context").mkdir()
        (directory / "cache").mkdir()
        uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or "uv"
        shutil.copy(uv, directory / "context/uv")

    def run(self, *words: str, stdin: int | None = None) -> None:
        places = ["--root", f"{self.directory}/root", "--runroot", f"{self.directory}/run"]
        command = ["podman", *places, "--cgroup-manager", "cgroupfs", *words]
        done = subprocess.run(command, check=False, stdin=stdin, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"podman {words[0]} failed: {done.stderr}")

    def close(self) -> None:
        self.run("rmi", "--all", "--force")
        subprocess.run(["umount", self.directory / "root/overlay"], check=False, stderr=subprocess.DEVNULL)

    def import_base(self, layers: list[Path]) -> None:
        """The base that Squall built, topmost layer first, as an image of podman's."""
        whole = self.directory / "whole"
        whole.mkdir()
        options = "ro,userxattr,lowerdir=" + ":".join(map(str, layers))
        subprocess.run(["mount", "-t", "overlay", "squall-bench", "-o", options, whole], check=True)
        try:
            with subprocess.Popen(["tar", "-C", whole, "-c", "."], stdout=subprocess.PIPE) as tar:
                assert tar.stdout is not None
                self.run("import", "-", "debian-python", stdin=tar.stdout.fileno())
        finally:
            subprocess.run(["umount", whole], check=True)

    def build(self, number: str, source: str = "") -> float:
        context = self.directory / "context"
        (context / "main.py").write_text(source)
        (context / "Containerfile").write_text(
            f"FROM localhost/debian-python\nCOPY uv /uv\nENV N={number} UV_CACHE_DIR=/cache UV_LINK_MODE=copy"
            " SSL_CERT_FILE=/certificates.pem UV_BREAK_SYSTEM_PACKAGES=1\n"
            "RUN /uv pip install --system -q numpy pandas\nCOPY main.py /main.py\n"
        )
        shown = ["-v", f"{self.directory}/cache:/cache"]
        shown += ["-v", "/etc/ssl/certs/ca-certificates.crt:/certificates.pem:ro"]
        # Not all runtimes work on all machines, and without one it is no slower.
        words = ["build", "-q", "--layers", "--isolation", "chroot", "--network", "host", *shown]
        return common.timed(lambda: self.run(*words, "-t", "bench", str(context)))


if __name__ == "__main__":
    main()
