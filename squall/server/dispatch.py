"""BRAIN: the queues, slots, leases, timeouts and retries of all inputs, in memory.

Synchronous and clock-free: each event method takes `now` (monotonic seconds, never going back) and returns the
instructions a hand must carry out, in order. It never does I/O, never reads a clock, draws no random number, never
looks into a payload and logs nothing. An event costs O(1), amortised; only retries and cancels enter a heap.
The contract is tested in `tests/unit/test_dispatch*.py`, and by `squall.testing` under thousands of faults. It is one
module because every event may touch all of a function's state; the state itself is in `inputs`.

What the hand tells (events)                                        and when
  add_function / update_function / close_function                   an app starts, changes its options, ends
  supersede(now, old_id, new_id, reason)                            a new version of a function takes over
  submit(now, call_id, function_id, [(idx, payload)], kind, owner)  inputs arrive (journalled ones: after the fsync)
  resume(now, call_id, function_id, (idx, payload), history)        a journalled input comes back after a restart
  container_starting(now, container_id, function_id)                it asked a node for a container
  container_ready(now, container_id, slots)                         the runner said `Loaded(ok=True)`
  adoption.adopt / adoption.outputs_again                           it did so to an earlier server, and is back
  outputs(now, container_id, [Result])                              a frame of `Outputs` (its yields go to `yielded`)
  container_gone(now, container_id, reason, fault=..., init_error)  it exited, or its node is lost
  drain(now, container_id, reason)                                  the autoscaler's stop, or a node being emptied
  attend(now, container_id, attended)                               a terminal is asked for there, or was left
  cancel / owner_gone                                               the caller changed its mind, or went away
  reject_queued                                                     no node could ever hold its containers
  starts.try_again / starts.resume                                  what starts fail of has changed; after a restart
  tick(now)                                                         when `next_deadline()` has come
`demand(now, function_id)` is the view the autoscaler decides on; `surplus` are idle containers others may have.

Rules, checked by `squall.testing.check_dispatch`:

- Every accepted input gets exactly one `Finish`. A repeated `idx` is ignored while its call is known.
- A container never holds more inputs than its slots, and none before it is ready or once it drains.
- The lease of a running input is (container, attempt): any other output is ignored and counted (`stale_outputs`).
- FIFO per function. Infrastructure retries go back to the head of the queue, retries that cost something to the tail.
- Of several containers with room the most recently used one is filled, so that surplus ones grow idle and age out;
  no more than make sense where inputs are tiny: see `crowd`.

Retries. `error` and `timeout` cost one of the user's `max_retries`, after the policy's delay. What the platform did
(`fault="infra"`: node lost, agent restarted, container evicted) costs nothing and is repeated at once, up to
INFRA_RETRIES times. A container that died of itself while an input ran alone in it (`fault="container"`: exit, signal,
out of memory) is that input's failure: it has `max_retries` further tries, and CRASH_RETRIES where the user gave none
(one spare try separates a freak from a function that kills its container, at the price of one more container). When
several inputs ran in it nobody is blamed yet: each is tried again *alone* in a container, so that one poisonous input
cannot take its neighbours down with it. A generator that has yielded is never tried again: its consumer saw it.

Starts that fail delay the next one, and end what cannot wait for it: see `starts`.

Many at once. What waits of a spawned call is dropped in one step (`lines`); where all that waits for a function ends,
it does so some at a time (`endings`), so that no event takes long.

Succession. What a superseded function has running ends where it runs, and if it must be tried again that is with the
successor; all that waits moves there at once, in its order. Its containers drain, and it is forgotten with the last.

Return. Containers that outlived an earlier server go on with what they run: see `adoption`.

Cancelling a running input asks its container, and kills that container when it has not answered in CANCEL_GRACE.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from heapq import heappop, heappush
from typing import Any, TypeAlias

from squall.protocol.states import InputState
from squall.server import attempts, lines
from squall.server.adoption import STAND_IN, Adoption
from squall.server.attempts import CRASH_RETRIES, INFRA_RETRIES
from squall.server.crowd import Crowd
from squall.server.demand import Demand, demand_of, surplus_of
from squall.server.endings import Endings
from squall.server.inputs import (
    Call,
    CancelRunning,
    Container,
    DemandChanged,
    Fault,
    Finish,
    Function,
    FunctionOptions,
    History,
    Input,
    Instructions,
    KillContainer,
    Push,
    Result,
    Retried,
    Status,
    StopContainer,
)
from squall.server.starts import START_DELAY, Starts
from squall.server.succession import home_of, in_backoff, last_of, move_waiting

__all__ = ["CRASH_RETRIES", "INFRA_RETRIES", "START_DELAY", "Call", "Dispatch", "Finish", "FunctionOptions", "Input"]

CANCEL_GRACE = 10.0
STOP_GRACE = 30.0

_Action: TypeAlias = Callable[[float, Any, int, Instructions], None]
_Timer: TypeAlias = tuple[float, int, _Action, Any, int]


class Dispatch:
    """See the module. `functions`, `calls` and `containers` may be read, never changed, from outside."""

    def __init__(self) -> None:
        self.functions: dict[str, Function] = {}
        self.calls: dict[str, Call] = {}
        self.containers: dict[str, Container] = {}
        self.owners: dict[Hashable, dict[Call, None]] = {}
        self.stale_outputs = 0
        self._timers: list[_Timer] = []
        self._timer_seq = 0
        self._unsettled: dict[Function, None] = {}
        self.adoption = Adoption(self)
        self.endings = Endings(self)
        self.crowd = Crowd(self)
        self.starts = Starts(self)

    # ---- functions ----------------------------------------------------------------------------------------------

    def add_function(self, now: float, function_id: str, options: FunctionOptions) -> Instructions:
        """Repeating it is an update."""
        if function_id in self.functions:
            return self.update_function(now, function_id, options)
        self.functions[function_id] = Function(function_id, options, now)
        return [DemandChanged(function_id)] if options.min_containers else []

    def update_function(self, now: float, function_id: str, options: FunctionOptions) -> Instructions:
        """Running attempts get the new timeout too; containers keep the slots they were started with."""
        function = self.functions[function_id]
        function.options = options
        self._arm_timeouts(function)
        self._arm_starts(function)
        return [DemandChanged(function_id)]

    def close_function(self, now: float, function_id: str, reason: str) -> Instructions:
        """End all its inputs as cancelled, stop its containers; it is forgotten with the last of both."""
        out: Instructions = []
        function = self.functions.get(function_id)
        if function is None or (function.closed and function.successor is None):
            return out
        function.closed, function.successor = reason or "closed", None
        self.endings.close(now, function, f"the function was stopped: {function.closed}", out)
        for container in list(function.containers.values()):
            self._begin_drain(container, reason)
            self._stop(container, out)
        self._drop_if_empty(function)
        for other in [other for other in self.functions.values() if last_of(other) is function]:
            out += self.close_function(now, other.function_id, reason)
        return out

    def supersede(self, now: float, old_id: str, new_id: str, reason: str) -> Instructions:
        """The function `new_id` takes over from `old_id`, see Succession above. Harmless where either has ended."""
        out: Instructions = []
        old, new = self.functions.get(old_id), self.functions.get(new_id)
        if old is None or new is None or old is new or old.closed or new.closed:
            return out
        move_waiting(old, new, in_backoff(old, (timer[3] for timer in self._timers)))
        old.closed, old.successor = reason or "superseded", new
        for container in list(old.containers.values()):
            self._begin_drain(container, old.closed)
            if not container.running:
                self._stop(container, out)
        self._drop_if_empty(old)
        self.starts.fail_queued(now, new, out)
        self._pump(now, new, out)
        self._ask(new, out, force=True)
        return out

    def reject_queued(self, now: float, function_id: str, message: str, hint: str = "") -> Instructions:
        """End what waits as `rejected`: no node will ever hold a container of the function, for instance. Where it
        persists, what is in the journal waits for better days."""
        out: Instructions = []
        self.endings.reject(now, self.functions[function_id], message, hint, out)
        return out

    # ---- inputs -------------------------------------------------------------------------------------------------

    def submit(
        self,
        now: float,
        call_id: str,
        function_id: str,
        items: Iterable[tuple[int, Any]],
        kind: str = "remote",
        owner: Hashable = None,
        last: bool = True,
        data: Any = None,
    ) -> Instructions:
        """Queue inputs, `(idx, payload)` each. Repeating an idx of a known call is harmless. With `owner` given, the
        call ends with it (`owner_gone`) unless its kind is `spawn`. `data` is what a new call shall carry."""
        out: Instructions = []
        call = self.calls.get(call_id)
        function = self.functions.get(function_id) if call is None else home_of(call)
        if function is None or function.closed:
            function = function or Function(function_id, FunctionOptions(), now)
            attempts.turn_all_away(now, call or Call(call_id, function, kind, None, data), items, out)
            return out
        if call is None:
            call = self.calls[call_id] = Call(call_id, function, kind, owner, data)
            if owner is not None:
                self.owners.setdefault(owner, {})[call] = None
        call.last = False  # until all are in: one of them may end at once, and is not the last
        self._enqueue(now, call, items, out)
        call.last = last
        if function.free:
            self._pump(now, function, out)
        if function.queued:
            self._ask(function, out)
        if not call.inputs:
            self._forget_if_done(call)
        return out

    def resume(
        self, now: float, call_id: str, function_id: str, item: tuple[int, Any], history: History, data: Any = None
    ) -> Instructions:
        """`submit` of a spawned input that an earlier server has tried: what is left of its budget and delay counts."""
        out: Instructions = []
        call = self.calls.get(call_id)
        if call is None:
            call = self.calls[call_id] = Call(call_id, self.functions[function_id], "spawn", None, data)
            call.last = True
        home_of(call)
        delay = min(history.delay, call.function.options.max_delay)
        input_ = attempts.resumed(now, call, item, history)
        if self.adoption.take(now, input_, out):
            self._settle(now, out)
        elif delay > 0:
            input_.state = "backoff"
            call.function.waiting += 1
            self._at(now + delay, self._end_backoff, input_, input_.attempt)
        else:
            self._enter_queue(input_, first=False)
            self._unsettled[call.function] = None
            self._settle(now, out)
        return out

    def _enqueue(self, now: float, call: Call, items: Iterable[tuple[int, Any]], out: Instructions) -> None:
        function = call.function
        function.active_at = now
        inputs = call.inputs
        failing = self.starts.turns_away(now, call)
        is_spawned = call.kind == "spawn"
        function.hurries = function.hurries or not is_spawned
        room = 0 if failing else function.options.max_pending - function.pending()
        for idx, payload in items:
            if idx in inputs or (call.finished and call.is_done(idx)):
                continue
            input_ = inputs[idx] = Input(call, idx, payload, now)
            call.submitted += 1
            if self.adoption.claims and self.adoption.take(now, input_, out):
                continue
            if room <= 0 and not failing and function.free:
                self._pump(now, function, out)
                room = function.options.max_pending - function.pending()
            if room <= 0 and (function.queued or not function.free):
                self._turn_away(now, input_, failing, out)
                continue
            room -= 1
            if is_spawned:
                lines.enter(input_)
            else:
                function.queue.append(input_)
                function.queued += 1

    def _turn_away(self, now: float, input_: Input, failing: bool, out: Instructions) -> None:
        input_.state = "done"  # it never was in the queue
        if failing:
            self.starts.finish_failing(now, input_, out)
            return
        message = f"{input_.call.function.options.max_pending} inputs of the function are waiting already"
        self._finish(now, input_, "rejected", message, "submit fewer at a time, or let more containers work", None, out)

    def outputs(self, now: float, container_id: str, results: Iterable[Result], took: float = -1.0) -> Instructions:
        """A container's results, `(call_id, idx, status, attempt, output)` each, and what it shall run next. Those
        it has no lease for are ignored. `took`: seconds that it says each of them took, if it does."""
        out: Instructions = []
        container = self.containers.get(container_id)
        for result in results:
            call_id, idx, status, attempt, output = result
            call = self.calls.get(call_id)
            input_ = call.inputs.get(idx) if call is not None else None
            if input_ is None or container is None or input_.container is not container or input_.attempt != attempt:
                self.stale_outputs += not self.adoption.settle(now, container, result, out)
                continue
            function = container.function
            self.crowd.note(function, now - input_.pushed_at, took)
            if status == "ok":
                self._finish(now, input_, "ok", "", "", output, out)
            else:
                self._fail(now, input_, status, output, out)
        if container is not None:
            self._refill(now, container, out)
            function = container.function
            if function.queued and function.free:
                self._pump(now, function, out)
            if self._unsettled:
                self._settle(now, out)
        return out

    def output(
        self, now: float, container_id: str, call_id: str, idx: int, status: str, attempt: int, output: Any = None
    ) -> Instructions:
        """`outputs` with a single result."""
        return self.outputs(now, container_id, ((call_id, idx, status, attempt, output),))

    def yielded(self, container_id: str, call_id: str, idx: int, attempt: int) -> Input | None:
        """A generator's container sent a value: the input whose consumer shall get it, or None when it has no lease."""
        call = self.calls.get(call_id)
        input_ = call.inputs.get(idx) if call is not None else None
        container = input_.container if input_ is not None else None
        if input_ is None or container is None or container.container_id != container_id or input_.attempt != attempt:
            self.stale_outputs += 1
            return None
        input_.yielded = True
        return input_

    def cancel(
        self, now: float, call_id: str, idxs: Iterable[int] | None, reason: str, terminate: bool = False
    ) -> Instructions:
        """Cancel the inputs `idxs` of a call, None for all. What waits ends at once; what runs is asked to, and with
        `terminate` its container is killed. Finished ones stay finished."""
        out: Instructions = []
        call = self.calls.get(call_id)
        if call is None:
            return out
        if idxs is None:
            self.endings.drop(now, call, reason, out)
            chosen = list(call.inputs.values())
        else:
            chosen = [call.inputs[idx] for idx in dict.fromkeys(idxs) if idx in call.inputs]
        for input_ in chosen:
            self._cancel_one(now, input_, reason, terminate, out)
        self._settle(now, out)
        return out

    def owner_gone(self, now: float, owner: Hashable, reason: str) -> Instructions:
        """Cancel the owner's calls; the spawned ones go on without it."""
        out: Instructions = []
        for call in self.owners.pop(owner, {}):
            call.owner = None
            call.last = True
            if call.kind != "spawn":
                out += self.cancel(now, call.call_id, None, reason)
            self._forget_if_done(call)
        return out

    # ---- containers ---------------------------------------------------------------------------------------------

    def container_starting(self, now: float, container_id: str, function_id: str) -> Instructions:
        """A container was asked for. From here its `startup_timeout` runs."""
        function = self.functions.get(function_id)
        if container_id in self.containers:
            return []
        if function is None or function.closed:
            return [KillContainer(container_id, "its function was stopped")]
        container = self.containers[container_id] = Container(container_id, function, now)
        function.containers[container_id] = container
        function.starting[container] = None
        if not function.start_timer:
            self._arm_starts(function)
        return []

    def container_ready(self, now: float, container_id: str, slots: int = 0) -> Instructions:
        """Its runner takes inputs; `slots` of 0 means the function's concurrency."""
        out: Instructions = []
        container = self.containers.get(container_id)
        if container is None:
            return [KillContainer(container_id, "the server does not know it")]
        if container.state != "starting":
            return out
        function = container.function
        del function.starting[container]
        container.state = "ready"
        container.slots = 1 if function.options.single_use else (slots or function.options.concurrency)
        container.open_slots = container.slots
        container.ready_at = container.idle_since = now
        function.cold_start = attempts.average(function.cold_start, now - container.started_at)
        self.starts.succeeded(function, out)
        self._refill(now, container, out)
        if function.queued or function.suspected:
            self._ask(function, out, force=True)
        return out

    def container_gone(
        self,
        now: float,
        container_id: str,
        reason: str,
        *,
        fault: Fault = "container",
        hint: str = "",
        init_error: Any = None,
    ) -> Instructions:
        """It is gone for good. `reason` completes "its container ..." (`exited with code 3`, `was killed by SIGSEGV`,
        `ran out of memory: the limit is 128 MiB`). `fault` is `infra` when the platform or an operator did it. For a
        runner that reported a failed import, `init_error` is what its inputs' `Finish.output` shall carry."""
        out: Instructions = []
        container = self.containers.pop(container_id, None)
        if container is None:
            return out
        function = container.function
        del function.containers[container_id]
        was_starting = container.state == "starting"
        if container.state == "ready":
            self.starts.ready_one_gone(now, container, reason, fault, out)
        self._detach(container)
        self._lose_inputs(now, container, reason, fault, hint, out)
        if was_starting:
            self.starts.failed(now, container, reason, fault, hint, init_error, out)
        self._pump(now, function, out)
        if function.closed:
            self._drop_if_empty(function)
        else:
            self._ask(function, out, force=True)
        self._settle(now, out)
        return out

    def drain(self, now: float, container_id: str, reason: str) -> Instructions:
        """Give it nothing more, stop it when what runs in it has ended. Because this and `submit` are events of one
        brain, an input is either in it before (and ends there) or never comes to it."""
        out: Instructions = []
        container = self.containers.get(container_id)
        if container is None or container.state == "draining":
            return out
        function = container.function
        self._begin_drain(container, reason)
        if not container.running:
            self._stop(container, out)
        self._pump(now, function, out)
        return out

    def attend(self, now: float, container_id: str, attended: bool) -> None:
        """Somebody sits at a terminal in it, or left: the clocks of its timeouts stand still, or begin anew."""
        container = self.containers.get(container_id)
        if container is not None:
            container.attended = attended
            self._renew(now, container)

    # ---- time ---------------------------------------------------------------------------------------------------

    def next_deadline(self) -> float | None:
        """When `tick` has something to look at; it may turn out to be nothing."""
        return self._timers[0][0] if self._timers else None

    def tick(self, now: float) -> Instructions:
        """Everything that is due: timeouts, backoffs, unanswered cancels, slow starts."""
        out: Instructions = []
        timers = self._timers
        while timers and timers[0][0] <= now:
            _, _, action, subject, attempt = heappop(timers)
            action(now, subject, attempt, out)
        self._settle(now, out)
        return out

    # ---- views --------------------------------------------------------------------------------------------------

    def demand(self, now: float, function_id: str) -> Demand:
        """Raises KeyError for a function it does not know."""
        return demand_of(self.functions[function_id], now)

    def surplus(self) -> Iterator[str]:
        """Idle containers that their functions need not keep, for the scheduler when room is short."""
        return surplus_of(self.functions.values())

    # ---- filling slots ------------------------------------------------------------------------------------------

    def _pump(self, now: float, function: Function, out: Instructions) -> None:
        """Fill free slots from the queue."""
        free = function.free
        while function.suspected and function.reserved is None and free:
            # The least recently used one is the likeliest to be empty. This either gives it a suspect or reserves it.
            self._isolate(now, next(iter(free)), out)
        while function.queued and free and self.crowd.has_room(now, function):
            # Taken out even if it stays: only `popitem` leaves no holes at a dict's end that the next search must pass.
            self._fill(now, free.popitem()[0], out)

    def _settle(self, now: float, out: Instructions) -> None:
        """Fill slots after an event that may have killed several containers. Only now: a push to one that the same
        event kills a moment later would name an attempt that is over when the hand reads it."""
        while self._unsettled:
            function = self._unsettled.popitem()[0]
            self._pump(now, function, out)
            self._ask(function, out, force=True)

    def _refill(self, now: float, container: Container, out: Instructions) -> None:
        """What a container does next, after some of its inputs ended or it became ready."""
        function = container.function
        if not container.running:
            container.idle_since = now
            if container.open_slots != container.slots and not self._reopen(container, out):
                return
        elif container.state != "ready":
            return
        if function.suspected and function.reserved in (None, container):
            self._isolate(now, container, out)
            return
        if function.reserved is container:
            function.reserved = None
        if function.queued and self.crowd.has_room(now, function):
            self._fill(now, container, out)
        elif len(container.running) < container.open_slots:
            function.free.pop(container, None)
            function.free[container] = None

    def _reopen(self, container: Container, out: Instructions) -> bool:
        """An empty container with closed slots: whether it takes inputs again."""
        if container.state == "starting":
            return False
        if container.state == "ready" and container.function.options.single_use:
            self._begin_drain(container, "used once")
        if container.state == "draining":
            self._stop(container, out)
            return False
        container.open_slots = container.slots
        return True

    def _fill(self, now: float, container: Container, out: Instructions) -> None:
        """Push as many queued inputs as the container has room for."""
        function = container.function
        room = container.open_slots - len(container.running)
        batch = lines.take(function, room)
        if batch:
            self._push(now, container, batch, out)
        if room > len(batch):
            function.free.pop(container, None)
            function.free[container] = None

    def _isolate(self, now: float, container: Container, out: Instructions) -> None:
        """Give the container one suspect if it is empty, else keep it from filling up until it is."""
        function = container.function
        function.free.pop(container, None)
        if container.running:
            function.reserved = container
            return
        function.reserved = None
        input_ = function.suspects.popleft()
        while input_.state != "queued":
            input_ = function.suspects.popleft()
        function.suspected -= 1
        container.open_slots = 1
        self._push(now, container, [input_], out)

    def _push(self, now: float, container: Container, batch: list[Input], out: Instructions) -> None:
        function = container.function
        held, running = container.running, function.running
        for input_ in batch:
            input_.state = "running"
            input_.container = container
            input_.pushed_at = now
            held[input_] = None
            running[input_] = now
        if len(held) >= container.open_slots:
            function.free.pop(container, None)
        if function.options.single_use:
            container.open_slots = 0
        if not function.timeout_timer:
            self._arm_timeouts(function)
        out.append(Push(container.container_id, batch))

    # ---- the ways of an input -----------------------------------------------------------------------------------

    def _leave(self, input_: Input, state: InputState) -> None:
        """Take an input out of wherever it is counted, into `state`."""
        before, input_.state = input_.state, state
        function = input_.call.function
        container = input_.container
        if container is not None:
            input_.container = None
            del container.running[input_]
            del container.function.running[input_]
            if container.function.successor is not None:
                self._unsettled[home_of(input_.call)] = None  # it may go on there
        elif before == "backoff":
            function.waiting -= 1
        elif before == "queued" and input_.alone:
            function.suspected -= 1
            function.suspects = lines.swept(function.suspects, function.suspected)
        elif before == "queued":
            function.queued -= 1
            function.queue = lines.swept(function.queue, function.queued)

    def _finish(
        self, now: float, input_: Input, status: Status, message: str, hint: str, output: Any, out: Instructions
    ) -> None:
        call = input_.call
        if call.kind == STAND_IN:
            self.adoption.end(now, input_, status, message, hint, output)
            return
        self._leave(input_, "done")
        function = call.function
        function.finished_at = now
        function.finished += 1
        call.finished += 1
        if status != "ok":
            function.failed += 1
            call.failed += 1
        inputs = call.inputs
        del inputs[input_.idx]
        if call.line is not None:
            call.line.outside.pop(input_.idx, None)
        out.append(Finish(input_, status, message, hint, output))
        if inputs or not call.last:
            call.mark_done(input_.idx)
        else:
            self._forget_if_done(call)

    def _forget_if_done(self, call: Call) -> None:
        if not call.last or call.inputs or self.calls.pop(call.call_id, None) is None:
            return
        if call.owner is not None:
            self.owners[call.owner].pop(call, None)
        if call.line is not None:
            lines.clear(call.line)

    def _fail(self, now: float, input_: Input, status: str, output: Any, out: Instructions) -> None:
        """A runner reported anything but `ok`. Only two other words are believed: it is the tenant's."""
        if input_.cancelling:
            self._finish_cancelled(now, input_, out)
        elif not self._retry(now, input_, input_.call.function.options.max_retries, out):
            self._finish(now, input_, "timeout" if status == "timeout" else "error", "", "", output, out)

    def _retry(self, now: float, input_: Input, budget: int, out: Instructions) -> bool:
        """Whether an attempt that failed by its own doing is followed by another, which is then under way."""
        options = input_.call.function.options
        if input_.yielded or input_.failures >= budget:
            return False
        input_.failures += 1
        delay = options.retry_delay(input_.failures) if options.max_retries else 0.0
        if delay <= 0:
            self._requeue(input_, out, first=False)
            return True
        self._leave(input_, "backoff")
        self._next_attempt(input_, out, delay)
        input_.call.function.waiting += 1
        self._at(now + delay, self._end_backoff, input_, input_.attempt)
        return True

    def _requeue(self, input_: Input, out: Instructions, first: bool) -> None:
        """A running input becomes queued again, with a new attempt number that fences the old attempt off."""
        self._leave(input_, "queued")
        self._next_attempt(input_, out)
        self._enter_queue(input_, first)

    def _next_attempt(self, input_: Input, out: Instructions, delay: float = 0.0) -> None:
        input_.attempt += 1
        if input_.call.kind == "spawn":
            out.append(Retried(input_, delay))

    def _enter_queue(self, input_: Input, first: bool) -> None:
        function = input_.call.function
        function.hurries = function.hurries or input_.call.kind != "spawn"
        if not input_.alone:
            lines.enter(input_, first)
            return
        function.suspected += 1
        if first:
            function.suspects.appendleft(input_)
        else:
            function.suspects.append(input_)

    def _end_backoff(self, now: float, input_: Input, attempt: int, out: Instructions) -> None:
        if input_.state != "backoff" or input_.attempt != attempt:
            return
        function = input_.call.function
        if self.starts.turns_away(now, input_.call):
            self.starts.finish_failing(now, input_, out)
            return
        self._leave(input_, "queued")
        self._enter_queue(input_, first=False)
        self._unsettled[function] = None

    def _cancel_one(self, now: float, input_: Input, reason: str, terminate: bool, out: Instructions) -> None:
        if input_.state == "done":  # it ended with the container of one cancelled before it
            return
        container = input_.container
        was_asked = input_.cancelling
        input_.cancelling = was_asked or reason or "cancelled"
        if container is None:
            self._finish_cancelled(now, input_, out)
        elif terminate:
            self._finish_cancelled(now, input_, out)
            self._kill(now, container, f"one of its inputs was cancelled: {reason}", out)
        elif not was_asked:
            out.append(CancelRunning(container.container_id, input_, reason))
            self._at(now + CANCEL_GRACE, self._end_cancel, input_, input_.attempt)

    def _end_cancel(self, now: float, input_: Input, attempt: int, out: Instructions) -> None:
        container = input_.container
        if container is not None and input_.attempt == attempt:
            self._finish_cancelled(now, input_, out)
            self._kill(now, container, f"an input did not end within {CANCEL_GRACE:g} s of its cancellation", out)

    def _finish_cancelled(self, now: float, input_: Input, out: Instructions) -> None:
        self._finish(now, input_, "cancelled", input_.cancelling, "", None, out)

    # ---- timeouts -----------------------------------------------------------------------------------------------

    def _at(self, due: float, action: _Action, subject: Any, token: int) -> None:
        """`action` runs in the first `tick` after `due`, and finds out by the token whether it still should."""
        self._timer_seq += 1
        heappush(self._timers, (due, self._timer_seq, action, subject, token))

    def _arm_timeouts(self, function: Function) -> None:
        """One timer per function, for its oldest running input: a timer per input would pile up by the million."""
        timeout = function.options.timeout
        if timeout > 0 and function.running:
            due = next(iter(function.running.values())) + timeout
            self._at(due, self._expire_running, function, self._timer_seq + 1)
            function.timeout_timer = self._timer_seq

    def _expire_running(self, now: float, function: Function, timer: int, out: Instructions) -> None:
        if timer != function.timeout_timer:
            return
        timeout = function.options.timeout
        function.timeout_timer = 0
        while timeout > 0 and function.running:
            oldest, since = next(iter(function.running.items()))
            if since + timeout > now:
                break
            container = oldest.container
            assert container is not None  # it is in `running`
            if container.attended:
                self._renew(now, container)
            else:
                self._expire_container(now, container, timeout, out)
        if not function.timeout_timer:
            self._arm_timeouts(function)

    def _expire_container(self, now: float, container: Container, timeout: float, out: Instructions) -> None:
        """Some of its inputs are overdue: they failed, and as nothing less ends a C loop, the container is killed."""
        message = f"one attempt took longer than the function's timeout of {timeout:g} s"
        hint = "raise `timeout`, which may be up to 86400 s, or give each input less to do"
        budget = container.function.options.max_retries
        began = container.function.running
        for input_ in [input_ for input_ in container.running if began[input_] + timeout <= now]:
            if input_.cancelling:
                self._finish_cancelled(now, input_, out)
            elif not self._retry(now, input_, budget, out):
                self._finish(now, input_, "timeout", message, hint, None, out)
        self._kill(now, container, f"an input ran longer than {timeout:g} s", out)

    def _renew(self, now: float, container: Container) -> None:
        function = container.function
        for input_ in container.running:
            del function.running[input_]
            function.running[input_] = now
        if container in function.starting:
            del function.starting[container]
            function.starting[container] = None
            container.started_at = now

    def _arm_starts(self, function: Function) -> None:
        limit = function.options.startup_timeout
        if limit > 0 and function.starting:
            due = next(iter(function.starting)).started_at + limit
            self._at(due, self._expire_starts, function, self._timer_seq + 1)
            function.start_timer = self._timer_seq

    def _expire_starts(self, now: float, function: Function, timer: int, out: Instructions) -> None:
        if timer != function.start_timer:
            return
        limit = function.options.startup_timeout
        function.start_timer = 0
        while limit > 0 and function.starting:
            container = next(iter(function.starting))
            if container.started_at + limit > now:
                break
            if container.attended:
                self._renew(now, container)
                continue
            reason = f"took longer to start than the function's startup_timeout of {limit:g} s"
            self._begin_drain(container, reason)
            self.starts.failed(now, container, reason, "container", "", None, out)
            self._kill(now, container, reason, out)
        self._arm_starts(function)

    # ---- ends of containers -------------------------------------------------------------------------------------

    def _detach(self, container: Container) -> None:
        function = container.function
        container.open_slots = 0
        function.free.pop(container, None)
        function.starting.pop(container, None)
        if function.reserved is container:
            function.reserved = None

    def _begin_drain(self, container: Container, reason: str) -> None:
        self._detach(container)
        container.state = "draining"
        container.reason = container.reason or reason

    def _stop(self, container: Container, out: Instructions) -> None:
        if not container.stop_asked:
            container.stop_asked = True
            out.append(StopContainer(container.container_id, STOP_GRACE, container.reason))

    def _kill(self, now: float, container: Container, reason: str, out: Instructions) -> None:
        """End a container for one input's sake; the others in it are bystanders."""
        self._begin_drain(container, reason)
        container.stop_asked = True
        for input_ in reversed(list(container.running)):
            self._lose_bystander(now, input_, reason, out)
        out.append(KillContainer(container.container_id, reason))
        self._unsettled[container.function] = None

    def _lose_bystander(self, now: float, input_: Input, reason: str, out: Instructions) -> None:
        """Its run was ended because of another input. It pays nothing; but after some such accidents it runs alone,
        where there can be no further one, so that this too has an end."""
        input_.infra_failures += 1
        if input_.cancelling:
            self._finish_cancelled(now, input_, out)
        elif input_.yielded:
            self._finish_lost(now, input_, f"was killed: {reason}", "", out)
        else:
            input_.alone = input_.alone or input_.infra_failures > INFRA_RETRIES // 2
            self._requeue(input_, out, first=True)

    def _lose_inputs(
        self, now: float, container: Container, reason: str, fault: Fault, hint: str, out: Instructions
    ) -> None:
        """The container is gone under them."""
        inputs = list(container.running)
        crash_budget = max(CRASH_RETRIES, container.function.options.max_retries)
        for input_ in reversed(inputs):
            if input_.cancelling:
                self._finish_cancelled(now, input_, out)
            elif input_.yielded:
                self._finish_lost(now, input_, reason, hint, out)
            elif fault == "infra":
                input_.infra_failures += 1
                if input_.infra_failures > INFRA_RETRIES:
                    self._finish_lost(now, input_, reason, hint, out)
                else:
                    self._requeue(input_, out, first=True)
            elif len(inputs) > 1:
                input_.alone = True
                self._requeue(input_, out, first=True)
            elif not self._retry(now, input_, crash_budget, out):
                self._finish_lost(now, input_, reason, hint, out)

    def _finish_lost(self, now: float, input_: Input, reason: str, hint: str, out: Instructions) -> None:
        tries = input_.attempt + 1
        message = f"its container {reason}" + (f" ({tries} attempts)" if tries > 1 else "")
        self._finish(now, input_, "lost", message, hint, None, out)

    # ---- demand -------------------------------------------------------------------------------------------------

    def _ask(self, function: Function, out: Instructions, force: bool = False) -> None:
        """Have the autoscaler look, at each growth of the backlog by an eighth: exact while it is small, and a flood
        of single inputs does not cost a decision each."""
        backlog = function.queued + function.suspected
        if (force or backlog >= function.ask_at) and not function.closed:
            function.ask_at = backlog + 1 + backlog // 8
            out.append(DemandChanged(function.function_id))

    def _drop_if_empty(self, function: Function) -> None:
        if function.closed and not function.containers and not function.ending:
            self.functions.pop(function.function_id, None)
