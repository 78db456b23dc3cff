"""HAND: the agent of a machine. Keeps the server's word: makes and ends containers, reports what became of them.

It decides no policy and trusts no container. Its link to the server is one frame stream; runner sockets go over by
SCM_RIGHTS on a second, SEQPACKET socket. Containers die with the agent (PDEATHSIG) and a new agent sweeps what is
left before it takes work, so there is never a container nobody owns. When the server is gone, or nothing was heard of
it for three beats, the agent keeps what it has for `reattach_grace` seconds and looks for it or the next one: it
registers there with its containers and gives each runner a new socket that needs one. If none comes it undoes
everything, removes the sockets of the server that was killed, and ends. Tested in `tests/integration/test_kills.py`,
`test_reattach.py` and `tests/faults/test_partitions.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import socket
import sys
import termios
import time
import traceback
from collections import deque
from collections.abc import Sequence
from typing import Any

from squall._observe import Logger
from squall.config import Config
from squall.exception import BuildError, Error, InvalidError, ResourceExhaustedError, ServiceError
from squall.node import reports, sources
from squall.node.builder import Builder
from squall.node.execs import Execs
from squall.node.layers import Absent, total_size
from squall.node.native import NativeRuntime
from squall.node.network import Network
from squall.node.runtime import Container, ContainerIO, Exit, Runtime
from squall.protocol.images import build_id_of, settings_of
from squall.protocol.messages import (
    BuildImage,
    ContainerEvent,
    ContainerOutput,
    ContainerSpec,
    ExecData,
    Failure,
    Hello,
    Message,
    NodeReport,
    Ping,
    Register,
    Reply,
    StartContainer,
    StartExec,
    StopContainer,
    Welcome,
    decode,
)
from squall.protocol.requests import BuildDone, CancelBuild, Pruned, PruneImages, VerifyImage
from squall.protocol.resumption import EndedContainer, HeldContainer, RegisterAgain
from squall.protocol.transport import FrameStream, payload_for, widen

log = Logger("agent")

OUTPUT_CHUNK_BYTES = 1 << 16
OUTPUT_WINDOW_S = 0.05
OUTPUT_WINDOW_BYTES = 3 << 20
"""What one container may write in that time, 60 MiB/s; then it waits, so that others are not kept waiting."""
LOCK_TRIES = 40
REPORT_INTERVAL = 5.0
DRAIN_SECONDS = 2.0
"""For the last output of a container that has ended."""
DRAIN_ROUNDS = 5
"""Times it gets that long, while it is the server that does not keep up."""
MEET_TIMEOUT = 60.0
"""For the server that started this agent to listen: its Store may be away for half as long."""
MEET_EVERY = 0.01
RETURN_EVERY = 0.05
"""Seconds between two looks for a server, after one was lost."""
IDLE_GRACE = 5.0
"""How long to look for one at most, when there is no container, nor the end of one, that would be lost."""
HAND_OVER_TIMEOUT = 5.0
BEATS_MISSED = 3
REQUEST_TIMEOUT = 30.0
CREATE_LIMIT = 64
"""Creations waiting or under way; the server bounds them too."""


UNWRITTEN_SECONDS = 5.0
"""What ended so long before the server was lost may not have been written down."""
ENDED_LIMIT = 1000
"""Ends of containers that are kept for the next server; the oldest go first."""


class Held:
    """A container the agent has, from the wish for it to its end."""

    def __init__(self, spec: ContainerSpec) -> None:
        self.spec = spec
        self.container_id = spec.container_id
        self.requested_at = time.time()
        self.stood_at = 0.0
        self.container: Container | None = None
        self.control: socket.socket | None = None
        """Over which its runner gets another socket, when there is another server."""
        self.stop_reason = ""
        self.outputs: set[int] = set()
        """Our ends of its output streams that are not yet at their end."""
        self.window_began = 0.0
        self.window_bytes = 0
        """Written by it since then."""
        self.drained = asyncio.Event()
        self.kill_timer: asyncio.TimerHandle | None = None


class Agent:
    def __init__(
        self, config: Config, runtime: Runtime, network: Network | None = None, warnings: Sequence[str] = ()
    ) -> None:
        self.config = config
        self.runtime = runtime
        self.network = network
        self.warnings = list(warnings)
        self.loop = asyncio.get_running_loop()
        self.stream: FrameStream
        self.handoff_path = config.run_dir / "handoff.sock"
        self.handoff: socket.socket
        self.held: dict[str, Held] = {}
        self._ended: deque[tuple[float, EndedContainer]] = deque(maxlen=ENDED_LIMIT)
        """By when, for a server that comes after this one."""
        self._lost_at = 0.0
        self.connected = asyncio.Event()
        self.ended = asyncio.Event()
        self.reason = ""
        self.agent_id = os.urandom(8).hex()
        """By it the server knows this agent again."""
        self.heartbeat = 0.0
        """Seconds between two signs of life, as the server says; 0: none."""
        self._server_died = False
        self._returning: asyncio.Task[None] | None = None
        self.sources = sources.Sources(config.node_dir / "sources", self.request)
        self.execs = Execs(self)
        self.builder: Builder | None = None
        if isinstance(runtime, NativeRuntime):
            self.builder = Builder(
                runtime, self._send_output, self.sources.read, timeout=config.build_timeout,
                quota_bytes=int(config.images_gib * (1 << 30)),
            )  # fmt: skip
        self._requests: dict[int, tuple[FrameStream, asyncio.Future[tuple[Any, bytes]]]] = {}
        self._next_id = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._creating = asyncio.Semaphore(CREATE_LIMIT)

    # -- life

    async def run(self) -> None:
        """Connect, register, serve until told to end or the server is gone for good; then undo everything."""
        starting = asyncio.ensure_future(self._prepare())
        try:
            if not await self._meet():
                return
            await starting
            unused = self.sources.set_unused_aside()
            await self._register(Register)
            self._spawn(self.sources.remove(unused))
            rounds = [self._spawn(self._report()), self._spawn(self._beat())]
            if self.builder is not None:
                self.builder.start()
            await self.ended.wait()
            for task in rounds:
                task.cancel()
        finally:
            starting.cancel()
            await self._close()

    async def _prepare(self) -> None:
        """Both sweep what an earlier agent left, and neither waits for the other."""
        network = self.network.start() if self.network is not None else asyncio.sleep(0)
        await asyncio.gather(network, self.runtime.start())

    async def _meet(self) -> bool:
        """Connect for the first time. A server starts its agent before it listens itself; whether there was time."""
        deadline = self.loop.time() + MEET_TIMEOUT
        while not self.ended.is_set():
            try:
                self.stream = await self._connect()
                return True
            except OSError:
                if self.loop.time() > deadline:
                    raise
                await asyncio.sleep(MEET_EVERY)
        return False

    async def _connect(self) -> FrameStream:
        handoff = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stream = FrameStream(self.loop, self._on_frame, self._on_lost)
        try:
            handoff.setblocking(False)
            handoff.connect(str(self.handoff_path))
            await self.loop.create_unix_connection(lambda: stream, str(self.config.socket_path))  # type: ignore[type-var]
            welcome, _ = await self.request(Hello("agent"), stream=stream)
        except BaseException:
            handoff.close()
            stream.abort("it came to nothing")
            raise
        self.handoff = handoff
        self.heartbeat = welcome.heartbeat
        return stream

    async def _register(self, kind: type[Register]) -> list[str] | None:
        """Which containers' runners need another socket; None: all."""
        machine = reports.inventory(self.config)
        warnings = self.warnings + self.runtime.warnings()
        if self.network is not None:
            warnings += self.network.warnings()
        message = kind(machine.hostname, machine.cpus, machine.memory_mib, machine.gpus, self.runtime.name, warnings)
        message.agent_id = self.agent_id
        if isinstance(message, RegisterAgain):
            held = self.held.values()
            message.containers = [HeldContainer(h.spec, h.container is not None, h.requested_at) for h in held]
            message.ended = self._unwritten()
        reply, _ = await self.request(message)
        self._ended.clear()
        self.connected.set()
        log.info("registered", runtime=self.runtime.name, cpus=machine.cpus, memory_mib=machine.memory_mib)
        sockets: list[str] | None = reply.data.get("sockets")
        return sockets

    def _unwritten(self) -> list[EndedContainer]:
        return [ended for at, ended in self._ended if at > self._lost_at - UNWRITTEN_SECONDS]

    # -- the next server

    def _grace(self) -> float:
        """Seconds to look for it. What only this agent knows is waited with as long as containers are."""
        if self.held or self._unwritten():
            return self.config.reattach_grace
        return min(IDLE_GRACE, self.config.reattach_grace)

    async def _return(self, reason: str) -> None:
        """Look for a server until the grace is over; it may be the one that was there, which only the network had
        parted from us. What containers write meanwhile stays in their pipes."""
        self._lost_at = self.loop.time()
        grace = self._grace()
        deadline = self._lost_at + grace
        log.warning("the server is gone", reason=reason, containers=len(self.held), grace=grace)
        self.execs.close()
        self.handoff.close()
        while self.loop.time() < deadline and not self.ended.is_set():
            try:
                self.stream = await self._connect()
                await self._hand_over_again(await self._register(RegisterAgain))
            except (OSError, Error) as error:
                if self._returning is not asyncio.current_task():
                    return  # it was there, and is lost again: that is looked after already
                log.debug("no server yet", error=str(error))
                await asyncio.sleep(RETURN_EVERY)
            else:
                self._server_died = False
                return
        self.end(f"connection to the server broke: {reason}")

    async def _hand_over_again(self, wanted: list[str] | None) -> None:
        """Connect each runner, or those that are wanted, with the server that is there now."""
        for held in list(self.held.values()):
            if held.control is None or (wanted is not None and held.container_id not in wanted):
                continue
            server_end, runner_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            with server_end, runner_end:
                for end in (server_end, runner_end):
                    widen(end)
                try:
                    socket.send_fds(held.control, [b"again"], [runner_end.fileno()])
                except OSError as error:  # it does not take what it is sent
                    self._stop(StopContainer(held.container_id, reason=f"its runner cannot be reached: {error}"))
                    continue
                await self._hand_over_late(held.container_id, server_end)

    async def _hand_over_late(self, container_id: str, sock: socket.socket) -> None:
        """`_hand_over` for one of many, which the server takes one by one."""
        deadline = self.loop.time() + HAND_OVER_TIMEOUT
        while True:
            try:
                self._hand_over(container_id, sock)
            except ServiceError:
                if self.stream.closing or self.loop.time() > deadline:
                    raise
                await asyncio.sleep(0.01)
            else:
                return

    def end(self, reason: str) -> None:
        if not self.ended.is_set():
            self.reason = reason
            log.info("ending", reason=reason)
            self.ended.set()

    async def _close(self) -> None:
        if self._returning is not None:
            self._returning.cancel()
        self.connected.set()  # nobody is to wait for another server any more
        for held in list(self.held.values()):
            if held.container is not None:
                held.container.kill("the node agent is ending")
        self.execs.close()
        if self.builder is not None:
            await self.builder.close()
        waiting = [task for task in self._tasks if not task.done()]
        if waiting:
            await asyncio.wait(waiting, timeout=5.0)
        for task in self._tasks:
            task.cancel()
        await self.runtime.close()
        if self.network is not None:
            await self.network.close()
        with contextlib.suppress(AttributeError):
            self.stream.close("the agent ended")
            self.handoff.close()
        if self._server_died:
            await self._remove_dead_sockets()

    def _spawn(self, body: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = self.loop.create_task(body)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task of the agent failed", error=f"{type(error).__name__}: {error}")

    # -- the server's words

    async def request(
        self, message: Message, payload: bytes = b"", stream: FrameStream | None = None
    ) -> tuple[Any, bytes]:
        stream = stream or self.stream
        if stream.closing:
            raise ServiceError(f"connection to the server broke: {stream.closing}")
        self._next_id += 1
        message.id = self._next_id
        future: asyncio.Future[tuple[Any, bytes]] = self.loop.create_future()
        self._requests[message.id] = (stream, future)
        stream.send(message, payload)
        try:
            return await asyncio.wait_for(future, REQUEST_TIMEOUT)
        except asyncio.TimeoutError:
            raise ServiceError(f"the server did not answer `{message.TAG}` within {REQUEST_TIMEOUT:g} s") from None
        finally:
            self._requests.pop(message.id, None)

    def _on_frame(self, stream: FrameStream, header: bytes, payload: bytes) -> None:
        message = decode(header)
        try:
            self._handle(message, payload_for(message, payload))
        except Exception:  # a bug of ours: it costs this message, not the connection and with it every container
            log.error("a message failed", tag=message.TAG, error=traceback.format_exc())

    def _handle(self, message: Message, payload: bytes) -> None:
        if isinstance(message, StartContainer):
            self._spawn(self._start(message))
        elif isinstance(message, StopContainer):
            self._stop(message)
        elif isinstance(message, StartExec):
            self.execs.start(message)
        elif isinstance(message, ExecData):
            self.execs.data(message, payload)
        elif isinstance(message, BuildImage):
            self._spawn(self._build(message))
        elif isinstance(message, (PruneImages, VerifyImage)):
            self._spawn(self._look_after(message))
        elif isinstance(message, CancelBuild):
            if self.builder is not None:
                self.builder.cancel(message.image_id, message.reason)
        elif isinstance(message, (Reply, Failure, Welcome)):
            self._answer(message, payload)
        elif isinstance(message, Ping):
            pass  # that it came was counted
        else:
            log.warning("ignored a message", tag=message.TAG)

    def _answer(self, message: Message, payload: bytes) -> None:
        _, future = self._requests.get(message.re, (None, None))
        if future is None or future.done():
            return
        if isinstance(message, Failure):
            future.set_exception(ServiceError(message.message, hint=message.hint))
        else:
            future.set_result((message, payload))

    async def _beat(self) -> None:
        """Say that this agent lives, and miss a server that says nothing. Beats are counted, not seconds: if it was
        this process that stood still, what the server said meanwhile is read before the next one."""
        missed, seen = 0, (self.stream, 0)
        while True:
            await asyncio.sleep(self.heartbeat or REPORT_INTERVAL)
            if not self.connected.is_set() or not self.heartbeat:
                missed = 0
                continue
            now = (self.stream, self.stream.received)
            missed = missed + 1 if now == seen else 0
            seen = now
            if missed >= BEATS_MISSED:
                self.stream.abort(f"nothing was heard of it for {missed * self.heartbeat:g} s")
            else:
                self.stream.send(Ping())

    def _on_lost(self, stream: FrameStream, reason: str) -> None:
        for asked, future in self._requests.values():
            if asked is stream and not future.done():
                future.set_exception(ServiceError(f"connection to the server broke: {reason}"))
        if self.connected.is_set() and stream is self.stream and not self.ended.is_set():
            self.connected.clear()
            self._server_died = True
            self._returning = self.loop.create_task(self._return(reason))

    async def _remove_dead_sockets(self) -> None:
        """A server that was killed leaves its sockets in the home. That it is gone, and no other there yet, shows by
        its lock; the kernel frees that a moment after our connection."""
        for _ in range(LOCK_TRIES):
            with contextlib.suppress(OSError), (self.config.state_dir / "lock").open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for path in (self.config.socket_path, self.handoff_path):
                    path.unlink(missing_ok=True)
                return
            await asyncio.sleep(0.05)

    # -- containers

    async def _start(self, message: StartContainer) -> None:
        spec = message.spec
        held = self.held[spec.container_id] = Held(spec)
        began = time.perf_counter()
        try:
            async with self._creating:
                container = await self._create(held, message)
        except Exception as error:  # whatever it is: the server waits for ever for one whose end nobody reports
            self._forget(held)
            said, hint = (error.message, error.hint) if isinstance(error, Error) else (_said(error), "")
            if full := reports.full_disk(self.config.home):  # what fails of that says so in a hundred ways
                said, hint = f"{full}: {said}", reports.FREE_HINT
            self._report_exit(held, -1, f"could not be made: {said}", hint=hint)
            return
        steps = dict(container.steps)
        steps["agent"] = (time.perf_counter() - began) * 1000 - sum(steps.values())
        held.container, held.stood_at = container, time.time()
        self.stream.send(ContainerEvent(spec.container_id, "starting", at=time.time(), steps=steps, pid=container.pid))
        if held.stop_reason:
            container.kill(held.stop_reason)
        await self._follow(held, container)

    async def _create(self, held: Held, message: StartContainer) -> Container:
        """A layer that is missing or damaged, as found just before it is used, is built again, once; one may also have
        been pruned after the first look."""
        image = message.spec.image
        if image.kind != "host" and self.builder is not None and not self.builder.layers.has(image):
            await self.builder.ensure(image)
        try:
            return await self._create_once(held, message)
        except Absent:
            if self.builder is None:
                raise
            await self.builder.ensure(image)
        return await self._create_once(held, message)

    async def _create_once(self, held: Held, message: StartContainer) -> Container:
        spec = message.spec
        source = await self.sources.get(spec.source, spec.source_parts) if spec.source else None
        shown = []
        for digest, entry, target in settings_of(spec.image.steps).mounts:
            bundle = await self.sources.get(digest)
            shown.append((bundle / entry if entry else bundle, target))
        server_end, runner_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        control, runner_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        control.setblocking(False)
        out_r, out_w = os.pipe2(os.O_CLOEXEC)
        err_r, err_w = os.pipe2(os.O_CLOEXEC)
        try:
            for end in (server_end, runner_end):  # the container could not
                widen(end)
            self._hand_over(spec.container_id, server_end)
            held.control = control
            io = ContainerIO(runner_end.fileno(), out_w, err_w, runner_control.fileno())
            container = await self.runtime.create(spec, io, source, shown)
        except BaseException:
            os.close(out_r)
            os.close(err_r)
            control.close()
            held.control = None
            raise
        finally:
            server_end.close()
            runner_end.close()
            runner_control.close()
            os.close(out_w)
            os.close(err_w)
        self._read_output(held, "stdout", out_r)
        self._read_output(held, "stderr", err_r)
        return container

    def _hand_over(self, container_id: str, sock: socket.socket) -> None:
        """Give the server its end of the runner's socket. Early, so that it is connected when the runner is ready."""
        try:
            socket.send_fds(self.handoff, [json.dumps({"container_id": container_id}).encode()], [sock.fileno()])
        except OSError as error:
            raise ServiceError(f"handing over the socket of `{container_id}` failed: {error}") from None

    async def _follow(self, held: Held, container: Container) -> None:
        try:
            ended = await container.wait()
        except Exception as error:
            log.error("a container's end could not be followed", container=held.container_id, error=_said(error))
            ended = Exit(-1, f"its end could not be followed: {_said(error)}")
        if held.kill_timer is not None:
            held.kill_timer.cancel()
        await self._drain(held)
        self._forget(held)
        reason = held.stop_reason if held.stop_reason and not ended.oom else ended.reason
        self._report_exit(held, ended.code, reason, oom=ended.oom, usage=ended.usage)

    def _forget(self, held: Held) -> None:
        self.held.pop(held.container_id, None)
        if held.control is not None:
            held.control.close()
            held.control = None

    def _report_exit(
        self,
        held: Held,
        code: int,
        reason: str,
        *,
        oom: bool = False,
        usage: dict[str, float] | None = None,
        hint: str = "",
    ) -> None:
        reason = f"{reason} ({hint})" if hint else reason
        event = ContainerEvent(held.container_id, "exited", at=time.time(), exit_code=code, oom=oom, reason=reason)
        event.usage = usage or {}
        ended = EndedContainer(held.spec, held.requested_at, held.stood_at, event.at, code, reason, event.usage)
        self._ended.append((self.loop.time(), ended))
        self.stream.send(event)

    def _stop(self, message: StopContainer) -> None:
        held = self.held.get(message.container_id)
        if held is None:
            return
        held.stop_reason = held.stop_reason or message.reason or "stopped"
        container = held.container
        if container is None:
            return  # killed as soon as it stands
        if message.grace <= 0:
            container.kill(held.stop_reason)
            return
        container.signal(signal.SIGTERM)
        deadline = self.loop.time() + message.grace
        if held.kill_timer is not None:
            if held.kill_timer.when() <= deadline:
                return
            held.kill_timer.cancel()
        held.kill_timer = self.loop.call_at(deadline, container.kill, held.stop_reason)

    # -- images

    async def _build(self, message: BuildImage) -> None:
        image_id = build_id_of(message.image)
        done = BuildDone(image_id)
        try:
            if self.builder is None:
                raise InvalidError(
                    f"build image `{image_id}`: the `{self.runtime.name}` runtime has no images but `Image.host()`",
                    hint="`squall doctor` says what the native runtime lacks here",
                )
            layers = await self.builder.ensure(message.image, message.secrets)
            done.layers = [layer.row() | {"was_built": was_built} for layer, was_built in layers]
        except Error as error:
            done.code, done.message, done.hint = error.code, error.message, error.hint
        except OSError as error:
            full = reports.full_disk(self.config.home)
            done.code = ResourceExhaustedError.code if full else ServiceError.code
            done.message = f"build image `{image_id}`: {f'{full}: ' if full else ''}{error}"
            done.hint = reports.FREE_HINT if full else ""
        except Exception as error:  # whatever a recipe or its files bring about: its end is waited for without one
            log.error("a build failed", image=image_id, error=traceback.format_exc())
            done.code, done.message = BuildError.code, f"build image `{image_id}`: {_said(error)}"
        self.stream.send(done)

    async def _look_after(self, message: PruneImages | VerifyImage) -> None:
        done = Pruned()
        try:
            if self.builder is not None:
                if isinstance(message, PruneImages):
                    layers = await self.builder.prune(set(message.keep))
                else:
                    layers = await self.builder.verify(message.image)
                done = Pruned([layer.title for layer in layers], total_size(layers))
        except Exception:  # answers are told apart by their order: one that is missing would shift all others
            log.error("looking after images failed", what=message.TAG, error=traceback.format_exc())
        self.stream.send(done)

    def _send_output(self, message: Message, data: bytes) -> None:
        self.stream.send(message, data)

    # -- output

    def _read_output(self, held: Held, stream: str, fd: int) -> None:
        os.set_blocking(fd, False)
        held.outputs.add(fd)
        self.loop.add_reader(fd, self._forward, held, stream, fd)

    def _forward(self, held: Held, stream: str, fd: int) -> None:
        """Pass on what a container wrote. While the server does not keep up, or is gone, the pipe is left full, so the
        container waits and nobody's memory grows."""
        if (self.stream.paused or not self.connected.is_set()) and not self.ended.is_set():
            self.loop.remove_reader(fd)
            self._spawn(self._resume_output(held, stream, fd))
            return
        try:
            data = os.read(fd, OUTPUT_CHUNK_BYTES)
        except BlockingIOError:
            return
        if not data:
            self._close_output(held, fd)
            return
        self.stream.send(ContainerOutput(held.container_id, stream), data)
        now = self.loop.time()
        if now - held.window_began > OUTPUT_WINDOW_S:
            held.window_began, held.window_bytes = now, 0
        held.window_bytes += len(data)
        if held.window_bytes > OUTPUT_WINDOW_BYTES:
            self.loop.remove_reader(fd)
            self.loop.call_later(held.window_began + OUTPUT_WINDOW_S - now, self._go_on_reading, held, stream, fd)

    def _go_on_reading(self, held: Held, stream: str, fd: int) -> None:
        if fd in held.outputs:
            self._read_output(held, stream, fd)

    def _close_output(self, held: Held, fd: int) -> None:
        self.loop.remove_reader(fd)
        held.outputs.discard(fd)
        os.close(fd)
        if not held.outputs:
            held.drained.set()

    async def _resume_output(self, held: Held, stream: str, fd: int) -> None:
        await self.connected.wait()
        await self.stream.drained()
        self._go_on_reading(held, stream, fd)

    async def _drain(self, held: Held) -> None:
        """Pass on the last output of a container that has ended, then close its pipes: a copy of their other ends may
        be in a process outside, which keeps them open for ever."""
        for _ in range(DRAIN_ROUNDS):
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(held.drained.wait(), DRAIN_SECONDS)
            if held.drained.is_set() or not (self.stream.paused or self.stream.closing):
                break
        lost = sum(map(_waiting_bytes, held.outputs))
        if lost:
            log.warning("output of a container was lost", container=held.container_id, bytes=lost)
        for fd in list(held.outputs):
            self._close_output(held, fd)

    # -- reports

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(REPORT_INTERVAL)
            report = NodeReport()
            for held in list(self.held.values()):
                if held.container is not None:
                    report.containers[held.container_id] = held.container.usage()
            if self.builder is not None:
                report.layers = self.builder.changed_sizes()
            self.stream.send(report)


def _waiting_bytes(fd: int) -> int:
    return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, bytes(4)), sys.byteorder)


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
