"""Sealing: what was sealed opens with the same key and row, and with nothing else."""

from __future__ import annotations

import base64
import os
import stat
import threading
from pathlib import Path

import pytest

from squall.exception import InvalidError, ServiceError
from squall.server.sealing import HEAD_BYTES, Seal

ROW = "secret:main:main:db"
KEY = base64.b64encode(b"k" * 32).decode()


@pytest.fixture
def seal(tmp_path: Path) -> Seal:
    return Seal(tmp_path / "seal.key")


def test_what_was_sealed_opens_again_also_in_a_later_process(seal: Seal) -> None:
    box = seal.seal(b"PASSWORD=x", ROW)
    assert b"PASSWORD" not in box
    assert seal.open(box, ROW) == Seal(seal.path).open(box, ROW) == b"PASSWORD=x"


def test_the_same_bytes_sealed_twice_differ(seal: Seal) -> None:
    assert seal.seal(b"x", ROW) != seal.seal(b"x", ROW)


def test_the_key_is_made_once_and_readable_by_its_owner_only(seal: Seal) -> None:
    seal.seal(b"", ROW)
    first = seal.path.read_bytes()
    Seal(seal.path).seal(b"", ROW)
    assert seal.path.read_bytes() == first
    assert stat.S_IMODE(seal.path.stat().st_mode) == 0o600
    assert [path.name for path in seal.path.parent.iterdir()] == ["seal.key"]


@pytest.mark.parametrize("position", [0, 4, 9, HEAD_BYTES, -1])
def test_a_box_with_one_bit_changed_does_not_open(seal: Seal, position: int) -> None:
    box = bytearray(seal.seal(b"value", ROW))
    box[position] ^= 1
    with pytest.raises(ServiceError, match=r"cannot open `secret:main:main:db`"):
        seal.open(bytes(box), ROW)


def test_a_box_cut_short_does_not_open(seal: Seal) -> None:
    box = seal.seal(b"value", ROW)
    for length in range(len(box)):
        with pytest.raises(ServiceError, match="cannot open"):
            seal.open(box[:length], ROW)


def test_a_box_of_another_row_does_not_open(seal: Seal) -> None:
    box = seal.seal(b"value", "secret:other:main:db")
    with pytest.raises(ServiceError, match="belong to another row"):
        seal.open(box, ROW)


def test_a_box_of_another_key_names_both_keys(seal: Seal, tmp_path: Path) -> None:
    box = Seal(tmp_path / "other.key").seal(b"value", ROW)
    seal.seal(b"", ROW)
    with pytest.raises(ServiceError, match=r"sealed with the key [0-9a-f]{8}, the key in .* is [0-9a-f]{8}") as caught:
        seal.open(box, ROW)
    assert "backup" in caught.value.hint


def test_a_lost_key_is_an_error_and_no_new_key_is_made(seal: Seal) -> None:
    box = seal.seal(b"value", ROW)
    seal.path.unlink()
    with pytest.raises(ServiceError, match="there is no key") as caught:
        Seal(seal.path).open(box, ROW)
    assert "backup" in caught.value.hint
    assert not seal.path.exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_key_that_others_may_read_is_refused(seal: Seal, mode: int) -> None:
    seal.seal(b"", ROW)
    seal.path.chmod(mode)
    with pytest.raises(InvalidError, match="can be read by others") as caught:
        Seal(seal.path).seal(b"", ROW)
    assert "chmod 600" in caught.value.hint


def test_a_key_behind_a_link_is_refused(seal: Seal, tmp_path: Path) -> None:
    (tmp_path / "real").write_text(KEY)
    seal.path.symlink_to(tmp_path / "real")
    with pytest.raises(InvalidError, match="cannot read the key"):
        seal.seal(b"", ROW)


@pytest.mark.parametrize("text", ["", "short", base64.b64encode(b"x" * 31).decode(), "ü" * 44])
def test_a_key_file_that_holds_no_key_is_refused_and_kept(seal: Seal, text: str) -> None:
    seal.path.write_text(text)
    seal.path.chmod(0o600)
    with pytest.raises(InvalidError, match="not 32 bytes in base64"):
        seal.seal(b"", ROW)
    assert seal.path.read_text() == text


def test_a_key_from_the_settings_needs_no_file_and_is_never_shown(tmp_path: Path) -> None:
    seal = Seal(tmp_path / "seal.key", KEY)
    assert seal.open(seal.seal(b"value", ROW), ROW) == b"value"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InvalidError) as caught:
        Seal(tmp_path / "seal.key", KEY[:-4]).seal(b"", ROW)
    assert KEY[:-4] not in str(caught.value)


def test_threads_that_seal_at_once_agree_on_one_key(tmp_path: Path) -> None:
    boxes: list[bytes] = []
    seals = [Seal(tmp_path / "seal.key") for _ in range(8)]
    threads = [threading.Thread(target=lambda s=s: boxes.append(s.seal(b"v", ROW))) for s in seals]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert [Seal(tmp_path / "seal.key").open(box, ROW) for box in boxes] == [b"v"] * 8
    assert os.listdir(tmp_path) == ["seal.key"]
