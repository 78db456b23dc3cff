"""HAND: takes over containers that have outlived an earlier server, or were given up with their node, and what they
have to say.

The agent registers with what it has. A container whose function is here is taken over: it keeps its room, and runs what
comes as any other once its runner has said what it holds. One of a version that was replaced ends what it holds, and
gets nothing more. One whose function is not here yet is parked, with its
runner's socket and its latest output, until its app comes back with its client, or RESUME_GRACE is over. All others are
ended. Until those that come back have spoken no container is started, as what waits may be what they run. It decides
nothing about inputs: `adoption` does. Tested in `tests/integration/test_reattach.py`.
"""

from __future__ import annotations

import dataclasses
import socket
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from squall._observe import Logger
from squall.protocol.messages import ContainerEvent, ContainerOutput, OutputItem, StopContainer
from squall.protocol.resumption import EndedContainer, HeldContainer, RunnerBack
from squall.server.adoption import RESUME_GRACE, Back, HeldInput
from squall.server.calls import Result
from squall.server.containers import ContainerRecord
from squall.server.metering import meter_row
from squall.server.nodes import Node
from squall.server.objects import FunctionRecord, options_of, slots_of
from squall.server.scheduler import Request
from squall.server.wire import check_id
from squall.storage.blobs import check_digest

if TYPE_CHECKING:
    from squall.server.reconciler import Reconciler

log = Logger("server")

RETURN_TIMEOUT = 1.0
"""For the runners of containers that are taken over to say what they have, before new containers are started."""
AGAIN_LIMIT_BYTES = 256 << 20
"""Results that are taken a second time, in a server's life."""
PARKED_OUTPUT_BYTES = 256 << 10
LEAVING_LIMIT = 10_000
RECREATE_GRACE_S = 10.0
"""What an old container may take to end what it runs, when it is to be replaced come what may."""


class Parked:
    """A container of a function that is not here yet."""

    def __init__(self, node: Node, held: HeldContainer) -> None:
        self.node = node
        self.held = held
        self.runner: socket.socket | None = None
        self.output: list[tuple[ContainerOutput, bytes]] = []
        self.output_bytes = 0


class Takeover:
    def __init__(self, reconciler: Reconciler) -> None:
        self.reconciler = reconciler
        self.parked: dict[str, Parked] = {}
        self.awaited: set[str] = set()
        """Containers whose runner has not spoken yet."""
        self._back: list[tuple[ContainerRecord, Back]] = []
        """Those that have, while others have not."""
        self._early: dict[str, list[tuple[list[OutputItem], list[bytes]]]] = {}
        """What their containers sent since then. Their inputs are not leased to them again yet."""
        self._again_bytes = 0
        self._leaving: dict[str, tuple[Node, HeldContainer]] = {}
        """Those that were told to end and have no record."""

    # -- containers

    def node_joined(self, node: Node, containers: list[HeldContainer], ended: Iterable[EndedContainer] = ()) -> None:
        for one in ended:
            self._write_down(node, one)
        for held in containers:
            self._take(node, held)
        if containers:
            log.info(
                "took over containers", node=node.node_id, containers=len(node.containers), parked=len(self.parked)
            )

    def _write_down(self, node: Node, ended: EndedContainer) -> None:
        """What it was is known, how it ended nobody has heard."""
        spec, objects = ended.spec, self.reconciler.objects
        function = objects.functions.get(spec.function_id) or objects.former(spec.function_id)
        row = {
            "container_id": check_id(spec.container_id, "co"),
            "function_id": function.stable_id if function is not None else spec.function_id,
            "app_id": function.app.app_id if function is not None else "",
            "node_id": node.node_id,
            "cpu": spec.cpu,
            "memory_mib": spec.memory_mib,
            "gpus": len(spec.gpus),
            "requested_at": ended.requested_at,
        }
        ends = {
            "started_at": ended.started_at or None,
            "stopped_at": ended.stopped_at,
            "exit_code": ended.exit_code,
            "reason": ended.reason,
            "cpu_seconds": ended.usage.get("cpu_seconds"),
            "memory_peak_bytes": ended.usage.get("memory_peak_bytes"),
        }
        self.reconciler.metering.ended_unheard(row, ends)

    def ended(self, node: Node, event: ContainerEvent) -> None:
        """A container without a record has ended: one that is parked, or was told to end. What it used is written."""
        parked = self.parked.get(event.container_id)
        at, held = (parked.node, parked.held) if parked else self._leaving.get(event.container_id, (None, None))
        if held is None or at is not node:
            return
        self._leaving.pop(event.container_id, None)
        self.gone(event.container_id)
        began = held.requested_at
        started = began if held.stands else 0.0
        end = EndedContainer(held.spec, began, started, event.at, event.exit_code, event.reason, event.usage)
        self._write_down(node, end)

    def _take(self, node: Node, held: HeldContainer) -> None:
        reconciler, spec = self.reconciler, held.spec
        known = reconciler.history.get(spec.container_id)
        is_new = spec.container_id not in reconciler.containers and (known is None or known.was_given_up)
        function = reconciler.objects.functions.get(spec.function_id)
        state = reconciler.dispatch.functions.get(spec.function_id)
        request = Request(spec.cpu, spec.memory_mib)
        if not is_new or not reconciler.scheduler.restore(
            spec.container_id, node.node_id, request, spec.function_id, spec.gpus
        ):
            self._end(node, held, "there is no place for it on the server that is here now")
        elif function is not None and state is not None and not state.closed:
            self._adopt(node, held, function)
        elif (former := reconciler.objects.former(spec.function_id)) is not None:
            self._adopt_former(node, held, former)
        else:
            self.parked[spec.container_id] = Parked(node, held)
            reconciler.loop.call_later(RESUME_GRACE, self._unpark, spec.container_id)

    def _end(self, node: Node, held: HeldContainer, reason: str) -> None:
        container_id = held.spec.container_id
        self.reconciler.scheduler.release(container_id)
        node.send(StopContainer(container_id, 0.0, reason))
        self._leaving[container_id] = node, held
        if len(self._leaving) > LEAVING_LIMIT:
            del self._leaving[next(iter(self._leaving))]

    def _adopt_former(self, node: Node, held: HeldContainer, former: FunctionRecord) -> None:
        """One of a version that was replaced. Where the current one has no such function, it goes on until all that was
        asked of it is done."""
        reconciler = self.reconciler
        successor = reconciler.objects.find_function(former.stable_id)
        if successor is None:
            self.open_former(former)
            self._adopt(node, held, former)
        elif not held.stands or reconciler.is_held:
            self._end(node, held, "its version was replaced")
        else:
            reason = f"version {former.app.version} of `{former.app.name}` took over"
            names = held.spec.container_id, former.function_id, options_of(former), successor.function_id, reason
            reconciler.apply(reconciler.dispatch.adoption.recall(time.monotonic(), *names))
            if held.spec.container_id in reconciler.dispatch.containers:
                self._record(node, held, former)
            else:
                self._end(node, held, "its function has ended")

    def open_former(self, former: FunctionRecord) -> None:
        """Have a function that is not in the current version end what was asked of it."""
        options = dataclasses.replace(options_of(former), min_containers=0, buffer_containers=0)
        self.reconciler.apply(self.reconciler.dispatch.add_function(time.monotonic(), former.function_id, options))

    def _adopt(self, node: Node, held: HeldContainer, function: FunctionRecord) -> ContainerRecord | None:
        """Its room is reserved already."""
        reconciler, spec = self.reconciler, held.spec
        state = reconciler.dispatch.functions.get(spec.function_id)
        if state is None or state.closed or reconciler.is_held:
            self._end(node, held, "its function has ended")
            return None
        now = time.monotonic()
        reconciler.apply(reconciler.dispatch.container_starting(now, spec.container_id, spec.function_id))
        return self._record(node, held, function)

    def _record(self, node: Node, held: HeldContainer, function: FunctionRecord) -> ContainerRecord:
        """What dispatch knows already is here again."""
        reconciler, spec = self.reconciler, held.spec
        reconciler.history.pop(spec.container_id, None)  # it was given up with its node
        record = ContainerRecord(spec.container_id, function, node, list(spec.gpus), held.requested_at)
        record.is_adopted = True
        record.move("creating")
        reconciler.containers[record.container_id] = record
        node.containers.add(record.container_id)
        reconciler.metering.resumed(meter_row(record))
        if held.stands and record.move("starting"):
            record.timeline.stood_at = held.requested_at
            if not self.awaited:
                reconciler.loop.call_later(RETURN_TIMEOUT, self._stop_waiting)
            self.awaited.add(record.container_id)
        reconciler.tell(record)
        return record

    def _stop_waiting(self) -> None:
        """Who has not come back yet may still do so, but what waits is not kept from others any longer."""
        if self.awaited:
            log.warning("containers are not back yet", containers=sorted(self.awaited), waited=RETURN_TIMEOUT)
            self.awaited.clear()
            self._go_on()

    def gone(self, container_id: str) -> None:
        """Harmless for one that was not taken over."""
        if container_id in self.awaited:
            self.awaited.discard(container_id)
            if not self.awaited:
                self._go_on()
        parked = self.parked.pop(container_id, None)
        if parked is not None:
            self.reconciler.scheduler.release(container_id)
            if parked.runner is not None:
                parked.runner.close()

    # -- those whose function is not here yet

    def function_opened(self, function_id: str) -> None:
        """It takes inputs from now on: its containers have waited for it."""
        for container_id, parked in list(self.parked.items()):
            if parked.held.spec.function_id != function_id:
                continue
            del self.parked[container_id]
            record = self._adopt(parked.node, parked.held, self.reconciler.objects.functions[function_id])
            if parked.runner is not None:
                self.reconciler.nodes.on_runner(container_id, parked.runner)
            for message, data in parked.output if record is not None else ():
                self.reconciler.on_output(parked.node, message, data)

    def park_runner(self, container_id: str, sock: socket.socket) -> bool:
        parked = self.parked.get(container_id)
        if parked is None or parked.runner is not None:
            return False
        parked.runner = sock
        return True

    def park_output(self, message: ContainerOutput, data: bytes) -> None:
        parked = self.parked.get(message.container_id)
        if parked is not None and parked.output_bytes + len(data) <= PARKED_OUTPUT_BYTES:
            parked.output.append((message, data))
            parked.output_bytes += len(data)

    def _unpark(self, container_id: str) -> None:
        parked = self.parked.get(container_id)
        if parked is not None:
            self.gone(container_id)
            self._end(parked.node, parked.held, "its app did not come back")

    # -- runners

    def runner_back(self, record: ContainerRecord, message: RunnerBack) -> None:
        """The runner of one that was taken over says what it has; one that was never loaded is loaded now."""
        if record.said_hello:
            return
        if not record.is_adopted:  # the first socket that its agent handed over for it was lost on the way
            if not message.loaded:
                self.reconciler.runner_hello(record)
            return
        record.timeline.hello_at = time.time()
        self.awaited.discard(record.container_id)
        if message.loaded:
            record.said_hello = True
            slots = slots_of(record.function.spec)
            held = [
                HeldInput(check_id(one.call_id, "fc"), one.idx, one.attempt, one.is_broken)
                for one in message.inputs[: slots + 1]
            ]
            self._back.append((record, (record.container_id, slots, held)))
            self._early[record.container_id] = []
        elif self._is_replaced(record):
            self.reconciler.stop_container(record.container_id, 0.0, "its version was replaced")
        else:
            self.reconciler.runner_hello(record)
        if not self.awaited:
            self._go_on()

    def _go_on(self) -> None:
        """All have spoken, or have had their time: now it is known what waits and does not run."""
        reconciler = self.reconciler
        back, self._back = self._back, []
        early, self._early = self._early, {}
        for record, _ in back:
            if record.move("ready"):
                reconciler.tell(record)
        ready = [words for record, words in back if record.state == "ready"]
        reconciler.apply(reconciler.dispatch.adoption.adopt(time.monotonic(), ready))
        for record, _ in back:
            for items, parts in early[record.container_id]:
                reconciler.runner_outputs(record, items, parts)
            version = record.function.app.current
            if self._is_replaced(record) and version is not None and version.strategy == "recreate":
                grace = max(RECREATE_GRACE_S, record.function.spec.exit_grace)
                reason = f"version {version.number} of `{record.function.app.name}` took over"
                reconciler.stop_container(record.container_id, grace, reason, by_operator=True)
        reconciler.ask_all()

    def keep_early(self, record: ContainerRecord, items: list[OutputItem], parts: list[bytes]) -> bool:
        """Whether these outputs must wait until all have spoken. They are few: an end for each input that it has."""
        waiting = self._early.get(record.container_id)
        if waiting is None:
            return False
        if sum(len(kept) for kept, _ in waiting) + len(items) > 2 * slots_of(record.function.spec) + 2:
            self.reconciler.stop_container(record.container_id, 0.0, "its runner sent more results than it has inputs")
        else:
            waiting.append((items, [bytes(part) for part in parts]))
        return True

    def _is_replaced(self, record: ContainerRecord) -> bool:
        state = self.reconciler.dispatch.functions.get(record.function.function_id)
        return state is not None and bool(state.closed)

    def outputs_again(self, record: ContainerRecord, items: list[OutputItem], parts: list[bytes]) -> None:
        """Results that the server before may have lost. Beyond a bound they are: what they are of is run again."""
        self._again_bytes += sum(map(len, parts))
        if not record.is_adopted or record.said_hello or self._again_bytes > AGAIN_LIMIT_BYTES:
            return
        results = [
            (check_id(item.call_id, "fc"), item.idx, item.status, item.attempt, result)
            for item, result in _results(record, items, parts)
        ]
        reconciler = self.reconciler
        reconciler.apply(reconciler.dispatch.adoption.outputs_again(time.monotonic(), record.container_id, results))


def _results(
    record: ContainerRecord, items: list[OutputItem], parts: list[bytes]
) -> Iterator[tuple[OutputItem, Result]]:
    for item, part in zip(items, parts, strict=True):
        if item.status in ("ok", "error"):
            data: bytes | str = check_digest(item.blob) if item.blob else part
            yield item, Result(data, record.container_id, item.started_at, item.finished_at)
