"""What a function finds in its environment, before its module is imported."""

from __future__ import annotations

import os

import pytest

from squall.protocol.messages import FunctionSpec, ImageSpec
from squall.runner.loader import apply_environment


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy: what the loader sets is gone after the test."""
    monkeypatch.setattr(os, "environ", dict(os.environ))


def test_container_knows_its_place_and_its_image() -> None:
    apply_environment(FunctionSpec("f", image=ImageSpec("layers", [], "im-7")))
    names = ("SQUALL_ENVIRONMENT", "SQUALL_REGION", "SQUALL_CLOUD_PROVIDER", "SQUALL_IMAGE_ID")
    assert [os.environ[name] for name in names] == ["main", "local", "self-hosted", "im-7"]


def test_host_image_has_an_id_too() -> None:
    apply_environment(FunctionSpec("f"))
    assert os.environ["SQUALL_IMAGE_ID"] == "im-host"


def test_functions_variables_win_over_the_thread_counts() -> None:
    apply_environment(FunctionSpec("f", cpu=4, env={"OMP_NUM_THREADS": "1"}))
    assert (os.environ["OMP_NUM_THREADS"], os.environ["MKL_NUM_THREADS"]) == ("1", "4")
