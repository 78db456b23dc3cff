"""HAND: carries out what the brains decide, and tells them what happened. The only writer of placements.

`apply` takes dispatch's instructions in order. Demand goes to the autoscaler, its wishes to the scheduler, grants
become containers on nodes; what nodes and runners report goes back to dispatch. A container's life is walked here:
it gets its code only after its node has checked its walls from the host, and its first input only after it said it
loaded. Nothing here chooses: every number, place and moment comes from a brain. Tested in `tests/integration`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
import traceback
from collections.abc import Callable
from typing import Any

from squall._observe import Logger, count
from squall.exception import Error
from squall.protocol.messages import (
    INLINE_LIMIT_BYTES,
    YIELD_WINDOW,
    CancelRun,
    ContainerEvent,
    ContainerOutput,
    ContainerSpec,
    FunctionSpec,
    Load,
    Loaded,
    OutputItem,
    StartContainer,
    StopContainer,
    StopRunner,
    YieldCredit,
    new_id,
)
from squall.protocol.resumption import EndedContainer, HeldContainer, RegisterAgain
from squall.protocol.transport import FrameStream
from squall.server import autoscaler
from squall.server.calls import Calls, Result
from squall.server.containers import ContainerRecord
from squall.server.dispatch import Dispatch
from squall.server.inputs import (
    BackoffChanged,
    CancelRunning,
    DemandChanged,
    Dropped,
    Fault,
    Finish,
    Input,
    Instructions,
    KillContainer,
    Notice,
    Push,
    Retried,
)
from squall.server.inputs import (
    StopContainer as StopInstruction,
)
from squall.server.metering import Metering, meter_row, stop_row
from squall.server.nodes import Node, Nodes
from squall.server.objects import FunctionRecord, Objects, slots_of
from squall.server.scheduler import Grant, Request, Scheduler
from squall.server.scheduler import Node as SchedulerNode
from squall.server.starts import backoff_of
from squall.server.takeover import Takeover
from squall.server.timelines import ContainerTimeline
from squall.server.vault import Vault
from squall.server.wire import run_head
from squall.storage.blobs import check_digest

log = Logger("server")

ROUND_S = 0.5
"""How often the autoscaler looks at every function, asked or not."""
STREAM_GRACE = 5.0
"""A runner's socket may end this long before its node reports why."""
STOP_AGAIN_GRACE = 5.0
"""For a container that was asked to stop by a message that may have been lost."""
HISTORY_LIMIT = 5000
UNTAKEN_LIMIT = 2 * YIELD_WINDOW
"""Values of one generator that may wait here for whoever takes them."""
LOAD_TEXT_LIMIT = 4000
"""Characters kept of what a runner says about a failed import."""
TELL_WAITING_AFTER = 2.0
"""Seconds without room before the followers of an app hear of it."""
TELL_NO_NODE_AFTER = 10.0
"""The same as long as no node is there: on a busy machine an agent takes some seconds to start, which is no news."""
TELL_STALLED_AFTER = 10.0
Notify = Callable[[FunctionRecord, str, dict[str, Any]], None]


class Reconciler:
    def __init__(self, dispatch: Dispatch, objects: Objects, nodes: Nodes, calls: Calls, metering: Metering) -> None:
        self.loop = asyncio.get_running_loop()
        self.dispatch = dispatch
        self.objects = objects
        self.nodes = nodes
        self.calls = calls
        self.metering = metering
        self.scheduler = Scheduler()
        self.containers: dict[str, ContainerRecord] = {}
        self.history: dict[str, ContainerRecord] = {}
        """Ended ones, newest last, for traces and listings."""
        self.vault: Vault
        """Set by `main`: what functions' secrets hold."""
        self.on_output: Callable[[Node, ContainerOutput, bytes], None]
        """Set by `main`: what a container wrote."""
        self.notify: Notify
        """Set by `main`: tells the followers of an app."""
        self.on_backoff: Callable[[str], None]
        """Set by `main`: how the starts of a function go has changed."""
        self._reading: asyncio.Task[None] | None = None
        self.is_held = False
        """No container is started: the server is ending."""
        self.is_closed = False
        """The server is at its end: what still happens to inputs is not their end."""
        self._wanting: set[str] = set()
        self.takeover = Takeover(self)
        self._asked: set[str] = set()
        self._asking_again: set[str] = set()
        """Functions of which the autoscaler wants to be asked again; a timer runs for each."""
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = float("inf")
        self._hopeless: dict[str, tuple[str, str]] = {}
        """Functions that no node could ever hold, as far as is known: reason and hint."""
        self._refusals: dict[str, tuple[float, str]] = {}
        """Functions without room: since when, and the reason last told."""

    # -- instructions

    def apply(self, instructions: Instructions) -> None:
        if self.is_closed:
            return
        for instruction in instructions:
            kind = type(instruction)
            if kind is Push:
                self._push(instruction)  # type: ignore[arg-type]
            elif kind is Finish:
                self.calls.finish(instruction)  # type: ignore[arg-type]
            else:
                self._apply_rare(instruction)
        deadline = self.dispatch.next_deadline()
        if deadline is not None and deadline < self._timer_at:
            self._arm(deadline)

    def _apply_rare(self, instruction: Any) -> None:
        if isinstance(instruction, DemandChanged):
            self._ask(instruction.function_id)
        elif isinstance(instruction, Retried):
            self.calls.retried(instruction)
        elif isinstance(instruction, Dropped):
            self.calls.dropped(instruction)
        elif isinstance(instruction, CancelRunning):
            record = self.containers.get(instruction.container_id)
            if record is not None and record.stream is not None:
                record.stream.send(CancelRun(instruction.input.call_id, instruction.input.idx))
        elif isinstance(instruction, KillContainer):
            self.stop_container(instruction.container_id, 0.0, instruction.reason)
        elif isinstance(instruction, StopInstruction):
            self.stop_container(instruction.container_id, instruction.grace, instruction.reason)
        elif isinstance(instruction, BackoffChanged):
            self.on_backoff(instruction.function_id)
        elif isinstance(instruction, Notice):
            function = self.objects.functions.get(instruction.function_id)
            if function is not None:
                self.notify(function, instruction.kind, {"reason": instruction.message})

    def _push(self, push: Push) -> None:
        record = self.containers.get(push.container_id)
        if record is None or record.stream is None:
            return  # its end is being reported; dispatch will requeue what it holds
        if self.calls.durable.paged and push.inputs[0].call.kind == "spawn" and not self._is_loaded(push):
            return
        heads: list[str] = []
        parts: list[bytes] = []
        for input_ in push.inputs:
            call, data = input_.call, input_.payload
            if isinstance(data, str):
                heads.append(run_head(call.call_id, input_.idx, 0, data, input_.attempt, call.data.method))
            else:
                heads.append(run_head(call.call_id, input_.idx, len(data), "", input_.attempt, call.data.method))
                parts.append(data)
        header = '{"t":"run","items":[' + ",".join(heads) + "]}"
        record.stream.send_raw(header.encode(), *parts)

    def _is_loaded(self, push: Push) -> bool:
        """Whether the arguments of all inputs are in memory; else they are read and pushed then."""
        durable = self.calls.durable
        durable.look_ahead(push.inputs[0])
        if not any(type(input_.payload) is int for input_ in push.inputs):
            return True
        leases = [(input_, input_.attempt) for input_ in push.inputs]
        durable.load(push.inputs, lambda: self._push_late(push.container_id, leases))
        return False

    def _push_late(self, container_id: str, leases: list[tuple[Input, int]]) -> None:
        """What of it still has its lease."""
        inputs = [
            input_
            for input_, attempt in leases
            if input_.container is not None
            and input_.container.container_id == container_id
            and input_.attempt == attempt
        ]
        if inputs:
            self._push(Push(container_id, inputs))
        for input_ in inputs:
            if input_.cancelling:  # the runner was asked to end it before it had it
                self._apply_rare(CancelRunning(container_id, input_, input_.cancelling))

    def _arm(self, deadline: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = deadline
        self._timer = self.loop.call_later(max(0.0, deadline - time.monotonic()), self._tick)

    def _tick(self) -> None:
        self._timer, self._timer_at = None, float("inf")
        self.apply(self.dispatch.tick(time.monotonic()))

    # -- scaling

    def _ask(self, function_id: str) -> None:
        """Have the autoscaler look at a function at the end of this turn of the loop: a burst is one question."""
        if not self._asked:
            self.loop.call_soon(self._answer)
        self._asked.add(function_id)

    def ask_all(self) -> None:
        """What functions wanted before containers came back may be more than they want now."""
        for function_id in list(self._wanting):
            self._ask(function_id)

    def _answer(self) -> None:
        asked, self._asked = self._asked, set()
        now = time.monotonic()
        for function_id in asked:
            self._scale(now, function_id)
        self.place(now)

    def _scale(self, now: float, function_id: str) -> None:
        state = self.dispatch.functions.get(function_id)
        function = self.objects.functions.get(function_id)
        if state is None or function is None or state.closed:
            self._withdraw(now, function_id)
            return
        decision = autoscaler.decide(now, self.dispatch.demand(now, function_id), state.options)
        if decision.again and function_id not in self._asking_again:
            self._asking_again.add(function_id)
            self.loop.call_later(decision.again, self._ask_again, function_id)
        for container_id in decision.stop:
            self.apply(self.dispatch.drain(now, container_id, decision.reason))
        if decision.start and function.spec.secrets and not self._has_secrets(now, function):
            return
        if decision.start or function_id in self._wanting:
            self.scheduler.want(now, function_id, decision.start, request_of(function))
            (self._wanting.add if decision.start else self._wanting.discard)(function_id)

    def _ask_again(self, function_id: str) -> None:
        self._asking_again.discard(function_id)
        self._ask(function_id)

    async def rounds(self) -> None:
        """The periodic look at everything: windows that passed, room that came free, delays that are over."""
        while True:
            await asyncio.sleep(ROUND_S)
            try:
                self._round(time.monotonic())
            except Exception:  # a bug of ours: it costs this round, not every later one
                log.error("a round failed", error=traceback.format_exc())

    def _round(self, now: float) -> None:
        for function_id in list(self.dispatch.functions):
            self._scale(now, function_id)
            self._tell_stats(function_id)
            self._tell_stalled(now, function_id)
        self.place(now)

    def _tell_stalled(self, now: float, function_id: str) -> None:
        """Inputs that wait behind busy containers are nothing wrong, and what a program that hangs looks like."""
        state, function = self.dispatch.functions.get(function_id), self.objects.functions.get(function_id)
        if state is None or function is None:
            return
        ended, since = function.progress
        if ended != state.finished or not state.queued or state.starting:
            function.progress = (state.finished, now)
            function.told_stalled = False
        elif now - since > TELL_STALLED_AFTER and not function.told_stalled and state.containers:
            function.told_stalled = True
            limit = state.options.max_containers
            many = len(state.containers)
            busy = "its one container is busy" if many == 1 else f"its {many} containers are busy"
            room = f", and max_containers={limit}" if limit and len(state.containers) >= limit else ""
            refusal = self._refusals.get(function_id, (0.0, ""))[1]
            why = room or (f"; {refusal}" if refusal else "")
            reason = f"none of its inputs has ended for {TELL_STALLED_AFTER:g} s and {busy}{why}"
            self.notify(function, "waiting", {"reason": reason})

    def _tell_stats(self, function_id: str) -> None:
        state, function = self.dispatch.functions.get(function_id), self.objects.functions.get(function_id)
        if state is None or function is None or not function.app.followers:
            return
        stats = {
            "queued": state.queued + state.suspected + state.waiting,
            "running": len(state.running),
            "done": state.finished - state.failed,
            "failed": state.failed,
            "containers": len(state.containers),
        }
        if function.told_stats != stats:
            function.told_stats = stats
            self.notify(function, "stats", stats)

    def place(self, now: float) -> None:
        """Give the scheduler's room to whoever wants it."""
        if not self._wanting or self.is_held or self.takeover.awaited:
            return
        new_ids = (new_id("co") for _ in itertools.repeat(None))
        plan = self.scheduler.plan(now, new_ids, self.dispatch.surplus)
        for grant in plan.grants:
            self._start(now, grant)
        for function_id in [fid for fid in self._refusals if fid not in plan.refusals]:
            del self._refusals[function_id]
        for function_id, refusal in plan.refusals.items():
            self._refuse(now, function_id, refusal.reason, refusal.hint, refusal.permanent)
        for reclaim in plan.reclaims:
            self.apply(self.dispatch.drain(now, reclaim.container_id, reclaim.reason))

    def _refuse(self, now: float, function_id: str, reason: str, hint: str, permanent: bool) -> None:
        function = self.objects.functions.get(function_id)
        if function is None or function_id not in self.dispatch.functions:
            self._withdraw(now, function_id)  # its app is ending
            return
        if permanent:
            self._reject(now, function_id, reason, hint)
            return
        since, told = self._refusals.setdefault(function_id, (now, ""))
        demand = self.dispatch.demand(now, function_id)
        patience = TELL_WAITING_AFTER if self.nodes.nodes else TELL_NO_NODE_AFTER
        if told != reason and now - since > patience and not demand.ready and not demand.starting:
            self.notify(function, "waiting", {"reason": reason, "hint": hint})
            self._refusals[function_id] = (since, reason)

    def _reject(self, now: float, function_id: str, reason: str, hint: str) -> None:
        """No node could ever hold it: waiting inputs fail and say why, but for those of the journal that can wait."""
        self._withdraw(now, function_id)
        is_news = self._hopeless.get(function_id) != (reason, hint)
        self._hopeless[function_id] = reason, hint
        self.apply(self.dispatch.reject_queued(now, function_id, reason, hint))
        if is_news and self.dispatch.functions[function_id].pending():
            function = self.objects.functions[function_id]
            log.warning("cannot start", app=function.app.name, function=function.spec.tag, reason=reason)
            self.notify(function, "waiting", {"reason": reason, "hint": hint})

    def why_waiting(self, function: FunctionRecord) -> str:
        """What keeps containers of a function from starting, for people; empty when nothing does."""
        now, state = time.monotonic(), self.dispatch.functions.get(function.function_id)
        backoff = backoff_of(state, now) if state is not None else None
        if backoff is not None and backoff.failures:
            times = f"failed {backoff.failures} times" if backoff.failures > 1 else "failed once"
            return f"{backoff.reason}; it {times}, next start in {backoff.left:.0f} s"
        if state is None or not (state.pending() or state.options.min_containers):
            return ""
        reason = self._hopeless.get(function.function_id, ("", ""))[0]
        return reason or self._refusals.get(function.function_id, (0.0, ""))[1]

    def refusal(self, function_id: str) -> tuple[str, str, bool] | None:
        """Why a function gets no container: reason, hint, and whether that is for good."""
        if function_id in self._hopeless:
            return *self._hopeless[function_id], True
        since, told = self._refusals.get(function_id, (0.0, ""))
        return (told or "there is no room", "", False) if since else None

    def forget_function(self, function_id: str) -> None:
        self._withdraw(time.monotonic(), function_id)
        self._hopeless.pop(function_id, None)

    def _withdraw(self, now: float, function_id: str) -> None:
        """It wants no more containers."""
        self.scheduler.want(now, function_id, 0, Request())
        self._wanting.discard(function_id)
        self._refusals.pop(function_id, None)

    def _has_secrets(self, now: float, function: FunctionRecord) -> bool:
        """Whether what the function names is there; else what waits for it fails before anything is started."""
        if not self.vault.is_loaded:
            if self._reading is None or self._reading.done():
                self._reading = self.loop.create_task(self.vault.ready())
            return False  # until the next round
        problem = self.vault.problem(function.app.scope, function.spec)
        if problem is not None:
            self._reject(now, function.function_id, problem.message, problem.hint)
        return problem is None

    def hold(self, now: float, reason: str) -> None:
        """Start no container any more, and give those there are nothing more to do: the server is to end."""
        self.is_held = True
        for record in list(self.containers.values()):
            if record.state == "ready":
                self.apply(self.dispatch.drain(now, record.container_id, reason))
            else:
                self.stop_container(record.container_id, 0.0, reason)

    # -- a container's life

    def _start(self, now: float, grant: Grant) -> None:
        placement = grant.placement
        function = self.objects.functions.get(grant.function_id)
        node = self.nodes.nodes.get(placement.node_id)
        if function is None or node is None:
            self.scheduler.release(placement.container_id)
            return
        record = ContainerRecord(placement.container_id, function, node, list(placement.gpus), time.time())
        record.move("creating")
        self._hopeless.pop(grant.function_id, None)
        self.containers[record.container_id] = record
        node.containers.add(record.container_id)
        self.apply(self.dispatch.container_starting(now, record.container_id, grant.function_id))
        node.send(StartContainer(container_spec(record)))
        self.metering.started(meter_row(record))
        self.tell(record)

    def tell(self, record: ContainerRecord) -> None:
        data = {"container_id": record.container_id, "state": record.state, "reason": record.reason}
        self.notify(record.function, "container", data)

    def adopt_runner(self, container_id: str, stream: FrameStream) -> bool:
        """The runner's socket of a container arrived; whether it is one that was asked for."""
        record = self.containers.get(container_id)
        if record is None or record.stream is not None or record.state not in ("creating", "starting"):
            return False
        record.stream = stream
        stream.owner = record
        return True

    def container_event(self, node: Node, event: ContainerEvent) -> None:
        record = self.containers.get(event.container_id)
        if record is None or record.node is not node:
            if event.state == "exited" and record is None:
                self.takeover.ended(node, event)
            return
        if event.state == "starting" and record.move("starting"):
            record.timeline.stood_at = time.time()
            record.timeline.steps = event.steps
            self.scheduler.started(record.container_id)
            self._load(record)
            self.place(time.monotonic())
        elif event.state == "exited":
            record.exit_code, record.usage = event.exit_code, event.usage
            self._gone(record, _end_of(event.reason), event.oom)

    def runner_hello(self, record: ContainerRecord) -> None:
        record.said_hello = True
        record.timeline.hello_at = time.time()
        self._load(record)

    def _load(self, record: ContainerRecord) -> None:
        """Send the code and the secrets: only now, that the host has checked the container and the runner is there."""
        if record.state != "starting" or not record.said_hello or record.stream is None:
            return
        function = record.function
        app = function.app
        try:
            spec = self._with_secrets(function)
        except Error as error:  # deleted since it was placed, or its key is lost
            self._cannot_load(record, error.message, error.hint, b"")
            return
        record.timeline.load_at = time.time()
        record.stream.send(
            Load(
                app.app_id,
                app.name,
                function.stable_id,
                record.container_id,
                spec,
                function.family.ids,
                function.family.generators,
                terminal=app.terminal,
                environment=app.scope.environment,
            ),
            function.parameters,
        )

    def runner_loaded(self, record: ContainerRecord, message: Loaded, payload: bytes) -> None:
        if record.state != "starting":
            return
        now = time.monotonic()
        record.timeline.loaded_at = time.time()
        # The tenant's words, kept for as long as the container is remembered, and told to each input that waits.
        record.timeline.load_steps = {name[:32]: ms for name, ms in list(message.steps.items())[:32]}
        message.message, message.hint = message.message[:LOAD_TEXT_LIMIT], message.hint[:LOAD_TEXT_LIMIT]
        if len(payload) > INLINE_LIMIT_BYTES:
            payload = b""
        if not message.ok:
            self._cannot_load(record, message.message, message.hint, payload)
            return
        if record.move("ready"):
            self.tell(record)
            self.apply(self.dispatch.container_ready(now, record.container_id, slots_of(record.function.spec)))

    def _with_secrets(self, function: FunctionRecord) -> FunctionSpec:
        """Its spec as the runner gets it: the values of its secrets under its own environment, and no names."""
        spec = function.spec
        if not spec.secrets:
            return spec
        values = self.vault.values(function.app.scope, spec.secrets)
        return dataclasses.replace(spec, env={**values, **spec.env}, secrets=[], secret_keys={})

    def _cannot_load(self, record: ContainerRecord, message: str, hint: str, payload: bytes) -> None:
        record.init_error = Result(payload, record.container_id, 0.0, 0.0)
        record.reason = f"could not load `{record.function.spec.tag}`: {message}"
        self.apply(
            self.dispatch.container_gone(
                time.monotonic(),
                record.container_id,
                record.reason,
                fault="container",
                hint=hint,
                init_error=record.init_error,
            )
        )
        self.loop.call_later(STREAM_GRACE, self._give_up, record)  # it ends by itself, unless it is hostile

    def runner_outputs(self, record: ContainerRecord, items: list[OutputItem], parts: list[bytes]) -> None:
        if self.takeover.keep_early(record, items, parts):
            return
        results, took = [], 0.0
        for item, part in zip(items, parts, strict=True):
            data: bytes | str = check_digest(item.blob) if item.blob else part
            if item.status == "yield":
                input_ = self.dispatch.yielded(record.container_id, item.call_id, item.idx, item.attempt)
                if input_ is not None and self._may_yield(record, input_):
                    self.calls.give_yield(input_.call, item, data)
                continue
            if item.status not in ("ok", "error", "cancelled"):
                continue  # the other ends are not a runner's to declare
            result = Result(data, record.container_id, item.started_at, item.finished_at)
            results.append((item.call_id, item.idx, item.status, item.attempt, result))
            took += item.finished_at - item.started_at
        if results:
            took /= len(results)
            self.apply(self.dispatch.outputs(time.monotonic(), record.container_id, results, took))

    def _may_yield(self, record: ContainerRecord, input_: Input) -> bool:
        """Count a value that nobody took yet. The window is kept by the runner, which is the tenant's: one that does
        not keep it would have us hold all that it sends."""
        untaken = 1 + (input_.untaken[1] if input_.untaken[0] == input_.attempt else 0)
        input_.untaken = (input_.attempt, untaken)
        if untaken == UNTAKEN_LIMIT + 1:
            reason = f"sent {untaken} values of a generator that nobody had asked for"
            self.stop_container(record.container_id, 0.0, reason)
        return untaken <= UNTAKEN_LIMIT

    def give_credit(self, record: ContainerRecord, input_: Input, n: int) -> None:
        """Tell a runner that `n` values were taken; of more than it can have sent, only what the limit allows."""
        untaken = input_.untaken[1] if input_.untaken[0] == input_.attempt else 0
        n = min(n, untaken + UNTAKEN_LIMIT)
        if n > 0 and record.stream is not None:
            input_.untaken = (input_.attempt, untaken - n)
            record.stream.send(YieldCredit(input_.call_id, input_.idx, n))

    def runner_lost(self, record: ContainerRecord, reason: str) -> None:
        """Its socket ended: the container is ending, or must. Its node says why, or is given up on."""
        record.stream = None
        if record.container_id in self.containers:
            self.loop.call_later(STREAM_GRACE, self._give_up, record)

    def _give_up(self, record: ContainerRecord) -> None:
        if self.containers.get(record.container_id) is not record:
            return
        if record.node.stream.closing:  # the node went away with it; both may come back, or be lost
            self.loop.call_later(STREAM_GRACE, self._give_up, record)
        else:
            self.stop_container(record.container_id, 0.0, record.stop_reason or "its runner went away")

    def stop_container(
        self, container_id: str, grace: float, reason: str, *, by_operator: bool = False, cancel: bool = False
    ) -> bool:
        """End a container on its node; whether there is one. `cancel`: what it still runs is over already."""
        record = self.containers.get(container_id)
        if record is None:
            return False
        record.stop_reason = record.stop_reason or reason
        record.stopped_by_operator = record.stopped_by_operator or by_operator
        if grace > 0 and record.stream is not None:
            record.stream.send(StopRunner(grace, reason, cancel))
        record.node.send(StopContainer(container_id, grace, reason))
        if record.state == "ready":
            record.move("draining")
        return True

    def _gone(self, record: ContainerRecord, reason: str, oom: bool = False, *, infra: bool = False) -> None:
        """The one end of every container's record."""
        if self.containers.pop(record.container_id, None) is None:
            return
        record.node.containers.discard(record.container_id)
        self.takeover.gone(record.container_id)
        self.scheduler.release(record.container_id)
        record.move("exited")
        record.reason = record.reason or reason
        record.timeline.exited_at = time.time()
        if record.stream is not None:
            record.stream.abort("the container ended")
        fault: Fault = "infra" if infra or record.stopped_by_operator else "container"
        hint = _oom_hint(record) if oom else _crash_hint(reason) if fault == "container" else ""
        count("containers_ended")
        self.apply(
            self.dispatch.container_gone(
                time.monotonic(),
                record.container_id,
                reason,
                fault=fault,
                hint=hint,
                init_error=record.init_error,
            )
        )
        self.tell(record)
        self.metering.stopped(record.container_id, stop_row(record), vars(record.timeline))
        record.gone.set()
        record.init_error = None  # told to whom it concerned; history is for names and times
        self.history[record.container_id] = record
        if len(self.history) > HISTORY_LIMIT:
            del self.history[next(iter(self.history))]
        self.place(time.monotonic())

    # -- nodes

    def node_joined(self, node: Node) -> None:
        gpus = [(int(gpu["index"]), str(gpu["type"])) for gpu in node.machine.gpus]
        self._hopeless.clear()
        self.scheduler.add_node(SchedulerNode(node.node_id, node.machine.cpus, node.machine.memory_mib, gpus))
        if isinstance(node.machine, RegisterAgain):
            self.takeover.node_joined(node, node.machine.containers, node.machine.ended)
            self.ask_all()
        else:
            self.place(time.monotonic())

    def node_suspected(self, node: Node, suspected: bool, reason: str) -> None:
        """It gets no further container, or does again. Who has something there is told."""
        self.scheduler.suspect_node(node.node_id, suspected)
        for function in {self.containers[container_id].function for container_id in node.containers}:
            said = f"node `{node.machine.hostname}`, which runs {function.spec.tag}, is "
            said += f"not heard of: {reason}" if suspected else "heard of again"
            self.notify(function, "warning", {"reason": said})
        if not suspected:
            self.place(time.monotonic())

    def node_back(self, node: Node, containers: list[HeldContainer], ended: list[EndedContainer]) -> list[str]:
        """An agent whose connection broke is here again, and says what it has: what it was told, or has told, in the
        meantime may be lost. The containers whose runners need another socket."""
        for end in ended:
            if end.spec.container_id in node.containers:
                told = ContainerEvent(end.spec.container_id, "exited", exit_code=end.exit_code, reason=end.reason)
                told.usage = end.usage
                self.container_event(node, told)
        held = {one.spec.container_id: one for one in containers}
        for record in [self.containers[container_id] for container_id in list(node.containers)]:
            one = held.pop(record.container_id, None)
            if one is None:
                self._gone(record, "ended while nothing was heard of its node", infra=True)
            elif record.stop_reason:
                node.send(StopContainer(record.container_id, STOP_AGAIN_GRACE, record.stop_reason))
            elif one.stands and record.move("starting"):
                record.timeline.stood_at = time.time()
                self.scheduler.started(record.container_id)
                self._load(record)
            elif record.stream is None and record.said_hello:  # its runner was cut off too, and will say what it has
                self._set_down(record)
                self._gone(record, "was cut off with its node", infra=True)
                self.takeover.node_joined(node, [one])
        for container_id in held:
            if container_id not in self.takeover.parked:
                node.send(StopContainer(container_id, 0.0, "the server does not know it"))
        waiting = [self.containers[container_id] for container_id in node.containers]
        return [record.container_id for record in waiting if record.stream is None and not record.said_hello]

    def _set_down(self, record: ContainerRecord) -> None:
        """Give it nothing more, and remember what it has: it is given up, but not told to stop, and may come back."""
        record.was_given_up = record.state in ("starting", "ready") and not record.stop_reason
        self.dispatch.adoption.lose(record.container_id)
        drained = self.dispatch.drain(time.monotonic(), record.container_id, "its node is lost")
        self.apply([one for one in drained if not isinstance(one, StopInstruction)])

    def node_lost(self, node: Node, reason: str) -> None:
        for container_id in list(node.containers):  # first all: what one loses must not be given to another of them
            self._set_down(self.containers[container_id])
        for container_id in list(node.containers):
            self._gone(self.containers[container_id], f"was lost with its node: {reason}", infra=True)
        for container_id in [one for one, parked in self.takeover.parked.items() if parked.node is node]:
            self.takeover.gone(container_id)
        self.scheduler.remove_node(node.node_id)

    def timeline_of(self, container_id: str) -> ContainerTimeline | None:
        record = self.containers.get(container_id) or self.history.get(container_id)
        return record.timeline if record is not None else None


_ENDS = {"killed": "was killed", "out of memory": "ran out of memory"}


def _end_of(reason: str) -> str:
    """A node's words for an end, so that they follow "its container"."""
    for said, told in _ENDS.items():
        if reason.startswith(said):
            return told + reason[len(said) :]
    return reason if reason.startswith(("exited", "could not")) else f"ended: {reason}"


def request_of(function: FunctionRecord) -> Request:
    spec = function.spec
    return Request(spec.cpu, spec.memory_mib, tuple(spec.gpu))


def container_spec(record: ContainerRecord) -> ContainerSpec:
    spec = record.function.spec
    return ContainerSpec(
        record.container_id,
        workspace=record.function.app.scope.workspace,
        image=spec.image,
        source=spec.source,
        source_parts=spec.source_parts,
        cpu=spec.cpu,
        cpu_limit=spec.cpu_limit,
        memory_mib=spec.memory_mib,
        memory_limit_mib=spec.memory_limit_mib,
        gpus=record.gpus,
        network=not spec.block_network,
        hostname=record.container_id,
        function_id=record.function.function_id,
    )


_CRASHES = ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT")


def _crash_hint(reason: str) -> str:
    if reason.startswith("exited with code"):
        return "your code, or a library it uses, ended the process; what it wrote last is in the app's output"
    if reason.endswith(_CRASHES):
        return "native code crashed; the app's output shows the Python lines that were running"
    return ""


def _oom_hint(record: ContainerRecord) -> str:
    limit = record.function.spec.memory_limit_mib
    return f"raise the limit: `memory=({record.function.spec.memory_mib}, {limit * 2})`" if limit else ""
