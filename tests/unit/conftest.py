"""`peer`: the other end of a client's connection, speaking frames, for tests of the SDK that need no server.

It runs functions by value of their handles, in its own thread, and remembers what it was told. It decides nothing:
no queue, no retry, no window; those are tested with the real server in `tests/integration`.
"""

from __future__ import annotations

import hashlib
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from squall._context import state
from squall._session import RunningApp
from squall.app import App
from squall.client import Client
from squall.protocol import messages as m
from squall.protocol import payload as payloads
from squall.protocol.transport import FrameReader


class Peer:
    def __init__(self) -> None:
        self.sock, client_end = socket.socketpair()
        self.functions: dict[str, Callable[..., Any]] = {}
        self.received: list[m.Message] = []
        self.blobs: dict[str, bytearray] = {}
        self.held: list[tuple[m.Submit, m.InputItem, bytes]] = []
        self.hold = False
        """Keep inputs in `held` instead of answering them."""
        self.answers: dict[type, Callable[[Any, bytes], None]] = {}
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        self.client = Client(client_end)
        self.client._greet()
        self.client.link.start_background()

    def send(self, message: m.Message, payload: bytes = b"") -> None:
        self.sock.sendall(m.encode(message, payload))

    def of(self, kind: type) -> list[Any]:
        return [message for message in self.received if type(message) is kind]

    def close(self) -> None:
        self.sock.close()
        self.client.close()

    def run(self, app: App) -> App:
        """Make the app look started, with this peer as its server."""
        functions = {tag: f"fu-{tag}" for tag in app._specs}
        for tag, function in app._functions.items():
            self.functions[f"fu-{tag}"] = function.raw_f
        app._running = RunningApp("ap-1", self.client, functions, {}, set())
        return app

    def answer(self, submit: m.Submit, item: m.InputItem, data: bytes) -> None:
        self._send_outputs([self._call(submit, item, data)])

    def _serve(self) -> None:
        reader = FrameReader()
        while True:
            try:
                data = self.sock.recv(1 << 20)
            except OSError:
                return
            if not data:
                return
            for header, payload in reader.feed(data):
                message = m.decode(header)
                self.received.append(message)
                try:
                    self._answer(message, payload)
                except OSError:  # the client left
                    return

    def _answer(self, message: m.Message, payload: bytes) -> None:
        if type(message) in self.answers:
            self.answers[type(message)](message, payload)
        elif isinstance(message, m.Hello):
            self.send(m.Welcome("test"))
        elif isinstance(message, m.Submit):
            self._submitted(message, payload)
        elif isinstance(message, m.HasBlobs):
            self._reply(message, {"missing": [d for d in message.digests if d not in self.blobs]})
        elif isinstance(message, m.PutBlob):
            self.blobs.setdefault(message.digest, bytearray()).extend(payload)
            self._reply(message, {})
        elif isinstance(message, m.GetBlob):
            data = self.blobs[message.digest]
            part = bytes(data[message.offset : message.offset + m.BLOB_CHUNK_BYTES])
            self._reply(message, {"size": len(data)}, part)
        elif message.id:
            self._reply(message, {})

    def _reply(self, message: m.Message, data: dict[str, Any], payload: bytes = b"") -> None:
        self.send(m.Reply(data, re=message.id), payload)

    def _submitted(self, message: m.Submit, payload: bytes) -> None:
        inputs = list(zip(message.items, m.split_payload(message.items, payload), strict=True))
        if message.id:
            self._reply(message, {})
        if self.hold:
            self.held += [(message, item, data) for item, data in inputs]
        elif inputs and message.kind != "spawn":
            self._send_outputs([self._call(message, item, data) for item, data in inputs])

    def _call(self, submit: m.Submit, item: m.InputItem, data: bytes) -> tuple[m.OutputItem, bytes]:
        if item.blob:
            data = bytes(self.blobs[item.blob])
        output = m.OutputItem(submit.call_id, item.idx, "ok")
        try:
            args, kwargs = payloads.unpack_call(data, "f")
            result = payloads.pack(self.functions[submit.function_id](*args, **kwargs), "result")
        except Exception as error:
            output.status, result = "error", payloads.pack_exception(error)
        if len(result) > m.INLINE_LIMIT_BYTES:
            output.blob = hashlib.blake2b(result, digest_size=32).hexdigest()
            self.blobs[output.blob] = bytearray(result)
            result = b""
        output.size = len(result)
        return output, result

    def _send_outputs(self, outputs: list[tuple[m.OutputItem, bytes]]) -> None:
        self.send(m.Outputs([item for item, _ in outputs]), b"".join(data for _, data in outputs))


@pytest.fixture
def peer() -> Iterator[Peer]:
    other = Peer()
    state.client = other.client
    try:
        yield other
    finally:
        state.client = None
        other.close()


SCRIPT = """
import squall
app = squall.App("script")

@app.function()
def square(x): return x * x
"""
"""What tests import from a file."""


@pytest.fixture
def keep_imports() -> Iterator[None]:
    """What a test imports is gone after it."""
    modules, path = dict(sys.modules), list(sys.path)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - set(modules):
        del sys.modules[name]
