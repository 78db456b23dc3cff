"""Clients from elsewhere: who comes in, what they see, and what they do not."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import squall
from squall.client import Client
from squall.exception import (
    AuthError,
    ConflictError,
    InvalidError,
    NotFoundError,
    PermissionDeniedError,
    ServiceError,
    VersionError,
)
from squall.protocol import remote
from squall.protocol.messages import (
    BindFunction,
    CancelCall,
    CreateApp,
    FunctionSpec,
    GetCall,
    GetImage,
    GetOutput,
    GetStats,
    Hello,
    InputItem,
    Message,
    StartExec,
    StopApp,
    StopContainer,
    Submit,
    decode,
    encode,
    new_id,
)
from squall.protocol.requests import (
    CreateEnvironment,
    CreateToken,
    CreateWorkspace,
    DeleteEnvironment,
    DeleteSecret,
    DeleteWorkspace,
    GetServer,
    GetTrace,
    ListObjects,
    PutSecret,
    ReadLogs,
    RenameEnvironment,
    RevokeToken,
    RotateToken,
    StopServer,
)
from squall.protocol.transport import FrameReader
from tests.conftest import wait_until
from tests.integration import workload
from tests.integration.staying import ask, client_of, here, new_token, server_log, settings, up
from tests.integration.staying import squall as command
from tests.integration.support import Kept, pid_of

pytestmark = pytest.mark.root

app = squall.App("place")


@app.function()
def place() -> tuple[str, str]:
    with open("/proc/self/uid_map") as file:
        return os.environ["SQUALL_ENVIRONMENT"], file.read().split()[1]


@pytest.fixture(scope="module")
def url(shared_home: Path) -> str:
    made = up(SQUALL_HEARTBEAT="0.5")
    client = here()
    ask(client, CreateWorkspace("team"))
    client.close()
    return made


@pytest.fixture(scope="module")
def mine(url: str) -> dict[str, Any]:
    return new_token(name="mine")


@pytest.fixture(scope="module")
def theirs(url: str) -> dict[str, Any]:
    return new_token(workspace="team", name="theirs")


@pytest.fixture(scope="module")
def running(url: str, mine: dict[str, Any]) -> Iterator[Client]:
    """Workload of the main workspace, with a container, a finished call and a secret."""
    with client_of(url, mine) as client:
        ask(client, PutSecret("db"), b'{"PASSWORD": "x"}')
        with workload.app.run(output=Kept()):
            assert workload.square.remote(7) == 49
            assert sorted(workload.square.map(range(100))) == sorted(x * x for x in range(100))
            yield client


def test_a_program_from_elsewhere_runs_functions_and_sees_their_output(running: Client) -> None:
    facts = ask(running, GetServer())
    assert (facts["workspace"], facts["environment"], facts["admin"], facts["stays"]) == ("main", "main", False, True)
    assert workload.echo.remote(b"x" * 3_000_000) == b"x" * 3_000_000
    with pytest.raises(ValueError, match="no luck"):
        workload.fail.remote("no luck")


FORBIDDEN: list[Message] = [
    CreateToken(),
    CreateToken("team", admin=True),
    RevokeToken("mine"),
    RotateToken("mine"),
    CreateWorkspace("mine"),
    DeleteWorkspace("main"),
    StopServer(),
]


@pytest.mark.parametrize("message", FORBIDDEN, ids=lambda message: message.TAG)
def test_without_an_administrators_token_nothing_of_the_server_is_managed(
    url: str, theirs: dict[str, Any], message: Message
) -> None:
    with client_of(url, theirs) as client, pytest.raises(PermissionDeniedError, match="only an administrator"):
        ask(client, message)


def test_an_administrator_from_elsewhere_manages_tokens(url: str) -> None:
    with client_of(url, new_token(admin=True)) as client:
        made = ask(client, CreateToken("team", "by admin"))
        assert ask(client, RevokeToken(made["token_id"])) == {"token_id": made["token_id"]}
        assert {"mine", "by admin"} <= {row["name"] for row in ask(client, ListObjects("tokens"))["rows"]}


def of_the_other_workspace(running: Client) -> list[tuple[Message, bytes]]:
    """Requests that name what the main workspace has, by its true ids."""
    assert workload.app._running is not None
    app_id, function_id = workload.app._running.app_id, workload.app._running.functions["square"]
    container_id = ask(running, ListObjects("containers"))["rows"][-1]["container_id"]
    call = workload.square.spawn(3)
    assert call.get(timeout=30) == 9
    call_id = call.object_id
    return [
        (StopApp(app_id), b""),
        (StopApp("workload"), b""),
        (GetStats(function_id), b""),
        (BindFunction(function_id, {"cpu": 1.0}), b""),
        (Submit(new_id("fc"), function_id, [InputItem(0, 1)]), b"x"),
        (Submit(call_id, function_id, [InputItem(1, 1)], kind="spawn"), b"x"),
        (StopContainer(container_id), b""),
        (StartExec(container_id, ["/bin/sh"]), b""),
        (ReadLogs(app=app_id), b""),
        (ReadLogs(app="workload"), b""),
        (ReadLogs(container_id=container_id), b""),
        (GetTrace(call_id), b""),
        (GetCall(call_id), b""),
        (GetOutput(call_id, timeout=0.0), b""),
        (CancelCall(call_id), b""),
        (DeleteSecret("db"), b""),
        (GetImage("im-"), b""),
    ]


def test_a_token_of_another_workspace_sees_nothing_of_ours(running: Client, url: str, theirs: dict[str, Any]) -> None:
    attempts = of_the_other_workspace(running)
    with client_of(url, theirs) as client:
        for kind in ("apps", "containers", "functions", "calls", "images", "secrets", "schedules"):
            assert ask(client, ListObjects(kind, all=True))["rows"] == [], kind
        assert {row["workspace"] for row in ask(client, ListObjects("tokens"))["rows"]} == {"team"}
        assert [row["name"] for row in ask(client, ListObjects("workspaces"))["rows"]] == ["team"]
        for message, payload in attempts:
            if not isinstance(message, CancelCall):  # which may be repeated for ever, and so says nothing
                with pytest.raises(NotFoundError):
                    ask(client, message, payload)
    assert workload.square.remote(2) == 4


def test_each_workspace_has_user_ids_of_its_own_and_containers_know_their_environment(
    url: str, mine: dict[str, Any], theirs: dict[str, Any]
) -> None:
    with client_of(url, mine), app.run(output=Kept()):
        ours = place.remote()
    with client_of(url, theirs) as client:
        ask(client, CreateEnvironment("dev"))
    with client_of(url, theirs, environment="dev"), app.run(output=Kept()):
        other = place.remote()
    assert (ours[0], other[0]) == ("main", "dev")
    assert ours[1] != other[1]


def test_an_environment_that_is_not_there_is_said_with_the_way_to_make_it(url: str, mine: dict[str, Any]) -> None:
    with pytest.raises(NotFoundError, match="no environment `nowhere`") as caught:
        Client.connect(config=settings(url, mine, environment="nowhere"))
    assert "squall environment create nowhere" in caught.value.hint


def test_environments_come_and_go_when_nothing_runs_in_them(url: str, mine: dict[str, Any]) -> None:
    with client_of(url, mine) as client:
        ask(client, CreateEnvironment("one"))
        with client_of(url, mine, environment="one") as inside:
            ask(inside, PutSecret("db"), b'{"A": "1"}')
            with app.run(output=Kept()), pytest.raises(ConflictError, match=r"has 1 app\(s\), such as `place`"):
                ask(client, DeleteEnvironment("one"))
        ask(client, RenameEnvironment("one", "two"))
        assert {"main", "two"} <= {row["name"] for row in ask(client, ListObjects("environments"))["rows"]}
        with client_of(url, mine, environment="two") as inside:
            assert [row["name"] for row in ask(inside, ListObjects("secrets"))["rows"]] == ["db"]
        ask(client, DeleteEnvironment("two"))
        with pytest.raises(InvalidError):
            ask(client, DeleteEnvironment("main"))


@pytest.mark.parametrize("token", [{"token_id": "", "secret": ""}, {"token_id": "tk-0", "secret": "x"}])
def test_nobody_comes_in_without_a_token(url: str, token: dict[str, Any]) -> None:
    with pytest.raises(AuthError):
        Client.connect(config=settings(url, token))


def test_a_token_that_expired_or_was_revoked_says_so(url: str) -> None:
    short = new_token(lifetime=0.1)
    wait_until(lambda: refused(url, short) == f"the token `{short['token_id']}` has expired", "the token has expired")
    token = new_token()
    client = here()
    ask(client, RevokeToken(token["token_id"]))
    client.close()
    assert refused(url, token) == f"the token `{token['token_id']}` was revoked"


def refused(url: str, token: dict[str, Any]) -> str:
    try:
        Client.connect(config=settings(url, token)).close()
    except AuthError as error:
        return error.message
    return ""


def test_connections_of_a_token_end_with_it(url: str) -> None:
    for end in ("revoke", "expire"):
        token = new_token(lifetime=2.0 if end == "expire" else 0.0)
        client = Client.connect(config=settings(url, token))
        if end == "revoke":
            operator = here()
            ask(operator, RevokeToken(token["token_id"]))
            operator.close()
        wait_until(is_closed(client), "the connection was closed")
        client.close()


def is_closed(client: Client) -> Callable[[], object]:
    return lambda: client.link.closed


def test_whoever_rotates_the_token_it_came_with_gets_the_answer(url: str) -> None:
    token = new_token()
    with client_of(url, token) as client:
        made = ask(client, RotateToken())
    assert refused(url, token) != ""
    with client_of(url, made) as client:
        assert ask(client, GetServer())["workspace"] == "main"


class Raw:
    """A connection from elsewhere that says what the test wants, and nothing by itself."""

    def __init__(self, url: str, **hello: Any) -> None:
        self.sock = remote.connect(url)
        self.sock.settimeout(30)
        self.reader = FrameReader()
        self.frames: list[Any] = []
        self.send(Hello(**{"role": "client", **hello}))

    def send(self, message: Message, payload: bytes = b"") -> None:
        self.sock.sendall(encode(message, payload))

    def receive(self) -> Message:
        while not self.frames:
            data = self.sock.recv(65536)
            if not data:
                raise EOFError
            self.frames += [decode(header) for header, _ in self.reader.feed(data)]
        found: Message = self.frames.pop(0)
        return found

    def ended(self) -> bool:
        try:
            while True:
                self.receive()
        except (EOFError, ConnectionError):
            self.sock.close()
            return True


def credentials(token: dict[str, Any]) -> str:
    return f"{token['token_id']}:{token['secret']}"


def test_a_hello_for_more_than_its_token_gives_is_refused(url: str, theirs: dict[str, Any]) -> None:
    for hello, code in (
        ({"workspace": "main"}, "permission_denied"),
        ({"role": "agent"}, "permission_denied"),
        ({"version": 999}, "version"),
        ({"environment": "../main"}, "not_found"),
    ):
        raw = Raw(url, token=credentials(theirs), **hello)
        answer: Any = raw.receive()
        assert (answer.TAG, answer.code) == ("failure", code), hello
        assert raw.ended()


def test_without_a_token_not_even_the_version_is_told(url: str) -> None:
    for hello in ({"version": 999}, {"role": "agent"}, {"token": "tk-1:" + "x" * 10_000}):
        raw = Raw(url, **hello)
        answer: Any = raw.receive()
        assert (answer.TAG, answer.code) == ("failure", "auth")
        assert raw.ended()


def test_functions_sent_by_value_need_the_servers_python_on_its_environment(url: str, mine: dict[str, Any]) -> None:
    raw = Raw(url, token=credentials(mine), python="3.9")
    assert raw.receive().TAG == "welcome"
    raw.send(CreateApp("old", [FunctionSpec("f", serialized_blob="0" * 64)], id=1))
    answer: Any = raw.receive()
    while answer.TAG == "ping":
        answer = raw.receive()
    assert (answer.code, "sent by value from Python 3.9" in answer.message) == (VersionError.code, True)
    assert "debian_slim('3.9')" in answer.hint
    raw.sock.close()


def test_a_client_that_is_silent_is_taken_for_dead(url: str, mine: dict[str, Any], shared_home: Path) -> None:
    raw = Raw(url, token=credentials(mine))
    assert raw.receive().TAG == "welcome"
    assert raw.ended()


def test_a_client_notices_a_server_that_stands_still(url: str, mine: dict[str, Any], shared_home: Path) -> None:
    client = Client.connect(config=settings(url, mine))
    pid = pid_of(shared_home, "server")
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: client.link.closed, "the client has given the server up")
        assert "nothing was heard of the server" in client.link.closed
        with pytest.raises(ServiceError):
            client.link.request(GetServer())
    finally:
        os.kill(pid, signal.SIGCONT)
        client.close()
    with client_of(url, mine) as again:
        assert ask(again, GetServer())["stays"]


def test_the_machines_own_socket_needs_no_token_and_may_do_everything(url: str) -> None:
    client = here()
    facts = ask(client, GetServer())
    assert (facts["admin"], facts["listens"]) == (True, url)
    client.close()


def test_commands_use_the_server_that_the_variables_name(url: str, mine: dict[str, Any], running: Client) -> None:
    env = {"SQUALL_SERVER": url, "SQUALL_TOKEN_ID": mine["token_id"], "SQUALL_TOKEN_SECRET": mine["secret"]}
    done = command("app", "list", "--json", **env)
    assert done.returncode == 0, done.stderr
    assert '"name": "workload"' in done.stdout
    done = command("status", **env)
    assert f"listens     {url}" in done.stdout
    done = command("token", "new", **env)
    assert (done.returncode, "only an administrator may make a token" in done.stderr) == (1, True)


def test_no_secret_of_a_token_is_in_the_log(url: str, mine: dict[str, Any], shared_home: Path) -> None:
    assert mine["secret"] not in server_log(shared_home)
    assert mine["secret"].encode() not in (shared_home / "state" / "squall.db").read_bytes()


def test_nothing_listens_where_it_was_not_asked_to(url: str) -> None:
    port = int(url.rpartition(":")[2])
    with socket.socket() as other:
        other.settimeout(5)
        assert other.connect_ex(("127.0.0.2", port)) != 0
