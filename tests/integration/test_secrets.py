"""Secrets that the server keeps: who gets them, when, and who never does."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import squall
from squall import config
from squall.client import Client
from squall.exception import NotFoundError, RemoteError, ResourceExhaustedError
from squall.protocol.requests import CreateEnvironment, DeleteSecret, ListObjects, PutSecret
from tests.integration.support import Kept, containers_of, wait_ended

pytestmark = pytest.mark.root

MARK = "-".join(["kept", "value"])
"""Part of every value, and in this form not in the source that containers get."""

app = squall.App("secretive")
DB = squall.Secret.from_name("db", required_keys=["PASSWORD"])


@app.function(secrets=[DB], scaledown_window=2, max_containers=1)
def password() -> str | None:
    return os.environ.get("PASSWORD")


@app.function(max_containers=1)
def plain() -> dict[str, str]:
    return dict(os.environ)


@app.function(secrets=[DB], env={"PASSWORD": "from the program"}, max_containers=1)
def overlaid() -> tuple[str | None, str | None]:
    return os.environ.get("PASSWORD"), os.environ.get("USER_NAME")


@app.function(max_containers=1)
def greedy() -> str | None:
    return password.with_options(secrets=[squall.Secret.from_name("other")]).remote()


def keep(name: str, replace: bool = False, **values: str) -> None:
    Client.current().link.request(PutSecret(name, replace), json.dumps(values).encode()).wait(20)


@pytest.fixture
def home_with_secrets(home: Path) -> Path:
    keep("db", PASSWORD=f"first-{MARK}", USER_NAME="ada")
    keep("other", TOKEN=f"other-{MARK}")
    return home


def test_a_secret_reaches_the_containers_that_name_it_and_no_others(home_with_secrets: Path) -> None:
    output = Kept()
    with app.run(output=output):
        assert password.remote() == f"first-{MARK}"
        assert "PASSWORD" not in plain.remote()
        assert overlaid.remote() == ("from the program", "ada")
        with pytest.raises(squall.Error, match="a container cannot ask for secrets"):
            greedy.remote()
    assert MARK.encode() not in output.text()


def test_values_are_on_disk_and_in_logs_nowhere(home_with_secrets: Path) -> None:
    with app.run(output=Kept()):
        assert password.remote() == f"first-{MARK}"
    reply, _ = Client.current().link.request(ListObjects("secrets")).wait(20)
    assert [(row["name"], row["keys"]) for row in reply.data["rows"]] == [
        ("db", ["PASSWORD", "USER_NAME"]),
        ("other", ["TOKEN"]),
    ]
    assert MARK not in json.dumps(reply.data)
    holding = [path for path in home_with_secrets.rglob("*") if path.is_file() and MARK.encode() in path.read_bytes()]
    assert holding == []
    assert (config.load().state_dir / "seal.key").stat().st_mode & 0o777 == 0o600


def test_a_replaced_secret_is_for_containers_from_then_on(home_with_secrets: Path) -> None:
    with app.run(output=Kept()):
        assert password.remote() == f"first-{MARK}"
        keep("db", replace=True, PASSWORD=f"second-{MARK}")
        assert password.remote() == f"first-{MARK}"
        wait_ended("password")
        assert password.remote() == f"second-{MARK}"


def test_a_secret_that_is_missing_stops_the_app_before_anything_starts(home: Path) -> None:
    with pytest.raises(NotFoundError, match=r"function `password`: no secret `db`"), app.run(output=Kept()):
        pass
    keep("db", USER_NAME="ada")
    with pytest.raises(NotFoundError, match=r"secret `db` has no key `PASSWORD`"), app.run(output=Kept()):
        pass


def test_a_deleted_secret_fails_what_would_start_and_nothing_that_runs(home_with_secrets: Path) -> None:
    with app.run(output=Kept()):
        assert password.remote() == f"first-{MARK}"
        Client.current().link.request(DeleteSecret("db")).wait(20)
        assert password.remote() == f"first-{MARK}"
        with pytest.raises(ResourceExhaustedError, match="no secret `db`"):
            overlaid.remote()
        assert containers_of("overlaid", include_all=True) == []


def test_a_secret_of_another_environment_is_named_with_it(home: Path) -> None:
    link = Client.current().link
    link.request(CreateEnvironment("dev")).wait(20)
    os.environ["SQUALL_ENVIRONMENT"] = "dev"
    try:
        dev = Client.connect()
        dev.link.request(PutSecret("db"), b'{"PASSWORD": "of dev"}').wait(20)
        dev.close()
    finally:
        del os.environ["SQUALL_ENVIRONMENT"]
    elsewhere = squall.App("elsewhere")
    secret = squall.Secret.from_name("db", environment_name="dev")
    ask: Any = elsewhere.function(serialized=True, name="ask", secrets=[secret])(lambda: os.environ["PASSWORD"])
    with elsewhere.run(output=Kept()):
        assert ask.remote() == "of dev"
    with pytest.raises((NotFoundError, RemoteError), match="no secret `db`"), app.run(output=Kept()):
        pass


def test_a_deployed_app_whose_secret_is_missing_is_not_deployed(home: Path) -> None:
    with pytest.raises(NotFoundError, match="no secret `db`"):
        app.deploy(name="secretive")
    keep("db", PASSWORD="kept")
    app.deploy(name="secretive")
    found: Any = squall.Function.from_name("secretive", "password")
    assert found.remote() == "kept"


def test_an_app_is_not_deployed_into_an_environment_that_is_not_there(home: Path) -> None:
    with pytest.raises(NotFoundError, match="no environment `nowhere`"):
        app.deploy(name="secretive", environment_name="nowhere")
