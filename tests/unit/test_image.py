"""The recipe as users write it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from squall import FilePatternMatcher, Image, Secret
from squall.exception import InvalidError
from squall.protocol.images import layer_keys


def base() -> Image:
    return Image.debian_slim("3.11")


def kinds(image: Image) -> list[str]:
    return [step.kind for step in image._resolve()[0].steps]


def test_each_method_gives_a_new_image_and_leaves_the_old_one() -> None:
    first = base()
    second = first.run_commands("true")
    assert kinds(first) == ["debian"]
    assert kinds(second) == ["debian", "run"]


def test_python_version_is_ones_own_when_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 13, 1, "final", 0))
    assert Image.debian_slim()._resolve()[0].steps[0].args == {"suite": "trixie"}


def test_python_that_no_debian_has_is_refused_and_the_known_are_listed() -> None:
    with pytest.raises(InvalidError, match=r"Python `3\.9`") as caught:
        Image.debian_slim("3.9")
    assert "'3.11', '3.13'" in caught.value.hint


def test_nothing_can_be_added_to_the_hosts_image() -> None:
    with pytest.raises(InvalidError, match=r"`Image\.uv_pip_install` cannot add to `Image\.host\(\)`") as caught:
        Image.host().uv_pip_install("numpy")
    assert "debian_slim" in caught.value.hint


def test_packages_may_come_in_lists() -> None:
    step = base().uv_pip_install("a", ["b", "c"])._resolve()[0].steps[1]
    assert step.args == {"packages": ["a", "b", "c"]}


def test_hostile_requirement_is_refused_at_the_users_line() -> None:
    with pytest.raises(InvalidError, match="is an option"):
        base().uv_pip_install("-r /etc/passwd")
    with pytest.raises(InvalidError, match="line break"):
        base().pip_install("numpy\n--index-url http://evil")


def test_text_of_a_requirements_file_is_part_of_the_step(tmp_path: Path) -> None:
    file = tmp_path / "requirements.txt"
    file.write_text("six\n")
    before = base().pip_install_from_requirements(str(file))._resolve()[0].image_id
    file.write_text("six==1.17\n")
    assert base().pip_install_from_requirements(str(file))._resolve()[0].image_id != before


def test_missing_requirements_file_is_named() -> None:
    with pytest.raises(InvalidError, match="no-such-file"):
        base().pip_install_from_requirements("no-such-file")


def test_options_that_are_left_out_do_not_change_the_key() -> None:
    assert base().uv_pip_install("six")._resolve() == base().uv_pip_install("six", pre=False, index_url=None)._resolve()


def test_option_that_is_not_there_yet_is_named_with_what_there_is() -> None:
    with pytest.raises(InvalidError, match=r"`Image\.run_commands\(gpu=\.\.\.\)` is not available yet") as caught:
        base().run_commands("true", gpu="any")
    assert "builds have no GPU" in caught.value.hint
    with pytest.raises(InvalidError, match=r"volumes=\.\.\.\)` is not available yet"):
        base().apt_install("git", volumes={"/cache": object()})
    with pytest.raises(InvalidError, match=r"no option `nonsense`$"):
        base().run_commands("true", nonsense=1)
    assert base().run_commands("true", gpu=None, volumes={})._resolve() == base().run_commands("true")._resolve()


@pytest.mark.parametrize("method", ["run_commands", "apt_install", "pip_install", "uv_pip_install"])
def test_steps_take_secrets_and_variables_of_their_own(method: str) -> None:
    image = getattr(base(), method)("six", secrets=[Secret.from_dict({"TOKEN": "hidden"})], env={"A": "1", "B": None})
    spec, _ = image._resolve()
    assert (spec.steps[1].args["secrets"], spec.steps[1].args["env"]) == (["TOKEN"], {"A": "1"})
    assert image._secrets() == {"2": {"TOKEN": "hidden"}}
    assert "hidden" not in repr((spec, image, image._parts))


def test_secrets_count_by_their_names_and_variables_by_their_values() -> None:
    def key(value: str = "", env: str = "") -> str:
        secrets = [Secret.from_dict({"TOKEN": value})] if value else []
        return base().run_commands("true", secrets=secrets, env={"A": env} if env else None).image_id

    assert key(value="one") == key(value="two") != key()
    assert len({key(env="one"), key(env="two"), key()}) == 3


def test_what_is_no_secret_is_refused_without_being_shown() -> None:
    with pytest.raises(InvalidError, match="no `Secret`") as caught:
        base().run_commands("true", secrets=["hidden"])  # type: ignore[list-item]
    assert "hidden" not in str(caught.value)


def test_private_repositories_need_the_token_of_their_host() -> None:
    def made(repository: str, name: str) -> Image:
        secret = Secret.from_dict({name: "hidden"})
        return base().pip_install_private_repos(repository, git_user="me", secrets=[secret])

    step = made("github.com/owner/name@v1", "GITHUB_TOKEN")._resolve()[0].steps[1]
    assert step.args == {"repositories": ["github.com/owner/name@v1"], "git_user": "me", "secrets": ["GITHUB_TOKEN"]}
    for repository, name in (("gitlab.com/a/b/c", "GITLAB_TOKEN"), ("git.example.org:8443/a/b", "GIT_TOKEN")):
        made(repository, name)
        with pytest.raises(InvalidError, match=f"no secret of the step has `{name}`"):
            made(repository, "OTHER")


@pytest.mark.parametrize(
    "repository",
    ["", "name", "github.com/name", "https://github.com/a/b", "github.com/a/b\n--pre", "-r/etc/passwd/x",
     "x:y@h.org/a/b", "github.com/a/../b", "github.com/a/b@--x", "github.com/a/b;x"],
)  # fmt: skip
def test_what_is_no_repository_is_refused(repository: str) -> None:
    secret = Secret.from_dict({"GITHUB_TOKEN": "x", "GIT_TOKEN": "x"})
    with pytest.raises(InvalidError, match="is not the name of a git repository"):
        base().pip_install_private_repos(repository, git_user="me", secrets=[secret])


def test_lock_of_a_poetry_project_is_part_of_the_step(tmp_path: Path) -> None:
    project = tmp_path / "pyproject.toml"
    project.write_text("[tool.poetry]\n")
    with pytest.raises(InvalidError, match=r"no `poetry\.lock` beside it"):
        base().poetry_install_from_file(str(project))
    (tmp_path / "poetry.lock").write_text("one")
    made = base().poetry_install_from_file(str(project), with_=["test"], without="docs", poetry_version="1.8.5")
    assert made._resolve()[0].steps[1].args == {
        "pyproject": "[tool.poetry]\n",
        "lock": "one",
        "options": {"with": ["test"], "without": ["docs"], "version": "1.8.5"},
    }
    ignoring = base().poetry_install_from_file(str(project), ignore_lockfile=True)
    assert "lock" not in ignoring._resolve()[0].steps[1].args


def test_image_can_be_named_in_containers_where_its_files_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUALL_IS_REMOTE", "1")
    base().pip_install_from_requirements("no-such-file").pip_install_from_pyproject("no-such-file", ["extra"])
    base().uv_sync("/no/such/directory").poetry_install_from_file("no-such-file").add_local_python_source("no_such")
    base().add_local_dir("/no/such/directory", "/data", ignore=FilePatternMatcher.from_file("no-such-file"))


def test_force_is_marked_on_its_step_alone() -> None:
    steps = base().run_commands("a", force_build=True).run_commands("b")._resolve()[0].steps
    assert [step.force for step in steps] == [False, True, False]


def test_variable_forces_the_base_and_with_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUALL_FORCE_BUILD", "1")
    assert [step.force for step in base().run_commands("a")._resolve()[0].steps] == [True, False]


def test_ignoring_the_cache_makes_an_image_of_this_programs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = base().run_commands("a")._resolve()[0]
    monkeypatch.setenv("SQUALL_IGNORE_CACHE", "1")
    monkeypatch.setenv("SQUALL_FORCE_BUILD", "1")
    own, again = (base().run_commands("a")._resolve()[0] for _ in range(2))
    assert own == again
    assert not {key for key, _ in layer_keys(own)} & {key for key, _ in layer_keys(shared)}
    assert [step.force for step in own.steps] == [False, False]
    assert Image.host()._resolve()[0].steps == []


def test_repr_tells_the_steps() -> None:
    assert repr(base().apt_install("git")) == "<Image: debian_slim bookworm; apt install git>"
