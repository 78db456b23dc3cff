"""What a connection may have under way of uploads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from squall.exception import ResourceExhaustedError
from squall.server.uploads import UPLOAD_LIMIT_BYTES, write_chunk
from squall.storage.blobs import DirectoryBlobs, digest_of


def test_uploads_of_a_connection_are_bounded_together(tmp_path: Path) -> None:
    upload = DirectoryBlobs(tmp_path).begin(digest_of(b"abcdef"))
    others = SimpleNamespace(size=UPLOAD_LIMIT_BYTES - 3)
    peer: Any = SimpleNamespace(uploads={"others": others, "mine": upload})
    write_chunk(peer, upload, 0, b"abc")
    with pytest.raises(ResourceExhaustedError, match="more than 16 GiB are being uploaded"):
        write_chunk(peer, upload, 3, b"def")
    assert upload.size == 3
    del peer.uploads["others"]
    write_chunk(peer, upload, 3, b"def")
    upload.seal()
