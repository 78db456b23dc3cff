"""Why one image is not another, told from two recipes."""

from __future__ import annotations

import io
import tarfile
from typing import Any

from squall.cli.images import closest, common, explain
from squall.client import blob_digest

BASE = {"kind": "debian", "args": {"suite": "bookworm"}}


class Kept:
    """Blobs in memory."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}

    def read(self, digest: str) -> bytes:
        return self.blobs[digest]

    def bundle(self, **files: str) -> str:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as archive:
            for name, text in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(text)
                archive.addfile(info, io.BytesIO(text.encode()))
        digest = blob_digest(out.getvalue())
        self.blobs[digest] = out.getvalue()
        return digest


def run(command: str) -> dict[str, Any]:
    return {"kind": "run", "args": {"commands": [command]}}


def why(mine: list[dict[str, Any]], theirs: list[dict[str, Any]], blobs: Any = None) -> str:
    kept: Any = blobs or Kept()
    return "\n".join(explain(mine, theirs, kept))


def test_first_step_that_differs_is_named_with_what_in_it_does() -> None:
    told = why([BASE, run("a"), run("z")], [BASE, run("b"), run("z")])
    assert "step 2 differs, so it and the 1 after it were built" in told
    assert "- run b" in told
    assert "+ run a" in told


def test_changed_line_of_a_requirements_file_is_shown() -> None:
    texts = ("six==1\nattrs", "six==2\nattrs")
    steps = [{"kind": "pip", "args": {"packages": [], "requirements": text}} for text in texts]
    told = why([BASE, steps[0]], [BASE, steps[1]])
    assert "`requirements` differs:\n  - six==2\n  + six==1" in told
    assert "attrs" not in told


def test_changed_files_are_named() -> None:
    kept = Kept()
    old = {"kind": "copy", "args": {"target": "/x"}, "blob": kept.bundle(same="1", gone="1", other="1")}
    new = {"kind": "copy", "args": {"target": "/x"}, "blob": kept.bundle(same="1", other="2", more="1")}
    told = why([BASE, new], [BASE, old], kept)
    assert "file removed: gone" in told
    assert "file added: more" in told
    assert "file changed: other" in told
    assert "same" not in told.replace("so it", "")


def test_longer_and_shorter_recipes_are_told_apart() -> None:
    assert "is new" in why([BASE, run("a")], [BASE])
    assert "goes on with `run a`" in why([BASE], [BASE, run("a")])
    assert why([BASE], [BASE]) == "nothing differs"


def test_force_is_no_difference() -> None:
    assert common([{**BASE, "force": True}], [BASE]) == 1


def test_image_with_most_in_common_is_compared_with() -> None:
    rows = [
        {"image_id": "im-1", "recipe": [BASE], "created_at": 9.0},
        {"image_id": "im-2", "recipe": [BASE, run("a"), run("b")], "created_at": 1.0},
        {"image_id": "im-me", "recipe": [BASE, run("a"), run("c")], "created_at": 2.0},
    ]
    found = closest(rows[2], rows)
    assert found is not None
    assert found["image_id"] == "im-2"


def test_built_images_of_the_same_kinds_of_steps_are_compared_with_first() -> None:
    def row(image_id: str, step: dict[str, Any], state: str, at: float) -> dict[str, Any]:
        return {"image_id": image_id, "recipe": [BASE, step], "state": state, "created_at": at}

    mine = row("im-me", run("a"), "built", 9.0)
    rows = [
        row("im-1", run("b"), "built", 1.0),
        row("im-2", {"kind": "apt", "args": {}}, "built", 8.0),
        row("im-3", run("c"), "failed", 7.0),
    ]
    found = closest(mine, rows)
    assert found is not None
    assert found["image_id"] == "im-1"
    assert "step 2 differs, so it was built for itself" in why(mine["recipe"], found["recipe"])
