"""A deterministic simulator of a server and nodes that the network parts, one way or both, and joins again.

`part_ways(seed)` runs the brains that run in production (dispatch with adoption, liveness) between callers, nodes,
containers and connections made up from one seed. Connections are as in TCP: what is sent while they are parted arrives
when they are joined, unless the other end was given up by then. Agents and runners do what those of `node.agent` and
`runner.returning` do, the hand what `server.reconciler` does. At the end every input has exactly one result, which some
execution gave it; none ran more often than leases on it were lost; where there is one node only and none of its
containers dies, each ran once, however often it was cut off; and no node is lost more often than the network broke.

`python -m squall.partitions --seeds 1000` runs many; `--seed N` replays one and tells its story. Tested in
`tests/unit/test_partitions.py`.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any

from squall.server.adoption import HeldInput
from squall.server.dispatch import Dispatch
from squall.server.inputs import (
    CancelRunning,
    DemandChanged,
    Finish,
    FunctionOptions,
    Input,
    KillContainer,
    Push,
    StopContainer,
)
from squall.server.liveness import AGENT_GIVES_UP_AFTER, Change, Liveness
from squall.testing import InvariantError, check_dispatch, require

BEAT = 5.0
HELLO_TIMEOUT = 30.0
RETURN_TIMEOUT = 1.0
RECENT = 64
FUNCTION = "fu-1"
SETTLED_WITHIN = 5_000.0
CHECK_EVERY = 20

Lease = tuple[str, int, int]
"""Call, index, attempt."""


class Link:
    """One connection. Each end may have closed it, and learns of the other's closing when that arrives."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.open = {"up": True, "down": True}
        """By direction: whether whoever receives there still listens."""
        self.due = {"up": 0.0, "down": 0.0}


@dataclass(eq=False)
class Box:
    """A container as it is on its node."""

    container_id: str
    node: Node
    slots: int
    link: Link | None = None
    next_link: Link | None = None
    inbox: list[Lease] = field(default_factory=list)
    held: dict[Lease, str] = field(default_factory=dict)
    """What runs, and the token of that execution."""
    recent: deque[tuple[Lease, str, str]] = field(default_factory=lambda: deque(maxlen=RECENT))
    is_dead: bool = False
    has_spoken: bool = False


@dataclass(eq=False)
class Node:
    """A machine with its agent."""

    node_id: str
    parted: dict[str, bool] = field(default_factory=lambda: {"up": False, "down": False})
    waiting: dict[str, list[Any]] = field(default_factory=lambda: {"up": [], "down": []})
    boxes: dict[str, Box] = field(default_factory=dict)
    link: Link | None = None
    attempts: int = 0
    received: int = 0
    seen: tuple[Link | None, int] = (None, 0)
    missed: int = 0


@dataclass
class Record:
    """A container as the server knows it."""

    container_id: str
    node: Node
    link: Link | None = None
    ready: bool = False
    given_up: bool = False


@dataclass(frozen=True)
class Plan:
    nodes: int
    calls: int
    slots: int
    duration: float
    partings: int
    longest: float
    kills: int

    @classmethod
    def draw(cls, seed: int) -> Plan:
        rng = random.Random(f"plan {seed}")
        return cls(
            nodes=rng.choice((1, 1, 2, 3)),
            calls=rng.choice((3, 10, 30)),
            slots=rng.choice((1, 1, 3)),
            duration=rng.choice((30.0, 120.0)),
            partings=rng.choice((1, 2, 5)),
            longest=rng.choice((10.0, 40.0, 120.0)),
            kills=rng.choice((0, 0, 2)),
        )


class World:
    """One run of one seed."""

    def __init__(self, seed: int, plan: Plan | None = None) -> None:
        self.seed = seed
        self.plan = plan or Plan.draw(seed)
        self.rng = random.Random(seed)
        self.now = 0.0
        self.events = 0
        self.story: deque[str] = deque(maxlen=80)
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = itertools.count(1)
        self.dispatch = Dispatch()
        self.liveness = Liveness()
        self.nodes = {f"no-{n}": Node(f"no-{n}") for n in range(self.plan.nodes)}
        self.registered: dict[str, Link] = {}
        """Nodes that the server has not given up, and the connection of each."""
        self.received: dict[str, int] = {}
        self.health: dict[str, str] = {}
        self.records: dict[str, Record] = {}
        self.given_up: set[str] = set()
        self.awaited: set[str] = set()
        self.back: list[tuple[str, int, list[HeldInput]]] = []
        self.executions: dict[tuple[str, int], list[str]] = {}
        self.leases_lost: dict[tuple[str, int], int] = {}
        self.results: dict[tuple[str, int], str] = {}
        self.losses = self.breaks = self.submitted = 0
        self._wake_at = float("inf")

    # -- the loop

    def at(self, delay: float, action: Callable[..., None], *arguments: Any) -> None:
        heappush(self._queue, (self.now + delay, next(self._numbers), action, arguments))

    def run(self) -> dict[str, int]:
        """Run to the end. Raises InvariantError, naming the seed and the last events, when a rule was broken."""
        try:
            self._begin()
            while self._queue and not self._is_settled():
                due, _, action, arguments = heappop(self._queue)
                self.now = max(self.now, due)
                action(*arguments)
                self.events += 1
                if self.events % CHECK_EVERY == 0:
                    check_dispatch(self.dispatch)
                require(self.now < SETTLED_WITHIN, "everything ends", len(self.results), self.submitted)
            self._check_end()
        except Exception as error:
            raise InvariantError(f"seed {self.seed}: {type(error).__name__}: {error}\n{self.tell()}") from error
        runs = sum(map(len, self.executions.values()))
        return {"inputs": self.submitted, "executions": runs, "losses": self.losses, "breaks": self.breaks}

    def tell(self) -> str:
        return "\n".join(["the last events:", *self.story, f"replay: python -m squall.partitions --seed {self.seed}"])

    def note(self, *words: Any) -> None:
        self.story.append(f"{self.now:10.3f}  " + " ".join(map(str, words)))

    def _begin(self) -> None:
        rng, plan = self.rng, self.plan
        options = FunctionOptions(0.0, 0.0, concurrency=plan.slots, max_containers=plan.nodes * 2)
        self.apply(self.dispatch.add_function(0.0, FUNCTION, options))
        for node in self.nodes.values():
            self._connect(node, is_first=True)
            self.at(rng.uniform(0, BEAT), self._agent_beat, node)
        self.at(BEAT, self._look)
        for number in range(plan.calls):
            self.at(rng.uniform(0, plan.duration), self._submit, number)
        for _ in range(plan.partings):
            self.at(rng.uniform(1, plan.duration), self._part, rng.choice(sorted(self.nodes)))
        for _ in range(plan.kills):
            self.at(rng.uniform(1, plan.duration), self._kill)
        self._last_fault = plan.duration + plan.longest

    def _is_settled(self) -> bool:
        return self.now > self._last_fault and len(self.results) == self.submitted

    # -- the network

    def send(self, link: Link, direction: str, action: Callable[..., None], *arguments: Any) -> None:
        """In order, and later where the node is parted in that direction."""
        node = link.node
        if node.parted[direction]:
            node.waiting[direction].append((link, action, arguments))
            return
        due = link.due[direction] = max(link.due[direction], self.now + self.rng.uniform(0.001, 0.05))
        self.at(due - self.now, self._arrive, link, direction, action, arguments)

    def _arrive(self, link: Link, direction: str, action: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if link.open[direction]:
            action(*arguments)

    def close(self, link: Link | None, by: str, told: Callable[..., None], *arguments: Any) -> None:
        """`by` the server or the node, which takes nothing more of it; the other end is told."""
        incoming, outgoing = ("up", "down") if by == "server" else ("down", "up")
        if link is not None and link.open[incoming]:
            link.open[incoming] = False
            self.send(link, outgoing, self._closed, link, outgoing, told, arguments)

    def _closed(self, link: Link, direction: str, told: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        link.open[direction] = False
        told(link, *arguments)

    def _part(self, node_id: str) -> None:
        node = self.nodes[node_id]
        if any(node.parted.values()):
            return
        directions = self.rng.choice((("up", "down"), ("up",), ("down",)))
        for direction in directions:
            node.parted[direction] = True
        self.breaks += 1
        seconds = self.rng.uniform(0.5, self.plan.longest)
        self.note("parted", node_id, directions, f"for {seconds:.1f} s")
        self.at(seconds, self._heal, node)

    def _heal(self, node: Node) -> None:
        self.note("healed", node.node_id)
        for direction in node.parted:
            node.parted[direction] = False
            waiting, node.waiting[direction] = node.waiting[direction], []
            for link, action, arguments in waiting:
                self.send(link, direction, action, *arguments)

    # -- agents

    def _connect(self, node: Node, is_first: bool = False) -> None:
        node.attempts += 1
        link = Link(node)
        node.link = None
        self.send(link, "up", self._hello, node, link, node.attempts, is_first)
        self.at(HELLO_TIMEOUT, self._try_again, node, link, node.attempts, is_first)

    def _try_again(self, node: Node, link: Link, attempt: int, is_first: bool) -> None:
        if node.attempts == attempt and node.link is None:
            self.close(link, "node", lambda _: None)
            self._connect(node, is_first)

    def _hello(self, node: Node, link: Link, attempt: int, is_first: bool) -> None:
        self.send(link, "down", self._welcomed, node, link, attempt, is_first)

    def _welcomed(self, node: Node, link: Link, attempt: int, is_first: bool) -> None:
        if node.attempts != attempt or node.link is not None:
            return
        node.link = link
        held = [] if is_first else list(node.boxes)
        self.send(link, "up", self._register, node, link, held)

    def _agent_beat(self, node: Node) -> None:
        self.at(BEAT, self._agent_beat, node)
        if node.link is None:
            node.missed = 0
            return
        now = (node.link, node.received)
        node.missed = node.missed + 1 if now == node.seen else 0
        node.seen = now
        if node.missed >= AGENT_GIVES_UP_AFTER:
            self.note("agent gives its connection up", node.node_id)
            link, node.link = node.link, None
            self.close(link, "node", self._agent_link_lost, node)
            self._connect(node)
        else:
            self.send(node.link, "up", self._beat_came, node, node.link)

    def _pinged(self, node: Node, link: Link) -> None:
        if node.link is link:
            node.received += 1

    def _server_closed(self, link: Link, node: Node) -> None:
        if node.link is link:
            node.link = None
            self._connect(node)

    def _give_sockets(self, node: Node, wanted: list[str] | None) -> None:
        node.received += 1
        for box in list(node.boxes.values()):
            if box.has_spoken and (wanted is None or box.container_id in wanted):
                box.next_link = Link(node)
                self._take_next(box)

    # -- containers

    def _create(self, node: Node, container_id: str) -> None:
        box = node.boxes[container_id] = Box(container_id, node, self.plan.slots)
        self.at(self.rng.uniform(0.1, 1.0), self._created, box)

    def _created(self, box: Box) -> None:
        if not box.is_dead:
            box.link, box.has_spoken = Link(box.node), True
            self.send(box.link, "up", self._runner_came, box, box.link)
            self._say_again(box, box.link)

    def _take_next(self, box: Box) -> None:
        if box.link is None and box.next_link is not None and not box.is_dead:
            box.link, box.next_link = box.next_link, None
            self.send(box.link, "up", self._runner_came, box, box.link)
            self._say_again(box, box.link)

    def _say_again(self, box: Box, link: Link) -> None:
        results = list(box.recent)
        held = [*box.held, *box.inbox]
        self.send(link, "up", self._runner_back, box.container_id, box.slots, link, results, held)

    def _runner_link_closed(self, link: Link, box: Box) -> None:
        if box.link is link:
            box.link = None
            self._take_next(box)

    def _pushed(self, box: Box, leases: list[Lease]) -> None:
        box.inbox += leases
        self._run_next(box)

    def _run_next(self, box: Box) -> None:
        while box.inbox and len(box.held) < box.slots and not box.is_dead:
            lease = box.inbox.pop(0)
            token = box.held[lease] = f"token-{next(self._numbers)}"
            self.executions.setdefault(lease[:2], []).append(token)
            self.note("runs", lease, "in", box.container_id, "of", box.node.node_id)
            self.at(self.rng.expovariate(1 / 4.0), self._ended, box, lease, token)

    def _cancelled(self, box: Box, lease: Lease) -> None:
        if lease in box.inbox:
            box.inbox.remove(lease)
            self._answer(box, lease, "cancelled", "")
        elif lease in box.held:
            self._ended(box, lease, box.held[lease], "cancelled")

    def _ended(self, box: Box, lease: Lease, token: str, status: str = "ok") -> None:
        if box.is_dead or box.held.get(lease) != token:
            return
        del box.held[lease]
        self._answer(box, lease, status, token)
        self._run_next(box)

    def _answer(self, box: Box, lease: Lease, status: str, token: str) -> None:
        box.recent.append((lease, status, token))
        if box.link is not None:
            self.send(box.link, "up", self._output, box.container_id, box.link, lease, status, token)

    def _stopped(self, node: Node, container_id: str) -> None:
        box = node.boxes.pop(container_id, None)
        if box is None:
            return
        box.is_dead = True
        if box.link is not None:
            self.close(box.link, "node", self._runner_lost, container_id)
        if node.link is not None:
            self.send(node.link, "up", self._container_exited, node, node.link, container_id)

    def _kill(self) -> None:
        boxes = [box for node in self.nodes.values() for box in node.boxes.values()]
        if boxes:
            box = self.rng.choice(sorted(boxes, key=lambda box: box.container_id))
            for lease in (*box.held, *box.inbox):
                self._lose(lease[:2])
            self._stopped(box.node, box.container_id)

    # -- the server

    def apply(self, instructions: list[Any]) -> None:
        for instruction in instructions:
            match instruction:
                case Push():
                    record = self.records.get(instruction.container_id)
                    if record is not None and record.link is not None:
                        leases = [(one.call_id, one.idx, one.attempt) for one in instruction.inputs]
                        box = record.node.boxes.get(record.container_id)
                        if box is not None:
                            self.send(record.link, "down", self._pushed, box, leases)
                case Finish():
                    self._finished(instruction)
                case CancelRunning():
                    self._cancel(instruction.container_id, instruction.input)
                case DemandChanged():
                    self.at(0.0, self._place)
                case StopContainer() | KillContainer():
                    self._stop(instruction.container_id)
        deadline = self.dispatch.next_deadline()
        if deadline is not None and deadline < self._wake_at:
            self._wake_at = deadline
            self.at(max(0.0, deadline - self.now), self._wake)

    def _wake(self) -> None:
        self._wake_at = float("inf")
        self.apply(self.dispatch.tick(self.now))

    def _submit(self, number: int) -> None:
        size = self.rng.randint(1, 4)
        self.submitted += size
        items = [(idx, b"") for idx in range(size)]
        kind = self.rng.choice(("map", "spawn"))
        self.apply(self.dispatch.submit(self.now, f"fc-{number}", FUNCTION, items, kind, None))

    def _finished(self, finish: Finish) -> None:
        key = (finish.input.call_id, finish.input.idx)
        require(key not in self.results, "an input ends once", key)
        require(finish.status == "ok", "nothing that the network does fails an input", key, finish.status)
        require(finish.output in self.executions.get(key, ()), "a result is of an execution", key, finish.output)
        self.results[key] = finish.output

    def _place(self) -> None:
        """A container more where the server believes that there is a node, as far as inputs wait."""
        if self.awaited:
            return
        state = self.dispatch.functions[FUNCTION]
        up = [node_id for node_id in self.registered if self.health[node_id] == "up"]
        wanted = min(len(state.queue), 2 * len(up)) - len(state.starting)
        for node_id in up:
            here = [record for record in self.records.values() if record.node.node_id == node_id]
            if wanted > 0 and len(here) < 2:
                wanted -= 1
                self._start(self.nodes[node_id])

    def _start(self, node: Node) -> None:
        container_id = f"co-{next(self._numbers)}"
        self.records[container_id] = Record(container_id, node)
        self.apply(self.dispatch.container_starting(self.now, container_id, FUNCTION))
        self.send(self.registered[node.node_id], "down", self._create, node, container_id)

    def _stop(self, container_id: str) -> None:
        record = self.records.get(container_id)
        if record is not None and record.node.node_id in self.registered:
            self.send(self.registered[record.node.node_id], "down", self._stopped, record.node, container_id)

    def _cancel(self, container_id: str, input_: Input) -> None:
        record = self.records.get(container_id)
        box = record.node.boxes.get(container_id) if record is not None else None
        if record is not None and record.link is not None and box is not None:
            self.send(record.link, "down", self._cancelled, box, (input_.call_id, input_.idx, input_.attempt))

    def _register(self, node: Node, link: Link, held: list[str]) -> None:
        if node.node_id in self.registered:
            self._node_back(node, link, held)
            return
        self.registered[node.node_id] = link
        self.received[node.node_id] = 0
        self.health[node.node_id] = self.liveness.joined(node.node_id)
        self.note("registered", node.node_id, held, self.health[node.node_id])
        for container_id in held:
            self._take(node, container_id)
        self.send(link, "down", self._give_sockets, node, None)
        self.at(0.0, self._place)

    def _take(self, node: Node, container_id: str) -> None:
        if container_id in self.records or container_id not in self.given_up:
            self.send(self.registered[node.node_id], "down", self._stopped, node, container_id)
            return
        self.given_up.discard(container_id)
        self.records[container_id] = Record(container_id, node)
        self.apply(self.dispatch.container_starting(self.now, container_id, FUNCTION))
        if not self.awaited:
            self.at(RETURN_TIMEOUT, self._go_on)
        self.awaited.add(container_id)

    def _node_back(self, node: Node, link: Link, held: list[str]) -> None:
        self.note("back", node.node_id, held)
        before, self.registered[node.node_id] = self.registered[node.node_id], link
        self.close(before, "server", self._server_closed, node)
        self.liveness.joined(node.node_id)
        self.received[node.node_id] = 0
        wanted = []
        for record in [record for record in self.records.values() if record.node is node]:
            if record.container_id not in held:
                self._gone(record, is_lost=True)
            elif record.link is None and record.ready:
                self._set_down(record)
                self._gone(record, is_lost=True)
                self._take(node, record.container_id)
                wanted.append(record.container_id)
            elif record.link is None:
                wanted.append(record.container_id)
        for container_id in held:
            if container_id not in self.records:
                self.send(link, "down", self._stopped, node, container_id)
        self.send(link, "down", self._give_sockets, node, wanted)

    def _beat_came(self, node: Node, link: Link) -> None:
        if self.registered.get(node.node_id) is link:
            self.received[node.node_id] += 1

    def _look(self) -> None:
        self.at(BEAT, self._look)
        for node_id, link in self.registered.items():
            self.send(link, "down", self._pinged, self.nodes[node_id], link)
        self._changed(self.liveness.look(dict(self.received)))
        self._place()

    def _changed(self, changes: Sequence[Change]) -> None:
        for change in changes:
            self.note(change)
            self.health[change.node_id] = change.health
            if change.health == "lost":
                self._node_lost(self.nodes[change.node_id])
            else:
                self.at(0.0, self._place)

    def _node_lost(self, node: Node) -> None:
        self.losses += 1
        link = self.registered.pop(node.node_id)
        self.received.pop(node.node_id)
        self.close(link, "server", self._server_closed, node)
        mine = [record for record in self.records.values() if record.node is node]
        for record in mine:
            self._set_down(record)
        for record in mine:
            self._gone(record, is_lost=True)

    def _agent_link_lost(self, link: Link, node: Node) -> None:
        if self.registered.get(node.node_id) is link:
            self._changed(self.liveness.broken(node.node_id, "it was closed"))

    def _set_down(self, record: Record) -> None:
        record.given_up = record.ready
        self.dispatch.adoption.lose(record.container_id)
        out = self.dispatch.drain(self.now, record.container_id, "its node is lost")
        self.apply([one for one in out if not isinstance(one, StopContainer)])

    def _gone(self, record: Record, is_lost: bool) -> None:
        if self.records.pop(record.container_id, None) is None:
            return
        if record.given_up:
            self.given_up.add(record.container_id)
        self.awaited.discard(record.container_id)
        container = self.dispatch.containers.get(record.container_id)
        for input_ in container.running if container is not None else ():
            self._lose((input_.call_id, input_.idx))
        box = record.node.boxes.get(record.container_id)
        if record.link is not None and box is not None:
            self.close(record.link, "server", self._runner_link_closed, box)
        gone = self.dispatch.container_gone(self.now, record.container_id, "was lost", fault="infra")
        self.apply(gone)

    def _lose(self, key: tuple[str, int]) -> None:
        self.leases_lost[key] = self.leases_lost.get(key, 0) + 1

    def _container_exited(self, node: Node, link: Link, container_id: str) -> None:
        record = self.records.get(container_id)
        if record is not None and self.registered.get(node.node_id) is link:
            self._gone(record, is_lost=False)

    # -- runners, as the server hears them

    def _runner_came(self, box: Box, link: Link) -> None:
        record = self.records.get(box.container_id)
        if record is None or record.link is not None:
            self.close(link, "server", self._runner_link_closed, box)
            return
        record.link = link

    def _runner_lost(self, link: Link, container_id: str) -> None:
        record = self.records.get(container_id)
        if record is not None and record.link is link:
            record.link = None

    def _runner_back(self, container_id: str, slots: int, link: Link, results: list[Any], held: list[Lease]) -> None:
        record = self.records.get(container_id)
        if record is None or record.link is not link or record.ready:
            return
        record.ready = True
        again = [(*lease[:2], status, lease[2], token) for lease, status, token in results]
        self.apply(self.dispatch.adoption.outputs_again(self.now, container_id, again))
        self.back.append((container_id, slots, [HeldInput(*lease) for lease in held]))
        self.awaited.discard(container_id)
        if not self.awaited:
            self._go_on()

    def _go_on(self) -> None:
        self.awaited.clear()
        back, self.back = self.back, []
        back = [words for words in back if words[0] in self.records]
        self.apply(self.dispatch.adoption.adopt(self.now, back))
        self.at(0.0, self._place)

    def _output(self, container_id: str, link: Link, lease: Lease, status: str, token: str) -> None:
        record = self.records.get(container_id)
        if record is not None and record.link is link:
            call_id, idx, attempt = lease
            out = self.dispatch.output(self.now, container_id, call_id, idx, status, attempt, token)
            self.apply(out)

    # -- judgement

    def _check_end(self) -> None:
        require(len(self.results) == self.submitted, "every input has a result", len(self.results), self.submitted)
        for key, tokens in self.executions.items():
            allowed = 1 + self.leases_lost.get(key, 0)
            require(len(tokens) <= allowed, "an input runs again only when its lease was lost", key, tokens)
            if self.plan.nodes == 1 and not self.plan.kills:
                require(len(tokens) == 1, "what was cut off and waited for is taken back", key, tokens)
        require(self.losses <= self.breaks, "a node is lost once for each time it was cut off", self.losses)


def part_ways(seed: int, plan: Plan | None = None) -> dict[str, int]:
    """Run one seed to its end. Raises InvariantError, which names the seed."""
    return World(seed, plan).run()


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m squall.partitions`."""
    parser = argparse.ArgumentParser(prog="python -m squall.partitions", description="Part nodes, from seeds.")
    parser.add_argument("--seed", type=int, help="run this seed and tell its story")
    parser.add_argument("--seeds", type=int, default=1000, help="run so many seeds")
    options = parser.parse_args(arguments)
    totals: dict[str, int] = {}
    try:
        for seed in range(options.seeds) if options.seed is None else [options.seed]:
            world = World(seed)
            world.story = deque(maxlen=80 if options.seed is None else None)
            for name, count in world.run().items():
                totals[name] = totals.get(name, 0) + count
        if options.seed is not None:
            print(world.tell())
    except InvariantError as error:
        print(error, file=sys.stderr)
        return 1
    print(", ".join(f"{count} {name}" for name, count in totals.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
