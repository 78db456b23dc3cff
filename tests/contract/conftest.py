"""The databases that the Store's contract is tested over."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.stores import Place, cluster, small_disk

__all__ = ["cluster", "place", "small_disk"]


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Where a Store can be, empty."""
    if request.param == "sqlite":
        return Place(tmp_path)
    return Place(tmp_path, request.getfixturevalue("cluster").create())
