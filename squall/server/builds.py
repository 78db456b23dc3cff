"""Images: which exist, who waits for one to be built, and what their builds said.

One build of an image at a time, whoever asks; all who asked hear its output and its end. The node builds and keeps
the layers; what is kept here of an image is its recipe, its layers' rows and when it was last used, one small file
each, so that it outlives the server. A build nobody waits for any more is cancelled. Must never trust a recipe of a
client: it is checked before it goes to a node. Tested in `tests/integration/test_images.py`.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from squall._observe import Logger
from squall.exception import ConflictError, Error, InternalError, InvalidError, NotFoundError, ServiceError, from_wire
from squall.protocol.images import build_id_of, check_image, check_secrets, image_id_of, layer_keys
from squall.protocol.messages import (
    BuildImage,
    BuildOutput,
    ImageSpec,
    build,
    to_dict,
)
from squall.protocol.requests import BuildDone, CancelBuild, Pruned, PruneImages, VerifyImage
from squall.server.logs import Logs, Record
from squall.server.nodes import Node, Nodes
from squall.server.objects import MAIN
from squall.storage.blobs import BlobStore

NODE_TIMEOUT = 30.0
"""Seconds a build waits for a node to register."""
ASK_TIMEOUT = 600.0
NODE_TRIES = 3
"""Times a build is begun when the node that builds is lost."""
RECIPE_LIMIT_BYTES = 1 << 20
KEPT_IMAGES = 1000
KEPT_FAILURES = 200
PROMISE_SECONDS = 60.0
"""Between the build of an image and the app that it is for; nothing prunes it meanwhile."""

log = Logger("server")


@dataclass(eq=False)
class ImageRecord:
    image_id: str
    """As its workspace knows it."""
    image: ImageSpec
    created_at: float = 0.0
    used_at: float = 0.0
    layers: list[dict[str, Any]] = field(default_factory=list)
    is_built: bool = False
    error: str = ""
    waiting: set[Any] = field(default_factory=set)
    """Connections that wait for its build."""
    promised: dict[Any, float] = field(default_factory=dict)
    """Connections that make an app of it next, and until when (of the monotonic clock) they are believed."""
    node: Node | None = None
    done: asyncio.Future[BuildDone] | None = None

    @property
    def build_id(self) -> str:
        """As this server and its nodes know it."""
        return build_id_of(self.image)

    @property
    def state(self) -> str:
        return "building" if self.done is not None else "built" if self.is_built else "failed"


@dataclass(frozen=True)
class Kept:
    """An image as the choice below sees it."""

    image_id: str
    used_at: float
    keys: frozenset[str]


def choose_gone(
    images: Iterable[Kept], sizes: Mapping[str, int], used: set[str], quota_bytes: int
) -> tuple[list[str], bool]:
    """Which images go so that the layers fit, those used longest ago first; and whether any layer is to be removed.

    Layers that no image has go in any case. An image goes only when it brings something: all that it has may be part
    of one that is in use.
    """
    images = list(images)
    in_use = frozenset().union(*(image.keys for image in images if image.image_id in used))
    owned = frozenset().union(*(image.keys for image in images))
    excess = sum(sizes.values()) - quota_bytes
    if excess <= 0:
        return [], False
    orphans = sum(size for key, size in sizes.items() if key not in owned)
    excess -= orphans
    left = {image.image_id: image for image in images}
    gone = []
    for image in sorted(images, key=lambda image: image.used_at):
        if excess <= 0:
            break
        if image.image_id in used or not image.keys - in_use:
            continue
        del left[image.image_id]
        gone.append(image.image_id)
        others = frozenset().union(*(other.keys for other in left.values()))
        excess -= sum(sizes.get(key, 0) for key in image.keys - others)
    return gone, bool(gone or orphans)


class Builds:
    def __init__(self, directory: Path, nodes: Nodes, blobs: BlobStore, logs: Logs, quota_bytes: int) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.directory = directory
        self.nodes = nodes
        self.blobs = blobs
        self.logs = logs
        self.quota_bytes = quota_bytes
        self.sizes: dict[str, int] = {}
        """Bytes of each layer, by its key, as the node last said."""
        self.images: dict[str, ImageRecord] = {}
        """By build id."""
        self.in_use: Callable[[], set[str]] = set
        """Set by `main`: build ids of images that functions of running apps name."""
        self._asked: deque[asyncio.Future[Pruned]] = deque()
        """What the node was asked to prune and verify: it answers in order."""
        self._sending: set[asyncio.Future[Any]] = set()
        self._forgetting = False
        """Whether the node is removing layers for the quota."""
        self._read()

    # -- building

    async def build(self, peer: Any, message: BuildImage) -> dict[str, Any]:
        """Have the image built, or find that it is; `Reply.data` of `BuildImage`."""
        message.image.workspace = own_name(peer.scope.workspace)
        record = self._record(message.image)
        check_secrets(message.image, message.secrets)
        record.image = message.image
        record.waiting.add(peer)
        try:
            for _ in range(NODE_TRIES):
                if message.for_app:
                    record.promised[peer] = time.monotonic() + PROMISE_SECONDS
                done = await asyncio.shield(record.done or self._begin(record, message.secrets))
                if done.code != ServiceError.code:
                    break
                log.warning("a build is begun again", image=record.image_id, reason=done.message)
        finally:
            record.waiting.discard(peer)
        if done.code:
            raise from_wire(done.code, done.message, done.hint)
        return {"image_id": record.image_id, "built": sum(bool(row.get("was_built")) for row in done.layers)}

    def _record(self, image: ImageSpec) -> ImageRecord:
        check_image(image)
        if image.kind == "host":
            raise InvalidError("`Image.host()` needs no build")
        if len(json.dumps([to_dict(step) for step in image.steps])) > RECIPE_LIMIT_BYTES:
            raise InvalidError(f"the image's recipe takes more than {RECIPE_LIMIT_BYTES} bytes")
        missing = [step.blob for step in image.steps if step.blob and not self.blobs.has(step.blob)]
        if missing:
            raise NotFoundError(f"build an image: its files `{missing[0]}` were not uploaded")
        record = self.images.get(build_id_of(image))
        if record is None:
            self._forget_failed()
            record = self.images[build_id_of(image)] = ImageRecord(image_id_of(image.steps), image, time.time())
        return record

    def _forget_failed(self) -> None:
        """Of recipes that never came to an image only so many are remembered: anybody may send any number."""
        records = self.images.items()
        failed = [build_id for build_id, record in records if record.state == "failed" and not record.waiting]
        for build_id in failed[: max(0, len(failed) + 1 - KEPT_FAILURES)]:
            del self.images[build_id]

    def _begin(self, record: ImageRecord, secrets: dict[str, dict[str, str]]) -> asyncio.Future[BuildDone]:
        """Start a build. Its future ends with its node's answer, or with that node."""
        done: asyncio.Future[BuildDone] = asyncio.get_running_loop().create_future()
        done.add_done_callback(lambda _: self._ended(record, done))
        record.done = done
        self.images[record.build_id] = record  # it may have been forgotten between two tries
        task = asyncio.ensure_future(self._send(record, done, secrets))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)
        return done

    async def _send(
        self, record: ImageRecord, done: asyncio.Future[BuildDone], secrets: dict[str, dict[str, str]]
    ) -> None:
        try:
            await asyncio.wait_for(self.nodes.changed.wait(), NODE_TIMEOUT)
        except asyncio.TimeoutError:
            done.set_result(_failed(record, ServiceError(f"no node registered within {NODE_TIMEOUT:g} s")))
            return
        try:
            record.node = self.nodes.any_up()
            record.node.send(BuildImage(record.image, secrets))
        except Exception as error:  # ours, and nobody else would end the wait of who asked for it
            done.set_result(_failed(record, InternalError(f"the build could not be given to a node: {error!r}")))

    def _ended(self, record: ImageRecord, done: asyncio.Future[BuildDone]) -> None:
        if record.done is done:
            record.done, record.node = None, None
        self.logs.close_app(record.build_id)
        result = done.result()
        if result.code:
            record.error = result.message
            if not record.is_built:
                record.layers = []
        else:
            for peer in record.promised:
                record.promised[peer] = time.monotonic() + PROMISE_SECONDS
            record.is_built, record.error, record.layers = True, "", result.layers
            record.used_at = time.time()
            self._write(record)

    # -- removing

    async def prune(self, message: PruneImages, workspace: str) -> dict[str, Any]:
        """Forget images that are not in use, and have the node remove the layers that no other image has.

        Of a workspace its own; of the main one, whose people run the machine, all."""
        mine = sorted(self.images if workspace == MAIN.workspace else self._of(workspace))
        ids = [self.find(message.image_id, workspace).build_id] if message.image_id else mine
        used = self._used()
        if message.image_id and ids[0] in used:
            known_as = self.images[ids[0]].image_id
            raise ConflictError(f"image `{known_as}` is in use", hint="stop the apps that run on it: `squall app list`")
        now = time.time()
        gone = [
            build_id for build_id in ids
            if build_id not in used and now - self.images[build_id].used_at >= message.older_than
        ]  # fmt: skip
        shown = [self.images[build_id].image_id for build_id in gone]
        pruned = await self._forget(gone)
        return {"images": shown, "size_bytes": pruned.size_bytes}

    async def _forget(self, build_ids: list[str]) -> Pruned:
        for build_id in build_ids:
            del self.images[build_id]
            self._path(build_id).unlink(missing_ok=True)
            self.logs.remove(build_id)
        keep = {key for record in self.images.values() for key, _ in layer_keys(record.image)}
        return await self._ask(PruneImages(keep=sorted(keep)))

    def _used(self) -> set[str]:
        now = time.monotonic()
        wanted = {
            record.build_id
            for record in self.images.values()
            if record.done is not None or any(until > now for until in record.promised.values())
        }
        return self.in_use() | wanted

    async def verify(self, image_id: str, workspace: str) -> dict[str, Any]:
        """Have the node compare an image with what was built."""
        record = self.find(image_id, workspace)
        return {"damaged": (await self._ask(VerifyImage(record.image))).titles}

    async def _ask(self, message: PruneImages | VerifyImage) -> Pruned:
        await asyncio.wait_for(self.nodes.changed.wait(), NODE_TIMEOUT)
        answer: asyncio.Future[Pruned] = asyncio.get_running_loop().create_future()
        self._asked.append(answer)
        self.nodes.any_up().send(message)
        try:
            return await asyncio.wait_for(asyncio.shield(answer), ASK_TIMEOUT)
        except asyncio.TimeoutError:
            raise ServiceError(f"the node did not answer `{message.TAG}` within {ASK_TIMEOUT:g} s") from None

    def answered(self, message: Pruned) -> None:
        if self._asked:
            answer = self._asked.popleft()
            if not answer.done():
                answer.set_result(message)

    def reported(self, sizes: dict[str, int]) -> None:
        """The node's layers have changed; above the quota, images used longest ago go, as far as nothing uses them."""
        self.sizes = sizes
        records = self.images.values()
        standing = [Kept(r.build_id, r.used_at, frozenset(k for k, _ in layer_keys(r.image))) for r in records]
        gone, is_over = choose_gone(standing, sizes, self._used(), self.quota_bytes)
        if is_over and not self._forgetting:
            log.info("images are removed, as layers take more than they may", images=gone)
            self._forgetting = True
            task = asyncio.ensure_future(self._forget(gone))
            self._sending.add(task)
            task.add_done_callback(self._forgotten)

    def _forgotten(self, task: asyncio.Future[Any]) -> None:
        self._sending.discard(task)
        self._forgetting = False
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("layers could not be removed", error=str(error))

    # -- what nodes say

    def output(self, node: Node, message: BuildOutput, data: bytes) -> None:
        record = self.images.get(message.image_id)
        if record is None or record.node is not node:
            return
        text = data if message.kind == "output" else f"[{message.kind}] {message.text}\n".encode()
        stream = "stdout" if message.kind == "output" else "system"
        self.logs.append(record.build_id, Record(time.time(), record.image_id, f"step-{message.step}", stream, text))
        message.image_id = record.image_id
        for peer in record.waiting:
            if not peer.stream.paused:
                peer.stream.send(message, data)

    def done(self, node: Node, message: BuildDone) -> None:
        record = self.images.get(message.image_id)
        if record is not None and record.node is node and record.done is not None and not record.done.done():
            record.done.set_result(message)

    def node_lost(self, node: Node, reason: str) -> None:
        while self._asked:
            answer = self._asked.popleft()
            if not answer.done():
                answer.set_exception(ServiceError(f"the node was lost: {reason}", hint="try again"))
        for record in self.images.values():
            if record.node is node and record.done is not None and not record.done.done():
                error = ServiceError(f"build image `{record.image_id}`: its node was lost: {reason}", hint="try again")
                record.done.set_result(_failed(record, error))

    def peer_lost(self, peer: Any) -> None:
        for record in self.images.values():
            record.waiting.discard(peer)
            record.promised.pop(peer, None)
            if record.done is not None and not record.waiting and record.node is not None:
                record.node.send(CancelBuild(record.build_id, "whoever asked for it went away"))

    # -- use

    def check_use(self, image: ImageSpec, workspace: str, peer: Any = None) -> None:
        """Whether functions of a workspace may run on it, as `peer` has announced: only on what was built there.
        Raises InvalidError, NotFoundError."""
        check_image(image)
        if image.kind == "host":
            return
        image.workspace = own_name(workspace)
        record = self.images.get(build_id_of(image))
        if record is None or not record.is_built:
            raise NotFoundError(f"image `{image_id_of(image.steps)}` was not built here", hint="build it first")
        record.promised.pop(peer, None)
        record.used_at = time.time()

    def _of(self, workspace: str) -> dict[str, ImageRecord]:
        own = own_name(workspace)
        return {build_id: record for build_id, record in self.images.items() if record.image.workspace == own}

    def find(self, ref: str, workspace: str = MAIN.workspace) -> ImageRecord:
        found = [record for record in self._of(workspace).values() if record.image_id.startswith(ref)]
        if len(found) != 1:
            what = f"{len(found)} images begin with" if found else "no image"
            raise NotFoundError(f"{what} `{ref[:80]}`", hint="see `squall image list`")
        return found[0]

    def rows(self, workspace: str = MAIN.workspace) -> list[dict[str, Any]]:
        return [self.row(record) for record in self._of(workspace).values()]

    def row(self, record: ImageRecord) -> dict[str, Any]:
        # What the node said last, or, until it is here, what a layer took when it was built.
        sizes = {row["key"]: row["size_bytes"] for row in record.layers} | self.sizes
        return {
            "image_id": record.image_id,
            "state": record.state,
            "steps": len(record.image.steps),
            "layers": [{**row, "size_bytes": sizes[row["key"]]} for row in record.layers],
            "size_bytes": sum(sizes.get(key, 0) for key, _ in layer_keys(record.image)),
            "in_use": record.build_id in self._used(),
            "created_at": record.created_at,
            "used_at": record.used_at or None,
            "error": record.error,
            "recipe": [to_dict(step) for step in record.image.steps],
        }

    # -- files

    def _path(self, build_id: str) -> Path:
        return self.directory / f"{build_id}.json"

    def _write(self, record: ImageRecord) -> None:
        fields = {
            "image_id": record.image_id,
            "steps": [to_dict(step) for step in record.image.steps],
            "created_at": record.created_at,
            "used_at": record.used_at,
            "layers": record.layers,
            "workspace": record.image.workspace,
        }
        path = self._path(record.build_id)
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(fields))
        os.replace(temporary, path)

    def _read(self) -> None:
        paths = sorted(self.directory.glob("im-*.json"), key=lambda path: path.stat().st_mtime)
        for path in paths[-KEPT_IMAGES:]:
            try:
                fields = json.loads(path.read_text())
                whose = fields.get("workspace", "")  # releases before had the main one alone
                image = build(ImageSpec, {"kind": "layers", "steps": fields["steps"], "workspace": whose})
                check_image(image)
            except (OSError, ValueError, KeyError, TypeError, Error) as error:
                log.warning("an image's file is left out", path=str(path), error=str(error))
                continue
            record = ImageRecord(fields["image_id"], image, fields["created_at"], fields["used_at"], fields["layers"])
            record.is_built = True
            self.images[record.build_id] = record


def own_name(workspace: str) -> str:
    """How images name it: those of `main` as they did before there were others."""
    return "" if workspace == MAIN.workspace else workspace


def _failed(record: ImageRecord, error: Error) -> BuildDone:
    return BuildDone(record.build_id, code=error.code, message=error.message, hint=error.hint)
