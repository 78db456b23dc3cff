"""Kept output comes back in order, survives a cut, stays within its limits, and never fills a disk."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from squall import _observe
from squall.server import logs as logs_module
from squall.server.logs import Limits, Logs, Record, records_of


def record(n: float, data: bytes, container: str = "co-1") -> Record:
    return Record(float(n), container, "f", "stdout", data)


def kept(logs: Logs, app_id: str = "ap-1") -> list[Record]:
    return [found for segment in logs.segments(app_id) for found, _ in records_of(segment.path)]


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*.log"))


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[Logs]:
    logs = Logs(tmp_path)
    yield logs
    logs.close()


def test_output_comes_back_as_it_was_written(logs: Logs) -> None:
    written = [record(0, b"plain\n"), record(1, b"\x00\xff\x1b[31m\r"), record(2, b"no newline"), record(3, b"")]
    for entry in written:
        logs.append("ap-1", entry)
    assert kept(logs) == written


def test_what_nobody_in_particular_wrote_comes_back_without_a_name(logs: Logs) -> None:
    note = Record(1.0, "", "", "system", b"the schedule was late\n")
    logs.append("ap-1", note)
    assert kept(logs) == [note]


def test_a_record_cut_by_a_crash_hides_nothing_around_it(logs: Logs, tmp_path: Path) -> None:
    logs.append("ap-1", record(0, b"whole\n"))
    logs.close()
    with logs.segments("ap-1")[-1].path.open("ab") as file:
        file.write(b"1.0 co-1 f stdout 100\nhalf")
    later = Logs(tmp_path)
    later.append("ap-1", record(2, b"later\n"))
    assert [entry.data for entry in kept(later)] == [b"whole\n", b"later\n"]
    later.close()


def test_an_apps_output_is_bounded_and_the_newest_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs_module, "SEGMENT_BYTES", 1000)
    logs = Logs(tmp_path, Limits(app_bytes=3000))
    for n in range(500):
        logs.append("ap-1", record(n, b"x" * 50))
    found = [entry.at for entry in kept(logs)]
    assert found[-1] == 499.0
    assert found == sorted(found)
    assert 2000 < size_of(tmp_path) < 5500
    logs.close()


def test_all_output_together_is_bounded_and_the_oldest_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs_module, "SEGMENT_BYTES", 1000)
    logs = Logs(tmp_path, Limits(total_bytes=5000))
    for n in range(200):
        logs.append(f"ap-{n // 50}", record(n, b"x" * 50))
        if n % 50 == 49:
            logs.close_app(f"ap-{n // 50}")
    assert kept(logs, "ap-0") == []
    assert kept(logs, "ap-3")[-1].at == 199.0
    assert size_of(tmp_path) < 8000
    assert not (tmp_path / "ap-0").exists()
    logs.close()


def test_a_later_server_counts_what_an_earlier_one_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs_module, "SEGMENT_BYTES", 1000)
    for life in range(5):
        logs = Logs(tmp_path, Limits(app_bytes=3000))
        for n in range(30):
            logs.append("ap-1", record(life * 100 + n, b"x" * 50))
        logs.close()
    assert size_of(tmp_path) < 5500
    assert kept(logs)[-1].at == 429.0


def test_old_output_is_deleted_with_its_days(tmp_path: Path) -> None:
    logs = Logs(tmp_path, Limits(days=2))
    logs.append("ap-old", record(0, b"old\n"))
    logs.append("ap-new", record(0, b"new\n"))
    logs.close()
    (path,) = [segment.path for segment in logs.segments("ap-old")]
    os.utime(path, (1000, 1000))
    logs.prune(path.parent.stat().st_mtime)
    assert kept(logs, "ap-old") == []
    assert [entry.data for entry in kept(logs, "ap-new")] == [b"new\n"]


def test_output_of_the_first_release_is_found(tmp_path: Path) -> None:
    (tmp_path / "ap-1.old").write_bytes(b"1.000000 co-1 f stdout 6\nolder\n")
    (tmp_path / "ap-1.log").write_bytes(b"2.000000 co-1 f stdout 6\nnewer\n")
    logs = Logs(tmp_path)
    logs.append("ap-1", record(3, b"now\n"))
    assert [entry.data for entry in kept(logs)] == [b"older\n", b"newer\n", b"now\n"]
    logs.close()


def test_an_app_that_never_wrote_has_no_output(logs: Logs) -> None:
    assert kept(logs, "ap-none") == []


def test_removing_an_app_removes_its_output_and_no_other(logs: Logs, tmp_path: Path) -> None:
    logs.append("ap-1", record(0, b"a"))
    logs.append("ap-2", record(0, b"b"))
    logs.remove("ap-1")
    assert kept(logs, "ap-1") == []
    assert not (tmp_path / "ap-1").exists()
    assert len(kept(logs, "ap-2")) == 1


# ---- a full disk --------------------------------------------------------------------------------------------------


def test_full_disk_costs_output_which_is_counted_and_told_of(logs: Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _observe.counters().get("log_bytes_dropped", 0)
    logs.append("ap-1", record(1, b"kept\n"))
    logs.flush()
    write = os.write

    def full(fd: int, data: Any) -> int:
        if len(data) > 8:
            return write(fd, bytes(data[:8]))  # a disk takes a part before it says that it is full
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    logs.append("ap-1", record(2, b"x" * 70_000))
    logs.append("ap-1", record(2.1, b"y" * 100))
    monkeypatch.setattr(os, "write", write)
    logs.append("ap-1", record(60, b"again\n"))
    found = kept(logs)
    assert [entry.data for entry in found if entry.stream == "stdout"] == [b"kept\n", b"again\n"]
    (told,) = [entry.data for entry in found if entry.stream == "system"]
    assert told == b"[70100 bytes of output were not kept: the disk was full]\n"
    assert _observe.counters()["log_bytes_dropped"] - before == 70_100


def test_room_is_left_to_others_by_deleting_the_oldest_and_then_by_writing_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs_module, "SEGMENT_BYTES", 1000)
    monkeypatch.setattr(logs_module, "ROOM_CHECK_BYTES", 1)
    logs = Logs(tmp_path, Limits(free_bytes=1000))
    for n in range(60):
        logs.append("ap-1", record(n, b"x" * 50))
    assert len(logs.segments("ap-1")) > 2
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=999))
    logs.append("ap-1", record(100, b"none\n"))
    assert len(logs.segments("ap-1")) == 1, "all but the one that is written to"
    assert b"none\n" not in [entry.data for entry in kept(logs)]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    logs.append("ap-1", record(102, b"some\n"))
    assert kept(logs)[-1].data == b"some\n"
    logs.close()
