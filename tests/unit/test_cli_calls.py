"""`squall call` names calls by their ids and shows results as Python does."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from squall.cli.calls import call, checked, graph_lines
from squall.exception import InvalidError
from squall.protocol.messages import GetOutput, OutputItem, Reply, to_dict
from squall.protocol.payload import pack
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


def test_result_that_is_not_there_in_time_has_an_exit_code_of_its_own(peer: Peer) -> None:
    peer.answers[GetOutput] = lambda message, _: peer.send(Reply({"ready": False}, re=message.id))
    assert CliRunner().invoke(call, ["get", "fc-1", "--timeout", "0"]).exit_code == 3
