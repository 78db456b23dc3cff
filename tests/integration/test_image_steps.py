"""Steps with secrets and variables, of Poetry and of git; entrypoints; images named in containers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import squall
from squall.exception import BuildError, Error
from tests.conftest import wait_until
from tests.integration.conftest import DEBIAN_PYTHON
from tests.integration.support import Heard, content, layers_in, on

pytestmark = pytest.mark.root


def base() -> squall.Image:
    return squall.Image.debian_slim(DEBIAN_PYTHON)


@pytest.fixture(scope="module", autouse=True)
def debian(debian_home: Path) -> Path:
    """The home, with the base built in it."""
    return debian_home


# ---- secrets and variables of a step

SECRET = "hunter22-and-more"


def test_secret_of_a_step_reaches_its_commands_and_nothing_else(debian: Path) -> None:
    secret = squall.Secret.from_dict({"TOKEN": SECRET})
    heard = Heard()
    command = f"test \"$TOKEN\" = '{SECRET[:4]}''{SECRET[4:]}'; echo told: $TOKEN; env | wc -c > /size"
    image = base().run_commands(command, secrets=[secret]).run_commands("env > /later")
    image.build(heard)
    assert b"told: ***" in heard.text
    assert "TOKEN" not in content(image, "/later")
    found = subprocess.run(["grep", "-rlF", SECRET, str(debian)], capture_output=True, text=True, check=False)
    assert found.stdout == ""


def test_new_value_of_a_secret_builds_nothing() -> None:
    def image(value: str) -> squall.Image:
        return base().run_commands("echo asked > /asked", secrets=[squall.Secret.from_dict({"TOKEN": value})])

    image("first value").build(Heard())
    heard = Heard()
    image("second value").build(heard)
    assert heard.steps == []


def test_layer_that_needs_a_secret_is_not_built_again_without_it(debian: Path) -> None:
    image = base().run_commands("date +%N > /made", secrets=[squall.Secret.from_dict({"TOKEN": SECRET})])
    before = layers_in(debian)
    image.build(Heard())
    same = squall.Image.from_id(image.image_id)
    prune = [sys.executable, "-m", "squall.cli", "image", "prune", image.image_id]

    def is_pruned() -> bool:
        subprocess.run(prune, check=False, timeout=60)  # it is refused while the layer is written out
        return layers_in(debian) <= before

    wait_until(is_pruned, "its layer, which stays while it is written out, is gone")
    with pytest.raises(BuildError, match="needs the secret `TOKEN`") as caught:
        same.build(Heard())
    assert "call `image.build()` in it" in caught.value.hint
    image.build(Heard())
    same.build(Heard())


def test_variables_of_a_step_are_its_own() -> None:
    image = base().run_commands("echo $COLOUR > /step", env={"COLOUR": "blue"}).run_commands("echo .$COLOUR. > /next")
    assert (content(image, "/step"), content(image, "/next")) == ("blue\n", "..\n")


def test_functions_that_run_in_a_build_get_secrets_and_variables_too() -> None:
    def keep() -> None:
        import os

        with open("/kept", "w") as file:
            file.write(f"{len(os.environ['TOKEN'])} {os.environ['COLOUR']}")

    secret = squall.Secret.from_dict({"TOKEN": SECRET})
    assert content(base().run_function(keep, secrets=[secret], env={"COLOUR": "blue"}), "/kept") == "17 blue"


# ---- projects and repositories

PROJECT = """
[tool.poetry]
name = "mine"
version = "1"
description = ""
authors = []

[tool.poetry.dependencies]
python = "^3.11"
six = "1.17.0"

[tool.poetry.group.more.dependencies]
iniconfig = "*"
"""
LOCK = """
[[package]]
name = "iniconfig"
version = "2.3.1"
description = ""
optional = false
python-versions = ">=3.10"
groups = ["more"]
files = [
    {file = "iniconfig-2.3.1-py3-none-any.whl", hash = "sha256:9121e2c1fdb355232495be3194c8dfe87ccc2d5dee45947b78e68f499790d7a7"},
]

[[package]]
name = "six"
version = "1.17.0"
description = ""
optional = false
python-versions = "!=3.0.*,!=3.1.*,!=3.2.*,>=2.7"
groups = ["main"]
files = [
    {file = "six-1.17.0-py2.py3-none-any.whl", hash = "sha256:4721f391ed90541fddacab5acf947aa0d3dc7d27b2e1e8eda2be8970586c3274"},
]

[metadata]
lock-version = "2.1"
python-versions = "^3.11"
content-hash = "d6882089a07b32202b39210f161ea3eec9480ac3de88af1d54390d99e516508f"
"""  # noqa: E501


def test_locked_dependencies_of_a_poetry_project_go_in_without_poetry(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    (tmp_path / "poetry.lock").write_text(LOCK)

    def look() -> list[bool]:
        import importlib.util

        return [importlib.util.find_spec(name) is not None for name in ("six", "iniconfig", "poetry")]

    project = str(tmp_path / "pyproject.toml")
    assert on(base().poetry_install_from_file(project), look) == [True, True, False]
    assert on(base().poetry_install_from_file(project, without=["more"]), look) == [True, False, False]


def test_lock_that_is_not_the_projects_fails_the_step(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(PROJECT.replace("1.17.0", "1.16.0"))
    (tmp_path / "poetry.lock").write_text(LOCK)
    with pytest.raises(BuildError, match="poetry install") as caught:
        base().poetry_install_from_file(str(tmp_path / "pyproject.toml")).build(Heard())
    assert "poetry.lock" in caught.value.message


def test_package_comes_from_a_git_repository(debian: Path) -> None:
    """A repository within the image stands for the one on the host: no server with a certificate is at hand."""
    setup = "from setuptools import setup; setup(name='thing', version='7', py_modules=['thing'])"
    repository = base().run_commands(
        "command -v git || { apt-get -qq update; apt-get -qq -y install git > /dev/null; }",
        "mkdir -p /srv/owner/thing",
        f'cd /srv/owner/thing && git init -q && echo "VALUE = 7" > thing.py && echo "{setup}" > setup.py'
        " && git add . && git -c user.name=x -c user.email=x@x commit -qm x && git tag v7",
        "git config --system url.file:///srv/.insteadOf https://github.com/",
        "git config --system safe.directory '*'",
    )
    secret = squall.Secret.from_dict({"GITHUB_TOKEN": SECRET})
    image = repository.pip_install_private_repos("github.com/owner/thing@v7", git_user="me", secrets=[secret])

    def look() -> int:
        import thing  # type: ignore[import-not-found]

        return int(thing.VALUE)

    assert on(image, look) == 7
    found = subprocess.run(["grep", "-rlF", SECRET, str(debian)], capture_output=True, text=True, check=False)
    assert found.stdout == ""


# ---- the cache, ignored


def test_ignoring_the_cache_builds_all_anew_and_leaves_what_others_use(
    debian: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = base().run_commands("date +%s%N > /stamp")
    first = content(image, "/stamp")
    before = layers_in(debian)
    monkeypatch.setenv("SQUALL_IGNORE_CACHE", "1")
    heard = Heard()
    image.build(heard)
    assert [step.split()[0] for step in heard.steps] == ["1/2", "1/2", "2/2"]
    assert content(image, "/stamp") != first
    monkeypatch.delenv("SQUALL_IGNORE_CACHE")
    assert before <= layers_in(debian)
    assert content(image, "/stamp") == first


# ---- entrypoints and commands

BEGIN = r"""printf '#!/bin/sh\necho "$1 $COLOUR" > /tmp/began\nshift\nexec "$@"\n' > /begin && chmod +x /begin"""


def begun() -> squall.Image:
    return base().env({"COLOUR": "blue"}).run_commands(BEGIN).entrypoint(["/begin", "an argument"])


def test_entrypoint_runs_before_the_function_and_becomes_it() -> None:
    def look(number: int) -> tuple[str, str, int]:
        import os

        with open("/tmp/began") as file:
            return file.read(), os.environ["MINE"], number

    assert on(begun(), look, 3, env={"MINE": "later"}) == ("an argument blue\n", "later", 3)


def test_container_with_an_entrypoint_has_the_walls_of_every_container() -> None:
    def look() -> dict[str, str]:
        with open("/proc/self/status") as file:
            return dict(line.split(":", 1) for line in file)

    status = on(begun(), look)
    assert {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert (status["NoNewPrivs"].strip(), status["Seccomp"].strip()) == ("1", "2")


@pytest.mark.parametrize(("words", "said"), [(["/bin/true"], "exited with code 0"), (["/none"], "cannot be run")])
def test_entrypoint_that_does_not_become_the_function_is_told(words: list[str], said: str) -> None:
    heard = Heard()
    app = squall.App("images", image=base().entrypoint(words))

    def body() -> None: ...

    function = app.function(serialized=True, name="body", retries=0, startup_timeout=20)(body)
    with app.run(output=heard), pytest.raises(Error) as caught:
        function.remote()
    assert said in str(caught.value) + heard.text.decode()


def run(file: Path, *words: str, command: str = "run") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "squall.cli", command, *words, str(file)],
        capture_output=True, text=True, timeout=60, check=False, input="",
    )  # fmt: skip


def test_shell_runs_the_command_of_the_image(tmp_path: Path) -> None:
    (tmp_path / "commanded.py").write_text(
        f"import squall\n\nimage = squall.Image.debian_slim({DEBIAN_PYTHON!r}).cmd(['echo', 'the', \"image's own\"])\n"
        "app = squall.App('commanded', image=image)\n\n\n@app.function()\ndef body():\n    pass\n"
    )
    done = run(tmp_path / "commanded.py", command="shell")
    assert done.stdout == "the image's own\n", done.stderr
    assert run(tmp_path / "commanded.py", "-c", "echo mine", command="shell").stdout == "mine\n"


# ---- images in containers


def test_program_whose_image_reads_files_of_this_machine_runs_in_containers(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("six==1.17.0\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/kept").write_text("kept")
    (tmp_path / "program.py").write_text(
        "import os\n\nimport squall\n\n"
        f"image = squall.Image.debian_slim({DEBIAN_PYTHON!r})\n"
        f"image = image.pip_install_from_requirements('{tmp_path}/requirements.txt')\n"
        f"image = image.add_local_dir('{tmp_path}/data', '/data', ignore=~squall.FilePatternMatcher('kept'))\n"
        "app = squall.App('program', image=image)\n\n\n@app.function()\ndef body():\n    import six\n\n"
        "    return six.__version__, os.listdir('/data')\n\n\n"
        "@app.local_entrypoint()\ndef main():\n    print(body.remote())\n"
    )
    done = run(tmp_path / "program.py")
    assert "('1.17.0', ['kept'])" in done.stdout, done.stderr


@pytest.mark.parametrize("version", [(3, 9), (2, 7)])
def test_image_whose_python_is_too_old_says_so(version: tuple[int, int]) -> None:
    """A Python that says it is older than it is: no Debian here has one."""
    line = f"import sys; sys.version_info = ({version[0]}, {version[1]}, 0, 'final', 0)"
    image = base().run_commands(f'echo "{line}" > /usr/lib/python3/dist-packages/sitecustomize.py')
    image = image.run_commands("rm -f /usr/lib/python3.11/sitecustomize.py /etc/python3.11/sitecustomize.py")
    with pytest.raises(
        Error, match=rf"the Python of the image is {version[0]}\.{version[1]} and containers need 3\.10"
    ):
        content(image, "/etc/hostname")
