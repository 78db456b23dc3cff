"""`squall doctor`, `status`, `down` and `completion` where no server runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from squall import config
from squall.cli import admin, main


@pytest.mark.parametrize(
    ("wanted", "native", "process", "chosen"),
    [
        ("auto", [], [], "native"),
        ("auto", ["no root"], [], "process"),
        ("native", ["no root"], [], ""),
        ("process", [], [], "process"),
        ("auto", ["no root"], ["no fork"], ""),
    ],
)
def test_doctor_names_the_runtime_that_will_be_used(
    wanted: str, native: list[str], process: list[str], chosen: str
) -> None:
    assert admin._choose(wanted, {"native": native, "process": process}) == chosen


def test_doctor_gives_each_problem_a_line_of_its_own() -> None:
    assert [check.status for check in admin._checks("network", ["no nft", "no root"], "works")] == ["missing"] * 2
    assert admin._checks("network", [], "works") == [admin.Check("network", "ok", "works")]


def test_part_that_cannot_be_imported_is_a_problem_and_no_crash() -> None:
    assert admin._problems("squall.nowhere", "X")[0].startswith("cannot be loaded: ")


def test_home_that_cannot_be_written_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    check = admin._home_check(config.Config(home=tmp_path / "none" / "deep"))
    assert (check.status, "SQUALL_HOME" in check.detail) == ("missing", True)


def test_doctor_as_json_is_one_document(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main.execute(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert {check["name"] for check in found["checks"]} >= {"python", "home", "native runtime", "network", "gpu"}
    assert list(home.iterdir()) == []


def test_status_and_down_without_a_server_are_harmless(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.execute(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"home": str(home), "running": False}
    assert main.execute(["down"]) == 0
    assert capsys.readouterr() == ("", "no server is running\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_the_script_of_the_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.execute(["completion", shell]) == 0
    assert "_SQUALL_COMPLETE" in capsys.readouterr().out


COMPLETE = """
PATH="$1:$PATH"
compopt() { echo "compopt$1:$2"; }  # which works while bash itself completes only
eval "$(squall completion bash)"
shift
COMP_WORDS=(squall "$@") COMP_CWORD=$#
_squall_completion squall
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ru"], ["run"]),
        (["app", "l"], ["list", "logs"]),
        (["run", "--inter"], ["--interactive"]),
        (["run", "hel"], ["compopt-o:default", ""]),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["app", "logs", "x"], [""]),
    ],
)
def test_bash_completes_with_that_script(words: list[str], expected: list[str], home: Path, tmp_path: Path) -> None:
    squall = tmp_path / "squall"
    squall.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m squall.cli "$@"\n')
    squall.chmod(0o755)
    command = ["bash", "-c", COMPLETE, "bash", str(tmp_path), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == expected, done.stderr
