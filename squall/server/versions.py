"""Versions of a deployed app: what one is, how it is packed for the Store, and what two of them differ in.

Pure: no I/O, no clock, no ids made. Who keeps versions is `app_rows`, who makes them is `deploys`.
Tested in `tests/unit/test_versions.py`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from squall.protocol.images import build_id_of
from squall.protocol.messages import FunctionSpec, build, to_dict

Kind = Literal["deploy", "rollback", "rollover"]
Changes = dict[str, Any]

KEPT_VERSIONS = 20
"""Newest versions of an app that can be gone back to and called by number; of older ones only the row is kept."""
_NEVER_SHOWN = frozenset({"tag", "qualname", "main_alias", "python", "is_async", "shape", "secret_keys"})
"""Fields of a spec whose change says nothing to people: they follow from the source."""


@dataclass(eq=False)
class Version:
    number: int
    created_at: float
    specs: list[FunctionSpec]
    """Empty once it is older than the KEPT_VERSIONS newest, see `is_kept`."""
    kind: Kind = "deploy"
    from_version: int = 0
    """Whose definition a rollback or rollover took."""
    tag: str = ""
    strategy: str = "rolling"
    git_commit: str = ""
    git_dirty: bool = False
    user: str = ""
    host: str = ""
    tags: list[str] = field(default_factory=list)
    """Of its functions."""
    changes: Changes = field(default_factory=dict)
    is_kept: bool = True
    pool_seed: str = ""
    """Drawn for it; makes the ids of its pools."""

    def spec(self, tag: str) -> FunctionSpec | None:
        return next((spec for spec in self.specs if spec.tag == tag), None)


def changes_between(before: Iterable[FunctionSpec], after: Iterable[FunctionSpec]) -> Changes:
    """What was added, removed and changed, by names of functions and of the fields of their specs."""
    old, new = {spec.tag: spec for spec in before}, {spec.tag: spec for spec in after}
    changed = {tag: _changed_fields(old[tag], spec) for tag, spec in new.items() if tag in old}
    return {
        "added": sorted(new.keys() - old.keys()),
        "removed": sorted(old.keys() - new.keys()),
        "changed": {tag: fields for tag, fields in sorted(changed.items()) if fields},
    }


def _changed_fields(old: FunctionSpec, new: FunctionSpec) -> list[str]:
    found = [f.name for f in dataclasses.fields(FunctionSpec) if getattr(old, f.name) != getattr(new, f.name)]
    shown = {"source" if name == "serialized_blob" else name for name in found if name not in _NEVER_SHOWN}
    return sorted(shown) or (["code"] if found else [])


def pack_specs(specs: Iterable[FunctionSpec]) -> bytes:
    return json.dumps([to_dict(spec) for spec in specs], default=to_dict, separators=(",", ":")).encode()


def unpack_specs(data: bytes) -> list[FunctionSpec]:
    """What `pack_specs` packed, by this release or an earlier one."""
    return [build(FunctionSpec, fields) for fields in json.loads(data)]


def images_of(specs: Iterable[FunctionSpec]) -> set[str]:
    """What the server calls the images that these functions run on."""
    return {build_id_of(spec.image) for spec in specs if spec.image.steps}


def blobs_of(specs: Iterable[FunctionSpec]) -> set[str]:
    """Digests of all blobs that are needed to start containers of these functions, or to build their images again."""
    found: set[str] = set()
    for spec in specs:
        found.update((spec.source, spec.serialized_blob), spec.source_parts, (step.blob for step in spec.image.steps))
    found.discard("")
    return found
