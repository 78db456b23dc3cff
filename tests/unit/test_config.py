"""Settings: where a value comes from, and what is said of one that makes no sense."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from squall import config
from squall.exception import InvalidError


def load(tmp_path: Path, text: str = "", **env: str) -> config.Config:
    """The settings with this file and these variables."""
    path = tmp_path / "config.toml"
    path.write_text(text)
    return config.load({"HOME": "/home/me", "SQUALL_CONFIG": str(path), **env})


def test_every_setting_has_its_default_when_nothing_is_set(tmp_path: Path) -> None:
    loaded = load(tmp_path)
    assert loaded.runtime == "auto"
    assert loaded.idle_timeout == 15.0
    assert loaded.traceback is False


def test_variable_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    loaded = load(tmp_path, "idle_timeout = 3\nnode_cpus = 2.5\n", SQUALL_IDLE_TIMEOUT="7")
    assert (loaded.idle_timeout, loaded.node_cpus) == (7.0, 2.5)


def test_home_is_absolute_and_holds_all_directories(tmp_path: Path) -> None:
    loaded = load(tmp_path, SQUALL_HOME="/srv/../srv/squall")
    assert loaded.home == Path("/srv/squall")
    assert loaded.socket_path == Path("/srv/squall/run/server.sock")


def test_home_too_long_for_a_socket_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match="too long for a socket") as caught:
        load(tmp_path, SQUALL_HOME="/" + "x" * 100)
    assert "SQUALL_HOME" in caught.value.hint


def test_home_of_root_is_roots_own_whatever_home_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    home = config.default_home({"HOME": "/home/me", "XDG_DATA_HOME": "/home/me/data"})
    assert not str(home).startswith("/home/me")


def test_home_of_a_user_is_the_xdg_data_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert config.default_home({"HOME": "/home/me"}) == Path("/home/me/.local/share/squall")
    assert config.default_home({"HOME": "/home/me", "XDG_DATA_HOME": "/data"}) == Path("/data/squall")
    assert config.default_home({"HOME": "/home/me", "XDG_DATA_HOME": "data"}) == Path("/home/me/.local/share/squall")


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("SQUALL_RUNTIME", "docker", "auto, native, process"),
        ("SQUALL_IDLE_TIMEOUT", "soon", "seconds an embedded server stays"),
        ("SQUALL_IDLE_TIMEOUT", "-1", "at least 0"),
        ("SQUALL_IDLE_TIMEOUT", "nan", "at least 0"),
        ("SQUALL_NODE_MEMORY_MIB", "1.5", "memory offered"),
        ("SQUALL_TRACEBACK", "perhaps", "frames"),
    ],
)
def test_variable_with_a_wrong_value_is_refused_with_its_name(tmp_path: Path, name: str, value: str, hint: str) -> None:
    with pytest.raises(InvalidError, match=f"variable `{name}` is `{value}`") as caught:
        load(tmp_path, **{name: value})
    assert hint in caught.value.hint


def test_wrong_value_in_the_file_is_refused_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match=r"`log_level` in .*config\.toml is `loud`"):
        load(tmp_path, 'log_level = "loud"')


def test_unknown_name_in_the_file_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match="sets `idle`, which is no setting") as caught:
        load(tmp_path, "idle = 3")
    assert "idle_timeout" in caught.value.hint


def test_file_that_is_no_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match="cannot read configuration"):
        load(tmp_path, "idle_timeout 3")


def test_named_file_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InvalidError, match="there is no such file"):
        config.load({"HOME": "/home/me", "SQUALL_CONFIG": "/nowhere/config.toml"})


def test_missing_file_is_no_error_when_nobody_named_it(tmp_path: Path) -> None:
    assert config.load({"HOME": str(tmp_path), "SQUALL_HOME": "/srv/s"}).home == Path("/srv/s")


@pytest.mark.parametrize(("word", "value"), [("1", True), ("yes", True), ("TRUE", True), ("0", False), ("", False)])
def test_yes_and_no_are_understood_in_their_usual_spellings(tmp_path: Path, word: str, value: bool) -> None:
    assert load(tmp_path, SQUALL_TRACEBACK=word).traceback is value


def test_table_of_settings_matches_the_fields() -> None:
    rows = {row.name: row for row in config.settings()}
    assert rows["idle_timeout"].env == "SQUALL_IDLE_TIMEOUT"
    assert all(row.help and not row.help.endswith(".") for row in rows.values())


def test_private_settings_are_not_shown_and_not_handed_on() -> None:
    settings = config.load({"SQUALL_SEAL_KEY": "hidden", "HOME": "/h"})
    assert settings.seal_key == "hidden"
    assert "hidden" not in repr(settings)
    assert config.shared_environ({"SQUALL_SEAL_KEY": "hidden", "SQUALL_RUNTIME": "auto"}) == {"SQUALL_RUNTIME": "auto"}


PROFILES = """
active_profile = "team"
runtime = "process"

[profile.team]
server = "https://team:7777"
token_id = "tk-1"
token_secret = "s1"

[profile.other]
server = "https://other:7777"
environment = "dev"
"""


def test_the_profile_in_force_says_which_server_with_what_token(tmp_path: Path) -> None:
    loaded = load(tmp_path, PROFILES)
    assert (loaded.server, loaded.token_id, loaded.token_secret) == ("https://team:7777", "tk-1", "s1")
    assert (loaded.profile, loaded.environment, loaded.runtime) == ("team", "main", "process")
    assert "s1" not in repr(loaded)
    other = load(tmp_path, PROFILES, SQUALL_PROFILE="other")
    assert (other.server, other.token_id, other.environment) == ("https://other:7777", "", "dev")


def test_a_variable_wins_over_a_profile(tmp_path: Path) -> None:
    loaded = load(tmp_path, PROFILES, SQUALL_TOKEN_ID="tk-2", SQUALL_ENVIRONMENT="staging")
    assert (loaded.token_id, loaded.token_secret, loaded.environment) == ("tk-2", "s1", "staging")


def test_the_token_of_one_server_is_not_shown_to_another(tmp_path: Path) -> None:
    loaded = load(tmp_path, PROFILES, SQUALL_SERVER="http://elsewhere:1")
    assert (loaded.token_id, loaded.token_secret) == ("", "")
    same = load(tmp_path, PROFILES, SQUALL_SERVER="https://team:7777")
    assert same.token_id == "tk-1"


def test_an_unknown_profile_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match="no profile `nobody`") as caught:
        load(tmp_path, PROFILES, SQUALL_PROFILE="nobody")
    assert caught.value.hint == "profiles: `other`, `team`"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('profile = "x"', "holds the tables of profiles"),
        ("[profile.x]\nhome = '/x'", "profile `x` in .* sets `home`"),
        ("[profile.x]\ntoken = 'x'", "sets `token`"),
    ],
)
def test_a_profile_that_makes_no_sense_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InvalidError, match=said):
        load(tmp_path, text)


def test_writing_keeps_what_the_file_says_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "dir" / "config.toml"
    env = {"SQUALL_CONFIG": str(path), "HOME": "/h"}
    config.write({"server": "http://a:1", "token_secret": 'q"\\'}, profile="one", environ=env)
    config.write({"server": "http://b:1"}, profile="two words", environ=env)
    config.write({"active_profile": "one"}, environ=env)
    with path.open("a") as file:
        file.write("# a remark\n")
    config.write({"server": "http://c:1"}, profile="one", environ=env)
    config.write({"environment": "dev"}, environ=env)
    assert config.profiles(env) == {
        "one": {"server": "http://c:1", "token_secret": 'q"\\'},
        "two words": {"server": "http://b:1"},
    }
    loaded = config.load(env)
    assert (loaded.server, loaded.environment) == ("http://c:1", "dev")
    assert "# a remark" in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["config.toml"]


def test_a_value_with_a_line_break_is_not_written(tmp_path: Path) -> None:
    env = {"SQUALL_CONFIG": str(tmp_path / "c.toml"), "HOME": "/h"}
    with pytest.raises(InvalidError, match="line break"):
        config.write({"environment": 'x"\n[profile.y]'}, environ=env)
    assert not (tmp_path / "c.toml").exists()
