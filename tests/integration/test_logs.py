"""Output of containers: to the caller as it was written, kept, followed, and there after the end."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from squall.protocol.messages import LogChunk, Notice, Reply
from squall.protocol.requests import GetLogs
from tests.conftest import wait_until
from tests.integration import workload
from tests.integration.support import Kept, Outcome, Wire, containers_of, kept_logs

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def output() -> Kept:
    return Kept()


@pytest.fixture(scope="module", autouse=True)
def app(shared_home: Path, output: Kept) -> Iterator[None]:
    with workload.app.run(output=output):
        yield


def test_each_stream_arrives_whole_and_in_its_order(output: Kept) -> None:
    container = workload.say.remote("a", 50)
    out, err = ("".join(f"{stream} a {n}\n" for n in range(50)).encode() for stream in ("out", "err"))
    wait_until(lambda: output.text("say", "stdout", container) == out, "stdout is whole")
    wait_until(lambda: output.text("say", "stderr", container) == err, "stderr is whole")


def test_what_was_written_a_moment_apart_keeps_its_order_across_streams(output: Kept) -> None:
    container = workload.say.remote("slow", 5, 0.02)
    expected = [f"{stream} slow {n}" for n in range(5) for stream in ("out", "err")]
    wait_until(lambda: len(lines_of(output, container, "slow")) == 10, "all lines are there")
    assert [line.split()[2] for line in lines_of(output, container, "slow")] == [w.split()[2] for w in expected]


def lines_of(output: Kept, container: str, word: str) -> list[str]:
    return [line for line in output.text("say", "", container).decode().splitlines() if f" {word} " in line]


def test_output_of_a_call_is_with_its_caller_before_the_result() -> None:
    kept = Kept()
    with workload.speaking.run(output=kept):
        for n in range(20):
            workload.tell.remote(f"word {n}")
    assert kept.text("tell", "stdout").splitlines() == [b"word %d" % n for n in range(20)]


def test_a_progress_bar_arrives_byte_for_byte(output: Kept) -> None:
    workload.progress.remote()
    expected = b"\r  0%\r 50%\r100%\n"
    wait_until(lambda: output.text("progress", "stderr") == expected, "the bar is whole")
    wait_until(lambda: expected in kept_logs("workload"), "it is kept so")


def test_lines_of_containers_that_write_at_once_are_not_mixed(output: Kept) -> None:
    list(workload.say.map([f"many{n}" for n in range(8)], kwargs={"times": 20}))
    wait_until(lambda: len(re.findall(rb"out many\d \d+\n", output.text())) == 160, "all lines are whole")


def test_kept_output_of_one_container_is_its_own() -> None:
    container = workload.say.remote("own")
    wait_until(lambda: b"out own 0\n" in kept_logs(container_id=container), "it is kept")
    workload.progress.remote()
    assert b"%" not in kept_logs(container_id=container)


def test_a_follower_gets_what_was_and_what_comes_without_a_gap(output: Kept) -> None:
    workload.shout.remote(20 << 20)  # so that sending what was takes a while
    call = Outcome(lambda: workload.say.remote("follow", 300, 0.005))
    wait_until(lambda: b"out follow 20\n" in output.text("say"), "it has begun")
    with Wire() as wire:
        wire.send(GetLogs(app="workload", follow=True, id=1))
        seen = b""
        while b"err follow 299\n" not in seen:
            message, data = wire.receive()
            seen += data if isinstance(message, LogChunk) and message.function == "say" else b""
    found = re.findall(rb"out follow (\d+)\n", seen)
    assert [int(n) for n in found] == list(range(300))
    call.result()


def test_a_follower_is_told_of_the_end() -> None:
    with Wire() as wire:
        with workload.speaking.run(name="short", output=Kept()):
            workload.tell.remote("bye")
            wire.send(GetLogs(app="short", follow=True, id=1))
            while not isinstance(wire.receive()[0], Reply):
                pass
        message, _ = wire.receive()
        while not (isinstance(message, Notice) and message.kind == "stopped"):
            message, _ = wire.receive()


def test_output_is_there_after_the_app_has_ended() -> None:
    with workload.speaking.run(name="gone", output=Kept()):
        container = workload.tell.remote("remembered")
    assert kept_logs("gone") == b"remembered\n"
    assert kept_logs(container_id=container) == kept_logs("gone")


def test_following_an_app_that_has_ended_gives_what_it_wrote_and_ends() -> None:
    with workload.speaking.run(name="over", output=Kept()):
        workload.tell.remote("once")
    with Wire() as wire:
        wire.send(GetLogs(app="over", follow=True, id=3))
        seen = b""
        message, data = wire.receive()
        while not isinstance(message, Reply):
            seen += data
            message, data = wire.receive()
    assert message.data["state"] == "stopped"
    assert seen == b"once\n"


def test_a_slow_reader_of_logs_holds_up_nobody() -> None:
    with Wire() as slow:
        slow.send(GetLogs(app="workload", follow=True, id=1))
        slow.receive()
        container = workload.shout.remote(30 << 20)
        assert workload.square.remote(3) == 9
        assert container.startswith("co-")
        assert all(row["state"] == "ready" for row in containers_of("square"))
