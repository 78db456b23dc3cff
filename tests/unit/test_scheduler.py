"""Where containers go, whose turn it is, and what a refusal says."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from squall.server.scheduler import RECLAIM_AFTER, Node, Placement, Plan, Refusal, Request, Scheduler, parse_gpu
from squall.testing import check_scheduler

ONE_CPU = Request(cpu=1.0, memory_mib=100)


def cluster(*nodes: Node, **more: Any) -> Scheduler:
    scheduler = Scheduler(**more)
    for node in nodes:
        scheduler.add_node(node)
    return scheduler


def gpus(kind: str, count: int, first: int = 0) -> list[tuple[int, str]]:
    return [(index, kind) for index in range(first, first + count)]


def placed(result: Placement | Refusal) -> Placement:
    assert isinstance(result, Placement), result
    return result


def refused(result: Placement | Refusal) -> Refusal:
    assert isinstance(result, Refusal), result
    return result


def plan(scheduler: Scheduler, now: float = 0.0) -> Plan:
    numbers = itertools.count(len(scheduler._reserved))
    return scheduler.plan(now, (f"co-{now:g}-{number}" for number in numbers))


# ---- room -------------------------------------------------------------------------------------------------------


def test_container_goes_to_the_least_loaded_node() -> None:
    scheduler = cluster(Node("no-1", 4, 1000), Node("no-2", 4, 1000))
    nodes = [placed(scheduler.place(f"co-{number}", ONE_CPU)).node_id for number in range(4)]
    assert Counter(nodes) == {"no-1": 2, "no-2": 2}


def test_reservations_fill_a_node_exactly_and_come_back() -> None:
    scheduler = cluster(Node("no-1", 1, 1000))
    tenth = Request(cpu=0.1, memory_mib=100)
    for number in range(10):
        placed(scheduler.place(f"co-{number}", tenth))
    assert not refused(scheduler.place("co-10", tenth)).permanent
    scheduler.release("co-3")
    scheduler.release("co-3")
    assert placed(scheduler.place("co-10", tenth)).node_id == "no-1"
    assert isinstance(scheduler.place("co-11", tenth), Refusal)


def test_placing_a_container_twice_reserves_once() -> None:
    scheduler = cluster(Node("no-1", 1, 1000))
    assert scheduler.place("co-1", ONE_CPU) == scheduler.place("co-1", ONE_CPU)
    assert scheduler.nodes["no-1"].containers == 1


def test_starts_on_a_node_are_bounded_and_say_so() -> None:
    scheduler = cluster(Node("no-1", 64, 64000), starts_per_node=2)
    placed(scheduler.place("co-1", ONE_CPU))
    placed(scheduler.place("co-2", ONE_CPU))
    assert "2 containers are starting" in refused(scheduler.place("co-3", ONE_CPU)).reason
    scheduler.started("co-1")
    placed(scheduler.place("co-3", ONE_CPU))


def test_draining_node_takes_nothing() -> None:
    scheduler = cluster(Node("no-1", 4, 1000))
    scheduler.drain_node("no-1")
    assert "drained" in refused(scheduler.place("co-1", ONE_CPU)).reason
    scheduler.drain_node("no-1", draining=False)
    placed(scheduler.place("co-1", ONE_CPU))


def test_lost_node_names_its_containers_and_frees_nothing_elsewhere() -> None:
    scheduler = cluster(Node("no-1", 1, 1000), Node("no-2", 1, 1000))
    first = placed(scheduler.place("co-1", ONE_CPU))
    placed(scheduler.place("co-2", ONE_CPU))
    assert scheduler.remove_node(first.node_id) == ["co-1"]
    scheduler.release("co-1")
    assert isinstance(scheduler.place("co-3", ONE_CPU), Refusal)


def test_full_cluster_refuses_for_now_and_says_what_is_free() -> None:
    scheduler = cluster(Node("no-1", 2, 1000))
    placed(scheduler.place("co-1", Request(1.5, 300)))
    refusal = refused(scheduler.place("co-2", ONE_CPU))
    assert not refusal.permanent and "at most 0.5 and 700 MiB are free" in refusal.reason


def test_cluster_without_nodes_refuses_for_now() -> None:
    assert refused(cluster().place("co-1", ONE_CPU)) == cluster().explain(ONE_CPU)
    assert not cluster().explain(ONE_CPU).permanent


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request(cpu=8), "asks for 8 CPUs and the largest node has 4"),
        (Request(memory_mib=5000), "5000 MiB of memory and the largest node has 1000 MiB"),
        (Request(gpu=("H100",)), "no node has GPUs of type `H100`; the nodes have `A100-40GB:2`"),
        (Request(gpu=("A100:3",)), "no node has GPUs of type `A100:3`"),
        (Request(gpu=("any:3", "T4")), "`any:3` or `T4`"),
    ],
)
def test_what_no_node_could_ever_hold_is_refused_for_good(request_: Request, words: str) -> None:
    scheduler = cluster(Node("no-1", 4, 1000, gpus("A100-40GB", 2)), Node("no-2", 2, 900))
    refusal = refused(scheduler.place("co-1", request_))
    assert refusal.permanent and words in refusal.reason


def test_cluster_without_gpus_says_so() -> None:
    refusal = refused(cluster(Node("no-1", 4, 1000)).place("co-1", Request(gpu=("H100",))))
    assert refusal.permanent and refusal.reason == "no node has a GPU" and refusal.hint


def test_what_only_two_nodes_together_have_is_refused_for_good() -> None:
    scheduler = cluster(Node("no-1", 8, 100), Node("no-2", 1, 9000))
    assert refused(scheduler.place("co-1", Request(4, 4000))).permanent


# ---- GPUs -------------------------------------------------------------------------------------------------------


def test_gpus_are_given_whole_and_once() -> None:
    scheduler = cluster(Node("no-1", 8, 9000, gpus("H100", 3)))
    assert placed(scheduler.place("co-1", Request(gpu=("H100:2",)))).gpus == (0, 1)
    assert placed(scheduler.place("co-2", Request(gpu=("H100",)))).gpus == (2,)
    assert "are taken" in refused(scheduler.place("co-3", Request(gpu=("H100",)))).reason
    scheduler.release("co-1")
    assert placed(scheduler.place("co-3", Request(gpu=("h100",)))).gpus == (0,)


def test_gpu_fallbacks_are_tried_in_order() -> None:
    scheduler = cluster(Node("no-1", 8, 9000, gpus("T4", 1)), Node("no-2", 8, 9000, gpus("A100-80GB", 2)))
    wishes = Request(gpu=("H100", "A100:2", "any"))
    assert placed(scheduler.place("co-1", wishes)) == Placement("co-1", "no-2", (0, 1))
    assert placed(scheduler.place("co-2", wishes)) == Placement("co-2", "no-1", (0,))


def test_containers_without_gpu_leave_gpu_nodes_free_while_they_can() -> None:
    scheduler = cluster(Node("no-1", 8, 9000, gpus("T4", 1)), Node("no-2", 1, 9000))
    assert [placed(scheduler.place(f"co-{n}", ONE_CPU)).node_id for n in range(2)] == ["no-2", "no-1"]


def test_small_gpu_requests_leave_large_nodes_whole() -> None:
    scheduler = cluster(Node("no-1", 8, 9000, gpus("H100", 8)), Node("no-2", 8, 9000, gpus("H100", 2)))
    assert placed(scheduler.place("co-1", Request(gpu=("H100",)))).node_id == "no-2"


@pytest.mark.parametrize("wish", ["", ":2", "H100:", "H100:0", "H100:-1", "H100:two"])
def test_what_does_not_name_a_gpu_is_refused(wish: str) -> None:
    if wish == "H100:":
        assert parse_gpu(wish) == ("H100", 1)
        return
    with pytest.raises(ValueError, match="does not name a GPU"):
        parse_gpu(wish)


# ---- turns ------------------------------------------------------------------------------------------------------


def test_large_wish_does_not_keep_another_function_waiting() -> None:
    scheduler = cluster(Node("no-1", 4, 9000))
    scheduler.want(0.0, "fu-1", 10_000, ONE_CPU)
    scheduler.want(0.0, "fu-2", 1, ONE_CPU)
    grants = Counter(grant.function_id for grant in plan(scheduler).grants)
    assert grants == {"fu-1": 3, "fu-2": 1}


def test_room_that_comes_free_goes_to_whoever_holds_least() -> None:
    scheduler = cluster(Node("no-1", 4, 9000))
    scheduler.want(0.0, "fu-1", 10_000, ONE_CPU)
    held = [grant.placement.container_id for grant in plan(scheduler).grants]
    scheduler.want(1.0, "fu-2", 2, ONE_CPU)
    scheduler.release(held[0])
    assert [grant.function_id for grant in plan(scheduler, 1.0).grants] == ["fu-2"]


def test_function_without_a_container_gets_one_back_from_the_largest_holder() -> None:
    scheduler = cluster(Node("no-1", 4, 9000))
    scheduler.want(0.0, "fu-1", 10_000, ONE_CPU)
    plan(scheduler)
    scheduler.want(1.0, "fu-2", 1, ONE_CPU)
    assert plan(scheduler, 1.0).reclaims == ()
    (reclaim,) = plan(scheduler, 1.0 + RECLAIM_AFTER).reclaims
    assert (reclaim.function_id, reclaim.for_function_id) == ("fu-1", "fu-2") and "all nodes are full" in reclaim.reason
    assert plan(scheduler, 20.0 + RECLAIM_AFTER).reclaims == ()
    scheduler.release(reclaim.container_id)
    assert [grant.function_id for grant in plan(scheduler, 30.0).grants] == ["fu-2"]


def test_idle_containers_of_others_make_room_at_once() -> None:
    scheduler = cluster(Node("no-1", 4, 9000))
    scheduler.want(0.0, "fu-1", 4, ONE_CPU)
    idle = [grant.placement.container_id for grant in plan(scheduler).grants][1:3]
    scheduler.want(1.0, "fu-2", 3, ONE_CPU)
    (reclaim,) = scheduler.plan(1.0, ["co-new"], lambda: idle).reclaims
    assert reclaim.container_id in idle
    scheduler.release(reclaim.container_id)
    assert [grant.function_id for grant in scheduler.plan(1.1, ["co-new"], lambda: idle).grants] == ["fu-2"]


def test_room_is_kept_for_a_large_request_until_all_of_it_is_free() -> None:
    scheduler = cluster(Node("no-1", 4, 9000))
    scheduler.want(0.0, "fu-1", 10_000, ONE_CPU)
    plan(scheduler)
    scheduler.want(0.0, "fu-2", 1, Request(cpu=3.0))
    reclaims = plan(scheduler, RECLAIM_AFTER).reclaims
    assert [reclaim.function_id for reclaim in reclaims] == ["fu-1"] * 3
    for number, reclaim in enumerate(reclaims):
        assert plan(scheduler, 10.0 + number).grants == ()
        scheduler.release(reclaim.container_id)
    assert [grant.function_id for grant in plan(scheduler, 20.0).grants] == ["fu-2"]


def test_gpu_is_taken_back_from_who_has_one() -> None:
    scheduler = cluster(Node("no-1", 64, 9000, gpus("T4", 2)))
    scheduler.want(0.0, "fu-1", 2, Request(gpu=("T4",)))
    plan(scheduler)
    scheduler.want(0.0, "fu-2", 5, ONE_CPU)
    plan(scheduler)
    scheduler.want(0.0, "fu-3", 1, Request(gpu=("T4",)))
    (reclaim,) = plan(scheduler, RECLAIM_AFTER).reclaims
    assert reclaim.function_id == "fu-1"


def test_wish_that_is_taken_back_is_forgotten() -> None:
    scheduler = cluster(Node("no-1", 4, 9000))
    scheduler.want(0.0, "fu-1", 3, ONE_CPU)
    scheduler.want(0.0, "fu-1", 0, ONE_CPU)
    assert plan(scheduler).grants == () and scheduler._wants == {}


def test_refusals_of_a_plan_carry_the_reason() -> None:
    scheduler = cluster(Node("no-1", 4, 9000))
    scheduler.want(0.0, "fu-1", 1, Request(gpu=("H100",)))
    assert plan(scheduler).refusals["fu-1"].reason == "no node has a GPU"


# ---- always -----------------------------------------------------------------------------------------------------

REQUESTS = st.builds(
    Request,
    cpu=st.sampled_from((0.1, 0.125, 1.0, 3.0)),
    memory_mib=st.sampled_from((1, 128, 700)),
    gpu=st.sampled_from(((), ("T4",), ("H100:2", "any"))),
)
NODES = st.sampled_from(("no-1", "no-2", "no-3"))


class SchedulerMachine(RuleBasedStateMachine):
    """Nodes and containers come and go in any order; nothing is ever given twice."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(starts_per_node=3)
        self.placements: dict[str, tuple[Placement, Request]] = {}
        self.made = 0

    @rule(node=NODES, cpus=st.sampled_from((1.0, 4.0)), count=st.integers(0, 3))
    def add(self, node: str, cpus: float, count: int) -> None:
        if node not in self.scheduler.nodes:
            kinds = gpus("T4", 1) + gpus("H100", count, 1)
            self.scheduler.add_node(Node(node, cpus, 1000, kinds if count else ()))

    @rule(node=NODES)
    def lose(self, node: str) -> None:
        for container_id in self.scheduler.remove_node(node):
            placement, _ = self.placements.pop(container_id)
            assert placement.node_id == node

    @rule(request=REQUESTS, count=st.integers(0, 4), function=st.sampled_from(("fu-1", "fu-2")))
    def wish(self, request: Request, count: int, function: str) -> None:
        self.scheduler.want(0.0, function, count, request)

    @rule(now=st.floats(0, 100))
    def place(self, now: float) -> None:
        ids = [f"co-{self.made + number}" for number in range(3)]
        self.made += 3
        requests = {name: want.request for name, want in self.scheduler._wants.items()}
        for grant in self.scheduler.plan(now, ids).grants:
            self.placements[grant.placement.container_id] = grant.placement, requests[grant.function_id]

    @rule(data=st.data(), whole=st.booleans())
    def end(self, data: st.DataObject, whole: bool) -> None:
        if self.placements:
            container_id = data.draw(st.sampled_from(sorted(self.placements)))
            self.scheduler.started(container_id)
            if whole:
                self.scheduler.release(container_id)
                del self.placements[container_id]

    @invariant()
    def books_balance(self) -> None:
        check_scheduler(self.scheduler)
        for node in self.scheduler.nodes.values():
            here = [pair for pair in self.placements.values() if pair[0].node_id == node.node_id]
            given = [index for placement, _ in here for index in placement.gpus]
            free = [index for indexes in node.free_gpus.values() for index in indexes]
            assert sorted(given + free) == list(range(sum(node.gpus.values())))
            assert node.containers == len(here)
            assert node.free_millicpu == node.millicpu - sum(round(request.cpu * 1000) for _, request in here)
            assert node.free_memory == node.memory_mib - sum(request.memory_mib for _, request in here)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
