"""Apps and their functions: what exists, who owns it, what state it is in; and their rows in the Store.

The truth of a running app is in memory; what of it outlives the server is written by `app_rows`. A deployed app has
versions. Callers name a function by an id that is the same in all of them, and what they name is resolved here, on
every submit: to the pool of the version that is current, or, for an id that stands for one version, to a pool of that
version made for those who insist on it. Tested in `tests/unit/test_objects.py` and `tests/integration/test_apps.py`.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from squall.exception import InvalidError, NotFoundError, ResourceExhaustedError
from squall.protocol.messages import CreateApp, FunctionSpec, new_id
from squall.protocol.states import AppState
from squall.server import app_rows
from squall.server.database import Database
from squall.server.dispatch import FunctionOptions
from squall.server.scheduler import parse_gpu
from squall.server.sealing import Seal
from squall.server.versions import KEPT_VERSIONS, Version

PART_LIMIT = 1000
"""Parts of a source bundle."""
GPU = re.compile(r"[A-Za-z0-9_!-]{1,60}(:[1-9][0-9]{0,3})?")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
HISTORY_LIMIT = 200
VARIANT_LIMIT = 1000
"""Variants of all functions of one app: each is a pool that the periodic round looks at."""
FUNCTION_LIMIT = 5000
"""Functions of one app, for the same reason."""
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
    """By stable id: pools made later, by `BindFunction`."""
    others: dict[str, FunctionRecord] = field(default_factory=dict)
    """By id: pools of a version on trial, of versions that are ending, and of those called by number."""
    followers: set[Any] = field(default_factory=set)
    resume_until: float = 0.0
    """Monotonic: until then it waits for its client to come back."""
    state: AppState = "running"
    stopped_at: float = 0.0
    reason: str = ""
    terminal: str = ""
    """The TERM of its owner's terminal, when containers may ask for it."""
    scope: Scope = MAIN
    deployed: bool = False
    version: int = 0
    """The current one, of a deployed app; 0 before its first."""
    versions: dict[int, Version] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)

    def pools(self) -> list[FunctionRecord]:
        """All that may have containers."""
        return [*self.functions.values(), *self.variants.values(), *self.others.values()]

    @property
    def current(self) -> Version | None:
        return self.versions.get(self.version)


class Family(NamedTuple):
    """What code of an app calls the functions of its app by."""

    ids: dict[str, str]
    generators: list[str]


NO_FAMILY = Family({}, [])


@dataclass(eq=False)
class FunctionRecord:
    function_id: str
    """Of the pool, which of a deployed app belongs to one version and is made for it."""
    app: AppRecord
    spec: FunctionSpec
    stable_id: str = ""
    """What its callers name: the same in every version. Of an app without versions it is the pool's own."""
    family: Family = NO_FAMILY
    version: int = 0
    override: dict[str, Any] = field(default_factory=dict)
    """What was laid over the autoscaler's settings, until the next version."""
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
    options = FunctionOptions(
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
        persists=function.app.deployed,
    )
    return dataclasses.replace(options, **function.override) if function.override else options


def slots_of(spec: FunctionSpec) -> int:
    """Inputs that a container of the function may hold."""
    return spec.concurrency * max(1, spec.batch_size)


class Objects:
    def __init__(self, database: Database, seal: Seal) -> None:
        self.database = database
        self.seal = seal
        self.admit: Callable[[FunctionRecord], None] = lambda function: None
        """Set by `main`: a pool that was not there before takes inputs from now on."""
        self.apps: dict[str, AppRecord] = {}
        self.functions: dict[str, FunctionRecord] = {}
        """Every pool by its own id, those of versions that are ending included."""
        self._callable: dict[str, FunctionRecord] = {}
        """By what callers name: the pool that takes their inputs now."""
        self._pins: dict[str, tuple[AppRecord, int, str]] = {}
        """By what callers of one version name: the app, the version and the function's tag."""
        self._former: dict[str, tuple[AppRecord, int, str, str]] | None = None
        """Pools of kept versions that are not current: the app, version, tag and, of a variant, its stable id."""
        self._recalled = False

    def create_app(self, message: CreateApp, owner: Any, now_wall: float, scope: Scope = MAIN) -> AppRecord:
        check_name(message.name)
        app = AppRecord(message.app_id or new_id("ap"), message.name, message.detach, now_wall, owner, scope=scope)
        app.terminal = message.terminal[:100]
        check_specs(message.name, message.functions)
        family = family_of(message.functions, lambda tag: stable_id_of(app.app_id, tag))
        for spec in message.functions:
            function_id = stable_id_of(app.app_id, spec.tag)
            app.functions[spec.tag] = FunctionRecord(function_id, app, spec, function_id, family)
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
        self,
        function_id: str,
        options: dict[str, Any],
        parameters: bytes,
        *,
        trusted: bool,
        scope: Scope = MAIN,
        app: AppRecord | None = None,
    ) -> FunctionRecord:
        """The variant of a function with these options and parameters, made when there is none yet. Its id follows
        from what it is, so that all who ask for the same share its containers.

        Not `trusted`: a container of `app` asks, which may not get out of a network policy this way, nor have code of
        another app, with that one's secrets, run in surroundings that it chooses."""
        asked = self.function(function_id, scope)
        root = asked.root or asked
        if not trusted and root.app is not app and (foreign := sorted(SURROUNDINGS & set(options))):
            raise InvalidError(
                f"function `{root.spec.tag}`: a container of another app cannot choose its `{foreign[0]}`",
                hint="call `with_options` in your program, or give the function of the other app an argument",
            )
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
        named = variant_id(root, options, parameters)
        variants = root.app.variants
        if named in variants:
            return variants[named]
        variant = _variant(root, spec, named, options, parameters)
        if len(variants) >= VARIANT_LIMIT:
            raise ResourceExhaustedError(
                f"app `{root.app.name}` has {VARIANT_LIMIT} pools made by parameters and `with_options`",
                hint="each distinct set of values is a pool of its own: pass what changes often as an argument instead",
            )
        variants[variant.stable_id] = variant
        self._admit(variant)
        self._record_variant(variant)
        return variant

    # -- versions

    def draft(self, app: AppRecord, version: Version) -> dict[str, FunctionRecord]:
        """The pools of a version that nobody calls yet."""
        family = family_of(version.specs, lambda tag: stable_id_of(app.app_id, tag))
        version.pool_seed = new_id("vs")
        pools = {
            spec.tag: FunctionRecord(
                pool_id_of(app, version, spec.tag), app, spec, family.ids[spec.tag], family, version.number
            )
            for spec in version.specs
        }
        for pool in pools.values():
            self.functions[pool.function_id] = app.others[pool.function_id] = pool
        return pools

    def discard(self, function: FunctionRecord) -> None:
        """Forget a pool that has ended: one that was on trial, superseded, or called by number."""
        function.app.others.pop(function.function_id, None)
        self._dismiss(function)

    def publish(
        self, app: AppRecord, version: Version, pools: dict[str, FunctionRecord]
    ) -> list[tuple[FunctionRecord, FunctionRecord | None]]:
        """Have what callers name mean this version, drafted before, from now on. Returns each pool of the version that
        was current, variants included, with the one that takes its place."""
        before = [*app.functions.values(), *(v for v in app.variants.values() if v.stable_id != v.function_id)]
        successors: dict[str, FunctionRecord] = {pool.stable_id: pool for pool in pools.values()}
        for old in before:
            if old.root is not None and (variant := _again(old, pools)) is not None:
                successors[old.stable_id] = variant
        for old in before:
            app.variants.pop(old.stable_id, None)
            app.others[old.function_id] = old
            self._callable.pop(old.stable_id, None)
        app.functions = pools
        for pool in successors.values():
            app.others.pop(pool.function_id, None)
            if pool.root is not None:
                app.variants[pool.stable_id] = pool
            self._admit(pool)
        app.version = version.number
        self.keep(app, version)
        return [(old, successors.get(old.stable_id)) for old in before]

    def keep(self, app: AppRecord, version: Version) -> None:
        """Remember a version, so that it can be called by number; the oldest is let go for it."""
        app.versions[version.number] = version
        self._former = None
        for tag in version.tags:
            self._pins[pin_id_of(app.app_id, tag, version.number)] = (app, version.number, tag)
        for number in sorted(app.versions)[:-KEPT_VERSIONS]:
            old = app.versions[number]
            for tag in old.tags:
                self._pins.pop(pin_id_of(app.app_id, tag, number), None)
            old.specs, old.is_kept = [], False
            del app.versions[number]

    # -- versions of before a restart

    def former(self, pool_id: str) -> FunctionRecord | None:
        """The pool of a version that was replaced before a restart, for what is left of it: nobody can call it."""
        if self._former is None:
            self._former = {pool: place for app in self.apps.values() for pool, place in _former_pools(app)}
        if pool_id in self.functions or pool_id not in self._former:
            return self.functions.get(pool_id)
        app, number, tag, variant_id = self._former[pool_id]
        version = app.versions[number]
        spec, variant = version.spec(tag), app.variants.get(variant_id)
        if app.state != "running" or number == app.version or spec is None:
            return None
        family = family_of(version.specs, lambda other: stable_id_of(app.app_id, other))
        pool = FunctionRecord(pool_id, app, spec, stable_id_of(app.app_id, tag), family, number)
        if variant is not None:
            try:
                varied = variant_spec(spec, variant.options)
            except InvalidError:
                return None
            pool = FunctionRecord(pool_id, app, varied, variant_id, family, number)
            pool.root, pool.options, pool.parameters = variant.root, variant.options, variant.parameters
        self.functions[pool_id] = app.others[pool_id] = pool
        return pool

    def retired(self, stable_id: str) -> FunctionRecord | None:
        """The pool of a function that the current version has not got, as it was in the newest that had it: for what
        was spawned before."""
        for app in self.apps.values():
            for number in sorted(app.versions, reverse=True) if app.deployed and app.state == "running" else ():
                for tag in app.versions[number].tags:
                    if stable_id_of(app.app_id, tag) == stable_id:
                        return self.former(pool_id_of(app, app.versions[number], tag))
        return None

    def _pinned(self, function_id: str) -> FunctionRecord | None:
        """The pool for those who call one version by its number, made when there is none."""
        pin = self._pins.get(function_id)
        if pin is None or pin[0].state != "running":
            return None
        app, number, tag = pin
        version = app.versions[number]
        spec = version.spec(tag)
        assert spec is not None  # its tags are those of its specs
        spec = dataclasses.replace(spec, min_containers=0)
        family = family_of(version.specs, lambda other: pin_id_of(app.app_id, other, number))
        pool = FunctionRecord(function_id, app, spec, function_id, family, number)
        app.others[function_id] = pool
        self._admit(pool)
        self.admit(pool)
        return pool

    def lookup(self, app: AppRecord, tag: str, number: int = 0) -> tuple[str, Version, FunctionSpec]:
        """What to call a function of a deployed app by: of one version of it, or of whichever is current."""
        if app.state != "running" or not app.version:
            what = "has stopped" if app.version else "was never deployed"
            raise NotFoundError(
                f"app `{app.name}` {what}, so it has no function `{tag[:80]}`", hint="deploy it: `squall deploy FILE`"
            )
        version = app.versions.get(number or app.version)
        if version is None:
            known = ", ".join(map(str, sorted(app.versions)))
            raise NotFoundError(f"app `{app.name}` has no version {number}", hint=f"versions that are kept: {known}")
        spec = version.spec(tag)
        if spec is None:
            raise NotFoundError(
                f"version {version.number} of app `{app.name}` has no function `{tag[:80]}`",
                hint=f"it has {', '.join(f'`{name}`' for name in sorted(version.tags)[:20])}" if version.tags else "",
            )
        named = pin_id_of(app.app_id, tag, number) if number else stable_id_of(app.app_id, tag)
        return named, version, spec

    # -- the Store

    def _record(self, app: AppRecord) -> None:
        """An app that was run: for its history, as what it is made from is in `kept`."""
        row, specs = app_rows.app_row(app), [function.spec for function in app.functions.values()]
        self.database.write_soon(lambda connection: app_rows.put_app(connection, row, specs))

    def _record_variant(self, variant: FunctionRecord) -> None:
        row = app_rows.variant_row(variant)
        seal = self.seal if variant.app.deployed else None
        self.database.write_soon(lambda connection: app_rows.put_variant(connection, row, seal))

    def set_stopped(self, app: AppRecord, now_wall: float) -> None:
        app.state, app.stopped_at = "stopped", now_wall
        for function in app.pools():
            self._dismiss(function)
        app.others.clear()
        if app.deployed:
            app.variants.clear()
        app_id, reason = app.app_id, app.reason
        self._trim()
        self.database.write_soon(lambda connection: app_rows.set_stopped(connection, app_id, now_wall, reason))

    def renaming(self, scope: Scope, new_name: str) -> Callable[[Any], None]:
        """What the Store is to do when an environment, in which nothing runs, gets another name."""
        return lambda connection: app_rows.rename_environment(connection, scope.workspace, scope.environment, new_name)

    def renamed_environment(self, scope: Scope, new_name: str) -> None:
        target = Scope(scope.workspace, new_name)
        for app in self.apps.values():
            if app.scope == target:
                app.deployed = False
            elif app.scope == scope:
                app.scope = target

    def _trim(self) -> None:
        """Keep the newest stopped apps in memory, for their logs and traces."""
        stopped = [app for app in self.apps.values() if app.state == "stopped" and not app.deployed]
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
        running = [app for app in named if app.state == "running"]
        return next((app for app in named if app.deployed), (running or named)[-1])

    def deployed(self, name: str, scope: Scope) -> AppRecord | None:
        """The deployed app of this name, which may have stopped."""
        found = (app for app in self.apps.values() if app.deployed and app.name == name and app.scope == scope)
        return next(found, None)

    def deployed_or_raise(self, ref: str, scope: Scope) -> AppRecord:
        """A deployed app by name or id. Raises NotFoundError that says what there is."""
        by_id = self.apps.get(ref)
        if by_id is not None and by_id.deployed and by_id.scope.workspace == scope.workspace:
            return by_id
        app = self.deployed(ref, scope)
        if app is None:
            known = sorted(app.name for app in self.apps.values() if app.deployed and app.scope == scope)
            where = f" in environment `{scope.environment}`" if scope.environment != "main" else ""
            close = difflib.get_close_matches(ref, known, 1)
            hint = f"did you mean `{close[0]}`?" if close else f"deployed apps: {', '.join(known[:10])}"
            raise NotFoundError(
                f"no deployed app `{ref[:80]}`{where}",
                hint=hint
                if known
                else "`squall deploy FILE` deploys one; one that `squall run` runs has no lasting name",
            )
        return app

    async def recall(self) -> None:
        """Fill the history with the newest apps of earlier servers, for whoever looks back. Once."""
        if self._recalled:
            return
        self._recalled = True

        past: dict[str, AppRecord] = {}
        for row in reversed(await self.database.read(lambda connection: app_rows.newest(connection, HISTORY_LIMIT))):
            if row.app_id not in self.apps:
                app = past[row.app_id] = AppRecord(row.app_id, row.name, row.detached, row.created_at, None)
                app.scope = Scope(row.workspace, row.environment)
                app.state, app.stopped_at = "stopped", row.stopped_at or 0.0
                app.reason = row.reason or "its server ended"
        self.apps = {**past, **self.apps}

    def restored(self, kept: Iterable[app_rows.KeptApp]) -> list[AppRecord]:
        """Take up apps as the Store has them, ready to be called; those that are here already stay as they are."""
        return [self._restored(one) for one in kept if one.row.app_id not in self.apps]

    def _restored(self, kept: app_rows.KeptApp) -> AppRecord:
        row = kept.row
        app = AppRecord(row.app_id, row.name, row.detached, row.created_at, None)
        app.scope, app.deployed, app.labels = Scope(row.workspace, row.environment), row.deployed, kept.labels
        app.state, app.stopped_at, app.reason = row.state, row.stopped_at or 0.0, row.reason or ""
        self.apps[app.app_id] = app
        for version in kept.versions:
            if app.deployed:
                self.keep(app, version)
        current = next((v for v in kept.versions if v.number == row.version or not app.deployed), None)
        app.version = row.version
        if current is None or app.state != "running":
            return app
        family = family_of(current.specs, lambda tag: stable_id_of(app.app_id, tag))
        for spec in current.specs:
            named = stable_id_of(app.app_id, spec.tag)
            pool_id = pool_id_of(app, current, spec.tag) if app.deployed else named
            number = current.number if app.deployed else 0
            function = FunctionRecord(pool_id, app, spec, named, family, number)
            function.override = kept.overrides.get(named, {})
            app.functions[spec.tag] = function
            self._admit(function)
        for root_id, options, parameters in kept.variants:
            self._restore_variant(app, root_id, options, parameters)
        return app

    def _restore_variant(self, app: AppRecord, root_id: str, options: dict[str, Any], parameters: bytes) -> None:
        root = self._callable.get(root_id) or self._pinned(root_id)
        if root is None or root.root is not None or len(app.variants) >= VARIANT_LIMIT:
            return
        try:
            spec = variant_spec(root.spec, options)
        except InvalidError:  # the rules of this release are others: whoever asks for it will hear why
            return
        variant = _variant(root, spec, variant_id(root, options, parameters), options, parameters)
        app.variants[variant.stable_id] = variant
        self._admit(variant)

    def find_function(self, function_id: str) -> FunctionRecord | None:
        """As `function`, in any workspace: for what was let in before."""
        return self._callable.get(function_id) or self._pinned(function_id)

    def function(self, function_id: str, scope: Scope = MAIN) -> FunctionRecord:
        """The pool that takes the inputs of whoever names this id. An id is good in its whole workspace: it was
        looked up by name in one environment, and may be called from another."""
        record = self._callable.get(function_id) or self._pinned(function_id)
        if record is None or record.app.scope.workspace != scope.workspace:
            raise self._missing(function_id, scope)
        return record

    def _missing(self, function_id: str, scope: Scope) -> NotFoundError:
        """Why there is no such function: a person reads it, who may have stopped the app yesterday."""
        for app in self.apps.values():
            if not app.deployed or app.scope.workspace != scope.workspace:
                continue
            for tag in {tag for version in app.versions.values() for tag in version.tags}:
                if function_id == stable_id_of(app.app_id, tag):
                    if app.state == "running":
                        what = f"version {app.version} of app `{app.name}` has no function `{tag}`"
                        return NotFoundError(what, hint=f"`squall app history {app.name}` shows which version had it")
                    what = f"app `{app.name}`, whose function `{tag}` is called, was stopped"
                    return NotFoundError(what, hint=f"deploy it again, or `squall app rollback {app.name}`")
        for app in self.apps.values():
            for known in app.pools() if app.scope.workspace == scope.workspace else ():
                if known.stable_id == function_id:
                    return has_ended(known)
        return NotFoundError(f"no running function `{function_id[:80]}`", hint="its app may have been stopped")


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


def pool_id_of(app: AppRecord, version: Version, tag: str) -> str:
    """The pool of a version: no other candidate's, and the same after a restart, as its containers outlive the server
    and are to be known again."""
    return _function_id(version.pool_seed or f"{app.app_id}:{version.number}", tag)


def _former_pools(app: AppRecord) -> Iterator[tuple[str, tuple[AppRecord, int, str, str]]]:
    for number, version in app.versions.items() if app.deployed else ():
        if number == app.version:
            continue
        for tag in version.tags:
            yield pool_id_of(app, version, tag), (app, number, tag, "")
        for variant in app.variants.values():
            if variant.root is not None and variant.stable_id != variant.function_id:
                root_id = pool_id_of(app, version, variant.root.spec.tag)
                place = app, number, variant.root.spec.tag, variant.stable_id
                yield _function_id(root_id, variant.stable_id), place


def pin_id_of(app_id: str, tag: str, version: int) -> str:
    """What callers of one version name. It stands for a pool of its own: what runs there calls the functions of that
    version too, whereas the current version's inputs move on to the next."""
    return _function_id(app_id, tag, str(version), "pinned")


def family_of(specs: list[FunctionSpec], id_of: Callable[[str], str]) -> Family:
    return Family({spec.tag: id_of(spec.tag) for spec in specs}, [spec.tag for spec in specs if spec.is_generator])


def _variant(
    root: FunctionRecord, spec: FunctionSpec, named: str, options: dict[str, Any], parameters: bytes
) -> FunctionRecord:
    """One that callers name `named`. Of a root whose inputs move from version to version it is one of a version."""
    moves = root.stable_id != root.function_id
    pool_id = _function_id(root.function_id, named) if moves else named
    return FunctionRecord(pool_id, root.app, spec, named, root.family, root.version, {}, root, options, parameters)


def _again(old: FunctionRecord, pools: dict[str, FunctionRecord]) -> FunctionRecord | None:
    """A variant as it is in another version; None where that has no such function, or not with these options."""
    assert old.root is not None
    root = pools.get(old.root.spec.tag)
    if root is None:
        return None
    try:
        check_parameters(root.spec, old.parameters)
        spec = variant_spec(root.spec, old.options)
    except InvalidError:
        return None
    return _variant(root, spec, old.stable_id, old.options, old.parameters)


def check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise InvalidError(
            f"app name `{name[:80]}` is not valid",
            hint="use 1 to 64 letters, digits, `-`, `_` and `.`, beginning with a letter or digit",
        )


def check_specs(name: str, specs: list[FunctionSpec]) -> None:
    if len(specs) > FUNCTION_LIMIT:
        raise InvalidError(f"app `{name}` has {len(specs):,} functions, the limit is {FUNCTION_LIMIT:,}")
    known: set[str] = set()
    for spec in specs:
        check_spec(spec)
        if spec.tag in known:
            raise InvalidError(f"app `{name}` has two functions named `{spec.tag}`")
        known.add(spec.tag)


def _function_id(*parts: str) -> str:
    return "fu-" + hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()


def check_spec(spec: FunctionSpec) -> None:
    """Limits the SDK checks too; here because a client is not trusted."""
    problems = [
        (not spec.tag or len(spec.tag) > 256 or not spec.tag.isprintable(), f"function name `{spec.tag[:80]!r}`"),
        (" " in spec.tag, f"function name `{spec.tag}` with a space"),
        (not 0 < spec.cpu <= 4096, f"cpu={spec.cpu}"),
        (not 1 <= spec.memory_mib <= 1 << 30, f"memory={spec.memory_mib}"),
        (not 0 <= spec.cpu_limit <= 4096, f"cpu limit {spec.cpu_limit}"),
        (not 0 <= spec.memory_limit_mib <= 1 << 24, f"memory limit {spec.memory_limit_mib}"),
        (not all(map(_is_gpu, spec.gpu[:20])), f"gpu={str(spec.gpu)[:80]}"),
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
        (len(spec.source_parts) > PART_LIMIT, f"a source in {len(spec.source_parts):,} parts"),
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
SURROUNDINGS = frozenset({"env", "image", "secret_keys", "secrets"})
"""What of that decides what its code does, and with what."""


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
        return GPU.fullmatch(wish) is not None and 0 < parse_gpu(wish)[1] <= 1024
    except ValueError:
        return False
