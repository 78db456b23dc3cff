"""Kept output comes back in order, survives a cut, and is bounded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from squall.server import logs as logs_module
from squall.server.logs import Logs, Record


def record(n: int, data: bytes, container: str = "co-1") -> Record:
    return Record(float(n), container, "f", "stdout", data)


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[Logs]:
    logs = Logs(tmp_path)
    yield logs
    logs.close()


def test_output_comes_back_as_it_was_written(logs: Logs) -> None:
    written = [record(0, b"plain\n"), record(1, b"\x00\xff\x1b[31m\r"), record(2, b"no newline")]
    for entry in written:
        logs.append("ap-1", entry)
    assert list(logs.read("ap-1")) == written


def test_output_of_one_container_can_be_picked(logs: Logs) -> None:
    logs.append("ap-1", record(0, b"a", "co-1"))
    logs.append("ap-1", record(1, b"b", "co-2"))
    assert [entry.data for entry in logs.read("ap-1", "co-2")] == [b"b"]


def test_a_record_cut_by_a_crash_hides_nothing_before_it(logs: Logs, tmp_path: Path) -> None:
    logs.append("ap-1", record(0, b"whole\n"))
    logs.close()
    with (tmp_path / "ap-1.log").open("ab") as file:
        file.write(b"1.0 co-1 f stdo")
    assert [entry.data for entry in logs.read("ap-1")] == [b"whole\n"]


def test_an_apps_output_is_bounded_and_the_newest_is_kept(
    logs: Logs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs_module, "SEGMENT_BYTES", 1000)
    for n in range(200):
        logs.append("ap-1", record(n, b"x" * 50))
    kept = [entry.at for entry in logs.read("ap-1")]
    assert kept[-1] == 199.0
    assert kept == sorted(kept)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 3000


def test_an_app_that_never_wrote_has_no_output(logs: Logs) -> None:
    assert list(logs.read("ap-none")) == []
