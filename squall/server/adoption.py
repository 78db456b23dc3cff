"""What dispatch does with containers that have outlived a server: they go on with what they run.

Part of the brain in `dispatch`, which has the rules; no clock, no I/O. A container that comes back names the inputs it
has. One that is queued here, from the journal or sent again by its client, runs there from now on. One that nobody has
named yet is *claimed*: a stand-in holds its slot until its caller comes back, for RESUME_GRACE, and its result if that
comes first; then its caller gets it at once, and it is not run again. What nobody came back for is cancelled. An input
whose attempt here is a later one is not the same: what comes of the earlier is dropped. A container of a function that
was superseded ends what it has for the successor, whose inputs these are now, and gets nothing more. Tested in
`tests/unit/test_adoption.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from squall.server import lines
from squall.server.inputs import (
    Call,
    Container,
    Function,
    FunctionOptions,
    Input,
    Instructions,
    KillContainer,
    Result,
    Status,
)
from squall.server.succession import last_of

if TYPE_CHECKING:
    from squall.server.dispatch import Dispatch

RESUME_GRACE = 30.0
KEPT_LIMIT = 20_000
"""Results without a caller that are kept; the oldest go first."""
STAND_IN = "stand-in"
"""Kind of the call of an input that only stands for one whose caller is not back yet."""

Key = tuple[str, int]


class HeldInput(NamedTuple):
    """What a container says it has. Of a broken one the values are lost: it only takes up its slot until it ends."""

    call_id: str
    idx: int
    attempt: int
    is_broken: bool = False


Back: TypeAlias = tuple[str, int, Iterable[HeldInput]]
"""Container, its slots (0: the function's concurrency), what it holds."""


class Kept(NamedTuple):
    """The end of an input whose caller is not back yet. Only a caller of the same function may have it: who names an
    input is a tenant."""

    function: Function
    attempt: int
    status: Status
    message: str
    hint: str
    output: Any
    until: float


class Adoption:
    def __init__(self, dispatch: Dispatch) -> None:
        self.dispatch = dispatch
        self.claims: dict[Key, Input | Kept] = {}
        """What callers that come back find: a stand-in that runs, or how it ended."""
        self._stand_ins: dict[tuple[str, str, int], Input] = {}
        """By container and what it runs; those that no caller may have any more too."""
        self.lost: dict[Key, tuple[str, int]] = {}
        """What ran on nodes that this server has given up: in which container, at which attempt. Whether it was given
        to another since, its own state says."""

    def stand_ins(self) -> Iterator[Input]:
        return iter(self._stand_ins.values())

    # ---- events ---------------------------------------------------------------------------------------------------

    def lose(self, container_id: str) -> None:
        """To be told before `container_gone` of a container that may come back with its node, as it was."""
        container = self.dispatch.containers.get(container_id)
        for input_ in container.running if container is not None else ():
            self.lost.pop(_key(input_), None)
            self.lost[_key(input_)] = (container_id, input_.attempt)
        while len(self.lost) > KEPT_LIMIT:
            del self.lost[next(iter(self.lost))]

    def recall(
        self, now: float, container_id: str, old_id: str, options: FunctionOptions, new_id: str, reason: str
    ) -> Instructions:
        """A container has come back whose function, `old_id`, was superseded by `new_id` before the restart."""
        dispatch = self.dispatch
        new = dispatch.functions.get(new_id)
        old = dispatch.functions.get(old_id)
        if new is None or new.closed or container_id in dispatch.containers:
            return [KillContainer(container_id, "its function has ended")]
        if old is None:
            old = dispatch.functions[old_id] = Function(old_id, options, now)
            old.closed, old.successor = reason or "superseded", new
        container = dispatch.containers[container_id] = Container(container_id, old, now)
        old.containers[container_id] = container
        old.starting[container] = None
        if not old.start_timer:
            dispatch._arm_starts(old)
        return []

    def adopt(self, now: float, back: Iterable[Back]) -> Instructions:
        """`container_ready` of those that have come back, with what they hold. Of all of them first: what one holds
        must not be given to another that has room."""
        out: Instructions = []
        placed: list[tuple[Container, int]] = []
        for container_id, slots, held in back:
            container = self.dispatch.containers.get(container_id)
            if container is None:
                out.append(KillContainer(container_id, "the server does not know it"))
            elif container.state == "starting":
                for one in {(one.call_id, one.idx): one for one in held}.values():
                    self._place(now, container, one)
                placed.append((container, slots))
        for container, slots in placed:
            self._ready(now, container, slots, out)
        self.dispatch._settle(now, out)
        self.dispatch._at(now + RESUME_GRACE, self._expire, None, 0)
        return out

    def _ready(self, now: float, container: Container, slots: int, out: Instructions) -> None:
        dispatch, function = self.dispatch, container.function
        single_use = function.options.single_use
        if len(container.running) > (1 if single_use else slots or function.options.concurrency):
            dispatch._kill(now, container, "it says it holds more inputs than it has slots", out)
            return
        if function.closed:
            dispatch._begin_drain(container, function.closed)
            if not container.running:
                dispatch._stop(container, out)
            self._watch(now, container, out)
            return
        if single_use and not container.running:
            out += dispatch.drain(now, container.container_id, "it may have been used once")
            return
        cold_start = function.cold_start
        out += dispatch.container_ready(now, container.container_id, slots)
        function.cold_start = cold_start  # this was no start
        if single_use:
            container.open_slots = 0
            function.free.pop(container, None)
        self._watch(now, container, out)

    def _watch(self, now: float, container: Container, out: Instructions) -> None:
        dispatch, function = self.dispatch, container.function
        for input_ in list(container.running):
            if input_.call.kind == STAND_IN and self.claims.get(_key(input_)) is not input_:
                dispatch._cancel_one(now, input_, "nobody can use what comes of it any more", False, out)
        if not function.timeout_timer:
            dispatch._arm_timeouts(function)

    def _place(self, now: float, container: Container, one: HeldInput) -> None:
        call = self.dispatch.calls.get(one.call_id)
        input_ = call.inputs.get(one.idx) if call is not None else None
        is_queued = input_ is not None and input_.state == "queued" and not input_.alone
        if input_ is not None and is_queued and self._is_same(input_, container, one.attempt) and not one.is_broken:
            lines.remove(input_)
            self.dispatch._leave(input_, "running")
        else:
            stand_in = self._stand_in(now, container, one)
            key = one.call_id, one.idx
            is_over = (call is not None and call.is_done(one.idx)) or key in self.lost
            claim = self.claims.get(key)
            is_newest = claim is None or (isinstance(claim, Kept) and claim.attempt < one.attempt)
            if input_ is None and not is_over and not one.is_broken and is_newest:
                self.claims[key] = stand_in
            input_ = stand_in
        self._run(now, container, input_, one.attempt)

    def _stand_in(self, now: float, container: Container, one: HeldInput) -> Input:
        call = Call(one.call_id, container.function, STAND_IN, None)
        call.last = True
        input_ = call.inputs[one.idx] = Input(call, one.idx, None, now)
        input_.yielded = True  # as for one that has yielded: there is nothing to try again
        self._stand_ins[container.container_id, one.call_id, one.idx] = input_
        return input_

    def _run(self, now: float, container: Container, input_: Input, attempt: int) -> None:
        input_.state, input_.container, input_.attempt, input_.pushed_at = "running", container, attempt, now
        container.running[input_] = None
        container.function.running[input_] = now
        if input_.call.line is not None:
            input_.call.line.outside[input_.idx] = input_

    def _is_same(self, input_: Input, container: Container, attempt: int) -> bool:
        """Whether what a container did or does is this input's. An attempt that was given up with its node is, until
        the next one was given out."""
        is_current = input_.attempt <= attempt
        if not is_current and input_.attempt == attempt + 1:
            is_current = self.lost.get(_key(input_)) == (container.container_id, attempt)
        return is_current and input_.call.function is last_of(container.function) and not input_.cancelling

    def outputs_again(self, now: float, container_id: str, results: Iterable[Result]) -> Instructions:
        """Ends of attempts that a container has told an earlier server, which may not have heard."""
        out: Instructions = []
        container = self.dispatch.containers.get(container_id)
        for call_id, idx, status, attempt, output in results if container is not None else ():
            assert container is not None
            call = self.dispatch.calls.get(call_id)
            input_ = call.inputs.get(idx) if call is not None else None
            if input_ is not None and input_.state == "queued" and self._is_same(input_, container, attempt):
                self._end_queued(now, input_, status, attempt, output, out)
            elif input_ is not None or (call_id, idx) in self.lost:
                self.dispatch.stale_outputs += 1
            elif (call is None or not call.is_done(idx)) and status in ("ok", "error"):
                end: Status = "ok" if status == "ok" else "error"
                self._keep((call_id, idx), Kept(container.function, attempt, end, "", "", output, now + RESUME_GRACE))
        if container is not None:
            self.dispatch._at(now + RESUME_GRACE, self._expire, None, 0)
            self.dispatch._settle(now, out)
        return out

    def _end_queued(self, now: float, input_: Input, status: str, attempt: int, output: Any, out: Instructions) -> None:
        function = input_.call.function
        if input_.alone:
            function.suspects.remove(input_)
        else:
            lines.remove(input_)
        input_.attempt = attempt
        if status == "ok":
            self.dispatch._finish(now, input_, "ok", "", "", output, out)
        else:
            self.dispatch._fail(now, input_, status, output, out)
        self.dispatch._unsettled[function] = None

    # ---- what dispatch asks -----------------------------------------------------------------------------------------

    def take(self, now: float, input_: Input, out: Instructions) -> bool:
        """An input has come in: whether it is one that runs already or has ended, and need not be queued."""
        claim = self.claims.get(_key(input_))
        if claim is None:
            return False
        if isinstance(claim, Kept):
            if last_of(claim.function) is not input_.call.function:
                return False
            del self.claims[_key(input_)]
            return claim.attempt >= input_.attempt and self._give(now, input_, claim, out)
        container = claim.container
        if container is None or claim.cancelling or not self._is_same(input_, container, claim.attempt):
            return False
        self._forget(claim, container)
        self.dispatch._leave(claim, "done")
        self._run(now, container, input_, claim.attempt)
        return True

    def _give(self, now: float, input_: Input, kept: Kept, out: Instructions) -> bool:
        """Its end; but for a failure that leaves it another try, which it then begins with."""
        if kept.status == "error" and input_.failures < input_.call.function.options.max_retries:
            input_.failures += 1
            input_.attempt = kept.attempt + 1
            return False
        input_.attempt = kept.attempt
        input_.state = "done"  # it never was in the queue
        self.dispatch._finish(now, input_, kept.status, kept.message, kept.hint, kept.output, out)
        return True

    def settle(self, now: float, container: Container | None, result: Result, out: Instructions) -> bool:
        """A container sent a result that it has no lease for: whether it belongs to a stand-in, which then ends."""
        call_id, idx, status, attempt, output = result
        stand_in = self._stand_ins.get((container.container_id, call_id, idx)) if container is not None else None
        if stand_in is None or stand_in.attempt != attempt:
            return False
        if status == "ok":
            self.dispatch._finish(now, stand_in, "ok", "", "", output, out)
        else:
            self.dispatch._fail(now, stand_in, status, output, out)
        return True

    def end(self, now: float, stand_in: Input, status: Status, message: str, hint: str, output: Any) -> None:
        """A stand-in has ended. What it came to is kept for its caller; if that is nothing, it is run again when the
        caller is back."""
        is_claimed = self.claims.get(_key(stand_in)) is stand_in
        if stand_in.container is not None:
            self._forget(stand_in, stand_in.container)
        self.dispatch._leave(stand_in, "done")
        if is_claimed and not stand_in.cancelling and status in ("ok", "error", "timeout"):
            kept = Kept(stand_in.call.function, stand_in.attempt, status, message, hint, output, now + RESUME_GRACE)
            self._keep(_key(stand_in), kept)
            self.dispatch._at(kept.until, self._expire, None, 0)

    # ---- ends -------------------------------------------------------------------------------------------------------

    def _keep(self, key: Key, kept: Kept) -> None:
        if isinstance(self.claims.get(key), Input):
            return
        self.claims.pop(key, None)
        self.claims[key] = kept
        if len(self.claims) > KEPT_LIMIT:
            oldest = next((key for key, claim in self.claims.items() if isinstance(claim, Kept)), None)
            if oldest is not None:
                del self.claims[oldest]

    def _forget(self, stand_in: Input, container: Container) -> None:
        self._stand_ins.pop((container.container_id, *_key(stand_in)), None)
        if self.claims.get(_key(stand_in)) is stand_in:
            del self.claims[_key(stand_in)]

    def _expire(self, now: float, _subject: Any, _token: int, out: Instructions) -> None:
        for key, claim in list(self.claims.items()):
            if isinstance(claim, Kept):
                if claim.until <= now:
                    del self.claims[key]
            elif claim.pushed_at + RESUME_GRACE <= now:
                del self.claims[key]
                self.dispatch._cancel_one(now, claim, "nobody came back for it", False, out)


def _key(input_: Input) -> Key:
    return input_.call_id, input_.idx
