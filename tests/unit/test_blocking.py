"""One body, two faces: coroutines of the SDK driven without an event loop."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
import types
import warnings
from collections.abc import AsyncGenerator, Iterator

import pytest

from squall._blocking import both, both_generator, run
from squall.exception import OutputTimeoutError
from squall.protocol.messages import Message
from squall.protocol.transport import Link, Pending


class Noun:
    def __init__(self, link: Link) -> None:
        self.link = link

    @both
    async def later(self, value: int) -> int:
        """Give the value back, set by another thread."""
        pending: Pending[int] = Pending(self.link)
        threading.Thread(target=lambda: pending.set(value)).start()
        return await pending

    @both
    async def fail(self) -> None:
        raise LookupError("no")

    @both
    async def never(self) -> None:
        await Pending[None](self.link).within(0.01)

    @both_generator
    async def values(self, n: int, ended: list[str]) -> AsyncGenerator[int, None]:
        try:
            for i in range(n):
                yield await self.later.aio(i)
        finally:
            ended.append("ended")

    @both
    async def named(cls) -> str:
        return cls.__name__ if isinstance(cls, type) else "instance"


@pytest.fixture
def noun() -> Iterator[Noun]:
    here, there = socket.socketpair()

    def ignore(message: Message, payload: bytes) -> None: ...

    link = Link(here, ignore)
    yield Noun(link)
    link.close()
    there.close()


def test_blocking_face_returns_the_value_without_an_event_loop(noun: Noun) -> None:
    assert noun.later(3) == 3


def test_async_face_returns_the_value_in_the_callers_loop(noun: Noun) -> None:
    async def many() -> list[int]:
        return await asyncio.gather(*[noun.later.aio(i) for i in range(20)])

    assert asyncio.run(many()) == list(range(20))


def test_both_faces_raise_what_the_body_raises(noun: Noun) -> None:
    with pytest.raises(LookupError, match="no"):
        noun.fail()
    with pytest.raises(LookupError, match="no"):
        asyncio.run(noun.fail.aio())


def test_deadline_holds_on_both_faces(noun: Noun) -> None:
    with pytest.raises(OutputTimeoutError):
        noun.never()
    with pytest.raises(OutputTimeoutError):
        asyncio.run(noun.never.aio())


def test_generator_has_both_faces(noun: Noun) -> None:
    async def collect() -> list[int]:
        return [value async for value in noun.values.aio(3, [])]

    assert list(noun.values(3, [])) == asyncio.run(collect()) == [0, 1, 2]


def test_generator_left_early_runs_its_clean_up(noun: Noun) -> None:
    ended: list[str] = []
    for _ in noun.values(3, ended):
        break
    assert ended == ["ended"]


def test_method_called_on_the_class_gets_the_class(noun: Noun) -> None:
    assert Noun.named() == "Noun"
    assert noun.named() == "instance"


def test_blocking_face_in_a_running_loop_names_the_other(noun: Noun) -> None:
    async def call() -> int:
        return noun.later(1)

    with pytest.warns(RuntimeWarning, match=r"use `await later\.aio\(\.\.\.\)`"):
        asyncio.run(call())


def test_blocking_face_in_a_notebook_is_normal(noun: Noun, monkeypatch: pytest.MonkeyPatch) -> None:
    shell = types.SimpleNamespace(get_ipython=lambda: object())
    monkeypatch.setitem(sys.modules, "IPython", shell)

    async def call() -> int:
        return noun.later(1)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert asyncio.run(call()) == 1


def test_async_face_in_a_running_loop_does_not_warn(noun: Noun) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert asyncio.run(noun.later.aio(1)) == 1


def test_both_faces_keep_name_and_docstring() -> None:
    assert Noun.__dict__["later"].__doc__ == "Give the value back, set by another thread."
    assert Noun.__dict__["later"].__name__ == "later"


def test_run_hands_an_interruption_to_the_body(noun: Noun) -> None:
    seen = []

    class Interrupting:
        def wait(self) -> None:
            raise KeyboardInterrupt

        def __await__(self) -> Iterator[Interrupting]:
            yield self

    async def body() -> None:
        try:
            await Interrupting()  # type: ignore[misc]
        except KeyboardInterrupt:
            seen.append("told")
            raise

    with pytest.raises(KeyboardInterrupt):
        run(body())
    assert seen == ["told"]
