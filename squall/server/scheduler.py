"""BRAIN: on which node a container goes, and whose turn it is when there is not room for all.

It keeps what each node has and what is reserved on it; a reservation is made and undone in O(1) and always names its
container, so that nothing can be released twice. It is told of nodes and containers, never asks. A refusal says in a
sentence why: *permanent* when no known node could ever hold the request (its inputs should fail), else temporary (they
wait, and the sentence is shown).

Which node. Among up to CANDIDATES nodes with room (the search goes round, so that all nodes get their turn) the least
loaded one, as CPU is shared in proportion to requests; but for GPUs the one that is left with the fewest, so that
large requests still find a node, and nodes with GPUs only when nothing else has room. At most STARTS_PER_NODE
containers start on a node at once: more of them only make each other slower.

Whose turn. Functions state how many containers they `want`; `plan` gives to the one that holds fewest, ties in turn.
So ten thousand inputs of one function cannot keep another from its first container. When there is no room, idle
containers of others give theirs back at once (`Reclaim`), and busy ones of functions that hold several do so for a
function that has had none for RECLAIM_AFTER seconds. The node is then kept for that function, as otherwise smaller
requests would take what comes free piece by piece.

Tested in `tests/unit/test_scheduler.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Literal, TypeAlias

CANDIDATES = 8
STARTS_PER_NODE = 16
RECLAIM_AFTER = 5.0

NodeState: TypeAlias = Literal["up", "silent", "draining"]


@dataclass(frozen=True, slots=True)
class Request:
    """What one container needs. `gpu`: fallbacks in order, each `TYPE`, `TYPE:N` or `any`."""

    cpu: float = 0.125
    memory_mib: int = 128
    gpu: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Placement:
    container_id: str
    node_id: str
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Refusal:
    reason: str
    hint: str = ""
    permanent: bool = False


@dataclass(frozen=True, slots=True)
class Grant:
    """This function may start one container there; the reservation is made with `place`'s container id."""

    function_id: str
    placement: Placement


@dataclass(frozen=True, slots=True)
class Reclaim:
    """Drain this container of `function_id`: `for_function_id` waits and there is no room."""

    container_id: str
    function_id: str
    for_function_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    grants: tuple[Grant, ...]
    refusals: dict[str, Refusal]
    reclaims: tuple[Reclaim, ...]


class Node:
    """A node and what is reserved on it. CPUs are counted in thousandths: floats would drift."""

    __slots__ = (
        "containers",
        "free_gpus",
        "free_memory",
        "free_millicpu",
        "gpus",
        "kept_for",
        "leaving",
        "memory_mib",
        "millicpu",
        "node_id",
        "starting",
        "state",
    )

    def __init__(self, node_id: str, cpus: float, memory_mib: int, gpus: Sequence[tuple[int, str]] = ()) -> None:
        self.node_id = node_id
        self.state: NodeState = "up"
        self.millicpu = self.free_millicpu = round(cpus * 1000)
        self.memory_mib = self.free_memory = memory_mib
        self.gpus = Counter(kind for _, kind in gpus)
        self.free_gpus: dict[str, list[int]] = {}
        for index, kind in sorted(gpus, reverse=True):
            self.free_gpus.setdefault(kind, []).append(index)
        self.containers = 0
        self.starting = 0
        self.kept_for = ""
        """The function for which room is being made here; no other gets any meanwhile."""
        self.leaving: dict[str, _Reservation] = {}
        """What was reclaimed and has not ended yet."""

    @property
    def load(self) -> float:
        """The scarcer of CPU and memory, as the part that is reserved."""
        cpu = 1 - self.free_millicpu / self.millicpu if self.millicpu else 1.0
        memory = 1 - self.free_memory / self.memory_mib if self.memory_mib else 1.0
        return max(cpu, memory)

    def could_hold(self, request: Request) -> bool:
        """Whether it would have room if it were empty."""
        return (
            _millicpu(request) <= self.millicpu
            and request.memory_mib <= self.memory_mib
            and (not request.gpu or any(_gpu_type(self.gpus, wish) for wish in request.gpu))
        )

    def has_room(self, request: Request) -> bool:
        return _millicpu(request) <= self.free_millicpu and request.memory_mib <= self.free_memory

    def gpu_type(self, wish: str) -> str:
        """The type of its free GPUs that fulfils the wish, or empty."""
        return _gpu_type({kind: len(free) for kind, free in self.free_gpus.items()}, wish)


@dataclass(slots=True)
class _Reservation:
    node: Node
    function_id: str
    millicpu: int
    memory_mib: int
    gpu_type: str
    gpus: tuple[int, ...]
    starting: bool = True


@dataclass(slots=True)
class _Want:
    request: Request
    count: int = 0
    since: float = 0.0
    turn: int = 0
    held: int = 0


class Scheduler:
    """See the module."""

    def __init__(self, starts_per_node: int = STARTS_PER_NODE) -> None:
        self.nodes: dict[str, Node] = {}
        self.starts_per_node = starts_per_node
        self._ring: list[Node] = []
        self._at = 0
        self._reserved: dict[str, _Reservation] = {}
        self._wants: dict[str, _Want] = {}
        self._turn = 0

    # ---- nodes --------------------------------------------------------------------------------------------------

    def add_node(self, node: Node) -> None:
        """A node registered. One that comes back under its id is a new one: `remove_node` it first."""
        if node.node_id in self.nodes:
            raise ValueError(f"node `{node.node_id}` is known already")
        self.nodes[node.node_id] = node
        self._ring.append(node)

    def drain_node(self, node_id: str, draining: bool = True) -> None:
        """It takes no further container (or does again)."""
        self.nodes[node_id].state = "draining" if draining else "up"

    def suspect_node(self, node_id: str, suspected: bool = True) -> None:
        """It has not been heard of, and takes no further container (or does again). Harmless for one that is gone."""
        node = self.nodes.get(node_id)
        if node is not None and node.state != "draining":
            node.state = "silent" if suspected else "up"

    def remove_node(self, node_id: str) -> list[str]:
        """It is lost or left: the containers that were on it, whose reservations are gone with it."""
        node = self.nodes.pop(node_id, None)
        if node is None:
            return []
        self._ring.remove(node)
        lost = [container_id for container_id, held in self._reserved.items() if held.node is node]
        for container_id in lost:
            self.release(container_id)
        return lost

    # ---- reservations -------------------------------------------------------------------------------------------

    def place(self, container_id: str, request: Request, function_id: str = "") -> Placement | Refusal:
        """Find a node and reserve there. A container that is placed already keeps its place."""
        held = self._reserved.get(container_id)
        if held is not None:
            return Placement(container_id, held.node.node_id, held.gpus)
        for wish in request.gpu or ("",):
            node = self._choose(request, wish, function_id)
            if node is not None:
                return self._reserve(container_id, function_id, node, request, wish)
        return self.explain(request)

    def restore(self, container_id: str, node_id: str, request: Request, function_id: str, gpus: Sequence[int]) -> bool:
        """Reserve for a container that stands on the node already; whether there is room and these GPUs are free."""
        node = self.nodes[node_id]
        kinds = [kind for kind, free in node.free_gpus.items() if gpus and set(gpus) <= set(free)]
        if container_id in self._reserved or not node.has_room(request) or (gpus and not kinds):
            return False
        self._reserve(container_id, function_id, node, request, "")
        held = self._reserved[container_id]
        if kinds:
            held.gpu_type, held.gpus = kinds[0], tuple(gpus)
            node.free_gpus[kinds[0]] = [gpu for gpu in node.free_gpus[kinds[0]] if gpu not in gpus]
        self.started(container_id)
        return True

    def started(self, container_id: str) -> None:
        """It stands (or failed to): the node may start another."""
        held = self._reserved.get(container_id)
        if held is not None and held.starting:
            held.starting = False
            held.node.starting -= 1

    def release(self, container_id: str) -> None:
        """It is gone. Harmless when repeated."""
        self.started(container_id)
        held = self._reserved.pop(container_id, None)
        if held is None:
            return
        node = held.node
        node.leaving.pop(container_id, None)
        node.containers -= 1
        node.free_millicpu += held.millicpu
        node.free_memory += held.memory_mib
        if held.gpus:
            node.free_gpus[held.gpu_type].extend(sorted(held.gpus, reverse=True))
        want = self._wants.get(held.function_id)
        if want is not None:
            want.held -= 1
            self._forget_if_idle(held.function_id, want)

    def _reserve(self, container_id: str, function_id: str, node: Node, request: Request, wish: str) -> Placement:
        kind = node.gpu_type(wish) if wish else ""
        gpus = tuple(node.free_gpus[kind].pop() for _ in range(parse_gpu(wish)[1])) if kind else ()
        held = _Reservation(node, function_id, _millicpu(request), request.memory_mib, kind, gpus)
        self._reserved[container_id] = held
        node.free_millicpu -= held.millicpu
        node.free_memory -= held.memory_mib
        node.containers += 1
        node.starting += 1
        if function_id:
            self._wants.setdefault(function_id, _Want(request)).held += 1
        return Placement(container_id, node.node_id, gpus)

    def _choose(self, request: Request, wish: str, function_id: str) -> Node | None:
        """The best of the first few nodes with room, going round."""
        best: tuple[float, ...] = ()
        chosen: Node | None = None
        found = 0
        for step in range(len(self._ring)):
            node = self._ring[(self._at + step) % len(self._ring)]
            if node.kept_for not in ("", function_id) or not self._fits(node, request, wish):
                continue
            found += 1
            spare = sum(len(free) for free in node.free_gpus.values())
            rank = (spare, node.load) if wish else (1.0 if node.gpus else 0.0, node.load)
            if chosen is None or rank < best:
                best, chosen = rank, node
            if found == CANDIDATES:
                break
        if self._ring:
            self._at = (self._at + 1) % len(self._ring)
        return chosen

    def _fits(self, node: Node, request: Request, wish: str) -> bool:
        return (
            node.state == "up"
            and node.starting < self.starts_per_node
            and node.has_room(request)
            and (not wish or bool(node.gpu_type(wish)))
        )

    # ---- refusals -----------------------------------------------------------------------------------------------

    def explain(self, request: Request) -> Refusal:
        """Why there is no room for this request right now, or ever."""
        nodes = self._ring
        if not nodes:
            return Refusal("no node is connected", "is the agent running? `squall status` says")
        if not any(node.could_hold(request) for node in nodes):
            return _permanent(request, nodes)
        nodes = [node for node in nodes if node.could_hold(request) and node.state != "draining"]
        if not nodes:
            return Refusal("every node that could hold it is being drained")
        nodes = [node for node in nodes if node.state == "up"]
        if not nodes:
            return Refusal("nothing is heard of any node that could hold it", "`squall status` says since when")
        if request.gpu and not any(node.gpu_type(wish) for node in nodes for wish in request.gpu):
            return Refusal(f"all GPUs of type {_either(request.gpu)} are taken")
        kept = {node.kept_for for node in nodes if self._has_room(node, request)}
        if kept and "" not in kept:
            return Refusal(f"what is free is kept for function `{min(kept)}`, which has waited longer")
        if kept:
            return Refusal(f"{self.starts_per_node} containers are starting on each node that has room")
        cpus = max(node.free_millicpu for node in nodes) / 1000
        memory = max(node.free_memory for node in nodes)
        return Refusal(
            f"all nodes are full: it needs {request.cpu:g} CPUs and {request.memory_mib} MiB, "
            f"of which at most {cpus:g} and {memory} MiB are free on a node",
            "it starts when others end; smaller `cpu` and `memory` requests fit sooner",
        )

    # ---- turns --------------------------------------------------------------------------------------------------

    def want(self, now: float, function_id: str, count: int, request: Request) -> None:
        """The function wants `count` more containers than it has; 0 takes the wish back."""
        want = self._wants.get(function_id)
        if want is None:
            if not count:
                return
            want = self._wants[function_id] = _Want(request)
        if count and not want.count:
            self._turn += 1
            want.turn = self._turn
            want.since = now
        want.request = request
        want.count = count
        if not count:
            self._keep_nothing_for(function_id)
        self._forget_if_idle(function_id, want)

    def plan(
        self, now: float, new_container_ids: Iterable[str], idle: Callable[[], Iterable[str]] = lambda: ()
    ) -> Plan:
        """Give room to the functions that want it, one container at a time, until no id, wish or room is left. The
        reservations of the grants are made. `idle` is asked only when room is short: containers that do nothing and
        that their function need not keep."""
        ids = iter(new_container_ids)
        grants: list[Grant] = []
        refusals: dict[str, Refusal] = {}
        queue = [(want.held, want.turn, function_id) for function_id, want in self._wants.items() if want.count]
        heapify(queue)
        while queue:
            _, _, function_id = heappop(queue)
            want = self._wants[function_id]
            container_id = next(ids, None)
            if container_id is None:
                break
            result = self.place(container_id, want.request, function_id)
            if isinstance(result, Refusal):
                refusals[function_id] = result
                continue
            grants.append(Grant(function_id, result))
            self._keep_nothing_for(function_id)
            self._turn += 1
            want.turn, want.since, want.count = self._turn, now, want.count - 1
            if want.count:
                heappush(queue, (want.held, want.turn, function_id))
        return Plan(tuple(grants), refusals, tuple(self._reclaims(now, refusals, idle)))

    def _reclaims(
        self, now: float, refusals: dict[str, Refusal], idle: Callable[[], Iterable[str]]
    ) -> Iterator[Reclaim]:
        """Containers whose end makes room for one container of each function that was refused for want of room."""
        short = [name for name, refusal in refusals.items() if not refusal.permanent and self._is_short(name)]
        surplus = self._by_node(idle()) if short else {}
        for function_id in short:
            want = self._wants[function_id]
            chosen = self._make_room(function_id, surplus)
            if not chosen and not want.held and now - want.since >= RECLAIM_AFTER:
                several = [name for name, held in self._reserved.items() if self._holds_several(held)]
                chosen = self._make_room(function_id, self._by_node(several))
            for container_id, held in chosen:
                held.node.leaving[container_id] = held
                held.node.kept_for = function_id
                reason = f"function `{function_id}` needs the room: {refusals[function_id].reason}"
                yield Reclaim(container_id, held.function_id, function_id, reason)

    def _is_short(self, function_id: str) -> bool:
        """Whether room is what it lacks, and none is on its way."""
        request = self._wants[function_id].request
        return not any(
            (node.kept_for == function_id and node.leaving) or self._has_room(node, request) for node in self._ring
        )

    def _has_room(self, node: Node, request: Request) -> bool:
        gpu = not request.gpu or any(node.gpu_type(wish) for wish in request.gpu)
        return node.state == "up" and node.has_room(request) and gpu

    def _holds_several(self, held: _Reservation) -> bool:
        want = self._wants.get(held.function_id)
        return want is not None and want.held > 1

    def _by_node(self, container_ids: Iterable[str]) -> dict[Node, list[tuple[str, _Reservation]]]:
        """Reservations that may be taken back, those of the largest holders first."""
        found: dict[Node, list[tuple[str, _Reservation]]] = {}
        for container_id in container_ids:
            held = self._reserved.get(container_id)
            if held is not None and held.function_id in self._wants and container_id not in held.node.leaving:
                found.setdefault(held.node, []).append((container_id, held))
        for victims in found.values():
            victims.sort(key=lambda one: -self._wants[one[1].function_id].held)
        return found

    def _make_room(
        self, function_id: str, victims: dict[Node, list[tuple[str, _Reservation]]]
    ) -> list[tuple[str, _Reservation]]:
        """The fewest victims on one node whose end makes room there, or none."""
        best: list[tuple[str, _Reservation]] = []
        for node, candidates in victims.items():
            if node.state == "up" and node.kept_for in ("", function_id):
                others = [one for one in candidates if one[1].function_id != function_id]
                chosen = _enough(node, self._wants[function_id].request, others)
                if chosen and (not best or len(chosen) < len(best)):
                    best = chosen
        return best

    def _keep_nothing_for(self, function_id: str) -> None:
        for node in self._ring:
            if node.kept_for == function_id:
                node.kept_for = ""

    def _forget_if_idle(self, function_id: str, want: _Want) -> None:
        if not want.count and not want.held:
            del self._wants[function_id]


def parse_gpu(wish: str) -> tuple[str, int]:
    """`H100:2` -> (`H100`, 2). Raises ValueError on anything else."""
    kind, _, number = wish.partition(":")
    if not kind or (number and not (number.isascii() and number.isdigit() and int(number) > 0)):
        raise ValueError(f"`{wish}` does not name a GPU: `TYPE`, `TYPE:N` or `any` does")
    return kind, int(number or 1)


def _gpu_type(free: dict[str, int], wish: str) -> str:
    """The type with enough GPUs that fulfils the wish: the wished one, a variant of it (`A100` is `A100-40GB` too),
    or for `any` the most plentiful."""
    kind, count = parse_gpu(wish)
    kind = kind.upper()
    fitting = [(number, name) for name, number in free.items() if number >= count and _is_kind(name.upper(), kind)]
    return max(fitting, default=(0, ""))[1]


def _is_kind(name: str, kind: str) -> bool:
    return kind == "ANY" or name == kind or name.startswith(f"{kind}-")


def _enough(node: Node, request: Request, victims: list[tuple[str, _Reservation]]) -> list[tuple[str, _Reservation]]:
    """The first of the victims that together with what is free and leaving make room, or none."""
    millicpu, memory = node.free_millicpu, node.free_memory
    gpus = Counter({kind: len(free) for kind, free in node.free_gpus.items()})
    chosen: list[tuple[str, _Reservation]] = []
    for container_id, held in [*((None, held) for held in node.leaving.values()), *victims]:
        lacks_cpu = millicpu < _millicpu(request) or memory < request.memory_mib
        lacks_gpu = bool(request.gpu) and not any(_gpu_type(gpus, wish) for wish in request.gpu)
        if not lacks_cpu and not lacks_gpu:
            break
        if container_id is not None:
            if not lacks_cpu and not held.gpus:
                continue
            chosen.append((container_id, held))
        millicpu += held.millicpu
        memory += held.memory_mib
        gpus[held.gpu_type] += len(held.gpus)
    fits = millicpu >= _millicpu(request) and memory >= request.memory_mib
    has_gpu = not request.gpu or any(_gpu_type(gpus, wish) for wish in request.gpu)
    return chosen if fits and has_gpu else []


def _millicpu(request: Request) -> int:
    return round(request.cpu * 1000)


def _either(words: Iterable[str]) -> str:
    return " or ".join(f"`{word}`" for word in words)


def _permanent(request: Request, nodes: list[Node]) -> Refusal:
    """No node could hold it even if it were empty: the sentence that names the first thing that is missing."""
    if request.gpu and not any(_gpu_type(node.gpus, wish) for node in nodes for wish in request.gpu):
        if not any(node.gpus for node in nodes):
            return Refusal("no node has a GPU", "leave out `gpu=`, or add a node that has one", permanent=True)
        have = ", ".join(sorted({f"`{kind}:{number}`" for node in nodes for kind, number in node.gpus.items()}))
        reason = f"no node has GPUs of type {_either(request.gpu)}; the nodes have {have}"
        return Refusal(reason, "name one of those", permanent=True)
    cpus = max(node.millicpu for node in nodes) / 1000
    if request.cpu > cpus:
        reason = f"it asks for {request.cpu:g} CPUs and the largest node has {cpus:g}"
        return Refusal(reason, f"ask for at most `cpu={cpus:g}`, or add a larger node", permanent=True)
    memory = max(node.memory_mib for node in nodes)
    if request.memory_mib > memory:
        reason = f"it asks for {request.memory_mib} MiB of memory and the largest node has {memory} MiB"
        return Refusal(reason, f"ask for at most `memory={memory}`, or add a larger node", permanent=True)
    return Refusal(
        "no node alone has all of the CPUs, memory and GPUs it asks for",
        "ask for less of one of them, or add a larger node",
        permanent=True,
    )
