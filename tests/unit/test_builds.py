"""Which images go when layers take more than they may; whose images are whose."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from squall.exception import InternalError, NotFoundError
from squall.protocol.images import build_id_of, layer_keys
from squall.protocol.messages import BuildImage, BuildOutput, ImageSpec, ImageStep, Message
from squall.protocol.requests import BuildDone, Pruned, PruneImages
from squall.server import builds as builds_module
from squall.server.builds import Builds, Kept, choose_gone

SIZES = {"base": 100, "a": 10, "b": 20, "c": 30}


def image(name: str, used_at: float, *keys: str) -> Kept:
    return Kept(name, used_at, frozenset(keys))


OLD, MIDDLE, NEW = image("old", 1, "base", "a"), image("middle", 2, "base", "b"), image("new", 3, "base", "c")


def gone(*images: Kept, quota: int, used: set[str] = frozenset(), sizes: dict[str, int] = SIZES) -> list[str]:  # type: ignore[assignment]
    return choose_gone(images, sizes, set(used), quota)[0]


def test_none_goes_while_layers_fit() -> None:
    assert choose_gone([OLD, MIDDLE, NEW], SIZES, set(), 160) == ([], False)


def test_images_used_longest_ago_go_until_the_rest_fits() -> None:
    assert gone(NEW, MIDDLE, OLD, quota=150) == ["old"]
    assert gone(NEW, MIDDLE, OLD, quota=149) == ["old", "middle"]


def test_image_in_use_stays_whatever_its_age() -> None:
    assert gone(OLD, MIDDLE, NEW, quota=149, used={"old"}) == ["middle"]
    assert gone(OLD, MIDDLE, NEW, quota=0, used={"old", "middle", "new"}) == []


def test_shared_layer_goes_with_the_last_image_that_has_it() -> None:
    assert gone(OLD, MIDDLE, NEW, quota=30) == ["old", "middle", "new"]


def test_image_that_is_the_beginning_of_one_in_use_stays_as_it_would_free_nothing() -> None:
    beginning = image("beginning", 0, "base")
    assert gone(beginning, OLD, NEW, quota=135, used={"old"}, sizes={"base": 100, "a": 10, "c": 30}) == ["new"]


def test_layers_of_no_image_go_first() -> None:
    assert choose_gone([OLD], {"base": 100, "a": 10, "lost": 50}, set(), 110) == ([], True)


# ---- workspaces

STEPS = [ImageStep("debian", {"suite": "bookworm"}), ImageStep("run", {"commands": ["true"]})]


class Node:
    """Builds whatever it is asked to, at once."""

    def __init__(self) -> None:
        self.builds: Builds | None = None
        self.sent: list[Message] = []
        self.code = ""
        self.asked = asyncio.Event()
        """To prune."""

    def send(self, message: Message) -> None:
        self.sent.append(message)
        if isinstance(message, PruneImages):
            self.asked.set()
        assert self.builds is not None
        if isinstance(message, BuildImage):
            named = build_id_of(message.image)
            self.builds.output(self, BuildOutput(named, "output", "", 2), b"said")  # type: ignore[arg-type]
            self.builds.done(self, BuildDone(named, code=self.code, message="no"))  # type: ignore[arg-type]


class Listener:
    def __init__(self, workspace: str) -> None:
        self.scope = SimpleNamespace(workspace=workspace)
        self.stream = self
        self.paused = False
        self.heard: list[str] = []

    def send(self, message: BuildOutput, data: bytes) -> None:
        self.heard.append(message.image_id)


def make(tmp_path: Path) -> tuple[Builds, Node]:
    node = Node()
    changed = asyncio.Event()
    changed.set()
    nodes: Any = SimpleNamespace(any_up=lambda: node, changed=changed)
    logs: Any = SimpleNamespace(append=lambda *_: None, close_app=lambda _: None, remove=lambda _: None)
    made = node.builds = Builds(tmp_path / "images", nodes, SimpleNamespace(), logs, 1 << 40)  # type: ignore[arg-type]
    return made, node


async def build(builds: Builds, workspace: str, claimed: str = "") -> Listener:
    listener = Listener(workspace)
    await builds.build(listener, BuildImage(ImageSpec("layers", STEPS, workspace=claimed)))
    return listener


def test_a_workspace_finds_and_uses_only_images_it_has_built(tmp_path: Path) -> None:
    async def main() -> None:
        builds, _ = make(tmp_path)
        await build(builds, "main")
        [row] = builds.rows("main")
        assert builds.rows("other") == []
        with pytest.raises(NotFoundError):
            builds.find(row["image_id"], "other")
        with pytest.raises(NotFoundError):
            builds.check_use(ImageSpec("layers", STEPS), "other")
        builds.check_use(ImageSpec("layers", STEPS), "main")

    asyncio.run(main())


def test_a_client_cannot_say_whose_image_it_builds_or_uses(tmp_path: Path) -> None:
    async def main() -> None:
        builds, node = make(tmp_path)
        await build(builds, "other", claimed="main")
        [sent] = [message for message in node.sent if isinstance(message, BuildImage)]
        assert sent.image.workspace == "other"
        image = ImageSpec("layers", STEPS, workspace="other")
        with pytest.raises(NotFoundError):
            builds.check_use(image, "main")
        assert image.workspace == ""

    asyncio.run(main())


def test_each_workspace_hears_its_own_build_by_the_id_its_client_knows(tmp_path: Path) -> None:
    async def main() -> None:
        builds, _ = make(tmp_path)
        mine, theirs = await build(builds, "main"), await build(builds, "other")
        [row] = builds.rows("other")
        assert mine.heard == theirs.heard == [row["image_id"]]

    asyncio.run(main())


def test_a_workspace_prunes_its_own_images_only(tmp_path: Path) -> None:
    async def main() -> None:
        builds, node = make(tmp_path)
        await build(builds, "main")
        await build(builds, "other")
        pruning = asyncio.ensure_future(builds.prune(PruneImages(), "other"))
        await asyncio.wait_for(node.asked.wait(), 5)
        builds.answered(Pruned())
        assert len((await pruning)["images"]) == 1
        assert (len(builds.rows("main")), builds.rows("other")) == (1, [])
        assert isinstance(node.sent[-1], PruneImages)
        assert len(node.sent[-1].keep) == 3  # all that the image which stays is made of

    asyncio.run(main())


def test_images_of_workspaces_outlive_the_server(tmp_path: Path) -> None:
    async def main() -> None:
        builds, _ = make(tmp_path)
        await build(builds, "main")
        await build(builds, "other")
        again, _ = make(tmp_path)
        assert [len(again.rows(name)) for name in ("main", "other", "third")] == [1, 1, 0]

    asyncio.run(main())


def test_recipes_that_failed_are_forgotten_beyond_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builds_module, "KEPT_FAILURES", 3)

    async def main() -> None:
        builds, node = make(tmp_path)
        node.code = "build"
        for number in range(10):
            steps = [STEPS[0], ImageStep("run", {"commands": [f"exit {number}"]})]
            with pytest.raises(Exception, match="no"):
                await builds.build(Listener("main"), BuildImage(ImageSpec("layers", steps)))
        assert len(builds.images) == 3

    asyncio.run(main())


def test_a_size_is_what_was_built_until_the_node_says_what_it_is(tmp_path: Path) -> None:
    async def main() -> None:
        builds, _ = make(tmp_path)
        await build(builds, "main")
        [record] = builds.images.values()
        first, last = [key for key, _ in layer_keys(record.image)][-2:]
        record.layers = [{"key": first, "size_bytes": 100}, {"key": last, "size_bytes": 20}]
        assert builds.row(record)["size_bytes"] == 120
        builds.sizes = {last: 30}
        assert builds.row(record)["size_bytes"] == 130

    asyncio.run(main())


def test_a_build_that_no_node_can_be_given_fails_and_is_not_waited_for(tmp_path: Path) -> None:
    async def main() -> None:
        builds, _ = make(tmp_path)
        builds.nodes.any_up = lambda: next(iter(()))  # type: ignore[method-assign]
        with pytest.raises(InternalError, match="could not be given to a node"):
            await asyncio.wait_for(build(builds, "main"), 10)

    asyncio.run(main())
