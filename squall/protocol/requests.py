"""What clients ask of a server beside calling: messages that look at things and manage them.

Apart from `messages`, whose rules hold here too, so that a container and a program that only calls never load them.
Imported by the server and by the commands that send them. The contract is tested in `tests/unit/test_messages.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from squall.protocol.messages import ImageSpec, Message

# ---- looking at things ------------------------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class ListObjects(Message):
    """`kind`: `apps`, `containers`, `functions`, `calls`, `nodes`. `Reply.data`: `{"rows": [dict, ...]}`."""

    TAG = "list_objects"
    IS_REPEATABLE = True
    kind: str
    app: str = ""
    all: bool = False
    limit: int = 100


@dataclass(eq=False, repr=False)
class GetTrace(Message):
    """`call` is a call or input id, or empty for the latest. `Reply.data`: call_id, function, inputs: [{idx, status,
    attempts, spans: [{name, start, end, note}], events}], total_ms."""

    TAG = "get_trace"
    IS_REPEATABLE = True
    call: str = ""
    limit: int = 20


@dataclass(eq=False, repr=False)
class StopServer(Message):
    """End the server: its ephemeral apps stop, containers end. `Reply.data` `{}` before it goes."""

    TAG = "stop_server"
    reason: str = ""
    grace: float = -1.0
    """Seconds that running inputs may take to end before that; -1: as the server's settings say."""


# ---- tokens, workspaces, environments, secrets ------------------------------------------------------------------
#
# Over TCP those of tokens and workspaces need a token that is an administrator's. Lists: `ListObjects` of `tokens`,
# `workspaces`, `environments`, `secrets`. None of them ever returns what a secret holds.


@dataclass(eq=False, repr=False)
class CreateToken(Message):
    """`Reply.data`: token_id, secret (told this once), workspace, expires_at (or null)."""

    TAG = "create_token"
    workspace: str = "main"
    name: str = ""
    """A label, for people."""
    lifetime: float = 0.0
    """Seconds; 0: it does not expire."""
    admin: bool = False


@dataclass(eq=False, repr=False)
class RevokeToken(Message):
    """Have a token count no more, from now on; connections that it opened are closed."""

    TAG = "revoke_token"
    token_id: str


@dataclass(eq=False, repr=False)
class RotateToken(Message):
    """A new secret for a token; the old one counts for `grace` seconds more. Without `token_id` the asker's own.
    `Reply.data` as of `CreateToken`."""

    TAG = "rotate_token"
    token_id: str = ""
    grace: float = 0.0


@dataclass(eq=False, repr=False)
class CreateWorkspace(Message):
    TAG = "create_workspace"
    name: str


@dataclass(eq=False, repr=False)
class DeleteWorkspace(Message):
    """Delete a workspace in which nothing runs, with its environments, secrets and tokens."""

    TAG = "delete_workspace"
    name: str


@dataclass(eq=False, repr=False)
class CreateEnvironment(Message):
    TAG = "create_environment"
    name: str


@dataclass(eq=False, repr=False)
class RenameEnvironment(Message):
    """Rename an environment in which nothing runs."""

    TAG = "rename_environment"
    name: str
    new_name: str


@dataclass(eq=False, repr=False)
class DeleteEnvironment(Message):
    """Delete an environment in which nothing runs, with its secrets."""

    TAG = "delete_environment"
    name: str


@dataclass(eq=False, repr=False)
class PutSecret(Message):
    """Keep values under a name. The payload is a JSON object of strings: a header might be shown by whoever logs it.

    `replace`: also where the name is taken; containers that run keep the values they have."""

    TAG = "put_secret"
    name: str
    replace: bool = False


@dataclass(eq=False, repr=False)
class DeleteSecret(Message):
    TAG = "delete_secret"
    name: str


@dataclass(eq=False, repr=False)
class GetServer(Message):
    """What `squall status` shows. `Reply.data`: server_id, version, home, pid, started_at, stays (whether it was
    started to stay), listens (its URL or empty), draining, workspace, environment, admin, connections."""

    TAG = "get_server"


# ---- logs -------------------------------------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class ReadLogs(Message):
    """Look through the kept output of what is named (an app, a function by id or as a tag of `app`, a container, a call
    or input, or what the builds of an image said), within what else is given. Times are seconds since 1970.

    `Reply.data` is a page: `{"entries": [[at, container_id, function, source, size], ...], "done": bool, "gap": bool,
    "reader": id, "app_id": id}`; the payload are the entries' bytes. Until a page is `done`, `MoreLogs` of `reader`
    brings the next; a `gap` means that output was deleted, being too old or too much, before it was read.
    """

    TAG = "read_logs"
    app: str = ""
    function: str = ""
    container_id: str = ""
    call: str = ""
    """A call's id, or an input's."""
    image_id: str = ""
    since: float = 0.0
    until: float = 0.0
    """0: without end."""
    search: str = ""
    """Only lines that hold this text."""
    source: str = ""
    """`stdout`, `stderr` or `system`."""
    tail: int = 0
    """Only the newest so many of the lines that are there now."""
    lines: bool = False
    """An entry is a whole line, instead of what was written at a time; so it is with `search` and `tail` too."""
    follow: bool = False
    """Go on with what comes, until nothing more can come."""


@dataclass(eq=False, repr=False)
class MoreLogs(Message):
    """The next page of a reader; an empty one after `wait` seconds in which nothing came. Answered as `ReadLogs`."""

    TAG = "more_logs"
    reader: str
    wait: float = 10.0
    close: bool = False
    """No more is wanted: forget the reader."""


# ---- images: what is kept of them ---------------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class PruneImages(Message):
    """Forget images that nothing uses and remove their layers: all of them, those unused for `older_than` seconds, or
    the one named. From a client: `Reply.data` `{"images": [ids], "size_bytes": int}`. From the server to an agent:
    `keep` are the keys of layers that stay; answered by `Pruned`."""

    TAG = "prune_images"
    image_id: str = ""
    older_than: float = 0.0
    keep: list[str] = field(default_factory=list)


@dataclass(eq=False, repr=False)
class VerifyImage(Message):
    """Compare every byte of an image's layers with what was built; a damaged layer is taken out. From a client:
    `Reply.data` `{"damaged": [titles]}`. To an agent, which answers with `Pruned`."""

    TAG = "verify_image"
    IS_REPEATABLE = True
    NESTED = {"image": ImageSpec}
    image: ImageSpec


@dataclass(eq=False, repr=False)
class Pruned(Message):
    """An agent's answer to `PruneImages` and `VerifyImage`: the titles of layers taken out, and their size."""

    TAG = "pruned"
    titles: list[str] = field(default_factory=list)
    size_bytes: int = 0


@dataclass(eq=False, repr=False)
class CancelBuild(Message):
    """From the server to an agent: nobody waits for this image any more; end what is built for it alone."""

    TAG = "cancel_build"
    image_id: str
    reason: str = ""


@dataclass(eq=False, repr=False)
class BuildDone(Message):
    """An agent's answer to `BuildImage`: `layers` as they are now, or the failure."""

    TAG = "build_done"
    image_id: str
    layers: list[dict[str, Any]] = field(default_factory=list)
    """Each `{"key", "title", "size_bytes", "files", "built_at", "seconds", "was_built"}`, the lowest first."""
    code: str = ""
    message: str = ""
    hint: str = ""


# ---- schedules --------------------------------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class ChangeSchedule(Message):
    """`action`: `pause`, `resume`, or `run`, which makes a call now, beside the schedule's own. `Reply.data`:
    `{"call_id": str}`, empty where none was made. Lists: `ListObjects` of `schedules`."""

    TAG = "change_schedule"
    schedule_id: str
    action: str
