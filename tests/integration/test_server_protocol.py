"""Peers that break the rules: garbage, wrong versions, others' calls, and a container's code that asks for too much."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from squall.client import Client
from squall.exception import ContainerLostError
from squall.protocol.messages import (
    CancelCall,
    GetBlob,
    GetCall,
    GetOutput,
    GetStats,
    HasBlobs,
    Hello,
    InputItem,
    Message,
    OutputItem,
    Outputs,
    Ping,
    PutBlob,
    Register,
    StopApp,
    StopContainer,
    Submit,
    YieldCredit,
    encode,
    new_id,
)
from squall.protocol.payload import pack_call
from squall.protocol.requests import ListObjects, ReadLogs
from squall.server import main as server_main
from squall.server.reconciler import UNTAKEN_LIMIT
from squall.storage.blobs import digest_of
from tests.conftest import wait_until
from tests.integration import hostile, workload
from tests.integration.support import Clock, Kept, Outcome, Wire, containers_of, rows

pytestmark = pytest.mark.root


@pytest.fixture(scope="module", autouse=True)
def app(shared_home: Path) -> Iterator[None]:
    with workload.app.run(output=Kept()), hostile.app.run(output=Kept()):
        workload.square.remote(1)
        yield


@pytest.fixture(scope="module", autouse=True)
def silent(app: None) -> Iterator[Wire]:
    """A connection that says nothing from the beginning, for the last test."""
    with Wire(hello=False) as wire:
        yield wire


@pytest.fixture(autouse=True)
def unharmed() -> Iterator[None]:
    """After each attack the same server and the same node still serve."""
    before = Client.current().server_id, [row["node_id"] for row in rows("nodes")]
    yield
    assert workload.square.remote(6) == 36
    assert (Client.current().server_id, [row["node_id"] for row in rows("nodes")]) == before


def function_id(tag: str = "square") -> str:
    assert workload.app._running is not None
    return workload.app._running.functions[tag]


# ---- bytes that are no messages -----------------------------------------------------------------------------------


def frame(header: bytes, payload: bytes = b"") -> bytes:
    return struct.pack("<II", len(header), len(payload)) + header + payload


GARBAGE = {
    "text": b"GET / HTTP/1.1\r\nHost: squall\r\n\r\n",
    "random": bytes(range(256)) * 64,
    "no JSON": frame(b"nothing at all"),
    "a list": frame(b"[1, 2]"),
    "no tag": frame(b'{"id":1}'),
    "an unknown tag": frame(b'{"t":"no_such_message"}'),
    "an unfinished tag": frame(b'{"t":"'),
    "a wrong type": frame(b'{"t":"ping","id":"one"}'),
    "deep JSON": frame(b'{"t":"create_app","name":' + b"[" * 100_000),
    "deep JSON where anything may be": frame(b'{"t":"hello","role":"client","more":' + b"[" * 30_000),
    "2 GB announced": struct.pack("<II", 1 << 10, 1 << 31),
    "a 2 GB header announced": struct.pack("<II", 1 << 31, 0),
    "nothing": frame(b""),
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE.keys())
@pytest.mark.parametrize("hello", [False, True], ids=["first", "after hello"])
def test_garbage_ends_its_own_connection_only(data: bytes, hello: bool) -> None:
    clock = Clock()
    with Wire(hello=hello) as wire:
        wire.sock.sendall(data)
        assert wire.is_closed()
    assert clock() < 5.0


def test_an_unsupported_version_is_refused_with_what_to_do() -> None:
    with Wire(hello=False) as wire:
        wire.send(Hello("client", version=99))
        refusal: Any = wire.receive()[0]
        assert refusal.code == "version"
        assert refusal.message == "this server speaks protocol version 1, the client speaks 99"
        assert refusal.hint
        assert wire.is_closed()


@pytest.mark.parametrize("first", [Ping(), Hello("runner"), Hello("root")], ids=["no hello", "runner", "unknown role"])
def test_a_first_message_that_is_no_hello_of_a_client_or_agent_is_refused(first: Message) -> None:
    with Wire(hello=False) as wire:
        wire.send(first)
        assert wire.is_closed()


def test_an_agent_that_does_not_register_does_nothing(shared_home: Path) -> None:
    with Wire(hello=False) as wire:
        wire.ask(Hello("agent"))
        wire.send(ListObjects("apps"))
        assert wire.is_closed()


def test_a_client_cannot_register_a_node() -> None:
    with Wire() as wire:
        answer, _ = wire.ask(Register("mine", 1000.0, 1 << 20))
    assert answer.code == "invalid"
    assert "is not taken on this connection" in answer.message


# ---- messages that do not fit -------------------------------------------------------------------------------------


def submit(**changes: Any) -> Submit:
    values = {"call_id": new_id("fc"), "function_id": function_id(), "items": [InputItem(0, 4)], **changes}
    return Submit(**values)


BAD_SUBMITS: dict[str, tuple[dict[str, Any], bytes]] = {
    "too few bytes": ({"items": [InputItem(0, 10)]}, b"abcd"),
    "too many bytes": ({"items": [InputItem(0, 1)]}, b"abcd"),
    "a negative size": ({"items": [InputItem(0, -4), InputItem(1, 8)]}, b"abcd"),
    "a negative index": ({"items": [InputItem(-1, 4)]}, b"abcd"),
    "a vast index": ({"items": [InputItem(1 << 40, 4)]}, b"abcd"),
    "an id with a quote": ({"call_id": 'fc-"},{"x":"'}, b"abcd"),
    "an id with a newline": ({"call_id": "fc-a\nb"}, b"abcd"),
    "an id of another kind": ({"call_id": "ap-0123456789abcdef"}, b"abcd"),
    "an endless id": ({"call_id": "fc-" + "a" * 5000}, b"abcd"),
    "a path for a blob": ({"items": [InputItem(0, 0, "../../../../etc/passwd")]}, b""),
    "an unknown function": ({"function_id": "fu-../../x"}, b"abcd"),
}


@pytest.mark.parametrize(("changes", "payload"), BAD_SUBMITS.values(), ids=BAD_SUBMITS.keys())
@pytest.mark.parametrize("kind", ["remote", "spawn"])
def test_a_submit_that_does_not_fit_is_refused(kind: str, changes: dict[str, Any], payload: bytes) -> None:
    with Wire() as wire:
        answer, _ = wire.ask(submit(kind=kind, **changes), payload)
    assert answer.TAG == "failure", answer
    assert answer.code in ("invalid", "not_found")


def test_a_submit_that_asks_for_no_answer_is_refused_by_its_results() -> None:
    with Wire() as wire:
        wire.send(submit(call_id='fc-"quote', items=[InputItem(3, 4)]), b"abcd")
        message, _ = wire.receive()
    assert isinstance(message, Outputs)
    assert [(item.call_id, item.idx, item.status) for item in message.items] == [('fc-"quote', 3, "rejected")]


def test_an_argument_that_is_no_pickle_fails_its_call_alone() -> None:
    with Wire() as wire:
        wire.send(submit(), b"\x00\xff\x00\xff")
        message, _ = wire.receive()
    assert isinstance(message, Outputs)
    assert [item.status for item in message.items] == ["error"]


def test_a_repeated_submit_runs_once() -> None:
    data = pack_call((5,), {}, "square", (), main_by_value=True)
    one = submit(items=[InputItem(0, len(data))], last=False)
    with Wire() as wire:
        for _ in range(3):
            wire.send(one, data)
        message, _ = wire.receive()
        assert isinstance(message, Outputs)
        assert wire.ask(Ping())[0].TAG == "reply"
        assert not [m for m, _ in wire.frames if isinstance(m, Outputs)]


ODD_REQUESTS: list[tuple[Message, set[str]]] = [
    (GetOutput("fc-'; drop table inputs; --"), {"invalid"}),
    (GetOutput("fc-0000000000000000", idx=-1), {"not_found"}),
    (GetOutput("fc-0000000000000000", idx=1 << 70), {"invalid", "not_found"}),
    (GetCall("x\ny"), {"invalid"}),
    (CancelCall('fc-"'), {"invalid"}),
    (GetBlob("../../../etc/shadow"), {"invalid"}),
    (GetOutput("fc-0000000000000000", timeout=1e300), {"not_found"}),
    (GetBlob("0" * 64), {"not_found"}),
    (HasBlobs(["/etc/passwd"]), {"invalid"}),
    (HasBlobs(["0" * 64] * 10_001), {"invalid"}),
    (PutBlob("../x", 0), {"invalid"}),
    (PutBlob("0" * 64, 5), {"invalid"}),
    (PutBlob("0" * 64, 0), {"conflict"}),
    (ReadLogs(app="../../state/squall"), {"not_found"}),
    (ReadLogs(container_id="co-/../x"), {"not_found"}),
    (GetStats("fu-\x00"), {"not_found"}),
    (ListObjects("passwords"), {"invalid"}),
    (StopContainer("co-'"), {"not_found"}),
    (StopApp("nobody's"), {"not_found"}),
]


@pytest.mark.parametrize(("request_", "codes"), ODD_REQUESTS, ids=lambda value: getattr(value, "TAG", ""))
def test_an_odd_request_is_refused_by_name(request_: Message, codes: set[str]) -> None:
    with Wire() as wire:
        answer, _ = wire.ask(request_)
    assert answer.TAG == "failure", answer
    assert answer.code in codes, answer


def test_an_upload_that_failed_is_forgotten_and_can_begin_again() -> None:
    data = new_id("xx").encode()
    digest = digest_of(data)
    with Wire() as wire:
        assert wire.ask(PutBlob(digest, 0, last=False), data[:4])[0].TAG == "reply"
        assert wire.ask(PutBlob(digest, 9, last=False), data[9:])[0].code == "conflict"
        assert "without a beginning" in wire.ask(PutBlob(digest, 4, last=False), data[4:])[0].message
        assert wire.ask(PutBlob(digest, 0, last=True), data)[0].TAG == "reply"
        assert wire.ask(HasBlobs([digest]))[0].data == {"missing": []}


def test_an_unknown_field_is_ignored() -> None:
    with Wire() as wire:
        wire.sock.sendall(frame(b'{"t":"ping","id":9,"colour":"red"}'))
        message, _ = wire.receive()
    assert (message.TAG, message.re) == ("reply", 9)


def test_a_thousand_pings_in_one_write_are_all_answered() -> None:
    with Wire() as wire:
        wire.sock.sendall(b"".join(encode(Ping(id=n)) for n in range(1, 1001)))
        assert [wire.receive()[0].re for _ in range(1000)] == list(range(1, 1001))


# ---- what belongs to others ---------------------------------------------------------------------------------------


def test_a_client_cannot_cancel_or_join_the_call_of_another() -> None:
    call = Outcome(lambda: workload.nap.remote(1.5, 4))
    wait_until(lambda: any(row["running"] for row in containers_of("nap")), "it runs")
    with Wire() as wire:
        [call_id] = Client.current().sinks  # calls that this process waits for
        assert wire.ask(CancelCall(call_id))[0].code == "invalid"
        assert wire.ask(submit(call_id=call_id, function_id=function_id("nap")), b"abcd")[0].code == "invalid"
        wire.send(YieldCredit(call_id, 0, 100))
    assert call.result() == 4


def test_outputs_from_a_client_count_for_nothing() -> None:
    call = workload.nap.spawn(0.5, 5)
    with Wire() as wire:
        wire.send(Outputs([OutputItem(call.object_id, 0, "ok", 0)]))
        assert wire.ask(Ping())[0].TAG == "reply"
    assert call.get(timeout=20) == 5


# ---- a container's own code ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", sorted(hostile.FORBIDDEN))
def test_code_in_a_container_may_not_ask_for(what: str) -> None:
    code, message = hostile.ask_for.remote(what)
    assert code == "invalid", (code, message)
    assert "is not taken on this connection" in message


def test_code_in_a_container_cannot_end_inputs_of_others() -> None:
    call = workload.nap.spawn(1.0, 6)
    wait_until(lambda: any(row["running"] for row in containers_of("nap")), "it runs")
    hostile.forge.remote(call.object_id)
    assert call.get(timeout=20) == 6


def test_code_in_a_container_cannot_slip_text_into_the_header_of_a_result() -> None:
    call = hostile.slip.spawn()
    with pytest.raises(ContainerLostError, match="its runner sent what is no message"):
        call.get(timeout=30)


def test_garbage_behind_a_large_result_ends_that_container_only() -> None:
    with pytest.raises(ContainerLostError):
        hostile.trail.remote()
    wait_until(lambda: not containers_of("trail"), "the container is gone")
    assert workload.nap.remote(0.0, 4) == 4


def test_a_generator_that_sends_what_nobody_asked_for_is_ended() -> None:
    with Wire() as wire:
        assert hostile.app._running is not None
        call_id = new_id("fc")
        payload = pack_call((), {}, "flood", (), main_by_value=True)
        item = InputItem(0, len(payload))
        wire.send(Submit(call_id, hostile.app._running.functions["flood"], [item], kind="gen", last=True), payload)
        values, end = 0, None
        while end is None:
            message, _ = wire.receive()
            for output in message.items if isinstance(message, Outputs) else []:
                values += output.status == "yield"
                end = end if output.status == "yield" else output
    assert values == UNTAKEN_LIMIT
    assert "sent 513 values of a generator that nobody had asked for" in end.message


def test_a_generator_of_many_values_gets_the_credit_it_needs() -> None:
    assert list(workload.count_to.remote_gen(3000)) == list(range(3000))


def test_a_runner_that_claims_not_to_have_loaded_again_changes_nothing() -> None:
    assert hostile.unload.remote() == "still here"
    assert hostile.unload.remote() == "still here"


def test_garbage_from_a_container_ends_that_container_only() -> None:
    with pytest.raises(ContainerLostError):
        hostile.babble.remote()
    wait_until(lambda: not containers_of("babble"), "the container is gone")


def test_code_in_a_container_may_call_functions_through_the_same_link() -> None:
    assert hostile.call_a_function.remote(12) == 144


def test_who_never_says_hello_is_shown_the_door(silent: Wire) -> None:
    clock = Clock()
    assert silent.is_closed()
    assert clock() < server_main.HELLO_TIMEOUT + 5
