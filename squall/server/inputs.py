"""What dispatch thinks in: inputs, calls, containers and functions, and the instructions it gives.

Plain state without behaviour of its own; only `dispatch` changes it, and its docstring has the rules. There may be
millions of inputs and each passes here several times, so these are slot classes (a queued input costs about 250
bytes with its place in the queue and in its call) and not dataclasses. How what waits is kept in order, and left out by
the million, is in `lines`. Tested with dispatch.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from squall.protocol.states import InputState, OutputStatus

Fault: TypeAlias = Literal["infra", "container"]
Status: TypeAlias = OutputStatus


@dataclass(frozen=True, slots=True)
class FunctionOptions:
    """What dispatch and autoscaler must know of a function. A `timeout` of 0 or less means none."""

    timeout: float = 300.0
    startup_timeout: float = 300.0
    max_retries: int = 0
    backoff_coefficient: float = 1.0
    initial_delay: float = 1.0
    max_delay: float = 60.0
    min_containers: int = 0
    max_containers: int = 0
    """0: no limit of its own."""
    buffer_containers: int = 0
    scaledown_window: float = 60.0
    single_use: bool = False
    concurrency: int = 1
    """Slots of a container."""
    target: int = 0
    """How many of them the autoscaler counts on; 0: all."""
    is_generator: bool = False
    persists: bool = False
    """It is never given up: what is in the journal waits for as long as no container of it starts."""
    max_pending: int = 2_000_000
    """Inputs that may wait; further ones are rejected."""

    def retry_delay(self, failures: int) -> float:
        """Seconds to wait after the `failures`-th failed attempt (1, 2, ...)."""
        # The exponent is bounded because a float power overflows by raising.
        factor = float(self.backoff_coefficient ** min(failures - 1, 64))
        return min(self.max_delay, self.initial_delay * factor)


class Input:
    """One set of arguments and where it stands. The hand reads it, and may only touch `payload` and `untaken`."""

    __slots__ = (
        "alone",
        "attempt",
        "call",
        "cancelling",
        "container",
        "failures",
        "idx",
        "infra_failures",
        "payload",
        "pushed_at",
        "queued_at",
        "state",
        "untaken",
        "yielded",
    )

    def __init__(self, call: Call, idx: int, payload: Any, now: float) -> None:
        self.call = call
        self.idx = idx
        self.state: InputState = "queued"
        self.attempt = 0
        """Number of the current or next attempt, from 0."""
        self.failures = 0
        """Attempts that cost one of the user's retries."""
        self.infra_failures = 0
        self.container: Container | None = None
        self.payload = payload  # opaque: whatever the hand needs to push and to answer it
        self.queued_at = now
        self.pushed_at = 0.0
        self.yielded = False
        self.untaken = (0, 0)
        """Attempt, and how many values of its generator were not taken yet; kept by the hand."""
        self.cancelling = ""
        """Why it is being cancelled, or empty."""
        self.alone = False
        """A container died while it ran there with others: it is tried again without company."""

    @property
    def call_id(self) -> str:
        return self.call.call_id

    def __repr__(self) -> str:
        return f"<Input {self.call.call_id}/{self.idx} {self.state} attempt={self.attempt}>"


class Call:
    """One invocation. `inputs` holds those that are not done."""

    __slots__ = (
        "call_id",
        "data",
        "done_ahead",
        "done_below",
        "failed",
        "finished",
        "function",
        "inputs",
        "kind",
        "last",
        "line",
        "owner",
        "submitted",
    )

    def __init__(self, call_id: str, function: Function, kind: str, owner: Hashable, data: Any = None) -> None:
        self.call_id = call_id
        self.function = function
        self.kind = kind
        self.owner = owner
        self.data = data  # the hand's own, opaque here
        self.inputs: dict[int, Input] = {}
        self.last = False
        self.line: Line | None = None
        """Of a spawned call with several inputs: where they wait."""
        self.submitted = 0
        self.finished = 0
        self.failed = 0
        # Which idx are done: all below the watermark and those in the set. Results come nearly in order, so the set
        # stays small, whatever the number of inputs.
        self.done_below = 0
        self.done_ahead: set[int] | None = None

    @property
    def function_id(self) -> str:
        return self.function.function_id

    def is_done(self, idx: int) -> bool:
        return 0 <= idx < self.done_below or (self.done_ahead is not None and idx in self.done_ahead)

    def reopen(self, idx: int) -> None:
        """Its result went lost on its way to the caller, and it may be submitted again. Costs as much as there are
        results after it."""
        ahead = self.done_ahead or set()
        if idx < self.done_below:
            ahead |= set(range(idx + 1, self.done_below))
            self.done_below = idx
        ahead.discard(idx)
        self.done_ahead = ahead

    def mark_done(self, idx: int) -> None:
        ahead = self.done_ahead
        if idx != self.done_below:
            if ahead is None:
                ahead = self.done_ahead = set()
            ahead.add(idx)
            return
        self.done_below += 1
        while ahead and self.done_below in ahead:
            ahead.remove(self.done_below)
            self.done_below += 1


class Run:
    """Inputs of one spawned call that wait one behind the other: one entry of their function's queue."""

    __slots__ = ("at", "inputs", "line")
    state: Literal["run"] = "run"
    """Where an Input in the queue has its own."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self.inputs: list[Input | None] = []
        """May hold some that are done already, as the queue itself may, and holes."""
        self.at = 0
        """Those before are gone."""


class Line:
    """Where the unfinished inputs of a spawned call are: in one of its runs, or else in `outside`. So all that wait can
    be left out, or move, without a look at each."""

    __slots__ = ("call", "outside", "runs")

    def __init__(self, call: Call) -> None:
        self.call = call
        self.runs: dict[Run, None] = {}
        self.outside = dict(call.inputs)
        """What runs, waits to be tried again or to run alone, by idx."""


class Container:
    """A container as dispatch sees it: its slots and what runs in them."""

    __slots__ = (
        "attended",
        "container_id",
        "function",
        "idle_since",
        "open_slots",
        "ready_at",
        "reason",
        "running",
        "slots",
        "started_at",
        "state",
        "stop_asked",
    )

    def __init__(self, container_id: str, function: Function, now: float) -> None:
        self.container_id = container_id
        self.function = function
        self.state: Literal["starting", "ready", "draining"] = "starting"
        self.slots = function.options.concurrency
        # Slots that may be filled now: 0 unless ready, 1 while an input runs alone, 0 once a single use is used up.
        self.open_slots = 0
        self.running: dict[Input, None] = {}
        self.started_at = now
        self.ready_at = 0.0
        self.idle_since = now
        self.stop_asked = False
        self.attended = False
        """Somebody sits at a terminal in it: no timeout ends what runs here."""
        self.reason = ""
        """Why it drains."""

    def __repr__(self) -> str:
        return f"<Container {self.container_id} {self.state} {len(self.running)}/{self.slots}>"


class Function:
    """A function's queue and containers, and what has been measured of it."""

    __slots__ = (
        "active_at",
        "ask_at",
        "blocked_for",
        "blocked_reason",
        "blocked_until",
        "closed",
        "cold_start",
        "containers",
        "crowd",
        "crowd_timer",
        "early_ends",
        "ending",
        "exec_time",
        "failed",
        "failing",
        "finished",
        "finished_at",
        "free",
        "function_id",
        "hurries",
        "lag",
        "options",
        "queue",
        "queued",
        "reserved",
        "running",
        "start_failed_at",
        "start_failures",
        "start_timer",
        "starting",
        "stuck",
        "successor",
        "suspected",
        "suspects",
        "timeout_timer",
        "typical",
        "waiting",
    )

    def __init__(self, function_id: str, options: FunctionOptions, now: float) -> None:
        self.function_id = function_id
        self.options = options
        self.closed = ""
        """Why it takes nothing more, or empty."""
        self.successor: Function | None = None
        """Of one that was superseded: where all goes that was not running."""
        self.ending = False
        """What waits is being ended, some at a time: see `endings`."""
        # The queue may hold inputs that are done already (cancelled while queued); `queued` counts the others. To be
        # used by `lines` only.
        self.queue: deque[Input | Run] = deque()
        self.queued = 0
        self.suspects: deque[Input] = deque()
        """Waiting to run alone; as in the queue, `suspected` of them are alive."""
        self.suspected = 0
        self.reserved: Container | None = None
        """Takes nothing until it is empty, then a suspect."""
        self.waiting = 0
        """Inputs in backoff."""
        self.containers: dict[str, Container] = {}
        self.free: dict[Container, None] = {}
        """Ready containers with room, the most recently used last."""
        self.starting: dict[Container, None] = {}
        self.running: dict[Input, float] = {}
        """With when the clock of its timeout began, and in that order: with one timeout for all, their deadlines'."""
        self.timeout_timer = 0
        self.start_timer = 0
        self.ask_at = 1
        """The backlog at which the autoscaler is asked again, see `_ask`."""
        self.start_failures = 0
        self.start_failed_at = float("-inf")
        self.early_ends = 0
        """Containers in a row that died of themselves soon after they were ready, with nothing done."""
        self.hurries = False
        """Something that is not in the journal may be queued."""
        self.blocked_until = float("-inf")
        self.blocked_for = 0.0
        """The whole delay that it is the end of."""
        self.blocked_reason = ""
        self.failing: StartFailure | None = None
        self.exec_time: float | None = None
        """Seconds an input takes in its container."""
        # What `crowd` knows: how long the tiny inputs take there, the least that the way there and back adds, how many
        # run for longer, and of all that how many may run at once.
        self.typical = 0.0
        self.lag = float("inf")
        self.stuck = 0
        self.crowd = sys.maxsize
        self.crowd_timer = False
        self.cold_start: float | None = None
        self.active_at = now
        """When an input arrived last."""
        self.finished_at = now
        self.finished = 0
        self.failed = 0

    def pending(self) -> int:
        return self.queued + self.suspected + self.waiting


class History(NamedTuple):
    """What an earlier server knew of an input."""

    attempt: int
    failures: int
    infra_failures: int
    delay: float
    """Seconds it still has to wait."""


class StartFailure(NamedTuple):
    """Why no container of a function starts: what the inputs that fail of it are told."""

    message: str
    hint: str
    output: Any


# ---- instructions -----------------------------------------------------------------------------------------------


class Push:
    """Send these inputs to the container's runner (`RunItem.attempt` is `input.attempt`)."""

    __slots__ = ("container_id", "inputs")

    def __init__(self, container_id: str, inputs: list[Input]) -> None:
        self.container_id = container_id
        self.inputs = inputs


class Finish:
    """The one end of an input. `output` is what the event carried: the `Result.output`, or the `init_error`."""

    __slots__ = ("hint", "input", "message", "output", "status")

    def __init__(self, input_: Input, status: Status, message: str, hint: str, output: Any) -> None:
        self.input = input_
        self.status = status
        self.message = message
        self.hint = hint
        self.output = output


class Dropped:
    """What waited of a spawned call has ended as cancelled, all at once: there is no Finish for each. The hand takes
    `inputs` and `runs` to pieces some at a time, as a million at once is a pause that others feel; of the inputs, those
    that `spared` names go on and have a Finish of their own."""

    __slots__ = ("call", "count", "inputs", "message", "runs", "spared")

    def __init__(
        self, call: Call, message: str, inputs: dict[int, Input], runs: list[list[Input | None]], spared: frozenset[int]
    ) -> None:
        self.call = call
        self.message = message
        self.inputs = inputs
        self.runs = runs
        self.spared = spared
        self.count = len(inputs) - len(spared)


class Retried:
    """An attempt at a spawned input failed, and it is tried again after `delay` seconds: its counts have changed."""

    __slots__ = ("delay", "input")

    def __init__(self, input_: Input, delay: float) -> None:
        self.input = input_
        self.delay = delay


@dataclass(frozen=True, slots=True)
class CancelRunning:
    """Ask the runner to raise in this input; whatever it answers is expected as an output."""

    container_id: str
    input: Input
    reason: str


@dataclass(frozen=True, slots=True)
class KillContainer:
    """End it from outside, at once. Nothing is expected from it but `container_gone`."""

    container_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class StopContainer:
    """It holds no input (any more) and gets none: let it run its exit hooks, for at most `grace` seconds."""

    container_id: str
    grace: float
    reason: str


@dataclass(frozen=True, slots=True)
class DemandChanged:
    """Ask the autoscaler about this function now. (A periodic round, every second or so, asks about all.)"""

    function_id: str


@dataclass(frozen=True, slots=True)
class Notice:
    """Something a person following the app wants to know; kinds as in `protocol.messages.Notice`."""

    function_id: str
    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class BackoffChanged:
    """A function that persists has failed to start, or started again: write it down, see `starts.backoff_of`."""

    function_id: str


Instruction: TypeAlias = (
    Push
    | Finish
    | Dropped
    | Retried
    | CancelRunning
    | KillContainer
    | StopContainer
    | DemandChanged
    | Notice
    | BackoffChanged
)
Instructions: TypeAlias = list[Instruction]
Result: TypeAlias = tuple[str, int, str, int, Any]
"""call_id, idx, status, attempt, and what `Finish.output` shall carry."""
