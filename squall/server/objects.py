"""Apps and their functions: what exists, who owns it, what state it is in; and their rows in the Store.

The truth of a running app is in memory, since it ends with the server; the Store keeps its history. Specs are stored
without environment values, which may be secrets. Tested in `tests/integration/test_apps.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from squall.exception import InvalidError, NotFoundError, ResourceExhaustedError
from squall.protocol.messages import CreateApp, FunctionSpec, new_id
from squall.protocol.states import AppState
from squall.server.database import Database
from squall.server.dispatch import FunctionOptions
from squall.server.scheduler import parse_gpu

GPU = re.compile(r"[A-Za-z0-9_!-]{1,60}(:[1-9][0-9]{0,3})?")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
HISTORY_LIMIT = 200
VARIANT_LIMIT = 1000
"""Variants of all functions of one app: each is a pool that the periodic round looks at."""
PARAMETERS_LIMIT_BYTES = 64 << 10
OPTIONS_LIMIT_BYTES = 128 << 10
METHOD_LIMIT = 500


class Scope(NamedTuple):
    """Whose objects are meant: names are unique within one, and nothing of another is ever found."""

    workspace: str = "main"
    environment: str = "main"


MAIN = Scope()


@dataclass(eq=False)
class AppRecord:
    app_id: str
    name: str
    detached: bool
    created_at: float
    owner: Any
    """The connection that made it, or None once that is gone."""
    functions: dict[str, FunctionRecord] = field(default_factory=dict)
    """By tag."""
    variants: dict[str, FunctionRecord] = field(default_factory=dict)
    """By id: pools made later, by `BindFunction`."""
    followers: set[Any] = field(default_factory=set)
    resume_until: float = 0.0
    """Monotonic: until then it waits for its client to come back."""
    state: AppState = "running"
    stopped_at: float = 0.0
    reason: str = ""
    terminal: str = ""
    """The TERM of its owner's terminal, when containers may ask for it."""
    scope: Scope = MAIN

    def pools(self) -> list[FunctionRecord]:
        """All that may have containers."""
        return [*self.functions.values(), *self.variants.values()]


@dataclass(eq=False)
class FunctionRecord:
    function_id: str
    """Of the pool, which belongs to one version of the app."""
    app: AppRecord
    spec: FunctionSpec
    stable_id: str = ""
    """What its callers name: the same in every version. Of an app without versions it is the pool's own."""
    root: FunctionRecord | None = None
    """Of a variant: what it was made from, with `options` and `parameters`."""
    options: dict[str, Any] = field(default_factory=dict)
    parameters: bytes = b""
    progress: tuple[int, float] = (-1, 0.0)
    """Inputs that had ended, and since when it is that many; -1 until it was first looked at."""
    told_stalled: bool = False
    told_stats: dict[str, int] = field(default_factory=dict)
    """What its followers were last told."""


def options_of(function: FunctionRecord) -> FunctionOptions:
    spec = function.spec
    retries = spec.retries
    needs_parameters = bool(spec.parameters) and function.root is None
    return FunctionOptions(
        timeout=spec.timeout,
        startup_timeout=spec.startup_timeout,
        max_retries=retries.max_retries,
        backoff_coefficient=retries.backoff_coefficient,
        initial_delay=retries.initial_delay,
        max_delay=retries.max_delay,
        min_containers=0 if needs_parameters else spec.min_containers,
        max_containers=spec.max_containers,
        buffer_containers=spec.buffer_containers,
        scaledown_window=spec.scaledown_window,
        single_use=spec.single_use,
        concurrency=slots_of(spec),
        target=spec.target_concurrency * max(1, spec.batch_size),
        is_generator=spec.is_generator,
    )


def slots_of(spec: FunctionSpec) -> int:
    """Inputs that a container of the function may hold."""
    return spec.concurrency * max(1, spec.batch_size)


class Objects:
    def __init__(self, database: Database) -> None:
        self.database = database
        self.apps: dict[str, AppRecord] = {}
        self.functions: dict[str, FunctionRecord] = {}
        """Every pool by its own id, those of versions that are ending included."""
        self._callable: dict[str, FunctionRecord] = {}
        """By what callers name: the pool that takes their inputs now."""
        self._recalled = False

    def create_app(self, message: CreateApp, owner: Any, now_wall: float, scope: Scope = MAIN) -> AppRecord:
        if not NAME.fullmatch(message.name):
            raise InvalidError(
                f"app name `{message.name[:80]}` is not valid",
                hint="use 1 to 64 letters, digits, `-`, `_` and `.`, beginning with a letter or digit",
            )
        app = AppRecord(message.app_id or new_id("ap"), message.name, message.detach, now_wall, owner, scope=scope)
        app.terminal = message.terminal[:100]
        for spec in message.functions:
            check_spec(spec)
            if spec.tag in app.functions:
                raise InvalidError(f"app `{message.name}` has two functions named `{spec.tag}`")
            function_id = stable_id_of(app.app_id, spec.tag)
            app.functions[spec.tag] = FunctionRecord(function_id, app, spec, function_id)
        self.apps[app.app_id] = app
        for function in app.functions.values():
            self._admit(function)
        self._record(app)
        return app

    def _admit(self, function: FunctionRecord) -> None:
        """From now on it takes what its callers send."""
        self.functions[function.function_id] = self._callable[function.stable_id] = function

    def _dismiss(self, function: FunctionRecord) -> None:
        """Forget a pool, and what callers name unless another has taken its place."""
        self.functions.pop(function.function_id, None)
        if self._callable.get(function.stable_id) is function:
            del self._callable[function.stable_id]

    def bind(
        self, function_id: str, options: dict[str, Any], parameters: bytes, *, trusted: bool, scope: Scope = MAIN
    ) -> FunctionRecord:
        """The variant of a function with these options and parameters, made when there is none yet. Its id follows
        from what it is, so that all who ask for the same share its containers.

        Not `trusted`: a container asks, which may not get out of a network policy this way."""
        asked = self.function(function_id, scope)
        root = asked.root or asked
        if asked.root is not None:
            options = _laid_over(asked.options, options)
            parameters = parameters or asked.parameters
        check_parameters(root.spec, parameters)
        if not options and not parameters:
            return root
        check_options_size(root.spec, options)
        spec = variant_spec(root.spec, options)
        if not trusted and root.spec.block_network and not spec.block_network:
            raise InvalidError(f"function `{spec.tag}`: a container cannot lift `block_network`")
        if not trusted and set(spec.secrets) - set(root.spec.secrets):
            raise InvalidError(
                f"function `{spec.tag}`: a container cannot ask for secrets that the function does not name",
                hint="name them in `@app.function(secrets=...)`, or call `with_options` in your program",
            )
        made_id = variant_id(root, options, parameters)
        variant = FunctionRecord(made_id, root.app, spec, made_id, root, options, parameters)
        app = root.app
        known = app.variants.get(variant.function_id)
        if known is not None:
            return known
        if len(app.variants) >= VARIANT_LIMIT:
            raise ResourceExhaustedError(
                f"app `{app.name}` has {VARIANT_LIMIT} pools made by parameters and `with_options`",
                hint="each distinct set of values is a pool of its own: pass what changes often as an argument instead",
            )
        app.variants[variant.function_id] = variant
        self._admit(variant)
        self._record_functions([variant])
        return variant

    def _record(self, app: AppRecord) -> None:
        row = {
            "app_id": app.app_id,
            "name": app.name,
            "state": app.state,
            "detached": app.detached,
            "created_at": app.created_at,
        }

        def work(connection: Any) -> None:
            from squall.server import tables

            # An app that comes back after a restart has its row.
            connection.execute(tables.apps.delete().where(tables.apps.c.app_id == row["app_id"]))
            connection.execute(tables.apps.insert(), row)

        self.database.write_soon(work)
        self._record_functions(list(app.functions.values()))

    def _record_functions(self, functions: list[FunctionRecord]) -> None:
        rows = [
            {"function_id": f.function_id, "app_id": f.app.app_id, "tag": f.spec.tag, "spec": _storable(f.spec)}
            for f in functions
        ]

        def work(connection: Any) -> None:
            from squall.server import tables

            table = tables.functions
            for row in rows:
                connection.execute(table.delete().where(table.c.function_id == row["function_id"]))
            if rows:
                connection.execute(table.insert(), rows)

        self.database.write_soon(work)

    def set_stopped(self, app: AppRecord, now_wall: float) -> None:
        app.state, app.stopped_at = "stopped", now_wall
        for function in app.pools():
            self._dismiss(function)
        app_id, reason = app.app_id, app.reason
        self._trim()

        def work(connection: Any) -> None:
            from squall.server import tables

            table = tables.apps
            values = {"state": "stopped", "stopped_at": now_wall, "reason": reason}
            connection.execute(table.update().where(table.c.app_id == app_id).values(values))

        self.database.write_soon(work)

    def _trim(self) -> None:
        """Keep the newest stopped apps in memory, for their logs and traces."""
        stopped = [app for app in self.apps.values() if app.state == "stopped"]
        for app in stopped[: max(0, len(stopped) - HISTORY_LIMIT)]:
            del self.apps[app.app_id]

    def find_app(self, ref: str, scope: Scope = MAIN) -> AppRecord:
        """By id, or by name: the running one of that name, else the newest."""
        by_id = self.apps.get(ref)
        if by_id is not None and by_id.scope.workspace == scope.workspace:
            return by_id
        here = [app for app in self.apps.values() if app.scope == scope]
        named = [app for app in here if app.name == ref]
        if not named:
            known = sorted({app.name for app in here})
            hint = f"apps: {', '.join(known[:10])}" if known else "no app was run on this server yet"
            raise NotFoundError(f"no app `{ref[:80]}`", hint=hint)
        return next((app for app in named if app.state == "running"), named[-1])

    async def recall(self) -> None:
        """Fill the history with the newest apps of earlier servers, for whoever looks back. Once."""
        if self._recalled:
            return
        self._recalled = True

        def work(connection: Any) -> list[Any]:
            from squall.server import tables

            table = tables.apps
            query = table.select().order_by(table.c.created_at.desc()).limit(HISTORY_LIMIT)
            return list(connection.execute(query))

        past: dict[str, AppRecord] = {}
        for row in reversed(await self.database.read(work)):
            if row.app_id not in self.apps:
                app = past[row.app_id] = AppRecord(row.app_id, row.name, row.detached, row.created_at, None)
                app.state, app.stopped_at = "stopped", row.stopped_at or 0.0
                app.reason = row.reason or "its server ended"
        self.apps = {**past, **self.apps}

    def find_function(self, function_id: str) -> FunctionRecord | None:
        """As `function`, in any workspace: for what was let in before."""
        return self._callable.get(function_id)

    def function(self, function_id: str, scope: Scope = MAIN) -> FunctionRecord:
        """The pool that takes the inputs of whoever names this id. An id is good in its whole workspace: it was
        looked up by name in one environment, and may be called from another."""
        record = self._callable.get(function_id)
        if record is None or record.app.scope.workspace != scope.workspace:
            for app in self.apps.values():  # only what fails pays for the search
                for known in app.pools() if app.scope.workspace == scope.workspace else ():
                    if known.function_id == function_id:
                        raise has_ended(known)
            raise NotFoundError(f"no running function `{function_id[:80]}`", hint="its app may have been stopped")
        return record


def has_ended(function: FunctionRecord) -> NotFoundError:
    app = function.app
    why = f" ({app.reason})" if app.reason else ""
    return NotFoundError(
        f"function `{function.spec.tag}` has ended with its app `{app.name}`{why}",
        hint="run the app again: a function can be called while its app runs",
    )


def stable_id_of(app_id: str, tag: str) -> str:
    """What callers of a function name, in whichever version of the app and after whichever restart."""
    return _function_id(app_id, tag)


def _function_id(*parts: str) -> str:
    return "fu-" + hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()


def check_spec(spec: FunctionSpec) -> None:
    """Limits the SDK checks too; here because a client is not trusted."""
    problems = [
        (not spec.tag or len(spec.tag) > 256 or not spec.tag.isprintable(), f"function name `{spec.tag[:80]!r}`"),
        (" " in spec.tag, f"function name `{spec.tag}` with a space"),
        (not 0 < spec.cpu <= 4096, f"cpu={spec.cpu}"),
        (not 1 <= spec.memory_mib <= 1 << 30, f"memory={spec.memory_mib}"),
        (not 0 <= spec.cpu_limit <= 8192, f"cpu limit {spec.cpu_limit}"),
        (not 0 <= spec.memory_limit_mib <= 1 << 30, f"memory limit {spec.memory_limit_mib}"),
        (not all(len(wish) < 80 and GPU.fullmatch(wish) for wish in spec.gpu[:20]), f"gpu={str(spec.gpu)[:80]}"),
        (len(spec.gpu) > 20, f"a list of {len(spec.gpu)} GPUs"),
        (not 0.1 <= spec.timeout <= 86400, f"timeout={spec.timeout}"),
        (not 0.1 <= spec.startup_timeout <= 86400, f"startup_timeout={spec.startup_timeout}"),
        (not 0 <= spec.retries.max_retries <= 10_000, f"retries={spec.retries.max_retries}"),
        (not 0 <= spec.retries.initial_delay <= 3600, f"a delay of {spec.retries.initial_delay} before a retry"),
        (not 0 <= spec.retries.max_delay <= 3600, f"a delay of {spec.retries.max_delay} before a retry"),
        (not 1 <= spec.retries.backoff_coefficient <= 10, f"backoff_coefficient={spec.retries.backoff_coefficient}"),
        (not 0 <= spec.min_containers <= 100_000, f"min_containers={spec.min_containers}"),
        (not 0 <= spec.max_containers <= 100_000, f"max_containers={spec.max_containers}"),
        (not 0 <= spec.buffer_containers <= 100_000, f"buffer_containers={spec.buffer_containers}"),
        (not 0 <= spec.scaledown_window <= 86400, f"scaledown_window={spec.scaledown_window}"),
        (not 1 <= spec.concurrency <= 10_000, f"concurrency={spec.concurrency}"),
        (not 0 <= spec.target_concurrency <= spec.concurrency, f"target_concurrency={spec.target_concurrency}"),
        (not 0 <= spec.batch_size <= 1000, f"batch_size={spec.batch_size}"),
        (not 0 <= spec.batch_wait <= 600, f"batch_wait={spec.batch_wait}"),
        (
            spec.batch_wait >= spec.timeout,
            f"waiting {spec.batch_wait:g} s for a batch, with a timeout of that or less,",
        ),
        (spec.single_use and slots_of(spec) > 1, "several inputs at a time in a container that is used once"),
        (not 0 <= spec.exit_grace <= 3600, f"exit_grace={spec.exit_grace}"),
        (len(spec.methods) > METHOD_LIMIT or not all(map(_is_name, spec.methods)), "a list of methods"),
        (len(spec.parameters) > METHOD_LIMIT or not all(map(_is_name, spec.parameters)), "a list of parameters"),
        (not 0 <= spec.cpu_limit <= 4096, f"cpu limit {spec.cpu_limit}"),
        (not 0 <= spec.memory_limit_mib <= 1 << 24, f"memory limit {spec.memory_limit_mib}"),
        (not 1 <= spec.retries.backoff_coefficient <= 10, f"backoff_coefficient={spec.retries.backoff_coefficient}"),
        (not 0 <= spec.retries.initial_delay <= 86400, f"initial_delay={spec.retries.initial_delay}"),
        (not 0 <= spec.retries.max_delay <= 86400, f"max_delay={spec.retries.max_delay}"),
        (not all(map(_is_gpu, spec.gpu)), f"gpu={spec.gpu}"),
    ]
    for wrong, what in problems:
        if wrong:
            raise InvalidError(f"function `{spec.tag[:80]}`: {what} is not allowed")


def _is_name(value: str) -> bool:
    return len(value) <= 256 and value.isidentifier()


VARIABLE = frozenset(
    {
        "batch_size", "batch_wait", "block_network", "buffer_containers", "concurrency", "cpu", "cpu_limit", "env",
        "gpu", "image", "max_containers",
        "memory_limit_mib", "memory_mib", "min_containers", "retries", "scaledown_window", "secret_keys", "secrets",
        "single_use", "startup_timeout", "target_concurrency", "timeout",
    }
)  # fmt: skip
"""What of a spec a variant may have otherwise."""


def variant_spec(spec: FunctionSpec, options: dict[str, Any]) -> FunctionSpec:
    """The spec of a variant. Raises InvalidError for what may not vary, is of the wrong type or out of range."""
    unknown = sorted(set(options) - VARIABLE)
    if unknown:
        raise InvalidError(f"function `{spec.tag}`: option `{unknown[0][:40]}` is its own and cannot vary")
    fields = _laid_over(dataclasses.asdict(spec), options)
    try:
        made = msgspec.convert(fields, FunctionSpec)
    except msgspec.MsgspecError as error:
        raise InvalidError(f"function `{spec.tag}`: options of a variant: {error}") from None
    if made.image != spec.image and made.image.kind != "host":
        raise InvalidError(f"function `{spec.tag}`: a variant cannot have an image that has to be built")
    if made.max_containers and made.min_containers > made.max_containers:
        raise InvalidError(
            f"function `{spec.tag}`: `min_containers` is {made.min_containers}, more than `max_containers`, "
            f"{made.max_containers}"
        )
    check_spec(made)
    return made


def _laid_over(below: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    merged = {**below, **options}
    if isinstance(below.get("env"), dict) and isinstance(options.get("env"), dict):
        merged["env"] = {**below["env"], **options["env"]}
    if isinstance(below.get("secrets"), list) and isinstance(options.get("secrets"), list):
        # Both, those of the variant last.
        merged["secrets"] = [ref for ref in below["secrets"] if ref not in options["secrets"]] + options["secrets"]
    if isinstance(below.get("secret_keys"), dict) and isinstance(options.get("secret_keys"), dict):
        merged["secret_keys"] = {**below["secret_keys"], **options["secret_keys"]}
    return merged


def check_parameters(spec: FunctionSpec, parameters: bytes) -> None:
    if bool(spec.parameters) != bool(parameters):
        what = f"needs its parameters {', '.join(spec.parameters)[:200]}" if spec.parameters else "has no parameters"
        raise InvalidError(f"`{spec.tag}` {what}")
    if len(parameters) > PARAMETERS_LIMIT_BYTES:
        raise InvalidError(
            f"the parameters of `{spec.tag}` take {len(parameters):,} bytes, the limit is {PARAMETERS_LIMIT_BYTES:,}",
            hint="pass large values as arguments of its methods",
        )


def check_options_size(spec: FunctionSpec, options: dict[str, Any]) -> None:
    size = len(json.dumps(options))
    if size > OPTIONS_LIMIT_BYTES:
        raise InvalidError(
            f"options of a variant of `{spec.tag}` take {size:,} bytes, the limit is {OPTIONS_LIMIT_BYTES:,}",
            hint="put large variables into a file, or into the function's own `env`",
        )


def variant_id(root: FunctionRecord, options: dict[str, Any], parameters: bytes) -> str:
    """The same for the same, whoever asks, in whatever order."""
    digest = hashlib.blake2b(root.stable_id.encode(), digest_size=8)
    digest.update(json.dumps(options, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    digest.update(hashlib.blake2b(parameters).digest())
    return f"fu-{digest.hexdigest()}"


def _is_gpu(wish: str) -> bool:
    try:
        return 0 < parse_gpu(wish)[1] <= 1024
    except ValueError:
        return False


def _storable(spec: FunctionSpec) -> str:
    fields = dataclasses.asdict(spec)
    fields["env"] = sorted(spec.env)
    return json.dumps(fields)
