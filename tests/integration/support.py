"""Builders for tests of the whole: an output that keeps what it is given, a peer that speaks raw frames, pids."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from squall import App, Image, config
from squall.client import Client
from squall.protocol.messages import Hello, LogChunk, Message, Notice, Reply, decode, encode
from squall.protocol.requests import ListObjects, MoreLogs, ReadLogs
from squall.protocol.transport import FrameReader
from tests.conftest import processes_of, wait_until


class Kept:
    """An `Output` that keeps everything."""

    def __init__(self) -> None:
        self.chunks: list[tuple[LogChunk, bytes]] = []
        self.notices: list[Notice] = []

    def log(self, chunk: LogChunk, data: bytes) -> None:
        self.chunks.append((chunk, data))

    def notice(self, notice: Notice) -> None:
        self.notices.append(notice)

    def text(self, function: str = "", stream: str = "", container_id: str = "") -> bytes:
        return b"".join(
            data
            for chunk, data in self.chunks
            if function in ("", chunk.function)
            and stream in ("", chunk.stream)
            and container_id in ("", chunk.container_id)
        )

    def reasons(self, kind: str) -> list[str]:
        return [str(notice.data.get("reason", "")) for notice in self.notices if notice.kind == kind]


class Wire:
    """A peer that may say anything."""

    def __init__(self, hello: bool = True) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(20)
        self.sock.connect(str(config.load().socket_path))
        self.reader = FrameReader()
        self.frames: list[tuple[Message, bytes]] = []
        if hello:
            self.ask(Hello("client"))

    def send(self, message: Message, payload: bytes = b"") -> None:
        self.sock.sendall(encode(message, payload))

    def receive(self) -> tuple[Message, bytes]:
        """The next message. Raises EOFError when the server closed the connection."""
        while not self.frames:
            try:
                data = self.sock.recv(1 << 18)
            except ConnectionResetError:
                data = b""
            if not data:
                raise EOFError
            self.frames += [(decode(header), payload) for header, payload in self.reader.feed(data)]
        return self.frames.pop(0)

    def ask(self, message: Message, payload: bytes = b"") -> tuple[Any, bytes]:
        """Send a request; its answer. Other messages that come first are dropped."""
        message.id = message.id or 1
        self.send(message, payload)
        while True:
            answer, data = self.receive()
            if answer.re == message.id and not isinstance(answer, LogChunk):
                return answer, data

    def is_closed(self) -> bool:
        """Whether the server has closed this connection; waits for it."""
        try:
            while True:
                self.receive()
        except EOFError:
            return True
        except TimeoutError:
            return False

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.sock.close()


def rows(kind: str, app: str = "", include_all: bool = False) -> list[dict[str, Any]]:
    """What the server lists."""
    reply, _ = Client.current().link.request(ListObjects(kind, app=app, all=include_all, limit=10_000)).wait(20)
    assert isinstance(reply, Reply)
    found: list[dict[str, Any]] = reply.data["rows"]
    return found


def containers_of(function: str, include_all: bool = False) -> list[dict[str, Any]]:
    return [row for row in rows("containers", include_all=include_all) if row["function"] == function]


def wait_ended(function: str) -> None:
    wait_until(lambda: not containers_of(function), f"no container of `{function}` is left")


def kept_logs(app: str = "", container_id: str = "", **more: Any) -> bytes:
    """What the server kept of an app's output, asked for by a connection of its own."""
    return b"".join(data for _, data in kept_entries(app=app, container_id=container_id, **more))


def kept_entries(**named: Any) -> list[tuple[list[Any], bytes]]:
    """Entries of the logs and their bytes, page after page until there is no more."""
    with Wire() as wire:
        request: Message = ReadLogs(**named)
        found = []
        while True:
            answer, data = wire.ask(request)
            assert isinstance(answer, Reply), answer
            for entry in answer.data["entries"]:
                found.append((entry, data[: entry[4]]))
                data = data[entry[4] :]
            if answer.data["done"]:
                return found
            request = MoreLogs(answer.data["reader"])


class Heard:
    """An output that keeps what a build says."""

    def __init__(self) -> None:
        self.text = b""
        self.steps: list[str] = []

    def log(self, chunk: LogChunk, data: bytes) -> None:
        self.text += data

    def notice(self, notice: Notice) -> None:
        if notice.kind == "build" and notice.data["state"] == "step":
            self.steps.append(str(notice.data["reason"]))


def on(image: Image, body: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The result of a function run on an image."""
    app = App("images", image=image)
    function = app.function(serialized=True, name="body", **options)(body)
    with app.run(output=Heard()):
        return function.remote(*args)


def content(image: Image, path: str) -> str:
    """What a container on the image finds in a file."""

    def read(path: str) -> str:
        with open(path) as file:
            return file.read()

    found: str = on(image, read, path)
    return found


def layers_in(home: Path) -> set[str]:
    return {path.name for path in (home / "node/layers").iterdir() if (path / "tree").is_dir()}


def pid_of(home: Path, part: str) -> int:
    """The pid of the home's `server` or `node`; 0 when there is none."""
    for pid, command in processes_of(home).items():
        if f"-m squall.{part}" in command:
            return pid
    return 0


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def children_of(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def inits(home: Path) -> dict[str, int]:
    """Host pid of pid 1 of each running container, by its id."""
    found = {}
    for pid in children_of(pid_of(home, "node")):
        try:
            if Path(f"/proc/{pid}/comm").read_text() == "squall-init\n":
                found[Path(f"/proc/{pid}/root/etc/hostname").read_text().strip()] = pid
        except OSError:  # it is ending
            continue
    return found


def zygotes(home: Path) -> list[int]:
    """Host pids of the home's zygotes and of what they have forked ahead."""
    return [pid for pid in children_of(pid_of(home, "node")) if pid not in inits(home).values()]


class Outcome(threading.Thread):
    """A call made in a thread of its own; `result` waits for what became of it."""

    def __init__(self, body: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._body = body
        self._value: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._value = self._body()
        except BaseException as error:
            self._error = error

    def result(self, seconds: float = 60.0) -> Any:
        self.join(seconds)
        assert not self.is_alive(), f"the call did not end within {seconds:g} s"
        if self._error is not None:
            raise self._error
        return self._value

    def error(self, seconds: float = 60.0) -> BaseException:
        self.join(seconds)
        assert not self.is_alive(), f"the call did not end within {seconds:g} s"
        assert self._error is not None, f"the call gave {self._value!r}"
        return self._error


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __call__(self) -> float:
        return time.monotonic() - self._began
