"""A slow and narrow way to the server: 200 ms each way, 1 Mbit/s. Nothing is tuned to a quick one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from squall import Function
from squall.client import Client, blob_digest
from squall.protocol.messages import PutBlob
from tests.conftest import wait_until
from tests.integration import durable, workload
from tests.integration.staying import client_of, new_token, up
from tests.integration.support import Kept, Outcome
from tests.relay import Relay, relay

pytestmark = pytest.mark.root

DELAY_S = 0.2
RATE = 125_000
CHUNK = 1 << 20


@pytest.fixture
def slow(home: Path) -> Iterator[Relay]:
    url = up(SQUALL_HEARTBEAT="1")
    with relay(("127.0.0.1", int(url.rpartition(":")[2]))) as between:
        between.delay, between.rate = DELAY_S, RATE
        with client_of(between.url, new_token()):
            yield between


def test_apps_are_deployed_and_called_over_a_slow_connection(slow: Relay) -> None:
    durable.app.deploy()
    assert Function.from_name("durable", "step").remote(0.0, 1) == 1
    with workload.app.run(output=Kept()):
        assert list(workload.square.map(range(200))) == [n * n for n in range(200)]
        assert workload.square.spawn(5).get(timeout=60) == 25
        assert len(workload.echo.remote(bytes(100_000))) == 100_000
        with pytest.raises(ValueError, match="no luck"):
            workload.fail.remote("no luck")


def test_a_large_upload_goes_on_where_its_connection_broke(slow: Relay) -> None:
    """And calls beside it need not wait for its end."""
    with workload.app.run(output=Kept()):
        assert workload.square.remote(2) == 4
        slow.rate *= 4
        size, before = 5 * CHUNK // 2, slow.carried["up"]
        data = os.urandom(size)
        call = Outcome(lambda: workload.count_bytes.remote(data))
        wait_until(lambda: slow.carried["up"] - before > CHUNK * 1.3, "more than a chunk is there", 120)
        slow.cut()
        assert call.result(120) == size
        assert slow.broken == 1
        assert slow.carried["up"] - before < size + 1.2 * CHUNK, "it began anew"


def test_an_upload_before_there_is_any_app_goes_on_too(slow: Relay) -> None:
    slow.rate = 0.0
    data, before = os.urandom(20 * CHUNK), slow.carried["up"]
    client = Client.current()
    upload = Outcome(lambda: client.put_blob(data))
    wait_until(lambda: slow.carried["up"] - before > 8 * CHUNK, "it is under way", 120)
    slow.cut()
    digest = upload.result(120)
    assert len(client.get_blob(digest)) == len(data)
    assert slow.carried["up"] - before < 36 * CHUNK


def test_what_was_set_aside_is_not_believed(slow: Relay) -> None:
    """Somebody else of the workspace began an upload under our digest with other bytes."""
    slow.rate = slow.delay = 0.0
    data = os.urandom(3 * CHUNK)
    digest = blob_digest(data)
    with workload.app.run(output=Kept()):
        client = Client.current()
        client.link.request(PutBlob(digest, 0, last=False), bytes(CHUNK)).wait(30)
        slow.cut()
        wait_until(lambda: client.link.epoch, "it is back")
        assert client.put_blob(data) == digest
        assert client.get_blob(digest) == data
