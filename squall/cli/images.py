"""`squall image`: what images there are, what is in them, why a step was built again, what to remove.

Must never start a server, but for nothing: images of a home outlive its server, and where none runs the commands say
so. What `why` tells is computed here, from two recipes. Tested in `tests/unit/test_cli_images.py` and
`tests/integration/test_images.py`.
"""

from __future__ import annotations

import difflib
import io
import tarfile
from typing import Any

import click

from squall import _blocking
from squall.cli.documents import json_option, print_json, tell
from squall.cli.logs import Printer, log_options
from squall.cli.main import Group
from squall.cli.manage import (
    ago,
    ask,
    complete,
    connect,
    resolve,
    show_list,
    size_of,
)
from squall.client import Client
from squall.exception import InvalidError, NotFoundError
from squall.protocol.images import title_of
from squall.protocol.messages import GetImage, ImageSpec, ImageStep
from squall.protocol.requests import ListObjects, PruneImages, VerifyImage

PRUNE_SECONDS = 600.0
DAY_SECONDS = 86400.0


@click.group(cls=Group)
def image() -> None:
    """Images: list, look inside, explain, remove."""


@image.command("list")
@json_option
def image_list(as_json: bool) -> None:
    """List the images that were built here."""
    show_list("image", app="", include_all=True, as_json=as_json)


@image.command("info")
@click.argument("image_id", metavar="IMAGE", shell_complete=complete("image"))
@json_option
def image_info(image_id: str, as_json: bool) -> None:
    """Show the steps and layers of an image."""
    client = connect(start=True)
    data = ask(client.link, GetImage(resolve(client.link, "image", image_id)))
    if as_json:
        print_json(data)
        return
    click.echo(f"{data['image_id']}  {data['state']}  {size_of(data['size_bytes'])} in all")
    if data["error"]:
        click.echo(data["error"])
    for number, step in enumerate(data["recipe"], 1):
        click.echo(f"{number:>3}  {title_of(ImageStep(**step))}")
    click.echo("layers:")
    for layer in data["layers"]:
        size, built = size_of(int(layer["size_bytes"])), ago(float(layer["built_at"]))
        click.echo(f"  {layer['key'][:12]}  {size:>9}  built {built} in {layer['seconds']:.1f} s  {layer['title']}")


@image.command("logs")
@click.argument("image_id", metavar="IMAGE", shell_complete=complete("image"))
@log_options
def image_logs(image_id: str, printer: Printer) -> None:
    """Print what the builds of an image have written."""
    client = connect(start=True)
    printer.show(client, image_id=resolve(client.link, "image", image_id))


@image.command("prune")
@click.argument("image_id", metavar="[IMAGE]", default="", shell_complete=complete("image"))
@click.option("--older-than", type=click.FloatRange(0), default=0.0, help="Only images unused for so many days.")
@json_option
def image_prune(image_id: str, older_than: float, as_json: bool) -> None:
    """Remove images that no running app uses, or the one named, with the layers that no other image has."""
    client = connect(start=True)
    found = resolve(client.link, "image", image_id) if image_id else ""
    data = ask(client.link, PruneImages(found, older_than * DAY_SECONDS), timeout=PRUNE_SECONDS)
    tell(as_json, data, f"removed {len(data['images'])} images, {size_of(int(data['size_bytes']))}")


@image.command("verify")
@click.argument("image_id", metavar="IMAGE", shell_complete=complete("image"))
@json_option
@click.pass_context
def image_verify(ctx: click.Context, image_id: str, as_json: bool) -> None:
    """Compare every byte of an image with what was built; damaged layers are removed and built again when wanted."""
    client = connect(start=True)
    found = resolve(client.link, "image", image_id)
    damaged = ask(client.link, VerifyImage(ImageSpec(image_id=found)), timeout=PRUNE_SECONDS)["damaged"]
    if not as_json:
        for title in damaged:
            click.echo(f"damaged: {title}")
    said = "all layers are as they were built" if not damaged else f"{len(damaged)} layers were damaged"
    tell(as_json, {"image_id": found, "damaged": damaged}, said)
    ctx.exit(1 if damaged else 0)


@image.command("why")
@click.argument("image_id", metavar="IMAGE", shell_complete=complete("image"))
@click.argument("other", metavar="[OTHER]", default="", shell_complete=complete("image"))
@json_option
def image_why(image_id: str, other: str, as_json: bool) -> None:
    """Tell which input made an image differ from OTHER, or from the one it has most in common with."""
    client = connect(start=True)
    mine = ask(client.link, GetImage(resolve(client.link, "image", image_id)))
    rows = ask(client.link, ListObjects("images", all=True, limit=1000))["rows"]
    if other:
        wanted = resolve(client.link, "image", other)
        rows = [row for row in rows if row["image_id"] == wanted]
    theirs = closest(mine, rows)
    if theirs is None:
        raise NotFoundError(f"no other image to compare `{mine['image_id']}` with", hint="see `squall image list`")
    lines = explain(mine["recipe"], theirs["recipe"], Blobs(client))
    if as_json:
        same = common(mine["recipe"], theirs["recipe"])
        about = {"image_id": mine["image_id"], "compared_with": theirs["image_id"]}
        print_json({**about, "steps_in_common": same, "explanation": lines})
        return
    click.echo(f"compared with {theirs['image_id']}:")
    for line in lines:
        click.echo(line)


# ---- why ----------------------------------------------------------------------------------------------------------

Step = dict[str, Any]


class Blobs:
    """Files of steps, fetched when two differ."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def read(self, digest: str) -> bytes:
        return _blocking.run(self._client.get_blob.aio(digest))


def _same(one: Step, other: Step) -> bool:
    return {k: v for k, v in one.items() if k != "force"} == {k: v for k, v in other.items() if k != "force"}


def common(one: list[Step], other: list[Step]) -> int:
    """How many steps two recipes begin with in common."""
    count = 0
    for mine, theirs in zip(one, other, strict=False):
        if not _same(mine, theirs):
            break
        count += 1
    return count


def closest(mine: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The image with the longest beginning in common; of those, the one whose next steps are most of the same kinds,
    then one of the same length, one that was built, the newest."""
    others = [row for row in rows if row["image_id"] != mine["image_id"]]
    recipe = mine["recipe"]

    def likeness(row: dict[str, Any]) -> tuple[int, int, int, bool, float]:
        same = common(recipe, row["recipe"])
        pairs = zip(recipe[same:], row["recipe"][same:], strict=False)
        kinds = sum(1 for one, other in pairs if one["kind"] == other["kind"])
        alike = -abs(len(row["recipe"]) - len(recipe))
        return same, kinds, alike, row.get("state") == "built", float(row.get("created_at") or 0)

    return max(others, key=likeness, default=None)


def explain(mine: list[Step], theirs: list[Step], blobs: Blobs) -> list[str]:
    """The first step that differs, what in it does, and what that means for the steps after it."""
    same = common(mine, theirs)
    if same == len(mine) == len(theirs):
        return ["nothing differs"]
    if same == len(mine):
        return [f"it is the beginning of that image, which goes on with `{_title(theirs[same])}`"]
    if same == len(theirs):
        return [f"it goes on where that image ends: step {same + 1}, `{_title(mine[same])}`, is new"]
    after = len(mine) - same - 1
    those = f"it and the {after} after it were built for themselves" if after else "it was built for itself"
    lines = [f"step {same + 1} differs, so {those}"]
    lines += [f"  - {_title(theirs[same])}", f"  + {_title(mine[same])}"]
    return lines + [f"  {line}" for line in _differences(mine[same], theirs[same], blobs)]


def _title(step: Step) -> str:
    return title_of(ImageStep(**step))


def _differences(mine: Step, theirs: Step, blobs: Blobs) -> list[str]:
    if mine["kind"] != theirs["kind"]:
        return [f"another kind of step: `{mine['kind']}` and not `{theirs['kind']}`"]
    lines = []
    new, old = mine.get("args", {}), theirs.get("args", {})
    for name in sorted({*new, *old} - {"args"}):
        if new.get(name) != old.get(name):
            lines.append(f"`{name}` differs:")
            before, after = (_as_lines(value.get(name)) for value in (old, new))
            lines += [line for line in difflib.ndiff(before, after) if line[0] in "+-"]
    if mine.get("blob") != theirs.get("blob") and mine["kind"] in ("copy", "mount"):
        lines += _changed_files(blobs, theirs.get("blob", ""), mine.get("blob", ""))
    return lines


def _as_lines(value: object) -> list[str]:
    if isinstance(value, str):
        return value.splitlines()
    if isinstance(value, list):
        return [str(entry) for entry in value]
    if isinstance(value, dict):
        return [f"{key}={entry}" for key, entry in sorted(value.items())]
    return [] if value is None else [str(value)]


def _changed_files(blobs: Blobs, old: str, new: str) -> list[str]:
    """Which files of two bundles differ."""
    try:
        before, after = _members(blobs.read(old)), _members(blobs.read(new))
    except (NotFoundError, InvalidError):
        return ["its files differ; those of the other image are not kept any more"]
    names = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    said = {(False, True): "added", (True, False): "removed", (True, True): "changed"}
    return [f"file {said[name in before, name in after]}: {name}" for name in names]


def _members(data: bytes) -> dict[str, tuple[int, bytes]]:
    found = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            file = archive.extractfile(member)
            found[member.name] = (member.mode, file.read() if file is not None else b"")
    return found
