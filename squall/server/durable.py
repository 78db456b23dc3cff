"""Durable calls: what is between dispatch, which runs inputs, and the journal, which remembers them.

A spawned input is in the journal before it is acknowledged or queued, its result before anybody is told, a cancel
before it counts. What must be written while a write is under way goes with the next one, so that a thousand callers
share a sync. A restart reads what has not ended, in its order and in windows, and gives it back to dispatch with the
attempts it has had; what comes in meanwhile is found by that reading and not queued twice. Arguments stay on disk when
many wait, and are read some way ahead of their turn.

A call that is cancelled as a whole is one row that says so. What waited of it leaves dispatch in one step, is read as
cancelled from then on, and gets rows of its own, like the memory it took, some at a time and behind everybody else.

It has no thread, socket or clock of its own and knows the Store by its futures, so that `squall.testing` runs it
against a disk that loses power at any point. Must never tell anybody of what is not written. Tested in
`tests/unit/test_outages.py`, by the simulator, and over the real Store in `tests/integration/test_restarts.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, Protocol

from squall._clock import Clock
from squall._observe import Logger
from squall.exception import Error, InternalError, ResourceExhaustedError
from squall.protocol.states import OutputStatus
from squall.server import lines
from squall.server.dispatch import Dispatch
from squall.server.inputs import Dropped, History, Input, Retried
from squall.server.journal import CANCELLED, Added, Entry, Kept, KeptCall, Note, Payload, Row, Window

log = Logger("server")

ADD_LIMIT = 1000
"""Submits of one write."""
FINISH_LIMIT = 2000
"""Results of one write: others wait for the Store too."""
REPLAY_LIMIT = 500
"""Inputs given back to dispatch at once: calls that are served meanwhile wait that long."""
HELD_LIMIT_BYTES = 64 << 20
"""Arguments of waiting spawned inputs that are kept in memory; of others they are read again when their turn comes."""
AHEAD_LIMIT = 500
AHEAD_BYTES = 8 << 20
"""How far ahead of their turn arguments are read."""
TIDY_LIMIT = 1000
"""Inputs of cancelled calls that get their rows in one write: others wait for the Store too."""
TIDY_PAUSE_S = 0.005
SWEEP_LIMIT = 2000
"""Inputs of cancelled calls that are let go of at once."""
RETRY_S = 1.0
"""After a write that failed: a full disk, for instance."""
LOST_HINT = "spawn it again"

Told = Callable[[Added | Error], None]


class Cancel(NamedTuple):
    """What a client wants cancelled."""

    call_id: str
    idxs: list[int] | None
    """None: all inputs of the call."""
    workspace: str
    terminate: bool


class Tidying:
    """A cancelled call on its way from one row to a row for each of its inputs."""

    __slots__ = ("after", "barrier", "call_id", "is_told", "reason", "spared")

    def __init__(self, call_id: str, spared: Collection[int], barrier: int) -> None:
        self.call_id = call_id
        self.spared = spared
        """Inputs that ran when it was cancelled: they have ends of their own."""
        self.barrier = barrier
        """So many ends have to be on disk before: some are of inputs of this call."""
        self.reason = CANCELLED
        self.after = -1
        self.is_told = False


class Loop(Protocol):
    """What is needed of an event loop."""

    def call_soon(self, callback: Callable[..., Any], *args: Any) -> Any: ...

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> Any: ...


class Store(Protocol):
    """`journal.Journal`, or a simulated one: each gives a future with `add_done_callback`; writes happen in order."""

    def add(self, entries: Sequence[Entry]) -> Any: ...

    def finish(self, rows: Sequence[Row]) -> Any: ...

    def note(self, rows: Sequence[Note]) -> Any: ...

    def cancel(self, call_id: str, idxs: list[int] | None, workspace: str, now_wall: float, counted: bool) -> Any: ...

    def mark(self, call_id: str, reason: str, now_wall: float) -> Any: ...

    def tidy(self, call_id: str, after: int, limit: int, spared: Collection[int]) -> Any: ...

    def window(self, after: int, limit: int) -> Any: ...

    def payloads(self, seqs: Sequence[int]) -> Any: ...


class Owner(Protocol):
    """Who knows functions, calls and those that wait for results."""

    def pool_of(self, call: KeptCall) -> str:
        """Id of the pool that runs the call's function now; empty when its app is not there any more."""

    def why_stopped(self, call: KeptCall) -> str:
        """Why the call's app was stopped; empty where it was not, or is not known."""

    def describe(self, call: KeptCall) -> Any:
        """What to hang on a call as its `data`."""

    def stored(self, rows: Sequence[Row]) -> None:
        """These ends are on disk."""

    def left_out(self, call_id: str, spared: Collection[int], reason: str) -> None:
        """All inputs of the call that have no end are cancelled, and it is on disk that they are; but for `spared`."""

    def apply(self, instructions: list[Any]) -> None:
        """Carry out dispatch's instructions."""


class Durable:
    def __init__(self, dispatch: Dispatch, store: Store, owner: Owner, clock: Clock, loop: Loop) -> None:
        self.dispatch = dispatch
        self.store = store
        self.owner = owner
        self.clock = clock
        self.loop = loop
        self.replaying = True
        """Until all that an earlier server left is queued. What is new meanwhile is found with it, behind it."""
        self.paged = 0
        """Waiting inputs whose arguments are on disk only."""
        self.unfinished: dict[str, int] = {}
        """Per function, by what its callers name: spawned inputs that have not ended."""
        self.limit = 1_000_000
        """Spawned inputs of one function that may be unfinished."""
        self.held_limit = HELD_LIMIT_BYTES
        self.replay_limit = REPLAY_LIMIT
        self._held = 0
        self._mean = 1024.0
        """Bytes of arguments, a moving average."""
        self._cursor = 0
        self._started = False
        self._entries: deque[tuple[Entry, Told]] = deque()
        self._adding = False
        self._rows: deque[Row] = deque()
        self._finishing = False
        self._notes: dict[tuple[str, int], Note] = {}
        self._noting = False
        self._loading: set[int] = set()
        self.tidy_limit = TIDY_LIMIT
        self._tidying: dict[str, Tidying] = {}
        self._recorded = self._written = 0
        """Ends that were to be written, and those that were."""

    # ---- in -----------------------------------------------------------------------------------------------------

    def submit(self, entry: Entry, told: Told) -> None:
        """Write inputs down, then queue them; `told` hears what became of them once they are on disk. Raises
        ResourceExhaustedError when too many wait."""
        waiting = self.unfinished.get(entry.function_id, 0)
        if waiting + len(entry.items) > self.limit:
            raise ResourceExhaustedError(
                f"cannot spawn {len(entry.items)} more: {waiting:,} spawned inputs of the function have not ended, the "
                f"limit is {self.limit:,}",
                hint="spawn more when some have ended, or raise the server's setting `spawn_limit`",
            )
        self._count(entry.function_id, len(entry.items))
        self._entries.append((entry, told))
        if not self._adding:
            self._adding = True
            self.loop.call_soon(self._write_entries)

    def _write_entries(self) -> None:
        self.start()  # first: where nothing is left of before, what is written now need not be read again
        batch = [self._entries.popleft() for _ in range(min(ADD_LIMIT, len(self._entries)))]
        self.store.add([entry for entry, _ in batch]).add_done_callback(lambda done: self._added(done, batch))

    def _added(self, done: Any, batch: list[tuple[Entry, Told]]) -> None:
        error = done.exception()
        if error is not None and len(batch) > 1:
            self._add_one_by_one(deque(batch))
            return
        outcomes: list[Added | Error] = [_as_error(error)] if error is not None else done.result()
        self._settle(batch, outcomes)
        self._write_more_entries()

    def _write_more_entries(self) -> None:
        self._adding = bool(self._entries)
        if self._adding:
            self._write_entries()

    def _add_one_by_one(self, batch: deque[tuple[Entry, Told]]) -> None:
        """One of them cannot be written, or none: only who it concerns shall hear of it."""
        if not batch:
            self._write_more_entries()
            return
        one = batch.popleft()

        def added(done: Any) -> None:
            error = done.exception()
            self._settle([one], [_as_error(error)] if error is not None else done.result())
            self._add_one_by_one(batch)

        self.store.add([one[0]]).add_done_callback(added)

    def _settle(self, batch: list[tuple[Entry, Told]], outcomes: list[Added | Error]) -> None:
        for (entry, told), outcome in zip(batch, outcomes, strict=True):
            self._count(entry.function_id, -len(entry.items))
            # While the journal is read, that reading comes to these too: they are behind all it has read so far.
            if isinstance(outcome, Added) and outcome.items and not self.replaying:
                self._enqueue(entry, outcome)
            told(outcome)

    def _enqueue(self, entry: Entry, added: Added) -> None:
        call = KeptCall(
            entry.call_id, entry.function_id, entry.app_id, entry.method, entry.parent, entry.created_at, False
        )
        if not self.owner.pool_of(call):
            self._end_homeless(call, [idx for idx, _ in added.items])
            return
        items: list[tuple[int, Any]] = []
        for number, (idx, payload) in enumerate(added.items, added.seq):
            items.append((idx, self._hold(payload, number)))
        self._queue(call, items)

    def _hold(self, payload: Payload, seq: int) -> Payload | int:
        """The arguments themselves while there is room for them, else where they are."""
        if isinstance(payload, str):
            return payload
        self._mean += (len(payload) - self._mean) / 64
        if self._held + len(payload) > self.held_limit:
            self.paged += 1
            return seq
        self._held += len(payload)
        return payload

    def _queue(self, call: KeptCall, items: Sequence[tuple[int, Any]]) -> None:
        pool_id = self.owner.pool_of(call)
        self._count(call.function_id, len(items))
        # Each submit is the last one known of: what is repeated is told by the journal, not by dispatch's memory.
        instructions = self.dispatch.submit(
            self.clock.monotonic(), call.call_id, pool_id, items, "spawn", None, data=self.owner.describe(call)
        )
        self.owner.apply(instructions)

    # ---- out ----------------------------------------------------------------------------------------------------

    def finish(self, input_: Input, status: OutputStatus, message: str, hint: str, data: Payload) -> None:
        """An input has ended: write it down, and tell those who wait when that is done."""
        self._let_go(input_)
        self._count(input_.call.data.function_id, -1)
        self._notes.pop((input_.call_id, input_.idx), None)
        self._record(Row(input_.call_id, input_.idx, status, message, hint, data, self.clock.wall()))

    def _count(self, function_id: str, more: int) -> None:
        count = self.unfinished.get(function_id, 0) + more
        if count:
            self.unfinished[function_id] = count
        else:
            self.unfinished.pop(function_id, None)

    def _let_go(self, input_: Input) -> None:
        payload, input_.payload = input_.payload, None
        if isinstance(payload, bytes):
            self._held -= len(payload)
        elif isinstance(payload, int):
            self.paged -= 1

    def _record(self, row: Row) -> None:
        self._rows.append(row)
        self._recorded += 1
        if not self._finishing:
            self._finishing = True
            self.loop.call_soon(self._write_rows)

    def _write_rows(self) -> None:
        rows = [self._rows.popleft() for _ in range(min(FINISH_LIMIT, len(self._rows)))]
        self.store.finish(rows).add_done_callback(lambda done: self._finished(done, rows))

    def _finished(self, done: Any, rows: list[Row]) -> None:
        error = done.exception()
        if error is not None:  # a full disk: what was promised to be kept is kept here until there is room
            log.error("results could not be stored and are tried again", results=len(rows), error=str(error))
            self._rows.extendleft(reversed(rows))
            self.loop.call_later(RETRY_S, self._write_rows)
            return
        self._written += len(rows)
        self.owner.stored(rows)
        self._finishing = bool(self._rows)
        if self._finishing:
            self._write_rows()

    def retried(self, instruction: Retried) -> None:
        """An attempt failed and another follows: a restart must know. Nobody waits for this write; where it is lost,
        the attempt is as one whose end never arrived."""
        input_ = instruction.input
        not_before = self.clock.wall() + instruction.delay if instruction.delay > 0 else None
        self._notes[input_.call_id, input_.idx] = Note(
            input_.call_id, input_.idx, input_.attempt, input_.failures, input_.infra_failures, not_before
        )
        if not self._noting:
            self._noting = True
            self.loop.call_soon(self._write_notes)

    def _write_notes(self) -> None:
        notes, self._notes = list(self._notes.values()), {}
        if not notes:
            self._noting = False
            return
        self.store.note(notes).add_done_callback(self._noted)

    def _noted(self, done: Any) -> None:
        error = done.exception()
        if error is not None:
            log.error("attempts could not be stored", error=str(error))
        self._write_notes()

    # ---- cancel ---------------------------------------------------------------------------------------------------

    def cancel(self, what: Cancel, told: Callable[[int | Error], None]) -> None:
        """Write down that inputs are cancelled, then cancel them; `told` hears how many had not ended."""
        counted = self.replaying or what.idxs is not None  # else dispatch has them all
        future = self.store.cancel(what.call_id, what.idxs, what.workspace, self.clock.wall(), counted)
        future.add_done_callback(lambda done: self._cancelled(done, what, counted, told))

    def _cancelled(self, done: Any, what: Cancel, counted: bool, told: Callable[[int | Error], None]) -> None:
        error = done.exception()
        if error is not None:
            told(_as_error(error))
            return
        count: int | None = done.result()
        call = self.dispatch.calls.get(what.call_id)
        if count is not None and call is not None:
            count = count if counted else len(call.inputs)
            now = self.clock.monotonic()
            self.owner.apply(self.dispatch.cancel(now, what.call_id, what.idxs, CANCELLED, what.terminate))
        told(count or 0)

    def dropped(self, dropped: Dropped) -> None:
        """What waited of a call has left dispatch: say so on disk, if that is not what began it, and tidy up."""
        self._count(dropped.call.data.function_id, -dropped.count)
        self._sweep(dropped)
        task = self._tidying[dropped.call.call_id] = Tidying(dropped.call.call_id, dropped.spared, self._recorded)
        self._mark(task, dropped.message)

    def _sweep(self, dropped: Dropped) -> None:
        inputs, runs = dropped.inputs, dropped.runs
        for _ in range(min(SWEEP_LIMIT, len(inputs))):
            idx, input_ = inputs.popitem()
            if idx not in dropped.spared:
                self._let_go(input_)
        left = SWEEP_LIMIT
        while runs and left > 0:
            left -= len(runs[-1]) or 1
            del runs[-1][-SWEEP_LIMIT:]
            if not runs[-1]:
                runs.pop()
        if inputs or runs:
            self.loop.call_soon(self._sweep, dropped)

    def _mark(self, task: Tidying, reason: str) -> None:
        future = self.store.mark(task.call_id, reason, self.clock.wall())
        future.add_done_callback(lambda done: self._marked(done, task, reason))

    def _marked(self, done: Any, task: Tidying, reason: str) -> None:
        error = done.exception()
        if error is not None:
            log.error("a cancelled call could not be stored and is tried again", error=str(error))
            self.loop.call_later(RETRY_S, self._mark, task, reason)
            return
        task.reason = done.result()
        self._tidy(task)

    def _tidy(self, task: Tidying) -> None:
        if self._written < task.barrier:
            self.loop.call_later(TIDY_PAUSE_S * 4, self._tidy, task)
            return
        if not task.is_told:
            task.is_told = True
            self.owner.left_out(task.call_id, task.spared, task.reason)
        future = self.store.tidy(task.call_id, task.after, self.tidy_limit, task.spared)
        future.add_done_callback(lambda done: self._tidied(done, task))

    def _tidied(self, done: Any, task: Tidying) -> None:
        error = done.exception()
        if error is not None:
            log.error("a cancelled call could not be tidied up and is tried again", error=str(error))
            self.loop.call_later(RETRY_S, self._tidy, task)
        elif done.result() is None:
            self._tidying.pop(task.call_id, None)
        else:
            task.after = done.result()
            self.loop.call_later(TIDY_PAUSE_S, self._tidy, task)

    def is_left_out(self, call_id: str, idx: int) -> bool:
        """Whether an input without an end, of a call that is marked as cancelled, is cancelled: it neither runs nor has
        an end that is being written."""
        call = self.dispatch.calls.get(call_id)
        if call is not None and idx in call.inputs:
            return False
        task = self._tidying.get(call_id)
        if task is None:
            return self.replaying and self._written == self._recorded
        return idx not in task.spared and self._written >= task.barrier

    # ---- after a restart --------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Take up what has not ended (idempotent): when the apps of before are there, or the Store is open anyway."""
        if not self._started:
            self._started = True
            self._read_window()

    def _read_window(self) -> None:
        self.store.window(self._cursor, self.replay_limit).add_done_callback(self._take_window)

    def _take_window(self, done: Any) -> None:
        error = done.exception()
        if error is not None:
            log.error("the journal could not be read and is tried again", error=str(error))
            self.loop.call_later(RETRY_S, self._read_window)
            return
        found: Window = done.result()
        for call, inputs in _runs(found):
            self._take_up(call, inputs)
        if found.inputs:
            self._cursor = found.inputs[-1].seq
        if len(found.inputs) == self.replay_limit:
            self.loop.call_soon(self._read_window)
            return
        self.replaying = False

    def _take_up(self, call: KeptCall, inputs: list[Kept]) -> None:
        if call.cancelled:
            self._take_up_cancelled(call.call_id)
            return
        if not self.owner.pool_of(call):
            self._end_homeless(call, [kept.idx for kept in inputs])
            return
        plain: list[tuple[int, Any]] = []
        for kept in inputs:
            if kept.cancelled:
                self._end(kept.call_id, kept.idx, "cancelled", CANCELLED, "")
            elif kept.attempt or kept.failures or kept.infra_failures or kept.not_before:
                self._queue_plain(call, plain)
                self._resume(call, kept)
            else:
                plain.append((kept.idx, kept.seq))
        self._queue_plain(call, plain)

    def _end_homeless(self, call: KeptCall, idxs: list[int]) -> None:
        """Their app is not here: it was stopped, by this server or an earlier one that did not come to all of them."""
        stopped = self.owner.why_stopped(call) or call.stopped
        for idx in idxs:
            if stopped:
                self._end(call.call_id, idx, "cancelled", f"the function was stopped: {stopped}", "")
            else:
                self._end(call.call_id, idx, "lost", "its app is not on this server any more", LOST_HINT)

    def _take_up_cancelled(self, call_id: str) -> None:
        """An earlier server has not come to the end of its tidying."""
        if call_id not in self._tidying:
            call = self.dispatch.calls.get(call_id)
            running = frozenset(call.inputs) if call is not None else frozenset()
            task = self._tidying[call_id] = Tidying(call_id, running, self._recorded)
            self._mark(task, CANCELLED)

    def _queue_plain(self, call: KeptCall, items: list[tuple[int, Any]]) -> None:
        if items:
            self.paged += len(items)
            self._queue(call, list(items))
            items.clear()

    def _resume(self, call: KeptCall, kept: Kept) -> None:
        """An input that was tried before. Its wait goes on; a clock that was set back does not make it longer than the
        function's policy does."""
        pool_id = self.owner.pool_of(call)
        self.paged += 1
        self._count(call.function_id, 1)
        left = (kept.not_before or 0.0) - self.clock.wall()
        history = History(kept.attempt, kept.failures, kept.infra_failures, left)
        now, item = self.clock.monotonic(), (kept.idx, kept.seq)
        instructions = self.dispatch.resume(now, call.call_id, pool_id, item, history, self.owner.describe(call))
        self.owner.apply(instructions)

    def _end(self, call_id: str, idx: int, status: OutputStatus, message: str, hint: str) -> None:
        self._record(Row(call_id, idx, status, message, hint, b"", self.clock.wall()))

    # ---- arguments that are on disk ---------------------------------------------------------------------------------

    def load(self, inputs: Iterable[Input], loaded: Callable[[], None]) -> None:
        """Read the arguments of inputs whose turn it is; then call `loaded`."""
        self._read({seq: one for one in inputs if type(seq := one.payload) is int}, loaded)

    def look_ahead(self, input_: Input) -> None:
        """Read the arguments of those behind this one, before it is their turn."""
        ahead = self._ahead()
        function = input_.call.function
        one = lines.probe(function, ahead)
        if one is None or type(one.payload) is not int or one.payload in self._loading:
            return
        coming = islice(lines.waiting(function.queue), ahead)
        found = {seq: one for one in coming if type(seq := one.payload) is int}
        fresh = {seq: one for seq, one in found.items() if seq not in self._loading}
        self._read(fresh, None)

    def _ahead(self) -> int:
        return max(1, min(AHEAD_LIMIT, int(AHEAD_BYTES / max(1.0, self._mean))))

    def _read(self, wanted: dict[int, Input], loaded: Callable[[], None] | None) -> None:
        self._loading.update(wanted)
        self.store.payloads(list(wanted)).add_done_callback(lambda done: self._arrived(done, wanted, loaded))

    def _arrived(self, done: Any, wanted: dict[int, Input], loaded: Callable[[], None] | None) -> None:
        error = done.exception()
        if error is not None:
            log.error("arguments could not be read and are tried again", inputs=len(wanted), error=str(error))
            self.loop.call_later(RETRY_S, self._read, wanted, loaded)
            return
        found: dict[int, Payload] = done.result()
        for seq, input_ in wanted.items():
            self._loading.discard(seq)
            if type(input_.payload) is int:
                self.paged -= 1
                payload = input_.payload = found.get(seq, b"")
                if isinstance(payload, bytes):
                    self._held += len(payload)
                    self._mean += (len(payload) - self._mean) / 64
        if loaded is not None:
            loaded()

    # ---- views ------------------------------------------------------------------------------------------------------

    def has_work(self, function_ids: Iterable[str]) -> bool:
        """Whether spawned inputs of these functions have not ended, as far as that is known."""
        return (self._started and self.replaying) or any(function_id in self.unfinished for function_id in function_ids)


def _runs(found: Window) -> Iterator[tuple[KeptCall, list[Kept]]]:
    """Neighbours of one call together, in their order."""
    run: list[Kept] = []
    for kept in found.inputs:
        if run and run[0].call_id != kept.call_id:
            yield found.calls[run[0].call_id], run
            run = []
        run.append(kept)
    if run:
        yield found.calls[run[0].call_id], run


def _as_error(error: BaseException) -> Error:
    return error if isinstance(error, Error) else InternalError(f"the Store failed: {type(error).__name__}: {error}")
