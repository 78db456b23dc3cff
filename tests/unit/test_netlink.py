"""Encoding of netlink requests and answers, against bytes written down from the kernel's headers."""

from __future__ import annotations

import errno
import struct
from ipaddress import IPv4Address, IPv4Network

from hypothesis import given
from hypothesis import strategies as st

from squall.node import netlink
from squall.node.netlink import End, NetlinkError, attribute, attributes


def test_attribute_is_padded_to_four_bytes_and_its_length_is_not() -> None:
    assert attribute(3, "lo") == struct.pack("=HH", 7, 3) + b"lo\0" + b"\0"
    assert attribute(4, 1500) == struct.pack("=HHI", 8, 4, 1500)


def test_nested_attribute_holds_its_members_one_after_the_other() -> None:
    assert attribute(18, attribute(1, b"ab"), attribute(2, 7))[4:] == attribute(1, b"ab") + attribute(2, 7)


@given(st.lists(st.tuples(st.integers(0, 0x3FFF), st.binary(max_size=40)), max_size=8))
def test_attributes_read_back_are_those_written(members: list[tuple[int, bytes]]) -> None:
    written = b"".join(attribute(kind, data) for kind, data in members)
    assert attributes(written) == dict(members)


@given(st.binary(max_size=200))
def test_reading_attributes_of_noise_ends_and_raises_nothing(noise: bytes) -> None:
    attributes(noise)


@given(st.binary(max_size=200))
def test_reading_messages_of_noise_ends_and_raises_nothing(noise: bytes) -> None:
    list(netlink._messages(noise))


def test_request_says_its_length_kind_and_sequence() -> None:
    request = netlink.set_link(7)
    encoded = request.encode(42)
    assert struct.unpack_from("=IHHII", encoded) == (len(encoded), 19, 0x1 | 0x4, 42, 0)
    assert struct.unpack_from("=BxHiII", encoded, 16) == (0, 0, 7, 1, 1)


def test_veth_names_both_ends_and_the_namespace_of_the_peer() -> None:
    request = netlink.add_veth(End("c1", 17, b"\2aaaaa"), End("eth0", 2, b"\2bbbbb", netns=9), 1400)
    outer = attributes(request.body[16:])
    assert outer[3] == b"c1\0" and outer[1] == b"\2aaaaa" and outer[4] == struct.pack("=I", 1400)
    info = attributes(outer[18])
    assert info[1] == b"veth\0"
    peer = attributes(info[2])[1]
    assert struct.unpack_from("=BxHiII", peer)[2] == 2
    assert attributes(peer[16:])[28] == struct.pack("=I", 9)


def test_default_route_has_no_destination_and_its_gateway_is_on_link() -> None:
    request = netlink.add_route(2, IPv4Network("0.0.0.0/0"), IPv4Address("169.254.1.1"))
    assert request.body[1] == 0 and struct.unpack_from("=I", request.body, 8) == (4,)
    assert attributes(request.body[12:]) == {4: struct.pack("=I", 2), 5: b"\xa9\xfe\1\1"}


def test_route_to_one_container_is_its_address_alone() -> None:
    request = netlink.add_route(17, IPv4Network("100.112.0.1/32"))
    assert request.body[1] == 32 and attributes(request.body[12:])[1] == bytes([100, 112, 0, 1])


def test_error_names_the_call_the_errno_and_the_kernels_own_words() -> None:
    error = NetlinkError(errno.EEXIST, "add veth 'c1'", "name in use")
    assert error.errno == errno.EEXIST and error.call == "add veth 'c1'"
    assert "add veth 'c1': EEXIST (name in use)" in str(error)


def test_explanation_is_read_from_an_extended_acknowledgement() -> None:
    body = struct.pack("=i", -errno.EINVAL) + bytes(16) + attribute(1, "Invalid prefix")
    assert netlink._code(body) == errno.EINVAL
    assert netlink._explanation(body) == "Invalid prefix"
