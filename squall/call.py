"""FunctionCall: the handle of what `spawn` and `spawn_map` started.

Asks the server for results, which are kept there; knows nothing of functions. Each verb is one coroutine with two
faces (`_blocking`). Must never keep a result itself. Tested in `tests/unit/test_function.py`,
`tests/integration/test_spawn.py` and `tests/integration/test_graph.py`.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from squall._blocking import both, both_generator
from squall._object import Handle, checked_id
from squall.client import Client
from squall.exception import InvalidError, OutputTimeoutError
from squall.protocol.messages import CancelCall, GetCall, GetOutput, OutputItem, build
from squall.protocol.transport import Pending

if TYPE_CHECKING:
    from squall.logs import Logs

R = TypeVar("R")

ANSWER_GRACE_S = 10.0
"""How much longer than the server was told to wait its answer may take."""
ITER_WINDOW = 64
"""Results that are asked for ahead."""


@dataclass(frozen=True)
class InputInfo:
    """One input in a call graph: which it is, what it calls, how far it is, where it ran, and what it has called.

    `status` is `pending`, `running`, or how it ended: `ok`, `error`, `timeout`, `cancelled`, `lost`, `init_error`.
    """

    input_id: str
    function_call_id: str
    function_name: str
    status: str
    task_id: str = ""
    children: list[InputInfo] = field(default_factory=list)


@dataclass(frozen=True)
class FunctionStats:
    """How busy a function is at this moment: inputs that wait (`backlog`), containers (`num_total_runners`), inputs
    that run (`num_running_inputs`), and how many more the ready containers could take (`input_headroom`)."""

    backlog: int = 0
    num_total_runners: int = 0
    num_running_inputs: int = 0
    input_headroom: int = 0


class FunctionCall(Handle, Generic[R]):
    """A call made by `spawn` or `spawn_map`: its results are kept 7 days and can be had from any process.

    Example:

        @app.function()
        def train(epochs): return f"trained for {epochs}"

        @app.local_entrypoint()
        def main():
            call_id = train.spawn(3).object_id
            print(squall.FunctionCall.from_id(call_id).get(timeout=60))
    """

    _prefix = "fc-"

    def __init__(
        self, call_id: str, tag: str = "", source_map: dict[str, str] | None = None, count: int | None = None
    ) -> None:
        self._object_id = call_id
        self._tag = tag
        self._source_map = source_map or {}
        self._count = count

    @classmethod
    def from_id(cls, call_id: str) -> FunctionCall[Any]:
        """The handle of a call made by any program of this home. Does no I/O; an unknown id shows at `get`."""
        return FunctionCall(checked_id(call_id, "fc-", "function call"))

    def __reduce__(self) -> tuple[Any, ...]:
        return FunctionCall, (self._object_id, self._tag, None, self._count)

    @property
    def _name(self) -> str:
        return self._tag or self._object_id

    @both
    async def get(self, timeout: float | None = None, *, index: int = 0) -> R:
        """The result of input `index`; raises what the function raised. May be repeated.

        - `timeout`: seconds to wait; None waits for ever, 0 only looks. The call itself goes on when they have passed.
        - `index`: which input of a `spawn_map`, from 0.

        Raises OutputTimeoutError when the result is not there in time, OutputExpiredError after 7 days,
        NotFoundError for a call or index that never was, and what `Function.remote` raises.
        """
        client = Client.current()
        pending = _ask_output(client, self._object_id, index, timeout)
        output, data = await self._answer(pending, timeout)
        return await client.value_of(output, data, self._name, self._source_map)  # type: ignore[no-any-return]

    async def _answer(self, pending: Pending[Any], timeout: float | None) -> tuple[OutputItem, bytes]:
        try:
            reply, data = await pending.within(None if timeout is None else timeout + ANSWER_GRACE_S)
        except OutputTimeoutError:
            reply, data = None, b""
        if reply is None or not reply.data.get("ready"):
            waits = reply.data.get("waits") if reply is not None else ""
            why = f", as no container of its function starts: {waits}" if waits else ""
            raise OutputTimeoutError(f"call `{self._name}` has no result after {timeout or 0:g} s{why}")
        return build(OutputItem, reply.data["item"]), data

    @both
    async def gather(cls: Any, *calls: FunctionCall[Any]) -> list[Any]:
        """The results of several calls in their order; the first failure is raised as soon as it is known.

        Example:

            @app.function()
            def square(x): return x * x

            @app.local_entrypoint()
            def main():
                print(squall.FunctionCall.gather(*[square.spawn(x) for x in range(3)]))
        """
        return await _gather(calls)

    @both
    async def cancel(self, terminate_containers: bool = False) -> None:
        """Cancel the inputs that have not ended; running code sees `InputCancellation`. Harmless when all have.

        A container that has not ended its input 10 s later is killed; `terminate_containers=True` kills at once.
        Afterwards `get` raises CancelledError.
        """
        await Client.current().request(CancelCall(self._object_id, [], terminate_containers))

    @both
    async def hydrate(self) -> FunctionCall[R]:
        """Make sure now that the server knows the call, instead of at `get`; returns the handle itself.

        Raises NotFoundError for a call that was never spawned, or so long ago that it was forgotten.
        """
        await self.num_inputs.aio()
        return self

    @property
    def logs(self) -> Logs:
        """What was written while the call's inputs ran, in the containers in which they did.

        Output is told apart by its time: where a container runs several inputs at a time, what the others write
        meanwhile is here too; and of an input that was tried again, only the last attempt is.
        """
        from squall.logs import Logs
        from squall.protocol.requests import ReadLogs

        async def target() -> tuple[Client, ReadLogs]:
            return Client.current(), ReadLogs(call=self._object_id)

        return Logs(target)

    @both_generator
    async def iter(self, start: int = 0, end: int | None = None) -> AsyncGenerator[R, None]:
        """The results of a `spawn_map` in the order of its inputs, each as soon as it and those before it are there.

        - `start`, `end`: from which input on, and up to which one, that one not included; all by default.

        Raises what an input raised when its turn comes; go on behind it with `start=`.

        Example:

            @app.function()
            def square(x): return x * x

            @app.local_entrypoint()
            def main():
                call = square.spawn_map(range(10))
                print(list(call.iter(2, 5)))
        """
        if start < 0 or (end is not None and end < start):
            raise InvalidError(f"`iter({start}, {end})` is no range of inputs", hint="inputs are counted from 0")
        count = await self.num_inputs.aio()
        client, stop = Client.current(), count if end is None else min(end, count)
        asked: deque[Pending[Any]] = deque()
        for index in range(start, stop):
            while len(asked) < ITER_WINDOW and index + len(asked) < stop:
                asked.append(_ask_output(client, self._object_id, index + len(asked), None))
            output, data = await self._answer(asked.popleft(), None)
            yield await client.value_of(output, data, self._name, self._source_map)

    @both
    async def get_call_graph(self) -> list[InputInfo]:
        """The inputs of the call, and below each what it has called in turn, as far as that is known.

        Calls that were spawned are known for as long as their results; of `.remote` and `.map` in containers only
        those that run and the newest that have ended are. At most 2,000 inputs are told.

        Example:

            @app.function()
            def inner(x): return x + 1

            @app.function()
            def outer(x): return inner.remote(x)

            @app.local_entrypoint()
            def main():
                call = outer.spawn(1)
                call.get(timeout=30)
                for node in call.get_call_graph():
                    print(node.function_name, node.status, [child.function_name for child in node.children])
        """
        from squall.protocol.requests import GetCallGraph

        reply, _ = await Client.current().request(GetCallGraph(self._object_id))
        return _tree(reply.data["inputs"])

    @both
    async def num_inputs(self) -> int:
        """How many inputs the call has: 1 for `spawn`, one per item for `spawn_map`."""
        if self._count is None:
            reply, _ = await Client.current().request(GetCall(self._object_id))
            self._count = int(reply.data.get("num_inputs", 1))
        return self._count


async def _gather(calls: Iterable[FunctionCall[Any]]) -> list[Any]:
    client = Client.current()
    wanted = list(calls)
    for call in wanted:
        if not isinstance(call, FunctionCall):
            raise InvalidError(f"`FunctionCall.gather` got a `{type(call).__name__}`", hint="pass what `.spawn()` gave")
    done: deque[int] = deque()
    progress: list[Pending[None]] = [Pending(client.link)]
    pendings = [_ask_output(client, call.object_id, 0, None) for call in wanted]

    def arrived(index: int) -> None:
        done.append(index)
        progress[0].set(None)

    for i, pending in enumerate(pendings):
        pending.add_callback(functools.partial(arrived, i))
    results: dict[int, Any] = {}
    while len(results) < len(wanted):
        while done:
            index = done.popleft()
            call = wanted[index]
            output, data = await call._answer(pendings[index], None)
            results[index] = await client.value_of(output, data, call._name, call._source_map)
        if len(results) < len(wanted):
            progress[0] = Pending(client.link)
            if not done:
                await progress[0]
    return [results[i] for i in range(len(wanted))]


def _ask_output(client: Client, call_id: str, index: int, timeout: float | None) -> Pending[Any]:
    if isinstance(index, bool) or not isinstance(index, int) or index < 0:
        raise InvalidError(f"`index` is {index!r}", hint="inputs are counted from 0")
    return client.link.request(GetOutput(call_id, index, -1.0 if timeout is None else max(0.0, float(timeout))))


def _tree(rows: list[dict[str, Any]]) -> list[InputInfo]:
    """Rows that come parents first, as trees."""
    found: dict[str, InputInfo] = {}
    roots: list[InputInfo] = []
    for row in rows:
        node = InputInfo(row["input_id"], row["call_id"], row["function"], row["status"], row["container_id"])
        parent = found.get(row["parent"])
        (roots if parent is None else parent.children).append(node)
        found[node.input_id] = node
    return roots
