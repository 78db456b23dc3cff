"""What the server does with a runner's frame that it cannot take, or fails on itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from squall.protocol.messages import Loaded, encode_header
from squall.server.main import Server


def take(header: bytes, runner_loaded: Any = None) -> tuple[list[str], list[str]]:
    """Why the stream was aborted, and why the container was stopped."""
    aborted: list[str] = []
    stopped: list[str] = []
    stream = SimpleNamespace(owner=SimpleNamespace(container_id="co-1"), abort=aborted.append)
    reconciler = SimpleNamespace(
        runner_loaded=runner_loaded, stop_container=lambda container_id, grace, reason: stopped.append(reason)
    )
    Server._on_runner_frame(cast(Any, SimpleNamespace(reconciler=reconciler)), cast(Any, stream), header, b"")
    return aborted, stopped


@pytest.mark.parametrize("header", [b"", b"{", b'{"t":"no_such"}', b'{"t":"loaded","ok":"maybe"}'])
def test_garbage_of_a_runner_ends_its_container(header: bytes) -> None:
    aborted, stopped = take(header)
    assert "received garbage" in aborted[0]
    assert stopped == ["its runner sent what is no message"]


def test_a_bug_of_ours_costs_that_container_alone() -> None:
    def fails(*_: object) -> None:
        raise KeyError("no such thing")

    aborted, stopped = take(encode_header(Loaded()), fails)
    assert "KeyError('no such thing')" in aborted[0]
    assert stopped == ["the server failed on a message of its runner"]
