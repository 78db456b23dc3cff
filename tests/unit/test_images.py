"""Recipes: keys that name what a step makes, and what a step may not say."""

from __future__ import annotations

from typing import Any

import pytest

from squall.exception import InvalidError
from squall.protocol.images import (
    build_id_of,
    chain,
    check_image,
    check_requirement,
    check_requirements_text,
    check_secrets,
    check_step,
    image_id_of,
    layer_keys,
    settings_of,
    title_of,
)
from squall.protocol.messages import ImageSpec, ImageStep

BASE = ImageStep("debian", {"suite": "bookworm"})


def run(*commands: str) -> ImageStep:
    return ImageStep("run", {"commands": list(commands)})


def keys(*steps: ImageStep) -> list[str]:
    return [key for key, _ in chain(steps)]


def image(*steps: ImageStep) -> ImageSpec:
    return ImageSpec("layers", [BASE, *steps])


# ---- keys


def test_equal_recipes_have_equal_keys_and_ids() -> None:
    assert keys(BASE, run("true")) == keys(BASE, run("true"))
    assert image_id_of([BASE]) == image_id_of([ImageStep("debian", {"suite": "bookworm"})])


def test_changed_step_changes_its_key_and_all_after_it() -> None:
    before, after = keys(BASE, run("a"), run("z")), keys(BASE, run("b"), run("z"))
    assert before[0] == after[0]
    assert before[1] != after[1]
    assert before[2] != after[2]


def test_key_does_not_depend_on_whether_a_build_is_forced() -> None:
    forced = ImageStep("run", {"commands": ["true"]}, force=True)
    assert keys(BASE, forced) == keys(BASE, run("true"))


def test_files_of_a_step_are_part_of_its_key() -> None:
    steps = [ImageStep("copy", {"target": "/x"}, blob=letter * 64) for letter in "ab"]
    assert keys(steps[0]) != keys(steps[1])


def test_base_has_two_layers_and_settings_have_none() -> None:
    steps = [BASE, ImageStep("env", {"variables": {"A": "1"}}), run("true")]
    found = [step.kind for _, step in layer_keys(ImageSpec("layers", steps))]
    assert found == ["debian", "debian", "run"]


def test_workspaces_share_the_layers_of_a_base_and_none_above_it() -> None:
    steps = [BASE, run("true")]
    mine, theirs = (
        [key for key, _ in layer_keys(ImageSpec("layers", steps, workspace=name))] for name in ("", "other")
    )
    assert mine[:2] == theirs[:2]
    assert mine[2] != theirs[2]
    assert build_id_of(ImageSpec("layers", steps)) == image_id_of(steps)
    assert build_id_of(ImageSpec("layers", steps, workspace="other")) == f"{image_id_of(steps)}-other"


def test_environment_before_a_command_is_part_of_its_key() -> None:
    env = ImageStep("env", {"variables": {"A": "1"}})
    assert keys(BASE, run("true"))[-1] != keys(BASE, env, run("true"))[-1]


def test_later_settings_win() -> None:
    steps = [ImageStep("env", {"variables": {"A": "1", "B": "1"}}), ImageStep("env", {"variables": {"A": "2"}})]
    settings = settings_of([*steps, ImageStep("workdir", {"path": "/w"})])
    assert (settings.env, settings.workdir) == ({"A": "2", "B": "1"}, "/w")


def test_title_is_one_printable_line() -> None:
    assert title_of(run("echo \x1b[31m\n" + "x" * 500)).isprintable()
    assert len(title_of(run("x" * 500))) == 160


# ---- checks


@pytest.mark.parametrize(
    "requirement",
    ["numpy", "numpy>=2", "pandas[excel]~=2.1", "a.b-c_d==1.*", "x ; python_version<'3.12'", "x @ https://e.org/x.whl",
     "x (>=1)", "six!=1.0,<2", "x @ git+https://e.org/x.git@v1"],
)  # fmt: skip
def test_requirement_of_a_package_is_taken(requirement: str) -> None:
    assert check_requirement(requirement) == requirement


@pytest.mark.parametrize(
    ("requirement", "said"),
    [
        ("-r /etc/passwd", "is an option"),
        ("--index-url=http://evil", "is an option"),
        ("  --pre", "is an option"),
        ("numpy\n-r /etc/passwd", "line break"),
        ("numpy\r--index-url x", "line break"),
        ("numpy\0", "control character"),
        ("", "not the name of a package"),
        ("/etc/passwd", "not the name of a package"),
        ("./local", "not the name of a package"),
        ("x @ file:///etc/passwd", "not the name of a package"),
        ("numpy --index-url http://evil", "not the name of a package"),
        ("$(reboot)", "not the name of a package"),
        (7, "not the name of a package"),
    ],
)
def test_hostile_requirement_is_refused(requirement: object, said: str) -> None:
    with pytest.raises(InvalidError, match=said):
        check_requirement(requirement)


def test_requirements_file_may_name_indexes_and_hashes() -> None:
    check_requirements_text("# mine\n--index-url https://e.org\nnumpy==2.0 \\\n    --hash=sha256:00 # why\n\nsix\n")


@pytest.mark.parametrize("line", ["-r other.txt", "-c /etc/passwd", "-e .", "--editable ./x", "--requirement=/etc/x"])
def test_requirements_file_may_not_name_files(line: str) -> None:
    with pytest.raises(InvalidError, match="is an option"):
        check_requirements_text(f"numpy\n{line}\n")


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([BASE, ImageStep("run", {"commands": ["a"], "env": {"A B": "1"}})], "environment variable"),
        ([BASE, ImageStep("run", {"commands": ["a"], "secrets": ["A B"]})], "cannot name a secret"),
        ([BASE, ImageStep("run", {"commands": ["a"], "secrets": "A"})], "`secrets` cannot be"),
        ([BASE, ImageStep("env", {"variables": {"A": "1"}, "secrets": ["A"]})], "`secrets` cannot be"),
        ([BASE, ImageStep("poetry", {"lock": ""})], "lacks `pyproject`"),
        ([BASE, ImageStep("poetry", {"pyproject": "", "options": {"only": ["a\n"]}})], "`only` cannot be"),
        ([BASE, ImageStep("private", {"repositories": ["github.com/a/b"], "git_user": "me"})], "no secret"),
        ([BASE, ImageStep("private", {"repositories": ["x"], "git_user": "$(id)"})], "name of a git user"),
        ([], "begins with a base"),
        ([run("true")], "begins with a base"),
        ([BASE, BASE], "one base"),
        ([BASE, ImageStep("nonsense")], "step `nonsense` is unknown"),
        ([BASE, ImageStep("run", {"commands": ["a"], "extra": 1})], "`extra` cannot be"),
        ([BASE, ImageStep("run", {"commands": "ls"})], "`commands` cannot be"),
        ([BASE, ImageStep("run")], "lacks `commands`"),
        ([BASE, run()], "needs a command"),
        ([BASE, run("a\0b")], "not a text"),
        ([ImageStep("debian", {"suite": "sid; rm -rf /"})], "unknown here"),
        ([BASE, ImageStep("apt", {"packages": ["git; reboot"]})], "not the name of a Debian package"),
        ([BASE, ImageStep("apt", {"packages": ["--allow"]})], "not the name of a Debian package"),
        ([BASE, ImageStep("uv", {"packages": []})], "needs a package"),
        ([BASE, ImageStep("uv", {"packages": ["x"], "options": {"index_url": 3}})], "`index_url` cannot be"),
        ([BASE, ImageStep("uv", {"packages": ["x"], "options": {"rm": "x"}})], "`rm` cannot be"),
        ([BASE, ImageStep("copy", {"target": "/x"})], "files are missing"),
        ([BASE, ImageStep("run", {"commands": ["a"]}, blob="0" * 64)], "files are unexpected"),
        ([BASE, ImageStep("copy", {"target": "x"}, blob="0" * 64)], "not an absolute path"),
        ([BASE, ImageStep("copy", {"target": "/a/../../etc"}, blob="0" * 64)], "not an absolute path"),
        ([BASE, ImageStep("copy", {"target": "/proc/sys"}, blob="0" * 64)], "not an image's to fill"),
        ([BASE, ImageStep("env", {"variables": {"A B": "1"}})], "environment variable"),
        ([BASE, ImageStep("workdir", {"path": "work"})], "not an absolute path"),
        ([BASE, *[run("true")] * 200], "the limit is 100"),
    ],
)
def test_recipe_that_is_none_is_refused(steps: list[ImageStep], said: str) -> None:
    with pytest.raises(InvalidError, match=said):
        check_image(ImageSpec("layers", steps))


def test_image_of_the_host_takes_no_steps() -> None:
    check_image(ImageSpec())
    with pytest.raises(InvalidError, match=r"Image\.host"):
        check_image(ImageSpec("host", [BASE]))


def test_unknown_kind_of_image_is_refused() -> None:
    with pytest.raises(InvalidError, match="kind `podman` is unknown"):
        check_image(ImageSpec("podman", [BASE]))


def test_good_recipe_passes() -> None:
    check_image(image(run("true"), ImageStep("uv", {"packages": ["numpy"], "options": {"pre": True}})))


@pytest.mark.parametrize(
    "secrets", [{"1": {"T": "x"}}, {"2": {"U": "x"}}, {"3": {}}, {"0": {}}, {"x": {}}, {"2": {"T": "\0"}}]
)
def test_secrets_that_no_step_asks_for_are_refused_without_being_shown(secrets: dict[str, dict[str, str]]) -> None:
    asking = image(ImageStep("run", {"commands": ["a"], "secrets": ["T"]}))
    with pytest.raises(InvalidError, match="secret") as caught:
        check_secrets(asking, secrets)
    assert "\\x00" not in caught.value.message
    check_secrets(asking, {"2": {"T": "x"}})


@pytest.mark.parametrize(
    "args",
    [
        {"packages": ["six"], "options": {"index_url": "https://user:hunter22@index.example/simple"}},
        {"packages": ["six"], "options": {"extra_index_url": "https://hunter22@index.example/simple"}},
        {"packages": ["six"], "options": {"extra_options": "--index https://u:hunter22@index.example"}},
        {"packages": ["six @ https://u:hunter22@index.example/six.whl"]},
        {"requirements": "--index-url https://u:hunter22@index.example/simple\nsix"},
    ],
)
@pytest.mark.parametrize("kind", ["pip", "uv"])
def test_credentials_of_an_index_are_refused_in_a_recipe_and_not_repeated(kind: str, args: dict[str, Any]) -> None:
    with pytest.raises(InvalidError, match="credentials of") as caught:
        check_step(ImageStep(kind, args))
    assert "hunter22" not in caught.value.message
    assert "index.example" in caught.value.message


def test_a_variable_may_stand_for_the_credentials_of_an_index() -> None:
    check_step(ImageStep("pip", {"requirements": "--index-url https://me:${TOKEN}@index.example/simple\nsix"}))
    check_step(ImageStep("pip", {"requirements": "a @ git+https://${TOKEN}@git.example/a/b"}))
    check_step(ImageStep("pip", {"packages": ["a @ git+ssh://git@git.example/a/b"]}))
