"""What runs inside: the zygote's fork server, the making of a container's root, the tiny init, the runner's start.

A zygote is a Python process exec'd inside an image that has imported what containers need and forks them on request.
A forked child first becomes a *shell*: own namespaces, own root, nothing of a function in it. The agent dresses a
shell with descriptors, a host name and a source tree; it then gives up all privileges (*seals* itself), says so, and
pid 1 forks the runner. All of this runs with a tenant's rights at most: nothing here is a wall, walls are inherited
or applied and checked from outside. Must hold nothing the tenant may not know.

Order of a container's life, as read in this file: `_root_steps`, `_dress`, `_linux.seal`, `_run_init`, `_run_runner`.
A *build container* differs in three points: its root is made of layers that came as descriptors, it keeps the few
capabilities that installing packages needs, and pid 1 forks a command in place of the runner. Where an image has an
*entrypoint*, pid 1 forks that, and it becomes an interpreter that calls `process`.
Tested in `tests/kernel/test_native.py` and, from inside, by `tests/security`.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import errno
import faulthandler
import fcntl
import gc
import importlib
import json
import os
import select
import signal
import socket
import stat
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from squall import _linux
from squall.runner import rehearsal
from squall.runner.compiled import Compiler

NEW_ROOT = "/.squall/new"
LOWER = "/.squall/lower"
SCRATCH = "/.squall/scratch"
BOX = "/.squall/box"
SOURCE = "/src"
WORKDIR = "/root"
MESSAGE_LIMIT = 64 * 1024
FDS_LIMIT = 250
"""Descriptors that one message of the kernel's carries; a build gets each of its layers as one."""
RUNNER_FD = 3
CONTROL_FD = 4
"""Where there is one, the agent sends another socket over it in place of RUNNER_FD's, after the server was killed."""
Entry = Callable[..., int]
"""Called with the runner's descriptor, the source tree and, where there is one, the control descriptor."""
CRASH_BYTES = 64 * 1024
KEEP_BYTES = 8 << 20
"""What a container's allocator may keep of freed memory: as much as a few large inputs take."""

SHELL_FLAGS = _linux.CLONE_NEWNS | _linux.CLONE_NEWPID | _linux.CLONE_NEWIPC | _linux.CLONE_NEWUTS
"""CLONE_PARENT beside these makes the agent the parent: a zygote's end takes no container along."""

WARM_MODULES = (
    "json", "pickle", "socket", "struct", "threading", "traceback", "linecache", "signal", "inspect", "queue",
    "selectors", "tempfile", "squall", "squall.app", "squall.function", "squall.image", "squall._calling",
    "squall.runner.execute", "squall.runner.loader", "cloudpickle",
)  # fmt: skip
USUAL_MODULES = (
    "pathlib", "subprocess", "datetime", "hashlib", "asyncio", "logging", "concurrent.futures.thread", "argparse",
    "glob", "csv", "statistics",
)  # fmt: skip
"""What most people's modules import first; in a fork each of them would cost milliseconds and pages of its own."""


# ---- zygote -----------------------------------------------------------------------------------------------------


def zygote(fd: int) -> None:
    """Serve fork requests on `fd` until the agent closes it. Called by the `-c` line the agent starts Python with."""
    control = socket.socket(fileno=fd)
    config = json.loads(control.recv(MESSAGE_LIMIT))
    try:
        entry = _warm_up(config["entry"])
    except BaseException:
        control.send(json.dumps({"error": traceback.format_exc(limit=-8)[-4000:]}).encode())
        raise SystemExit(1) from None
    seal_filter = base64.b64decode(config["filter"])
    control.send(json.dumps({"ready": True, "threads": threading.active_count()}).encode())
    chores, compiler = _chores(), Compiler(SOURCE)
    while True:
        _pass_time(control, chores, compiler)
        data, fds, _, _ = socket.recv_fds(control, MESSAGE_LIMIT, FDS_LIMIT)
        if not data:
            return
        request = json.loads(data)
        if "compile" in request:
            compiler.begin(fds[0])
        else:
            _fork_shell(config, request, fds, seal_filter, entry)


def _warm_up(entry: str) -> Entry:
    """Import what every container needs, then move it all out of the collector's way so that forks share its pages."""
    for name in WARM_MODULES:
        try:
            importlib.import_module(name)
        except ImportError:
            if name.startswith("squall"):  # ours; of the rest an image may lack what it likes
                raise
    module, _, function = entry.partition(":")
    serve: Entry = getattr(importlib.import_module(module), function)
    _linux.load()
    _linux.keep_memory(KEEP_BYTES)
    _linux.set_name("squall-zygote")
    _freeze()
    gc.disable()  # until there is user code: a collection in a fork copies the pages it looks at
    return serve


def _freeze() -> None:
    gc.collect()
    gc.freeze()


_DONE = object()


def _chores() -> Iterator[None]:
    """What makes every later fork cheaper, in steps of milliseconds: the first containers do not wait for it."""
    for name in USUAL_MODULES:
        try:
            importlib.import_module(name)
        except Exception as error:  # the image's own affair: whoever needs the module will see it
            print(f"cannot import `{name}` ahead: {error!r}", file=sys.stderr)
        yield
    for _ in range(rehearsal.ROUNDS):
        if problem := rehearsal.rehearse(1):
            print(f"rehearsal: {problem}; containers start slower", file=sys.stderr)
            break
        yield
    _freeze()


def _pass_time(control: socket.socket, chores: Iterator[None], compiler: Compiler) -> None:
    """Until the agent asks for something: chores, as long as there are any, and what was compiled."""
    idle = False
    while True:
        sockets = [control.fileno()] + ([compiler.fd] if compiler.fd >= 0 else [])
        ready = select.select(sockets, [], [], None if idle else 0)[0]
        if control.fileno() in ready:
            return
        if ready:
            compiler.read()
        else:
            idle = next(chores, _DONE) is _DONE


def _fork_shell(
    config: dict[str, Any],
    request: dict[str, Any],
    fds: list[int],
    seal_filter: bytes,
    entry: Entry,
) -> None:
    here = os.getpid()
    with socket.socket(fileno=fds[0]) as control:
        try:
            pid = _linux.clone(SHELL_FLAGS | _linux.CLONE_PARENT)
        except OSError as error:
            _send(control, error=f"fork-shell: {error}")
            return
        finally:
            if os.getpid() == here:
                for fd in fds[1:]:
                    os.close(fd)
        if pid == 0:
            _end_with(lambda: _be_container({**config, **request}, fds[1:], control, seal_filter, entry))


def _end_with(body: Callable[[], int]) -> None:
    """Leave the process with the body's code, whatever happens in it."""
    code = 1
    try:
        code = body()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        with contextlib.suppress(BaseException):
            traceback.print_exc()
    finally:
        os._exit(code & 0xFF)


# ---- shell ------------------------------------------------------------------------------------------------------


class _Steps:
    """Names and clock readings of what was done; the clock is the machine's, so the agent can go on from it."""

    def __init__(self) -> None:
        self.done: list[tuple[str, float]] = []
        self.name = "fork"

    def mark(self, name: str) -> None:
        """The named step ended now."""
        self.done.append((name, time.monotonic()))


def _send(control: socket.socket, **message: object) -> None:
    with contextlib.suppress(OSError):
        control.send(json.dumps(message).encode())


def _be_container(
    config: dict[str, Any],
    layers: list[int],
    control: socket.socket,
    seal_filter: bytes,
    entry: Entry,
) -> int:
    """`config` is the zygote's with what this container's request says otherwise."""
    control.send(b"hello")  # the kernel adds who we are; the agent believes that and nothing else
    # From here on, so that none that is meant for the container is lost: pid 1 ignores what it has no handler for.
    signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    _linux.set_parent_death_signal(signal.SIGKILL)
    _linux.close_all_but([0, 1, 2, control.fileno(), *layers])
    steps = _Steps()
    steps.mark("fork")
    try:
        for name, step in _root_steps(config, layers):
            steps.name = name
            step()
            steps.mark(name)
        _send(control, steps=steps.done)
        dress = _dress(control, steps)
        if dress is None:
            return 0
        steps.name = "seal"
        _linux.seal([seal_filter], config["nofile"], bounding=False, keep=config.get("keep", 0))
        steps.mark("seal")
    except Exception as error:
        _send(control, error=f"{steps.name}: {error}")
        return 1
    _send(control, sealed=True, steps=steps.done)
    if dress.command and not control.recv(MESSAGE_LIMIT):  # the walls are checked while nothing of a build has run
        return 1
    return _run_init(control, dress, entry)


def _root_steps(config: dict[str, Any], layers: list[int]) -> list[tuple[str, Callable[[], None]]]:
    """The ordered making of a root. All is attached after the pivot: a link in an image leads nowhere outside."""
    trees: dict[str, int] = {}
    return [
        ("box", lambda: _mount_box(config)),
        ("overlay", lambda: _mount_overlay(config, _lower(config, layers))),
        ("collect", lambda: _collect(config, trees)),
        ("pivot", _pivot),
        ("binds", lambda: _attach_all(trees)),
        ("proc", lambda: _mount_proc(config)),
        ("dev", _mount_terminals),
        ("detach", lambda: _detach_old_root(config.get("keep", 0))),
    ]


def _mount_box(config: dict[str, Any]) -> None:
    """One tmpfs for all that is small and the container's own; its mount goes with the old root, the copies stay."""
    _linux.mount("box", BOX, "tmpfs", _BOX_FLAGS, f"mode=755,size={config['shm_bytes']}")


def _lower(config: dict[str, Any], layers: list[int]) -> str:
    """Where the layers below this container are, the topmost first."""
    if not layers:
        return ":".join(f"{LOWER}/{n}" for n in range(config["lower"])) or LOWER
    places = [f"{BOX}/{n}" for n in range(len(layers))]
    for fd, place in zip(layers, places, strict=True):
        os.mkdir(place)
        _linux.attach(fd, place)
    return ":".join(places)


def _mount_overlay(config: dict[str, Any], lower: str) -> None:
    """`volatile`: no fsync inside and no unmounting waits for a disk. What outlives the container, a build's layer, is
    written to disk by the agent."""
    here = f"{SCRATCH}/{config['scratch']}"
    for path in (here, f"{here}/u", f"{here}/w"):
        os.mkdir(path, 0o755)
    options = f"lowerdir={lower},upperdir={here}/u,workdir={here}/w,userxattr,volatile"
    _linux.mount("overlay", NEW_ROOT, "overlay", _linux.MS_NOSUID | _linux.MS_NODEV, options)


_BOX_FLAGS = _linux.MS_NOSUID | _linux.MS_NODEV | _linux.MS_NOEXEC


def _collect(config: dict[str, Any], trees: dict[str, int]) -> None:
    """Copies of the mounts the new root will show, taken while the old root is still the root."""
    for path in config["binds"]:
        trees[path] = _linux.open_tree(path)
    trees["/dev"] = _linux.open_tree("/dev")
    os.mkdir(f"{BOX}/shm")
    os.chmod(f"{BOX}/shm", 0o1777)
    trees["/dev/shm"] = _linux.open_tree(f"{BOX}/shm")
    for name, target in config["overrides"].items():
        os.close(os.open(f"{BOX}/{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        trees[target] = _linux.open_tree(f"{BOX}/{name}")


def _pivot() -> None:
    os.chdir(NEW_ROOT)
    _linux.pivot_root(".", ".")


def _attach_all(trees: dict[str, int]) -> None:
    for target, fd in trees.items():
        _linux.attach(fd, target)


def _mount_proc(config: dict[str, Any]) -> None:
    """While the zygote's proc is still in sight: the kernel gives a proc only to who already sees one in full."""
    flags = _linux.MS_NOSUID | _linux.MS_NODEV | _linux.MS_NOEXEC
    _linux.mount("proc", "/proc", "proc", flags)
    for path in config["masked"]:
        # /dev is the agent's own read-only tree, so what is bound here cannot have been swapped (CVE-2025-31133).
        source = "/sys" if os.path.isdir(path) else "/dev/null"
        _linux.bind(source, path, _linux.ATTR_RDONLY, recursive=False)
    for path in config["readonly"]:
        _linux.bind(path, path, _linux.ATTR_RDONLY | _linux.ATTR_NOSUID | _linux.ATTR_NODEV | _linux.ATTR_NOEXEC)


def _mount_terminals() -> None:
    flags = _linux.MS_NOSUID | _linux.MS_NOEXEC
    _linux.mount("devpts", "/dev/pts", "devpts", flags, "newinstance,ptmxmode=0666,mode=0620,gid=5")


def _detach_old_root(keep: int) -> None:
    _linux.umount(".", _linux.MNT_DETACH)
    os.chdir("/")
    _linux.drop_bounding_set(keep)


# ---- dressing ---------------------------------------------------------------------------------------------------


class _Dress:
    """What makes a shell one container: descriptors by name, and what the agent said."""

    def __init__(self, message: Mapping[str, Any], fds: list[int]) -> None:
        self.fds = dict(zip(message["fds"], fds, strict=True))
        self.environment: dict[str, str] = message["environment"]
        self.hostname: str = message["hostname"]
        self.files: dict[str, str] = message["files"]
        """Path -> text of the files of /etc that are the container's own."""
        self.source = SOURCE if "source" in self.fds else None
        self.trees: list[list[str]] = message.get("trees", [])
        """Name of the descriptor and target of each tree to show, in order."""
        self.workdir: str = message.get("workdir", "")
        self.command: list[str] = message.get("command", [])
        """What a build container runs in place of the runner."""
        self.wrapped: list[str] = message.get("wrapped", [])
        """The image's entrypoint with the command that becomes the runner, where it has one."""


def _dress(control: socket.socket, steps: _Steps) -> _Dress | None:
    """Wait, as long as it takes, to be needed. None when the agent is gone or has no use for this shell."""
    data, fds, _, _ = socket.recv_fds(control, MESSAGE_LIMIT, FDS_LIMIT)
    if not data:
        return None
    steps.done.clear()
    steps.name = "dress"
    dress = _Dress(json.loads(data), fds)
    if "source" in dress.fds:
        _linux.attach(dress.fds.pop("source"), SOURCE)
    for name, target in dress.trees:
        _show_tree(dress.fds.pop(name), target)
    network = dress.fds.pop("network")
    _linux.setns(network, _linux.CLONE_NEWNET)
    os.close(network)
    _linux.sethostname(dress.hostname)
    for path, text in dress.files.items():
        fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
        os.write(fd, text.encode())
        os.close(fd)
    try:
        _linux.unshare(_linux.CLONE_NEWCGROUP)  # now that we are where we stay: paths in /proc start here
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS):
            raise
    steps.mark("dress")
    return dress


def _show_tree(fd: int, target: str) -> None:
    """Show a file or directory, making in the container's own layer what of its path the image lacks."""
    is_directory = stat.S_ISDIR(os.fstat(fd).st_mode)
    os.makedirs(target if is_directory else os.path.dirname(target), 0o755, exist_ok=True)
    if not is_directory and not os.path.lexists(target):
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
    _linux.attach(fd, target)


# ---- init and runner --------------------------------------------------------------------------------------------

_SYNCHRONOUS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS}
_FORWARDED = signal.valid_signals() - _SYNCHRONOUS - {signal.SIGKILL, signal.SIGSTOP}


def _run_init(control: socket.socket, dress: _Dress, entry: Entry) -> int:
    """Pid 1: start the runner, forward signals to it, reap everything, and end with the runner's code.

    Signals are blocked and taken one by one, so none is lost between fork and loop; the runner unblocks them.
    """
    has_runner = not dress.command and not dress.wrapped
    crash = -1
    if has_runner:
        crash, dress.fds["crash"] = os.pipe()
    runner = os.fork()
    if runner == 0:
        _end_with(lambda: _run_runner(dress, entry))
    stderr = dress.fds.pop("stderr") if has_runner else -1
    for fd in dress.fds.values():
        os.close(fd)
    os.dup2(0, 1)
    os.dup2(0, 2)
    _linux.set_name("squall-init")
    _linux.prctl(_linux.PR_SET_DUMPABLE, 0)  # nobody inside may look into /proc/1
    while True:
        signum = signal.sigwaitinfo(_FORWARDED).si_signo
        if signum != signal.SIGCHLD:
            with contextlib.suppress(ProcessLookupError):
                os.kill(runner, signum)
            continue
        status = _reap_until(runner)
        if status is not None:
            if os.WIFSIGNALED(status) and has_runner:
                _tell_of_crash(crash, stderr)
            with contextlib.suppress(OSError):
                control.send(struct.pack("<i", status))
            return exit_code(status)


def _tell_of_crash(crash: int, stderr: int) -> None:
    """Write what `faulthandler` left in the pipe `crash`, without the lines that are Squall's own."""
    own = (f'"{os.path.dirname(os.path.dirname(__file__))}/', '"<string>"')
    if not select.select([crash], [], [], 0)[0]:
        return  # it was killed, which leaves no words
    lines = os.read(crash, CRASH_BYTES).decode("utf-8", "replace").splitlines(keepends=True)
    text = "".join(line for line in lines if not any(part in line for part in own)).encode()
    with contextlib.suppress(OSError):
        if select.select([], [stderr], [], 1.0)[1]:  # then a pipe takes this much without a wait
            os.write(stderr, text[: select.PIPE_BUF])


def _reap_until(runner: int) -> int | None:
    """Reap all that has ended; the runner's wait status when it was among them."""
    found = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        if pid == runner:
            found = status


def exit_code(status: int) -> int:
    """A wait status as a shell shows it: 128+n for signal n."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _run_runner(dress: _Dress, entry: Entry) -> int:
    """Become the runner: standard streams, descriptor 3 to the server, one or two more, and the environment."""
    _linux.set_name("squall-runner")
    os.setsid()
    # Copies above all of the numbers wanted, so that no dup2 overwrites one that is still needed.
    names = [name for name in ("stdout", "stderr", "runner", "control", "crash") if name in dress.fds]
    high = [fcntl.fcntl(dress.fds[name], fcntl.F_DUPFD_CLOEXEC, 64) for name in names]
    for wanted, fd in enumerate(high, 1):  # so that the runner's is RUNNER_FD, and the one for control CONTROL_FD
        os.dup2(fd, wanted, inheritable=wanted < RUNNER_FD or "crash" not in names)
    _linux.close_from(len(names) + 1)
    signal.pthread_sigmask(signal.SIG_SETMASK, set())
    os.environ.clear()
    os.environ.update(dress.environment)
    os.umask(0o022)
    _enter_workdir(dress.workdir)
    if dress.command:
        return _execute(dress.command)
    if dress.wrapped:
        return _execute(dress.wrapped)
    control = [CONTROL_FD] if "control" in dress.fds else []
    faulthandler.enable(len(names), all_threads=False)  # a crash in native code then tells which lines were running
    gc.freeze()  # with what the zygote made since: else the first collection looks at it, and copies its pages
    gc.enable()
    return _serve(entry, RUNNER_FD, dress.source, *control)


def _enter_workdir(path: str) -> None:
    path = path or WORKDIR
    try:
        if not os.path.isdir(path):
            os.makedirs(path)
        os.chdir(path)
    except OSError as error:
        raise SystemExit(_say(f"the working directory `{path}` cannot be entered: {error.strerror}")) from None


def _execute(command: list[str]) -> int:
    for signum in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores these, and that is inherited
        signal.signal(signum, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        return _say(f"`{command[0]}` cannot be run: {error.strerror}")


def _say(text: str) -> int:
    os.write(2, f"{text}\n".encode(errors="replace"))
    return 127


def _serve(entry: Entry, fd: int, source: str | None, *control: int) -> int:
    """Run the runner's loop; then what the user's modules registered for the end, without waiting for threads."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        return entry(fd, source, *control)
    finally:
        with contextlib.suppress(Exception):
            atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()


# ---- the process runtime ----------------------------------------------------------------------------------------


def process(fd: int, source: str | None, entry: str, *control: int) -> None:
    """The runner as a process that was not forked from a zygote: the same loop. What has walls has them already."""
    for inherited in (fd, *control):
        os.set_inheritable(inherited, False)
    faulthandler.enable(all_threads=False)
    module, _, function = entry.partition(":")
    serve: Entry = getattr(importlib.import_module(module), function)
    _end_with(lambda: _serve(serve, fd, source, *control))
