"""Control groups of homes that are gone: removed by the next agent on the machine, by nobody while they are used."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from squall.node import claims
from squall.node.cgroups import Hierarchies, parent_name

pytestmark = pytest.mark.root


@pytest.fixture
def records(tmp_path: Path) -> Path:
    return tmp_path / "records"


@pytest.fixture
def groups(tmp_path: Path) -> Iterator[Hierarchies]:
    """The machine's own; what a test left in them goes."""
    found = Hierarchies.detect()
    if found.problems():
        pytest.skip(found.problems()[0])
    yield found
    for name in ("gone", "here"):
        found.group(parent_name(tmp_path / name)).remove()


def left_by(home: Path, groups: Hierarchies, records: Path) -> str:
    """What is left of a home whose agent was killed: groups, and a record that nobody holds."""
    home.mkdir()
    os.close(claims.claim(home, records))
    groups.group(parent_name(home)).create()
    groups.group(parent_name(home), "co-1").create()
    return parent_name(home)


def is_there(groups: Hierarchies, name: str) -> bool:
    return any(os.path.isdir(path) for path in groups.group(name).paths)


def test_groups_of_a_home_that_is_gone_are_removed(tmp_path: Path, groups: Hierarchies, records: Path) -> None:
    name = left_by(tmp_path / "gone", groups, records)
    (tmp_path / "gone").rmdir()
    assert claims.sweep(groups, records) == [name]
    assert not is_there(groups, name) and not list(records.iterdir())
    assert claims.sweep(groups, records) == []


def test_groups_of_a_home_that_is_there_are_left_to_its_next_agent(
    tmp_path: Path, groups: Hierarchies, records: Path
) -> None:
    name = left_by(tmp_path / "here", groups, records)
    assert claims.sweep(groups, records) == [] and is_there(groups, name)


def test_groups_with_a_process_in_them_are_left_whole(tmp_path: Path, groups: Hierarchies, records: Path) -> None:
    name = left_by(tmp_path / "gone", groups, records)
    (tmp_path / "gone").rmdir()
    with subprocess.Popen(["sleep", "600"]) as process:
        groups.group(name, "co-1").join(process.pid)
        assert claims.sweep(groups, records) == []
        assert groups.group(name, "co-1").pids() == [process.pid]
        process.kill()
    assert claims.sweep(groups, records) == [name]


def test_groups_of_an_agent_that_lives_are_left_though_its_home_is_gone(
    tmp_path: Path, groups: Hierarchies, records: Path
) -> None:
    home = tmp_path / "gone"
    name = left_by(home, groups, records)
    fd = claims.claim(home, records)
    home.rmdir()
    assert claims.sweep(groups, records) == [] and is_there(groups, name)
    os.close(fd)
    assert claims.sweep(groups, records) == [name]


def test_groups_without_a_record_and_records_of_another_name_are_left(
    tmp_path: Path, groups: Hierarchies, records: Path
) -> None:
    name = left_by(tmp_path / "gone", groups, records)
    (tmp_path / "gone").rmdir()
    (records / name).write_text(str(tmp_path / "elsewhere"))
    assert claims.sweep(groups, records) == [], "the path does not make this name"
    (records / name).unlink()
    assert claims.sweep(groups, records) == [] and is_there(groups, name)


def test_record_goes_with_an_agent_that_ends(tmp_path: Path, records: Path) -> None:
    home = tmp_path / "here"
    home.mkdir()
    fd = claims.claim(home, records)
    assert (records / parent_name(home)).read_text() == str(home.resolve())
    assert claims.claim(home, records) == -1, "an agent has it"
    claims.release(fd, home, records)
    assert not list(records.iterdir())


def test_machine_without_a_place_for_records_goes_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert claims.claim(tmp_path, tmp_path / "file") == -1
    assert claims.sweep(Hierarchies.detect(), tmp_path / "none") == []
