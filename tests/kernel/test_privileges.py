"""System call filters, run by a small interpreter of classic BPF, and the ranges of ids."""

from __future__ import annotations

import errno
import itertools
import struct

import pytest

from squall.node import privileges
from squall.node.privileges import ALLOW, ENOSYS, EPERM, KILL, Program

ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
MACHINES = sorted(ARCH)
I386 = 0x40000003


def run(program: Program, arch: int, number: int, *arguments: int) -> int:
    """What the kernel would do: `struct seccomp_data` in, an action out."""
    padded = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("<IIQ6Q", number, arch, 0, *(value & 0xFFFFFFFFFFFFFFFF for value in padded))
    word = at = 0
    for _ in range(1000):
        code, true, false, value = program[at]
        at += 1
        if code == 0x20:
            word = struct.unpack_from("<I", data, value)[0]
        elif code == 0x06:
            return value
        elif code == 0x05:
            at += value
        else:
            holds = {0x15: word == value, 0x35: word >= value, 0x45: bool(word & value)}[code]
            at += true if holds else false
    raise AssertionError("the program does not end")


class Filter:
    def __init__(self, machine: str, program: Program) -> None:
        self.machine = machine
        self.program = program
        self.numbers = privileges.syscalls(machine)

    def __call__(self, name: str, *arguments: int) -> int:
        return run(self.program, ARCH[self.machine], self.numbers[name], *arguments)


@pytest.fixture(params=MACHINES)
def container(request: pytest.FixtureRequest) -> Filter:
    return Filter(request.param, privileges.container_program(request.param))


@pytest.fixture(params=MACHINES)
def zygote(request: pytest.FixtureRequest) -> Filter:
    return Filter(request.param, privileges.zygote_program(request.param))


def test_interpreter_agrees_with_the_allowlist_on_every_number(container: Filter) -> None:
    ruled = set(privileges._ARGUMENT_RULES)
    for name in set(container.numbers) - ruled:
        wanted = ALLOW if name in privileges.ALLOWED else ENOSYS if container.numbers[name] >= 424 else EPERM
        assert container(name) == wanted, name


def test_interpreter_agrees_with_the_list_of_what_a_zygote_may_not(zygote: Filter) -> None:
    for name in set(zygote.numbers) - set(privileges._EARLY_RULES):
        assert zygote(name) == (EPERM if name in privileges.DENIED_EARLY else ALLOW), name


@pytest.mark.parametrize("machine", MACHINES)
def test_call_of_a_foreign_architecture_kills(machine: str) -> None:
    for program in (privileges.container_program(machine), privileges.zygote_program(machine)):
        assert run(program, I386, 1) == KILL


@pytest.mark.parametrize("machine", MACHINES)
def test_number_beyond_the_table_is_unknown_and_so_is_the_x32_abi(machine: str) -> None:
    for program in (privileges.container_program(machine), privileges.zygote_program(machine)):
        for number in (600, 0x40000000, 0x40000001, 0xFFFFFFFF):
            assert run(program, ARCH[machine], number) == ENOSYS


def test_clone_makes_threads_and_processes_but_no_namespace(container: Filter) -> None:
    assert container("clone", 0x003D0F00) == ALLOW, "a thread"
    assert container("clone", 0x01200011) == ALLOW, "a fork"
    for flag in (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000):
        assert container("clone", flag | 17) == EPERM, hex(flag)
    assert container("clone3") == ENOSYS
    assert container("unshare", 0) == container("setns", 0) == EPERM


def test_zygote_may_make_all_namespaces_but_users_and_enter_only_networks(zygote: Filter) -> None:
    assert zygote("clone", 0x2C028011) == ALLOW
    assert zygote("clone", 0x10000011) == zygote("unshare", 0x10000000) == EPERM
    assert zygote("setns", 5, 0x40000000) == ALLOW
    assert zygote("setns", 5, 0) == zygote("setns", 5, 0x10000000) == EPERM


def test_sockets_are_of_known_families(container: Filter) -> None:
    for family in (1, 2, 10):
        assert container("socket", family, 1, 0) == ALLOW
    assert container("socket", 16, 3, 0) == ALLOW, "routes of its own namespace, which getifaddrs reads"
    assert container("socket", 16, 3, 12) == EPERM, "netfilter"
    for family in (0, 17, 31, 38, 40, 44):
        assert container("socket", family, 1, 0) == EPERM, family


def test_upper_half_of_an_argument_does_not_open_a_door(container: Filter) -> None:
    assert container("clone", 0x1_0000_0011 | 0x10000000) == EPERM
    assert container("socket", 0x1_0000_0028, 1, 0) == EPERM


def test_terminal_and_personality_tricks_are_refused(container: Filter) -> None:
    assert container("ioctl", 0, 0x5413) == ALLOW
    assert container("ioctl", 0, 0x5412) == container("ioctl", 0, 0x541C) == EPERM
    assert container("personality", 0xFFFFFFFF) == ALLOW
    assert container("personality", 0x0040000) == EPERM


def test_filters_are_short_enough_to_be_cheap(container: Filter, zygote: Filter) -> None:
    assert len(container.program) < 256
    assert len(zygote.program) < 256


def test_errors_carry_their_numbers() -> None:
    assert (EPERM & 0xFFFF, ENOSYS & 0xFFFF) == (errno.EPERM, errno.ENOSYS)


def test_tables_agree_with_known_numbers() -> None:
    assert [privileges.syscalls("x86_64")[name] for name in ("read", "openat", "seccomp", "rseq", "openat2")] == [
        0,
        257,
        317,
        334,
        437,
    ]
    assert [privileges.syscalls("aarch64")[name] for name in ("io_setup", "openat", "seccomp", "rseq", "mseal")] == [
        0,
        56,
        277,
        293,
        462,
    ]


def test_id_ranges_do_not_overlap_and_stay_below_the_sign_bit() -> None:
    bases = [privileges.id_base(index) for index in range(4000)]
    assert all(later - earlier == privileges.ID_RANGE for earlier, later in itertools.pairwise(bases))
    assert bases[-1] + privileges.ID_RANGE < 1 << 31


def test_homes_begin_at_different_ranges() -> None:
    assert len({privileges.first_index(f"/home/{user}/squall") for user in range(50)}) > 45
