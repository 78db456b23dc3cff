"""The node's store of image layers: directories named by the key of the step that made them, visible whole or not.

A layer is `<key>-<serial>/` with `tree` (what the step wrote), `meta.json`, `log`, and `index` (every file with its
size and digest). It is made as `.building-…` and renamed when it is whole. Writing it out to the disk and its index
follow (`settle`): until then `meta.json` names the boot it was made in, and after another boot such a layer counts as
absent, since a power cut may have taken any of its bytes. A layer is never changed: building its step again makes
another. What is held (by a zygote, by a build) is never removed. Trees hold what tenants wrote: no path in one is
ever followed through a link. Tested in `tests/unit/test_layers.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import stat
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from squall import _linux
from squall._observe import Logger
from squall.exception import NotFoundError
from squall.node.rootfs import remove_tree
from squall.protocol.images import layer_keys
from squall.protocol.messages import ImageSpec

_CHUNK = 1 << 20
_log = Logger("layers")


@dataclass
class Layer:
    """One layer as its `meta.json` tells."""

    key: str
    title: str
    path: Path = field(compare=False)
    built_at: float = 0.0
    seconds: float = 0.0
    size_bytes: int = 0
    files: int = 0
    boot: str = ""
    settled: bool = False
    inputs: dict[str, Any] = field(default_factory=dict)
    """What its key was made of, for `squall image why`."""

    @property
    def tree(self) -> Path:
        return self.path / "tree"

    def row(self) -> dict[str, Any]:
        """For listings."""
        return {
            "key": self.key,
            "title": self.title,
            "built_at": self.built_at,
            "seconds": self.seconds,
            "size_bytes": self.size_bytes,
            "files": self.files,
        }


class Absent(NotFoundError):
    """A layer of an image is not in the store; it is built again when next wanted."""


class Damaged(Absent):
    """A layer is not what was built; it was taken out of the store."""


def boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


class Layers:
    """All methods but `settle`, `check`, `verify` and `remove_doomed` are quick, and are called on one thread."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._by_key: dict[str, Layer] = {}
        self._stale: dict[str, Layer] = {}
        """By directory name: layers of whose key there is a newer one."""
        self._held: Counter[str] = Counter()
        self._checked: set[str] = set()
        self._verified: dict[str, float] = {}
        """By directory name: when every byte was last compared."""

    # -- life

    def open(self) -> None:
        """Read what is there; remove what an earlier agent left half done."""
        boot = boot_id()
        found: list[Layer] = []
        for entry in sorted(self.root.iterdir()):
            if entry.name.startswith((".building-", ".doomed-")):
                remove_tree(entry)
            elif (entry / "tree").is_dir() and not (entry / "tree").is_symlink():
                layer = _read(entry)
                if layer is None or (not layer.settled and layer.boot != boot):
                    _log.warning("a layer was never written out in full, and is dropped", layer=entry.name)
                    remove_tree(entry)
                else:
                    found.append(layer)
        for layer in sorted(found, key=lambda layer: layer.built_at):
            self._adopt(layer)

    def _adopt(self, layer: Layer) -> None:
        before = self._by_key.get(layer.key)
        if before is not None:
            self._stale[before.path.name] = before
        self._by_key[layer.key] = layer

    # -- looking

    def find(self, key: str) -> Layer | None:
        return self._by_key.get(key)

    def all(self) -> list[Layer]:
        return [*self._by_key.values(), *self._stale.values()]

    def unsettled(self) -> list[Layer]:
        return [layer for layer in self.all() if not layer.settled]

    def has(self, image: ImageSpec) -> bool:
        return all(key in self._by_key for key, _ in layer_keys(image))

    def resolve(self, image: ImageSpec) -> tuple[Layer, ...]:
        """The layers of an image, the topmost first. Raises Absent when one is missing."""
        found = []
        for key, _ in layer_keys(image):
            layer = self._by_key.get(key)
            if layer is None:
                raise Absent(f"image `{image.image_id}` lacks its layer `{key}` on this node")
            found.append(layer)
        return tuple(reversed(found))

    # -- making

    def begin(self) -> Path:
        path = self.root / f".building-{secrets.token_hex(8)}"
        path.mkdir(mode=0o700)
        return path

    def publish(self, building: Path, layer: Layer) -> Layer:
        """Make a whole layer visible; from now on it is the one of its key."""
        layer.path = self.root / f"{layer.key}-{secrets.token_hex(4)}"
        layer.built_at, layer.boot = time.time(), boot_id()
        _write_meta(building, layer)
        building.rename(layer.path)
        self._checked.add(layer.path.name)
        self._adopt(layer)
        return layer

    def abandon(self, building: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            remove_tree(building)

    def settle(self, layer: Layer) -> None:
        """Index a new layer and have the kernel write it to the disk; in a thread, as it takes its time."""
        size = count = 0
        digest = hashlib.blake2b(digest_size=32)
        with (layer.path / "index").open("wb") as index:  # line by line: a tenant chose how many files there are
            for entry in _walk(layer.tree):
                size += entry.size
                count += 1
                row = [entry.path, entry.kind, entry.mode, entry.size, entry.digest()]
                line = (json.dumps(row) + "\n").encode()
                digest.update(line)
                index.write(line)
        layer.size_bytes, layer.files, layer.settled = size, count, True
        layer.inputs["index"] = digest.hexdigest()
        fd = os.open(layer.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            _linux.syncfs(fd)
            _write_meta(layer.path, layer)
            os.fsync(fd)
        finally:
            os.close(fd)

    # -- checking

    def least_verified(self) -> Layer | None:
        """The settled layer whose bytes were compared longest ago in this agent's life."""
        settled = [layer for layer in self._by_key.values() if layer.settled]
        return min(settled, key=lambda layer: self._verified.get(layer.path.name, 0.0), default=None)

    def verified(self, layer: Layer) -> None:
        self._verified[layer.path.name] = time.monotonic()
        if len(self._verified) > 2 * len(self._by_key) + 100:
            names = {layer.path.name for layer in self.all()}
            self._verified = {name: at for name, at in self._verified.items() if name in names}

    def is_checked(self, layer: Layer) -> bool:
        return layer.path.name in self._checked

    def check(self, layer: Layer, *, deep: bool = False) -> str:
        """What is wrong with a settled layer, or empty. Sizes, kinds and modes; with `deep`, every byte."""
        try:
            text = (layer.path / "index").read_bytes()
        except OSError as error:
            return f"its index cannot be read: {error.strerror}"
        if hashlib.blake2b(text, digest_size=32).hexdigest() != layer.inputs.get("index"):
            return "its index has changed"
        expected = {row[0]: row[1:] for row in map(json.loads, text.splitlines())}
        for entry in _walk(layer.tree):
            row = expected.pop(entry.path, None)
            if row is None:
                return f"`{entry.path}` was added"
            if [entry.kind, entry.mode, entry.size] != row[:3]:
                return f"`{entry.path}` has another size or mode"
            if deep and entry.digest() != row[3]:
                return f"`{entry.path}` has other bytes"
        self._checked.add(layer.path.name)
        return f"`{next(iter(expected))}` is missing" if expected else ""

    def quarantine(self, layer: Layer, reason: str) -> None:
        """Take a damaged layer out; its files stay, for whoever wants to know, until the next start or prune."""
        _log.error("a layer is damaged and will be built again", layer=layer.path.name, reason=reason)
        if self._by_key.get(layer.key) is layer:
            del self._by_key[layer.key]
        self._stale.pop(layer.path.name, None)
        with contextlib.suppress(OSError):
            layer.path.rename(self.root / f".doomed-{layer.path.name}")

    # -- holding, removing

    def hold(self, layers: Iterable[Layer]) -> None:
        """Nothing of these is removed until they are released as often as they were held."""
        self._held.update(layer.path.name for layer in layers)

    def release(self, layers: Iterable[Layer]) -> None:
        for layer in layers:
            self._held[layer.path.name] -= 1
            if self._held[layer.path.name] <= 0:
                del self._held[layer.path.name]

    def prune(self, keep: set[str]) -> list[Layer]:
        """Doom every layer whose key is not in `keep` and that nobody holds. Returns them; their files go with
        `remove_doomed`."""
        doomed = [
            layer
            for layer in self.all()
            if not self._held[layer.path.name] and (layer.key not in keep or layer.path.name in self._stale)
        ]
        for layer in doomed:
            if self._by_key.get(layer.key) is layer:
                del self._by_key[layer.key]
            self._stale.pop(layer.path.name, None)
            layer.path.rename(self.root / f".doomed-{layer.path.name}")
        self._held += Counter()
        return doomed

    def remove_doomed(self) -> None:
        for entry in self.root.glob(".doomed-*"):
            remove_tree(entry)


# ---- files ------------------------------------------------------------------------------------------------------


@dataclass
class _Entry:
    path: str
    """Within the tree."""
    kind: str
    mode: int
    size: int
    place: str

    def digest(self) -> str:
        if self.kind == "l":
            return os.readlink(self.place)
        if self.kind != "f":
            return ""
        found = hashlib.blake2b(digest_size=16)
        fd = os.open(self.place, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(fd, "rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                found.update(chunk)
        return found.hexdigest()


_KINDS = ((stat.S_ISREG, "f"), (stat.S_ISDIR, "d"), (stat.S_ISLNK, "l"), (stat.S_ISCHR, "c"))


def _walk(top: Path) -> Iterator[_Entry]:
    """Everything in a tree that no process changes, links not followed; iterative, as a tenant chose its depth."""
    pending: list[tuple[str, str]] = [(str(top), "")]
    while pending:
        directory, within = pending.pop()
        with os.scandir(directory) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                status = entry.stat(follow_symlinks=False)
                kind = next((kind for test, kind in _KINDS if test(status.st_mode)), "o")
                path = f"{within}/{entry.name}"
                size = status.st_size if kind in "fl" else 0
                yield _Entry(path, kind, stat.S_IMODE(status.st_mode), size, entry.path)
                if kind == "d":
                    pending.append((entry.path, path))


def _read(path: Path) -> Layer | None:
    try:
        fields = json.loads((path / "meta.json").read_text())
        return Layer(**{**fields, "path": path})
    except (OSError, ValueError, TypeError):
        return None


def _write_meta(directory: Path, layer: Layer) -> None:
    fields = asdict(layer)
    del fields["path"]
    temporary = directory / "meta.json.new"
    temporary.write_text(json.dumps(fields))
    temporary.replace(directory / "meta.json")


def total_size(layers: Sequence[Layer]) -> int:
    return sum(layer.size_bytes for layer in layers)
