"""What the forwarder takes for a question and for its answer."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from squall.node.dns import HostResolvers, failure, is_answer_to, parse_resolv_conf, question_of

QUESTION = b"\4pypi\3org\0\0\1\0\1"
QUERY = struct.pack("!HHHHHH", 7, 0x0100, 1, 0, 0, 0) + QUESTION


def answer(query_id: int = 7, flags: int = 0x8180, questions: int = 1, question: bytes = QUESTION) -> bytes:
    return struct.pack("!HHHHHH", query_id, flags, questions, 0, 0, 0) + question


def test_question_of_a_query_is_its_name_type_and_class() -> None:
    assert question_of(QUERY) == QUESTION
    assert question_of(QUERY + b"\0\0\x29\4\xd0\0\0\0\0\0\0") == QUESTION, "options may follow"


@pytest.mark.parametrize(
    "message",
    [
        b"",
        QUERY[:11],
        QUERY[:-1],
        answer(),  # a response
        struct.pack("!HHHHHH", 7, 0x2800, 1, 0, 0, 0) + QUESTION,  # an update
        struct.pack("!HHHHHH", 7, 0x0100, 2, 0, 0, 0) + QUESTION * 2,
        struct.pack("!HHHHHH", 7, 0x0100, 1, 0, 0, 0) + b"\xc0\x0c\0\1\0\1",  # a pointer to itself
        struct.pack("!HHHHHH", 7, 0x0100, 1, 0, 0, 0) + b"\x3f" + b"a" * 63 * 6,
    ],
)
def test_message_that_is_no_single_question_is_none(message: bytes) -> None:
    assert question_of(message) is None


@given(st.binary(max_size=600))
def test_noise_raises_nothing(noise: bytes) -> None:
    question_of(noise)
    is_answer_to(noise, 7, QUESTION)


def test_answer_has_the_id_the_question_and_says_it_is_one() -> None:
    assert is_answer_to(answer(), 7, QUESTION)
    assert is_answer_to(answer(question=QUESTION.replace(b"pypi", b"PyPI")), 7, QUESTION)
    assert not is_answer_to(answer(query_id=8), 7, QUESTION)
    assert not is_answer_to(answer(question=QUESTION.replace(b"pypi", b"evil")), 7, QUESTION)
    assert not is_answer_to(QUERY, 7, QUESTION)


def test_answer_without_a_question_is_one_only_when_it_is_an_error() -> None:
    assert is_answer_to(answer(flags=0x8185, questions=0, question=b""), 7, QUESTION)
    assert not is_answer_to(answer(questions=0, question=b""), 7, QUESTION)


def test_failure_is_a_well_formed_answer_to_the_query() -> None:
    made = failure(QUERY, QUESTION)
    assert is_answer_to(made, 7, QUESTION)
    assert struct.unpack_from("!H", made, 2)[0] & 0xF == 2


def test_resolv_conf_gives_three_resolvers_at_most_and_the_lines_about_names() -> None:
    lines = ["# x", "nameserver 10.0.0.1", "search a b", "nameserver 127.0.0.53", "options x"]
    servers, options = parse_resolv_conf("\n".join([*lines, "nameserver ::1", "nameserver 9.9.9.9"]))
    assert servers == [("10.0.0.1", 53), ("127.0.0.53", 53), ("::1", 53)]
    assert options == ["search a b", "options x"]


def test_without_a_resolver_the_local_one_is_meant(tmp_path: Path) -> None:
    assert parse_resolv_conf("search a\n")[0] == [("127.0.0.1", 53)]
    assert HostResolvers(tmp_path / "missing").servers() == [("127.0.0.1", 53)]
