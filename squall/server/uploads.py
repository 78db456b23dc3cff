"""HAND: blobs on their way in: chunk after chunk over one connection, or over several where one breaks.

What has arrived of an upload whose connection ended is set aside for some time, in the workspace it belongs to. Whoever
asks there whether the blob is missing is told how much of it is there, and goes on after that. Nothing of it is
trusted: the digest is looked at when the last chunk has come. Tested in `tests/unit/test_uploads.py` and
`tests/faults/test_slow.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from squall.exception import InvalidError, ResourceExhaustedError, ServiceError
from squall.protocol.messages import PutBlob
from squall.storage.blobs import BlobStore, Upload, check_digest

if TYPE_CHECKING:
    from squall.server.api import Peer

UPLOAD_LIMIT = 64
"""Blobs one connection may be uploading at once."""
UPLOAD_LIMIT_BYTES = 16 << 30
"""What they may come to, as far as it has arrived and they are not yet whole."""
ASIDE_LIMIT = 64
ASIDE_LIMIT_BYTES = 16 << 30
ASIDE_SECONDS = 900.0
"""How long a part waits for the rest."""

Place = tuple[str, str]
"""Workspace and digest."""


class Uploads:
    def __init__(self, loop: asyncio.AbstractEventLoop, blobs: BlobStore) -> None:
        self.loop = loop
        self.blobs = blobs
        self._aside: dict[Place, tuple[Upload, asyncio.TimerHandle]] = {}

    def put(self, peer: Peer, message: PutBlob, payload: bytes, told: Callable[[BaseException | None], None]) -> None:
        """Take a chunk; `told` is called when it, or with the last one the whole, is there. Raises what speaks against
        it."""
        digest = check_digest(message.digest)
        upload = self._begun(peer, digest, message.offset)
        try:
            write_chunk(peer, upload, message.offset, payload)
        except BaseException:  # whatever it was, the rest cannot follow: give its space back at once
            peer.uploads.pop(digest).abandon()
            raise
        if not message.last:
            told(None)
            return
        del peer.uploads[digest]
        # In a thread: a sync of much to a slow disk would have everybody wait for seconds.
        sealing = self.loop.run_in_executor(None, upload.seal)
        sealing.add_done_callback(lambda done: told(done.exception()))

    def _begun(self, peer: Peer, digest: str, offset: int) -> Upload:
        """The upload that a chunk belongs to: one that begins, goes on, or goes on where another connection broke."""
        upload = peer.uploads.get(digest)
        if upload is not None and offset:
            return upload
        if upload is None and len(peer.uploads) >= UPLOAD_LIMIT:
            raise ServiceError(f"{UPLOAD_LIMIT} blobs are being uploaded on this connection already")
        if offset:
            found = self._aside.get((peer.scope.workspace, digest))
            if found is None or found[0].size != offset:
                raise InvalidError(f"blob `{digest}`: a chunk at {offset} without a beginning")
            peer.uploads[digest] = self._take((peer.scope.workspace, digest))
            return peer.uploads[digest]
        if upload is not None:
            upload.abandon()
        self._drop((peer.scope.workspace, digest))
        peer.uploads[digest] = self.blobs.begin(digest)
        return peer.uploads[digest]

    def parts(self, peer: Peer, missing: list[str]) -> dict[str, int]:
        """How much there is of blobs that are missing."""
        found = ((digest, self._aside.get((peer.scope.workspace, digest))) for digest in missing)
        return {digest: entry[0].size for digest, entry in found if entry is not None}

    def set_aside(self, peer: Peer) -> None:
        """Its connection has ended; it, or another of its workspace, may bring the rest."""
        for digest, upload in peer.uploads.items():
            place = (peer.scope.workspace, digest)
            if not upload.size or place in self._aside:
                upload.abandon()
                continue
            timer = self.loop.call_later(ASIDE_SECONDS, self._drop, place)
            self._aside[place] = (upload, timer)
        peer.uploads.clear()
        while len(self._aside) > ASIDE_LIMIT or sum(one.size for one, _ in self._aside.values()) > ASIDE_LIMIT_BYTES:
            self._drop(next(iter(self._aside)))

    def _take(self, place: Place) -> Upload:
        upload, timer = self._aside.pop(place)
        timer.cancel()
        return upload

    def _drop(self, place: Place) -> None:
        if place in self._aside:
            self._take(place).abandon()

    def close(self) -> None:
        """The server ends."""
        for place in list(self._aside):
            self._drop(place)


def write_chunk(peer: Peer, upload: Upload, offset: int, payload: bytes) -> None:
    """Take one more chunk, within what a connection may have under way. Raises ResourceExhaustedError."""
    if sum(other.size for other in peer.uploads.values()) + len(payload) > UPLOAD_LIMIT_BYTES:
        raise ResourceExhaustedError(
            f"more than {UPLOAD_LIMIT_BYTES >> 30} GiB are being uploaded on this connection at once",
            hint="let some uploads end before others begin",
        )
    upload.write(offset, payload)
