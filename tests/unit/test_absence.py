"""Clients that are away: what is kept for them, what they get, and what of what they say again is run."""

from __future__ import annotations

import random
from typing import Any

import pytest

from squall.protocol.messages import LogChunk, encode_header
from squall.server.absence import BEATS_APART, PATIENCE_LIMIT, Pushes, Returning, grace_of, may_return
from squall.server.dispatch import Dispatch
from squall.server.inputs import Call, Finish, Function, FunctionOptions, Push
from squall.server.wire import output_head
from squall.testing import check_dispatch


def frame(*keys: tuple[str, int], status: str = "ok") -> bytes:
    heads = [output_head(call_id, idx, status, 0, "", 0, "", "") for call_id, idx in keys]
    return ('{"t":"outputs","items":[' + ",".join(heads) + "]}").encode()


def test_what_was_confirmed_is_forgotten_and_the_rest_comes_again_in_order() -> None:
    pushes = Pushes()
    frames = [frame(("fc-1", n)) for n in range(5)]
    for header in frames:
        pushes.add(header, (b"xx",))
    pushes.confirm(2)
    assert [header for header, _ in pushes.frames] == frames[2:]
    pushes.confirm(1)
    assert len(pushes.frames) == 3
    pushes.confirm(10**9)  # whatever it says
    assert (len(pushes.frames), pushes.size, pushes.gone) == (0, 0, 5)


def test_memory_for_what_nobody_confirms_is_bounded_and_the_newest_is_kept() -> None:
    pushes = Pushes()
    for n in range(100):
        pushes.add(frame(("fc-1", n)), (bytes(1000),))
        pushes.trim(10_000)
    assert pushes.size <= 10_000
    assert pushes.frames[-1][0] == frame(("fc-1", 99))
    assert pushes.trimmed == pushes.gone > 0


class Peer:
    def __init__(self, patience: float = 60.0, remote: str = "", leaving: str = "") -> None:
        self.patience, self.remote, self.leaving = patience, remote, leaving


@pytest.mark.parametrize(
    ("peer", "waited_for"),
    [
        (Peer(remote="host"), True),
        (Peer(remote="host", patience=0.0), False),
        (Peer(remote="host", leaving="for good"), False),
        (Peer(), False),
        (Peer(leaving="for another connection"), True),
    ],
)
def test_who_may_come_back_is_waited_for(peer: Any, waited_for: bool) -> None:
    assert may_return(peer) is waited_for


def test_a_client_is_waited_for_a_little_longer_than_it_tries() -> None:
    assert grace_of(60.0, 10.0) == 60.0 + BEATS_APART * 10.0
    assert grace_of(1e9, 10.0) <= PATIENCE_LIMIT + 30.0


def test_of_what_it_says_again_only_that_is_run_which_nobody_has() -> None:
    pushes = Pushes()
    pushes.add(frame(("fc-1", 0)), ())
    pushes.add(encode_header(LogChunk("ap-1", "co-1", "f", "stdout")), (b"x",))
    pushes.add(frame(("fc-1", 1), status="yield"), ())
    returning = Returning(pushes)
    returning.answered(frame(("fc-1", 2)))
    assert returning.wanted(None, "fc-1", [(n, b"") for n in range(4)]) == [(1, b""), (3, b"")]
    assert returning.named == {"fc-1"}


def test_a_result_that_went_lost_is_run_once_more_and_others_stay_done() -> None:
    dispatch = Dispatch()
    dispatch.add_function(0.0, "fu-1", FunctionOptions())
    dispatch.submit(0.0, "fc-1", "fu-1", [(n, b"") for n in range(4)], kind="map", owner="me", last=False)
    dispatch.container_starting(0.0, "co-1", "fu-1")
    dispatch.container_ready(0.0, "co-1", 4)
    for n in (0, 1, 2):
        dispatch.output(1.0, "co-1", "fc-1", n, "ok", 0)
    call = dispatch.calls["fc-1"]
    again = Returning(None).wanted(call, "fc-1", [(n, b"") for n in range(1, 4)])
    assert [idx for idx, _ in again] == [1, 2]  # 3 is under way
    out = dispatch.submit(2.0, "fc-1", "fu-1", again, kind="map", owner="me", last=True)
    assert [one.idx for push in out if isinstance(push, Push) for one in push.inputs] == [1, 2]
    check_dispatch(dispatch)
    ends = [e for n in (1, 2, 3) for e in dispatch.output(3.0, "co-1", "fc-1", n, "ok", 0) if isinstance(e, Finish)]
    assert len(ends) == 3
    assert not dispatch.calls


@pytest.mark.parametrize("seed", range(20))
def test_reopened_results_may_be_marked_again_in_any_order(seed: int) -> None:
    rng = random.Random(seed)
    call = Call("fc-1", Function("fu-1", FunctionOptions(), 0.0), "map", None)
    done: set[int] = set()
    for _ in range(200):
        idx = rng.randrange(30)
        if idx in done and rng.random() < 0.5:
            call.reopen(idx)
            done.discard(idx)
        elif idx not in done:
            call.mark_done(idx)
            done.add(idx)
        assert {n for n in range(40) if call.is_done(n)} == done


def test_a_generator_whose_values_went_lost_is_not_passed_off_as_whole() -> None:
    dispatch = Dispatch()
    dispatch.add_function(0.0, "fu-1", FunctionOptions(is_generator=True))
    dispatch.submit(0.0, "fc-1", "fu-1", [(0, b"")], owner="me")
    dispatch.container_starting(0.0, "co-1", "fu-1")
    dispatch.container_ready(0.0, "co-1", 1)
    call = dispatch.calls["fc-1"]
    assert not Returning(None).lacks_values(call, [(0, b"")])
    dispatch.yielded("co-1", "fc-1", 0, 0)
    assert Returning(None).lacks_values(call, [(0, b"")])
    assert not Returning(Pushes()).lacks_values(call, [(0, b"")])
