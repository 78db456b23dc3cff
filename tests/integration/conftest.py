"""Homes for tests of the whole: each with a client of its own, so that none talks to the server of the one before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import squall
from squall._context import state
from squall.client import Client
from tests.conftest import Debian, temporary_home
from tests.integration.support import Heard
from tests.stores import cluster

__all__ = ["cluster"]


@contextlib.contextmanager
def own_home() -> Iterator[Path]:
    """A new home, and a process without a client until it is first needed."""
    with temporary_home() as path:
        before = swap_client(None)
        try:
            yield path
        finally:
            mine = swap_client(before)
            if mine is not None:
                mine.close()


def swap_client(client: Client | None) -> Client | None:
    """Make `client` that of this process; the one before."""
    before, state.client = state.client, client
    return before


@pytest.fixture
def home() -> Iterator[Path]:
    """A Squall of this test's own."""
    with own_home() as path:
        yield path


@pytest.fixture(scope="module")
def shared_home() -> Iterator[Path]:
    """A Squall that the tests of a module share."""
    with own_home() as path:
        yield path


DEBIAN_PYTHON = "3.11"


@pytest.fixture(scope="module")
def debian_home(shared_home: Path, debian_layers: Debian) -> Path:
    """A Squall that the tests of a module share, with a Debian in it."""
    debian_layers.lend(shared_home)
    squall.Image.debian_slim(DEBIAN_PYTHON).build(Heard())
    return shared_home
