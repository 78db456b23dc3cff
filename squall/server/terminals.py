"""Terminals: user code in a container that has asked for the terminal of the program that runs its app.

One container of an app has it at a time; others wait in the order they asked, and the person at the terminal is told.
Bytes go both ways as those of an exec, with the runner at one end and the client at the other. While a container asks
for or has the terminal, dispatch lets no timeout end what runs in it. A session ends with the runner's word, with
either connection, or with a client that does not read. Nothing here looks into the bytes: they are the user's own
program's, on the user's own terminal. Tested in `tests/integration/test_terminals.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from squall.exception import ConflictError, InvalidError, ServiceError
from squall.protocol.messages import ExecData, ExecExit, Interact, new_id

if TYPE_CHECKING:
    from squall.server.api import Peer
    from squall.server.containers import ContainerRecord
    from squall.server.dispatch import Dispatch
    from squall.server.objects import AppRecord

UNREAD_LIMIT_BYTES = 64 << 20
"""Output that may wait here for a terminal that does not read."""


KEYS_LIMIT_BYTES = 16 << 20
"""Input that may wait here for a container that does not read: an honest client sends no more than it was allowed."""


class Session:
    """One container's turn at a terminal."""

    def __init__(self, record: ContainerRecord, runner: Peer, client: Peer, request_id: int) -> None:
        self.exec_id = new_id("ex")
        self.record = record
        self.runner = runner
        self.client = client
        self.request_id = request_id
        """Of the runner's question; 0 once it was answered."""


class Terminals:
    def __init__(self, dispatch: Dispatch, kill: Callable[[ContainerRecord, str], None]) -> None:
        self._attend = dispatch.attend
        self._kill = kill
        """Ends a container and what runs in it; what its user sees is the reason."""
        self._queues: dict[AppRecord, list[Session]] = {}
        """The first of each has the terminal."""
        self._sessions: dict[str, Session] = {}

    # -- from runners

    def ask(self, runner: Peer, message: Interact, payload: bytes) -> None:
        """Answered when it has the terminal. A runner asks once at a time: no more wait than there are containers."""
        record: ContainerRecord = runner.stream.owner
        app = record.function.app
        if not app.terminal:
            raise InvalidError("the app was run without a terminal", hint="run it with `squall run -i`")
        if app.owner is None:
            raise ServiceError("the program that ran the app has gone, and its terminal with it")
        if self._of(runner) is not None:
            raise ConflictError("this container has asked for the terminal already")
        session = Session(record, runner, app.owner, message.id)
        self._sessions[session.exec_id] = session
        queue = self._queues.setdefault(app, [])
        queue.append(session)
        self._attend(time.monotonic(), record.container_id, True)
        self._tell(session, session.exec_id if queue[0] is session else "")

    def from_runner(self, runner: Peer, message: Any, payload: bytes) -> None:
        """What it writes, how much it has taken, or that it is done; that it no longer waits, too."""
        session = self._of(runner)
        if session is None:
            return
        if isinstance(message, ExecExit):
            self._end(session, message.code)
        elif session.request_id or message.exec_id != session.exec_id:
            return  # it has not got it yet
        elif session.client.stream.waiting_bytes() > UNREAD_LIMIT_BYTES:
            self._end(session, 137, "its output came faster than it was read")
        elif message.stream == "stdin":
            session.client.stream.send(ExecData(session.exec_id, "stdin", credit=max(0, message.credit)))
        else:
            session.client.stream.send(ExecData(session.exec_id, "stdout"), payload)

    # -- from clients

    def from_client(self, client: Peer, message: ExecData, payload: bytes) -> None:
        """Keys and sizes; the first size is how a client says that its terminal is lent."""
        session = self._sessions.get(message.exec_id)
        if session is None or session.client is not client:
            return
        if message.stream == "resize" and session.request_id:
            size = {"exec_id": session.exec_id, "rows": message.rows, "cols": message.cols}
            request_id, session.request_id = session.request_id, 0
            session.runner.reply(request_id, size)
        elif message.stream == "kill":
            self._kill(session.record, "killed from the terminal")
        elif session.runner.stream.waiting_bytes() > KEYS_LIMIT_BYTES:
            self._end(session, 137, "its input came faster than it was read")
        elif not session.request_id:
            session.runner.stream.send(message, payload)

    def peer_lost(self, peer: Peer) -> None:
        """A client or a runner is gone."""
        for session in [found for found in self._sessions.values() if peer in (found.client, found.runner)]:
            reason = "its container ended" if peer is session.runner else "its terminal has gone"
            self._end(session, 137, reason)

    # -- both

    def _of(self, runner: Peer) -> Session | None:
        queue = self._queues.get(runner.stream.owner.function.app, [])
        return next((session for session in queue if session.runner is runner), None)

    def _tell(self, session: Session, exec_id: str) -> None:
        record = session.record
        message = Interact(record.function.app.app_id, record.container_id, record.function.spec.tag, exec_id)
        session.client.stream.send(message)

    def _end(self, session: Session, code: int, reason: str = "") -> None:
        """Tell both ends, and give the terminal to who is next."""
        del self._sessions[session.exec_id]
        app = session.record.function.app
        queue = self._queues[app]
        had_it = queue[0] is session
        queue.remove(session)
        if not queue:
            del self._queues[app]
        self._attend(time.monotonic(), session.record.container_id, False)
        if session.request_id:
            session.runner.refuse(session.request_id, ServiceError(reason or "the terminal was not wanted any more"))
        else:
            session.runner.stream.send(ExecExit(session.exec_id, code, reason))
        if had_it:
            session.client.stream.send(ExecExit(session.exec_id, code, reason))
            if queue:
                self._tell(queue[0], queue[0].exec_id)
