"""HAND: greets whoever connects, keeps watch over those from elsewhere, and answers what manages access.

On the machine's own socket (mode 0600) whoever connects may do everything and names the workspace and environment it
works in. From elsewhere nothing but a hello is read before a valid token was shown; the token names the workspace, and
only that of an administrator may manage tokens and workspaces. A connection whose token ends is closed; one that is
silent for three beats is taken for dead. Tested in `tests/integration/test_access.py`, attacked in
`tests/security/test_workspaces.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import resource
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from squall import __version__
from squall._observe import Logger, count
from squall.exception import ConflictError, Error, InvalidError, PermissionDeniedError, VersionError
from squall.protocol.messages import SUPPORTED_VERSIONS, Hello, Message, Ping, Welcome
from squall.protocol.requests import (
    CreateEnvironment,
    CreateToken,
    CreateWorkspace,
    DeleteEnvironment,
    DeleteSecret,
    DeleteWorkspace,
    GetServer,
    PutSecret,
    RenameEnvironment,
    RevokeToken,
    RotateToken,
    StopServer,
)
from squall.protocol.transport import FrameStream
from squall.server.api import Peer
from squall.server.auth import MAIN, Auth, Token
from squall.server.door import Answer, Door, Visitor, bearer_of, refused, respond
from squall.server.metrics import metrics_text
from squall.server.objects import Scope
from squall.server.sealing import Seal
from squall.server.vault import Vault
from squall.server.wire import decode, refuse

if TYPE_CHECKING:
    from squall.server.main import Server

log = Logger("server")

BEATS_MISSED = 3
HELLO_START = b'{"t":"hello"'


class Greeting:
    """A connection that has said who it is and waits to be let in."""


class Access:
    def __init__(self, server: Server) -> None:
        self.server = server
        self.loop = server.loop
        config = server.config
        self.auth = Auth(server.database)
        self.vault = Vault(server.database, Seal(config.state_dir / "seal.key", config.seal_key))
        self.door = Door(
            self.loop, server.on_frame, server.on_lost, self._respond, _connections(config.max_connections)
        )
        self.auth.on_ended = self._token_ended
        self._silent: dict[Peer, tuple[int, int]] = {}
        """Peers from elsewhere: what had come of each at the last beat, and for how many beats nothing more."""
        self._greetings: set[asyncio.Task[None]] = set()
        self._changing = asyncio.Lock()
        """One change at a time: each looks first whether it may be made."""
        self.handlers: dict[type[Message], Callable[[Peer, Any], Any]] = {
            CreateToken: self._locked(self.create_token),
            RevokeToken: self._locked(self.revoke_token),
            RotateToken: self._locked(self.rotate_token),
            CreateWorkspace: self._locked(self.create_workspace),
            DeleteWorkspace: self._locked(self.delete_workspace),
            CreateEnvironment: self._locked(self.create_environment),
            RenameEnvironment: self._locked(self.rename_environment),
            DeleteEnvironment: self._locked(self.delete_environment),
            DeleteSecret: self._locked(self.delete_secret),
            GetServer: self.get_server,
            StopServer: self.stop_server,
        }
        self.lists: dict[str, Callable[[Peer], list[dict[str, Any]]]] = {
            "tokens": lambda peer: self.auth.token_rows("" if peer.is_admin else peer.scope.workspace, time.time()),
            "workspaces": self._workspaces,
            "environments": lambda peer: self.auth.environment_rows(peer.scope.workspace),
            "secrets": lambda peer: self.vault.rows(peer.scope),
        }

    async def ready(self) -> None:
        await self.auth.ready()
        await self.vault.ready()

    async def check_place(self, scope: Scope) -> None:
        """Raise NotFoundError unless the place exists: what is made there must be found again."""
        if scope != Scope():
            await self.auth.ready()
            self.auth.scope(*scope)

    def bind(self) -> None:
        """Take the address to listen at, before anything is started that would have to be ended again."""
        config = self.server.config
        self.door.open(config.listen, config.tls_cert, config.tls_key)

    async def listen(self) -> None:
        """Open the door, now that the Store can say who may come in."""
        await self.ready()
        self.door.start()
        log.info("listening", at=self.url())
        if self.door.tls is None and not all(map(_is_loopback, self.door.addresses)):
            log.warning("tokens and values travel unencrypted: set `tls_cert` and `tls_key`, or put a proxy in front")

    def url(self) -> str:
        """Where clients from elsewhere find this server; empty when they cannot."""
        scheme = "https" if self.door.tls is not None else "http"
        return f"{scheme}://{self.door.addresses[0]}" if self.door.addresses else ""

    # -- greeting

    def greet(self, stream: FrameStream, header: bytes) -> None:
        """The first frame of a connection."""
        if isinstance(stream.owner, Greeting):
            stream.abort("it spoke before it was let in")
            return
        visitor: Visitor | None = stream.owner
        message = _hello_of(stream, header)
        if message is None:
            return
        is_plain = message.workspace in ("", MAIN) and message.environment in ("", MAIN)
        if self.auth.is_loaded or (visitor is None and is_plain):
            self._admit(stream, visitor, message)
            return
        stream.owner = Greeting()
        task = self.loop.create_task(self._admit_later(stream, visitor, message))
        self._greetings.add(task)
        task.add_done_callback(self._greetings.discard)

    async def _admit_later(self, stream: FrameStream, visitor: Visitor | None, message: Hello) -> None:
        try:
            await self.auth.ready()
        except Error as error:
            _turn_down(stream, message, error)
            return
        if not stream.closing:
            self._admit(stream, visitor, message)

    def _admit(self, stream: FrameStream, visitor: Visitor | None, message: Hello) -> None:
        try:
            # The token first: whoever has none learns nothing else, not even which version is spoken here.
            token = self.auth.verify(message.token, time.time()) if visitor is not None else None
            _check_version(message)
            scope = self._scope_of(message, token)
            if visitor is not None and message.role != "client":
                raise PermissionDeniedError("nodes join over the machine's own socket in this release")
        except Error as error:
            if visitor is not None:
                count("hellos_refused")
                log.debug("refused a connection", peer=visitor.address, reason=error.message)
            _turn_down(stream, message, error)
            return
        config = self.server.config
        heartbeat = config.heartbeat if visitor is not None else config.local_heartbeat
        if message.role == "agent":
            heartbeat = config.node_heartbeat
        if visitor is not None:
            visitor.door.admit(visitor)
        token_id, remote = (token.token_id, visitor.address) if token is not None and visitor is not None else ("", "")
        peer = self.server.welcome(stream, message, scope, token_id, remote)
        resumed = peer is not None and peer.has_come_before
        if peer is not None and token is not None:
            peer.is_admin, peer.remote = token.is_admin, remote
            self._silent[peer] = (0, 0)
        welcome = Welcome(self.server.server_id, pid=os.getpid(), heartbeat=heartbeat, stays=self.server.stays)
        welcome.resumed, welcome.re = resumed, message.id
        stream.send(welcome)
        if peer is not None and resumed:
            self.server.absences.back(peer, message)
        elif peer is not None:
            peer.has_come_before = True

    def _scope_of(self, message: Hello, token: Token | None) -> Scope:
        if token is not None and message.workspace not in ("", token.workspace):
            raise PermissionDeniedError(
                f"the token `{token.token_id}` is one of workspace `{token.workspace}`, not `{message.workspace[:80]}`"
            )
        workspace = token.workspace if token is not None else message.workspace
        if not self.auth.is_loaded:
            return Scope()
        return self.auth.scope(workspace, message.environment)

    # -- keeping watch

    async def watch(self) -> None:
        """Say something to everybody from elsewhere now and then, and miss those that say nothing.

        Both sides send without waiting for an answer: what comes at all shows that the other lives, and a beat never
        waits behind a large value that is under way in the same direction."""
        while True:
            await asyncio.sleep(self.server.config.heartbeat)
            now = time.time()
            self.server.absences.token_ended(functools.partial(self._has_ended, now))
            for peer in list(self._silent):
                if peer not in self.server.peers:
                    del self._silent[peer]
                    continue
                with contextlib.suppress(Error):
                    self._look_at(peer, now)

    async def watch_local(self) -> None:
        """Clients of this machine are asked for an answer, which whoever reads their connection gives. The kernel tells
        when one is gone: one that does not answer was stopped, or computes without letting its threads run. It keeps
        what it has, as it may go on at any time, and is told of."""
        while self.server.config.local_heartbeat:
            await asyncio.sleep(self.server.config.local_heartbeat)
            for peer in [peer for peer in self.server.peers if not peer.remote]:
                seen, missed = peer.heard
                missed = missed + 1 if peer.stream.received == seen else 0
                peer.heard = peer.stream.received, missed
                if missed == BEATS_MISSED:
                    log.warning("a client does not answer", apps=sorted(peer.apps), beats=missed)
                if not peer.stream.paused:
                    peer.stream.send(Ping(id=1))

    def silent(self) -> int:
        """Clients of this machine that do not answer."""
        return sum(peer.heard[1] >= BEATS_MISSED for peer in self.server.peers)

    def _has_ended(self, now: float, token_id: str) -> bool:
        token = self.auth.tokens.get(token_id)
        return token is None or bool(token.has_ended(now))

    def _look_at(self, peer: Peer, now: float) -> None:
        if self._has_ended(now, peer.token_id):
            self._close(peer, "its token counts no more")
            return
        seen, missed = self._silent[peer]
        missed = missed + 1 if peer.stream.received == seen else 0
        self._silent[peer] = (peer.stream.received, missed)
        if missed >= BEATS_MISSED:
            peer.stream.abort(f"it said nothing for {missed * self.server.config.heartbeat:g} s")
        elif not peer.stream.paused:
            peer.stream.send(Ping())

    def _token_ended(self, token: Token) -> None:
        self.server.absences.token_ended(lambda token_id: token_id == token.token_id)
        for peer in list(self._silent):
            if peer.token_id == token.token_id:
                # After what is being answered in this turn: it may be the very one that asked for it.
                self.loop.call_soon(self._close, peer, "its token counts no more")

    def _close(self, peer: Peer, reason: str) -> None:
        log.info("closed a connection", peer=peer.remote, token=peer.token_id, reason=reason)
        peer.leaving = "for good"
        peer.stream.close(reason)

    def _respond(self, method: str, target: str, authorization: str) -> Answer:
        facts = {
            "draining": self.server.draining,
            "version": __version__,
            "protocol": list(SUPPORTED_VERSIONS),
            "server_id": self.server.server_id,
        }
        if method not in ("GET", "HEAD"):
            return 405, {"code": "invalid", "message": f"`{method[:20]}` is not taken here"}
        if target.partition("?")[0] == "/metrics":
            return self._metrics(authorization)
        return respond(target, facts, lambda: _ignore(self.auth.verify(bearer_of(authorization), time.time())))

    def _metrics(self, authorization: str) -> Answer:
        """Of all that there is for an administrator's token, else without what belongs to other workspaces."""
        try:
            token = self.auth.verify(bearer_of(authorization), time.time())
        except Error as error:
            return refused(error)
        return 200, metrics_text(self.server, None if token.is_admin else Scope(token.workspace))

    # -- managing

    def _locked(self, body: Callable[[Peer, Any], Any]) -> Callable[[Peer, Any], Any]:
        async def alone(peer: Peer, message: Any) -> None:
            async with self._changing:
                await self.ready()
                await body(peer, message)

        return alone

    async def get_server(self, peer: Peer, message: GetServer) -> None:
        server = self.server
        peer.reply(
            message.id,
            {
                "server_id": server.server_id,
                "version": __version__,
                "home": str(server.config.home),
                "pid": os.getpid(),
                "started_at": server.started_at,
                "stays": server.stays,
                "listens": self.url() if self.auth.is_loaded else "",
                "draining": server.draining,
                "connections": len(server.peers),
                "away": len(server.absences.away),
                "silent": self.silent(),
                "workspace": peer.scope.workspace,
                "environment": peer.scope.environment,
                "admin": peer.is_admin,
            },
        )

    async def stop_server(self, peer: Peer, message: StopServer) -> None:
        need_admin(peer, "stop the server")
        peer.reply(message.id)
        self.server.end(message.reason or "asked to stop", message.grace)

    async def create_token(self, peer: Peer, message: CreateToken) -> None:
        need_admin(peer, "make a token")
        token, secret = await self.auth.create_token(
            message.workspace, message.name, time.time(), lifetime=message.lifetime, is_admin=message.admin
        )
        log.info("made a token", token=token.token_id, workspace=token.workspace, admin=token.is_admin)
        peer.reply(message.id, _shown(token, secret))

    async def revoke_token(self, peer: Peer, message: RevokeToken) -> None:
        need_admin(peer, "revoke a token")
        token = await self.auth.revoke_token(message.token_id, time.time())
        log.info("revoked a token", token=token.token_id)
        peer.reply(message.id, {"token_id": token.token_id})

    async def rotate_token(self, peer: Peer, message: RotateToken) -> None:
        token_id = message.token_id or peer.token_id
        if not token_id:
            raise InvalidError("which token is to get another secret?", hint="this connection came in without one")
        if token_id != peer.token_id:
            need_admin(peer, "rotate the token of another")
        token, secret = await self.auth.rotate_token(token_id, time.time(), message.grace)
        log.info("gave a token another secret", token=token.token_id)
        peer.reply(message.id, _shown(token, secret))

    def _workspaces(self, peer: Peer) -> list[dict[str, Any]]:
        rows = self.auth.workspace_rows()
        return rows if peer.is_admin else [row for row in rows if row["name"] == peer.scope.workspace]

    async def create_workspace(self, peer: Peer, message: CreateWorkspace) -> None:
        need_admin(peer, "make a workspace")
        await self.auth.create_workspace(message.name, time.time())
        peer.reply(message.id)

    async def delete_workspace(self, peer: Peer, message: DeleteWorkspace) -> None:
        need_admin(peer, "delete a workspace")
        self.auth.scope(message.name, MAIN)
        self._check_empty(message.name, "")
        await self.auth.delete_workspace(message.name, time.time())
        self.vault.forget(lambda place: place.workspace == message.name)
        peer.reply(message.id)

    async def create_environment(self, peer: Peer, message: CreateEnvironment) -> None:
        await self.auth.create_environment(peer.scope.workspace, message.name, time.time())
        peer.reply(message.id)

    async def rename_environment(self, peer: Peer, message: RenameEnvironment) -> None:
        workspace = peer.scope.workspace
        self.auth.check_rename(workspace, message.name, message.new_name)
        self._check_empty(workspace, message.name)
        scope, objects = Scope(workspace, message.name), self.server.objects
        await self.vault.rename_environment(scope, message.new_name, objects.renaming(scope, message.new_name))
        objects.renamed_environment(scope, message.new_name)
        self.auth.renamed_environment(workspace, message.name, message.new_name)
        peer.reply(message.id)

    async def delete_environment(self, peer: Peer, message: DeleteEnvironment) -> None:
        workspace = peer.scope.workspace
        self.auth.check_delete(workspace, message.name)
        self._check_empty(workspace, message.name)
        await self.vault.delete_environment(Scope(workspace, message.name))
        self.auth.deleted_environment(workspace, message.name)
        peer.reply(message.id)

    def _check_empty(self, workspace: str, environment: str) -> None:
        """Nothing may be in a place that goes away or gets another name; no `environment` means all of them."""
        apps = [app for app in self.server.objects.apps.values() if app.state != "stopped"]
        inside = [app for app in apps if app.scope.workspace == workspace]
        inside = [app for app in inside if environment in ("", app.scope.environment)]
        if inside:
            what = f"environment `{environment}`" if environment else f"workspace `{workspace}`"
            raise ConflictError(
                f"{what} has {len(inside)} app(s), such as `{inside[0].name}`", hint="`squall app stop` ends an app"
            )

    def put_secret(self, peer: Peer, message: PutSecret, payload: bytes) -> None:
        """Not by the table: it has a payload."""
        body = self._locked(lambda peer, message: self._put_secret(peer, message, payload))
        self.server.api.run_slowly(peer, message, body)

    async def _put_secret(self, peer: Peer, message: PutSecret, payload: bytes) -> None:
        try:
            values = json.loads(bytes(payload))
        except ValueError:  # its text would quote the payload
            raise InvalidError(f"secret `{message.name[:80]}`: the values are no JSON object") from None
        await self.vault.put(peer.scope, message.name, values, time.time(), replace=message.replace)
        log.info("kept a secret", name=message.name, environment=peer.scope.environment, keys=len(values))
        peer.reply(message.id)

    async def delete_secret(self, peer: Peer, message: DeleteSecret) -> None:
        await self.vault.delete(peer.scope, message.name)
        log.info("deleted a secret", name=message.name, environment=peer.scope.environment)
        peer.reply(message.id)


def need_admin(peer: Peer, what: str) -> None:
    if not peer.is_admin:
        raise PermissionDeniedError(
            f"only an administrator may {what}",
            hint="run the command on the server's machine, or with a token of `squall token new --admin`",
        )


def _shown(token: Token, secret: str) -> dict[str, Any]:
    shown = {"token_id": token.token_id, "secret": secret, "name": token.name}
    return {**shown, "workspace": token.workspace, "expires_at": token.expires_at, "admin": token.is_admin}


def _hello_of(stream: FrameStream, header: bytes) -> Hello | None:
    if not header.startswith(HELLO_START):
        stream.abort("its first message was not a hello")
        return None
    try:
        message = decode(header)
    except ValueError as error:
        stream.abort(f"received garbage: {error}")
        return None
    if not isinstance(message, Hello) or message.role not in ("client", "agent"):
        stream.abort("its first message was not a hello")
        return None
    return message


def _check_version(message: Hello) -> None:
    if message.version not in SUPPORTED_VERSIONS:
        known = ", ".join(map(str, SUPPORTED_VERSIONS))
        raise VersionError(
            f"this server speaks protocol version {known}, the {message.role} speaks {message.version}",
            hint="use the same release of squall on both sides; `squall down` ends a server that was left running",
        )


def _turn_down(stream: FrameStream, message: Hello, error: Error) -> None:
    refuse(stream, message.id, error)
    stream.close(error.message)


def _connections(wanted: int) -> int:
    """How many may come from elsewhere: containers and files need descriptors too."""
    return max(1, min(wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2))


def _is_loopback(address: str) -> bool:
    return address.startswith(("127.", "[::1]"))


def _ignore(_: object) -> None:
    """A check whose result nobody needs."""
