"""Every message that crosses a process border, as a plain dataclass, with its encoding and the protocol version.

A frame is `<u32 header length><u32 payload length>` (little endian), a JSON header and raw payload bytes. The
header is one message: its tag under `t`, its fields by name, defaults left out. Rules of the wire:

- Every connection opens with `Hello`, answered by `Welcome` or `Failure`. An unsupported version is refused there.
- A field nobody knows is ignored; a field is never reused for another meaning; a new field has a default.
- `id` is chosen by whoever asks and wants an answer; the answer carries it back as `re`.
- Where a message has `items` with a `size`, the payload is the items' bytes one after the other.

What decorators make is in `specs`, which a program loads before any of this. User data is opaque here: a payload item
is made and read by `protocol.payload` alone. The server decodes with `msgspec` (it validates types); everybody else
uses `decode` below. Tested in `tests/unit/test_messages.py`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from squall.protocol.records import Record, defaults_of, field, record
from squall.protocol.specs import FunctionSpec as FunctionSpec
from squall.protocol.specs import ImageSpec as ImageSpec
from squall.protocol.specs import ImageStep as ImageStep
from squall.protocol.specs import RetryPolicy as RetryPolicy
from squall.protocol.specs import ScheduleSpec as ScheduleSpec

PROTOCOL_VERSION = 1
SUPPORTED_VERSIONS = (1,)

INLINE_LIMIT_BYTES = 1 << 20
"""A payload item above this travels as a blob."""
BLOB_CHUNK_BYTES = 1 << 20
FRAME_LIMIT_BYTES = 64 << 20
"""A frame announcing more than this is refused and its connection closed."""


def new_id(prefix: str) -> str:
    """A fresh id such as `fc-5tq2k7w3n4xr`; 64 random bits, so unguessable enough to name, never to authorise."""
    return f"{prefix}-{os.urandom(8).hex()}"


def input_id(call_id: str, idx: int) -> str:
    """The public id of input `idx` of a call: `in-<call>-<idx>`, derived, so that it costs nothing to make."""
    return f"in-{call_id[3:]}-{idx}"


MESSAGES: dict[str, type[Message]] = {}
"""Tag -> class, of every module of messages that was imported: `wire` of the server imports them all."""


@record
class Message(Record):
    """One message."""

    TAG: ClassVar[str] = ""
    NESTED: ClassVar[dict[str, type]] = {}
    IS_REPEATABLE: ClassVar[bool] = False
    """A request that may be sent again when the connection was lost before its answer: twice is as good as once."""
    IS_FLEETING: ClassVar[bool] = False
    """Without an answer, and of no use to another connection than the one it was meant for."""
    id: int = field(default=0, kw_only=True)
    re: int = field(default=0, kw_only=True)

    def __init_subclass__(cls) -> None:
        if "TAG" in cls.__dict__:  # one that is only made of another message is none
            MESSAGES[cls.TAG] = cls


# ---- opening, answers -------------------------------------------------------------------------------------------


@record
class Hello(Message):
    """First frame of every connection. `role` is `client`, `agent` or `runner`."""

    TAG = "hello"
    role: str
    version: int = PROTOCOL_VERSION
    token: str = ""
    python: str = ""
    prefix: str = ""
    """`sys.prefix` of the sender: `Image.host()` shows the packages of the server's Python, so they must agree."""
    container_id: str = ""
    workspace: str = ""
    """Whose objects the client wants to see; empty: that of its token, or `main` on the machine's own socket."""
    environment: str = ""
    """Which environment of it; empty: `main`."""
    client_id: str = ""
    """Random, the same in all connections of a client: by it a client that comes back is known."""
    patience: float = 0.0
    """Seconds for which this client tries to come back when its connection breaks; 0: it does not."""
    received: int = 0
    """How many `Outputs` and `LogChunk` of this server have come to the client."""


@record
class Welcome(Message):
    """The answer to `Hello`."""

    TAG = "welcome"
    server_id: str
    version: int = PROTOCOL_VERSION
    pid: int = 0
    heartbeat: float = 0.0
    """Seconds between two `Ping` that each side sends, asked for no answer, on a connection from elsewhere; 0: none.
    Who hears nothing at all for three of them takes the other for dead."""
    stays: bool = False
    """It was started to stay: when it is gone, whoever started it will bring it back, not a client."""
    resumed: bool = False
    """It knows the client, and goes on where its last connection broke: `Outputs` and `LogChunk` are counted on."""


@record
class Ending(Message):
    """The server ends, so the connection will. `returns`: another takes its place, and clients may wait for it."""

    TAG = "ending"
    reason: str = ""
    returns: bool = True


@dataclass(eq=False, repr=False)
class Reply(Message):
    """A request's success; `data` is what the request's docstring says."""

    TAG = "reply"
    data: dict[str, Any] = dataclasses.field(default_factory=dict)


@record
class Failure(Message):
    """A request's failure; `code` names the class in `squall.exception`, the texts are for people."""

    TAG = "failure"
    code: str
    message: str
    hint: str = ""


@dataclass(eq=False, repr=False)
class Ping(Message):
    """Answered by an empty `Reply` where it has an `id`; proof of life on an idle connection. `received`: as in
    `Hello`, so that the server need not keep for a broken connection what has come."""

    TAG = "ping"
    received: int = 0


# ---- apps -------------------------------------------------------------------------------------------------------


@record
class CreateApp(Message):
    """Make an app and its functions. `Reply.data`: `{"app_id": str, "functions": {tag: function_id}}`.

    An app that is not `detach` lives as long as the connection that made it (plus a short grace).
    """

    TAG = "create_app"
    IS_REPEATABLE = True
    NESTED = {"functions": FunctionSpec}
    name: str
    functions: list[FunctionSpec] = field(default_factory=list)
    detach: bool = False
    follow: bool = True
    """Push `LogChunk` and `Notice` of the app to this connection."""
    app_id: str = ""
    """Chosen by the client, which names it again when it comes back after its connection or the server was lost: then
    the app goes on, with the function ids it had. Empty: the server chooses."""
    terminal: str = ""
    """The TERM of the terminal that the app's containers may ask this connection for (`Interact`); empty: none."""


@record
class BindFunction(Message):
    """Find, or make, the variant of a function that has other options, or of a class that has these parameters: a pool
    of its own. From a client or a runner. `Reply.data`: `{"function_id": str}`, the same for whoever asks for the same.

    The payload are the parameters, packed by the SDK for the runner and opaque in between; none for a function.
    """

    TAG = "bind_function"
    IS_REPEATABLE = True
    function_id: str
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of its `FunctionSpec`; variables in `env` are laid over those it has."""


@record
class StopApp(Message):
    """End an app: cancel its inputs, stop its containers. `Reply.data`: `{}` once all its containers are gone and
    their last output was pushed. `app` is an id or a name."""

    TAG = "stop_app"
    IS_REPEATABLE = True
    app: str
    reason: str = "stopped by the caller"


@dataclass(eq=False, repr=False)
class LogChunk(Message):
    """Raw output of a container; the payload is the bytes, never cut inside a UTF-8 character where avoidable."""

    TAG = "log"
    app_id: str
    container_id: str
    function: str
    stream: str
    """`stdout`, `stderr` or `system`."""
    at: float = 0.0


@record
class Notice(Message):
    """Something a person following the app wants to know.

    `kind`: `container` (`data`: container_id, function, state, reason), `stopped` (the app ended by someone else's
    hand; reason), `waiting` (inputs of `function` cannot be placed; reason), `backoff` (containers of `function`
    keep dying; reason), `warning` (a protection that is missing on a node; reason),
    `stats` (of `function`, a few times a second while they change: queued, running, done, failed, containers).
    """

    TAG = "notice"
    app_id: str
    kind: str
    data: dict[str, Any] = field(default_factory=dict)


# ---- images -----------------------------------------------------------------------------------------------------


@record
class BuildImage(Message):
    """Build what of an image's layers is missing. From a client: `BuildOutput` pushes follow while layers are built,
    then `Reply.data`: `{"image_id": str, "built": number of layers}`. From the server to an agent,
    which answers with `BuildDone`. `secrets`: values for the steps that ask for some, by the step's number from 1; they
    are part of no recipe and kept by nobody. `for_app`: an app that uses it follows, so it stays until then."""

    TAG = "build_image"
    IS_REPEATABLE = True
    NESTED = {"image": ImageSpec}
    image: ImageSpec
    secrets: dict[str, dict[str, str]] = field(default_factory=dict)
    for_app: bool = False


@record
class BuildOutput(Message):
    """What a build has to say. `kind`: `step` (`text` is the step that begins), `output` (the payload is what its
    command wrote), `done` (the step ended; `text` says how long it took)."""

    TAG = "build_output"
    image_id: str
    kind: str
    text: str = ""
    step: int = 0


@record
class GetImage(Message):
    """`image_id` may be the beginning of one. `Reply.data`: image_id, state, steps, layers (as in `BuildDone`),
    size_bytes, created_at, used_at, error, recipe (the steps), in_use."""

    TAG = "get_image"
    IS_REPEATABLE = True
    image_id: str


# ---- calls ------------------------------------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class InputItem(Record):
    """One set of arguments. Its bytes are `size` of the payload, or the blob named by `blob` when size is 0."""

    idx: int
    size: int = 0
    blob: str = ""


@dataclass(eq=False, repr=False)
class Submit(Message):
    """Add inputs to a call (made by the first `Submit` that names it). Repeating an `idx` is harmless.

    With `id` set, `Reply.data` is `{}` once the inputs are accepted, which for `kind="spawn"` means: on disk.
    `kind`: `remote` (results are pushed to this connection as `Outputs`), `map` (the same, many), `gen` (as remote;
    yields come as `Outputs` items of status `yield`), `spawn` (kept for `GetOutput`).
    """

    TAG = "submit"
    IS_REPEATABLE = True
    NESTED = {"items": InputItem}
    call_id: str
    function_id: str
    items: list[InputItem]
    kind: str = "remote"
    parent: str = ""
    """Input id of the caller when it runs in a container."""
    sent_at: float = 0.0
    """Caller's wall clock at `.remote()`, for the timeline."""
    last: bool = True
    """No further `Submit` of this call follows."""
    method: str = ""
    """Which of `FunctionSpec.methods`, for a class."""
    key: str = ""
    """With `kind="spawn"`: if a call was made under this key within 7 days, that call is meant and nothing is added;
    `Reply.data` is `{"call_id": str}`. `digest` stands for the arguments: other ones under the same key are refused."""
    digest: str = ""


@dataclass(eq=False, repr=False)
class OutputItem(Record):
    """One result, or one yielded value. `status` is an OutputStatus or `yield`; `seq` counts the yields."""

    call_id: str
    idx: int
    status: str
    size: int = 0
    blob: str = ""
    seq: int = 0
    attempt: int = 0
    message: str = ""
    """For people, where there is no payload: what happened (`lost`, `timeout`, `rejected`, ...)."""
    hint: str = ""
    code: str = ""
    """Of `rejected`: which class in `squall.exception`; empty for a limit that was reached."""
    started_at: float = 0.0
    finished_at: float = 0.0


@dataclass(eq=False, repr=False)
class Outputs(Message):
    """Results: runner to server, and server to the caller's connection."""

    TAG = "outputs"
    NESTED = {"items": OutputItem}
    items: list[OutputItem]


@dataclass(eq=False, repr=False)
class YieldCredit(Message):
    """The consumer of a generator took `n` values; the runner keeps at most `YIELD_WINDOW` untaken ones in flight."""

    TAG = "yield_credit"
    IS_FLEETING = True
    call_id: str
    idx: int
    n: int


YIELD_WINDOW = 256


@record
class CancelCall(Message):
    """Cancel inputs of a call: those named, or all. Finished ones stay finished. `Reply.data`: `{"cancelled": n}`."""

    TAG = "cancel_call"
    IS_REPEATABLE = True
    IS_FLEETING = True
    call_id: str
    idxs: list[int] = field(default_factory=list)
    terminate_containers: bool = False


@dataclass(eq=False, repr=False)
class GetOutput(Message):
    """Wait for one output of a spawned call. `Reply` with `data={"ready": false}` when `timeout` (seconds; negative:
    as long as the connection) passed, else `data={"ready": true, "item": OutputItem as dict}` and its payload."""

    TAG = "get_output"
    IS_REPEATABLE = True
    call_id: str
    idx: int = 0
    timeout: float = -1.0


@record
class GetCall(Message):
    """`Reply.data`: call_id, function_id, function, app_id, kind, state, num_inputs, created_at, counts by state."""

    TAG = "get_call"
    IS_REPEATABLE = True
    call_id: str


@record
class GetStats(Message):
    """`Reply.data`: backlog, num_total_runners, num_running_inputs, input_headroom of a function."""

    TAG = "get_stats"
    IS_REPEATABLE = True
    function_id: str


# ---- server and runner ------------------------------------------------------------------------------------------


@record
class Load(Message):
    """First message to a runner, after the host's check: what to import. Answered by `Loaded`. The payload are the
    parameters of a class, as `BindFunction` brought them."""

    TAG = "load"
    NESTED = {"spec": FunctionSpec}
    app_id: str
    app_name: str
    function_id: str
    container_id: str
    spec: FunctionSpec
    functions: dict[str, str] = field(default_factory=dict)
    """tag -> function id of the whole app, so that its handles work inside."""
    generators: list[str] = field(default_factory=list)
    terminal: str = ""
    """As in `CreateApp`."""
    environment: str = "main"
    """Name of the environment that its app is in."""


@record
class Loaded(Message):
    """User code is imported and a class's enter hooks have run, `ok`, or the payload is the packed exception.
    `steps`: name -> milliseconds."""

    TAG = "loaded"
    ok: bool = True
    message: str = ""
    hint: str = ""
    steps: dict[str, float] = field(default_factory=dict)


@dataclass(eq=False, repr=False)
class RunItem(Record):
    """An input for a runner."""

    call_id: str
    idx: int
    size: int = 0
    blob: str = ""
    attempt: int = 0
    method: str = ""


@dataclass(eq=False, repr=False)
class Run(Message):
    """Inputs for a runner."""

    TAG = "run"
    NESTED = {"items": RunItem}
    items: list[RunItem]


@record
class CancelRun(Message):
    """Raise `InputCancellation` in a running input; answered by its `Outputs` item with status `cancelled`."""

    TAG = "cancel_run"
    call_id: str
    idx: int


@record
class StopRunner(Message):
    """Take nothing more; run exit hooks; exit within `grace` seconds."""

    TAG = "stop_runner"
    grace: float = 30.0
    reason: str = ""
    cancel: bool = False
    """What it runs is over already: raise `InputCancellation` there, so that the hooks have the time."""


# ---- blobs ------------------------------------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class PutBlob(Message):
    """One chunk (the payload) of a blob being uploaded. `last` seals it: the server checks size and digest, then
    answers. A digest is `blake2b` with 32 bytes, hex. `Reply.data`: `{}`."""

    TAG = "put_blob"
    digest: str
    offset: int = 0
    last: bool = True


@record
class HasBlobs(Message):
    """`Reply.data`: `{"missing": [digest, ...]}`, and `parts`: digest -> bytes that are there of one whose upload broke
    off, after which a `PutBlob` may go on."""

    TAG = "has_blobs"
    IS_REPEATABLE = True
    digests: list[str]


@dataclass(eq=False, repr=False)
class GetBlob(Message):
    """`Reply.data`: `{"size": whole size}`; the payload is up to BLOB_CHUNK_BYTES from `offset`.

    `suspect`: other bytes came than the digest names. The server looks at what it has, and fails if that is damaged."""

    TAG = "get_blob"
    IS_REPEATABLE = True
    digest: str
    offset: int = 0
    suspect: bool = False


# ---- server and agent -------------------------------------------------------------------------------------------


@record
class Register(Message):
    """An agent's first message after `Hello`: the machine. `Reply.data`: `{"node_id": str}`, and `sockets`, the
    containers whose runners need another socket, where the server has not given up what the agent had: else all do."""

    TAG = "register"
    hostname: str
    cpus: float
    memory_mib: int
    gpus: list[dict[str, Any]] = field(default_factory=list)
    """Each `{"index": int, "uuid": str, "type": "H100", "memory_mib": int}`."""
    runtime: str = ""
    warnings: list[str] = field(default_factory=list)
    """Protections that are missing here, in sentences."""
    handoff: bool = True
    """The agent passes runner sockets by SCM_RIGHTS on the hand-over socket."""
    agent_id: str = ""
    """Random, the same for as long as the agent lives: by it a node that comes back is known."""


@record
class ContainerSpec(Record):
    """What a node must know to make a container. No environment and no secret: those go to the runner alone."""

    NESTED: ClassVar[dict[str, type]] = {"image": ImageSpec}

    container_id: str
    workspace: str = "main"
    image: ImageSpec = field(default_factory=ImageSpec)
    source: str = ""
    source_parts: list[str] = field(default_factory=list)
    cpu: float = 0.125
    cpu_limit: float = 0.0
    memory_mib: int = 128
    memory_limit_mib: int = 0
    gpus: list[int] = field(default_factory=list)
    network: bool = True
    pids_limit: int = 4096
    hostname: str = ""
    function_id: str = ""


@record
class StartContainer(Message):
    """Make a container. No answer: `ContainerEvent`s follow, `exited` at the latest."""

    TAG = "start_container"
    NESTED = {"spec": ContainerSpec}
    spec: ContainerSpec


@record
class StopContainer(Message):
    """End a container: SIGTERM now, SIGKILL after `grace` seconds (0: at once). Harmless when it is gone.

    From a client: `Reply.data` `{}`, or a `Failure` when it is unknown.
    """

    TAG = "stop_container"
    container_id: str
    grace: float = 0.0
    reason: str = ""


@dataclass(eq=False, repr=False)
class ContainerEvent(Message):
    """What became of a container. `state`: `starting` (it stands and passed the host's check) or `exited`.

    `steps`: name -> milliseconds, in order, of how it was made. On `exited`: `exit_code` (128+n for signal n, -1
    unknown), `oom`, `reason` in a sentence, and `usage` (cpu_seconds, memory_peak_bytes).
    """

    TAG = "container_event"
    container_id: str
    state: str
    at: float = 0.0
    steps: dict[str, float] = dataclasses.field(default_factory=dict)
    exit_code: int = -1
    oom: bool = False
    reason: str = ""
    usage: dict[str, float] = dataclasses.field(default_factory=dict)
    pid: int = 0


@dataclass(eq=False, repr=False)
class ContainerOutput(Message):
    """Bytes (the payload) a container wrote to `stdout` or `stderr`; `eof` closes that stream."""

    TAG = "container_output"
    container_id: str
    stream: str
    eof: bool = False
    dropped_bytes: int = 0


@record
class NodeReport(Message):
    """Every few seconds: the machine's and each container's use. `containers`: id -> {cpu_seconds, memory_bytes}."""

    TAG = "node_report"
    containers: dict[str, dict[str, float]] = field(default_factory=dict)
    zygotes: list[dict[str, Any]] = field(default_factory=list)
    layers: dict[str, int] = field(default_factory=dict)
    """Key -> bytes of every image layer the node keeps; sent when that has changed."""


# ---- exec (client -> server -> agent, bytes back the same way) --------------------------------------------------


@record
class StartExec(Message):
    """Run `argv` in a container. `Reply.data`: `{"exec_id": str}`; then `ExecData` both ways, `ExecExit` last."""

    TAG = "start_exec"
    container_id: str
    argv: list[str]
    exec_id: str = ""
    pty: bool = False
    rows: int = 24
    cols: int = 80
    workdir: str = ""


@record
class ExecData(Message):
    """Bytes of an exec: `stdin` toward it (`eof` closes), `stdout`/`stderr` from it; `resize` uses rows, cols. `stdin`
    from it brings no bytes but `credit`: how many it has taken. At most EXEC_WINDOW_BYTES may be on their way to it."""

    TAG = "exec_data"
    exec_id: str
    stream: str
    eof: bool = False
    rows: int = 0
    cols: int = 0
    credit: int = 0


EXEC_WINDOW_BYTES = 1 << 20


@record
class ExecExit(Message):
    """A command has ended."""

    TAG = "exec_exit"
    exec_id: str
    code: int
    message: str = ""


@record
class Interact(Message):
    """From a runner: its user code wants the terminal of who runs the app. `Reply.data`: `{"exec_id", "rows", "cols"}`
    once it has it; then `ExecData` both ways, and `ExecExit` from whoever ends it.

    To that client: lend it, and say so by an `ExecData` `resize`; or, without `exec_id`, this container has to wait.
    """

    TAG = "interact"
    app_id: str = ""
    container_id: str = ""
    function: str = ""
    exec_id: str = ""


M = TypeVar("M")
_FIELDS: dict[type, tuple[frozenset[str], dict[str, type]]] = {}


def _shape(cls: type) -> tuple[frozenset[str], dict[str, type]]:
    shape = _FIELDS.get(cls)
    if shape is None:
        shape = _FIELDS[cls] = (frozenset(defaults_of(cls)), getattr(cls, "NESTED", {}))
    return shape


def build(cls: type[M], data: dict[str, Any]) -> M:
    """Make a dataclass from decoded JSON; fields it does not know are ignored, nested specs are built too."""
    names, nested = _FIELDS.get(cls) or _shape(cls)
    if not names.issuperset(data):
        data = {key: value for key, value in data.items() if key in names}
    for key, inner in nested.items():
        value = data.get(key)
        if type(value) is list:
            data = {**data, key: [build(inner, entry) for entry in value]}
        elif type(value) is dict:
            data = {**data, key: build(inner, value)}
    return cls(**data)


_DEFAULTS: dict[type, list[tuple[str, Any]]] = {}


def to_dict(value: Any) -> dict[str, Any]:
    """A dataclass's fields that differ from their defaults; also the `default=` of the JSON encoder."""
    cls = type(value)
    defaults = _DEFAULTS.get(cls)
    if defaults is None:
        defaults = _DEFAULTS[cls] = list(defaults_of(cls).items())
    # Not `vars(value)`: msgspec leaves a field at its default where the class has it, outside the instance.
    return {name: found for name, default in defaults if (found := getattr(value, name)) != default}


_decoder = json.JSONDecoder()
_encoder = json.JSONEncoder(separators=(",", ":"), default=to_dict, check_circular=False)


def encode_header(message: Message) -> bytes:
    """The tag comes first: the server picks its typed decoder by it without parsing twice."""
    return _encoder.encode({"t": message.TAG, **to_dict(message)}).encode()


def encode(message: Message, payload: bytes = b"") -> bytes:
    """The whole frame."""
    header = encode_header(message)
    return len(header).to_bytes(4, "little") + len(payload).to_bytes(4, "little") + header + payload


def encode_output(out: OutputItem) -> bytes:
    """The header of an `Outputs` with one item, which is what a runner sends for each input: the same bytes for less.

    `call_id` came from the server, which has checked it; what is free text goes the general way.
    """
    if out.blob or out.message or out.hint:
        return encode_header(Outputs([out]))
    return (
        f'{{"t":"outputs","items":[{{"call_id":"{out.call_id}","idx":{out.idx},"status":"{out.status}",'
        f'"size":{out.size},"seq":{out.seq},"attempt":{out.attempt},"started_at":{out.started_at!r},'
        f'"finished_at":{out.finished_at!r}}}]}}'
    ).encode()


def decode(header: bytes | bytearray | memoryview) -> Message:
    """A message from a frame's header. Raises ValueError on anything that is not one."""
    text = bytes(header).decode()
    data, end = _decoder.raw_decode(text)  # `loads` first looks for other encodings, and for spaces around it
    if type(data) is not dict or end != len(text):
        raise ValueError("frame header is not a JSON object")
    cls = MESSAGES.get(data.pop("t", None))
    if cls is None:
        raise ValueError("frame header names no known message")
    try:
        return build(cls, data)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"message `{cls.TAG}`: {error}") from None


SLICE_BYTES = 1 << 14
"""An item of a large payload from here on stays in it; a smaller one is copied, and does not keep the rest alive."""


def split_payload(items: list[Any], payload: Any) -> list[Any]:
    """The bytes of each of a message's `items`, in order. Raises ValueError when the sizes do not add up."""
    parts: list[Any] = []
    offset = 0
    in_place = type(payload) is memoryview
    for item in items:
        size = item.size
        if size < 0:
            raise ValueError(f"an item announces {size} bytes")
        part = payload[offset : offset + size]
        parts.append(bytes(part) if in_place and size < SLICE_BYTES else part)
        offset += size
    if offset != len(payload):
        raise ValueError(f"payload has {len(payload)} bytes, its items announce {offset}")
    return parts
