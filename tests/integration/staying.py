"""A server of `squall up` for tests, and clients that come to it from elsewhere."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from squall import config
from squall.client import Client
from squall.protocol.messages import Message
from squall.protocol.requests import CreateToken
from tests.integration.conftest import swap_client

UP_SECONDS = 60.0


def squall(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "squall.cli", *words],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=UP_SECONDS,
        check=False,
    )


def up(*words: str, **env: str) -> str:
    """Start a server of this home that stays; its URL."""
    done = squall("up", "--detach", "--listen", "127.0.0.1:0", *words, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def ask(client: Client, message: Message, payload: bytes = b"") -> dict[str, Any]:
    reply, _ = client.link.request(message, payload).wait(30)
    return reply.data


def here() -> Client:
    """A client on the machine's own socket."""
    return Client.connect(autostart=False)


def new_token(**fields: Any) -> dict[str, Any]:
    client = here()
    try:
        return ask(client, CreateToken(**fields))
    finally:
        client.close()


def settings(url: str, token: dict[str, Any], **more: Any) -> config.Config:
    return config.Config(
        home=config.load().home, server=url, token_id=token["token_id"], token_secret=token["secret"], **more
    )


@contextlib.contextmanager
def client_of(url: str, token: dict[str, Any], **more: Any) -> Iterator[Client]:
    """The process's client comes from elsewhere, with this token, while the block lasts."""
    client = Client.connect(config=settings(url, token, **more))
    before = swap_client(client)
    try:
        yield client
    finally:
        swap_client(before)
        client.close()


def server_log(home: Path) -> str:
    return (home / "state" / "server.log").read_text()


def as_json(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
