"""Calling one input at a time: values, errors, handles, and what calls say when they cannot be made."""

from __future__ import annotations

import asyncio
import os
import pickle
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

import squall
from squall import client as clients
from squall.client import error_of
from squall.exception import (
    CancelledError,
    ContainerLostError,
    FunctionTimeoutError,
    InternalError,
    InvalidError,
    NotFoundError,
    OutputTimeoutError,
    RemoteError,
    ResourceExhaustedError,
    SerializationError,
    ServiceError,
    StartupError,
)
from squall.protocol import messages as m
from squall.protocol import payload as payloads

if TYPE_CHECKING:
    from tests.unit.conftest import Peer


def square(x: int) -> int:
    return x * x


def fail(x: int) -> None:
    raise KeyError(x)


def size_of(data: bytes, extra: bytes = b"") -> bytes:
    return data + extra


def count(n: int) -> Iterator[int]:
    yield from range(n)


@pytest.fixture
def app(peer: Peer) -> squall.App:
    app = squall.App("test")
    for raw_f in (square, fail, size_of, count):
        app.function()(raw_f)
    return peer.run(app)


# ---- one call


def test_remote_returns_what_the_function_returns(app: squall.App) -> None:
    assert app.registered_functions["square"].remote(4) == 16


def test_remote_raises_what_the_function_raises(app: squall.App) -> None:
    with pytest.raises(KeyError) as error:
        app.registered_functions["fail"].remote(4)
    assert error.value.args == (4,)


def test_error_of_a_call_shows_no_more_than_one_frame_of_squall(app: squall.App) -> None:
    with pytest.raises(KeyError) as error:
        app.registered_functions["fail"].remote(4)
    files = [str(entry.path) for entry in error.traceback]
    own = os.path.dirname(squall.__file__) + os.sep
    assert sum(file.startswith(own) for file in files) == 1
    assert files[-1].endswith("test_function.py")


def test_aio_gives_the_same_under_asyncio(app: squall.App) -> None:
    async def calls() -> list[int]:
        function = app.registered_functions["square"]
        results: list[int] = await asyncio.gather(*[function.remote.aio(i) for i in range(50)])
        return results

    assert asyncio.run(calls()) == [i * i for i in range(50)]


def test_blocking_call_in_a_running_loop_warns(app: squall.App) -> None:
    async def call() -> Any:
        return app.registered_functions["square"].remote(2)

    with pytest.warns(RuntimeWarning, match=r"`remote` blocks the running event loop"):
        assert asyncio.run(call()) == 4


def test_calls_from_many_threads_find_their_own_results(app: squall.App) -> None:
    function, wrong = app.registered_functions["square"], []

    def call(i: int) -> None:
        for n in range(i, i + 50):
            if function.remote(n) != n * n:
                wrong.append(n)

    threads = [threading.Thread(target=call, args=(i * 50,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []


def test_large_argument_and_result_travel_as_blobs(app: squall.App, peer: Peer) -> None:
    data = bytes(range(256)) * 20_000
    assert app.registered_functions["size_of"].remote(data) == data
    assert peer.of(m.Submit)[-1].items[0].blob
    assert len(peer.of(m.PutBlob)) == 5


def test_same_large_argument_is_uploaded_once(app: squall.App, peer: Peer) -> None:
    data = b"x" * (m.INLINE_LIMIT_BYTES + 1)
    app.registered_functions["size_of"].remote(data)
    uploaded = len(peer.of(m.PutBlob))
    app.registered_functions["size_of"].remote(data)
    assert len(peer.of(m.PutBlob)) == uploaded


def test_damaged_blob_is_noticed(app: squall.App, peer: Peer) -> None:
    def damaged(message: m.GetBlob, payload: bytes) -> None:
        peer.send(m.Reply({"size": 3}, re=message.id), b"bad")

    peer.answers[m.GetBlob] = damaged
    with pytest.raises(ServiceError, match="arrived damaged"):
        app.registered_functions["size_of"].remote(b"x" * (2 << 20))


def test_unpicklable_argument_is_named_before_anything_is_sent(app: squall.App, peer: Peer) -> None:
    with pytest.raises(SerializationError, match="argument `x` of `square`"):
        app.registered_functions["square"].remote(threading.Lock())
    assert peer.of(m.Submit) == []


def test_argument_above_the_hard_limit_is_refused(app: squall.App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "PAYLOAD_LIMIT_BYTES", 1000)
    with pytest.raises(SerializationError, match="the arguments of `size_of` take"):
        app.registered_functions["size_of"].remote(b"x" * 2000)


def test_lost_connection_fails_the_call_and_says_that_it_may_have_run(app: squall.App, peer: Peer) -> None:
    peer.answers[m.Submit] = lambda message, payload: peer.sock.shutdown(2)
    with pytest.raises(ServiceError, match="connection to the server broke"):
        app.registered_functions["square"].remote(1)


def test_interrupted_call_is_cancelled(app: squall.App, peer: Peer) -> None:
    peer.hold = True

    async def give_up() -> None:
        await asyncio.wait_for(app.registered_functions["square"].remote.aio(1), 0.05)

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(give_up())
    assert [c.call_id for c in told(peer, m.CancelCall)] == [peer.held[0][0].call_id]
    assert peer.client.sinks == {}


# ---- generators


def give_yields(peer: Peer, seqs: list[int], end: BaseException | None = None) -> None:
    """Answer the next generator's input with these values and an end."""

    def answer(submit: m.Submit, payload: bytes) -> None:
        for seq in seqs:
            data = payloads.pack(seq, "value")
            peer.send(m.Outputs([m.OutputItem(submit.call_id, 0, "yield", len(data), seq=seq)]), data)
        data = b"" if end is None else payloads.pack_exception(end)
        status = "ok" if end is None else "error"
        peer.send(m.Outputs([m.OutputItem(submit.call_id, 0, status, len(data))]), data)

    peer.answers[m.Submit] = answer


def told(peer: Peer, kind: type) -> list[Any]:
    """What the peer was told, after it has read all that was sent."""
    peer.client.link.request(m.Ping()).wait(5)
    return peer.of(kind)


def test_values_of_a_generator_come_in_order_with_credit_sent_back(app: squall.App, peer: Peer) -> None:
    give_yields(peer, list(range(300)))
    assert list(app.registered_functions["count"].remote_gen(3)) == list(range(300))
    assert sum(credit.n for credit in told(peer, m.YieldCredit)) >= 300 - m.YIELD_WINDOW


def test_generator_that_fails_half_way_yields_what_it_had(app: squall.App, peer: Peer) -> None:
    give_yields(peer, [0, 1, 2], ValueError("half way"))
    values = app.registered_functions["count"].remote_gen(3)
    assert [next(values), next(values), next(values)] == [0, 1, 2]
    with pytest.raises(ValueError, match="half way"):
        next(values)


def test_values_repeated_by_a_second_attempt_are_yielded_once(app: squall.App, peer: Peer) -> None:
    give_yields(peer, [0, 1, 0, 1, 2])
    assert list(app.registered_functions["count"].remote_gen(3)) == [0, 1, 2]


def test_generator_left_early_is_cancelled(app: squall.App, peer: Peer) -> None:
    give_yields(peer, [0, 1, 2])
    stream = app.registered_functions["count"].remote_gen(3)
    assert next(stream) == 0
    stream.close()
    assert len(told(peer, m.CancelCall)) == 1


def test_generator_can_be_read_under_asyncio(app: squall.App, peer: Peer) -> None:
    give_yields(peer, [0, 1, 2])

    async def read() -> list[int]:
        return [value async for value in app.registered_functions["count"].remote_gen.aio(3)]

    assert asyncio.run(read()) == [0, 1, 2]


def test_wrong_verb_for_the_kind_of_function_is_answered_with_the_right_one(app: squall.App) -> None:
    functions = app.registered_functions
    for call in (functions["count"].remote, functions["count"].spawn):
        with pytest.raises(InvalidError, match="remote_gen"):
            call(3)
    with pytest.raises(InvalidError, match="remote_gen"):
        list(functions["count"].map([3]))
    with pytest.raises(InvalidError, match="is not a generator"):
        list(functions["square"].remote_gen(3))


# ---- calls that cannot be made


def test_plain_call_is_answered_with_remote_and_local(app: squall.App) -> None:
    with pytest.raises(InvalidError, match=r"square\.remote\(\.\.\.\).*square\.local"):
        app.registered_functions["square"](3)


def test_call_without_a_running_app_says_how_to_run_it() -> None:
    function = squall.App("idle").function()(square)
    with pytest.raises(InvalidError, match=r"(?s)not running.*squall run"):
        function.remote(1)
    with pytest.raises(InvalidError, match="not running"):
        _ = function.object_id


def test_function_added_after_the_start_says_so(app: squall.App) -> None:
    late = app.function(name="late")(square)
    with pytest.raises(InvalidError, match="added to the app after it was started"):
        late.remote(1)


# ---- handles


def test_handle_is_pickled_as_its_id(app: squall.App) -> None:
    function = app.registered_functions["square"]
    handle = pickle.loads(pickle.dumps(function))
    assert handle.object_id == function.object_id == "fu-square"
    assert handle.remote(5) == 25
    with pytest.raises(InvalidError, match="its code is not here"):
        handle.local(5)


def test_handle_of_an_app_that_does_not_run_cannot_be_pickled() -> None:
    with pytest.raises(SerializationError, match="its app is not running"):
        pickle.dumps(squall.App("idle").function()(square))


def test_handle_met_in_code_sent_by_value_finds_its_sibling(peer: Peer) -> None:
    from squall.app import hydrate_apps

    app = squall.App("siblings")
    function = app.function()(square)
    app._packing = True
    data = pickle.dumps(function)
    app._packing = False
    hydrate_apps("siblings", "ap-1", {"square": "fu-square"})
    peer.functions["fu-square"] = square
    assert pickle.loads(data).remote(3) == 9
    hydrate_apps("siblings", "ap-1", {})
    with pytest.raises(NotFoundError, match="no function `square`"):
        pickle.loads(data).remote(3)


@pytest.mark.parametrize("bad", ["fc-1", "", 5, "fu-", "fu-../x"])
def test_handle_from_a_bad_id_is_refused(bad: Any) -> None:
    with pytest.raises(InvalidError, match="is no id of a function"):
        squall.Function.from_id(bad)


def test_stats_are_numbers(app: squall.App, peer: Peer) -> None:
    def stats(message: m.GetStats, payload: bytes) -> None:
        peer.send(m.Reply({"backlog": 3, "num_total_runners": 2, "unknown": 1}, re=message.id))

    peer.answers[m.GetStats] = stats
    found = app.registered_functions["square"].get_current_stats()
    assert (found.backlog, found.num_total_runners, found.num_running_inputs) == (3, 2, 0)


# ---- spawned calls


def give_output(peer: Peer, results: dict[str, Any]) -> None:
    """Answer `GetOutput` for calls by what `results` holds for their ids; nothing for others."""

    def answer(message: m.GetOutput, payload: bytes) -> None:
        if message.call_id not in results:
            if message.timeout >= 0:
                peer.send(m.Reply({"ready": False}, re=message.id))
            return
        value = results[message.call_id]
        failed = isinstance(value, Exception)
        data = payloads.pack_exception(value) if failed else payloads.pack(value, "it")
        item = m.OutputItem(message.call_id, message.idx, "error" if failed else "ok", len(data))
        peer.send(m.Reply({"ready": True, "item": m.to_dict(item)}, re=message.id), data)

    peer.answers[m.GetOutput] = answer


def test_spawn_gives_a_handle_that_any_process_can_ask(app: squall.App, peer: Peer) -> None:
    call = app.registered_functions["square"].spawn(3)
    give_output(peer, {call.object_id: 9})
    assert call.get() == 9
    assert squall.FunctionCall.from_id(call.object_id).get(timeout=5) == 9
    assert pickle.loads(pickle.dumps(call)).object_id == call.object_id


def test_get_without_a_result_in_time_raises_a_timeout(app: squall.App, peer: Peer) -> None:
    give_output(peer, {})
    call = app.registered_functions["square"].spawn(3)
    with pytest.raises(TimeoutError):
        call.get(timeout=0)
    with pytest.raises(OutputTimeoutError, match="has no result after 0 s"):
        call.get(timeout=0)


def test_gather_keeps_order_and_raises_the_first_failure_at_once(app: squall.App, peer: Peer) -> None:
    calls = [app.registered_functions["square"].spawn(i) for i in range(3)]
    give_output(peer, {call.object_id: i for i, call in enumerate(calls)})
    assert squall.FunctionCall.gather(*calls) == [0, 1, 2]
    give_output(peer, {calls[2].object_id: ValueError("third")})
    with pytest.raises(ValueError, match="third"):
        squall.FunctionCall.gather(*calls)


def test_cancel_names_the_call(app: squall.App, peer: Peer) -> None:
    call = app.registered_functions["square"].spawn(3)
    call.cancel(terminate_containers=True)
    message = peer.of(m.CancelCall)[0]
    assert (message.call_id, message.idxs, message.terminate_containers) == (call.object_id, [], True)


def test_spawn_map_sends_batches_and_counts_its_inputs(app: squall.App, peer: Peer) -> None:
    call = app.registered_functions["square"].spawn_map(range(1200))
    submits = peer.of(m.Submit)
    assert [len(s.items) for s in submits] == [512, 512, 176]
    assert call.num_inputs() == 1200


# ---- outcomes


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ("timeout", FunctionTimeoutError),
        ("cancelled", CancelledError),
        ("lost", ContainerLostError),
        ("init_error", StartupError),
        ("rejected", ResourceExhaustedError),
        ("error", RemoteError),
        ("surprise", InternalError),
    ],
)
def test_each_way_to_end_has_its_error(status: str, kind: type[Exception]) -> None:
    item = m.OutputItem("fc-1", 0, status, message="what happened", hint="what to do")
    error = error_of(item, b"", "f")
    assert type(error) is kind
    assert "`f`" in str(error) and "what happened" in str(error) and "hint: what to do" in str(error)


def test_failed_import_is_the_cause_of_the_startup_error() -> None:
    data = payloads.pack_exception(ModuleNotFoundError("No module named 'nope'", name="nope"))
    error = error_of(m.OutputItem("fc-1", 0, "init_error", len(data), message="ModuleNotFoundError"), data, "f")
    assert isinstance(error, StartupError)
    assert isinstance(error.__cause__, ModuleNotFoundError)
    assert "`nope` is in neither" in error.hint
