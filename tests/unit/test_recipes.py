"""What the steps run: users' values are quoted, and settings of the host hold."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import pytest

from squall.exception import InvalidError
from squall.node.recipes import INPUTS, Recipe, base_files, recipe_of
from squall.node.settings import HostSettings
from squall.protocol.images import LAYER_KINDS, Settings
from squall.protocol.messages import ImageStep

EXAMPLES: dict[str, dict[str, Any]] = {
    "debian": {"suite": "bookworm"},
    "run": {"commands": ["make"]},
    "apt": {"packages": ["git"]},
    "pip": {"packages": ["six"]},
    "uv": {"packages": ["six"]},
    "uv_sync": {"pyproject": "", "lock": ""},
    "poetry": {"pyproject": "", "lock": ""},
    "private": {"repositories": ["github.com/a/b"], "git_user": "me", "secrets": ["GITHUB_TOKEN"]},
    "copy": {"target": "/x"},
    "function": {"name": "f", "args": "", "tag": "", "timeout": 1.0},
}


def recipe(kind: str, settings: Settings | None = None, host: HostSettings | None = None, **args: Any) -> Recipe:
    return recipe_of(ImageStep(kind, {**EXAMPLES[kind], **args}), settings or Settings(), host or HostSettings())


def text(made: Recipe) -> str:
    return "\n".join(made.command)


def test_every_kind_of_layer_has_a_recipe() -> None:
    assert set(EXAMPLES) == LAYER_KINDS
    for kind in LAYER_KINDS:
        assert recipe(kind).command


@pytest.mark.parametrize("kind", sorted(LAYER_KINDS - {"function", "run"}))
def test_scripts_are_scripts(kind: str) -> None:
    made = recipe(kind)
    assert made.command[:2] == ["/bin/sh", "-ec"]
    subprocess.run(["/bin/sh", "-n", "-c", made.command[2]], check=True, timeout=10)


def test_script_that_fetches_a_base_is_a_script() -> None:
    made = base_files(ImageStep("debian", {"suite": "bookworm"}), HostSettings())
    subprocess.run(["/bin/sh", "-n", "-c", made.command[2]], check=True, timeout=10)
    assert made.on_host


def test_one_command_is_given_to_the_shell_as_it_is() -> None:
    assert recipe("run", commands=["echo 'a b'"]).command == ["/bin/sh", "-c", "echo 'a b'"]
    assert recipe("run", Settings(shell=["/bin/bash", "-c"])).command == ["/bin/bash", "-c", "make"]


def test_several_commands_run_in_shells_of_their_own_until_one_fails() -> None:
    made = recipe("run", commands=["x=1; echo one", "echo two $x; false", "echo three"])
    done = subprocess.run(made.command, capture_output=True, text=True, timeout=10, check=False)
    assert (done.stdout, done.returncode) == ("one\ntwo\n", 1)


def test_values_of_users_are_quoted() -> None:
    evil = "x; touch /tmp/evil $(id)"
    for made in (
        recipe("uv", packages=[evil]),
        recipe("pip", options={"index_url": evil}),
        recipe("apt", packages=[evil]),
        recipe("copy", target=f"/{evil}"),
    ):
        assert f"'{evil}'" in text(made) or f"'/{evil}'" in text(made)


def test_options_are_told_to_pip_and_to_uv_in_their_own_words() -> None:
    options = {"extra_index_url": "https://e", "pre": True, "find_links": "https://f", "extra_options": "--no-deps"}
    pip, uv = text(recipe("pip", options=options)), text(recipe("uv", options=options))
    assert "--extra-index-url https://e --find-links https://f --pre --no-deps -- six" in pip
    assert "--index-strategy unsafe-best-match --prerelease allow --no-deps -- six" in uv


def test_requirements_are_a_file_of_the_step() -> None:
    made = recipe("uv", packages=[], requirements="six\n")
    assert made.inputs["requirements.txt"] == "six\n"
    assert f"-r {INPUTS}/requirements.txt" in text(made)


def test_environment_of_the_image_wins_over_the_hosts() -> None:
    host = HostSettings(environment={"UV_DEFAULT_INDEX": "host", "https_proxy": "p"})
    made = recipe("uv", Settings(env={"UV_DEFAULT_INDEX": "image"}), host)
    assert (made.environment["UV_DEFAULT_INDEX"], made.environment["https_proxy"]) == ("image", "p")


def test_base_is_made_from_the_hosts_mirror() -> None:
    host = HostSettings(mirror="http://m.example/debian", security="http://s.example/debian-security")
    sources = base_files(ImageStep("debian", {"suite": "trixie"}), host).inputs["sources.list"]
    assert "http://m.example/debian trixie main" in sources
    assert "http://s.example/debian-security trixie-security main" in sources
    assert sources.count("signed-by=") == 3


def test_lock_of_a_project_is_kept_to_unless_it_may_be_renewed() -> None:
    assert "--frozen" in text(recipe("uv_sync", lock="x"))
    assert "--frozen" not in text(recipe("uv_sync", lock="x", options={"frozen": False}))
    assert "--no-emit-project" in text(recipe("uv_sync"))


def test_variables_of_a_step_win_over_the_images_and_not_over_what_the_step_needs() -> None:
    made = recipe("run", Settings(env={"A": "image"}), env={"A": "step", "APT_CONFIG": "/mine"})
    assert made.environment["A"] == "step"
    assert made.environment["APT_CONFIG"] == f"{INPUTS}/apt.conf"


def test_groups_of_a_poetry_project_are_told_to_poetry() -> None:
    made = text(recipe("poetry", lock="x", options={"with": ["test", "docs"], "only": ["main"], "version": "1.8.5"}))
    assert "--from poetry==1.8.5" in made
    assert "--only main " in made
    assert " lock >" not in made
    assert " lock >" in text(recipe("poetry", lock=""))


def test_groups_of_a_poetry_project_are_those_that_poetry_would_install() -> None:
    project = """
[tool.poetry.group.test.dependencies]
[tool.poetry.group.docs]
optional = true
[dependency-groups]
more = []
"""
    assert "--with more,test " in text(recipe("poetry", pyproject=project))
    made = text(recipe("poetry", pyproject=project, options={"with": ["docs"], "without": ["test"]}))
    assert "--with more,docs --without test " in made
    with pytest.raises(InvalidError, match=r"cannot read the `pyproject\.toml`"):
        recipe("poetry", pyproject="[")


def credential(made: Recipe, host: str) -> str:
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "GITHUB_TOKEN": "t-hub", "GITLAB_TOKEN": "t-lab"}
    return subprocess.run(
        ["git", "credential", "fill"], input=f"protocol=https\nhost={host}\n\n", capture_output=True, text=True,
        timeout=10, check=False, env={**environment, **made.environment},
    ).stdout  # fmt: skip


def test_token_of_a_private_repository_is_told_to_its_host_alone() -> None:
    made = recipe("private", repositories=["github.com/a/b", "gitlab.com/c/d@v1"])
    assert "username=me\npassword=t-hub\n" in credential(made, "github.com")
    assert "username=me\npassword=t-lab\n" in credential(made, "gitlab.com")
    assert credential(made, "evil.example") == ""
    assert "-- git+https://github.com/a/b git+https://gitlab.com/c/d@v1" in text(made)
    assert "t-hub" not in text(made)
