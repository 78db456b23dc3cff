"""Source bundles: what is honest is unpacked as it was, what is hostile is refused and leaves nothing."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import tarfile
from pathlib import Path

import pytest

from squall.exception import ConflictError, Error, InvalidError
from squall.node.sources import Sources, unpack
from squall.protocol.messages import GetBlob, Message, Reply


def bundle(*members: tuple[str, bytes | tarfile.TarInfo]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


class Server:
    """Answers GetBlob with what it was given, and counts."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.asked = 0

    async def __call__(self, message: Message) -> tuple[Reply, bytes]:
        assert isinstance(message, GetBlob)
        self.asked += 1
        return Reply({"size": len(self.data)}), self.data[message.offset : message.offset + 1000]


def test_a_bundle_is_fetched_once_and_unpacked_whole(tmp_path: Path) -> None:
    data = bundle(("hello.py", b"print(1)\n"), ("pkg/deep/mod.py", b"x = 1\n"), ("odd\nname.txt", b"?"))
    server = Server(data)
    sources = Sources(tmp_path / "sources", server)
    digest = hashlib.blake2b(data, digest_size=32).hexdigest()

    async def twice() -> list[Path]:
        return list(await asyncio.gather(sources.get(digest), sources.get(digest)))

    first, second = asyncio.run(twice())
    assert first == second
    assert (first / "pkg/deep/mod.py").read_text() == "x = 1\n"
    assert (first / "odd\nname.txt").read_text() == "?"
    assert server.asked == -(-len(data) // 1000)


class Blobs:
    """Several blobs, and which of them were asked for."""

    def __init__(self, *datas: bytes) -> None:
        self.datas = {hashlib.blake2b(data, digest_size=32).hexdigest(): data for data in datas}
        self.asked: list[str] = []

    async def __call__(self, message: Message) -> tuple[Reply, bytes]:
        assert isinstance(message, GetBlob)
        self.asked.append(message.digest)
        data = self.datas[message.digest]
        return Reply({"size": len(data)}), data[message.offset :]

    def whole(self) -> str:
        return hashlib.blake2b("\n".join(self.datas).encode(), digest_size=32).hexdigest()


def test_a_bundle_in_parts_is_one_tree(tmp_path: Path) -> None:
    blobs = Blobs(bundle(("pkg/a.py", b"1")), bundle(("pkg/b.py", b"2"), ("pkg/sub/c.py", b"3")))
    sources = Sources(tmp_path, blobs)
    tree = asyncio.run(sources.get(blobs.whole(), list(blobs.datas)))
    assert {str(path.relative_to(tree)): path.read_text() for path in tree.rglob("*.py")} == {
        "pkg/a.py": "1",
        "pkg/b.py": "2",
        "pkg/sub/c.py": "3",
    }


def test_parts_that_are_not_the_bundle_or_meet_in_a_file_are_refused(tmp_path: Path) -> None:
    blobs = Blobs(bundle(("a.py", b"1")), bundle(("b.py", b"2")))
    for parts in (list(blobs.datas)[:1], list(blobs.datas)[::-1], [*blobs.datas] * 600):
        with pytest.raises(InvalidError, match="is not what its"):
            asyncio.run(Sources(tmp_path, blobs).get(blobs.whole(), parts))
    twice = Blobs(bundle(("a.py", b"1")), bundle(("a.py", b"2")))
    with pytest.raises(FileExistsError):
        asyncio.run(Sources(tmp_path, twice).get(twice.whole(), list(twice.datas)))
    assert list(tmp_path.iterdir()) == []


def test_other_bytes_than_the_digest_names_are_refused(tmp_path: Path) -> None:
    sources = Sources(tmp_path / "sources", Server(b"something else"))
    with pytest.raises(ConflictError):
        asyncio.run(sources.get("0" * 64))


def test_what_was_not_used_for_long_is_deleted_at_the_next_start(tmp_path: Path) -> None:
    data = bundle(("hello.py", b"print(1)\n"))
    digest = hashlib.blake2b(data, digest_size=32).hexdigest()
    sources = Sources(tmp_path, Server(data))
    kept = asyncio.run(sources.get(digest))
    unused, half = tmp_path / ("0" * 64), tmp_path / ".0123"
    for path in (unused, half):
        (path / "pkg").mkdir(parents=True)
    for path in (kept, unused):
        os.utime(path, (1.0, 1.0))
    asyncio.run(sources.get(digest))
    aside = Sources(tmp_path, Server(data)).set_unused_aside()
    assert not unused.exists()
    assert len(aside) == 2
    asyncio.run(sources.remove(aside))
    assert list(tmp_path.iterdir()) == [kept]


def test_a_home_without_bundles_has_none_to_delete(tmp_path: Path) -> None:
    assert Sources(tmp_path / "none", Server(b"")).set_unused_aside() == []


@pytest.mark.parametrize(
    "member",
    [
        ("../escape", b"x"),
        ("/etc/passwd", b"x"),
        ("a/../../b", b"x"),
        ("a//b", b"x"),
        ("link", special("link", tarfile.SYMTYPE, "/etc/passwd")),
        ("hard", special("hard", tarfile.LNKTYPE, "/etc/passwd")),
        ("device", special("device", tarfile.CHRTYPE)),
        ("pipe", special("pipe", tarfile.FIFOTYPE)),
    ],
    ids=lambda member: member[0],
)
def test_a_hostile_member_is_refused(tmp_path: Path, member: tuple[str, bytes | tarfile.TarInfo]) -> None:
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises((InvalidError, Error)):
        unpack([bundle(member)], target)
    assert list(tmp_path.iterdir()) == [target]


def test_a_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError):
        unpack([bundle(("a.py", b"1"), ("a.py", b"2"))], tmp_path)


def test_names_of_very_many_directories_are_refused(tmp_path: Path) -> None:
    """Each could be made from the one before; deleting them would go as deep."""
    with pytest.raises(InvalidError, match="unsafe name"):
        unpack([bundle(("/".join(["d"] * 101), b""))], tmp_path)
    unpack([bundle(("/".join(["d"] * 100), b""))], tmp_path)


@pytest.mark.parametrize("data", [b"no archive at all", b"x" * 2000, bundle(("a", b"x" * 2000))[:700]])
def test_what_is_no_archive_is_refused_as_such(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(InvalidError):
        unpack([data], tmp_path)
