"""Images, all the way: recipe, build in containers, layers, and functions that run on them."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import squall
from squall.exception import BuildError, InvalidError
from squall.protocol.messages import BuildImage, Hello, Reply
from squall.protocol.requests import CreateWorkspace
from tests.conftest import wait_until
from tests.integration.conftest import DEBIAN_PYTHON as PYTHON
from tests.integration.support import Heard, Outcome, Wire, content, inits, layers_in, on, pid_of

pytestmark = pytest.mark.root


def base() -> squall.Image:
    return squall.Image.debian_slim(PYTHON)


@pytest.fixture(scope="module", autouse=True)
def debian(debian_home: Path) -> Path:
    """The home, with the base built in it."""
    return debian_home


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

        import six  # type: ignore[import-untyped]

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


def test_workspaces_share_neither_layers_nor_caches_of_builds() -> None:
    """What a step made may hold what only one workspace's secrets gave, or what one that lies in wait has put there."""
    image = base().run_commands("test ! -e /.squall/cache/planted", "echo mine > /.squall/cache/planted")
    spec, _ = image._resolve()
    image.build()
    with Wire() as wire:
        wire.ask(CreateWorkspace("other"))
    with Wire(hello=False) as wire:
        wire.sock.settimeout(120)
        wire.ask(Hello("client", workspace="other"))
        answer, _ = wire.ask(BuildImage(spec))
        assert isinstance(answer, Reply), answer
        assert answer.data["built"] == 1


def test_nothing_changed_means_nothing_is_built(debian: Path) -> None:
    image = base().run_commands("echo cached > /cached")
    image.build(Heard())
    before, heard = layers_in(debian), Heard()
    image.build(heard)
    assert (heard.steps, layers_in(debian)) == ([], before)


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
    before = layers_in(debian)
    error = fails(base().run_commands("echo so far; echo and no further >&2; exit 7"))
    assert "step 2 of 2, `run echo so far; echo and no further >&2; exit 7`, failed: exited with code 7" in str(error)
    assert "    so far\n    and no further" in str(error)
    assert layers_in(debian) == before
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


# ---- your own files and code


def test_local_files_are_shown_and_an_edit_builds_nothing(tmp_path: Path) -> None:
    (tmp_path / "conf").write_text("one")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/new\nline").write_text("strange")
    image = base().add_local_file(str(tmp_path / "conf"), "/etc/app/").add_local_dir(str(tmp_path / "data"), "/data")
    assert content(image, "/etc/app/conf") == "one"
    assert content(image, "/data/new\nline") == "strange"
    (tmp_path / "conf").write_text("two")
    heard = Heard()
    image.build(heard)
    assert heard.steps == []
    assert content(image, "/etc/app/conf") == "two"


def test_local_files_shown_cannot_be_changed(tmp_path: Path) -> None:
    (tmp_path / "conf").write_text("one")

    def change() -> str:
        try:
            with open("/conf", "w"):
                return "changed"
        except OSError as error:
            return type(error).__name__

    assert on(base().add_local_file(str(tmp_path / "conf"), "/conf"), change) == "OSError"


def test_local_files_may_be_copied_for_later_steps_through_links_of_the_image(tmp_path: Path) -> None:
    (tmp_path / "tool").write_text("#!/bin/sh\necho from the tool\n")
    (tmp_path / "tool").chmod(0o755)
    image = (
        base().add_local_file(str(tmp_path / "tool"), "/bin/tool", copy=True).run_commands("tool > /made; test -L /bin")
    )
    assert content(image, "/made") == "from the tool\n"


def test_step_that_builds_after_files_that_are_only_shown_is_refused(tmp_path: Path) -> None:
    (tmp_path / "conf").touch()
    image = base().add_local_file(str(tmp_path / "conf"), "/conf").run_commands("true")
    with pytest.raises(InvalidError, match="only shown when a container starts"):
        image.build(Heard())


def test_local_modules_can_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lone_module.py").write_text("VALUE = 1\n")
    (tmp_path / "whole_package/inner").mkdir(parents=True)
    (tmp_path / "whole_package/__init__.py").touch()
    (tmp_path / "whole_package/inner/__init__.py").write_text("VALUE = 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def look() -> tuple[int, int]:
        import lone_module  # type: ignore[import-not-found]
        import whole_package.inner  # type: ignore[import-not-found]

        return lone_module.VALUE, whole_package.inner.VALUE

    for copy in (False, True):
        image = base().add_local_python_source("lone_module", "whole_package", copy=copy)
        assert on(image, look) == (1, 2)


def test_function_runs_once_in_the_image_and_again_when_its_arguments_change() -> None:
    def fetch(text: str) -> None:
        print("fetching")
        with open("/weights", "w") as file:
            file.write(text)

    first, again, other = Heard(), Heard(), Heard()
    base().run_function(fetch, args=("one",)).build(first)
    base().run_function(fetch, args=("one",)).build(again)
    image = base().run_function(fetch, kwargs={"text": "two"}).build(other)
    assert (b"fetching" in first.text, again.steps, b"fetching" in other.text) == (True, [], True)
    assert content(image, "/weights") == "two"


def test_function_that_raises_fails_its_step_with_its_traceback() -> None:
    def broken() -> None:
        raise KeyError("not there")

    assert "KeyError: 'not there'" in fails(base().run_function(broken)).message


def test_function_is_held_to_its_timeout() -> None:
    def hang() -> None:
        import time

        time.sleep(1000)

    assert "it took longer than 1 s" in fails(base().run_function(hang, timeout=1)).message


def test_dependencies_of_projects_go_in_without_the_project(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "mine"\nversion = "1"\nrequires-python = ">=3.11"\ndependencies = ["six==1.17.0"]\n'
        '[project.optional-dependencies]\nmore = ["iniconfig"]\n'
    )

    def look() -> list[bool]:
        import importlib.util

        return [importlib.util.find_spec(name) is not None for name in ("six", "iniconfig", "mine")]

    project = str(tmp_path / "pyproject.toml")
    assert on(base().pip_install_from_pyproject(project), look) == [True, False, False]
    assert on(base().uv_sync(str(tmp_path), frozen=False, extras=["more"]), look) == [True, True, False]


def test_shell_of_later_commands_may_be_chosen() -> None:
    image = base().shell(["/bin/bash", "-ec"]).run_commands("[[ a == a ]] && echo $BASH_VERSION > /version")
    assert content(image, "/version").startswith("5.")


def test_image_is_found_again_by_its_id() -> None:
    image = base().run_commands("echo found > /found").build(Heard())
    same = squall.Image.from_id(image.image_id)
    assert content(same.run_commands("cat /found > /copied"), "/copied") == "found\n"


# ---- looking after them


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "squall.cli", "image", *words], capture_output=True, text=True, timeout=60, check=False
    )


def test_images_can_be_looked_at_and_explained() -> None:
    image = base().run_commands("echo looked at").run_commands("true").build(Heard())
    other = base().run_commands("echo looked for").run_commands("true").build(Heard())
    assert image.image_id in command("list").stdout
    assert "run echo looked at" in command("info", image.image_id).stdout
    assert "looked at\n" in command("logs", image.image_id).stdout
    told = command("why", image.image_id, other.image_id).stdout
    assert "step 2 differs" in told
    assert "- echo looked for" in told


def test_shell_is_in_the_functions_image(tmp_path: Path) -> None:
    (tmp_path / "shelled.py").write_text(
        f"import squall\n\nimage = squall.Image.debian_slim({PYTHON!r}).env({{'GREETING': 'hello'}})\n"
        "image = image.run_commands('echo within > /where')\napp = squall.App('shelled', image=image)\n\n\n"
        "@app.function()\ndef body():\n    pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "squall.cli", "shell", f"{tmp_path}/shelled.py::body"],
        input="cat /where; echo $GREETING\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.splitlines()[:2] == ["within", "hello"], done.stderr


def test_prune_removes_what_nothing_uses_and_leaves_what_runs(debian: Path) -> None:
    used = base().run_commands("echo used > /used")
    unused = base().run_commands("echo unused > /unused").build(Heard())
    before = layers_in(debian)
    app = squall.App("user", image=used)

    def read() -> str:
        with open("/used") as file:
            return file.read()

    function = app.function(serialized=True, name="read")(read)
    with app.run(output=Heard()):
        assert function.remote() == "used\n"
        assert "in use" in command("prune", used.image_id).stderr
        pruned = command("prune")
        assert pruned.returncode == 0, pruned.stderr
        assert function.remote() == "used\n"
    assert len(layers_in(debian)) == 3 < len(before)
    assert unused.image_id not in command("list").stdout
    assert content(unused, "/unused") == "unused\n"


def test_flipped_bit_is_found_by_verify_and_the_layer_built_again(debian: Path) -> None:
    image = base().run_commands("echo whole > /flipped; date +%N > /stamp")
    before = layers_in(debian)
    image.build(Heard())
    (name,) = layers_in(debian) - before
    place = debian / "node/layers" / name
    wait_until((place / "index").exists, "the layer is written out")
    assert command("verify", image.image_id).returncode == 0
    (place / "tree/flipped").write_text("whale\n")
    told = command("verify", image.image_id)
    assert (told.returncode, "damaged: run echo whole" in told.stdout) == (1, True)
    assert content(image, "/flipped") == "whole\n"


def test_nothing_can_be_built_on_the_host() -> None:
    with pytest.raises(InvalidError, match=r"cannot add to `Image\.host\(\)`"):
        squall.Image.host().run_commands("true")


# ---- two at once, and builds that are cut off


def test_two_builds_of_the_same_step_are_one(debian: Path) -> None:
    image = base().run_commands("sleep 1; date +%N > /once")
    before = layers_in(debian)
    builds = [Outcome(lambda: image.build(Heard())) for _ in range(3)]
    for outcome in builds:
        outcome.result()
    assert len(layers_in(debian) - before) == 1


def test_two_images_share_the_step_they_have_in_common(debian: Path) -> None:
    common = base().run_commands("sleep 1; date +%N > /common")
    before = layers_in(debian)
    images = [common.run_commands(f"echo {number} > /own") for number in range(2)]
    builds = [Outcome(functools.partial(image.build, Heard())) for image in images]
    for outcome in builds:
        outcome.result()
    assert len(layers_in(debian) - before) == 3


def test_output_comes_while_the_command_runs() -> None:
    heard = Heard()
    image = base().run_commands("echo begun; sleep 1.5; echo ended")
    outcome = Outcome(lambda: image.build(heard))
    wait_until(lambda: b"begun" in heard.text, "the first line is heard")
    assert b"ended" not in heard.text
    outcome.result()
    assert b"ended" in heard.text


def test_build_ends_with_its_client(debian: Path) -> None:
    program = f"import squall; squall.Image.debian_slim({PYTHON!r}).run_commands('echo begun; sleep 1000').build()"
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
    before = layers_in(debian)
    os.kill(pid_of(debian, "node"), signal.SIGKILL)
    outcome.result()
    assert heard.text.count(b"begun") == 2
    assert content(image, "/half") == "whole\n"
    assert not list((debian / "node/layers").glob(".building-*"))
    assert len(layers_in(debian) - before) == 1


# ---- damage


def test_truncated_file_of_a_layer_is_noticed_and_the_layer_built_again(debian: Path) -> None:
    image = base().run_commands("echo precious > /precious; sleep 0.1")
    before = layers_in(debian)
    image.build(Heard())
    (name,) = layers_in(debian) - before
    place = debian / "node/layers" / name
    wait_until((place / "index").exists, "the layer is written out")
    (place / "tree/precious").write_text("")
    os.kill(pid_of(debian, "node"), signal.SIGKILL)
    assert content(image, "/precious") == "precious\n"
    assert name not in layers_in(debian)
