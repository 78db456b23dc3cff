"""Content-addressed bytes: the BlobStore seam and its simplest implementation, a directory.

A blob is named by the blake2b-256 digest of its bytes (in the standard library, so that a container can check it
with nothing installed). A blob is visible whole or not at all: bytes go to a temporary file, are checked, synced and
renamed. A reader checks nothing more than the size recorded by the file system; whoever gets other bytes than the
digest names says so, and `examine` then puts the blob aside, so that it is missing and can be sent again.
The contract suite is `tests/contract/test_blobs.py`.
"""

from __future__ import annotations

import abc
import contextlib
import hashlib
import os
import re
import secrets
import threading
from collections.abc import Set
from pathlib import Path

from squall.exception import ConflictError, InvalidError, NotFoundError, ResourceExhaustedError

DIGEST = re.compile(r"[0-9a-f]{64}")
MAX_BLOB_BYTES = 4 << 30
CHUNK_BYTES = 1 << 20
KEEP_FREE_BYTES = 1 << 30
KEEP_FREE_SHARE = 0.01
"""Room on the disk, and share of it, that uploads leave to what must go on: the database, logs, containers."""


def digest_of(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=32).hexdigest()


EMPTY = digest_of(b"")


def check_digest(digest: str) -> str:
    """A digest from outside becomes part of a path, so it is exactly 64 hex digits or refused."""
    if not DIGEST.fullmatch(digest):
        raise InvalidError(f"`{digest[:80]}` is not a blob digest")
    return digest


class Upload(abc.ABC):
    """A blob on its way in, chunk after chunk."""

    size: int

    @abc.abstractmethod
    def write(self, offset: int, data: bytes) -> None: ...

    @abc.abstractmethod
    def seal(self) -> None:
        """Make it visible. Raises ConflictError when the bytes are not those the digest names."""

    @abc.abstractmethod
    def abandon(self) -> None: ...


class BlobStore(abc.ABC):
    @abc.abstractmethod
    def has(self, digest: str) -> bool: ...

    @abc.abstractmethod
    def size(self, digest: str) -> int:
        """Raises NotFoundError."""

    @abc.abstractmethod
    def read(self, digest: str, offset: int = 0, size: int = -1) -> bytes:
        """Up to `size` bytes from `offset`. Raises NotFoundError."""

    @abc.abstractmethod
    def begin(self, digest: str) -> Upload:
        """Raises ResourceExhaustedError when there is no room for more."""

    @abc.abstractmethod
    def examine(self, digest: str) -> bool:
        """Whether the stored bytes are those that the digest names. If not, they are put aside and the blob is missing
        from now on. Reads all of it. Raises NotFoundError."""

    @abc.abstractmethod
    def delete(self, digest: str) -> None:
        """Idempotent."""

    def put(self, data: bytes) -> str:
        digest = digest_of(data)
        if not self.has(digest):
            upload = self.begin(digest)
            upload.write(0, data)
            upload.seal()
        return digest


class DirectoryBlobs(BlobStore):
    """Blobs as files under `root/ab/abcdef…`, mode 0600 in 0700 directories."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.incoming = root / "incoming"
        self.incoming.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.damaged = root / "damaged"
        self._using = threading.Lock()
        """Between looking at when a blob was wanted last, and deleting it, nobody may be told that it is there."""
        for leftover in self.incoming.iterdir():
            leftover.unlink(missing_ok=True)

    def _path(self, digest: str) -> Path:
        return self.root / check_digest(digest)[:2] / digest

    def has(self, digest: str) -> bool:
        path = self._path(digest)
        try:
            with self._using:
                os.utime(path)  # it is wanted: `prune` counts from here
                # What a power cut leaves of a file whose bytes had not reached the disk is an empty one.
                return path.stat().st_size > 0 or digest == EMPTY
        except FileNotFoundError:
            return False

    def prune(self, older_than: float, keep: Set[str] = frozenset()) -> None:
        """Delete what nobody stored or asked for since that moment (seconds of the wall clock), but for `keep`."""
        for path in (*self.root.glob("[0-9a-f][0-9a-f]/*"), *self.damaged.glob("*")):
            with contextlib.suppress(FileNotFoundError), self._using:
                if path.stat().st_mtime < older_than and path.name not in keep:
                    path.unlink()

    def size(self, digest: str) -> int:
        try:
            return self._path(digest).stat().st_size
        except FileNotFoundError:
            raise NotFoundError(f"no blob `{digest}`") from None

    def read(self, digest: str, offset: int = 0, size: int = -1) -> bytes:
        try:
            with self._path(digest).open("rb") as file:
                file.seek(offset)
                return file.read(size)
        except FileNotFoundError:
            raise NotFoundError(f"no blob `{digest}`") from None

    def check_room(self) -> None:
        disk = os.statvfs(self.root)
        if disk.f_bavail * disk.f_frsize < max(KEEP_FREE_BYTES, KEEP_FREE_SHARE * disk.f_blocks * disk.f_frsize):
            raise ResourceExhaustedError(
                "store bytes on the server: the disk of the server is nearly full",
                hint=f"free some space on the disk that holds `{self.root}`, then try again",
            )

    def begin(self, digest: str) -> Upload:
        self.check_room()
        return _FileUpload(self, check_digest(digest))

    def examine(self, digest: str) -> bool:
        path = self._path(digest)
        hash_ = hashlib.blake2b(digest_size=32)
        try:
            with path.open("rb", buffering=0) as file:
                while data := file.read(CHUNK_BYTES):
                    hash_.update(data)
        except FileNotFoundError:
            raise NotFoundError(f"no blob `{digest}`") from None
        except OSError:  # what the disk does not give is as good as damaged
            hash_ = hashlib.blake2b()
        if hash_.hexdigest() == digest:
            return True
        self.damaged.mkdir(mode=0o700, exist_ok=True)
        path.rename(self.damaged / f"{digest}.{secrets.token_hex(4)}")
        return False

    def delete(self, digest: str) -> None:
        self._path(digest).unlink(missing_ok=True)


class _FileUpload(Upload):
    def __init__(self, store: DirectoryBlobs, digest: str) -> None:
        self.store = store
        self.digest = digest
        self.size = 0
        self._hash = hashlib.blake2b(digest_size=32)
        self._path = store.incoming / f"{digest}.{secrets.token_hex(4)}"
        self._file = self._path.open("xb", buffering=0)
        os.chmod(self._path, 0o600)

    def write(self, offset: int, data: bytes) -> None:
        if offset != self.size:
            raise ConflictError(f"blob `{self.digest}`: chunk at {offset}, expected {self.size}")
        if self.size + len(data) > MAX_BLOB_BYTES:
            raise ResourceExhaustedError(f"blob `{self.digest}` is larger than {MAX_BLOB_BYTES} bytes")
        self.store.check_room()  # others write there too
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        self._hash.update(data)
        self.size += len(data)

    def seal(self) -> None:
        if self._hash.hexdigest() != self.digest:
            self.abandon()
            raise ConflictError(f"blob `{self.digest}`: the bytes received have another digest")
        os.fsync(self._file.fileno())
        self._file.close()
        target = self.store._path(self.digest)
        is_new = not target.parent.is_dir()
        target.parent.mkdir(mode=0o700, exist_ok=True)
        self._path.rename(target)
        _sync(target.parent)
        if is_new:
            _sync(self.store.root)

    def abandon(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        self._path.unlink(missing_ok=True)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
