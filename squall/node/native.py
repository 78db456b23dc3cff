"""The native runtime: containers forked from zygotes into namespaces, roots and groups of their own. Needs root.

Creating one is: take a shell (one that was made ahead of need, or a new one), dress it, let it seal itself, check its
walls from the host. Owns what it makes and undoes it: processes, groups, scratch, mounts of zygotes, leases. Keeps no
truth the kernel does not have; what an earlier life of the same home left is swept at `start`. Must never hand a
container out that did not pass `zygote.check_walls`. Contract: `tests/contract/test_runtime.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import json
import os
import re
import resource
import secrets
import signal
import struct
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from squall import _linux
from squall._observe import Logger
from squall.exception import ConflictError, Error, InternalError, InvalidError
from squall.node import claims, linux, privileges, rootfs
from squall.node.cgroups import Hierarchies, parent_name, sweep
from squall.node.empty_network import EmptyNetwork
from squall.node.eviction import Standing, evict
from squall.node.layers import Damaged, Layer, Layers
from squall.node.linux import StepError
from squall.node.removal import CLOSE_SECONDS, Removals
from squall.node.rootfs import Root
from squall.node.runtime import (
    RUNNER_ENTRY,
    Build,
    Container,
    ContainerIO,
    Exit,
    Lease,
    NetworkPort,
    Runtime,
    identity,
    passed_environment,
)
from squall.node.settings import HostSettings
from squall.node.trial import find_problems
from squall.node.zygote import (
    ENVIRONMENT,
    SHELL_TIMEOUT,
    Channel,
    Shell,
    Zygote,
    ZygotePlan,
    check_walls,
    fork_shell,
    image_bootstrap,
    join_and_exec,
)
from squall.protocol.images import Settings, check_image, settings_of
from squall.protocol.messages import ContainerSpec, ImageSpec

PARALLEL_CREATIONS = 8
SPARE_SHELLS = 2
"""Made ahead of need per zygote: joining a group after a pause costs 6-28 ms, which no call should wait for."""
REFILL_DELAY = 0.05
_LOCK_TIMEOUT = 10.0
SOURCE = "/src"
"""Where a container finds the bundle of its function's source."""
RUNNER_FD = 3
CONTROL_FD = 4
"""A container's runner finds its socket there."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_log = Logger("native")


class _Workspace:
    """What containers of one workspace share: an id range, the user namespace that maps it, a scratch directory."""

    def __init__(self, name: str, number: int, scratch: Path) -> None:
        self.name = name
        self.first_id = privileges.id_base(number)
        self.scratch = scratch
        scratch.mkdir(parents=True, exist_ok=True)
        scratch.chmod(0o755)
        rootfs.spread_directories(scratch)
        self.userns = linux.make_user_namespace(self.first_id)
        self.nurseries: dict[str, _Nursery] = {}

    def close(self) -> None:
        os.close(self.userns)


class _Nursery:
    """One zygote, replaced when it dies, and the shells made ahead from it."""

    def __init__(
        self, workspace: _Workspace, root: Root, settings: Settings | None = None, layers: tuple[Layer, ...] = ()
    ) -> None:
        self.workspace = workspace
        self.root = root
        self.layers = layers
        """Held while this lives."""
        self.settings = settings or Settings()
        self.environment = {**dict(root.environment), **self.settings.env}
        self.used_at = time.monotonic()
        self.memory_bytes = 0
        """Of its zygote and the shells made ahead, as last measured."""
        self.is_closed = False
        self.users = 0
        """Containers that were made from it and live, and those in the making."""
        self.tree: Path | None = None
        self.zygote: Zygote | None = None
        self.spares: deque[Shell] = deque()
        self.starting = asyncio.Lock()
        self.refill: asyncio.Task[None] | None = None
        self.source: Path | None = None
        """Of the last container that was made."""


class NativeContainer(Container):
    def __init__(
        self, runtime: NativeRuntime, spec: ContainerSpec, shell: Shell, network: tuple[NetworkPort, Lease]
    ) -> None:
        self.container_id = spec.container_id
        self.pid = shell.pid
        self.steps: dict[str, float] = {}
        self._runtime = runtime
        self._spec = spec
        self._shell = shell
        self._network = network
        self._kill_reason = ""
        self._exit: asyncio.Task[Exit] | None = None
        self.nursery: _Nursery | None = None

    def watch(self) -> None:
        """From now on its end is noticed and everything of it undone, whether somebody waits or not."""
        self._exit = asyncio.get_running_loop().create_task(self._finish())

    async def wait(self) -> Exit:
        if self._exit is None:
            raise InternalError(f"container `{self.container_id}` was waited for before it stood")
        return await asyncio.shield(self._exit)

    async def _finish(self) -> Exit:
        status = await asyncio.shield(self._shell.ended)
        end = self._judge(status)
        port, lease = self._network
        with contextlib.suppress(Exception):
            port.release(lease)
        try:
            await self._runtime.undo(self._shell)
        except Exception as error:
            _log.error("container left something behind", container=self.container_id, error=str(error))
        self._runtime.forget(self)
        return end

    def _judge(self, status: int) -> Exit:
        group = self._shell.group
        usage, oom = group.usage(), group.oom_kills() > 0
        for data, pid in self._shell.channel.pending():
            # What init said of the runner decides between an exit code and a signal; it only ever speaks of itself.
            if pid == self.pid and len(data) == 4 and os.WIFEXITED(status):
                status = _believable(struct.unpack("<i", data)[0], status)
        code = os.waitstatus_to_exitcode(status)
        was_killed = code == -signal.SIGKILL
        oom = oom and was_killed
        if oom and not self._kill_reason:
            reason = self._oom_reason()
        elif was_killed and self._kill_reason:
            reason, oom = self._kill_reason, False
        elif code < 0:
            reason = f"killed by signal {_signal_name(-code)}"
        else:
            reason = f"exited with code {code}"
        return Exit(code if code >= 0 else 128 - code, reason, oom, usage)

    def _oom_reason(self) -> str:
        if self._spec.memory_limit_mib:
            return f"out of memory: the limit is {self._spec.memory_limit_mib} MiB"
        return "out of memory: the containers of this node reached what it has for them"

    def signal(self, signum: int) -> None:
        self._shell.send_signal(signum)

    def kill(self, reason: str) -> None:
        if self._shell.is_alive and not self._kill_reason:
            self._kill_reason = reason
        self._shell.send_signal(signal.SIGKILL)

    def usage(self) -> dict[str, float]:
        if not self._shell.is_alive:
            return {}
        usage = self._shell.group.usage()
        usage.pop("memory_peak_bytes", None)
        return usage

    async def exec(self, argv: Sequence[str], *, stdin: int, stdout: int, stderr: int, workdir: str, tty: bool) -> int:
        if not self._shell.is_alive or self._shell.request.get("keep"):
            raise ConflictError(f"exec in container `{self.container_id}`: it is gone")
        runtime = self._runtime
        runtime.joining += 1
        try:
            pid = await join_and_exec(self._shell, list(argv), (stdin, stdout, stderr), workdir or "/root", tty)
            runtime.exec_pids.add(pid)
        finally:
            runtime.joining -= 1
        return pid


def _believable(claimed: int, status: int) -> int:
    """The runner's wait status as init tells it, if init ended with the code that goes with it."""
    if not 0 <= claimed <= 0xFFFF or os.WIFSTOPPED(claimed):
        return status
    try:
        code = os.waitstatus_to_exitcode(claimed)
    except ValueError:  # no status the kernel would give, like 0xFFFF
        return status
    return claimed if os.WEXITSTATUS(status) == (code if code >= 0 else 128 - code) else status


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


# ---- the runtime ------------------------------------------------------------------------------------------------


class NativeRuntime(Runtime):
    name = "native"

    def __init__(
        self, home: Path, network: NetworkPort | None = None, *, entry: str = RUNNER_ENTRY, zygotes_bytes: int = 0
    ) -> None:
        self.node_dir = Path(home).resolve() / "node"
        self.home = Path(home)
        self.parent = parent_name(self.home)
        self.hierarchies = Hierarchies.detect()
        self.executor = ThreadPoolExecutor(4, thread_name_prefix="squall-native")
        self.removals = Removals()
        self._network = network
        self._empty = EmptyNetwork()
        self._entry = entry
        self._workspaces: dict[str, _Workspace] = {}
        self._zygotes_bytes = zygotes_bytes or node_bounds()["memory_bytes"] // 8
        """Memory for the zygotes of images, with what was made ahead from them."""
        self._host_root: Root | None = None
        self.layers = Layers(self.node_dir / "layers")
        self._settings: HostSettings | None = None
        self._containers: dict[str, NativeContainer] = {}
        self._slots = asyncio.Semaphore(PARALLEL_CREATIONS)
        self._creating = 0
        self._numbers = itertools.count(1)
        self.exec_pids: set[int] = set()
        """Children that whoever asked for an exec will reap, so nobody else may."""
        self.joining = 0
        """Execs under way, whose children are not yet known by number."""
        self._lock = self._claim = -1
        self._closed = False
        self._closing: set[asyncio.Task[None]] = set()
        self._reading = asyncio.Lock()

    @classmethod
    def problems(cls, home: Path | None = None) -> list[str]:
        return find_problems(home)

    def warnings(self) -> list[str]:
        found = self.hierarchies.warnings()
        skipped = self._host_root.skipped if self._host_root is not None else ()
        return found + [f"import path `{path}` is not shown to containers: too much would be" for path in skipped]

    # -- life --

    async def start(self) -> None:
        if not linux.has_private_mounts():
            raise InternalError("the native runtime was started outside a private mount namespace")
        await self._open_home()
        try:
            await self._prepare()
        except BaseException:
            await self.close()
            raise

    async def _open_home(self) -> None:
        for name in ("layers", "scratch", "mounts", "leftover"):
            (self.node_dir / name).mkdir(parents=True, exist_ok=True)
        self.node_dir.chmod(0o700)  # it holds tenants' files, setuid ones too
        self._lock = await self._take_lock()
        self._claim = await asyncio.get_running_loop().run_in_executor(self.executor, claims.claim, self.home)

    async def _prepare(self) -> None:
        _linux.prctl(_linux.PR_SET_CHILD_SUBREAPER, 1)
        _raise_descriptor_limit()
        await asyncio.get_running_loop().run_in_executor(self.executor, self._sweep)
        await asyncio.get_running_loop().run_in_executor(self.executor, self.layers.open)
        for leftover in (self.node_dir / "leftover").iterdir():
            self.removals.start(leftover)
        self.hierarchies.prepare(self.parent).bound(**node_bounds())
        rootfs.make_device_template(self.node_dir / "mounts" / "dev")
        nursery = await self._nursery(ContainerSpec("co-warm"))
        await self._ready_zygote(nursery)
        self._schedule_refill(nursery)

    async def _take_lock(self) -> int:
        """One agent per home: an earlier one may still be dying, so wait a little."""
        fd = os.open(self.node_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + _LOCK_TIMEOUT
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return fd
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(fd)
                    raise ConflictError(
                        f"start the native runtime in `{self.node_dir}`: another agent uses it",
                        hint="stop that one, or set SQUALL_HOME to another directory",
                    ) from None
                await asyncio.sleep(0.05)

    def _sweep(self) -> None:
        """Undo what an earlier agent of this home left. Its mounts went with its mount namespace."""
        count = sweep(self.hierarchies, self.parent)
        if count:
            _log.info("swept what an earlier agent left", groups=count)
        for name in claims.sweep(self.hierarchies):
            _log.info("removed the groups of a home that is gone", group=name)
        for workspace in (self.node_dir / "scratch").iterdir():
            # Out of the way at once: how long deleting takes is the tenants' doing, and no start waits for it.
            workspace.rename(self.node_dir / "leftover" / secrets.token_hex(8))

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        deadline = time.monotonic() + 2 * SHELL_TIMEOUT
        while self._creating and time.monotonic() < deadline:  # noqa: ASYNC110 - a counter, looked at once in a life
            await asyncio.sleep(0.005)
        for container in list(self._containers.values()):
            container.kill("the node is shutting down")
        waits = [container.wait() for container in list(self._containers.values())]
        await asyncio.gather(*waits, return_exceptions=True)
        await asyncio.gather(*self._closing, return_exceptions=True)
        for workspace in self._workspaces.values():
            for nursery in workspace.nurseries.values():
                await self._close_nursery(nursery)
            workspace.close()
        self._empty.close()
        await self.removals.close()
        if self._lock >= 0:
            await asyncio.get_running_loop().run_in_executor(self.executor, self._close_files)
        self.executor.shutdown()
        linux.reap_strays(privileges.id_base(0), set())
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _close_files(self) -> None:
        rootfs.unmount(self.node_dir / "mounts" / "dev")
        sweep(self.hierarchies, self.parent)
        self.hierarchies.group(self.parent).remove()
        claims.release(self._claim, self.home)
        deadline = time.monotonic() + CLOSE_SECONDS
        for path in (self.node_dir / "scratch", self.node_dir / "mounts"):
            for entry in path.iterdir():
                try:
                    rootfs.remove_tree(entry, deadline)
                except OSError as error:
                    _log.error("files are left until the next start", path=str(entry), error=str(error))

    async def _close_nursery(self, nursery: _Nursery) -> None:
        nursery.is_closed = True
        if nursery.refill is not None:
            nursery.refill.cancel()
            await asyncio.gather(nursery.refill, return_exceptions=True)
        for shell in nursery.spares:
            shell.send_signal(signal.SIGKILL)
        for shell in nursery.spares:
            await self.undo(shell)
        nursery.spares.clear()
        if nursery.zygote is not None:
            await nursery.zygote.close("the node is shutting down")
        if nursery.tree is not None:
            rootfs.unmount_tree(nursery.tree)
        self.layers.release(nursery.layers)

    async def undo(self, shell: Shell) -> None:
        await shell.undo(self.executor, self.removals)

    def forget(self, container: NativeContainer) -> None:
        if self._containers.get(container.container_id) is container:
            del self._containers[container.container_id]
        if container.nursery is not None:
            container.nursery.users -= 1
            if container.nursery.layers and not container.nursery.users and not self._closed:
                self._evict()
            container.nursery = None

    # -- workspaces, zygotes, shells --

    def _workspace(self, name: str) -> _Workspace:
        found = self._workspaces.get(name)
        if found is None:
            if not _NAME.fullmatch(name):
                raise InvalidError(f"make a container of workspace {name!r}: not a name")
            scratch = self.node_dir / "scratch" / name
            found = self._workspaces[name] = _Workspace(name, self._id_number(name), scratch)
        return found

    def _id_number(self, workspace: str) -> int:
        """The workspace's place among id ranges, the same over restarts."""
        path = self.node_dir / "ids.json"
        known: dict[str, int] = json.loads(path.read_text()) if path.exists() else {}
        if workspace not in known:
            known[workspace] = max(known.values(), default=privileges.first_index(str(self.node_dir)) - 1) + 1
            temporary = path.with_suffix(".new")
            temporary.write_text(json.dumps(known))
            temporary.rename(path)
        return known[workspace]

    async def _nursery(self, spec: ContainerSpec) -> _Nursery:
        workspace = self._workspace(spec.workspace)
        if spec.image.kind != "host":
            return await self._image_nursery(workspace, spec.image)
        found = workspace.nurseries.get("host")
        if found is None:
            if self._host_root is None:
                self._host_root = rootfs.host_root(self.node_dir)
            found = workspace.nurseries["host"] = _Nursery(workspace, self._host_root)
        return found

    async def _image_nursery(self, workspace: _Workspace, image: ImageSpec) -> _Nursery:
        """Of an image whose layers are all here; made anew when one of them was built again since."""
        check_image(image)
        host = await self.host_settings()
        layers = self.layers.resolve(image)
        settings = settings_of(image.steps)
        # Local files that are only shown are no part of it: an edit costs no new zygote.
        seen = [settings.env, settings.workdir, settings.entrypoint]
        name = json.dumps([[layer.path.name for layer in layers], *seen], sort_keys=True)
        found = workspace.nurseries.get(name)
        if found is None:
            mounts = [*rootfs.squall_mounts(), *host.mounts]
            root = rootfs.image_root(self.node_dir, [layer.tree for layer in layers], mounts, host.environment)
            found = workspace.nurseries[name] = _Nursery(workspace, root, settings, layers)
            self.layers.hold(layers)
            self._evict()
        found.used_at = time.monotonic()
        return found

    async def host_settings(self) -> HostSettings:
        """Of this machine, for builds and for containers of images; read when first needed, in a thread."""
        async with self._reading:
            if self._settings is None:
                self._settings = await asyncio.get_running_loop().run_in_executor(self.executor, HostSettings.read)
        return self._settings

    def host_settings_now(self) -> HostSettings:
        """The same, once they were read."""
        assert self._settings is not None
        return self._settings

    async def _weigh(self, nursery: _Nursery) -> None:
        """Measure what a nursery takes, now that it is complete, and make room when that is too much."""
        if not nursery.layers or nursery.zygote is None:
            return
        pids = [nursery.zygote.pid, *(shell.pid for shell in nursery.spares)]
        loop = asyncio.get_running_loop()
        sizes = [await loop.run_in_executor(self.executor, linux.memory_share, pid) for pid in pids]
        nursery.memory_bytes = sum(sizes)
        self._evict()

    def _evict(self) -> None:
        """End the zygotes of images that memory is wanted for."""
        places: dict[str, tuple[_Workspace, str]] = {}
        standing = []
        for workspace in self._workspaces.values():
            for name, nursery in workspace.nurseries.items():
                if not nursery.layers:
                    continue
                places[key := f"{workspace.name}/{name}"] = workspace, name
                busy = bool(nursery.users) or nursery.starting.locked()
                standing.append(Standing(key, nursery.used_at, nursery.memory_bytes, busy))
        for key, reason in evict(standing, self._zygotes_bytes):
            workspace, name = places[key]
            _log.info("a zygote goes", reason=reason)
            task = asyncio.get_running_loop().create_task(self._close_nursery(workspace.nurseries.pop(name)))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def retire(self, keys: set[str]) -> None:
        """End the zygotes of images that have one of these layers, unless a container of theirs may be in the making.

        Containers that run keep what they see: their mounts hold the files, and nothing of a running app is retired.
        """
        for workspace in self._workspaces.values():
            for name, nursery in list(workspace.nurseries.items()):
                is_busy = bool(nursery.users) or nursery.starting.locked()
                if any(layer.key in keys for layer in nursery.layers) and not is_busy:
                    del workspace.nurseries[name]
                    await self._close_nursery(nursery)

    async def warm(self, image: ImageSpec, workspace: str = "main") -> None:
        """Have a zygote of an image ready, and containers made ahead. Raises StepError when its Python will not do."""
        nursery = await self._nursery(ContainerSpec("co-warm", workspace, image))
        await self._ready_zygote(nursery)
        self._schedule_refill(nursery)

    async def _ready_zygote(self, nursery: _Nursery) -> Zygote:
        async with nursery.starting:
            if nursery.zygote is not None and nursery.zygote.is_alive:
                return nursery.zygote
            if nursery.is_closed:  # it made room meanwhile; who holds it would keep it for ever
                raise StepError("start-zygote", "its image is no longer kept ready: try again")
            if nursery.zygote is not None:
                await nursery.zygote.close("it died and is made anew")
                self._reap_strays()
                asyncio.get_running_loop().call_later(2 * SHELL_TIMEOUT, self._reap_strays)
            if nursery.tree is None:
                await self._check_layers(nursery)
                nursery.tree = self._mount_tree(nursery)
            group = self.hierarchies.group(self.parent, f"zygote-{next(self._numbers)}")
            group.create()
            group.bound(memory_bytes=0, pids=1024)
            plan = ZygotePlan(
                root=nursery.root,
                tree=nursery.tree,
                userns=nursery.workspace.userns,
                first_id=nursery.workspace.first_id,
                group=group,
                entry=self._entry,
                environment=nursery.environment,
            )
            zygote = Zygote(plan, self.executor)
            await zygote.start()
            nursery.zygote = zygote
            return zygote

    async def _check_layers(self, nursery: _Nursery) -> None:
        """Once in this agent's life, before anything of a layer is run. Raises Damaged."""
        for layer in nursery.layers:
            if self.layers.is_checked(layer):
                continue
            wrong = await asyncio.get_running_loop().run_in_executor(self.executor, self.layers.check, layer)
            if wrong:
                self.layers.quarantine(layer, wrong)
                raise Damaged(f"layer `{layer.title}` is damaged: {wrong}", hint="it is built again when next wanted")

    def _mount_tree(self, nursery: _Nursery) -> Path:
        mounts = self.node_dir / "mounts"
        # A place of its own: one of the same root may be on its way out, and its unmounting would take this along.
        target = mounts / f"{nursery.workspace.name}-{nursery.root.key}-{next(self._numbers)}"
        rootfs.mount_tree(
            nursery.root,
            target,
            userns=nursery.workspace.userns,
            scratch=nursery.workspace.scratch,
            devices=mounts / "dev",
        )
        return target

    def _reap_strays(self) -> None:
        if self._closed:
            return
        if self.joining:
            asyncio.get_running_loop().call_later(1.0, self._reap_strays)
            return
        linux.reap_strays(privileges.id_base(0), self._known_pids())

    def _known_pids(self) -> set[int]:
        self.exec_pids = {pid for pid in self.exec_pids if os.path.exists(f"/proc/{pid}")}
        known = {container.pid for container in self._containers.values()} | self.exec_pids
        for workspace in self._workspaces.values():
            for nursery in workspace.nurseries.values():
                known.update(shell.pid for shell in nursery.spares)
                if nursery.zygote is not None:
                    known.add(nursery.zygote.pid)
        return known

    async def _fork_shell(self, nursery: _Nursery) -> Shell:
        """A new shell; when the zygote dies or hangs over it, once more from a new zygote."""
        zygote = await self._ready_zygote(nursery)
        try:
            return await self._fork_shell_from(nursery, zygote)
        except StepError as error:
            if zygote.is_alive:
                raise
            _log.warning("a zygote failed and is made anew", error=error.message)
        return await self._fork_shell_from(nursery, await self._ready_zygote(nursery))

    async def _fork_shell_from(self, nursery: _Nursery, zygote: Zygote) -> Shell:
        name = f"c{next(self._numbers)}"
        shell = Shell(name, self.hierarchies.group(self.parent, name), nursery.workspace.scratch / name, Channel())
        try:
            await fork_shell(zygote, shell, self.executor)
            return shell
        except BaseException as error:
            await self.undo(shell)
            if isinstance(error, StepError) and error.step == "fork-shell":
                zygote.kill()  # it is gone, did not fork in time, or lied
            raise

    # -- spares --

    def _schedule_refill(self, nursery: _Nursery) -> None:
        if nursery.refill is None or nursery.refill.done():
            nursery.refill = asyncio.get_running_loop().create_task(self._refill(nursery))

    async def _refill(self, nursery: _Nursery) -> None:
        """Make shells ahead once nobody waits for one: a pause first, as the last creation's code now runs."""
        while len(nursery.spares) < SPARE_SHELLS and not self._closed and not nursery.is_closed:
            await asyncio.sleep(REFILL_DELAY)
            if self._creating:
                continue
            self._compile_source(nursery)
            try:
                shell = await self._fork_shell(nursery)
            except (Error, OSError) as error:
                _log.warning("no container could be made ahead", error=str(error))
                return
            nursery.spares.append(shell)
        await self._weigh(nursery)

    def _compile_source(self, nursery: _Nursery) -> None:
        """Where more containers may be made of a bundle, its modules are compiled once for all of them."""
        source, nursery.source = nursery.source, None
        if source is None or nursery.zygote is None or nursery.settings.entrypoint:
            return  # a container that begins with an entrypoint inherits nothing
        try:
            nursery.zygote.compile(source)
        except OSError as error:
            _log.warning("a bundle is not compiled ahead", source=str(source), error=str(error))

    async def _take_shell(self, nursery: _Nursery) -> Shell:
        while nursery.spares:
            shell = nursery.spares.popleft()
            if not shell.has_ended():
                shell.steps = {}
                return shell
            await self.undo(shell)
        return await self._fork_shell(nursery)

    # -- create --

    async def create(
        self, spec: ContainerSpec, io: ContainerIO, source: Path | None, shown: Sequence[tuple[Path, str]] = ()
    ) -> Container:
        if not _NAME.fullmatch(spec.container_id):
            raise InvalidError(f"make container {spec.container_id!r}: not an id")
        if spec.container_id in self._containers:
            raise ConflictError(f"make container `{spec.container_id}`: it exists")
        if self._closed:
            raise ConflictError(f"make container `{spec.container_id}`: the node is shutting down")
        asked = time.monotonic()
        nursery = await self._nursery(spec)
        self._creating += 1
        nursery.users += 1
        try:
            async with self._slots:
                waited = time.monotonic()
                trees = [*shown, *([(source, SOURCE)] if source is not None else [])]
                container = await self._create_from_any(nursery, spec, io, trees)
        except BaseException as error:
            nursery.users -= 1
            if isinstance(error, OSError):
                raise StepError(f"make container `{spec.container_id}`", error) from error
            raise
        finally:
            self._creating -= 1
            if not self._closed:
                self._schedule_refill(nursery)
        container.nursery = nursery
        nursery.source = source
        container.steps = {"queue": (waited - asked) * 1000, **container.steps}
        return container

    async def _create_from_any(
        self, nursery: _Nursery, spec: ContainerSpec, io: ContainerIO, trees: Sequence[tuple[Path, str]]
    ) -> NativeContainer:
        """A shell made ahead may have been killed while it waited: then another is taken, the last one made now."""
        for _ in range(SPARE_SHELLS + 1):
            is_spare = bool(nursery.spares)
            try:
                return await self._create(nursery, spec, io, trees)
            except StepError as error:
                if not is_spare or error.step != "dress":
                    raise
                _log.warning("a container made ahead failed and another is taken", error=error.message)
        raise StepError("dress", "all containers made ahead failed")

    async def _create(
        self, nursery: _Nursery, spec: ContainerSpec, io: ContainerIO, trees: Sequence[tuple[Path, str]]
    ) -> NativeContainer:
        started = time.monotonic()
        port: NetworkPort = self._network if spec.network and self._network is not None else self._empty
        shell = await self._take_shell(nursery)
        stood = time.monotonic()
        lease: Lease | None = None
        try:
            lease = await port.lease(spec.workspace, nursery.workspace.userns)
            leased = time.monotonic()
            shell.group.limit(spec)
            sealed = await self._dress(nursery, shell, spec, io, trees, lease)
            assert nursery.zygote is not None
            check_walls(shell, nursery.zygote, lease.netns_fd)
        except BaseException:
            try:
                await self.undo(shell)
            finally:
                if lease is not None:
                    port.release(lease)
            raise
        container = NativeContainer(self, spec, shell, (port, lease))
        done = time.monotonic()
        container.steps = {
            "shell": (stood - started) * 1000 - sum(shell.steps.values()),
            **shell.steps,
            "network": (leased - stood) * 1000,
            "dress": (sealed - leased) * 1000,
            "check": (done - sealed) * 1000,
        }
        self._containers[spec.container_id] = container
        container.watch()
        return container

    async def _dress(
        self,
        nursery: _Nursery,
        shell: Shell,
        spec: ContainerSpec,
        io: ContainerIO,
        trees: Sequence[tuple[Path, str]],
        lease: Lease,
    ) -> float:
        """Give a shell what makes it this container; returns when it has sealed itself, by its own word."""
        hostname = (spec.hostname or spec.container_id)[:63]
        fds = {"runner": io.runner, "stdout": io.stdout, "stderr": io.stderr, "network": lease.netns_fd}
        if io.control >= 0:
            fds["control"] = io.control
        opened: list[int] = []
        try:
            for number, (path, target) in enumerate(trees):
                name = "source" if target == SOURCE else f"tree-{number}"
                fds[name] = rootfs.source_tree(path)
                opened.append(fds[name])
            shell.environment = {**ENVIRONMENT, **passed_environment(), **nursery.environment}
            message = {
                "fds": list(fds),
                "hostname": hostname,
                "environment": {**shell.environment, **identity(spec)},
                "files": _files(nursery.root.overrides, lease, hostname),
                "workdir": nursery.settings.workdir,
                "trees": [[f"tree-{n}", target] for n, (_, target) in enumerate(trees) if target != SOURCE],
                "wrapped": self._wrapped(nursery, SOURCE if "source" in fds else None, "control" in fds),
            }
            return await self._seal(shell, message, list(fds.values()))
        finally:
            linux.close_fds(opened)

    def _wrapped(self, nursery: _Nursery, source: str | None, controlled: bool) -> list[str]:
        """The command that becomes the runner, by way of the image's entrypoint; nothing where it has none."""
        if not nursery.settings.entrypoint:
            return []
        control = f", {CONTROL_FD}" if controlled else ""
        call = f"process({RUNNER_FD}, {source!r}, {self._entry!r}{control})"
        return [
            *nursery.settings.entrypoint,
            nursery.root.python,
            "-c",
            image_bootstrap(nursery.root.import_paths, call),
        ]

    async def _seal(self, shell: Shell, message: Mapping[str, object], fds: list[int]) -> float:
        try:
            shell.channel.send(message, fds)
        except OSError as error:
            raise StepError("dress", f"it takes no message: {error}") from error
        answer = await shell.receive("dress")
        if answer.get("sealed") is not True:
            raise StepError("dress", "it did not say that it is sealed")
        return time.monotonic()

    # -- builds --

    async def build(self, build: Build) -> Container:
        """Run one command of a build over layers, behind a container's walls; `build.harvest` gets what it wrote.

        The shell is forked from the zygote of `Image.host()`, in which no code of a tenant ever ran: so the layers'
        mounts, which it attaches itself, were never in sight of the image's own code before the old root is gone.
        """
        if self._closed:
            raise ConflictError(f"run build `{build.spec.container_id}`: the node is shutting down")
        spec = build.spec
        nursery = await self._nursery(ContainerSpec(spec.container_id, spec.workspace))
        name = f"b{next(self._numbers)}"
        shell = Shell(name, self.hierarchies.group(self.parent, name), nursery.workspace.scratch / name, Channel())
        self._creating += 1
        lease: Lease | None = None
        port: NetworkPort = self._network if self._network is not None else self._empty
        opened: list[int] = []
        try:
            async with self._slots:
                zygote = await self._ready_zygote(nursery)
                self._open_layers(build, shell, nursery.workspace.userns, opened)
                await fork_shell(zygote, shell, self.executor)
                lease = await port.lease(spec.workspace, nursery.workspace.userns)
                shell.group.limit(spec)
                await self._dress_build(nursery, shell, build, lease, opened)
                check_walls(shell, zygote, lease.netns_fd, privileges.BUILD_CAPABILITIES)
                _begin(shell)
        except BaseException:
            await self.undo(shell)
            if lease is not None:
                port.release(lease)
            raise
        finally:
            linux.close_fds(opened)
            self._creating -= 1
        shell.harvest = build.harvest
        container = NativeContainer(self, spec, shell, (port, lease))
        container.steps = dict(shell.steps)
        self._containers[spec.container_id] = container
        container.watch()
        return container

    def _open_layers(self, build: Build, shell: Shell, userns: int, opened: list[int]) -> None:
        shell.request = {"keep": privileges.BUILD_CAPABILITIES}
        if build.layers is None:
            return
        for layer in build.layers:
            opened.append(rootfs.layer_tree(layer, userns))
        shell.layers = list(opened)
        shell.request.update(binds=[], overrides=dict(rootfs.IMAGE_OVERRIDES))

    async def _dress_build(
        self, nursery: _Nursery, shell: Shell, build: Build, lease: Lease, opened: list[int]
    ) -> None:
        fds = {"stdout": build.output, "stderr": build.output, "network": lease.netns_fd}
        trees = []
        for number, (path, target, writable) in enumerate(build.mounts):
            fd = rootfs.cache_tree(path, nursery.workspace.userns) if writable else rootfs.source_tree(path)
            opened.append(fd)
            fds[f"tree-{number}"] = fd
            trees.append([f"tree-{number}", target])
        overrides = nursery.root.overrides if build.layers is None else rootfs.IMAGE_OVERRIDES
        message: dict[str, object] = {
            "fds": list(fds),
            "hostname": "build",
            "environment": {**ENVIRONMENT, **build.environment},
            "files": _files(overrides, lease, "build"),
            "trees": trees,
            "workdir": build.workdir,
            "command": build.command,
        }
        await self._seal(shell, message, list(fds.values()))


def _begin(shell: Shell) -> None:
    """Let a build run its command. It waits for this: a short one would be over before its walls were looked at."""
    try:
        shell.channel.send({"begin": True})
    except OSError as error:
        raise StepError("begin", f"it takes no message: {error}") from error


def _files(targets: Mapping[str, str], lease: Lease, hostname: str) -> dict[str, str]:
    texts = {
        "hosts": f"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost\n{lease.address}\t{hostname}\n",
        "hostname": f"{hostname}\n",
        "resolv.conf": lease.resolv_conf,
    }
    return {targets[name]: text for name, text in texts.items() if name in targets}


def _raise_descriptor_limit() -> None:
    """A container takes about five descriptors here, and the usual soft limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def node_bounds() -> dict[str, int]:
    """What all containers of the node get together: all but a share that the node itself and its kernel need."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with open("/proc/sys/kernel/pid_max", encoding="ascii") as file:
        pids = int(file.read())
    return {"memory_bytes": total - max(256 << 20, total // 20), "pids": pids - max(1024, pids // 8)}
