"""Images, all the way: recipe, build in containers, layers, and functions that run on them.

One Debian is made for the whole module; it takes some 20 s and needs a Debian mirror.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import squall
from squall.exception import BuildError, InvalidError
from squall.protocol.messages import LogChunk, Notice
from tests.conftest import wait_until
from tests.integration.support import Outcome, inits, pid_of

pytestmark = pytest.mark.root

PYTHON = "3.11"


class Heard:
    """An output that keeps what it is given."""

    def __init__(self) -> None:
        self.text = b""
        self.steps: list[str] = []

    def log(self, chunk: LogChunk, data: bytes) -> None:
        self.text += data

    def notice(self, notice: Notice) -> None:
        if notice.kind == "build" and notice.data["state"] == "step":
            self.steps.append(str(notice.data["reason"]))


def base() -> squall.Image:
    return squall.Image.debian_slim(PYTHON)


@pytest.fixture(scope="module", autouse=True)
def debian(shared_home: Path) -> Iterator[Path]:
    """The home, with the base built in it."""
    base().build(Heard())
    yield shared_home


def layers(home: Path) -> set[str]:
    return {path.name for path in (home / "node/layers").iterdir() if (path / "tree").is_dir()}


def on(image: squall.Image, body: Any, *args: Any, **options: Any) -> Any:
    """The result of a function run on an image."""
    app = squall.App("images", image=image)
    function = app.function(serialized=True, name="body", **options)(body)
    with app.run(output=Heard()):
        return function.remote(*args)


def content(image: squall.Image, path: str) -> str:
    """What a container on the image finds in a file."""

    def read(path: str) -> str:
        with open(path) as file:
            return file.read()

    found: str = on(image, read, path)
    return found


# ---- what images give


def test_function_runs_on_the_images_python_and_files() -> None:
    def where() -> tuple[str, str, str]:
        import os
        import sys

        with open("/etc/os-release") as file:
            return sys.executable, file.read(), os.getcwd()

    executable, release, directory = on(base(), where)
    assert executable == "/usr/bin/python3"
    assert 'VERSION_ID="12"' in release
    assert directory == "/root"


def test_commands_run_in_order_and_containers_see_what_they_made() -> None:
    image = base().run_commands("echo one > /made", "echo two >> /made").run_commands("echo three >> /made")
    assert content(image, "/made") == "one\ntwo\nthree\n"


def test_environment_and_workdir_hold_in_builds_and_in_containers() -> None:
    image = base().env({"GREETING": "hello"}).workdir("/work").run_commands('echo "$GREETING in $(pwd)" > said')

    def look() -> tuple[str, str, str]:
        import os

        with open("said") as file:
            return os.environ["GREETING"], os.getcwd(), file.read()

    assert on(image, look) == ("hello", "/work", "hello in /work\n")


def test_functions_own_environment_wins_over_the_images() -> None:
    def look() -> str:
        import os

        return os.environ["A"]

    assert on(base().env({"A": "image"}), look, env={"A": "function"}) == "function"


def test_python_packages_go_in_with_uv_and_are_compiled() -> None:
    def look() -> tuple[str, bool]:
        import os

        import six

        return six.__version__, os.path.exists(six.__cached__)

    assert on(base().uv_pip_install("six==1.17.0"), look) == ("1.17.0", True)


def test_python_packages_go_in_with_pip(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("six==1.17.0  # a comment\n")

    def look() -> str:
        import six

        return str(six.__version__)

    assert on(base().pip_install("six==1.17.0"), look) == "1.17.0"
    assert on(base().pip_install_from_requirements(str(tmp_path / "requirements.txt")), look) == "1.17.0"


def test_debian_packages_go_in_and_may_set_up_users() -> None:
    def look() -> str:
        import subprocess

        return subprocess.run(["tree", "--version"], capture_output=True, text=True, check=True).stdout

    assert "tree v" in on(base().apt_install("tree"), look)


def test_container_of_an_image_has_the_walls_of_every_container() -> None:
    def look() -> dict[str, str]:
        with open("/proc/self/status") as file:
            return dict(line.split(":", 1) for line in file)

    status = on(base(), look)
    assert {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert (status["NoNewPrivs"].strip(), status["Seccomp"].strip()) == ("1", "2")


def test_container_cannot_change_the_layers_of_its_image(debian: Path) -> None:
    def change() -> str:
        with open("/usr/lib/os-release", "w+") as file:
            file.write("changed")
            file.seek(0)
            return file.read()

    assert on(base(), change) == "changed"
    assert "Debian" in content(base(), "/usr/lib/os-release")


# ---- caching


def test_nothing_changed_means_nothing_is_built(debian: Path) -> None:
    image = base().run_commands("echo cached > /cached")
    image.build(Heard())
    before, heard = layers(debian), Heard()
    image.build(heard)
    assert (heard.steps, layers(debian)) == ([], before)


def test_changed_step_is_built_again_with_those_after_it() -> None:
    base().run_commands("echo a > /a").run_commands("echo b > /b").run_commands("echo c > /c").build(Heard())
    heard = Heard()
    base().run_commands("echo a > /a").run_commands("echo B > /b").run_commands("echo c > /c").build(heard)
    assert heard.steps == ["3/4 run echo B > /b", "4/4 run echo c > /c"]


def test_forced_step_is_built_again_with_those_after_it() -> None:
    def image(force: bool) -> squall.Image:
        return base().run_commands("date +%N > /first", force_build=force).run_commands("cp /first /second")

    first = content(image(False), "/second")
    assert content(image(False), "/second") == first
    second = content(image(True), "/second")
    assert second != first
    assert content(image(False), "/second") == second


def test_image_outlives_its_server(debian: Path) -> None:
    image = base().run_commands("date +%N > /lasting")
    first = content(image, "/lasting")
    end_server(debian)
    assert content(image, "/lasting") == first


def end_server(home: Path) -> None:
    subprocess.run([sys.executable, "-m", "squall.cli", "down"], check=True, timeout=30)
    wait_until(lambda: not pid_of(home, "server") and not pid_of(home, "node"), "server and agent are gone")


# ---- failures


def fails(image: squall.Image) -> BuildError:
    with pytest.raises(BuildError) as caught:
        image.build(Heard())
    return caught.value


def test_failing_command_is_named_with_its_output_and_leaves_no_layer(debian: Path) -> None:
    before = layers(debian)
    error = fails(base().run_commands("echo so far; echo and no further >&2; exit 7"))
    assert "image step 2 of 2, `run echo so far; echo and no further >&2; exit 7`, failed: exited with code 7" in str(error)
    assert "    so far\n    and no further" in str(error)
    assert layers(debian) == before
    assert not list((debian / "node/layers").glob(".building-*"))


@pytest.mark.parametrize("method", ["uv_pip_install", "pip_install"])
def test_unknown_package_has_a_hint(method: str) -> None:
    error = fails(getattr(base(), method)("no-such-package-anywhere-at-all"))
    assert "no-such-package-anywhere-at-all" in error.message
    assert "check the name" in error.hint


def test_impossible_pins_are_told() -> None:
    assert "check the name and the versions" in fails(base().uv_pip_install("six==1.16.0", "six==1.17.0")).hint


def test_package_that_needs_a_compiler_has_a_hint() -> None:
    error = fails(base().run_commands("echo \"error: command 'gcc' failed: No such file or directory\"; exit 1"))
    assert "build-essential" in error.hint


def test_unknown_debian_package_has_a_hint() -> None:
    assert "packages.debian.org" in fails(base().apt_install("no-such-package-at-all")).hint


def test_failed_step_is_tried_again_next_time() -> None:
    image = base().run_commands("exit 1")
    heard = Heard()
    fails(image)
    with pytest.raises(BuildError):
        image.build(heard)
    assert heard.steps == ["2/2 run exit 1"]


def test_image_without_a_python_says_so() -> None:
    image = base().run_commands("rm -f /usr/bin/python3* /usr/local/bin/python*")
    with pytest.raises(squall.exception.Error, match="the image has no `python3`"):
        content(image, "/etc/hostname")


def test_nothing_can_be_built_on_the_host() -> None:
    with pytest.raises(InvalidError, match=r"cannot add to `Image\.host\(\)`"):
        squall.Image.host().run_commands("true")


# ---- two at once, and builds that are cut off


def test_two_builds_of_the_same_step_are_one(debian: Path) -> None:
    image = base().run_commands("sleep 1; date +%N > /once")
    before = layers(debian)
    builds = [Outcome(lambda: image.build(Heard())) for _ in range(3)]
    for outcome in builds:
        outcome.result()
    assert len(layers(debian) - before) == 1


def test_two_images_share_the_step_they_have_in_common(debian: Path) -> None:
    common = base().run_commands("sleep 1; date +%N > /common")
    before = layers(debian)
    builds = [Outcome(lambda n=n: common.run_commands(f"echo {n} > /own").build(Heard())) for n in range(2)]
    for outcome in builds:
        outcome.result()
    assert len(layers(debian) - before) == 3


def test_output_comes_while_the_command_runs() -> None:
    heard = Heard()
    image = base().run_commands("echo begun; sleep 1.5; echo ended")
    outcome = Outcome(lambda: image.build(heard))
    wait_until(lambda: b"begun" in heard.text, "the first line is heard")
    assert b"ended" not in heard.text
    outcome.result()
    assert b"ended" in heard.text


def test_build_ends_with_its_client(debian: Path) -> None:
    program = (
        f"import squall; squall.Image.debian_slim({PYTHON!r}).run_commands('echo begun; sleep 1000').build()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE) as client:
        assert client.stderr is not None
        while b"begun" not in client.stderr.readline():
            pass
        client.kill()
    wait_until(lambda: not list((debian / "node/layers").glob(".building-*")), "the build is undone")
    assert "build" not in inits(debian)


def test_build_whose_agent_is_killed_leaves_nothing_and_is_begun_again(debian: Path) -> None:
    image = base().run_commands("echo half > /half; echo begun; sleep 2; echo whole > /half")
    heard = Heard()
    outcome = Outcome(lambda: image.build(heard))
    wait_until(lambda: b"begun" in heard.text, "the command runs")
    before = layers(debian)
    os.kill(pid_of(debian, "node"), signal.SIGKILL)
    outcome.result()
    assert heard.text.count(b"begun") == 2
    assert content(image, "/half") == "whole\n"
    assert not list((debian / "node/layers").glob(".building-*"))
    assert len(layers(debian) - before) == 1


# ---- damage


def test_truncated_file_of_a_layer_is_noticed_and_the_layer_built_again(debian: Path) -> None:
    image = base().run_commands("echo precious > /precious; sleep 0.1")
    before = layers(debian)
    image.build(Heard())
    (name,) = layers(debian) - before
    place = debian / "node/layers" / name
    wait_until((place / "index").exists, "the layer is written out")
    (place / "tree/precious").write_text("")
    os.kill(pid_of(debian, "node"), signal.SIGKILL)
    assert content(image, "/precious") == "precious\n"
    assert name not in layers(debian)
