"""The Link: whoever waits reads for all, nothing is lost between threads, and closing is heard by everybody."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from squall._blocking import both, run
from squall.exception import NotFoundError, OutputTimeoutError, ServiceError
from squall.protocol.frames import CHUNK_LIMIT, KEPT_BYTES, PEEK_BYTES, Buffers, FrameReader, Pieces
from squall.protocol.messages import Failure, InputItem, Message, Notice, Ping, Reply, StopApp, encode, split_payload
from squall.protocol.transport import FrameStream, Link, Pending

WAIT = 10.0


class Echo:
    """The other end: answers every Ping, keeps the rest."""

    def __init__(self, sock: socket.socket) -> None:
        self.got: list[Message] = []
        self.hold = threading.Event()
        self.link = Link(sock, self._on_push)

    def _on_push(self, message: Message, payload: bytes) -> None:
        if isinstance(message, Ping):
            self.link.send(Reply({"id": message.id}, re=message.id), payload)
        elif isinstance(message, StopApp):
            self.link.send(Failure("not_found", "no such app", "look again", re=message.id))
        self.got.append(message)


@pytest.fixture
def ends() -> Iterator[tuple[Link, Echo, list[Message]]]:
    ours, theirs = socket.socketpair()
    pushed: list[Message] = []
    echo = Echo(theirs)
    link = Link(ours, lambda message, payload: pushed.append(message))
    yield link, echo, pushed
    link.close()
    echo.link.close()


Ends = tuple[Link, Echo, list[Message]]


def wait_until(condition: object, what: str) -> None:
    done = threading.Event()
    for _ in range(1000):
        if condition():  # type: ignore[operator]
            return
        done.wait(0.01)
    raise AssertionError(f"waited {WAIT} s for: {what}")


def test_a_request_gets_its_own_answer(ends: Ends) -> None:
    link, _, _ = ends
    first, second = link.request(Ping(), b"a"), link.request(Ping(), b"b")
    assert second.wait(WAIT)[1] == b"b"
    assert first.wait(WAIT)[1] == b"a"


def test_a_failure_is_raised_as_its_class(ends: Ends) -> None:
    with pytest.raises(NotFoundError, match="no such app") as caught:
        ends[0].request(StopApp("x")).wait(WAIT)
    assert caught.value.hint == "look again"


def test_many_threads_share_one_connection(ends: Ends) -> None:
    link = ends[0]
    wrong: list[object] = []

    def ask(n: int) -> None:
        for i in range(200):
            data = f"{n}/{i}".encode()
            if link.request(Ping(), data).wait(WAIT)[1] != data:
                wrong.append(data)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
        assert not thread.is_alive()
    assert wrong == []


def test_pushes_arrive_while_nobody_waits(ends: Ends) -> None:
    link, echo, pushed = ends
    link.request(Ping()).wait(WAIT)
    echo.link.send(Notice("ap-1", "container"))
    wait_until(lambda: pushed, "the pushed notice")


def test_pushes_arrive_after_a_long_wait_has_ended(ends: Ends) -> None:
    link, echo, pushed = ends
    never: Pending[None] = Pending(link)
    with pytest.raises(OutputTimeoutError):
        never.wait(0.15)
    echo.link.send(Notice("ap-1", "container"))
    wait_until(lambda: pushed, "the pushed notice")


def test_a_wait_ends_at_its_deadline_whether_leading_or_following(ends: Ends) -> None:
    link = ends[0]

    def lead() -> None:
        with pytest.raises(OutputTimeoutError):
            Pending(link).wait(0.4)

    leader = threading.Thread(target=lead)
    leader.start()
    with pytest.raises(OutputTimeoutError):
        Pending(link).wait(0.1)
    leader.join(WAIT)
    assert not leader.is_alive()


def test_a_value_set_by_another_thread_ends_a_wait(ends: Ends) -> None:
    pending: Pending[int] = Pending(ends[0])
    threading.Timer(0.05, pending.set, [3]).start()
    with pytest.raises(OutputTimeoutError):
        Pending(ends[0]).wait(0.1)
    assert pending.wait(WAIT) == 3


def test_closing_the_other_end_fails_whoever_waits_and_whoever_comes(ends: Ends) -> None:
    link, echo, _ = ends
    waiting: Pending[None] = Pending(link)
    threading.Timer(0.05, echo.link.close).start()
    with pytest.raises(ServiceError):
        waiting.wait(WAIT)
    with pytest.raises(ServiceError):
        link.request(Ping())


def test_garbage_closes_the_connection_with_its_reason() -> None:
    ours, theirs = socket.socketpair()
    link = Link(ours, lambda message, payload: None)
    theirs.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    wait_until(lambda: link.closed, "the link to close")
    assert "garbage" in link.closed
    theirs.close()
    link.close()


def test_both_faces_run_the_same_body(ends: Ends) -> None:
    link = ends[0]

    class Thing:
        @both
        async def ask(self, data: bytes) -> bytes:
            return (await link.request(Ping(), data))[1]

    assert Thing().ask(b"x") == b"x"

    async def many() -> list[bytes]:
        return await asyncio.gather(*[Thing().ask.aio(str(i).encode()) for i in range(50)])

    assert asyncio.run(many()) == [str(i).encode() for i in range(50)]


def test_an_error_of_a_wait_is_raised_inside_the_coroutine(ends: Ends) -> None:
    async def body() -> str:
        try:
            await Pending(ends[0]).within(0.02)
        except OutputTimeoutError:
            await ends[0].request(Ping())
            return "caught"
        return "not caught"

    assert run(body()) == "caught"


@pytest.mark.parametrize("step", [1, 2, 7, 8, 9, 50, 10_000])
def test_frames_are_cut_right_however_the_bytes_come(step: int) -> None:
    frames = [encode(Ping(id=i), b"p" * i * 37) for i in range(1, 20)]
    stream = b"".join(frames)
    reader = FrameReader()
    got = [frame for at in range(0, len(stream), step) for frame in reader.feed(stream[at : at + step])]
    assert [payload for _, payload in got] == [b"p" * i * 37 for i in range(1, 20)]


@pytest.mark.parametrize("seed", range(12))
def test_large_payloads_received_in_place_are_the_same_bytes(seed: int) -> None:
    """As a loop reads: into the room of a large payload, else into one buffer that is overwritten each time."""
    draw = random.Random(seed)
    sent = [draw.randbytes(draw.choice([0, 5, 3000, 65_535, 65_536, 70_000, 200_000])) for _ in range(30)]
    stream = memoryview(b"".join(encode(Ping(id=at), payload) for at, payload in enumerate(sent)))
    reader, scratch, got = FrameReader(), memoryview(bytearray(65_536)), []
    while stream:
        room = reader.room()
        target = scratch if room is None else room
        count = min(len(target), len(stream), draw.choice([1, 7, 8, 60, 40_000, 1 << 20]))
        target[:count] = stream[:count]
        stream = stream[count:]
        got += reader.feed_view(target[:count]) if room is None else reader.filled(count)
        scratch[:] = b"?" * len(scratch)
    assert [bytes(payload) for _, payload in got] == sent


def test_what_comes_behind_a_large_payload_is_not_shown_with_it() -> None:
    """A buffer is larger than its payload, and is used again with what it held before."""
    first, second = b"1" * 100_000, b"2" * 70_000
    reader = FrameReader()
    got: list[Any] = []
    stream = encode(Ping(id=1), first) + encode(Ping(id=2), b"small") + encode(Ping(id=3), second)
    got += reader.feed_view(memoryview(stream)[:65_536])
    stream = stream[65_536:]
    while stream:
        room = reader.room()
        assert room is not None
        count = min(len(room), len(stream))
        room[:count] = stream[:count]
        stream = stream[count:]
        got += reader.filled(count)
    assert [bytes(payload) for _, payload in got] == [first, b"small", second]
    assert got[0][1].readonly


def test_garbage_behind_a_large_payload_is_refused() -> None:
    reader = FrameReader()
    reader.feed(encode(Ping(id=1), bytes(100_000))[:50_000])
    room = reader.room()
    assert room is not None
    room[:] = b"\xff" * len(room)
    with pytest.raises(ValueError, match="announces"):
        reader.filled(len(room))


def test_a_buffer_is_used_again_when_no_view_of_it_is_left() -> None:
    buffers = Buffers()
    view = buffers.take(100_000)
    part = view[10:20].toreadonly()
    first = view.obj
    assert buffers.take(100_000).obj is not first
    del view
    assert buffers.take(100_000).obj is not first
    del part
    assert first in [buffers.take(100_000).obj for _ in range(2)]


def test_few_buffers_are_kept_and_none_that_is_very_large() -> None:
    buffers = Buffers()
    views = [buffers.take(200_000) for _ in range(200)]
    assert len({id(view.obj) for view in views}) == 200
    assert sum(map(len, buffers._kept)) == buffers._kept_bytes <= KEPT_BYTES
    before = list(map(id, buffers._kept))
    assert len(buffers.take(50 << 20)) == 50 << 20
    assert list(map(id, buffers._kept)) == before


def test_threads_that_take_buffers_at_once_never_share_one() -> None:
    buffers, problems = Buffers(), []

    def work(mark: int) -> None:
        for _ in range(300):
            view = buffers.take(70_000)
            view[:8] = mark.to_bytes(8, "little")
            if bytes(view[:8]) != mark.to_bytes(8, "little"):
                problems.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert problems == []


def test_a_stream_reads_little_where_large_frames_are_likely_and_ends_on_garbage_behind_one() -> None:
    got: list[Any] = []
    loop = asyncio.new_event_loop()
    loop.close()  # it has nothing to do here
    stream = FrameStream(loop, lambda _, header, payload: got.append(payload), lambda *_: None)
    stream.connection_made(Transport())

    def receive(data: bytes) -> None:
        while data:
            buffer = stream.get_buffer(0)
            count = min(len(buffer), len(data))
            buffer[:count] = data[:count]
            data = data[count:]
            stream.buffer_updated(count)

    assert len(stream.get_buffer(0)) > PEEK_BYTES
    receive(encode(Ping(id=1), b"1" * 100_000))
    assert len(stream.get_buffer(0)) == PEEK_BYTES
    receive(encode(Ping(id=2), b"2" * 100_000))
    receive(encode(Ping(id=3), b"3"))
    assert len(stream.get_buffer(0)) > PEEK_BYTES
    assert [bytes(payload) for payload in got] == [b"1" * 100_000, b"2" * 100_000, b"3"]
    receive(encode(Ping(id=4), b"4" * 100_000)[:80_000])
    receive(b"\xff" * 30_000)
    assert "garbage" in stream.closing


def test_a_payload_in_pieces_arrives_whole() -> None:
    ours, theirs = socket.socketpair()
    link = Link(ours, lambda *_: None, background=False)
    large, pieces = os.urandom(200_000), Pieces()
    for part in (b"head", large, b"tail"):
        pieces.write(part)
    thread = threading.Thread(target=lambda: link.send_raw(b'{"t":"ping"}', b"one", pieces, b"two"))
    thread.start()
    reader = FrameReader()
    got: list[Any] = []
    theirs.settimeout(WAIT)
    while not got:
        got += reader.feed(theirs.recv(1 << 18))
    thread.join(WAIT)
    assert bytes(got[0][1]) == b"onehead" + large + b"tailtwo"
    assert pieces.parts[1] is large
    link.close()
    theirs.close()


def test_small_items_of_a_large_payload_do_not_keep_it_alive() -> None:
    payload = memoryview(bytes(200_000))
    small, large = split_payload([InputItem(0, 10), InputItem(1, 199_990)], payload)
    assert type(small) is bytes
    assert type(large) is memoryview


def test_a_frame_that_comes_in_very_many_pieces_is_not_kept_in_as_many() -> None:
    payload = os.urandom(300_000)
    frames = encode(Ping(id=1), payload) + encode(Ping(id=2), b"next")
    reader, most, got = FrameReader(), 0, []
    for at in range(0, len(frames), 7):
        got += reader.feed(frames[at : at + 7])
        most = max(most, len(reader._chunks))
    assert [data for _, data in got] == [payload, b"next"]
    assert most < CHUNK_LIMIT + 100


def test_a_frame_over_the_limit_is_refused_by_its_announcement_alone() -> None:
    with pytest.raises(ValueError, match="announces"):
        FrameReader(limit=1000).feed((10).to_bytes(4, "little") + (2 << 30).to_bytes(4, "little"))


class Interrupted:
    """A socket that takes `size` bytes of the first send, and is then interrupted as by Ctrl-C."""

    def __init__(self, sock: socket.socket, size: int) -> None:
        self.sock = sock
        self.left = size

    def send(self, data: bytes) -> int:
        return self.sendmsg([data])

    def sendmsg(self, parts: list[bytes]) -> int:
        data = b"".join(parts)
        if not self.left:
            self.left = -1
            raise KeyboardInterrupt
        sent = self.sock.send(data if self.left < 0 else data[: self.left])
        if self.left > 0:
            self.left -= sent
        return sent

    def __getattr__(self, name: str) -> object:
        return getattr(self.sock, name)


@pytest.mark.parametrize("payload", [b"small", bytes(1 << 17)])
@pytest.mark.parametrize("size", [0, 5, 30, 60])
def test_what_is_sent_after_an_interrupted_send_is_not_taken_for_its_rest(payload: bytes, size: int) -> None:
    ours, theirs = socket.socketpair()
    link = Link(ours, lambda *_: None, background=False)
    link.sock = Interrupted(ours, size)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        link.send(StopApp("the first", reason="a header of more than sixty bytes"), payload)
    link.send(StopApp("the second"))
    theirs.settimeout(WAIT)
    reader = FrameReader()
    got: list[tuple[bytes, bytes]] = []
    while not got or b"second" not in got[-1][0]:
        got += reader.feed(theirs.recv(1 << 18))
    assert [sent for _, sent in got] == [payload, b""][0 if size else 1 :]
    link.close()
    theirs.close()


class Transport:
    """What a FrameStream writes to; reads nothing by itself."""

    def __init__(self) -> None:
        self.waiting = 0
        self.is_reading = True

    def set_write_buffer_limits(self, high: int) -> None:
        self.high = high

    def get_extra_info(self, name: str) -> None:
        return None

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def write(self, data: bytes) -> None:
        self.waiting += len(data)

    def writelines(self, parts: list[bytes]) -> None:
        self.write(b"".join(parts))

    def pause_reading(self) -> None:
        self.is_reading = False

    def resume_reading(self) -> None:
        self.is_reading = True

    def abort(self) -> None:
        self.is_reading = False


def answering_stream(loop: asyncio.AbstractEventLoop, answer: bytes) -> tuple[FrameStream, Transport]:
    """A stream that answers each frame with `answer` and may hold 1 MiB that is not read."""
    stream = FrameStream(loop, lambda s, header, payload: s.send(Reply(), answer), lambda s, reason: None)
    stream.hold_above = 1 << 20
    transport = Transport()
    stream.connection_made(transport)
    return stream, transport


def test_who_asks_and_does_not_read_is_not_listened_to() -> None:
    async def body() -> None:
        stream, transport = answering_stream(asyncio.get_running_loop(), bytes(1 << 18))
        stream.data_received(encode(Ping()) * 1000)
        await asyncio.sleep(0)
        assert transport.waiting < 2 << 20
        assert not transport.is_reading

    asyncio.run(body())


def test_who_reads_again_gets_every_answer() -> None:
    async def body() -> None:
        stream, transport = answering_stream(asyncio.get_running_loop(), bytes(1 << 18))
        stream.data_received(encode(Ping()) * 1000)
        stream.pause_writing()
        answered = 0
        for _ in range(2000):
            await asyncio.sleep(0)
            answered, transport.waiting = answered + transport.waiting, 0
            stream.resume_writing()
        assert answered // (1 << 18) == 1000
        assert transport.is_reading

    asyncio.run(body())


def test_what_is_sent_before_there_is_a_connection_leaves_with_it() -> None:
    async def body() -> None:
        stream = FrameStream(asyncio.get_running_loop(), lambda *_: None, lambda *_: None)
        stream.send(Ping())
        await asyncio.sleep(0)
        transport = Transport()
        stream.connection_made(transport)
        await asyncio.sleep(0)
        assert transport.waiting == len(encode(Ping()))

    asyncio.run(body())
