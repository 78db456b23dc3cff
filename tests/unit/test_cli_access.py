"""`squall profile`, `config`, durations, and what `up` and `status` print, where no server is needed."""

from __future__ import annotations

import io
import json
from pathlib import Path

import click
import pytest

from squall import config
from squall.cli import access, admin, main, up


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration file of this test's own, and nothing that a command leaves in the environment."""
    path = tmp_path / "config.toml"
    path.write_text('[profile.team]\nserver = "http://team:1"\ntoken_id = "tk-1"\ntoken_secret = "hidden-secret"\n')
    monkeypatch.setenv("SQUALL_CONFIG", str(path))
    monkeypatch.setenv("SQUALL_HOME", str(tmp_path))
    for name in ("SQUALL_PROFILE", "SQUALL_ENVIRONMENT", "SQUALL_SERVER"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return path


def run(*words: str) -> int:
    return main.execute(list(words))


def test_profiles_are_listed_without_their_secrets(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("profile", "activate", "team") == 0
    assert run("profile", "list", "--json") == 0
    assert run("profile", "current") == 0
    out = capsys.readouterr().out
    assert '"server": "http://team:1"' in out
    assert '"active": true' in out
    assert out.endswith("team\n")
    assert "hidden-secret" not in out


def test_a_profile_that_is_not_there_is_not_activated(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("profile", "activate", "nobody") == 1
    assert "no profile `nobody`" in capsys.readouterr().err
    assert "active" not in file.read_text()


def test_no_profile_is_activated_by_a_dash(file: Path) -> None:
    assert run("profile", "activate", "team") == 0
    assert config.load().server == "http://team:1"
    assert run("profile", "activate", "-") == 0
    assert config.load().server == ""


def test_settings_in_force_are_shown_without_secrets(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("profile", "activate", "team") == 0
    capsys.readouterr()
    assert run("config", "show", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["server"], shown["token_secret"]) == ("http://team:1", "(set)")
    assert run("config", "show") == 0
    assert "hidden-secret" not in capsys.readouterr().out


def test_the_environment_is_kept_in_the_active_profile(file: Path) -> None:
    assert run("config", "set-environment", "dev") == 0
    assert config.load().environment == "dev"
    assert run("profile", "activate", "team") == 0
    assert run("config", "set-environment", "staging") == 0
    assert config.profiles()["team"]["environment"] == "staging"
    assert config.load().environment == "staging"


def test_a_token_is_kept_without_being_tried(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--server", "https://new:2", "--token-id", "tk-2", "--token-secret", "s2", "--no-verify"]
    assert run("token", "set", "--profile", "new", *words) == 0
    assert config.load().server == "https://new:2"
    assert config.profiles()["new"]["token_secret"] == "s2"
    assert file.stat().st_mode & 0o777 == 0o600
    assert "s2" not in capsys.readouterr().err


def test_a_secret_may_come_through_a_pipe(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["token", "set", "--profile", "new", "--server", "https://new:2", "--token-id", "tk-2", "--no-verify"]
    monkeypatch.setattr("sys.stdin", io.StringIO("piped-secret\n"))
    assert run(*words) == 0
    assert config.profiles()["new"]["token_secret"] == "piped-secret"
    assert run(*words) == 1
    assert "the token secret was to come on standard input" in capsys.readouterr().err


def test_a_token_is_tried_before_it_is_kept(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--server", "http://127.0.0.1:9", "--token-id", "tk-2", "--token-secret", "s2"]
    assert run("token", "set", "--profile", "new", *words) == 1
    assert "cannot connect" in capsys.readouterr().err
    assert "new" not in config.profiles()


@pytest.mark.parametrize(
    ("text", "seconds"), [("90d", 7_776_000), ("12h", 43_200), ("1.5m", 90), ("45s", 45), ("2w", 1_209_600)]
)
def test_durations(text: str, seconds: float) -> None:
    assert access.Duration().convert(text, None, None) == seconds


@pytest.mark.parametrize("text", ["", "90", "d", "-1d", "1y", "1 d"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(click.UsageError, match="is no duration"):
        access.Duration().convert(text, None, None)


def test_commands_take_an_environment_and_a_profile_where_that_means_something() -> None:
    def options(*words: str) -> set[str]:
        command: click.Command = main.cli
        context = click.Context(command)
        for word in words:
            assert isinstance(command, click.Group)
            found = command.get_command(context, word)
            assert found is not None
            command = found
        return {option for param in command.params for option in param.opts}

    assert {"-e", "--env", "--profile"} <= options("app", "list") & options("run") & options("secret", "create")
    assert not {"-e", "--profile"} & (options("up") | options("doctor") | options("config", "show"))


def test_the_unit_file_starts_this_installation_with_what_is_set(tmp_path: Path) -> None:
    settings = config.Config(home=tmp_path, listen="0.0.0.0:7777", tls_cert="/etc/my certs/c.pem", tls_key="/k.pem")
    text = up.unit(settings)
    assert f"Environment=SQUALL_HOME={tmp_path}" in text
    assert " up --listen 0.0.0.0:7777 --tls-cert '/etc/my certs/c.pem' --tls-key /k.pem\n" in text
    assert "TimeoutStopSec=120" in text


def test_up_needs_both_files_of_a_certificate(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("up", "--systemd", "--tls-cert", "c.pem") == 1
    assert "needs a certificate and its key" in capsys.readouterr().err


def test_status_of_a_server_is_told_in_lines() -> None:
    facts = {
        "running": True, "home": "/h", "server_id": "sv-1", "version": "1", "pid": 7, "stays": True, "draining": False,
        "started_at": 0.0, "listens": "http://x:1", "workspace": "main", "environment": "dev", "nodes": [],
        "apps": 0, "containers": 0,
    }  # fmt: skip
    lines = admin.status_lines(facts)
    assert "server      running, sv-1, version 1, pid 7, stays" in lines
    assert "workspace   main, environment dev" in lines
