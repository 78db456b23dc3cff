"""Classes of every kind, for the tests of classes; imported here and in containers."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import squall

app = squall.App("classy")


class Base:
    size: int = squall.parameter(default=3)

    @squall.enter()
    def begin(self) -> None:
        self.order = ["base"]
        self.entered = 0

    @squall.method()
    def inherited(self) -> tuple[int, list[str]]:
        return self.size, self.order

    @squall.exit()
    def end(self) -> None:
        print("left base", flush=True)


@app.cls(scaledown_window=2)
class Model(Base):
    name: str = squall.parameter()
    key: bytes = squall.parameter(default=b"\x00\xff")

    @squall.enter()
    async def load(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.order.append("load")
        self.entered += 1
        self.doubled = square.remote(self.size)

    @squall.method()
    def where(self) -> tuple[str, str, int]:
        return self.name, os.environ["SQUALL_TASK_ID"], self.entered

    @squall.method()
    def values(self, n: int) -> Iterator[tuple[str, int]]:
        for i in range(n):
            yield self.name, i

    @squall.method()
    async def values_async(self, n: int) -> AsyncIterator[int]:
        for i in range(n):
            await asyncio.sleep(0)
            yield i

    @squall.method()
    async def is_same_loop(self) -> bool:
        return asyncio.get_running_loop() is self.loop

    @squall.method()
    def double(self, x: int) -> int:
        return 2 * x

    @squall.method()
    def nested(self, n: int) -> tuple[Any, ...]:
        other: Any = Model(name="other")  # type: ignore[call-arg]
        return self.doubled, self.double(n), list(self.double.map(range(n))), other.where.remote()[0]

    @squall.method()
    def fail(self) -> None:
        raise KeyError(self.name)

    @squall.method()
    def given(self) -> tuple[bytes, str]:
        return self.key, os.environ.get("EXTRA", "")

    @squall.exit()
    async def stop(self) -> None:
        await asyncio.sleep(0)
        print(f"left {self.name}", flush=True)


@app.cls(block_network=True)
class Fenced:
    @squall.method()
    def lift(self) -> None:
        fenced: Any = Fenced
        fenced.with_options(block_network=False)().lift.remote()


@app.cls(startup_timeout=20)
class Broken:
    @squall.enter()
    def load(self) -> None:
        raise OSError("no such weights")

    @squall.method()
    def predict(self) -> None: ...


@app.cls(startup_timeout=1)
class Slow:
    @squall.enter()
    def load(self) -> None:
        time.sleep(60)

    @squall.method()
    def predict(self) -> None: ...


@app.cls(timeout=1)
class Hanging:
    @squall.method()
    def hang(self) -> None:
        time.sleep(60)

    @squall.exit()
    def stop(self) -> None:
        print("left hanging", flush=True)


@app.function()
def square(x: int) -> int:
    return x * x


@app.function()
def use(model: Any, method: Any, cls: Any) -> tuple[Any, ...]:
    return model.name, model.where.remote()[1], method.remote(4), cls(name="new").where.remote()[0]


stopping = squall.App("stopping")


@stopping.cls()
class Careful:
    @squall.enter()
    def begin(self) -> None:
        self.left: list[str] = []

    @squall.method()
    def work(self, seconds: float) -> None:
        print("working", flush=True)
        try:
            time.sleep(seconds)
        finally:
            print("interrupted", flush=True)

    @squall.exit()
    def fail_first(self) -> None:
        raise ValueError("an exit hook that fails")

    @squall.exit()
    def stop(self) -> None:
        deadline = time.monotonic() + 1.5  # longer than a stopped app's containers have without exit hooks
        while time.monotonic() < deadline:
            time.sleep(0.1)
        print("left careful", flush=True)
