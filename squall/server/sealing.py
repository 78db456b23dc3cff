"""Seals what the Store may hold but nobody may read from a copy of it: values of secrets, environments of functions.

AES-256-GCM with one key, `$SQUALL_HOME/state/seal.key` (mode 0600, made when first something is sealed) or the setting
`seal_key`. Every box is bound to the identity of its row, so that one copied over another does not open, and names its
key by a fingerprint, so that "another key" and "tampered with" are told apart. Must never make a key in order to open:
a lost key is an error, not a new beginning. Safe to use from any thread. Tested in `tests/unit/test_sealing.py`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import stat
import threading
from pathlib import Path
from typing import Any

from squall.exception import InvalidError, ServiceError

KEY_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16
FINGERPRINT_BYTES = 4
MAGIC = b"sq1"
"""Format of a box: this, the key's fingerprint, the nonce, the ciphertext with its tag."""
HEAD_BYTES = len(MAGIC) + FINGERPRINT_BYTES + NONCE_BYTES
HINT_LOST = "restore the key file from the backup that the database is from; without it, create the secrets again"


class Seal:
    """One key, read when first needed. `row` names what the bytes belong to, such as `secret:main:main:db`."""

    def __init__(self, path: Path, key_text: str = "") -> None:
        self.path = path
        self._text = key_text
        self._lock = threading.Lock()
        self._key: bytes | None = None
        self._cipher: Any = None

    def seal(self, data: bytes, row: str) -> bytes:
        """`data` so that only `open` with the same key and row gets it back. Makes the key when there is none."""
        cipher, fingerprint = self._ready(make=True)
        nonce = os.urandom(NONCE_BYTES)
        return MAGIC + fingerprint + nonce + bytes(cipher.encrypt(nonce, data, row.encode()))

    def open(self, box: bytes, row: str) -> bytes:
        """What was sealed. Raises ServiceError when the key is lost or another, or the box is not as it was made."""
        if len(box) < HEAD_BYTES + TAG_BYTES or not box.startswith(MAGIC):
            raise ServiceError(f"cannot open `{row}`: what the Store holds of it was never sealed or is cut short")
        cipher, fingerprint = self._ready(make=False, row=row)
        made_with = box[len(MAGIC) : len(MAGIC) + FINGERPRINT_BYTES]
        if made_with != fingerprint:
            raise ServiceError(
                f"cannot open `{row}`: it was sealed with the key {made_with.hex()}, "
                f"the key in {self._place} is {fingerprint.hex()}",
                hint=HINT_LOST,
            )
        from cryptography.exceptions import InvalidTag

        try:
            return bytes(cipher.decrypt(box[HEAD_BYTES - NONCE_BYTES : HEAD_BYTES], box[HEAD_BYTES:], row.encode()))
        except InvalidTag:
            raise ServiceError(
                f"cannot open `{row}`: its bytes in the Store were changed, or belong to another row",
                hint="restore the database from a backup; somebody or something wrote into it",
            ) from None

    @property
    def _place(self) -> str:
        return "the setting `seal_key`" if self._text else f"`{self.path}`"

    def _ready(self, *, make: bool, row: str = "") -> tuple[Any, bytes]:
        with self._lock:
            if self._key is None:
                self._key = self._load(make, row)
            if self._cipher is None:
                # Loads OpenSSL's bindings: 40 ms that a server with nothing sealed never spends.
                from cryptography.hazmat.primitives.ciphers.aead import AESGCM

                self._cipher = AESGCM(self._key)
            return self._cipher, _fingerprint(self._key)

    def _load(self, make: bool, row: str) -> bytes:
        if self._text:
            return parse_key(self._text, self._place)
        found = _read_private(self.path)
        if found is None and not make:
            raise ServiceError(f"cannot open `{row}`: there is no key `{self.path}`", hint=HINT_LOST)
        if found is None:
            _create(self.path, os.urandom(KEY_BYTES))
            found = _read_private(self.path)  # that of another server, had it been faster
        return parse_key(found or "", self._place)


def parse_key(text: str, place: str) -> bytes:
    """The 32 bytes that a key file holds in base64. Raises InvalidError, which never shows them."""
    try:
        key = base64.b64decode(text.strip().encode(), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != KEY_BYTES:
        raise InvalidError(
            f"the key in {place} is not {KEY_BYTES} bytes in base64",
            hint="`openssl rand -base64 32` makes one; a file that held one before has to be restored",
        )
    return key


def _fingerprint(key: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=FINGERPRINT_BYTES, person=b"squall-seal").digest()


def _read_private(path: Path) -> str | None:
    """The text of a file that only its owner may read; None when there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InvalidError(f"cannot read the key `{path}`: {error.strerror}") from None
    with open(descriptor, encoding="ascii", errors="replace") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise InvalidError(
                f"the key `{path}` can be read by others: mode {stat.S_IMODE(status.st_mode):o}, owner {status.st_uid}",
                hint=f"`chmod 600 {path}` as its owner, and make a new key if somebody may have seen this one",
            )
        return file.read(1024)


def _create(path: Path, key: bytes) -> None:
    """Write a new key, whole and on disk before anything is sealed with it; keeps one that is there already."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(base64.b64encode(key) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(partial, path)  # not a rename: that would replace the key that another thread has just made
        except FileExistsError:
            pass
    finally:
        partial.unlink(missing_ok=True)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
