"""Bytes on the server's disk that are not what they were: told of, never used, and sent again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from squall import FunctionCall
from squall.client import blob_digest
from squall.exception import Error, ServiceError
from squall.protocol.payload import pack_call
from tests.integration import workload
from tests.integration.support import Kept

pytestmark = pytest.mark.root

SIZE = 3 << 20


@pytest.fixture(autouse=True)
def app(home: Path) -> Iterator[None]:
    with workload.app.run(output=Kept()):
        yield


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[SIZE // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: SIZE // 2])


def fail_to_read(path: Path) -> None:
    path.unlink()
    path.symlink_to("/proc/self/mem")  # its first page gives EIO


DAMAGES: list[Callable[[Path], None]] = [flip, truncate]


def stored(home: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (home / "blobs").glob("[0-9a-f][0-9a-f]/*")}


@pytest.mark.parametrize("damage", [*DAMAGES, fail_to_read])
def test_damaged_result_is_told_of_and_never_given(home: Path, damage: Callable[[Path], None]) -> None:
    call = workload.echo.spawn(bytes(SIZE))
    assert len(call.get(timeout=30)) == SIZE
    for path, data in stored(home).items():
        if len(data) > SIZE:
            damage(path)
    for _ in range(2):
        with pytest.raises(Error, match=r"damaged on the disk of the server|no blob"):
            FunctionCall.from_id(call.object_id).get(timeout=30)
    assert workload.square.remote(3) == 9


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_argument_fails_its_call_and_is_sent_again_with_the_next(
    home: Path, damage: Callable[[Path], None]
) -> None:
    data = bytes(SIZE)
    assert workload.count_bytes.remote(data) == SIZE
    digest = blob_digest(pack_call((data,), {}, "count_bytes"))
    path = home / "blobs" / digest[:2] / digest
    assert path.stat().st_size > SIZE
    damage(path)
    with pytest.raises(ServiceError, match="damaged on the disk of the server"):
        workload.count_bytes.remote(data)
    assert workload.count_bytes.remote(data) == SIZE
