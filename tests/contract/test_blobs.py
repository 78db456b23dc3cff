"""What every BlobStore promises."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from squall.exception import ConflictError, InvalidError, NotFoundError, ResourceExhaustedError
from squall.storage.blobs import BlobStore, DirectoryBlobs, digest_of


@pytest.fixture(params=["directory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    return DirectoryBlobs(tmp_path / "blobs")


def test_what_was_put_is_read_back(store: BlobStore) -> None:
    digest = store.put(b"some bytes")
    assert (store.read(digest), store.size(digest), store.has(digest)) == (b"some bytes", 10, True)
    assert store.read(digest, 5, 3) == b"byt"
    assert store.examine(digest)


def test_putting_the_same_bytes_twice_is_harmless(store: BlobStore) -> None:
    assert store.put(b"x") == store.put(b"x")


def test_a_missing_blob_is_not_found(store: BlobStore) -> None:
    with pytest.raises(NotFoundError):
        store.read(digest_of(b"never put"))


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", "A" * 64, "a" * 63, "a" * 65, "a" * 32 + "/" + "a" * 31])
def test_a_digest_that_is_none_is_refused(store: BlobStore, digest: str) -> None:
    with pytest.raises(InvalidError):
        store.has(digest)


def test_an_upload_is_invisible_until_sealed(store: BlobStore) -> None:
    digest = digest_of(b"abcdef")
    upload = store.begin(digest)
    upload.write(0, b"abc")
    assert not store.has(digest)
    upload.write(3, b"def")
    upload.seal()
    assert store.read(digest) == b"abcdef"


def test_bytes_with_another_digest_are_refused(store: BlobStore) -> None:
    digest = digest_of(b"promised")
    upload = store.begin(digest)
    upload.write(0, b"delivered")
    with pytest.raises(ConflictError):
        upload.seal()
    assert not store.has(digest)


def test_a_gap_in_an_upload_is_refused(store: BlobStore) -> None:
    upload = store.begin(digest_of(b"x"))
    with pytest.raises(ConflictError):
        upload.write(10, b"x")
    upload.abandon()


def test_uploads_leave_room_on_the_disk_and_harm_nothing_that_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DirectoryBlobs(tmp_path)
    digest, late = store.put(b"stored before"), digest_of(b"too late")
    upload = store.begin(late)
    for blocks, free in ((1 << 20, (1 << 18) - 1), (1 << 40, 1 << 33)):  # of 4 KiB: less than 1 GiB, less than 1 %
        disk = SimpleNamespace(f_frsize=4096, f_blocks=blocks, f_bavail=free)
        monkeypatch.setattr("squall.storage.blobs.os.statvfs", lambda _, disk=disk: disk)
        with pytest.raises(ResourceExhaustedError, match="disk of the server is nearly full") as refused:
            store.begin(digest_of(b"more"))
        assert "free some space" in refused.value.hint
        with pytest.raises(ResourceExhaustedError):
            upload.write(0, b"too late")
    upload.abandon()
    assert store.put(b"stored before") == digest
    assert store.examine(digest)
    assert list(store.incoming.iterdir()) == []
    monkeypatch.undo()
    assert store.put(b"too late") == late


def test_deleting_is_idempotent(store: BlobStore) -> None:
    digest = store.put(b"x")
    store.delete(digest)
    store.delete(digest)
    assert not store.has(digest)


@pytest.mark.parametrize("damage", [b"preciouS", b"prec", b""], ids=["flipped", "truncated", "empty"])
def test_damaged_blob_is_noticed_put_aside_and_can_be_put_again(tmp_path: Path, damage: bytes) -> None:
    store = DirectoryBlobs(tmp_path)
    digest = store.put(b"precious")
    store._path(digest).write_bytes(damage)
    assert store.has(digest) == bool(damage), "an empty file is what a power cut leaves"
    assert not store.examine(digest)
    assert not store.has(digest)
    assert [path.read_bytes() for path in store.damaged.iterdir()] == [damage]
    with pytest.raises(NotFoundError):
        store.examine(digest)
    assert store.put(b"precious") == digest
    assert store.read(digest) == b"precious"


def test_blob_that_the_disk_does_not_give_is_put_aside(tmp_path: Path) -> None:
    store = DirectoryBlobs(tmp_path)
    digest = store.put(b"precious")
    store._path(digest).unlink()
    store._path(digest).symlink_to("/proc/self/mem")  # whose first page gives EIO to whoever reads it
    with pytest.raises(OSError, match="Input/output error"):
        store.read(digest)
    assert not store.examine(digest)
    assert not store.has(digest)


def test_empty_blob_is_one(store: BlobStore) -> None:
    digest = store.put(b"")
    assert store.has(digest) and store.examine(digest)


def test_blob_that_somebody_was_told_is_there_is_not_pruned(tmp_path: Path) -> None:
    """However the two meet: the one asks again and again, the other deletes all that nobody asked for."""
    store = DirectoryBlobs(tmp_path)
    digest = store.put(b"wanted")
    path = store._path(digest)
    ended = threading.Event()

    def prune() -> None:
        while not ended.is_set():
            store.prune(1000.0)

    pruner = threading.Thread(target=prune)
    pruner.start()
    try:
        for _ in range(2000):
            with contextlib.suppress(FileNotFoundError):
                os.utime(path, (1, 1))  # long ago
            assert not store.has(digest) or path.exists()
            store.put(b"wanted")
    finally:
        ended.set()
        pruner.join()


def test_what_an_interrupted_upload_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    store = DirectoryBlobs(tmp_path)
    (store.incoming / "0123.abcd").write_bytes(b"half")
    DirectoryBlobs(tmp_path)
    assert list(store.incoming.iterdir()) == []
