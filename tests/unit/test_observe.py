"""The log, the counters and the step timers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from squall import _observe
from squall._observe import Logger, Steps


@pytest.fixture
def log_file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "squall.log"
    _observe.configure("info", path=path)
    yield path
    _observe.configure("warning")


def test_line_has_time_level_part_message_and_fields(log_file: Path) -> None:
    Logger("server").info("listening", pid=3, path="/a b", share=0.25)
    line = log_file.read_text()
    assert line[10] == "T"
    assert line.endswith(' info server: listening pid=3 path="/a b" share=0.25\n')


def test_line_below_the_level_is_not_written(log_file: Path) -> None:
    Logger("server").debug("detail")
    assert log_file.read_text() == ""


def test_text_from_a_container_cannot_forge_a_second_line(log_file: Path) -> None:
    Logger("agent").warning("bad name", name="x\n2026 info server: all is well\x1b[2J")
    assert len(log_file.read_text().splitlines()) == 1
    assert "\x1b" not in log_file.read_text()


def test_json_lines_can_be_read_back(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    _observe.configure("debug", path=path, format="json")
    try:
        Logger("agent").error("lost", home=Path("/srv"))
    finally:
        _observe.configure("warning")
    assert json.loads(path.read_text())["home"] == "/srv"


def test_log_file_is_private(log_file: Path) -> None:
    assert log_file.stat().st_mode & 0o777 == 0o600


def test_line_that_cannot_be_written_is_counted_and_raises_nothing(log_file: Path) -> None:
    before = _observe.counters().get("log_lines_lost", 0)
    os.close(_observe._sink.fd)
    Logger("agent").error("nobody hears")
    _observe._sink.fd = -1
    assert _observe.counters()["log_lines_lost"] == before + 1


def test_steps_are_kept_in_order_with_their_milliseconds() -> None:
    steps = Steps()
    with steps.step("mount-root"):
        pass
    with steps.step("pivot"):
        pass
    assert list(steps.ms) == ["mount-root", "pivot"]
    assert all(ms >= 0 for ms in steps.ms.values())
    assert steps.current == ""


def test_step_that_raises_stays_named() -> None:
    steps = Steps()
    with pytest.raises(OSError, match="no"), steps.step("mount-root"):
        raise OSError("no")
    assert steps.current == "mount-root"
    assert "mount-root" in steps.ms
