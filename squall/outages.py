"""A deterministic simulator of durable calls: dispatch and `durable` over a disk that loses power at any point.

`rehearse(seed)` makes up, from one seed, functions that fail and are retried, callers that spawn, repeat what they got
no answer to and cancel, a Store that answers late, fails for a while, or is cut off before or after any of its commits,
and servers that are killed and started anew. At the end the effects are counted: every acknowledged input has exactly
one recorded end that some execution gave it, nobody was told another, no input ran more often than its attempts and the
cuts allow, what was cancelled did not run again, order was kept, and nothing is left in memory. Of a function that does
not start for a while nothing ends of that, and no cut brings its next start forward. Containers may outlive a cut, also
those of a version that was replaced: what they run is not run again. The same seed gives the same run.
`MemoryJournal` keeps to the contract of `server.journal` (`tests/contract/test_journal.py` runs over both).

`python -m squall.outages --seeds 1000` runs many; `--seed N` replays one and tells its story. Tested in
`tests/unit/test_outages.py`.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any

from squall._clock import ManualClock
from squall.exception import ConflictError, Error, InvalidError, ServiceError
from squall.server.adoption import HeldInput
from squall.server.dispatch import Dispatch
from squall.server.durable import Cancel, Durable
from squall.server.inputs import (
    BackoffChanged,
    DemandChanged,
    Dropped,
    Finish,
    FunctionOptions,
    Input,
    KillContainer,
    Push,
    Retried,
    StopContainer,
)
from squall.server.journal import CANCELLED, Added, Entry, Kept, KeptCall, Note, Payload, Row, Window
from squall.server.starts import Backoff, backoff_of
from squall.testing import InvariantError, check_dispatch, require

CHECK_EVERY = 25
"""Events between two looks at all that dispatch holds."""
SOON_S = 0.5
"""Of simulated time: within it the disk does what it was asked."""
SETTLED_WITHIN = 20_000.0
"""Simulated seconds within which everything must have ended."""


# ---- the journal in memory ----------------------------------------------------------------------------------------


@dataclass
class Line:
    """A row of `inputs`."""

    seq: int
    call_id: str
    idx: int
    args: Payload
    attempt: int = 0
    failures: int = 0
    infra_failures: int = 0
    not_before: float | None = None
    cancelled: bool = False
    end: Row | None = None


class MemoryJournal:
    """What the functions of `server.journal` do to a Store, done to dictionaries."""

    def __init__(self) -> None:
        self.calls: dict[str, Entry] = {}
        self.cancelled: dict[str, tuple[str, float]] = {}
        """Call -> why and when."""
        self.keys: dict[tuple[str, str], Entry] = {}
        self.lines: dict[tuple[str, int], Line] = {}
        self.by_seq: dict[int, Line] = {}
        self.backoffs: dict[str, tuple[Backoff, float]] = {}
        """With the wall-clock time of the next start."""

    def back_off(self, function_id: str, backoff: Backoff | None, until: float) -> None:
        """What `server.backoffs` writes down."""
        self.backoffs.pop(function_id, None)
        if backoff is not None:
            self.backoffs[function_id] = backoff, until

    def add(self, entries: Sequence[Entry]) -> list[Added | Error]:
        return [self._add(entry) for entry in entries]

    def _add(self, entry: Entry) -> Added | Error:
        before = self.keys.get((entry.function_id, entry.key)) if entry.key else None
        if before is not None and before.call_id != entry.call_id:
            if before.digest != entry.digest:
                return ConflictError(f"key `{entry.key}` was used for call `{before.call_id}` with other arguments")
            return Added(before.call_id, 0, [])
        known = self.calls.setdefault(entry.call_id, entry)
        if known.function_id != entry.function_id:
            return InvalidError(f"call `{entry.call_id}` belongs to another function")
        if entry.call_id in self.cancelled:
            return ConflictError(f"call `{entry.call_id}` was cancelled and takes no more inputs")
        if entry.key:
            self.keys[entry.function_id, entry.key] = entry
        fresh = [item for item in entry.items if (entry.call_id, item[0]) not in self.lines]
        first = len(self.by_seq) + 1
        for seq, (idx, data) in enumerate(fresh, first):
            self.by_seq[seq] = self.lines[entry.call_id, idx] = Line(seq, entry.call_id, idx, data)
        return Added(entry.call_id, first, fresh)

    def finish(self, rows: Sequence[Row]) -> None:
        for row in rows:
            line = self.lines[row.call_id, row.idx]
            line.end = line.end or row

    def note(self, rows: Sequence[Note]) -> None:
        for row in rows:
            line = self.lines[row.call_id, row.idx]
            if line.end is None:
                line.attempt, line.failures, line.infra_failures, line.not_before = row[2:]

    def cancel(
        self, call_id: str, idxs: list[int] | None, workspace: str, now_wall: float, counted: bool = True
    ) -> int | None:
        call = self.calls.get(call_id)
        if call is None or call.workspace != workspace:
            return None
        mine = [line for line in self.lines.values() if line.call_id == call_id and line.end is None]
        if idxs is None:
            self.mark(call_id, CANCELLED, now_wall)
            return len(mine) if counted else 0
        chosen = [line for line in mine if line.idx in set(idxs)]
        for line in chosen:
            line.cancelled = True
        return len(chosen)

    def mark(self, call_id: str, reason: str, now_wall: float) -> str:
        return self.cancelled.setdefault(call_id, (reason, now_wall))[0]

    def tidy(self, call_id: str, after: int, limit: int, spared: Collection[int]) -> int | None:
        if call_id not in self.cancelled:
            return None
        reason, at = self.cancelled[call_id]
        mine = sorted(idx for known, idx in self.lines if known == call_id and idx > after)
        for idx in mine[:limit]:
            line = self.lines[call_id, idx]
            if line.end is None and idx not in spared:
                line.end = Row(call_id, idx, "cancelled", reason, "", b"", at)
        return mine[limit - 1] if len(mine) >= limit else None

    def window(self, after: int, limit: int) -> Window:
        lines = [line for seq, line in sorted(self.by_seq.items()) if seq > after and line.end is None][:limit]
        calls = {line.call_id: self._kept_call(self.calls[line.call_id]) for line in lines}
        return Window([_kept(line) for line in lines], calls)

    def _kept_call(self, entry: Entry) -> KeptCall:
        is_cancelled = entry.call_id in self.cancelled
        fields = (entry.call_id, entry.function_id, entry.app_id, entry.method, entry.parent, entry.created_at)
        return KeptCall(*fields, is_cancelled)

    def payloads(self, seqs: Sequence[int]) -> dict[int, Payload]:
        return {seq: self.by_seq[seq].args for seq in seqs if seq in self.by_seq}


def _kept(line: Line) -> Kept:
    history = (line.attempt, line.failures, line.infra_failures, line.not_before)
    return Kept(line.seq, line.call_id, line.idx, *history, line.cancelled)


# ---- what happened, apart from what anybody believes --------------------------------------------------------------


@dataclass
class Story:
    """One input's."""

    function: int
    args: bytes
    acknowledged: bool = False
    executions: int = 0
    lost: int = 0
    """Executions that a cut took from the memory of the server."""
    spared: int = 0
    """Executions that ended with a container which was killed for another's sake: they cost nothing."""
    infra_failures: int = 0
    tried: tuple[int, float] = (0, 0.0)
    """Attempts that had failed when the server last heard of one, and when that was."""
    answers: set[str] = field(default_factory=set)
    told: Row | None = None
    told_cancelled: str = ""
    """With which reason callers were told that it is, before it had a row of its own."""
    cancel_acknowledged: bool = False
    cancel_asked: bool = False
    dead: bool = False
    """Its cancel was acknowledged by a server that was cut off since: it must not run again."""


@dataclass(frozen=True)
class Plan:
    """What a seed is made of."""

    retries: tuple[int, ...] = (0, 2)
    """Of each function."""
    error_odds: float = 0.2
    calls: int = 8
    call_size: int = 12
    duration: float = 8.0
    cuts: int = 2
    """Servers killed: at moments, or at the `cut_at`-th commits."""
    cut_at: tuple[tuple[int, bool], ...] = ()
    """Number of a commit, and whether the cut comes after it."""
    outage_odds: float = 0.02
    held_limit: int = 64
    replay_limit: int = 7
    cancels: int = 3
    whole: float = 0.5
    """Odds that a cancel is of a whole call."""
    tidy_limit: int = 3
    slots: int = 2
    broken_for: float = 0.0
    """Seconds from the beginning in which no container of the first function starts."""
    survival: float = 0.0
    """Odds that a container outlives a cut, with what it runs."""
    versions: int = 0
    """How often a function gets a new version."""

    @classmethod
    def draw(cls, seed: int) -> Plan:
        rng = random.Random(f"plan {seed}")
        cuts = rng.choice((0, 1, 2, 5))
        return cls(
            retries=tuple(rng.choice((0, 0, 1, 3)) for _ in range(rng.randint(1, 3))),
            error_odds=rng.choice((0.0, 0.2, 0.6)),
            calls=rng.randint(1, 12),
            call_size=rng.choice((1, 5, 40)),
            duration=rng.choice((0.5, 3.0, 10.0)),
            cuts=cuts,
            cut_at=tuple((rng.randint(1, 60), rng.random() < 0.5) for _ in range(cuts)),
            outage_odds=rng.choice((0.0, 0.0, 0.1)),
            held_limit=rng.choice((0, 100, 10_000)),
            replay_limit=rng.choice((1, 3, 20)),
            cancels=rng.choice((0, 0, 2, 6)),
            whole=rng.choice((0.5, 1.0)),
            tidy_limit=rng.choice((1, 3, 20)),
            slots=rng.choice((1, 1, 4)),
            broken_for=rng.choice((0.0, 0.0, 5.0, 90.0)),
            survival=rng.choice((0.0, 0.7, 1.0)),
            versions=rng.choice((0, 0, 1, 4)),
        )


@dataclass(eq=False)
class Machine:
    """A container as it is, whatever a server thinks of it."""

    container_id: str
    pool_id: str
    life: int
    """That of the server it is connected to."""
    is_loaded: bool = False
    is_alive: bool = True
    running: dict[tuple[str, int], int] = field(default_factory=dict)
    """With the attempt."""
    ended: deque[tuple[str, int, str, int, Any]] = field(default_factory=lambda: deque(maxlen=20))
    """Its latest results, which it sends again to a server that is new."""


class Promise:
    """A future of the simulated loop."""

    def __init__(self) -> None:
        self._callbacks: list[Callable[[Any], None]] = []
        self._value: Any = None
        self._error: BaseException | None = None

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self._callbacks.append(callback)

    def exception(self) -> BaseException | None:
        return self._error

    def result(self) -> Any:
        return self._value

    def settle(self, value: Any, error: BaseException | None) -> None:
        self._value, self._error = value, error
        for callback in self._callbacks:
            callback(self)


class _Disk:
    """`durable`'s Store in one server's life: what it asks happens later, in order, or never."""

    def __init__(self, world: Rehearsal) -> None:
        self.world = world
        self._at = 0.0

    def __getattr__(self, name: str) -> Callable[..., Promise]:
        def ask(*arguments: Any) -> Promise:
            promise = Promise()
            world = self.world
            self._at = max(self._at, world.now) + world.rng.expovariate(200)
            world.at(self._at - world.now, world.commit, world.life, name, arguments, promise)
            return promise

        return ask


@dataclass(frozen=True)
class Data:
    """What a call carries in dispatch."""

    function_id: str


def _named(pool_id: str) -> str:
    """The function that a pool is a version of."""
    return pool_id.partition(".")[0]


class Rehearsal:
    """One run of one seed."""

    def __init__(self, seed: int, plan: Plan | None = None) -> None:
        self.seed = seed
        self.plan = plan or Plan.draw(seed)
        self.rng = random.Random(seed)
        self.clock = ManualClock()
        self.journal = MemoryJournal()
        self.stories: dict[tuple[str, int], Story] = {}
        self.life = 0
        self.commits = self.events = 0
        self.is_failing = False
        self.story: deque[tuple[float, str, str]] = deque(maxlen=80)
        self.order: dict[int, list[int]] = {}
        """Function -> sequence numbers in the order of their first executions."""
        self._queue: list[tuple[float, int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = itertools.count()
        self._wake_at = float("inf")
        self._unanswered: dict[int, Entry] = {}
        """What callers will say again to the next server."""
        self._up = -1
        """The life in which a server takes what callers say."""
        self._containers = 0
        self.options: dict[str, FunctionOptions] = {}
        self.machines: dict[str, Machine] = {}
        self._versions: dict[str, int] = {}
        """Of each function, how often it was replaced."""
        self._not_before: dict[str, float] = {}
        """By function, when the Store says that its next start may be."""

    @property
    def now(self) -> float:
        return self.clock.monotonic()

    # -- the loop; events of a server's life end with it, those of the world (life -1) do not

    def at(self, delay: float, action: Callable[..., None], *arguments: Any, life: int | None = None) -> None:
        own = self.life if life is None else life
        heappush(self._queue, (self.now + delay, next(self._numbers), own, action, arguments))

    def call_soon(self, callback: Callable[..., Any], *arguments: Any) -> None:
        self.at(0.0, callback, *arguments)

    def call_later(self, delay: float, callback: Callable[..., Any], *arguments: Any) -> None:
        self.at(delay, callback, *arguments)

    def run(self) -> dict[str, int]:
        """Run to the end. Raises InvariantError, naming the seed and the last events, when a rule was broken."""
        try:
            self._begin()
            while self._queue:
                due, _, life, action, arguments = heappop(self._queue)
                if life not in (-1, self.life):
                    continue
                self.clock.advance(max(0.0, due - self.now))
                self.story.append((self.now, action.__name__, repr(arguments)[:120]))
                action(*arguments)
                self.events += 1
                if self.events % CHECK_EVERY == 0:
                    check_dispatch(self.dispatch)
                require(self.now < SETTLED_WITHIN, "everything ends", self._open()[:3])
            self._check_end()
        except Exception as error:
            raise InvariantError(f"seed {self.seed}: {type(error).__name__}: {error}\n{self.tell()}") from error
        return self._summary()

    def tell(self) -> str:
        """The last events, for people."""
        lines = [f"{at:10.4f}  {name.strip('_')} {arguments}" for at, name, arguments in self.story]
        return "\n".join(["the last events:", *lines, f"replay: python -m squall.outages --seed {self.seed}"])

    def _begin(self) -> None:
        rng, plan = self.rng, self.plan
        self._start_server()
        for number in range(plan.calls):
            self.at(rng.uniform(0, plan.duration), self._spawn, number, life=-1)
        for _ in range(plan.cancels):
            self.at(rng.uniform(0, plan.duration), self._cancel, life=-1)
            self.at(rng.uniform(0, plan.duration + 1.0), self._look, life=-1)
        if not plan.cut_at:
            for _ in range(plan.cuts):
                self.at(rng.uniform(0, plan.duration), self._cut, life=-1)
        for _ in range(plan.versions):
            self.at(rng.uniform(0, plan.duration), self._replace, life=-1)

    # -- the server

    def _start_server(self) -> None:
        if self._up == self.life:
            return  # cut off again before it was started
        self.dispatch = Dispatch()
        self.disk = _Disk(self)
        self.durable = Durable(self.dispatch, self.disk, self, self.clock, self)
        self.durable.held_limit, self.durable.replay_limit = self.plan.held_limit, self.plan.replay_limit
        self.durable.tidy_limit = self.plan.tidy_limit
        self._wake_at = float("inf")
        for number, retries in enumerate(self.plan.retries):
            delay = self.rng.choice((0.0, 1.0))
            slots, is_broken = self.plan.slots, self._is_broken(f"fu-{number}")
            options = FunctionOptions(0.0, 0.0, retries, initial_delay=delay, concurrency=slots, persists=is_broken)
            self.options[f"fu-{number}"] = options
            self.apply(self.dispatch.add_function(self.now, self._pool(f"fu-{number}"), options))
        for pool_id, (backoff, until) in self.journal.backoffs.items():
            if pool_id == self._pool(_named(pool_id)):
                left = until - self.clock.wall()
                self.dispatch.starts.resume(self.now, pool_id, backoff._replace(left=left))
        self._take_back()
        self.durable.start()
        self._up = self.life
        for number, entry in list(self._unanswered.items()):
            self.at(self.rng.uniform(0, 0.2), self._submit, entry, number, life=-1)

    def _cut(self) -> None:
        """kill -9, or the power goes: all that is in memory is gone, what was committed is not."""
        self.life += 1
        self.is_failing = False
        for key, story in self.stories.items():
            line = self.journal.lines.get(key)
            story.lost = story.executions - (line.attempt if line is not None else 0)
            story.infra_failures = line.infra_failures if line is not None else 0
            attempts, at = story.tried
            if line is not None and not line.end and not self.plan.outage_odds and self.now - at > SOON_S:
                require(line.attempt >= attempts, "what was tried is written down soon", key, line)
            story.tried = (0, 0.0)
            story.dead = story.dead or story.cancel_acknowledged
        if self.rng.random() < 0.3:
            self.clock.jump_wall(self.rng.choice((-3600.0, 3600.0)))
            self._not_before.clear()
        for machine in self.machines.values():
            machine.is_alive = machine.is_alive and machine.is_loaded and self.rng.random() < self.plan.survival
        self.at(self.rng.uniform(0, 1.0), self._start_server, life=-1)

    def _take_back(self) -> None:
        """Containers that have outlived the server before register with this one, and say what they have."""
        back: list[Any] = []
        for machine in [machine for machine in self.machines.values() if machine.is_alive]:
            machine.life, current = self.life, self._pool(_named(machine.pool_id))
            if machine.pool_id == current:
                self.apply(self.dispatch.container_starting(self.now, machine.container_id, current))
            else:
                options, names = self.options[_named(current)], (machine.container_id, machine.pool_id)
                self.apply(self.dispatch.adoption.recall(self.now, *names, options, current, "it was replaced"))
            self.apply(self.dispatch.adoption.outputs_again(self.now, machine.container_id, machine.ended))
            held = [HeldInput(*key, attempt) for key, attempt in machine.running.items()]
            back.append((machine.container_id, self.plan.slots, held))
        self.apply(self.dispatch.adoption.adopt(self.now, back))

    def _replace(self) -> None:
        """A new version takes over, if there is a server that it can be given."""
        if self._up != self.life:
            return
        named = f"fu-{self.rng.randrange(len(self.plan.retries))}"
        before = self._pool(named)
        self._versions[named] = self._versions.get(named, 0) + 1
        self.apply(self.dispatch.add_function(self.now, self._pool(named), self.options[named]))
        self.apply(self.dispatch.supersede(self.now, before, self._pool(named), "it was replaced"))

    def _pool(self, named: str) -> str:
        return f"{named}.{self._versions.get(named, 0)}"

    def commit(self, life: int, name: str, arguments: tuple[Any, ...], promise: Promise) -> None:
        """The disk comes to something it was asked."""
        self.commits += 1
        cuts = dict(self.plan.cut_at)
        if cuts.get(self.commits) is False:
            self._cut()
            return
        if self.rng.random() < self.plan.outage_odds:
            self.is_failing = not self.is_failing
        if self.is_failing and name not in ("window", "payloads") and self.rng.random() < 0.9:
            self.at(0.001, promise.settle, None, ServiceError("the disk is full"))
            return
        value = getattr(self.journal, name)(*arguments)
        if name == "back_off":
            self._not_before[arguments[0]] = self.now + arguments[2] - self.clock.wall()
        if cuts.get(self.commits):
            self._cut()
            return
        self.at(0.0005, promise.settle, value, None)

    # -- what `durable` asks of its owner

    def pool_of(self, call: KeptCall) -> str:
        return self._pool(call.function_id)

    def why_stopped(self, call: KeptCall) -> str:
        return ""

    def describe(self, call: KeptCall) -> Data:
        return Data(call.function_id)

    def stored(self, rows: Sequence[Row]) -> None:
        for row in rows:
            story, line = self.stories[row.call_id, row.idx], self.journal.lines[row.call_id, row.idx]
            require(line.end is not None, "nobody is told before it is written", row)
            require(story.told is None or story.told == line.end, "what was told stays", row, story.told)
            require(not story.told_cancelled, "what was told as cancelled has no other end", row)
            story.told = line.end

    def left_out(self, call_id: str, spared: Collection[int], reason: str) -> None:
        require(call_id in self.journal.cancelled, "nobody is told before it is written", call_id)
        for (known, idx), line in self.journal.lines.items():
            if known == call_id and idx not in spared and line.end is None:
                self.stories[known, idx].told_cancelled = reason

    def _look(self) -> None:
        """A caller asks for a result: an input without a row, of a cancelled call, may have ended all the same."""
        if self._up == self.life:
            for key, line in self.journal.lines.items():
                if line.end is None and key[0] in self.journal.cancelled and self.durable.is_left_out(*key):
                    self.stories[key].told_cancelled = self.journal.cancelled[key[0]][0]

    def apply(self, instructions: list[Any]) -> None:
        for instruction in instructions:
            match instruction:
                case Push():
                    self._push(instruction)
                case Finish():
                    status, message, hint = instruction.status, instruction.message, instruction.hint
                    self.durable.finish(instruction.input, status, message, hint, instruction.output or b"")
                case Dropped():
                    self.durable.dropped(instruction)
                case Retried():
                    story = self.stories[instruction.input.call_id, instruction.input.idx]
                    story.spared += instruction.input.infra_failures - story.infra_failures
                    story.infra_failures = instruction.input.infra_failures
                    story.tried = (instruction.input.attempt, self.now)
                    self.durable.retried(instruction)
                case BackoffChanged(function_id):
                    self._write_backoff(function_id)
                case DemandChanged():
                    self._want_container(instruction.function_id)
                case KillContainer() | StopContainer():
                    self.machines[instruction.container_id].is_alive = False
                    self.at(0.01, self._gone, instruction.container_id)
        deadline = self.dispatch.next_deadline()
        if deadline is not None and deadline < self._wake_at:
            self._wake_at = deadline
            self.at(max(0.0, deadline - self.now), self._wake)

    def _wake(self) -> None:
        self._wake_at = float("inf")
        self.apply(self.dispatch.tick(self.now))

    # -- containers

    def _want_container(self, function_id: str) -> None:
        function = self.dispatch.functions.get(function_id)
        if function is None or function.closed or function.containers or self.now < function.blocked_until:
            return
        due = self._not_before.get(function_id, 0.0)
        require(self.now >= due - 0.001, "a cut brings no start forward", function_id, due, self.now)
        self._containers += 1
        container_id = f"co-{self._containers}"
        self.machines[container_id] = Machine(container_id, function_id, self.life)
        self.apply(self.dispatch.container_starting(self.now, container_id, function_id))
        self.at(0.05, self._ready, container_id)

    def _is_broken(self, function_id: str) -> bool:
        return _named(function_id) == "fu-0" and self.plan.broken_for > 0

    def _write_backoff(self, function_id: str) -> None:
        backoff = backoff_of(self.dispatch.functions[function_id], self.now)
        left = backoff.left if backoff is not None else 0.0
        self.disk.back_off(function_id, backoff, self.clock.wall() + left)

    def _ready(self, container_id: str) -> None:
        container = self.dispatch.containers.get(container_id)
        if not self.machines[container_id].is_alive:
            return
        if (
            container is not None
            and self._is_broken(container.function.function_id)
            and self.now < self.plan.broken_for
        ):
            self.machines[container_id].is_alive = False
            gone = self.dispatch.container_gone(self.now, container_id, "failed to import", init_error=b"init")
            self.apply(gone)
            return
        self.machines[container_id].is_loaded = True
        self.apply(self.dispatch.container_ready(self.now, container_id))

    def _gone(self, container_id: str) -> None:
        self.apply(self.dispatch.container_gone(self.now, container_id, "was killed", fault="infra"))

    def _push(self, push: Push) -> None:
        for input_ in push.inputs:
            story = self.stories[input_.call_id, input_.idx]
            require(not story.cancel_acknowledged or input_.cancelling, "what was cancelled is not begun again", input_)
        leases = [(input_, input_.attempt) for input_ in push.inputs]
        self.durable.look_ahead(push.inputs[0])
        if any(type(input_.payload) is int for input_ in push.inputs):
            self.durable.load(push.inputs, lambda: self._run(push.container_id, leases))
        else:
            self._run(push.container_id, leases)

    def _run(self, container_id: str, leases: list[tuple[Input, int]]) -> None:
        for input_, attempt in leases:
            if input_.container is not None and input_.attempt == attempt:
                self.at(self.rng.uniform(0, 0.01), self._execute, container_id, input_, attempt)

    def _execute(self, container_id: str, input_: Input, attempt: int) -> None:
        if input_.container is None or input_.attempt != attempt:
            return
        key = (input_.call_id, input_.idx)
        rivals = [
            one for one in self.machines.values() if one.is_alive and one.life == self.life and key in one.running
        ]
        require(not rivals, "what runs in a container that outlived a cut is not run again", key, rivals)
        self.machines[container_id].running[key] = attempt
        story, line = self.stories[key], self.journal.lines[key]
        require(input_.payload == story.args, "an input runs with its own arguments", input_, input_.payload)
        require(line.end is None, "what has an end does not run", input_)
        require(not story.dead, "what was cancelled does not run after a restart", input_)
        story.executions += 1
        if story.executions == 1:
            self.order.setdefault(story.function, []).append(line.seq)
        status = "error" if self.rng.random() < self.plan.error_odds else "ok"
        self.at(self.rng.expovariate(5), self._answer, container_id, key, attempt, status, life=-1)

    def _answer(self, container_id: str, key: tuple[str, int], attempt: int, status: str) -> None:
        """An execution has ended, whether there is a server to hear of it or not."""
        machine = self.machines[container_id]
        if not machine.is_alive or machine.running.get(key) != attempt:
            return
        del machine.running[key]
        self.stories[key].answers.add(status)
        result = (*key, status, attempt, status.encode())
        machine.ended.append(result)
        times = 2 if self.rng.random() < 0.1 else 1
        for _ in range(times if machine.life == self._up == self.life else 0):
            self.apply(self.dispatch.outputs(self.now, container_id, [result]))

    # -- callers

    def _spawn(self, number: int) -> None:
        rng = self.rng
        function = rng.randrange(len(self.plan.retries))
        size = rng.randint(1, self.plan.call_size)
        key = f"key-{rng.randrange(3)}" if size == 1 and rng.random() < 0.3 else ""
        call_id = f"fc-{number}"
        cut = rng.randint(1, size)
        parts = [range(cut), range(cut, size)] if cut < size else [range(size)]
        for part in parts:
            items: list[tuple[int, Payload]] = [(idx, rng.randbytes(rng.choice((3, 30)))) for idx in part]
            for idx, args in items:
                assert isinstance(args, bytes)
                self.stories[call_id, idx] = Story(function, args)
            entry = Entry(call_id, f"fu-{function}", "ap-1", "main", "", "", self.clock.wall(), items, key, "")
            number = next(self._numbers)
            self._submit(entry, number)
            if rng.random() < 0.2:
                self.at(rng.uniform(0, 0.5), self._submit, entry, number, life=-1)

    def _submit(self, entry: Entry, number: int) -> None:
        """Until it is answered it is said again: to the next server, and sometimes to the same one twice."""
        self._unanswered[number] = entry

        def told(outcome: Added | Error) -> None:
            if isinstance(outcome, ServiceError):
                self.at(0.5, self._submit, entry, number, life=-1)
                return
            if self.rng.random() < 0.05 and self.life < 20:
                return  # the answer is lost on its way, and the next server is asked again
            self._unanswered.pop(number, None)
            if isinstance(outcome, Added) and outcome.call_id == entry.call_id:
                for idx, _ in entry.items:
                    require((entry.call_id, idx) in self.journal.lines, "what is acknowledged is on disk", entry)
                    self.stories[entry.call_id, idx].acknowledged = True

        if self._up == self.life:
            self.durable.submit(entry, told)

    def _cancel(self) -> None:
        if not self.stories:
            return
        call_id, idx = self.rng.choice(sorted(self.stories))
        idxs = None if self.rng.random() < self.plan.whole else [idx]
        for key, story in self.stories.items():
            if key[0] == call_id and (idxs is None or key[1] in idxs):
                story.cancel_asked = True
        self._send_cancel(Cancel(call_id, idxs, "main", self.rng.random() < 0.5))

    def _send_cancel(self, what: Cancel) -> None:
        life = self.life

        def told(outcome: int | Error) -> None:
            if isinstance(outcome, Error):
                self.at(0.5, self._send_cancel, what, life=-1)
            elif life == self.life:
                for key, line in self.journal.lines.items():
                    if key[0] == what.call_id and (line.cancelled or what.call_id in self.journal.cancelled):
                        self.stories[key].cancel_acknowledged = True

        if self._up == self.life:
            self.durable.cancel(what, told)
        else:
            self.at(0.3, self._send_cancel, what, life=-1)

    # -- judgement

    def _open(self) -> list[Line]:
        return [line for line in self.journal.lines.values() if line.end is None]

    def _check_end(self) -> None:
        require(not self._open(), "every input has an end", self._open()[:3])
        for key, story in self.stories.items():
            line = self.journal.lines.get(key)
            require(line is not None or not story.acknowledged, "what was acknowledged is there", key)
            if line is not None and line.end is not None:
                self._check_line(key, story, line.end)
        if self.plan.slots == 1 and not any(self.plan.retries):
            for function, seqs in self.order.items():
                require(seqs == sorted(seqs), "order is kept", function, seqs)
        durable = self.durable
        require(not durable.paged and not durable.unfinished, "nothing is left", durable.paged, durable.unfinished)
        require(not durable._held and not self.dispatch.calls, "no memory is held", durable._held)

    def _check_line(self, key: tuple[str, int], story: Story, end: Row) -> None:
        allowed = 1 + self.plan.retries[story.function] + story.lost + story.spared
        require(story.executions <= allowed, "attempts stay within their budget", key, story)
        if story.told_cancelled:
            require((end.status, end.message) == ("cancelled", story.told_cancelled), "what was told stays", key, end)
        if end.status == "cancelled":
            require(story.cancel_asked, "only what was cancelled is", key)
        else:
            require(end.status in story.answers, "an end comes from an execution", key, end, story.answers)
            require(story.executions >= 1, "what has a result has run", key)

    def _summary(self) -> dict[str, int]:
        found: dict[str, int] = {"cuts": self.life, "executions": sum(s.executions for s in self.stories.values())}
        for line in self.journal.lines.values():
            if line.end is not None:
                found[line.end.status] = found.get(line.end.status, 0) + 1
        return found


def rehearse(seed: int, plan: Plan | None = None) -> dict[str, int]:
    """Run one seed to its end; how many inputs ended how. Raises InvariantError, which names the seed."""
    return Rehearsal(seed, plan).run()


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m squall.outages`."""
    parser = argparse.ArgumentParser(prog="python -m squall.outages", description="Cut servers off, from seeds.")
    parser.add_argument("--seed", type=int, help="run this seed and tell its story")
    parser.add_argument("--seeds", type=int, default=1000, help="run so many seeds")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    options = parser.parse_args(arguments)
    if options.seed is not None:
        return _replay(options.seed)
    began = time.perf_counter()
    totals: dict[str, int] = {}
    for seed in range(options.first, options.first + options.seeds):
        try:
            for name, count in rehearse(seed).items():
                totals[name] = totals.get(name, 0) + count
        except InvariantError as error:
            print(error, file=sys.stderr)
            return 1
    spent = time.perf_counter() - began
    print(f"{options.seeds} seeds in {spent:.1f} s: " + ", ".join(f"{n} {name}" for name, n in sorted(totals.items())))
    return 0


def _replay(seed: int) -> int:
    rehearsal = Rehearsal(seed)
    rehearsal.story = deque()
    try:
        found = rehearsal.run()
    except InvariantError as error:
        print(error)
        return 1
    print(rehearsal.tell())
    print(f"{rehearsal.plan}\n{found}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
