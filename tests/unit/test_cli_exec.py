"""What is kept of a command in a container for a document."""

from __future__ import annotations

from typing import Any

import click
import pytest

from squall.cli import exec as execs
from squall.protocol.messages import ExecData, ExecExit


@pytest.fixture
def job() -> execs.CapturedExec:
    link: Any = None  # no test here asks anything
    return execs.CapturedExec(link, "co-1", ["true"], pty=False, workdir="")


def test_both_streams_are_kept_as_text(job: execs.CapturedExec) -> None:
    for stream, data in (("stdout", b"caf\xc3"), ("stderr", b"no\xff\n"), ("stdout", b"\xa9\n")):
        job._on_push(ExecData("ex-1", stream), data)
    job._on_push(ExecExit("ex-1", 3), b"")
    assert job.document(job._exit.code) == {
        "container_id": "co-1",
        "exit_code": 3,
        "stdout": "café\n",
        "stderr": "no\ufffd\n",
        "truncated": False,
    }


def test_what_is_too_much_is_cut_and_the_document_says_so(job: execs.CapturedExec) -> None:
    job._on_push(ExecData("ex-1", "stdout"), b"x" * execs.CAPTURE_LIMIT_BYTES)
    assert job.document(0)["truncated"] is False
    job._on_push(ExecData("ex-1", "stdout"), b"y")
    job._on_push(ExecData("ex-1", "stderr"), b"z")
    document = job.document(0)
    assert (len(document["stdout"]), document["stderr"]) == (execs.CAPTURE_LIMIT_BYTES, "z")
    assert document["truncated"] is True


def test_document_and_terminal_exclude_each_other() -> None:
    assert execs.wants_pty(None, as_json=True) is False
    with pytest.raises(click.UsageError, match="exclude each other"):
        execs.wants_pty(True, as_json=True)
