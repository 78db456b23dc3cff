"""The recipe as users write it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from squall import Image
from squall.exception import InvalidError


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


def test_option_of_a_later_release_is_named() -> None:
    with pytest.raises(InvalidError, match="no option `gpu` in this release"):
        base().run_commands("true", gpu="any")
    with pytest.raises(InvalidError, match=r"no option `nonsense`$"):
        base().run_commands("true", nonsense=1)


def test_force_is_marked_on_its_step_alone() -> None:
    steps = base().run_commands("a", force_build=True).run_commands("b")._resolve()[0].steps
    assert [step.force for step in steps] == [False, True, False]


def test_variable_forces_the_base_and_with_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUALL_FORCE_BUILD", "1")
    assert [step.force for step in base().run_commands("a")._resolve()[0].steps] == [True, False]


def test_repr_tells_the_steps() -> None:
    assert repr(base().apt_install("git")) == "<Image: debian_slim bookworm; apt install git>"
