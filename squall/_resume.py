"""Coming back: how a client whose connection broke, or whose server ended, goes on over another connection.

A thread tries, with growing pauses and until a deadline, to connect (an embedded server that is gone is started again),
to say hello, and to name its running apps with their ids; then the link goes on, and every call that has no result yet
is sent again under its own id. The server knows those it has, so nothing whose result is known anywhere is run again.
Must never decide what is sent again: `transport.Link` and the sinks of the calls do. Tested in
`tests/integration/test_resume.py` and `tests/integration/test_resume.py`.
"""

from __future__ import annotations

import random
import socket
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from squall._observe import Logger
from squall.exception import (
    AuthError,
    Error,
    InvalidError,
    PermissionDeniedError,
    ServiceError,
    VersionError,
    from_wire,
)
from squall.protocol.frames import FrameReader
from squall.protocol.messages import BindFunction, CreateApp, Failure, Message, Notice, Reply, Welcome, decode, encode
from squall.protocol.resumption import Settled
from squall.protocol.transport import RECEIVE_BYTES, payload_for

if TYPE_CHECKING:
    from squall.client import Client

log = Logger("client")

FIRST_PAUSE_S = 0.02
RESTART_S = 3.0
RESTART_PAUSE_S = 0.1
"""The longest pause for so long: as a rule it is a restart, and who waits for it shall not wait as long again."""
LONGEST_PAUSE_S = 1.0
ANSWER_TIMEOUT = 30.0
HEALTHY_AFTER_S = 5.0
"""A connection that lasted this long was a good one: the next attempts begin without a pause."""
TELL_AFTER_S = 2.0
"""Who follows an app hears of it only then: a restart takes less."""
FINAL = (AuthError, PermissionDeniedError, VersionError, InvalidError)
"""What a server says that it will say again."""


class Greeting:
    """The first words on a new connection, before it is the link's."""

    def __init__(self, client: Client, sock: socket.socket) -> None:
        self.client = client
        self.sock = sock
        self.reader = FrameReader()
        self.early: list[tuple[bytes, Any]] = []
        self._asked = 0
        sock.settimeout(ANSWER_TIMEOUT)

    def greet(self) -> Welcome:
        self.sock.sendall(encode(self.client.hello()))
        while True:
            message, _ = self._receive()
            if isinstance(message, Welcome):
                return message
            if isinstance(message, Failure):
                raise from_wire(message.code, message.message, message.hint)

    def ask(self, message: Message, payload: bytes = b"") -> None:
        """Say again what was answered well before. Raises what the server has against it now."""
        self._asked += 1
        asked = replace(message, id=self._asked, re=0)
        self.sock.sendall(encode(asked, payload))
        while True:
            answer, data = self._receive()
            if isinstance(answer, (Reply, Failure)) and answer.re == asked.id:
                break
            self.client.on_push(answer, data)
        if isinstance(answer, Failure):
            raise from_wire(answer.code, answer.message, answer.hint)

    def _receive(self) -> tuple[Message, Any]:
        while not self.early:
            data = self.sock.recv(RECEIVE_BYTES)
            if not data:
                raise ServiceError("the server closed the connection")
            self.early += self.reader.feed(data)
        header, payload = self.early.pop(0)
        message = decode(header)
        return message, payload_for(message, payload)


class Return:
    """One attempt, however many tries it takes, to go on after the connection was lost for `reason`."""

    def __init__(self, client: Client, reason: str, timeout: float, pause: float) -> None:
        self.client = client
        self.reason = reason
        self.timeout = timeout
        self.pause = pause
        self._began = time.monotonic()
        self._told = False

    def start(self) -> None:
        threading.Thread(target=self._run, name="squall-resume", daemon=True).start()

    def _run(self) -> None:
        link = self.client.link
        try:
            self._try_until_it_works()
        except Exception as error:  # whatever it is, nobody may be left waiting
            said = error.message if isinstance(error, Error) else repr(error)
            within = "" if isinstance(error, FINAL) else f" within {self.timeout:g} s"
            link.give_up(f"{self.reason}, and it could not be made again{within}: {said}")

    def _try_until_it_works(self) -> None:
        deadline = self._began + self.timeout
        pause = self.pause
        while self.client.usable():
            try:
                self._try()
                return
            except FINAL:
                raise
            except (Error, OSError, ValueError) as error:
                log.debug("no connection yet", error=str(error))
                if time.monotonic() + pause > deadline:
                    raise
            self._tell()
            time.sleep(pause * random.uniform(0.7, 1.3))  # a thousand clients shall not come back in step
            is_restart = time.monotonic() - self._began < RESTART_S
            pause = min(RESTART_PAUSE_S if is_restart else LONGEST_PAUSE_S, max(pause, FIRST_PAUSE_S) * 1.5)

    def _try(self) -> None:
        client = self.client
        sock = client.reach()
        client.link.await_readers()  # what came before is counted by then
        try:
            greeting = Greeting(client, sock)
            welcome = greeting.greet()
            if not welcome.resumed:
                client.received = 0
            for app_id, message in list(client.apps.items()):
                self._resume_app(greeting, app_id, message)
            for pool, parameters in list(client.pools.values()):
                self._resume_pool(greeting, pool, parameters)
        except BaseException:
            sock.close()
            raise
        client.link.resume(sock, greeting.reader, greeting.early, lambda: [*client.unanswered(), (Settled(), b"")])
        client.welcomed(welcome)

    def _resume_app(self, greeting: Greeting, app_id: str, message: CreateApp) -> None:
        try:
            greeting.ask(message)
        except ServiceError:
            raise
        except Error as error:  # it was stopped meanwhile: its calls will be told so
            self.client.apps.pop(app_id, None)
            self.client.on_push(Notice(app_id, "stopped", {"reason": error.message}), b"")

    def _resume_pool(self, greeting: Greeting, message: BindFunction, parameters: bytes) -> None:
        try:
            greeting.ask(message, parameters)
        except ServiceError:
            raise
        except Error as error:  # its app is gone: its calls will be told so
            log.debug("a variant is not there any more", function=message.function_id, error=error.message)

    def _tell(self) -> None:
        if self._told or time.monotonic() - self._began < TELL_AFTER_S:
            return
        self._told = True
        reason = f"the server is away ({self.reason}); waiting up to {self.timeout:g} s for it"
        for app_id in list(self.client.apps):
            self.client.on_push(Notice(app_id, "warning", {"reason": reason}), b"")
