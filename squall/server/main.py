"""Builds the server from its parts, listens, and takes it down in order.

Start: state directories, sockets, agent, and only then the Store's heavy imports, so that the first call does not wait
for them. Stop: no new work, apps stopped, containers gone, agent gone, Store committed, sockets removed. An embedded
server ends by itself when the last client and app have been gone for `idle_timeout` seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import socket
import time
import traceback
from typing import Any

from squall._observe import Logger, count
from squall.config import Config
from squall.engines.provider import EmbeddedProvider, NodeProvider
from squall.exception import ConflictError, Error, InternalError, NotFoundError, ServiceError
from squall.protocol.messages import (
    SUPPORTED_VERSIONS,
    BindFunction,
    BuildOutput,
    ContainerEvent,
    ContainerOutput,
    CreateApp,
    Ending,
    ExecData,
    ExecExit,
    FunctionSpec,
    GetBlob,
    Hello,
    Loaded,
    Message,
    NodeReport,
    Notice,
    Outputs,
    Ping,
    Register,
    new_id,
    split_payload,
)
from squall.protocol.requests import BuildDone, DeployApp, Pruned
from squall.protocol.resumption import OutputsAgain, RegisterAgain, RunnerBack
from squall.protocol.transport import FrameStream, payload_for
from squall.server.absence import AWAY_LOG_BYTES, Absences
from squall.server.access import Access, Greeting
from squall.server.api import Api, Dropped, Peer, check_environment, log_chunk
from squall.server.backoffs import Backoffs
from squall.server.builds import Builds
from squall.server.calls import Calls
from squall.server.containers import ContainerRecord
from squall.server.database import Database
from squall.server.deploys import Deploys
from squall.server.dispatch import Dispatch
from squall.server.door import Visitor
from squall.server.firings import Firings
from squall.server.journal import awaited_blobs
from squall.server.kept import KeptApp, KeptApps, has_any
from squall.server.liveness import Change, Liveness
from squall.server.logs import Limits, Logs, Record
from squall.server.metering import Metering
from squall.server.nodes import Node, Nodes
from squall.server.objects import AppRecord, FunctionRecord, Objects, Scope, options_of
from squall.server.readers import Readers
from squall.server.reconciler import Reconciler
from squall.server.schedules import check_schedules
from squall.server.sealing import Seal
from squall.server.timelines import Timelines
from squall.server.versions import blobs_of, images_of
from squall.server.wire import check_id, decode, refuse, reply
from squall.storage.blobs import DirectoryBlobs

log = Logger("server")

STORE_AFTER = 2.0
"""Seconds after the start until the Store is opened when nobody needed it before."""
STOP_GRACE = 1.0
"""Seconds a container of a stopped app may take to end before it is killed; a class with exit hooks has its own."""
STOP_TIMEOUT = 30.0
"""Seconds beyond that grace until a container is no longer waited for."""
DRAIN_TIMEOUT = 5.0
DRAIN_LOOK_S = 0.05
HELLO_TIMEOUT = 10.0
PRUNE_AFTER = 30.0
PRUNE_EVERY = 3600.0
RESUME_GRACE = 30.0
"""Seconds that an app waits for its client after a restart, or after the connection of a remote one broke."""
BLOB_DAYS = 8
"""One more than results are kept."""
UNREAD_LIMIT_BYTES = 64 << 20
"""Answers and results that may wait for a client or runner that does not read, before it may ask no more."""
LOCK_TIMEOUT = 2.0
"""How long a server that is ending, or an agent tidying up after one that was killed, may hold the lock."""


class Server:
    def __init__(self, config: Config, *, stays: bool = False) -> None:
        self.config = config
        self.stays = stays
        """Started by somebody to stay: it does not end by idleness, and takes connections from elsewhere."""
        self.returns = stays
        """Another server will take its place: apps are left as they are, and clients may wait."""
        self.ending = ""
        """Why it ends."""
        self.draining = False
        self.loop = asyncio.get_running_loop()
        self.server_id = new_id("sv")
        for directory in (config.home, config.run_dir, config.state_dir):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.lock = lock_state(config)
        self.blobs = DirectoryBlobs(config.blobs_dir)
        self.logs = Logs(config.state_dir / "logs", limits_of(config))
        self.database = Database.in_directory(config.state_dir, self.loop, config.database_url)
        self.database.check()
        self.dispatch = Dispatch()
        self.timelines = Timelines()
        seal = Seal(config.state_dir / "seal.key", config.seal_key)
        self.objects = Objects(self.database, seal)
        self.kept = KeptApps(self.database, seal)
        self.metering = Metering(self.database)
        self.nodes = Nodes(self.loop)
        self.liveness = Liveness()
        quota = int(config.images_gib * (1 << 30))
        self.builds = Builds(config.state_dir / "images", self.nodes, self.blobs, self.logs, quota)
        self.builds.in_use = self._images_in_use
        self.calls = Calls(self.dispatch, self.objects, self.database, self.timelines)
        self.calls.pending_limit, self.calls.durable.limit = config.pending_limit, config.spawn_limit
        self.reconciler = Reconciler(self.dispatch, self.objects, self.nodes, self.calls, self.metering)
        self.deploys = Deploys(self.objects, self.dispatch, self.reconciler, self.builds, self.database)
        self.backoffs = Backoffs(self.dispatch, self.objects, self.database)
        self.readers = Readers(self)
        self.firings = Firings(self.calls.durable, self.database)
        self.firings.tell = self.tell_app
        self.absences = Absences(self.loop, config.heartbeat)
        self.absences.gone, self.absences.holds = self._peer_gone, self._has_something
        self.access = Access(self)
        self.api = Api(self)
        self.provider: NodeProvider = EmbeddedProvider(config)
        self.provider.on_ended = self._agents_ended
        self.peers: set[Peer] = set()
        self.ended = asyncio.Event()
        self.busy_at = time.monotonic()
        self.started_at = time.time()
        self._stopping: dict[str, asyncio.Task[None]] = {}
        self._listener: asyncio.AbstractServer | None = None
        self.objects.admit = self._admit
        self.deploys.switched = self._switched
        self.deploys.resumed = self.backoffs.resume
        self._drainer: asyncio.Task[None] | None = None
        self.calls.apply = self.backoffs.apply = self.reconciler.apply
        self.calls.open_former = self.reconciler.takeover.open_former
        self.calls.why_waiting = self.reconciler.why_waiting
        self.reconciler.on_backoff = self.backoffs.changed
        self.backoffs.tell = self._log_of_app
        self.access.vault.changed = self.backoffs.secret_changed
        self.reconciler.notify = self.notify
        self.reconciler.vault = self.access.vault
        self.reconciler.on_output = self._on_output
        self.nodes.on_runner = self._on_runner
        self._claim = config.run_dir / "stays"
        """A file that is there while a server of `squall up` has this home, also when it was killed and whoever keeps
        it running has not started the next one yet: programs wait for that one instead of starting their own."""

    # -- life

    async def run(self) -> None:
        """Serve until told to end."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            self.loop.add_signal_handler(signum, self._on_signal, signum)
        self.loop.add_signal_handler(signal.SIGHUP, self.access.door.reload)
        if self.stays and self.config.listen:
            self.access.bind()
        self.metering.close_stale(self.started_at, time.time())
        self.nodes.listen(self.config.run_dir / "handoff.sock")
        self.provider.start()  # it needs as long as the Store does, and both are waited for after a restart
        try:
            await self._prepare()
        except BaseException:
            await self.provider.withdraw()
            raise
        if self.stays:
            self._claim.touch(0o600)
        else:
            self._claim.unlink(missing_ok=True)
        await self._listen()
        self.provider.listening()
        bodies = [self.reconciler.rounds(), self._watch_idle(), self._watch_nodes(), self._prune()]
        bodies += [self.access.watch(), self.access.watch_local(), self.firings.rounds()]
        rounds = [self.loop.create_task(body) for body in bodies]
        self.loop.call_later(STORE_AFTER, self._open_store)
        log.info("serving", home=str(self.config.home), pid=os.getpid())
        try:
            if self.stays and self.config.listen:
                await self.access.listen()
            await self.ended.wait()
        finally:
            for task in rounds:
                task.cancel()
            await self._close()

    async def _prepare(self) -> None:
        """What has to be there before anybody is let in."""
        has_apps = has_any(self.config.state_dir / "squall.db") or self.database.backend.has_deployed_apps()
        if self.stays or has_apps:
            await self.database.ready()  # what else can be wrong with it must be said before serving
        if has_apps:
            await self._restore()

    async def _restore(self) -> None:
        """Take up the apps that were running, before any client is let in; then, little by little, their inputs."""
        began = time.monotonic()
        try:
            apps = await self.kept.load()
        except Error as error:
            log.error("the apps of before could not be read", error=str(error))
            return
        for kept in apps:
            try:
                self._take_up(kept)
            except Error as error:
                log.error("an app could not be taken up again", app=kept.message.app_id, error=str(error))
        await self.backoffs.load()
        await self.deploys.restore()
        self.calls.durable.start()
        log.info("took up the apps of before", apps=len(apps), seconds=round(time.monotonic() - began, 3))

    def _take_up(self, kept: KeptApp) -> None:
        app = self.objects.create_app(kept.message, None, kept.created_at, kept.scope)
        app.resume_until = time.monotonic() + RESUME_GRACE
        for variant in kept.variants:
            root = app.functions[variant.tag]
            self.objects.bind(root.stable_id, variant.options, variant.parameters, trusted=True, scope=kept.scope)
        self._open_pools(app)

    def _open_pools(self, app: AppRecord) -> None:
        for function in app.pools():
            self._admit(function)

    def _open_store(self) -> None:
        if not self.ended.is_set():
            self.database.start()
            self.calls.durable.start()

    async def _listen(self) -> None:
        path = self.config.socket_path
        path.unlink(missing_ok=True)
        previous = os.umask(0o177)
        try:
            self._listener = await self.loop.create_unix_server(self._accept, str(path))
        finally:
            os.umask(previous)

    def _accept(self) -> Any:
        stream = FrameStream(self.loop, self.on_frame, self.on_lost)
        self.loop.call_later(HELLO_TIMEOUT, self._check_hello, stream)
        return stream

    def _check_hello(self, stream: FrameStream) -> None:
        if stream.owner is None and not stream.closing:
            stream.abort("it did not say who it is")

    def _on_signal(self, signum: int) -> None:
        """Whoever sends it, systemd or a machine that goes down, did not ask for apps to be stopped. The second one
        does not wait for inputs any more."""
        self.returns = True
        if signum == signal.SIGINT:  # somebody at a terminal, not a service manager
            self._claim.unlink(missing_ok=True)
        self.end(f"received {signal.Signals(signum).name}", 0.0 if self.draining else -1.0)

    def end(self, reason: str, grace: float = -1.0) -> None:
        """End the server. One that was started to stay first lets running inputs end, for `grace` seconds."""
        if grace < 0:
            grace = self.config.drain_timeout if self.stays else 0.0
        if self.ended.is_set() or (self.draining and grace):
            return
        self.ending = reason
        log.info("ending", reason=reason, grace=grace)
        if not grace:
            self.ended.set()
            return
        self.draining = True
        self._drainer = self.loop.create_task(self._drain(reason, grace))

    async def _drain(self, reason: str, grace: float) -> None:
        """Start nothing new, and wait for what runs. What waits in a queue stays there: that of spawned calls is in the
        journal, that of others is sent again by their clients."""
        deadline = time.monotonic() + grace
        try:
            self.reconciler.hold(time.monotonic(), f"the server is ending: {reason}")
            functions = self.dispatch.functions
            while time.monotonic() < deadline and any(function.running for function in functions.values()):  # noqa: ASYNC110
                await asyncio.sleep(DRAIN_LOOK_S)
        finally:
            self.ended.set()

    async def _close(self) -> None:
        self.access.door.close()
        if self._listener is not None:
            self._listener.close()
        self.config.socket_path.unlink(missing_ok=True)
        for peer in self.peers:
            peer.stream.send(Ending(self.ending, self.returns))
        self.reconciler.is_held = True
        self.database.start()  # it is closed with what was measured in it: a short-lived server opens it only now
        await self._stop_apps()
        await self._end_containers()
        await self.provider.stop()
        self.nodes.close()
        self.api.uploads.close()
        with contextlib.suppress(OSError):  # a full disk must not keep the Store from being committed
            self.logs.close()
        self.metering.flush()
        await self.database.close()
        for peer in list(self.peers):
            peer.stream.close("the server ended")
        await asyncio.sleep(0)
        if not self.returns:
            self._claim.unlink(missing_ok=True)
        self.lock.close()

    async def _stop_apps(self) -> None:
        """Where no other server follows, apps end with the clients that run them. Whatever else is in the journal waits
        there for the next one."""
        apps = [app for app in self.objects.apps.values() if app.owner is not None and not app.detached]
        if apps and not self.returns:
            grace = max((grace_of(record) for record in self.reconciler.containers.values()), default=0.0)
            stops = [self.stop_app(app, f"the server is ending: {self.ending}") for app in apps]
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.gather(*stops), grace + STOP_TIMEOUT)

    async def _end_containers(self) -> None:
        """End the containers that are left. What that does to their inputs is nobody's result: they will run again."""
        self.reconciler.is_closed = True
        records = list(self.reconciler.containers.values())
        for record in records:
            self.reconciler.stop_container(record.container_id, grace_of(record), self.ending, cancel=True)
        if records:
            gone = [self.loop.create_task(record.gone.wait()) for record in records]
            await asyncio.wait(gone, timeout=max(map(grace_of, records)) + STOP_TIMEOUT)

    async def _watch_idle(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, max(0.05, self.config.idle_timeout / 4)))
            try:
                self._look_for_idleness()
                self.deploys.sweep()
                self._tell_all_dropped()
                self.logs.flush()
            except Exception:  # a full disk, or a bug of ours: this must go on, or the server would never end
                log.error("the look for idleness failed", error=traceback.format_exc())

    async def _prune(self) -> None:
        """Forget old output and old payloads. Payloads outlive the results that may name them."""
        while True:
            await asyncio.sleep(PRUNE_AFTER)
            now = time.time()
            try:
                self.logs.prune(now)
                await self.calls.expire(now)
                awaited = await self.database.read(awaited_blobs)
                await self.loop.run_in_executor(None, self._prune_blobs, now, awaited, self._blobs_in_use())
            except (OSError, Error) as error:
                log.error("pruning failed", error=str(error))
            await asyncio.sleep(PRUNE_EVERY)

    def _prune_blobs(self, now: float, awaited: set[str], in_use: set[str]) -> None:
        """What waits in the journal is wanted, however old it is."""
        for digest in awaited:
            self.blobs.has(digest)
        self.blobs.prune(now - BLOB_DAYS * 86400, in_use)

    async def _watch_nodes(self) -> None:
        while True:
            await asyncio.sleep(self.config.node_heartbeat)
            for node in self.nodes.nodes.values():
                node.stream.send(Ping())
            received = {node.node_id: node.stream.received for node in self.nodes.nodes.values()}
            try:
                self._nodes_changed(self.liveness.look(received))
            except Exception:  # a bug of ours: it costs this beat, not every later one
                log.error("a look at the nodes failed", error=traceback.format_exc())

    def _nodes_changed(self, changes: list[Change]) -> None:
        for change in changes:
            node = self.nodes.nodes.get(change.node_id)
            if node is None:
                continue
            node.health, node.reason, node.since = change.health, change.reason, time.time()
            if change.health == "lost":
                self._node_lost(node, change.reason)
                continue
            say = log.warning if change.health == "suspected" else log.info
            say(f"node {change.health}", node=node.node_id, reason=change.reason, containers=len(node.containers))
            self.reconciler.node_suspected(node, change.health == "suspected", change.reason)

    def _node_lost(self, node: Node, reason: str) -> None:
        """What it ran is given to others; should it come back, it is told so."""
        log.error("node lost", node=node.node_id, reason=reason, containers=len(node.containers))
        count("nodes_lost")
        self.nodes.lost(node)
        self.api.node_broken(node)
        node.stream.abort(f"its node was given up: {reason}")
        self.reconciler.node_lost(node, reason)
        self.builds.node_lost(node, reason)
        self.provider.lost()

    def _agents_ended(self, reason: str) -> None:
        """The provider knows that the agents it had are gone."""
        if not self.ended.is_set():
            for node_id in list(self.nodes.nodes):
                self._nodes_changed(self.liveness.ended(node_id, reason))

    def _look_for_idleness(self) -> None:
        self._end_idle_apps()
        running = any(app.state != "stopped" for app in self.objects.apps.values())
        if self.peers or running or self.stays:
            self.busy_at = time.monotonic()
        elif time.monotonic() - self.busy_at >= self.config.idle_timeout:
            self.end(f"nobody used it for {self.config.idle_timeout:g} s")

    def _end_idle_apps(self) -> None:
        """An app whose maker is gone ends when nothing of it is left to do."""
        now = time.monotonic()
        for app in list(self.objects.apps.values()):
            if app.deployed or app.state != "running" or app.owner is not None or now < app.resume_until:
                continue
            if not self._has_work(app):
                self._stop_soon(app, "all its calls have ended" if app.detached else "its client went away")

    def _has_work(self, app: AppRecord) -> bool:
        pools = app.pools()
        states = [state for pool in pools if (state := self.dispatch.functions.get(pool.function_id)) is not None]
        if any(state.pending() or state.running for state in states):
            return True
        return self.calls.durable.has_work(pool.stable_id for pool in pools)

    # -- connections

    def on_frame(self, stream: FrameStream, header: bytes, payload: bytes) -> None:
        """The first frame says who it is; from then on the stream has its own handler."""
        owner = stream.owner
        if isinstance(owner, Peer):
            self._dispatch_frame(stream, header, payload, self._on_client)
        elif owner is None or isinstance(owner, (Visitor, Greeting)):
            self.access.greet(stream, header)
        else:
            self._dispatch_frame(stream, header, payload, self._on_agent)

    def _dispatch_frame(self, stream: FrameStream, header: bytes, payload: bytes, handler: Any) -> None:
        try:
            message = decode(header)
        except ValueError as error:
            stream.abort(f"received garbage: {error}")
            return
        try:
            handler(stream, message, payload_for(message, payload))
        except Exception as error:  # a bug of ours: it costs this message, not the node with all its containers
            log.error("a message failed", tag=message.TAG, error=traceback.format_exc())
            if message.id:
                refuse(stream, message.id, InternalError(f"the server failed on `{message.TAG}`: {error!r}"))

    def welcome(self, stream: FrameStream, message: Hello, scope: Scope, token_id: str, remote: str) -> Peer | None:
        """Take in a connection that may come in; the client, if it is one's, as it was if it comes back."""
        if message.role != "client":
            stream.owner = PendingAgent()
            return None
        stream.hold_above = UNREAD_LIMIT_BYTES
        peer = self.absences.find(message, token_id, scope)
        if peer is None:
            peer = Peer(self.loop, stream)
            peer.prefix, peer.python, peer.scope = message.prefix, message.python, scope
            peer.token_id, peer.remote = token_id, remote
            self.absences.expect(peer, message)
        elif peer in self.peers:  # it has noticed before us
            peer.stream.abort("its client came back on another connection")
            self._connection_ended(peer)
        peer.move_to(stream)
        self.peers.add(peer)
        return peer

    def _on_client(self, stream: FrameStream, message: Message, payload: bytes) -> None:
        self.api.handle(stream.owner, message, payload)

    def _on_agent(self, stream: FrameStream, message: Message, payload: bytes) -> None:
        node = stream.owner
        if isinstance(message, GetBlob):
            self._agent_blob(stream, message)
        elif isinstance(message, Register):
            self._register(stream, message)
        elif not isinstance(node, Node):
            stream.abort("it did not register")
        elif isinstance(message, ContainerEvent):
            self.reconciler.container_event(node, message)
        elif isinstance(message, ContainerOutput):
            self._on_output(node, message, payload)
        elif isinstance(message, NodeReport):
            node.used = message.containers
            if message.layers:
                self.builds.reported(message.layers)
        elif isinstance(message, BuildOutput):
            self.builds.output(node, message, payload)
        elif isinstance(message, BuildDone):
            self.builds.done(node, message)
        elif isinstance(message, Pruned):
            self.builds.answered(message)
        elif isinstance(message, Ping):
            pass  # that it came was counted
        elif isinstance(message, (ExecData, ExecExit)):
            self.api.exec_from_node(node, message, payload, last=isinstance(message, ExecExit))

    def _register(self, stream: FrameStream, message: Register) -> None:
        self.provider.registered()
        node = self.nodes.of_agent(message.agent_id)
        if node is not None and isinstance(message, RegisterAgain):
            self._node_back(node, stream, message)
            return
        stream.owner = None
        node = self.nodes.register(stream, message)
        reply(stream, message.id, {"node_id": node.node_id})
        node.health = self.liveness.joined(node.node_id)
        self.reconciler.node_joined(node)
        if node.health == "suspected":
            node.reason, node.since = "it was lost, and is back", time.time()
            self.reconciler.node_suspected(node, True, node.reason)
        for app in self.objects.apps.values():
            self._warn(app, node)

    def _node_back(self, node: Node, stream: FrameStream, message: RegisterAgain) -> None:
        """An agent is here again on another connection, and was not given up."""
        before, node.stream = node.stream, stream
        stream.owner = node
        before.abort("its agent came back on another connection")
        log.info("node back", node=node.node_id, containers=len(message.containers))
        count("nodes_returned")
        node.machine = message
        self.liveness.joined(node.node_id)
        self.builds.node_lost(node, "its connection broke")
        sockets = self.reconciler.node_back(node, message.containers, message.ended)
        reply(stream, message.id, {"node_id": node.node_id, "sockets": sockets})

    def _agent_blob(self, stream: FrameStream, message: GetBlob) -> None:
        try:
            self.api.get_blob(Peer(self.loop, stream), message, b"")
        except Error as error:
            refuse(stream, message.id, error)

    def on_lost(self, stream: FrameStream, reason: str) -> None:
        owner = stream.owner
        if isinstance(owner, Peer):
            if owner.stream is stream:  # else it has come back on another
                self._peer_lost(owner, reason)
        elif isinstance(owner, Node) and owner.stream is stream and owner.node_id in self.nodes.nodes:
            self.api.node_broken(owner)
            if self.ended.is_set():
                self.nodes.lost(owner)
                self.reconciler.node_lost(owner, reason)
            else:
                self._nodes_changed(self.liveness.broken(owner.node_id, reason))

    def _peer_lost(self, peer: Peer, reason: str) -> None:
        self._connection_ended(peer)
        if not self.ended.is_set() and not self.absences.leave(peer, reason):
            self._peer_gone(peer, "its client went away")

    def _connection_ended(self, peer: Peer) -> None:
        """What depends on one connection ends with it: requests under way, readers, terminals."""
        self.peers.discard(peer)
        self.busy_at = time.monotonic()
        self.api.peer_lost(peer)
        self.readers.peer_lost(peer)

    def _has_something(self, peer: Peer) -> bool:
        """Whether a client could miss something when it comes back."""
        if self.dispatch.owners.get(peer) or (peer.pushes is not None and peer.pushes.frames):
            return True
        return any(app.owner is peer and app.state == "running" for app in self.objects.apps.values())

    def _peer_gone(self, peer: Peer, reason: str) -> None:
        """A client will not come back."""
        self.busy_at = time.monotonic()
        self.builds.peer_lost(peer)
        for app in list(self.objects.apps.values()):
            app.followers.discard(peer)
            if app.owner is peer:
                app.owner = None
                # What was spawned goes on without its client, and the app until that has ended.
                if not app.detached and not self.calls.durable.has_work(pool.stable_id for pool in app.pools()):
                    self._stop_soon(app, reason)
        self.reconciler.apply(self.dispatch.owner_gone(time.monotonic(), peer, "the caller went away"))

    # -- runners

    def _on_runner(self, container_id: str, sock: socket.socket | None) -> None:
        if sock is not None and self.reconciler.takeover.park_runner(container_id, sock):
            return
        if sock is None:
            log.error("a runner's socket could not be taken", container=container_id)
            self.reconciler.stop_container(container_id, 0.0, "the server has no file descriptor left for it")
            return
        stream = FrameStream(self.loop, self._on_runner_frame, self._on_runner_lost)
        if not self.reconciler.adopt_runner(container_id, stream):
            sock.close()
            return
        stream.hold_above = UNREAD_LIMIT_BYTES
        sock.setblocking(False)
        self.loop.create_task(self._attach(stream, sock))

    async def _attach(self, stream: FrameStream, sock: socket.socket) -> None:
        await self.loop.create_unix_connection(lambda: stream, sock=sock)  # type: ignore[type-var]

    def _on_runner_frame(self, stream: FrameStream, header: bytes, payload: bytes) -> None:
        record: ContainerRecord = stream.owner
        try:
            message = decode(header)
            if isinstance(message, OutputsAgain):
                parts = split_payload(message.items, payload)
                self.reconciler.takeover.outputs_again(record, message.items, parts)
            elif isinstance(message, RunnerBack):
                self.reconciler.takeover.runner_back(record, message)
            elif isinstance(message, Outputs):
                parts = split_payload(message.items, payload)
                self.reconciler.runner_outputs(record, message.items, parts)
            elif isinstance(message, Hello):
                self._runner_hello(record, message)
            elif isinstance(message, Loaded):
                self.reconciler.runner_loaded(record, message, bytes(payload))
            else:
                self._runner_asks(record, message, payload_for(message, payload))
        except (ValueError, Error) as error:
            stream.abort(f"received garbage: {error}")
            self.reconciler.stop_container(record.container_id, 0.0, "its runner sent what is no message")
        except Exception as error:  # a bug of ours: it costs this container, whose inputs run in another one
            log.error("a runner's message failed", container=record.container_id, error=traceback.format_exc())
            stream.abort(f"the server failed on a message of its runner: {error!r}")
            self.reconciler.stop_container(record.container_id, 0.0, "the server failed on a message of its runner")

    def _runner_hello(self, record: ContainerRecord, message: Hello) -> None:
        if message.version not in SUPPORTED_VERSIONS:
            self.reconciler.stop_container(
                record.container_id, 0.0, f"its runner speaks protocol version {message.version}"
            )
            return
        self.reconciler.runner_hello(record)

    def _runner_asks(self, record: ContainerRecord, message: Message, payload: bytes) -> None:
        """User code in a container calls functions: it acts as a client, within what a runner may ask."""
        peer = record.peer
        if peer is None:
            assert record.stream is not None
            peer = record.peer = Peer(self.loop, record.stream, is_runner=True)
            peer.is_admin, peer.scope = False, record.function.app.scope
        self.api.handle(peer, message, payload)

    def _on_runner_lost(self, stream: FrameStream, reason: str) -> None:
        record: ContainerRecord = stream.owner
        if record.peer is not None:
            self.api.peer_lost(record.peer)
            gone = self.dispatch.owner_gone(time.monotonic(), record.peer, "the caller's container ended")
            self.reconciler.apply(gone)
            record.peer = None
        self.reconciler.runner_lost(record, reason)

    # -- apps

    def create_app(self, message: CreateApp, peer: Peer) -> AppRecord:
        if self.ended.is_set() or self.draining:
            raise ServiceError("the server is ending", hint="try again")
        check_schedules(message.functions, time.time())
        for spec in message.functions:
            self.builds.check_use(spec.image, peer.scope.workspace, peer)
            self.access.vault.check(peer.scope, spec)
        app = self._resumed(message, peer)
        if app is None:
            app = self.objects.create_app(message, peer, time.time(), peer.scope)
            self.kept.keep(app)
            self._open_pools(app)
        peer.apps.add(app.app_id)
        if message.follow:
            app.followers.add(peer)
        for node in self.nodes.nodes.values():
            self._warn(app, node)
        return app

    def _resumed(self, message: CreateApp, peer: Peer) -> AppRecord | None:
        """The running app of a client that comes back, now its own again; None when it is new here."""
        if not message.app_id:
            return None
        app = self.objects.apps.get(check_id(message.app_id, "ap"))
        if app is None:
            return None
        if app.scope != peer.scope or app.name != message.name:  # also of one that has ended: its logs are under it
            raise ConflictError(f"app id `{message.app_id}` is taken")
        if app.state == "stopped" and not app.stopped_at:  # it ended with an earlier server
            return None
        if app.state != "running":
            raise ConflictError(f"app `{app.name}` was stopped: {app.reason}", hint="run it again")
        if app.owner is not None:
            if not peer.client_id or app.owner.client_id != peer.client_id:
                raise ConflictError(f"app id `{message.app_id}` is another client's")
            if app.owner is not peer:
                app.owner.stream.abort("its client came back on another connection")
        app.owner = peer
        return app

    def _switched(self, app: AppRecord) -> None:
        self.firings.switched(app)
        self.backoffs.switched(app)

    def check_deploy(self, peer: Peer, message: DeployApp) -> None:
        if self.ended.is_set() or self.draining:
            raise ServiceError("the server is ending", hint="try again")
        check_schedules(message.functions, time.time())
        check_environment(peer, message)

    def _images_in_use(self) -> set[str]:
        return images_of(self._specs_in_use())

    def _blobs_in_use(self) -> set[str]:
        return blobs_of(self._specs_in_use())

    def _specs_in_use(self) -> list[FunctionSpec]:
        """Of all that runs, and of the versions that deployed apps can go back to."""
        apps = self.objects.apps.values()
        running = [pool.spec for app in apps if app.state != "stopped" or app.others for pool in app.pools()]
        return running + [spec for app in apps for version in app.versions.values() for spec in version.specs]

    def bind_function(self, peer: Peer, message: BindFunction, parameters: bytes) -> FunctionRecord:
        """The variant that is asked for, ready to be called."""
        asker = peer.stream.owner.function.app if peer.is_runner else None
        function = self.objects.bind(
            message.function_id, message.options, parameters, trusted=asker is None, scope=peer.scope, app=asker
        )
        if function.app.state != "running":
            raise NotFoundError(f"function `{function.spec.tag}` has ended with its app")
        if function.function_id not in self.dispatch.functions:
            self._admit(function)
            if not function.app.deployed:
                self.kept.keep(function.app)
        return function

    def _admit(self, function: FunctionRecord) -> None:
        """Have a pool take inputs."""
        added = self.dispatch.add_function(time.monotonic(), function.function_id, options_of(function))
        self.reconciler.apply(added)
        self.backoffs.resume(function)
        self.reconciler.takeover.function_opened(function.function_id)

    def _stop_soon(self, app: AppRecord, reason: str) -> None:
        if app.app_id not in self._stopping:
            task = self.loop.create_task(self.stop_app(app, reason))
            task.add_done_callback(lambda done: done.exception())

    async def stop_app(self, app: AppRecord, reason: str, *, asked_by: Peer | None = None) -> None:
        """Cancel its inputs, end its containers, wait until they are gone. Whoever asks second waits with the first.
        Its followers are told, but for the one who asked."""
        if app.state == "stopped":
            return
        task = self._stopping.get(app.app_id)
        if task is None:
            task = self._stopping[app.app_id] = self.loop.create_task(self._stop_app(app, reason, asked_by))
            task.add_done_callback(lambda _: self._stopping.pop(app.app_id, None))
        await asyncio.shield(task)

    async def _stop_app(self, app: AppRecord, reason: str, asked_by: Peer | None) -> None:
        app.state, app.reason = "stopping", reason
        now = time.monotonic()
        mine = [record for record in self.reconciler.containers.values() if record.function.app is app]
        for function in app.pools():
            self.reconciler.apply(self.dispatch.close_function(now, function.function_id, reason))
        for record in mine:
            self.reconciler.stop_container(record.container_id, grace_of(record), reason, cancel=True)
        if mine:
            gone = [self.loop.create_task(record.gone.wait()) for record in mine]
            await asyncio.wait(gone, timeout=max(map(grace_of, mine)) + STOP_TIMEOUT)
        await self._end_output(app)
        self.objects.set_stopped(app, time.time())
        if app.deployed:
            self.firings.stopped(app)
            self.backoffs.switched(app)
        else:
            self.kept.forget(app.app_id)
        for peer in app.followers - {asked_by}:
            peer.stream.send(Notice(app.app_id, "stopped", {"reason": reason}))
        app.followers.clear()
        self.logs.close_app(app.app_id)
        self.busy_at = time.monotonic()

    # -- output

    def _on_output(self, node: Node, message: ContainerOutput, data: bytes) -> None:
        record = self.reconciler.containers.get(message.container_id)
        if record is None:
            self.reconciler.takeover.park_output(message, data)
            return
        if record.node is not node or message.stream not in ("stdout", "stderr"):
            return
        app = record.function.app
        entry = Record(time.time(), record.container_id, record.function.spec.tag, message.stream, data)
        self.logs.append(app.app_id, entry)
        for peer in app.followers:
            self._push_log(peer, app, entry)

    def tell_app(self, app: AppRecord, function: str, text: str) -> None:
        """A line of the platform's own in an app's output."""
        entry = self._log_of_app(app, function, text)
        for peer in app.followers:
            self._push_log(peer, app, entry)

    def _log_of_app(self, app: AppRecord, function: str, text: str) -> Record:
        """The same, of what its followers are told otherwise."""
        entry = Record(time.time(), "", function, "system", text.encode())
        self.logs.append(app.app_id, entry)
        return entry

    def _push_log(self, peer: Peer, app: AppRecord, entry: Record) -> None:
        """A follower that does not read loses output, and is told how much, rather than filling this memory."""
        is_away = peer.stream.closing and (peer.pushes is None or peer.pushes.size > AWAY_LOG_BYTES)
        if peer.stream.paused or is_away:
            lost = peer.dropped.setdefault(app.app_id, Dropped(entry.container_id, entry.function))
            lost.size += len(entry.data)
            lost.why = "the connection was broken" if is_away else lost.why
            return
        self._tell_dropped(peer, app)
        peer.push(log_chunk(app, entry), entry.data)

    def _tell_dropped(self, peer: Peer, app: AppRecord) -> None:
        lost = peer.dropped.pop(app.app_id, None)
        if lost is not None:
            text = f"[{lost.size} bytes of output were dropped, as {lost.why}]\n"
            note = Record(time.time(), lost.container_id, lost.function, "system", text.encode())
            peer.push(log_chunk(app, note), note.data)

    def _tell_all_dropped(self) -> None:
        """Followers that have caught up, of apps that have written nothing since."""
        for peer in self.peers:
            for app_id in list(peer.dropped) if not peer.stream.paused else ():
                self._tell_dropped(peer, self.objects.apps[app_id])

    async def _end_output(self, app: AppRecord) -> None:
        """Nothing more will come of the app: say now what its followers have missed."""
        for peer in [peer for peer in app.followers if app.app_id in peer.dropped]:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(peer.stream.drained(), DRAIN_TIMEOUT)
            self._tell_dropped(peer, app)

    def _warn(self, app: AppRecord, node: Node) -> None:
        """What protection is missing is said to whoever runs code there, each time."""
        for warning in node.machine.warnings:
            for peer in app.followers:
                peer.stream.send(Notice(app.app_id, "warning", {"reason": warning}))

    def notify(self, function: FunctionRecord, kind: str, data: dict[str, Any]) -> None:
        app = function.app
        for peer in app.followers:
            if not peer.stream.paused:
                peer.stream.send(Notice(app.app_id, kind, {"function": function.spec.tag, **data}))


def grace_of(record: ContainerRecord) -> float:
    """Seconds the container may take to end with its app: where nothing has been entered, nothing is to be left."""
    has_hooks = record.function.spec.exit_grace > 0 and record.state in ("ready", "draining")
    return record.function.spec.exit_grace if has_hooks else STOP_GRACE


def limits_of(config: Config) -> Limits:
    return Limits(config.log_days, config.log_app_mib << 20, int(config.log_total_gib * (1 << 30)))


class PendingAgent:
    """An agent that has said hello and not registered yet."""


def lock_state(config: Config) -> Any:
    """One server a state directory. Raises ConflictError; the lock goes with the returned file."""
    file = (config.state_dir / "lock").open("w")
    deadline = time.monotonic() + LOCK_TIMEOUT
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)  # nothing runs yet that this could hold up
    file.close()
    raise ConflictError(
        f"another server is using `{config.home}`",
        hint="`squall down` ends it; or set SQUALL_HOME to another directory",
    )
