"""Builders for tests that make real containers: a runtime with its own loop and home, and cells to ask things of.

A cell runs `tests/kernel/probe.py` in place of the runner: code goes in, its `result` comes out.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from squall.node import linux
from squall.node.native import NativeRuntime
from squall.node.runtime import Container, ContainerIO, Exit, ProcessRuntime, Runtime
from squall.protocol.messages import ContainerSpec, new_id

T = TypeVar("T")
ENTRY = "probe:serve"
ANSWER_SECONDS = 20.0


class Cell:
    """One container and the wire to the probe in it."""

    def __init__(
        self, node: Node, container: Container, server: socket.socket, control: socket.socket, stdout: int, stderr: int
    ) -> None:
        self.node = node
        self.container = container
        self.server = server
        self.control = control
        self.stdout = stdout
        self.stderr = stderr
        server.settimeout(ANSWER_SECONDS)
        self._stream = server.makefile("rwb")

    def send(self, code: str) -> None:
        self._stream.write(json.dumps(code).encode() + b"\n")
        self._stream.flush()

    def receive(self) -> dict[str, Any]:
        line = self._stream.readline()
        assert line, f"the container ended: {self.end()}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, code: str) -> Any:
        """Run `code` inside; what it assigned to `result`."""
        self.send(code)
        answer = self.receive()
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def refusal(self, code: str) -> str:
        """Run `code`, which the kernel must refuse; the name of the error."""
        self.send(code)
        answer = self.receive()
        assert "error" in answer, f"it was allowed, with result {answer['result']!r}"
        assert answer["errno"], answer["error"]
        return errno.errorcode[answer["errno"]]

    def end(self, seconds: float = ANSWER_SECONDS) -> Exit:
        return self.node.run(asyncio.wait_for(self.container.wait(), seconds))

    def output(self) -> bytes:
        """All it wrote to stdout, once it has ended."""
        with open(self.stdout, "rb", closefd=False) as file:
            return file.read()

    def close(self) -> None:
        self._stream.close()
        self.server.close()
        self.control.close()
        self.container.kill("the test is over")
        self.end()
        os.close(self.stdout)
        os.close(self.stderr)


class Node:
    """A runtime, its home, and the loop it lives on."""

    def __init__(self, make: Callable[[Path], Runtime]) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="squall-"))
        self.loop = asyncio.new_event_loop()
        self.runtime = self.run(self._made(make))
        self.cells: list[Cell] = []

    async def _made(self, make: Callable[[Path], Runtime]) -> Runtime:
        runtime = make(self.home)
        await runtime.start()
        return runtime

    def run(self, body: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(body)

    def make(self, source: Path | None = None, **fields: Any) -> Cell:
        return self.run(self.make_one(source, **fields))

    async def make_one(self, source: Path | None = None, **fields: Any) -> Cell:
        ours, theirs = socket.socketpair()
        control, their_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        out_r, out_w = os.pipe()
        err_r, err_w = os.pipe()
        fields.setdefault("container_id", new_id("co"))
        try:
            io = ContainerIO(theirs.fileno(), out_w, err_w, their_control.fileno())
            container = await self.runtime.create(ContainerSpec(**fields), io, source)
        except BaseException:
            ours.close()
            control.close()
            linux.close_fds([out_r, err_r])
            raise
        finally:
            theirs.close()
            their_control.close()
            linux.close_fds([out_w, err_w])
        cell = Cell(self, container, ours, control, out_r, err_r)
        self.cells.append(cell)
        return cell

    def close_cells(self) -> None:
        for cell in self.cells:
            cell.close()
        self.cells.clear()

    def close(self) -> None:
        self.close_cells()
        self.run(self.runtime.close())
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()
        shutil.rmtree(self.home)


def make_native(home: Path) -> Runtime:
    # The probe lies beside this file; containers import from where the agent does.
    here = str(Path(__file__).parent)
    if here not in sys.path:
        sys.path.append(here)
    linux.enter_private_mounts()
    return NativeRuntime(home, None, entry=ENTRY)


def make_process(home: Path) -> Runtime:
    here = str(Path(__file__).parent)
    if here not in sys.path:
        sys.path.append(here)
    return ProcessRuntime(home, entry=ENTRY)


@contextmanager
def a_node(make: Callable[[Path], Runtime]) -> Iterator[Node]:
    node = Node(make)
    try:
        yield node
    finally:
        node.close()
