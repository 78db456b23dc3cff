"""What clients may ask: one method a message, each authenticated by its connection, decoded, answered.

A handler decides nothing: it checks, calls one thing, encodes. Whatever it raises goes back as a `Failure` with the
same text everywhere. Nothing a client sends is trusted or unpickled. Tested in `tests/integration`.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from squall._observe import Logger
from squall.exception import (
    ConflictError,
    Error,
    InternalError,
    InvalidError,
    NotFoundError,
    ResourceExhaustedError,
    ServiceError,
    VersionError,
)
from squall.protocol.messages import (
    BLOB_CHUNK_BYTES,
    BindFunction,
    BuildImage,
    CancelCall,
    CreateApp,
    ExecData,
    ExecExit,
    GetBlob,
    GetCall,
    GetImage,
    GetOutput,
    GetStats,
    HasBlobs,
    Interact,
    LogChunk,
    Message,
    OutputItem,
    Ping,
    PutBlob,
    Reply,
    StartExec,
    StopApp,
    StopContainer,
    Submit,
    YieldCredit,
    encode_header,
    new_id,
    to_dict,
)
from squall.protocol.requests import (
    ChangeSchedule,
    DeployApp,
    GetApp,
    GetCallGraph,
    GetFunctionStats,
    GetTrace,
    ListObjects,
    ListVersions,
    LookupApp,
    LookupFunction,
    MoreLogs,
    PruneImages,
    PutSecret,
    ReadLogs,
    RedeployApp,
    SetLabels,
    UpdateAutoscaler,
    VerifyImage,
)
from squall.protocol.resumption import Leaving, Settled
from squall.protocol.transport import FrameStream
from squall.server.absence import AWAY_BYTES, CONNECTED_BYTES, Pushes, Returning
from squall.server.app_api import AppApi
from squall.server.call_rows import call_rows
from squall.server.demand import Demand
from squall.server.graph import graph_of
from squall.server.logs import Record
from squall.server.objects import AppRecord, Scope
from squall.server.terminals import Terminals
from squall.server.timelines import parse_call, spans
from squall.server.uploads import Uploads
from squall.server.wire import Outbox, check_id, refuse, reply
from squall.storage.blobs import Upload

if TYPE_CHECKING:
    from squall.server.containers import ContainerRecord
    from squall.server.main import Server

log = Logger("server")

DIGEST_LIMIT = 10_000
"""Blobs one message may ask for: each is a look at the disk, and everybody else waits."""
TASK_LIMIT = 50_000
"""Requests of one connection that may wait, such as for results of spawned calls."""
EXEC_BUFFER_BYTES = 64 << 20
"""Output of an exec that may wait here for a client that does not read."""


@dataclass
class Dropped:
    """How much of an app's output was dropped, beginning with that of this container."""

    container_id: str
    function: str
    size: int = 0
    why: str = "they came faster than they were read"


Leaver = Literal["", "for good", "for another connection"]


class Peer:
    """A client over all its connections, or a runner where it acts as one: what it asked for and owns."""

    def __init__(self, loop: asyncio.AbstractEventLoop, stream: FrameStream, *, is_runner: bool = False) -> None:
        self.stream = stream
        self.outbox = Outbox(loop, stream)
        self.is_runner = is_runner
        self.scope = Scope()
        """What it may see: set from its token, or, on the machine's own socket, from what its hello names."""
        self.is_admin = not is_runner
        """Whether it may manage tokens and workspaces and end the server: everybody on the machine's own socket."""
        self.token_id = ""
        self.remote = ""
        """Address of a client from elsewhere; it came in by that token."""
        self.prefix = ""
        """`sys.prefix` of the client."""
        self.client_id = ""
        """The same in every connection of a client; known to it alone."""
        self.patience = 0.0
        """Seconds for which it tries to come back when its connection breaks."""
        self.leaving: Leaver = ""
        """What is known of why its connection will end."""
        self.heard = (0, 0)
        """Of one on this machine: what had come at the last beat, and for how many beats nothing more."""
        self.has_come_before = False
        """This is not its first connection."""
        self.away_since = 0.0
        """Wall-clock moment since which it has no connection; 0: it has one."""
        self.pushes: Pushes | None = None
        """What it was sent and has not confirmed, where that may get lost."""
        self.returning: Returning | None = None
        """Since it came back and until it has named what it waits for."""
        self.python = ""
        self.apps: set[str] = set()
        self.uploads: dict[str, Upload] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.dropped: dict[str, Dropped] = {}
        """App id -> output that this peer was too slow for, and was not told of yet."""

    def keep_pushes(self, overflow: Callable[[], object]) -> None:
        """Have all that is pushed from now on kept until it is confirmed; `overflow` is called when that is too much
        of a client that is away."""
        self.pushes = Pushes()
        self._overflow = overflow
        self.outbox.keep = self._keep

    def _keep(self, header: bytes, parts: tuple[bytes, ...]) -> None:
        if self.returning is not None:
            self.returning.answered(header)
        pushes = self.pushes
        if pushes is None:
            return
        pushes.add(header, parts)
        if not self.away_since and pushes.size > CONNECTED_BYTES:
            pushes.trim(CONNECTED_BYTES + self.stream.waiting_bytes())
        elif self.away_since and pushes.size > AWAY_BYTES:
            self._overflow()

    def push(self, message: Message, payload: bytes) -> None:
        """Send what is to come exactly once, over however many connections."""
        header = encode_header(message)
        self.stream.send_raw(header, payload)
        if self.outbox.keep is not None:
            self._keep(header, (payload,))

    def move_to(self, stream: FrameStream) -> None:
        """Go on over another connection."""
        self.outbox.flush()  # to nobody, so that it is among what is kept
        stream.owner = self
        self.stream = self.outbox.stream = stream

    def resume(self, received: int) -> None:
        """Send what the client has not had of the last connection, after the welcome on this one."""
        if self.pushes is not None:
            self.pushes.confirm(received)
            for header, parts in self.pushes.frames:
                self.stream.send_raw(header, *parts)
        self.returning = Returning(self.pushes)
        self.outbox.keep = self._keep

    def settled(self) -> Returning | None:
        """It has named all that it waits for: what it did."""
        returning, self.returning = self.returning, None
        if self.pushes is None:
            self.outbox.keep = None
        return returning

    def reply(self, request_id: int, data: dict[str, Any] | None = None, payload: bytes = b"") -> None:
        if request_id:
            reply(self.stream, request_id, data, payload)

    def refuse(self, request_id: int, error: BaseException) -> None:
        if not isinstance(error, Error):
            log.error("a request failed", error=f"{type(error).__name__}: {error}")
            error = InternalError(f"the server failed on this request: {type(error).__name__}: {error}")
        refuse(self.stream, request_id, error)

    def forget(self) -> None:
        for task in self.tasks:
            task.cancel()


class Api:
    def __init__(self, server: Server) -> None:
        self.server = server
        self.loop = server.loop
        self.execs: dict[str, tuple[Peer, Any]] = {}
        """exec id -> who asked, and the node it runs on."""
        self.terminals = Terminals(server.dispatch, self.kill_container)
        self.uploads = Uploads(self.loop, server.blobs)
        self.apps = AppApi(server)
        self._quick: dict[type[Message], Callable[[Peer, Any, bytes], None]] = {
            Submit: self.submit,
            BindFunction: self.bind_function,
            PutBlob: self.put_blob,
            HasBlobs: self.has_blobs,
            GetBlob: self.get_blob,
            YieldCredit: self.yield_credit,
            CancelCall: self.cancel_call,
            GetStats: self.get_stats,
            LookupFunction: self.apps.lookup_function,
            Ping: self.ping,
        }
        self._slow: dict[type[Message], Callable[[Peer, Any], Any]] = {
            GetOutput: server.calls.get_output,
            GetCall: self.get_call,
            GetCallGraph: self.get_call_graph,
            UpdateAutoscaler: self.apps.update_autoscaler,
        }
        """What a runner may ask too."""
        self._runner_quick: dict[type[Message], Callable[[Peer, Any, bytes], None]] = {
            **self._quick,
            Interact: self.terminals.ask,
            ExecData: self.terminals.from_runner,
            ExecExit: self.terminals.from_runner,
        }
        """This and `_slow` are all that a runner may ask."""
        self._client_quick: dict[type[Message], Callable[[Peer, Any, bytes], None]] = {
            **self._quick,
            CreateApp: self.create_app,
            StartExec: self.start_exec,
            ExecData: self.exec_data,
            GetTrace: self.get_trace,
            GetFunctionStats: self.apps.get_function_stats,
            GetImage: self.get_image,
            StopContainer: self.stop_container,
            PutSecret: server.access.put_secret,
            Reply: lambda peer, message, payload: None,  # to a ping
            Leaving: self.leaving,
            Settled: lambda peer, message, payload: server.calls.settled(peer),
        }
        self._client_slow: dict[type[Message], Callable[[Peer, Any], Any]] = {
            **self._slow,
            StopApp: self.stop_app,
            ReadLogs: server.readers.read,
            MoreLogs: server.readers.more,
            ChangeSchedule: self.change_schedule,
            ListObjects: self.list_objects,
            BuildImage: self.build_image,
            PruneImages: self.prune_images,
            VerifyImage: self.verify_image,
            DeployApp: self.apps.deploy,
            RedeployApp: self.apps.redeploy,
            ListVersions: self.apps.list_versions,
            LookupApp: self.apps.lookup_app,
            GetApp: self.apps.get_app,
            SetLabels: self.apps.set_labels,
            **server.access.handlers,
        }

    def handle(self, peer: Peer, message: Message, payload: bytes) -> None:
        kind = type(message)
        quick = (self._runner_quick if peer.is_runner else self._client_quick).get(kind)
        try:
            if quick is not None:
                quick(peer, message, payload)
                return
            slow = (self._slow if peer.is_runner else self._client_slow).get(kind)
            if slow is None:
                raise InvalidError(f"message `{message.TAG}` is not taken on this connection")
            self.run_slowly(peer, message, slow)
        except Exception as error:
            self._failed(peer, message, error)

    def run_slowly(self, peer: Peer, message: Message, body: Callable[[Peer, Any], Any]) -> None:
        """Answer a request in a task of its own, which ends with the connection."""
        if len(peer.tasks) >= TASK_LIMIT:
            raise ResourceExhaustedError(
                f"{TASK_LIMIT:,} requests of this connection wait for their answers already",
                hint="let some end before you send more",
            )
        task = self.loop.create_task(self._run(peer, message, body))
        peer.tasks.add(task)
        task.add_done_callback(peer.tasks.discard)

    def _once_ready(self, peer: Peer, message: Message, body: Callable[[], None]) -> None:
        """Go on once the Store's secrets were read; until somebody names one they are not."""

        async def later(peer: Peer, message: Message) -> None:
            await self.server.access.ready()
            body()

        self.run_slowly(peer, message, later)

    async def _run(self, peer: Peer, message: Message, body: Callable[[Peer, Any], Any]) -> None:
        try:
            await body(peer, message)
        except Exception as error:
            self._failed(peer, message, error)

    def _failed(self, peer: Peer, message: Message, error: Exception) -> None:
        if isinstance(error, ValueError) and not isinstance(error, Error):
            error = InvalidError(f"message `{message.TAG}`: {error}")
        if message.id:
            peer.refuse(message.id, error)
        elif isinstance(message, Submit):
            self._reject(peer, message, error)
        else:
            log.warning("a message failed", tag=message.TAG, error=str(error))

    def _reject(self, peer: Peer, message: Submit, error: Exception) -> None:
        """A submit that nobody waits for an answer of is answered by its results."""
        code = error.code if isinstance(error, Error) else ""
        text, hint = getattr(error, "message", "") or str(error), getattr(error, "hint", "")
        for item in message.items:
            out = OutputItem(message.call_id, item.idx, "rejected", message=text, hint=hint, code=code)
            peer.outbox.add(output_head_of(out), b"")

    # -- apps

    def create_app(self, peer: Peer, message: CreateApp, payload: bytes) -> None:
        check_environment(peer, message)
        if any(spec.secrets for spec in message.functions) and not self.server.access.vault.is_loaded:
            self._once_ready(peer, message, lambda: self.create_app(peer, message, payload))
            return
        app = self.server.create_app(message, peer)
        functions = {tag: function.stable_id for tag, function in app.functions.items()}
        peer.reply(message.id, {"app_id": app.app_id, "functions": functions})

    def bind_function(self, peer: Peer, message: BindFunction, payload: bytes) -> None:
        if message.options.get("secrets") and not self.server.access.vault.is_loaded:
            self._once_ready(peer, message, lambda: self.bind_function(peer, message, payload))
            return
        function = self.server.bind_function(peer, message, payload)
        peer.reply(message.id, {"function_id": function.stable_id})

    async def stop_app(self, peer: Peer, message: StopApp) -> None:
        app = self.server.objects.find_app(message.app, peer.scope)
        await self.server.stop_app(app, message.reason, asked_by=peer)
        peer.reply(message.id)

    # -- images

    async def build_image(self, peer: Peer, message: BuildImage) -> None:
        peer.reply(message.id, await self.server.builds.build(peer, message))

    def get_image(self, peer: Peer, message: GetImage, payload: bytes) -> None:
        builds = self.server.builds
        peer.reply(message.id, builds.row(builds.find(message.image_id, peer.scope.workspace)))

    async def prune_images(self, peer: Peer, message: PruneImages) -> None:
        peer.reply(message.id, await self.server.builds.prune(message, peer.scope.workspace))

    async def verify_image(self, peer: Peer, message: VerifyImage) -> None:
        peer.reply(message.id, await self.server.builds.verify(message.image.image_id, peer.scope.workspace))

    # -- schedules

    async def change_schedule(self, peer: Peer, message: ChangeSchedule) -> None:
        await self.server.firings.settled()
        call_id = await self.server.firings.change(message.schedule_id, message.action, peer.scope)
        peer.reply(message.id, {"call_id": call_id})

    # -- calls

    def submit(self, peer: Peer, message: Submit, payload: bytes) -> None:
        self.server.calls.submit(peer, message, payload)

    def cancel_call(self, peer: Peer, message: CancelCall, payload: bytes) -> None:
        self.server.calls.cancel(peer, message)

    def yield_credit(self, peer: Peer, message: YieldCredit, payload: bytes) -> None:
        call = self.server.dispatch.calls.get(message.call_id)
        input_ = call.inputs.get(message.idx) if call is not None and call.owner is peer else None
        if input_ is None or input_.container is None or not 0 < message.n < 1 << 20:
            return
        record = self.server.reconciler.containers.get(input_.container.container_id)
        if record is not None:
            self.server.reconciler.give_credit(record, input_, message.n)

    def get_stats(self, peer: Peer, message: GetStats, payload: bytes) -> None:
        function = self.server.objects.function(message.function_id, peer.scope)
        if function.function_id not in self.server.dispatch.functions:
            raise NotFoundError(f"function `{function.spec.tag}` has ended with its app")
        peer.reply(message.id, stats_of(self.server.dispatch.demand(time.monotonic(), function.function_id)))

    async def get_call_graph(self, peer: Peer, message: GetCallGraph) -> None:
        call_id = check_id(message.call_id, "fc")
        inputs, truncated = await graph_of(self.server.calls, call_id, peer.scope.workspace)
        peer.reply(message.id, {"inputs": inputs, "truncated": truncated})

    async def get_call(self, peer: Peer, message: GetCall) -> None:
        await self.server.calls.get_call(peer, message)

    def ping(self, peer: Peer, message: Ping, payload: bytes) -> None:
        if message.received and peer.pushes is not None:
            peer.pushes.confirm(message.received)
        peer.reply(message.id)

    def leaving(self, peer: Peer, message: Leaving, payload: bytes) -> None:
        peer.leaving = "for another connection" if message.returns else "for good"
        peer.stream.close("it said goodbye")

    # -- blobs

    def put_blob(self, peer: Peer, message: PutBlob, payload: bytes) -> None:
        def told(error: BaseException | None) -> None:
            if isinstance(error, Exception):
                self._failed(peer, message, error)
            else:
                peer.reply(message.id)

        self.uploads.put(peer, message, payload, told)

    def has_blobs(self, peer: Peer, message: HasBlobs, payload: bytes) -> None:
        if len(message.digests) > DIGEST_LIMIT:
            raise InvalidError(
                f"ask for {len(message.digests)} blobs at once: the limit is {DIGEST_LIMIT}",
                hint=f"ask in portions of up to {DIGEST_LIMIT} digests",
            )
        missing = [digest for digest in message.digests if not self.server.blobs.has(digest)]
        parts = self.uploads.parts(peer, missing)
        peer.reply(message.id, {"missing": missing, **({"parts": parts} if parts else {})})

    def get_blob(self, peer: Peer, message: GetBlob, payload: bytes) -> None:
        if message.suspect:
            self._examine(peer, message)
            return
        try:
            size = self.server.blobs.size(message.digest)
            data = self.server.blobs.read(message.digest, min(max(0, message.offset), size), BLOB_CHUNK_BYTES)
        except OSError as error:
            log.error("a blob cannot be read", digest=message.digest, error=str(error))
            self._examine(peer, message)
            return
        peer.reply(message.id, {"size": size}, data)

    def _examine(self, peer: Peer, message: GetBlob) -> None:
        looking = self.loop.run_in_executor(None, self.server.blobs.examine, message.digest)
        looking.add_done_callback(lambda done: self._examined(done, peer, message))

    def _examined(self, done: asyncio.Future[bool], peer: Peer, message: GetBlob) -> None:
        error = done.exception()
        if error is None and done.result():
            peer.reply(message.id)
            return
        if error is None:
            log.error("a blob was damaged and is put aside", digest=message.digest)
            error = ServiceError(
                f"blob `{message.digest}` was damaged on the disk of the server, and is put aside",
                hint="what is called again is sent again",
            )
        self._failed(peer, message, error if isinstance(error, Exception) else InternalError(str(error)))

    # -- containers

    def stop_container(self, peer: Peer, message: StopContainer, payload: bytes) -> None:
        reason = message.reason or "stopped by the operator"
        self._container(peer, message.container_id)
        if not self.server.reconciler.stop_container(message.container_id, message.grace, reason, by_operator=True):
            raise no_container(message.container_id)
        peer.reply(message.id)

    def _container(self, peer: Peer, container_id: str) -> ContainerRecord:
        """A running one of the peer's workspace; that of another does not exist."""
        record = self.server.reconciler.containers.get(container_id)
        if record is None or record.function.app.scope.workspace != peer.scope.workspace:
            raise no_container(container_id)
        return record

    def kill_container(self, record: ContainerRecord, reason: str) -> None:
        """End it at once, for the user's own sake: what runs in it is not tried again."""
        container = self.server.dispatch.containers.get(record.container_id)
        for input_ in list(container.running) if container is not None else ():
            now = time.monotonic()
            self.server.reconciler.apply(
                self.server.dispatch.cancel(now, input_.call_id, [input_.idx], reason, terminate=True)
            )
        self.server.reconciler.stop_container(record.container_id, 0.0, reason)

    def start_exec(self, peer: Peer, message: StartExec, payload: bytes) -> None:
        record = self._container(peer, message.container_id)
        if record.state not in ("starting", "ready", "draining"):
            raise no_container(message.container_id)
        if not message.argv or not message.argv[0] or any("\0" in word for word in message.argv):
            raise InvalidError("an exec needs a command, and words without NUL characters")
        request_id, message.id = message.id, 0
        message.exec_id = new_id("ex")
        self.execs[message.exec_id] = (peer, record.node)
        record.node.send(message)
        peer.reply(request_id, {"exec_id": message.exec_id})

    def exec_data(self, peer: Peer, message: ExecData, payload: bytes) -> None:
        owner, node = self.execs.get(message.exec_id, (None, None))
        if owner is peer and node is not None:
            node.send(message, payload)
        elif owner is None:
            self.terminals.from_client(peer, message, payload)

    def exec_from_node(self, node: Any, message: Any, payload: bytes, *, last: bool) -> None:
        peer, owner = self.execs.get(message.exec_id, (None, None))
        if peer is None or owner is None or owner is not node:
            return
        if last:
            del self.execs[message.exec_id]
        elif peer.stream.waiting_bytes() > EXEC_BUFFER_BYTES:
            del self.execs[message.exec_id]
            owner.send(ExecData(message.exec_id, "kill"))
            message, payload = ExecExit(message.exec_id, 137, "its output came faster than it was read"), b""
        peer.stream.send(message, payload)

    def node_broken(self, node: Any) -> None:
        """The connection of an agent ended, which ends the commands that were run through it."""
        for exec_id, (owner, of) in list(self.execs.items()):
            if of is node:
                del self.execs[exec_id]
                owner.stream.send(ExecExit(exec_id, 137, "the connection to its node broke"))

    def peer_lost(self, peer: Peer) -> None:
        for exec_id, (owner, node) in list(self.execs.items()):
            if owner is peer:
                del self.execs[exec_id]
                node.send(ExecData(exec_id, "kill"))
        self.terminals.peer_lost(peer)
        self.uploads.set_aside(peer)
        peer.forget()

    # -- looking

    async def list_objects(self, peer: Peer, message: ListObjects) -> None:
        if message.all:
            await self.server.objects.recall()
        if message.kind == "schedules":
            await self.server.firings.settled()
        makers: dict[str, Callable[[Peer, ListObjects], list[dict[str, Any]]]] = {
            "apps": self._apps,
            "containers": self._containers,
            "functions": lambda peer, asked: self.apps.function_rows(peer, asked.app),
            "nodes": lambda peer, _: self.server.nodes.inventory(),
            "images": lambda peer, _: self.server.builds.rows(peer.scope.workspace),
            "schedules": self._schedules,
        }
        if message.kind == "calls":
            found = await call_rows(self.server, peer.scope)
            peer.reply(message.id, {"rows": found[-max(1, message.limit) :]})
            return
        rows = makers.get(message.kind)
        if rows is None and message.kind in self.server.access.lists:
            await self.server.access.ready()
            peer.reply(message.id, {"rows": self.server.access.lists[message.kind](peer)})
            return
        if rows is None:
            known = ", ".join([*makers, "calls", *self.server.access.lists])
            raise InvalidError(f"cannot list `{message.kind[:40]}`", hint=f"what can be listed: {known}")
        peer.reply(message.id, {"rows": rows(peer, message)[-max(1, message.limit) :]})

    def _apps(self, peer: Peer, message: ListObjects) -> list[dict[str, Any]]:
        apps = [app for app in self.server.objects.apps.values() if app.scope == peer.scope]
        return [self.apps.app_row(app) for app in apps if message.all or app.state != "stopped"]

    def _schedules(self, peer: Peer, message: ListObjects) -> list[dict[str, Any]]:
        app = self.server.objects.find_app(message.app, peer.scope) if message.app else None
        return self.server.firings.rows(peer.scope, app)

    def _containers(self, peer: Peer, message: ListObjects) -> list[dict[str, Any]]:
        reconciler = self.server.reconciler
        records = list(reconciler.history.values()) if message.all else []
        records += reconciler.containers.values()
        records = [record for record in records if record.function.app.scope == peer.scope]
        if message.app:
            app = self.server.objects.find_app(message.app, peer.scope)
            records = [record for record in records if record.function.app is app]
        rows = []
        for record in records:
            state = self.server.dispatch.containers.get(record.container_id)
            rows.append(
                {
                    "container_id": record.container_id,
                    "app": record.function.app.name,
                    "app_id": record.function.app.app_id,
                    "function": record.function.spec.tag,
                    "version": record.function.version or None,
                    "node_id": record.node.node_id,
                    "state": record.state,
                    "running": len(state.running) if state is not None else 0,
                    "started_at": record.timeline.stood_at or None,
                    "stopped_at": record.timeline.exited_at or None,
                    "reason": record.stop_reason or record.reason,
                    **record.node.used.get(record.container_id, {}),
                }
            )
        return rows

    def get_trace(self, peer: Peer, message: GetTrace, payload: bytes) -> None:
        timelines = self.server.timelines
        call_id, idx = parse_call(message.call or timelines.latest(peer.scope))
        mine = [t for t in timelines.of_call(call_id) if t.place[0] == peer.scope.workspace]
        inputs = [t for t in mine if idx is None or t.idx == idx]
        if not inputs:
            what = f"call `{message.call[:80]}`" if message.call else "any call"
            raise NotFoundError(f"no timeline of {what}", hint="timelines are kept while the server runs")
        begin = min(t.sent_at or t.queued_at for t in inputs)
        end = max(t.done_at for t in inputs)
        rows = []
        for timeline in inputs[: max(1, message.limit)]:
            container = self.server.reconciler.timeline_of(timeline.container_id)
            rows.append(
                {
                    "idx": timeline.idx,
                    "status": timeline.status,
                    "attempt": timeline.attempt,
                    "container_id": timeline.container_id,
                    "total_ms": (timeline.done_at - (timeline.sent_at or timeline.queued_at)) * 1000,
                    "spans": spans(timeline, container),
                }
            )
        head = inputs[0]
        peer.reply(
            message.id,
            {
                "call_id": call_id,
                "function": head.function,
                "kind": head.kind,
                "started_at": begin,
                "total_ms": (end - begin) * 1000,
                "num_inputs": len(inputs),
                "inputs": rows,
            },
        )


def check_environment(peer: Peer, message: CreateApp | DeployApp) -> None:
    """`Image.host()` shows containers this server's Python environment, so a program of another would miss its own. A
    program on another machine cannot have the same; it is held only to the version that values need."""
    if peer.remote:
        _check_python(peer, message)
        return
    if not peer.prefix or os.path.realpath(peer.prefix) == os.path.realpath(sys.prefix):
        return
    for spec in message.functions:
        if spec.image.kind == "host":
            raise ConflictError(
                f"function `{spec.tag}` runs on `Image.host()`, which here is the Python environment `{sys.prefix}` of "
                f"the running server, and your program runs in `{peer.prefix}`",
                hint="`squall down` ends that server and the next run starts one of yours; or set SQUALL_HOME to "
                "another directory for this environment",
            )


def _check_python(peer: Peer, message: CreateApp | DeployApp) -> None:
    """What is pickled by value, as code is, can be read by the same minor version of Python only."""
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    for spec in message.functions:
        if spec.image.kind == "host" and spec.serialized_blob and peer.python not in ("", here):
            raise VersionError(
                f"function `{spec.tag}` is sent by value from Python {peer.python}, and `Image.host()` is the server's "
                f"Python {here}",
                hint=f"use an image with your version, `squall.Image.debian_slim('{peer.python[:8]}')`, or run your "
                f"program with Python {here}",
            )


def no_container(container_id: str) -> NotFoundError:
    return NotFoundError(f"no running container `{container_id[:80]}`", hint="see `squall container list`")


def log_chunk(app: AppRecord, record: Record) -> LogChunk:
    return LogChunk(app.app_id, record.container_id, record.function, record.stream, record.at)


def stats_of(demand: Demand) -> dict[str, Any]:
    return {
        "backlog": demand.backlog + demand.waiting,
        "num_total_runners": demand.ready + demand.starting,
        "num_running_inputs": demand.running,
        "input_headroom": demand.headroom,
    }


def output_head_of(out: OutputItem) -> str:
    """A result without payload for a call whose id was not checked: encoded the slow, safe way."""
    return json.dumps(to_dict(out))
