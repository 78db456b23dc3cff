"""What clients ask of a server beside calling: messages that look at things and manage them.

Apart from `messages`, whose rules hold here too, so that a container and a program that only calls never load them.
Imported by the server and by the commands that send them. The contract is tested in `tests/unit/test_messages.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from squall.protocol.messages import FunctionSpec, ImageSpec, Message

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
class GetCallGraph(Message):
    """What the inputs of a spawned call have called, and so on. From a client or a runner. `Reply.data`: inputs: [{
    input_id, call_id, idx, status (an OutputStatus, `pending`, `running`), function, container_id, parent (an input
    id)}], parents first; truncated."""

    TAG = "get_call_graph"
    IS_REPEATABLE = True
    call_id: str


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
    IS_REPEATABLE = True


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
    IS_REPEATABLE = True
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


# ---- deployed apps and their functions --------------------------------------------------------------------------
#
# `app` is an id or a name; a name is looked up in `environment`, or in the asker's own when that is empty.


@dataclass(eq=False, repr=False)
class DeployApp(Message):
    """Make a new version of the deployed app of this name, the first one if there is none. Answered once that version
    takes all calls, or with the failure for which the version before goes on serving.

    `Reply.data`: app_id, version, functions (tag -> function id), changes (as in `ListVersions`), notices (sentences).
    """

    TAG = "deploy_app"
    NESTED = {"functions": FunctionSpec}
    name: str
    functions: list[FunctionSpec] = field(default_factory=list)
    environment: str = ""
    tag: str = ""
    """The user's own name of this version."""
    strategy: str = "rolling"
    """`rolling`: containers of the version before end when what they run has ended. `recreate`: soon, come what may."""
    labels: dict[str, str] = field(default_factory=dict)
    git_commit: str = ""
    git_dirty: bool = False
    user: str = ""
    host: str = ""
    follow: bool = False
    """Push `LogChunk` and `Notice` of the app to this connection from the trial on."""


@dataclass(eq=False, repr=False)
class LookupApp(Message):
    """`Reply.data`: app_id, name, state, version, labels. With `create`, a deployed app without functions is made where
    there is none. By id, apps that are not deployed or have stopped are found too."""

    TAG = "lookup_app"
    IS_REPEATABLE = True
    app: str
    environment: str = ""
    create: bool = False


@dataclass(eq=False, repr=False)
class LookupFunction(Message):
    """A function, or class, of a deployed app: of one `version`, or with 0 of whichever takes calls. From a client
    or a runner. `Reply.data`: function_id, app_id, version, is_generator, shape (of a class, else empty)."""

    TAG = "lookup_function"
    IS_REPEATABLE = True
    app: str
    name: str
    environment: str = ""
    version: int = 0


@dataclass(eq=False, repr=False)
class GetApp(Message):
    """`Reply.data`: as a row of `ListObjects` of apps, with labels, version, functions and containers in detail."""

    TAG = "get_app"
    IS_REPEATABLE = True
    app: str
    environment: str = ""


@dataclass(eq=False, repr=False)
class ListVersions(Message):
    """`Reply.data`: `{"rows": [...]}`, the newest first: version, created_at, current, kind (`deploy`, `rollback`,
    `rollover`), from_version, tag, strategy, git_commit, git_dirty, user, host, functions, kept (whether it can be
    gone back to), changes: `{"added": [tag], "removed": [tag], "changed": {tag: [field]}}` against the one before."""

    TAG = "list_versions"
    IS_REPEATABLE = True
    app: str
    environment: str = ""
    limit: int = 50


@dataclass(eq=False, repr=False)
class RedeployApp(Message):
    """A new version with the definition of an earlier one: `kind` `rollback` to `version` (0: the one before), or
    `rollover`, which changes nothing but the containers. `Reply.data` as of `DeployApp`."""

    TAG = "redeploy_app"
    app: str
    kind: str
    version: int = 0
    environment: str = ""
    strategy: str = "rolling"
    user: str = ""
    host: str = ""


@dataclass(eq=False, repr=False)
class SetLabels(Message):
    """Replace an app's labels; with `labels` None only `Reply.data` `{"labels": {...}}`."""

    TAG = "set_labels"
    IS_REPEATABLE = True
    app: str
    environment: str = ""
    labels: dict[str, str] | None = None


@dataclass(eq=False, repr=False)
class UpdateAutoscaler(Message):
    """Lay settings over those a function was deployed with, until its app is deployed again; None takes one away.
    With none given, only looks. `Reply.data`: `{"settings": {name: value}, "overridden": [name]}`."""

    TAG = "update_autoscaler"
    IS_REPEATABLE = True
    function_id: str
    settings: dict[str, int | float | None] = field(default_factory=dict)


@dataclass(eq=False, repr=False)
class GetFunctionStats(Message):
    """Of the inputs that ended within `since` seconds, as far as they are remembered. `Reply.data`: `{"rows": [...]}`,
    one a function: function_id, function, counts by status, running, backlog, containers by state, latency_ms and
    execution_ms (`p50`, `p90`, `p99`, `max`), window_s."""

    TAG = "get_function_stats"
    IS_REPEATABLE = True
    app: str = ""
    function_id: str = ""
    environment: str = ""
    since: float = 3600.0
