"""Containers that outlived a server, of which some speak, and end what they run, before others have spoken."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from squall.protocol.messages import ContainerEvent, ContainerSpec, FunctionSpec, OutputItem
from squall.protocol.resumption import HeldContainer, HeldInput, RunnerBack
from squall.server.calls import CallInfo
from squall.server.dispatch import Dispatch
from squall.server.inputs import Finish
from squall.server.objects import AppRecord, FunctionRecord, options_of
from squall.server.reconciler import Reconciler

CALL = "fc-0000000000000001"


class Bench:
    """A server that has just started, and two containers of the one before: each has an input of one call."""

    def __init__(self) -> None:
        self.dispatch = Dispatch()
        app = AppRecord("ap-1", "app", False, 0.0, None)
        self.function = FunctionRecord("fu-1", app, FunctionSpec("f"), "fu-1")
        self.ended: list[Finish] = []
        self.stopped: list[str] = []
        functions: Any = SimpleNamespace(functions={"fu-1": self.function}, former=lambda _: None)
        calls: Any = SimpleNamespace(finish=self.ended.append, durable=SimpleNamespace(paged=0))
        self.written: list[str] = []
        rest: Any = SimpleNamespace(resumed=id, ended_unheard=lambda row, _: self.written.append(row["container_id"]))
        reconciler: Any = Reconciler(self.dispatch, functions, rest, calls, rest)
        reconciler.scheduler = SimpleNamespace(restore=lambda *_: True, release=id)
        reconciler.notify = reconciler.ask_all = reconciler._ask = lambda *_: None
        reconciler.stop_container = lambda container_id, *_: self.stopped.append(container_id)
        self.reconciler = reconciler
        self.dispatch.add_function(time.monotonic(), "fu-1", options_of(self.function))
        node: Any = SimpleNamespace(node_id="no-1", containers=set(), send=id)
        self.node, self.loop = node, SimpleNamespace(call_later=lambda *_: None)
        held = [HeldContainer(ContainerSpec(f"co-{i}", function_id="fu-1")) for i in range(2)]
        self.reconciler.takeover.node_joined(node, held)

    def submit(self, last: bool = True) -> None:
        info = CallInfo(self.function, "fu-1", 0.0, "", "")
        now, items = time.monotonic(), [(0, b"x"), (1, b"y")]
        self.reconciler.apply(self.dispatch.submit(now, CALL, "fu-1", items, "map", "caller", last, info))

    def speak(self, number: int) -> None:
        record = self.reconciler.containers[f"co-{number}"]
        record.stream = SimpleNamespace(send_raw=id, send=id)
        self.reconciler.takeover.runner_back(record, RunnerBack(True, [HeldInput(CALL, number)]))

    def end(self, number: int, times: int = 1) -> None:
        record = self.reconciler.containers[f"co-{number}"]
        for _ in range(times):
            self.reconciler.runner_outputs(record, [OutputItem(CALL, number, "ok")], [b"result"])

    def results(self) -> list[int]:
        return sorted(one.input.idx for one in self.ended if one.status == "ok")


def on_bench(body: Callable[[Bench], None]) -> Bench:
    async def run() -> Bench:
        bench = Bench()
        body(bench)
        return bench

    return asyncio.run(run())


def test_a_result_that_comes_before_all_have_spoken_is_not_lost() -> None:
    def body(bench: Bench) -> None:
        bench.submit()
        bench.speak(0)
        bench.end(0)
        assert bench.results() == []
        bench.speak(1)
        bench.end(1)

    bench = on_bench(body)
    assert bench.results() == [0, 1]
    assert bench.dispatch.stale_outputs == 0
    assert not any(container.running for container in bench.dispatch.containers.values())


def test_a_result_that_comes_before_its_caller_is_back_is_kept_for_it() -> None:
    def body(bench: Bench) -> None:
        bench.speak(0)
        bench.end(0)
        bench.speak(1)
        bench.submit()
        bench.end(1)

    assert on_bench(body).results() == [0, 1]


def test_a_container_that_sends_more_results_than_it_has_inputs_is_ended() -> None:
    def body(bench: Bench) -> None:
        bench.submit()
        bench.speak(0)
        bench.end(0, times=10)
        bench.speak(1)

    bench = on_bench(body)
    assert "co-0" in bench.stopped
    assert bench.results() == [0]


def test_the_end_of_one_whose_app_is_not_back_is_written_down_and_once() -> None:
    def body(bench: Bench) -> None:
        reconciler = bench.reconciler
        reconciler.loop = bench.loop
        for number in range(2, 4):
            spec = ContainerSpec(f"co-{number:016x}", function_id="fu-not-back")
            reconciler.takeover.node_joined(bench.node, [HeldContainer(spec, True)])
        first, second = reconciler.takeover.parked
        reconciler.takeover._unpark(second)
        for container_id in (first, first, second, second, "co-of-nobody"):
            reconciler.container_event(bench.node, ContainerEvent(container_id, "exited", at=1.0))
        assert bench.written == [first, second]
        assert not reconciler.takeover.parked

    on_bench(body)
