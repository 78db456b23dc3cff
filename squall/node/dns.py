"""The DNS forwarder: the one door through which containers ask the resolvers this machine is configured with.

Owns the sockets on the gateway's port 53 and the questions in flight. A container never reaches a resolver itself,
so it does not matter that resolvers live at private or loopback addresses. Every question goes out from a socket of
its own, with an id of its own, and only an answer to that very question comes back, with the asker's id restored.
Answers are passed on as they are, truncated ones too, and never cached. Containers are hostile: what is malformed is
dropped, and each has a bounded share of what is in flight. Tested in `tests/unit/test_dns.py` and
`tests/security/test_network_policy.py`.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from squall._observe import count

PORT = 53
Address = tuple[str, int]

ATTEMPTS = 4
"""Tries of one question, over all resolvers in turn."""
TRY_TIMEOUT = 2.0
"""Seconds one resolver has. Four tries stay below the ten seconds after which a libc gives up by itself."""
MAX_IN_FLIGHT = 1024
MAX_PER_CONTAINER = 128
MAX_CONNECTIONS = 256
IDLE_TIMEOUT = 10.0
"""Seconds a TCP connection may be silent."""
_BURST = 64
"""Datagrams taken per turn of the loop, so that a flood leaves the loop to others."""
_MAX_DATAGRAM = 4096


class HostResolvers:
    """What resolv.conf says, read again when the file changes: a laptop changes networks."""

    def __init__(self, path: Path = Path("/etc/resolv.conf")) -> None:
        self._path = path
        self._checked_at = float("-inf")
        self._stamp: tuple[int, int] | None = None
        self._servers: list[Address] = [("127.0.0.1", PORT)]
        self._options: list[str] = []

    def servers(self) -> Sequence[Address]:
        self._refresh()
        return self._servers

    def options(self) -> Sequence[str]:
        """The lines a container's resolv.conf takes over: `search`, `domain`, `options`."""
        self._refresh()
        return self._options

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._checked_at < 1.0:
            return
        self._checked_at = now
        try:
            status = self._path.stat()
            stamp = (status.st_ino, status.st_mtime_ns)
            if stamp != self._stamp:
                self._servers, self._options = parse_resolv_conf(self._path.read_text("utf-8", "replace"))
                self._stamp = stamp
        except OSError:  # being replaced: what we know stays good
            return


def parse_resolv_conf(text: str) -> tuple[list[Address], list[str]]:
    """Resolvers, and the lines that are about names; without a resolver the local one is meant (resolv.conf(5))."""
    servers: list[Address] = []
    options = []
    for line in text.splitlines():
        words = line.split()
        if len(words) > 1 and words[0] == "nameserver":
            servers.append((words[1], PORT))
        elif len(words) > 1 and words[0] in ("search", "domain", "options"):
            options.append(" ".join(words))
    return servers[:3] or [("127.0.0.1", PORT)], options


# ---- messages -----------------------------------------------------------------------------------------------------


def question_of(message: bytes) -> bytes | None:
    """The question section of a well-formed query with one question, else None."""
    if len(message) < 12:
        return None
    flags, questions, answers = struct.unpack_from("!HHH", message, 2)
    if flags & 0xF800 or questions != 1 or answers:  # a response, not a standard query, or something odd
        return None
    return _question_at(message)


def _question_at(message: bytes) -> bytes | None:
    position = 12
    while position < len(message) and position < 12 + 255:
        length = message[position]
        if length > 63:  # a compressed name has no place in the first question
            return None
        position += 1 + length
        if length == 0:
            return message[12 : position + 4] if position + 4 <= len(message) else None
    return None


def is_answer_to(message: bytes, query_id: int, question: bytes) -> bool:
    """Whether a message answers exactly this question. An error may leave the question out."""
    if len(message) < 12:
        return False
    answer_id, flags, questions = struct.unpack_from("!HHH", message)
    if answer_id != query_id or not flags & 0x8000:
        return False
    if questions == 0:
        return bool(flags & 0xF)
    # Compared without regard to case, as names are; resolvers may echo them in another one.
    return questions == 1 and message[12 : 12 + len(question)].lower() == question.lower()


def failure(query: bytes, question: bytes) -> bytes:
    """SERVFAIL for a query: the asker learns at once what it would otherwise wait for."""
    flags = 0x8082 | (struct.unpack_from("!H", query, 2)[0] & 0x0100)
    return query[:2] + struct.pack("!HHHHH", flags, 1, 0, 0, 0) + question


def _with_id(message: bytes, new_id: int) -> bytes:
    return struct.pack("!H", new_id) + message[2:]


def _new_id() -> int:
    return int.from_bytes(os.urandom(2), "big")


# ---- forwarding ---------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Question:
    query: bytes
    question: bytes
    asker: Address
    attempt: int = 0
    query_id: int = 0
    upstream: socket.socket | None = None
    timer: asyncio.TimerHandle | None = None


class Forwarder:
    """Answers on two sockets that were opened in the router's namespace; asks from the namespace of the agent."""

    def __init__(self, servers: Callable[[], Sequence[Address]], try_timeout: float = TRY_TIMEOUT) -> None:
        self._servers = servers
        self._try_timeout = try_timeout
        self._loop = asyncio.get_running_loop()
        self._udp: socket.socket | None = None
        self._server: asyncio.Server | None = None
        self._questions: set[_Question] = set()
        self._shares: Counter[str] = Counter()
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self, udp: socket.socket, tcp: socket.socket) -> None:
        """Take over both sockets. They must be bound, and not be blocking."""
        self._udp = udp
        self._loop.add_reader(udp.fileno(), self._take_queries)
        self._server = await asyncio.start_server(self._serve_connection, sock=tcp, limit=1 << 16)

    async def close(self) -> None:
        if self._udp is not None:
            self._loop.remove_reader(self._udp.fileno())
            self._udp.close()
            self._udp = None
        for question in list(self._questions):
            self._end(question)
        if self._server is not None:
            self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    # UDP

    def _take_queries(self) -> None:
        for _ in range(_BURST):
            if self._udp is None:
                return
            try:
                query, asker = self._udp.recvfrom(_MAX_DATAGRAM)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:  # an error that an earlier answer brought home: the asker is gone
                continue
            self._take_query(query, asker)

    def _take_query(self, query: bytes, asker: Address) -> None:
        question = question_of(query)
        if question is None or not self._admit(asker[0]):
            count("dns_queries_dropped")
            return
        count("dns_queries")
        asked = _Question(query, question, asker)
        self._questions.add(asked)
        self._ask(asked)

    def _admit(self, container: str) -> bool:
        if len(self._questions) + len(self._connections) >= MAX_IN_FLIGHT:
            return False
        if self._shares[container] >= MAX_PER_CONTAINER:
            return False
        self._shares[container] += 1
        return True

    def _ask(self, asked: _Question) -> None:
        """Send the question to the next resolver, passing over those that cannot be sent to."""
        self._hang_up(asked)
        servers = self._servers()
        while asked.attempt < ATTEMPTS:
            server = servers[asked.attempt % len(servers)]
            asked.attempt += 1
            if self._send(asked, server):
                asked.timer = self._loop.call_later(self._try_timeout, self._ask, asked)
                return
        self._reply(asked, failure(asked.query, asked.question))

    def _send(self, asked: _Question, server: Address) -> bool:
        upstream = None
        try:
            upstream = _connected_udp(server)
            asked.query_id = _new_id()
            upstream.send(_with_id(asked.query, asked.query_id))
        except OSError:
            if upstream is not None:
                upstream.close()
            return False
        asked.upstream = upstream
        self._loop.add_reader(upstream.fileno(), self._take_answer, asked)
        return True

    def _take_answer(self, asked: _Question) -> None:
        assert asked.upstream is not None  # its reader is gone before it is
        try:
            answer = asked.upstream.recv(65535)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:  # refused: nobody listens there
            self._ask(asked)
            return
        if is_answer_to(answer, asked.query_id, asked.question):
            self._reply(asked, asked.query[:2] + answer[2:])

    def _reply(self, asked: _Question, answer: bytes) -> None:
        self._end(asked)
        if self._udp is not None:
            try:
                self._udp.sendto(answer, asked.asker)
            except OSError:  # its buffer is full, or the container is gone: it will ask again, or not
                count("dns_answers_lost")

    def _end(self, asked: _Question) -> None:
        self._hang_up(asked)
        if asked in self._questions:
            self._questions.discard(asked)
            self._leave(asked.asker[0])

    def _leave(self, container: str) -> None:
        self._shares[container] -= 1
        if self._shares[container] <= 0:
            del self._shares[container]

    def _hang_up(self, asked: _Question) -> None:
        if asked.timer is not None:
            asked.timer.cancel()
            asked.timer = None
        if asked.upstream is not None:
            self._loop.remove_reader(asked.upstream.fileno())
            asked.upstream.close()
            asked.upstream = None

    # TCP

    async def _serve_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        container = str((writer.get_extra_info("peername") or ("",))[0])
        admitted = len(self._connections) < MAX_CONNECTIONS and self._admit(container)
        try:
            if admitted:
                self._connections.add(task)
                await self._serve_queries(reader, writer)
        except (OSError, EOFError, asyncio.TimeoutError):
            count("dns_connections_broken")
        finally:
            self._connections.discard(task)
            if admitted:
                self._leave(container)
            writer.close()

    async def _serve_queries(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            query = await asyncio.wait_for(_read_message(reader), IDLE_TIMEOUT)
            question = question_of(query)
            if question is None:
                return
            answer = await self._answer_by_tcp(query, question)
            writer.write(struct.pack("!H", len(answer)) + answer)
            await asyncio.wait_for(writer.drain(), IDLE_TIMEOUT)

    async def _answer_by_tcp(self, query: bytes, question: bytes) -> bytes:
        servers = self._servers()
        for attempt in range(ATTEMPTS):
            try:
                exchange = _exchange(servers[attempt % len(servers)], query, question)
                return await asyncio.wait_for(exchange, self._try_timeout)
            except (OSError, EOFError, asyncio.TimeoutError):
                continue
        return failure(query, question)


def _connected_udp(server: Address) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        server[0], server[1], type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST
    )[0]
    upstream = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
    try:
        upstream.connect(address)  # from here the kernel drops what comes from anywhere else
    except BaseException:
        upstream.close()
        raise
    return upstream


async def _exchange(server: Address, query: bytes, question: bytes) -> bytes:
    query_id = _new_id()
    reader, writer = await asyncio.open_connection(*server)
    try:
        message = _with_id(query, query_id)
        writer.write(struct.pack("!H", len(message)) + message)
        answer = await _read_message(reader)
    finally:
        writer.close()
    if not is_answer_to(answer, query_id, question):
        raise ConnectionError("the resolver answered another question")
    return query[:2] + answer[2:]


async def _read_message(reader: asyncio.StreamReader) -> bytes:
    (length,) = struct.unpack("!H", await reader.readexactly(2))
    return await reader.readexactly(length)
