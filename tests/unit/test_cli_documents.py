"""One document on standard output, and nothing else."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import pytest

from squall.cli import documents


def test_deed_is_a_document_for_programs_and_a_sentence_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    documents.tell(True, {"name": "x"}, "x is there")
    assert capsys.readouterr() == ('{\n  "name": "x"\n}\n', "")
    documents.tell(False, {"name": "x"}, "x is there")
    assert capsys.readouterr() == ("", "x is there\n")


def test_what_the_users_code_prints_goes_to_stderr_meanwhile(capfd: Any) -> None:
    with documents.own_stdout(True):
        os.write(1, b"theirs\n")
        subprocess.run(["echo", "a child's"], check=True)
    os.write(1, b"ours\n")
    assert capfd.readouterr() == ("ours\n", "theirs\na child's\n")
