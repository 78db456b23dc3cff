"""Source bundles on the node: fetched by digest, unpacked once, mounted read-only into many containers.

A bundle is a tar made by the SDK, and hostile until unpacked: every name is checked, only regular files and
directories are written, fd-relative below a fresh directory, within limits. A bundle becomes visible by one rename,
and goes the same way when it was not used for long.
Tested in `tests/unit/test_sources.py`.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import secrets
import shutil
import tarfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from squall.exception import ConflictError, InvalidError, ResourceExhaustedError
from squall.protocol.messages import GetBlob, Message, Reply
from squall.storage.blobs import check_digest

MAX_BYTES = 512 << 20
MAX_ENTRIES = 100_000
MAX_PARTS = 1000
MAX_DEPTH = 100
"""Directories above a file: what deletes bundles again goes down into each."""
UNUSED_SECONDS = 7 * 86400.0
"""After this long without a container that asks for it, a bundle is deleted at the next start."""
Request = Callable[[Message], Awaitable[tuple[Reply, bytes]]]


class Sources:
    def __init__(self, root: Path, request: Request) -> None:
        self.root = root
        self._request = request
        self._running: dict[str, asyncio.Future[Path]] = {}

    async def get(self, digest: str, parts: Sequence[str] = ()) -> Path:
        """The directory of a bundle, of `parts` where it has several; fetched and unpacked by whoever asks first."""
        target = self.root / check_digest(digest)
        if target.is_dir():
            os.utime(target)  # `set_unused_aside` counts from here
            return target
        running = self._running.get(digest)
        if running is None:
            running = self._running[digest] = asyncio.ensure_future(self._fetch(digest, parts, target))
            running.add_done_callback(lambda _: self._running.pop(digest, None))
        return await asyncio.shield(running)

    def set_unused_aside(self) -> list[Path]:
        """Take out of sight what no container has asked for in a while, and what an unpacking that broke off left.

        Only for an agent that starts and has its home for itself: containers use bundles as long as they live.
        """
        found: list[Path] = []
        oldest = time.time() - UNUSED_SECONDS
        for path in list(self.root.iterdir()) if self.root.is_dir() else []:
            if path.name.startswith("."):
                found.append(path)
            elif path.stat().st_mtime < oldest:
                found.append(path.rename(self.root / f".{secrets.token_hex(8)}"))
        return found

    async def remove(self, paths: list[Path]) -> None:
        """Delete what was set aside."""
        loop = asyncio.get_running_loop()
        for path in paths:
            await loop.run_in_executor(None, shutil.rmtree, path, True)

    async def _fetch(self, digest: str, parts: Sequence[str], target: Path) -> Path:
        if parts and (len(parts) > MAX_PARTS or _digest_of("\n".join(parts).encode()) != digest):
            raise InvalidError(f"source bundle `{digest}` is not what its {len(parts)} parts make")
        tars: list[bytes] = []
        for part in parts or [digest]:
            tars.append(await self.read(part))
            if sum(map(len, tars)) > MAX_BYTES:
                raise ResourceExhaustedError(f"source bundle `{digest}` is larger than {MAX_BYTES} bytes")
        if sum(map(len, tars)) < 1 << 16:
            self._unpack(tars, target)
        else:
            await asyncio.get_running_loop().run_in_executor(None, self._unpack, tars, target)
        return target

    async def read(self, digest: str) -> bytes:
        """The bytes of a blob, checked against its digest."""
        data = bytearray()
        while True:
            reply, chunk = await self._request(GetBlob(digest, len(data)))
            data += chunk
            if len(data) >= int(reply.data["size"]) or not chunk:
                break
            if len(data) > MAX_BYTES:
                raise ResourceExhaustedError(f"source bundle `{digest}` is larger than {MAX_BYTES} bytes")
        if _digest_of(data) != digest:
            await self._request(GetBlob(digest, suspect=True))  # raises when it is the server's copy that is damaged
            raise ConflictError(f"source bundle `{digest}` arrived with other bytes than its digest names")
        return bytes(data)

    def _unpack(self, tars: list[bytes], target: Path) -> None:
        self.root.mkdir(parents=True, exist_ok=True, mode=0o711)
        partial = self.root / f".{secrets.token_hex(8)}"
        partial.mkdir(mode=0o755)
        try:
            unpack(tars, partial)
            partial.rename(target)
        except OSError:
            if not target.is_dir():
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _digest_of(data: bytes | bytearray) -> str:
    return hashlib.blake2b(data, digest_size=32).hexdigest()


def unpack(tars: Sequence[bytes], target: Path) -> None:
    """Write a bundle's files below `target`. Raises InvalidError on anything a bundle may not hold."""
    try:
        _unpack_members(tars, target)
    except tarfile.TarError as error:
        raise InvalidError(f"source bundle is no archive: {error}") from None


def _unpack_members(tars: Sequence[bytes], target: Path) -> None:
    total = count = 0
    for data in tars:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for member in archive:
                count += 1
                total += max(0, member.size)
                if count > MAX_ENTRIES or total > MAX_BYTES:
                    raise ResourceExhaustedError(
                        f"source bundle has more than {MAX_ENTRIES} files or {MAX_BYTES} bytes"
                    )
                _unpack_one(archive, member, target)


def _unpack_one(archive: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    path = target.joinpath(*_safe_parts(member.name))
    if member.isdir():
        path.mkdir(parents=True, exist_ok=True, mode=0o755)
    elif member.isreg():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        _write(archive, member, path)
    else:
        raise InvalidError(f"source bundle holds `{member.name}`, which is neither a file nor a directory")


def _safe_parts(name: str) -> list[str]:
    parts = name.split("/")
    unsafe = any(part in ("", ".", "..") or "\0" in part for part in parts)
    if not name or name.startswith("/") or len(parts) > MAX_DEPTH or unsafe:
        raise InvalidError(f"source bundle holds the unsafe name `{name!r:.200}`")
    return parts


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    source = archive.extractfile(member)
    assert source is not None
    # O_EXCL and O_NOFOLLOW: nothing in the fresh directory is a link, and a name may not come twice.
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with os.fdopen(fd, "wb") as file:
        shutil.copyfileobj(source, file)
    os.chmod(path, 0o755 if member.mode & 0o100 else 0o644)
