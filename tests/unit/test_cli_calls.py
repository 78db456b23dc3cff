"""`squall call` names calls by their ids and shows results as Python does."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from squall.cli import main
from squall.cli.calls import call, checked, graph_lines
from squall.exception import InvalidError
from squall.protocol.messages import GetOutput, OutputItem, Reply, to_dict
from squall.protocol.payload import pack, pack_exception
from tests.unit.conftest import Peer


def test_what_is_no_id_of_a_call_is_refused() -> None:
    with pytest.raises(InvalidError, match="is no id of a call"):
        checked("square")


@pytest.mark.parametrize(("value", "shown"), [("text", "text\n"), ({"a": 1}, "{'a': 1}\n"), (None, "None\n")])
def test_result_is_shown_as_python_shows_it(peer: Peer, value: object, shown: str) -> None:
    data = pack(value, "result")
    item = to_dict(OutputItem("fc-1", 0, "ok", len(data)))
    peer.answers[GetOutput] = lambda message, _: peer.send(Reply({"ready": True, "item": item}, re=message.id), data)
    assert CliRunner().invoke(call, ["get", "fc-1"]).output == shown


def test_graph_shows_each_input_below_the_one_that_called_it() -> None:
    def row(input_id: str, parent: str = "", function: str = "f") -> dict[str, str]:
        return {"input_id": input_id, "parent": parent, "function": function, "status": "ok", "container_id": "co-1"}

    rows = [row("in-a-0"), row("in-a-1", "sc-1"), row("in-b-0", "in-a-0", "g"), row("in-c-0", "in-b-0", "h\x1b[2J")]
    assert graph_lines([*rows, row("in-b-1", "in-a-0", "g")]) == [
        "f  ok  in-a-0  co-1",
        "  g  ok  in-b-0  co-1",
        "    h [2J  ok  in-c-0  co-1",
        "  g  ok  in-b-1  co-1",
        "f  ok  in-a-1  co-1",
    ]


def test_result_that_is_not_there_in_time_has_an_exit_code_of_its_own(
    peer: Peer, capsys: pytest.CaptureFixture[str]
) -> None:
    peer.answers[GetOutput] = lambda message, _: peer.send(Reply({"ready": False}, re=message.id))
    assert main.execute(["call", "get", "fc-1", "--timeout", "0"]) == 3
    assert capsys.readouterr().err.startswith("error: call `fc-1` has no result after 0 s")
    assert main.execute(["call", "get", "fc-1", "--timeout", "0", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["error"]["type"] == "OutputTimeoutError"


def answer(peer: Peer, status: str, data: bytes) -> None:
    item = to_dict(OutputItem("fc-1", 0, status, len(data)))
    peer.answers[GetOutput] = lambda message, _: peer.send(Reply({"ready": True, "item": item}, re=message.id), data)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"a": (1, None)}, {"value": {"a": [1, None]}}),
        (b"x", {"repr": "b'x'", "python_type": "builtins.bytes"}),
        (float("nan"), {"repr": "nan", "python_type": "builtins.float"}),
    ],
)
def test_result_is_json_or_its_repr_and_type(
    peer: Peer, value: object, shown: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    answer(peer, "ok", pack(value, "result"))
    assert main.execute(["call", "get", "--json", "fc-1"]) == 0
    assert json.loads(capsys.readouterr().out) == {"call_id": "fc-1", "index": 0, "status": "ok", **shown}


def test_exception_that_a_call_ended_with_is_the_users_and_no_bug_of_squall(
    peer: Peer, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(peer, "error", pack_exception(ValueError("mine")))
    assert main.execute(["call", "get", "fc-1"]) == 1
    assert capsys.readouterr().err.rstrip().endswith("ValueError: mine")
    assert main.execute(["call", "get", "fc-1", "--json"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["type"], error["message"], "ValueError: mine" in error["traceback"]) == ("ValueError", "mine", True)
