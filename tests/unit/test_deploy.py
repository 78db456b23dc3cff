"""What a program says of itself when it deploys."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import squall
from squall._deploy import Deployment, git_state
from squall.exception import InvalidError


def test_the_commit_of_a_directory_and_whether_it_differs_are_told(tmp_path: Path) -> None:
    assert git_state(str(tmp_path)) == ("", False)
    git = ["git", "-C", str(tmp_path), "-c", "user.email=a@b", "-c", "user.name=n"]
    (tmp_path / "app.py").write_text("1")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    commit, is_dirty = git_state(str(tmp_path))
    assert len(commit) == 40 and not is_dirty
    (tmp_path / "app.py").write_text("2")
    assert git_state(str(tmp_path)) == (commit, True)


def test_a_wrong_strategy_is_refused_before_anything_is_asked() -> None:
    with pytest.raises(InvalidError, match="no way to deploy"):
        squall.App("a").deploy(strategy="sideways")


def test_an_app_the_server_does_not_know_says_so() -> None:
    with pytest.raises(InvalidError, match="not known to the server"):
        squall.App("a").info()


def test_tags_of_an_app_are_its_own_until_it_is_known() -> None:
    app = squall.App("a", tags={"x": "1"})
    app.set_tags({"y": "2"})
    assert app.get_tags() == {"y": "2"}


def test_a_deployment_is_read_from_the_servers_answer() -> None:
    data = {"app_id": "ap-1", "version": 2, "changes": {"added": ["f"], "changed": {"g": ["cpu"]}}, "notices": ["n"]}
    assert Deployment.of("a", data) == Deployment("ap-1", "a", 2, ("f",), (), {"g": ["cpu"]}, ("n",))
