"""What one connection may have under way."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from squall.exception import ResourceExhaustedError
from squall.protocol.messages import Ping
from squall.server import api as api_module
from squall.server.api import Api, Peer


def test_a_connection_has_only_so_many_requests_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_module, "TASK_LIMIT", 3)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        api = cast(Api, SimpleNamespace(loop=loop, _run=lambda peer, message, body: body(peer, message)))
        peer: Any = SimpleNamespace(tasks=set())
        ended = asyncio.Event()
        for _ in range(3):
            Api.run_slowly(api, cast(Peer, peer), Ping(), lambda *_: ended.wait())
        with pytest.raises(ResourceExhaustedError, match="3 requests"):
            Api.run_slowly(api, cast(Peer, peer), Ping(), lambda *_: ended.wait())
        ended.set()
        await asyncio.gather(*peer.tasks)
        await asyncio.sleep(0)
        assert not peer.tasks

    asyncio.run(main())
