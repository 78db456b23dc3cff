"""What a container may do: id ranges, system calls, resource limits. Pure data and the compiler of seccomp filters.

Two filters, both inherited and never removable. Stage 1 is put on a zygote before its first instruction and denies
what forking containers does not need and what kernel bugs are reached through. Stage 2 is put on a container and on
whatever joins it: an allowlist; all else fails with EPERM, or ENOSYS for calls newer than 2019 so that callers fall
back. Must never make a system call. Tested in `tests/kernel/test_privileges.py`, where the filters are run by a
small interpreter, and from inside by `tests/security`.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import platform
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

ID_RANGE = 65536
_FIRST_ID = 1879048192
"""Above what systemd-nspawn gives out, below the ids systemd keeps for foreign images: nobody else's by convention."""
_RANGES = 4000

NOFILE = 65536

_BUILD_CAPABILITIES = {
    "chown": 0, "dac_override": 1, "fowner": 3, "fsetid": 4, "kill": 5, "setgid": 6, "setuid": 7,
    "net_bind_service": 10, "setfcap": 31,
}  # fmt: skip
BUILD_CAPABILITIES = sum(1 << number for number in _BUILD_CAPABILITIES.values())
"""What a build container keeps, within its user namespace: package managers give files owners and modes, and drop to
users of their own. None of these mounts, traces, loads, or reaches what is not mapped into the namespace."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


MASKED_PATHS = (
    "/proc/kcore", "/proc/keys", "/proc/key-users", "/proc/timer_list", "/proc/sysrq-trigger", "/proc/latency_stats",
    "/proc/sched_debug", "/proc/kmsg", "/proc/kpagecount", "/proc/kpageflags", "/proc/kpagecgroup", "/proc/config.gz",
    "/proc/acpi", "/proc/scsi", "/proc/asound",
)  # fmt: skip
"""Nothing in a container needs these, and each tells of the host or has been a way into it."""
READONLY_PATHS = ("/proc/sys", "/proc/bus", "/proc/fs", "/proc/irq")


def id_base(index: int) -> int:
    """First host id of the range number `index`."""
    return _FIRST_ID + (index % _RANGES) * ID_RANGE


def first_index(home: str) -> int:
    """Where the ranges of a home begin: spread, so that two homes on a machine hardly ever share one."""
    return int.from_bytes(hashlib.blake2b(home.encode(), digest_size=4).digest(), "little") % _RANGES


# ---- system call numbers ----------------------------------------------------------------------------------------
# In the kernel's order from 0; `n=name` continues at n.

_X86_64 = """
    read write open close stat fstat lstat poll lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask
    rt_sigreturn ioctl pread64 pwrite64 readv writev access pipe select sched_yield mremap msync mincore madvise
    shmget shmat shmctl dup dup2 pause nanosleep getitimer alarm setitimer getpid sendfile socket connect accept
    sendto recvfrom sendmsg recvmsg shutdown bind listen getsockname getpeername socketpair setsockopt getsockopt
    clone fork vfork execve exit wait4 kill uname semget semop semctl shmdt msgget msgsnd msgrcv msgctl fcntl flock
    fsync fdatasync truncate ftruncate getdents getcwd chdir fchdir rename mkdir rmdir creat link unlink symlink
    readlink chmod fchmod chown fchown lchown umask gettimeofday getrlimit getrusage sysinfo times ptrace getuid
    syslog getgid setuid setgid geteuid getegid setpgid getppid getpgrp setsid setreuid setregid getgroups setgroups
    setresuid getresuid setresgid getresgid getpgid setfsuid setfsgid getsid capget capset rt_sigpending
    rt_sigtimedwait rt_sigqueueinfo rt_sigsuspend sigaltstack utime mknod uselib personality ustat statfs fstatfs
    sysfs getpriority setpriority sched_setparam sched_getparam sched_setscheduler sched_getscheduler
    sched_get_priority_max sched_get_priority_min sched_rr_get_interval mlock munlock mlockall munlockall vhangup
    modify_ldt pivot_root _sysctl prctl arch_prctl adjtimex setrlimit chroot sync acct settimeofday mount umount2
    swapon swapoff reboot sethostname setdomainname iopl ioperm create_module init_module delete_module
    get_kernel_syms query_module quotactl nfsservctl getpmsg putpmsg afs_syscall tuxcall security gettid readahead
    setxattr lsetxattr fsetxattr getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr removexattr
    lremovexattr fremovexattr tkill time futex sched_setaffinity sched_getaffinity set_thread_area io_setup
    io_destroy io_getevents io_submit io_cancel get_thread_area lookup_dcookie epoll_create epoll_ctl_old
    epoll_wait_old remap_file_pages getdents64 set_tid_address restart_syscall semtimedop fadvise64 timer_create
    timer_settime timer_gettime timer_getoverrun timer_delete clock_settime clock_gettime clock_getres
    clock_nanosleep exit_group epoll_wait epoll_ctl tgkill utimes vserver mbind set_mempolicy get_mempolicy mq_open
    mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr kexec_load waitid add_key request_key keyctl
    ioprio_set ioprio_get inotify_init inotify_add_watch inotify_rm_watch migrate_pages openat mkdirat mknodat
    fchownat futimesat newfstatat unlinkat renameat linkat symlinkat readlinkat fchmodat faccessat pselect6 ppoll
    unshare set_robust_list get_robust_list splice tee sync_file_range vmsplice move_pages utimensat epoll_pwait
    signalfd timerfd_create eventfd fallocate timerfd_settime timerfd_gettime accept4 signalfd4 eventfd2
    epoll_create1 dup3 pipe2 inotify_init1 preadv pwritev rt_tgsigqueueinfo perf_event_open recvmmsg fanotify_init
    fanotify_mark prlimit64 name_to_handle_at open_by_handle_at clock_adjtime syncfs sendmmsg setns getcpu
    process_vm_readv process_vm_writev kcmp finit_module sched_setattr sched_getattr renameat2 seccomp getrandom
    memfd_create kexec_file_load bpf execveat userfaultfd membarrier mlock2 copy_file_range preadv2 pwritev2
    pkey_mprotect pkey_alloc pkey_free statx io_pgetevents rseq
"""
_AARCH64 = """
    io_setup io_destroy io_submit io_cancel io_getevents setxattr lsetxattr fsetxattr getxattr lgetxattr fgetxattr
    listxattr llistxattr flistxattr removexattr lremovexattr fremovexattr getcwd lookup_dcookie eventfd2
    epoll_create1 epoll_ctl epoll_pwait dup dup3 fcntl inotify_init1 inotify_add_watch inotify_rm_watch ioctl
    ioprio_set ioprio_get flock mknodat mkdirat unlinkat symlinkat linkat renameat umount2 mount pivot_root
    nfsservctl statfs fstatfs truncate ftruncate fallocate faccessat chdir fchdir chroot fchmod fchmodat fchownat
    fchown openat close vhangup pipe2 quotactl getdents64 lseek read write readv writev pread64 pwrite64 preadv
    pwritev sendfile pselect6 ppoll signalfd4 vmsplice splice tee readlinkat newfstatat fstat sync fsync fdatasync
    sync_file_range timerfd_create timerfd_settime timerfd_gettime utimensat acct capget capset personality exit
    exit_group waitid set_tid_address unshare futex set_robust_list get_robust_list nanosleep getitimer setitimer
    kexec_load init_module delete_module timer_create timer_gettime timer_getoverrun timer_settime timer_delete
    clock_settime clock_gettime clock_getres clock_nanosleep syslog ptrace sched_setparam sched_setscheduler
    sched_getscheduler sched_getparam sched_setaffinity sched_getaffinity sched_yield sched_get_priority_max
    sched_get_priority_min sched_rr_get_interval restart_syscall kill tkill tgkill sigaltstack rt_sigsuspend
    rt_sigaction rt_sigprocmask rt_sigpending rt_sigtimedwait rt_sigqueueinfo rt_sigreturn setpriority getpriority
    reboot setregid setgid setreuid setuid setresuid getresuid setresgid getresgid setfsuid setfsgid times setpgid
    getpgid getsid setsid getgroups setgroups uname sethostname setdomainname getrlimit setrlimit getrusage umask
    prctl getcpu gettimeofday settimeofday adjtimex getpid getppid getuid geteuid getgid getegid gettid sysinfo
    mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr msgget msgctl msgrcv msgsnd semget semctl
    semtimedop semop shmget shmctl shmat shmdt socket socketpair bind listen accept connect getsockname getpeername
    sendto recvfrom setsockopt getsockopt shutdown sendmsg recvmsg readahead brk munmap mremap add_key request_key
    keyctl clone execve mmap fadvise64 swapon swapoff mprotect msync mlock munlock mlockall munlockall mincore
    madvise remap_file_pages mbind get_mempolicy set_mempolicy migrate_pages move_pages rt_tgsigqueueinfo
    perf_event_open accept4 recvmmsg 260=wait4 prlimit64 fanotify_init fanotify_mark name_to_handle_at
    open_by_handle_at clock_adjtime syncfs setns sendmmsg process_vm_readv process_vm_writev kcmp finit_module
    sched_setattr sched_getattr renameat2 seccomp getrandom memfd_create bpf execveat userfaultfd membarrier mlock2
    copy_file_range preadv2 pwritev2 pkey_mprotect pkey_alloc pkey_free statx io_pgetevents rseq kexec_file_load
"""
_EVERYWHERE = """
    424=pidfd_send_signal io_uring_setup io_uring_enter io_uring_register open_tree move_mount fsopen fsconfig
    fsmount fspick pidfd_open clone3 close_range openat2 pidfd_getfd faccessat2 process_madvise epoll_pwait2
    mount_setattr quotactl_fd landlock_create_ruleset landlock_add_rule landlock_restrict_self memfd_secret
    process_mrelease futex_waitv set_mempolicy_home_node cachestat fchmodat2 map_shadow_stack futex_wake futex_wait
    futex_requeue statmount listmount lsm_get_self_attr lsm_set_self_attr lsm_list_modules mseal setxattrat
    getxattrat listxattrat removexattrat open_tree_attr file_getattr file_setattr
"""

ALLOWED = _words(
    """
    accept accept4 access adjtimex alarm arch_prctl bind brk cachestat capget capset chdir chmod chown
    clock_adjtime clock_getres clock_gettime clock_nanosleep close close_range connect copy_file_range creat dup dup2
    dup3 epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd
    eventfd2 execve execveat exit exit_group faccessat faccessat2 fadvise64 fallocate fchdir fchmod fchmodat fchmodat2
    fchown fchownat fcntl fdatasync fgetxattr flistxattr flock fork fremovexattr fsetxattr fstat fstatfs fsync ftruncate
    futex futex_requeue futex_wait futex_waitv futex_wake futimesat get_mempolicy get_robust_list get_thread_area getcpu
    getcwd getdents getdents64 getegid geteuid getgid getgroups getitimer getpeername getpgid getpgrp getpid getppid
    getpriority getrandom getresgid getresuid getrlimit getrusage getsid getsockname getsockopt gettid gettimeofday
    getuid getxattr getxattrat inotify_add_watch inotify_init inotify_init1 inotify_rm_watch io_cancel io_destroy
    io_getevents io_pgetevents io_setup io_submit ioprio_get ioprio_set kill landlock_add_rule landlock_create_ruleset
    landlock_restrict_self lchown lgetxattr link linkat listen listxattr listxattrat llistxattr lremovexattr lseek
    lsetxattr lstat madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mkdir mkdirat mknod mknodat
    mlock mlock2 mlockall mmap mprotect mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedsend mq_unlink mremap
    mseal msgctl msgget msgrcv msgsnd msync munlock munlockall munmap name_to_handle_at nanosleep newfstatat open openat
    openat2 pause pidfd_open pidfd_send_signal pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll ppoll prctl pread64
    preadv preadv2 prlimit64 process_mrelease pselect6 pwrite64 pwritev pwritev2 read readahead readlink readlinkat
    readv recvfrom recvmmsg recvmsg remap_file_pages removexattr removexattrat rename renameat renameat2
    restart_syscall rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend
    rt_sigtimedwait rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr
    sched_getparam sched_getscheduler sched_rr_get_interval sched_setaffinity sched_setattr sched_setparam
    sched_setscheduler sched_yield seccomp select semctl semget semop semtimedop sendfile sendmmsg sendmsg sendto
    set_robust_list set_thread_area set_tid_address setfsgid setfsuid setgid setgroups setitimer setpgid setpriority
    setregid setresgid setresuid setreuid setrlimit setsid setsockopt setuid setxattr setxattrat shmat shmctl shmdt
    shmget shutdown sigaltstack signalfd signalfd4 socketpair splice stat statfs statx symlink symlinkat sync
    sync_file_range syncfs sysinfo tee tgkill time timer_create timer_delete timer_getoverrun timer_gettime
    timer_settime timerfd_create timerfd_gettime timerfd_settime times tkill truncate umask uname unlink unlinkat utime
    utimensat utimes vfork vmsplice wait4 waitid write writev
    """
)
"""Docker's list, less what a process without capabilities cannot use or what reads other processes' memory."""

DENIED_EARLY = _words(
    """
    bpf io_uring_setup io_uring_enter io_uring_register keyctl add_key request_key userfaultfd perf_event_open ptrace
    process_vm_readv process_vm_writev process_madvise kcmp pidfd_getfd kexec_load kexec_file_load init_module
    finit_module delete_module create_module open_by_handle_at fanotify_init acct swapon swapoff reboot quotactl
    quotactl_fd settimeofday clock_settime iopl ioperm modify_ldt lookup_dcookie nfsservctl syslog vhangup uselib
    _sysctl vserver move_pages migrate_pages mbind set_mempolicy set_mempolicy_home_node
    """
)
"""What a zygote and its containers never need. Mounting stays possible here: that is how a container gets its root."""

# What an argument decides: namespaces by clone's flags, address families, and two old tricks of terminals.
CLONE_NEW_ANY = 0x7E020000
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK = 1, 2, 10, 16
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
_PERSONALITIES = (0, 8, 0x20000, 0x20008, 0xFFFFFFFF)

# ---- classic BPF ------------------------------------------------------------------------------------------------

_LOAD, _JUMP, _JEQ, _JGE, _JSET, _RETURN = 0x20, 0x05, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL = 0x7FFF0000, 0x80000000
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_NR, _ARCH, _ARGUMENTS = 0, 4, 16


def _error(number: int) -> int:
    return 0x00050000 | number


EPERM, ENOSYS = _error(errno.EPERM), _error(errno.ENOSYS)


class Instruction(tuple[int, int, int, int]):
    """code, jump if true, jump if false, value: as in the kernel's `struct sock_filter`."""

    def pack(self) -> bytes:
        return struct.pack("=HBBI", *self)


Program = list[Instruction]


def _op(code: int, value: int, true: int = 0, false: int = 0) -> Instruction:
    return Instruction((code, true, false, value))


def _low(argument: int) -> Instruction:
    """Load the lower half of an argument: the kernel reads these flags as 32 bits."""
    return _op(_LOAD, _ARGUMENTS + 8 * argument)


def _unless(action: int, code: int, value: int) -> Program:
    """Return `action` unless the loaded word compares true."""
    return [_op(code, value, 1, 0), _op(_RETURN, action)]


def _one_of(values: tuple[int, ...], yes: int, no: int) -> Program:
    tests = [_op(_JEQ, value, len(values) - i, 0) for i, value in enumerate(values)]
    return [*tests, _op(_RETURN, no), _op(_RETURN, yes)]


def _without_bits(argument: int, bits: int) -> Program:
    return [_low(argument), _op(_JSET, bits, 0, 1), _op(_RETURN, EPERM), _op(_RETURN, ALLOW)]


def _socket() -> Program:
    """Internet, Unix, and netlink for the container's own routes; no vsock, packet, crypto or exotic protocols."""
    netlink = [_low(2), *_one_of((0,), ALLOW, EPERM)]
    families = _one_of((_AF_UNIX, _AF_INET, _AF_INET6), ALLOW, EPERM)
    return [_low(0), _op(_JEQ, _AF_NETLINK, 0, len(netlink)), *netlink, *families]


_ARGUMENT_RULES: dict[str, Program] = {
    "clone": _without_bits(0, CLONE_NEW_ANY),
    "socket": _socket(),
    "ioctl": [_low(1), *_one_of((_TIOCSTI, _TIOCLINUX), EPERM, ALLOW)],
    "personality": [_low(0), *_one_of(_PERSONALITIES, ALLOW, EPERM)],
    "clone3": [_op(_RETURN, ENOSYS)],
}
"""clone3 hides its flags behind a pointer, which a filter cannot follow: libraries fall back to clone."""

_EARLY_RULES: dict[str, Program] = {
    "clone": _without_bits(0, CLONE_NEWUSER),
    "unshare": _without_bits(0, CLONE_NEWUSER),
    "setns": [_low(1), *_one_of((CLONE_NEWNET,), ALLOW, EPERM)],
    "clone3": [_op(_RETURN, ENOSYS)],
}


@functools.lru_cache(maxsize=4)
def syscalls(machine: str) -> Mapping[str, int]:
    """Name -> number on an architecture."""
    table: dict[str, int] = {}
    number = 0
    for word in f"{ {'x86_64': _X86_64, 'aarch64': _AARCH64}[machine] } {_EVERYWHERE}".split():
        given, _, name = word.rpartition("=")
        number = int(given) if given else number
        table[name] = number
        number += 1
    return table


@dataclass(frozen=True)
class _Range:
    """All numbers from `first` up to the next range, and what to run for them."""

    first: int
    body: tuple[Instruction, ...]


def _ranges(decide: Callable[[int], Program], last: int, beyond: int) -> list[_Range]:
    found: list[_Range] = []
    for number in range(last + 1):
        body = tuple(decide(number))
        if not found or found[-1].body != body:
            found.append(_Range(number, body))
    found.append(_Range(last + 1, (_op(_RETURN, beyond),)))
    return found


def _tree(ranges: list[_Range]) -> Program:
    """A binary search over sorted ranges, so that any call is decided after about seven comparisons."""
    if len(ranges) == 1:
        return list(ranges[0].body)
    middle = len(ranges) // 2
    low, high = _tree(ranges[:middle]), _tree(ranges[middle:])
    compare = ranges[middle].first
    if len(low) <= 255:
        return [_op(_JGE, compare, len(low), 0), *low, *high]
    return [_op(_JGE, compare, 0, 1), _op(_JUMP, len(low)), *low, *high]  # conditional jumps reach 255 only


def _program(machine: str, decide: Callable[[int], Program], last: int, beyond: int) -> Program:
    guard = [_op(_LOAD, _ARCH), *_unless(KILL, _JEQ, _AUDIT_ARCH[machine]), _op(_LOAD, _NR)]
    return [*guard, *_tree(_ranges(decide, last, beyond))]


_NEW_CALLS = 424
"""From here numbers are the same everywhere, and a caller expects a kernel not to know the call."""


def container_program(machine: str) -> Program:
    """Stage 2: the allowlist."""
    table = syscalls(machine)
    allowed = {table[name] for name in ALLOWED if name in table}
    rules = {table[name]: rule for name, rule in _ARGUMENT_RULES.items()}

    def decide(number: int) -> Program:
        if number in rules:
            return rules[number]
        if number in allowed:
            return [_op(_RETURN, ALLOW)]
        return [_op(_RETURN, ENOSYS if number >= _NEW_CALLS else EPERM)]

    return _program(machine, decide, max(table.values()), ENOSYS)


def zygote_program(machine: str) -> Program:
    """Stage 1: all but the named. Numbers with bit 30 (the x32 ABI) and unknown ones are refused."""
    table = syscalls(machine)
    denied = {table[name] for name in DENIED_EARLY if name in table}
    rules = {table[name]: rule for name, rule in _EARLY_RULES.items()}

    def decide(number: int) -> Program:
        if number in rules:
            return rules[number]
        return [_op(_RETURN, EPERM if number in denied else ALLOW)]

    return _program(machine, decide, max(table.values()), ENOSYS)


def pack(program: Program) -> bytes:
    return b"".join(instruction.pack() for instruction in program)


@functools.lru_cache(maxsize=1)
def zygote_filter() -> bytes:
    return pack(zygote_program(platform.machine()))


@functools.lru_cache(maxsize=1)
def container_filter() -> bytes:
    return pack(container_program(platform.machine()))


def is_supported_machine() -> bool:
    return platform.machine() in _AUDIT_ARCH
