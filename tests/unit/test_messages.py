"""The wire: every message survives its encoding, on both decoders, and garbage is refused by both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from squall.protocol import messages as wire
from squall.server.wire import decode as server_decode

SAMPLES: dict[type, Any] = {
    str: "fc-0123456789abcdef",
    int: 3,
    float: 1.5,
    bool: True,
}


def sample(cls: type[wire.Message]) -> wire.Message:
    """An instance with every required field filled by its annotated type."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING:
            continue
        name = str(field.type)
        nested = cls.NESTED.get(field.name)
        if nested is not None:
            one = nested(**{f.name: SAMPLES.get({"str": str, "int": int}.get(str(f.type), str), "x")
                            for f in dataclasses.fields(nested) if f.default is dataclasses.MISSING
                            and f.default_factory is dataclasses.MISSING})  # fmt: skip
            values[field.name] = [one] if name.startswith("list") else one
        else:
            values[field.name] = {"str": "x", "int": 3, "float": 1.5, "list[str]": ["a"]}[name]
    return cls(**values)


@pytest.mark.parametrize("tag", sorted(wire.MESSAGES))
def test_every_message_survives_both_decoders(tag: str) -> None:
    message = sample(wire.MESSAGES[tag])
    header = wire.encode_header(message)
    assert wire.decode(header) == message
    assert server_decode(header) == message


def test_a_frame_is_two_lengths_a_header_and_the_payload() -> None:
    frame = wire.encode(wire.Ping(id=7), b"payload")
    header_len, payload_len = int.from_bytes(frame[:4], "little"), int.from_bytes(frame[4:8], "little")
    assert payload_len == 7
    assert wire.decode(frame[8 : 8 + header_len]) == wire.Ping(id=7)
    assert frame[8 + header_len :] == b"payload"


def test_unknown_fields_are_ignored() -> None:
    header = b'{"t":"ping","id":4,"invented_later":[1,2]}'
    assert wire.decode(header) == wire.Ping(id=4)
    assert server_decode(header) == wire.Ping(id=4)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"{",
        b'{"t":"nonsense"}',
        b'{"id":3}',
        b'{"t":"stop_app"}',
        b"\xff\xfe",
        b'{"t":7}',
        b"null",
        b"5",
        b'{"t":"run","items":[5]}',
        b'{"t":"run","items":["call_id"]}',
        b'{"t":"run","items":["x"]}',
        b'{"t":"ping"} {}',
    ],
)
def test_garbage_is_refused_by_both_decoders(header: bytes) -> None:
    with pytest.raises(ValueError):
        wire.decode(header)
    with pytest.raises(ValueError):
        server_decode(header)


def test_the_server_refuses_wrong_types() -> None:
    with pytest.raises(ValueError, match="cpu"):
        server_decode(b'{"t":"create_app","name":"a","functions":[{"tag":"f","cpu":"lots"}]}')


def test_a_payload_must_be_as_long_as_its_items_say() -> None:
    items = [wire.InputItem(0, 2), wire.InputItem(1, 3)]
    assert wire.split_payload(items, b"aabbb") == [b"aa", b"bbb"]
    with pytest.raises(ValueError, match="announce 5"):
        wire.split_payload(items, b"aabb")


def test_input_ids_name_their_call_and_index() -> None:
    assert wire.input_id("fc-abc", 12) == "in-abc-12"


@pytest.mark.parametrize("kind", ["hello", "bind_function"])
def test_what_is_nested_too_deep_is_no_message(kind: str) -> None:
    for field in ("options", "unknown"):
        text = f'{{"t":"{kind}","role":"client","function_id":"fu-1","{field}":{{"a":' + "[" * 30_000
        with pytest.raises(ValueError, match=kind):
            server_decode(text.encode())


def test_a_class_made_of_a_message_does_not_take_its_place() -> None:
    class Special(wire.Submit):
        """Without a tag of its own."""

    assert Special.TAG == "submit"
    assert wire.MESSAGES["submit"] is wire.Submit


def test_a_record_is_made_as_a_dataclass_is() -> None:
    assert wire.Hello("client", 3) == wire.Hello(role="client", version=3)
    assert wire.RetryPolicy(2).max_delay == 60.0
    first, second = wire.FunctionSpec("f"), wire.FunctionSpec("f")
    first.env["A"] = "1"
    assert second.env == {} and dataclasses.replace(first, tag="g").env == {"A": "1"}


HELLO: Any = wire.Hello
POLICY: Any = wire.RetryPolicy


@pytest.mark.parametrize(
    "make",
    [
        lambda: HELLO(),
        lambda: HELLO("client", role="agent"),
        lambda: HELLO("client", colour="red"),
        lambda: POLICY(1, 2.0, 3.0, 4.0, 5.0),
        lambda: HELLO("client", 1, "", "", "", "", "", "", "", 0.0, 0, 7),  # `id` has no place
    ],
)
def test_a_record_takes_no_fields_it_has_not_got(make: Callable[[], object]) -> None:
    with pytest.raises(TypeError):
        make()
