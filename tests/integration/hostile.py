"""Code in a container that uses the runner's own link to ask for what is not its business."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import squall
from squall.exception import Error
from squall.protocol.messages import (
    CreateApp,
    Loaded,
    Message,
    NodeReport,
    OutputItem,
    Outputs,
    Register,
    StartExec,
    StopApp,
    StopContainer,
    encode,
)
from squall.protocol.requests import GetTrace, ListObjects, ReadLogs, StopServer

app = squall.App("hostile")

FORBIDDEN: dict[str, Message] = {
    "making an app": CreateApp("mine"),
    "stopping an app": StopApp("workload"),
    "listing": ListObjects("apps"),
    "ending the server": StopServer(),
    "stopping a container": StopContainer("co-0000000000000000"),
    "a command elsewhere": StartExec("co-0000000000000000", ["true"]),
    "logs": ReadLogs(app="workload"),
    "traces": GetTrace(""),
    "being a node": Register("mine", 64.0, 1 << 20),
    "reporting as a node": NodeReport(),
}


def link() -> Any:
    from squall.client import Client

    return Client.current().link


@app.function()
def ask_for(what: str) -> tuple[str, str]:
    try:
        link().request(FORBIDDEN[what]).wait(10)
    except Error as error:
        return error.code, error.message
    return "", "it was granted"


@app.function()
def forge(call_id: str) -> None:
    for attempt in range(3):
        link().send(Outputs([OutputItem(call_id, 0, "ok", 0, attempt=attempt)]))


@app.function()
def slip() -> None:
    item = OutputItem(squall.current_function_call_id() or "", 0, "ok")
    item.blob = '","status":"ok","x":"'
    link().send(Outputs([item]))


@app.function()
def trail() -> None:
    """Send a large result as it should be, and in the same breath what is no message."""
    result = bytes(100_000)
    item = OutputItem(squall.current_function_call_id() or "", 0, "ok", len(result))
    link().sock.send(encode(Outputs([item]), result) + b"\xff" * 10_000)
    time.sleep(600)


@app.function()
def flood() -> Iterator[int]:
    """Send values of a generator without waiting for anybody to take them."""
    call_id = squall.current_function_call_id() or ""
    link().send(Outputs([OutputItem(call_id, 0, "yield", 0, seq=seq) for seq in range(1000)]))
    time.sleep(600)
    yield 1


@app.function()
def unload() -> str:
    link().send(Loaded(False, message="I never was"))
    return "still here"


@app.function(max_containers=1)
def babble() -> None:
    link().sock.setblocking(True)
    link().sock.sendall(b"\x10\x00\x00\x00\x00\x00\x00\x00this is nonsense")
    time.sleep(600)


@app.function()
def inner(x: int) -> int:
    return x * x


@app.function()
def call_a_function(x: int) -> int:
    return inner.remote(x)
