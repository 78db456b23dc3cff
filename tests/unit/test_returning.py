"""What a runner keeps for the next server, and how it waits for it."""

from __future__ import annotations

import os
import socket

from squall.protocol.messages import OutputItem, RunItem
from squall.protocol.resumption import HeldInput, OutputsAgain, RunnerBack
from squall.runner.returning import RECENT_BYTES, RECENT_LIMIT, Ledger, await_socket


def give(ledger: Ledger, *idxs: int) -> None:
    ledger.give(RunItem("fc-1", idx, attempt=2) for idx in idxs)


def answer(ledger: Ledger, idx: int, data: bytes = b"") -> None:
    ledger.answer(OutputItem("fc-1", idx, "ok", attempt=2), data)


def told(ledger: Ledger) -> tuple[list[int], RunnerBack]:
    """The results it sends again, and its last word."""
    words = [message for message, _ in ledger.again()]
    back = words.pop()
    assert isinstance(back, RunnerBack)
    outputs = [message for message in words if isinstance(message, OutputsAgain)]
    assert len(outputs) == len(words)
    return [output.items[0].idx for output in outputs], back


def test_an_input_is_held_until_it_is_answered_and_never_both() -> None:
    ledger = Ledger()
    give(ledger, 0, 1)
    answer(ledger, 0)
    results, back = told(ledger)
    assert results == [0]
    assert back.inputs == [HeldInput("fc-1", 1, 2)]
    assert not back.loaded


def test_only_the_latest_results_are_kept() -> None:
    ledger = Ledger()
    for idx in range(RECENT_LIMIT + 10):
        give(ledger, idx)
        answer(ledger, idx)
    assert told(ledger)[0] == list(range(10, RECENT_LIMIT + 10))


def test_large_results_are_kept_as_far_as_the_server_may_lack_them() -> None:
    ledger = Ledger()
    ledger.slots = 3
    for idx in range(10):
        give(ledger, idx)
        answer(ledger, idx, bytes(RECENT_BYTES // 2))
    assert told(ledger)[0] == [7, 8, 9]


def test_what_a_broken_generator_comes_to_is_not_sent_again() -> None:
    ledger = Ledger()
    give(ledger, 0)
    ledger.broken.add(("fc-1", 0))
    assert told(ledger)[1].inputs == [HeldInput("fc-1", 0, 2, is_broken=True)]
    answer(ledger, 0)
    assert told(ledger) == ([], RunnerBack(False, []))


def test_another_socket_is_taken_when_it_comes() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server, runner = socket.socketpair()
    with ours, theirs, server:
        socket.send_fds(ours, [b"again"], [runner.fileno()])
        runner.close()
        found = await_socket(theirs, lambda: False)
        assert found is not None
        with found:
            server.sendall(b"x")
            assert found.recv(1) == b"x"
            assert not os.get_inheritable(found.fileno())


def test_nothing_is_waited_for_when_the_agent_is_gone_or_the_runner_ends() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        with ours:
            assert await_socket(theirs, lambda: True) is None
        assert await_socket(theirs, lambda: False) is None
