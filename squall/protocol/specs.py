"""Specs: what an app says of its functions and images before anything runs. Part of the contract with `messages`.

Apart from it, because decorators make them: a program that only defines an app loads these, and nothing of the wire.
They travel inside messages, by the same rules: a new field has a default. Tested in `tests/unit/test_messages.py`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from squall.protocol.records import Record, field, record


@record
class RetryPolicy(Record):
    """When a failed attempt is followed by another."""

    max_retries: int = 0
    backoff_coefficient: float = 1.0
    initial_delay: float = 1.0
    max_delay: float = 60.0


@record
class ImageStep(Record):
    """One step of an image's recipe; `protocol.images` says what each kind's `args` hold."""

    kind: str
    args: dict[str, Any] = field(default_factory=dict)
    blob: str = ""
    """Digest of what the step reads: a tar of files, a pickled function; else empty."""
    force: bool = False
    """Build it, and all after it, even where a layer of the same key exists."""


@record
class ImageSpec(Record):
    """`kind` is `host` (the node's system directories and the Python environment Squall runs with) or `layers`
    (what `steps` build). `image_id` follows from these, once built; whose layers, by `workspace`, the server says."""

    NESTED: ClassVar[dict[str, type]] = {"steps": ImageStep}

    kind: str = "host"
    steps: list[ImageStep] = field(default_factory=list)
    image_id: str = ""
    workspace: str = ""


@record
class ScheduleSpec(Record):
    """When a deployed function, or the `method` of a class, is called without arguments: by a cron expression in a
    time zone, or every `period`, which is unit (`years` to `seconds`) -> number."""

    cron: str = ""
    timezone: str = "UTC"
    period: dict[str, float] = field(default_factory=dict)
    method: str = ""


@record
class FunctionSpec(Record):
    """All that the platform must know to run one function. Sent once in `CreateApp`."""

    NESTED: ClassVar[dict[str, type]] = {"retries": RetryPolicy, "image": ImageSpec, "schedules": ScheduleSpec}

    tag: str
    module: str = ""
    """Import name of the module in the container; empty for a function sent by value."""
    qualname: str = ""
    serialized_blob: str = ""
    """Digest of the function pickled by value (cloudpickle), else empty."""
    source: str = ""
    """Digest of the source bundle to mount, else empty."""
    source_parts: list[str] = field(default_factory=list)
    """Of a bundle that comes in several tars their digests; `source` is then that of these, a line each."""
    main_alias: bool = False
    """The module was the caller's `__main__`: alias it so that values pickled under either name load."""
    python: str = ""
    """`3.11` of the caller; by-value functions need the same minor version."""
    image: ImageSpec = field(default_factory=ImageSpec)
    cpu: float = 0.125
    cpu_limit: float = 0.0
    """0: request + 16 cores."""
    memory_mib: int = 128
    memory_limit_mib: int = 0
    """0: no limit of its own (the node's containers together are still limited)."""
    gpu: list[str] = field(default_factory=list)
    """Fallbacks in order, each `TYPE` or `TYPE:N`; empty for none."""
    env: dict[str, str] = field(default_factory=dict)
    """Plain environment and values given in the program, merged in order; reaches only the runner, after the host's
    check."""
    secrets: list[str] = field(default_factory=list)
    """Names of secrets that the server keeps, `NAME` or `ENVIRONMENT/NAME`. It lays `env` over their values when a
    container is loaded."""
    secret_keys: dict[str, list[str]] = field(default_factory=dict)
    """Keys that such a secret must have."""
    timeout: float = 300.0
    startup_timeout: float = 300.0
    retries: RetryPolicy = field(default_factory=RetryPolicy)
    min_containers: int = 0
    max_containers: int = 0
    """0: no limit of its own."""
    buffer_containers: int = 0
    scaledown_window: float = 60.0
    single_use: bool = False
    block_network: bool = False
    is_generator: bool = False
    is_async: bool = False
    concurrency: int = 1
    """Inputs that a container runs at a time, or batches of them."""
    target_concurrency: int = 0
    """How many of them the autoscaler aims at; 0: as many as there may be."""
    batch_size: int = 0
    """Inputs of one call, at most; 0: each is a call."""
    batch_wait: float = 0.0
    """Seconds that a batch waits to be full."""
    methods: list[str] = field(default_factory=list)
    """Of a class: the methods that inputs may name. Empty for a function."""
    parameters: list[str] = field(default_factory=list)
    """Names of a class's parameters. With any, inputs go to the pools that `BindFunction` makes, never to this one."""
    shape: dict[str, Any] = field(default_factory=dict)
    """Of a class: what the SDK must know to make handles of it where its code is not; opaque in between."""
    exit_grace: float = 0.0
    """Seconds that a class's exit hooks are given; 0: it has none."""
    schedules: list[ScheduleSpec] = field(default_factory=list)
    """At most one of a function, and of each method of a class."""
