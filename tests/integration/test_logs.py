"""Output of containers: to the caller as it was written, kept, followed, and there after the end."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta, timezone
from pathlib import Path

import pytest

import squall
from squall.protocol.requests import ReadLogs
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
    workload.shout.remote(20 << 20)  # so that reading what was takes a while
    call = Outcome(lambda: workload.say.remote("follow", 300, 0.005))
    wait_until(lambda: b"out follow 20\n" in output.text("say"), "it has begun")
    found = []
    for entry in workload.app.logs.stream(timeout=60):
        found += re.findall(r"^out follow (\d+)$", entry.message)
        if entry.message == "err follow 299":
            break
    assert [int(n) for n in found] == list(range(300))
    call.result()


def test_a_follower_is_told_of_the_end() -> None:
    seen: list[str] = []
    with workload.speaking.run(name="short", output=Kept()):
        workload.tell.remote("bye")
        logs = squall.App("short").logs
        follower = Outcome(lambda: seen.extend(entry.message for entry in logs.stream(timeout=60)))
        wait_until(lambda: seen == ["bye"], "what was is seen")
    follower.result(seconds=10)
    assert seen == ["bye"]


def test_output_is_there_after_the_app_has_ended() -> None:
    with workload.speaking.run(name="gone", output=Kept()):
        container = workload.tell.remote("remembered")
    assert kept_logs("gone") == b"remembered\n"
    assert kept_logs(container_id=container) == kept_logs("gone")


def test_following_an_app_that_has_ended_gives_what_it_wrote_and_ends() -> None:
    with workload.speaking.run(name="over", output=Kept()):
        workload.tell.remote("once")
    assert [entry.message for entry in squall.App("over").logs.stream(timeout=60)] == ["once"]


def test_a_slow_reader_of_logs_holds_up_nobody() -> None:
    with Wire() as slow:
        slow.ask(ReadLogs(app="workload", follow=True))
        container = workload.shout.remote(30 << 20)
        assert workload.square.remote(3) == 9
        assert container.startswith("co-")
        assert all(row["state"] == "ready" for row in containers_of("square"))


# ---- looking for something ----------------------------------------------------------------------------------------


def test_lines_are_found_by_text_source_and_function(output: Kept) -> None:
    container = workload.say.remote("needle", 3)
    wait_until(lambda: output.text("say", "stderr", container).count(b"needle") == 3, "it is written")
    found = list(workload.app.logs.fetch(search_text="needle", source="stderr"))
    assert [entry.message for entry in found] == [f"err needle {n}" for n in range(3)]
    assert {(entry.function, entry.container_id, entry.source) for entry in found} == {("say", container, "stderr")}
    assert list(workload.square.logs.fetch(search_text="needle")) == []
    assert len(workload.say.logs.tail(4, search_text="needle")) == 4


def test_lines_are_found_by_their_time(output: Kept) -> None:
    container = workload.say.remote("early")
    wait_until(lambda: b"err early 0" in output.text("say", "", container), "it is written")
    (entry,) = list(workload.app.logs.fetch(search_text="out early 0"))
    assert entry.timestamp.tzinfo is timezone.utc
    assert list(workload.app.logs.fetch(until=entry.timestamp - timedelta(seconds=0.001), search_text="early")) == []
    assert len(list(workload.app.logs.fetch(since=entry.timestamp, search_text="out early"))) == 1
    assert len(list(workload.app.logs.fetch(since="1h", search_text="out early"))) == 1


def test_output_of_a_call_is_told_from_that_of_others(output: Kept) -> None:
    calls = [workload.say.spawn(f"call{n}", 3) for n in range(4)]
    containers = [call.get(timeout=60) for call in calls]

    def all_written() -> bool:
        return all(b"err call%d 2\n" % n in output.text("say", "", container) for n, container in enumerate(containers))

    wait_until(all_written, "all is written")
    for n, call in enumerate(calls):
        messages = {entry.message for entry in call.logs.fetch()}
        assert messages >= {f"out call{n} {i}" for i in range(3)}


def test_following_a_call_ends_with_it() -> None:
    call = workload.say.spawn("along", 100, 0.01)
    found = [entry.message for entry in call.logs.stream(timeout=60) if entry.source == "stdout"]
    assert "out along 0" in found
    assert call.get(timeout=10).startswith("co-")


def test_source_that_is_none_is_refused() -> None:
    with pytest.raises(squall.exception.InvalidError, match="stdout, stderr or system"):
        list(workload.app.logs.fetch(source="stdin"))


def test_container_that_never_was_is_not_found() -> None:
    with Wire() as wire:
        answer, _ = wire.ask(ReadLogs(container_id="co-1234"))
        assert answer.code == "not_found"
