"""Every setting of client, server and node: its name, default, environment variable and one line of what it does.

Owns all reading of `SQUALL_*` variables and of the configuration file; nothing else in Squall looks there. A value
comes from, first that has it: the variable `SQUALL_<NAME>`, the profile in force (a table `[profile.NAME]` of the
file: which server, with what token), the file (TOML, `$SQUALL_CONFIG` or `~/.config/squall/config.toml`), the default
below. `load` reads them each time and returns a frozen `Config`, which is handed on as an argument; nothing is cached
or global, so a test makes its own. Must never create a directory or start anything. `docs/reference/settings.md` lists
the settings (`tests/style/test_documented.py` holds it to that); the contract is tested in `tests/unit/test_config.py`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from squall.exception import InvalidError

T = TypeVar("T")

HOME_LIMIT_BYTES = 80
"""Sockets live in the home and the kernel allows 107 bytes for the path of one."""


def _setting(
    default: T, help: str, *, choices: tuple[str, ...] = (), minimum: float | None = None, private: bool = False
) -> T:
    metadata = {"help": help, "choices": choices, "minimum": minimum, "private": private}
    value: T = field(default=default, repr=not private, metadata=metadata)
    return value


@dataclass(frozen=True)
class Config:
    """The settings in force. `home` is absolute; it need not exist."""

    home: Path = _setting(Path(), "directory of all state: sockets, database, logs, blobs, containers")
    runtime: str = _setting(
        "auto", "how containers are made; `auto` takes the best that works here", choices=("auto", "native", "process")
    )
    log_level: str = _setting("info", "least severe line that is logged", choices=("debug", "info", "warning", "error"))
    log_format: str = _setting("text", "form of a log line", choices=("text", "json"))
    idle_timeout: float = _setting(
        15.0, "seconds an embedded server stays after the last client and app are gone", minimum=0
    )
    reattach_grace: float = _setting(
        60.0, "seconds that containers outlive a server that was killed, and wait for the next one", minimum=0
    )
    log_days: float = _setting(30.0, "days that output of containers is kept", minimum=0)
    log_app_mib: int = _setting(256, "output kept of one app, in MiB; the newest", minimum=16)
    log_total_gib: float = _setting(4.0, "output kept of all apps together, in GiB; the newest", minimum=0.1)
    start_timeout: float = _setting(20.0, "seconds a client waits for the embedded server it started", minimum=0.1)
    node_cpus: float = _setting(0.0, "cores offered to containers; 0: all of the machine", minimum=0)
    node_memory_mib: int = _setting(0, "memory offered to containers, in MiB; 0: what the machine has", minimum=0)
    build_timeout: float = _setting(3600.0, "seconds one step of an image's build may take", minimum=1)
    force_build: bool = _setting(False, "build every step of an image again, for all who use it from then on")
    ignore_cache: bool = _setting(
        False, "build every step of an image for this program alone; what others find built stays as it is"
    )
    images_gib: float = _setting(
        50.0, "disk for image layers, in GiB; above it, images used longest ago are removed", minimum=0.1
    )
    zygotes_mib: int = _setting(
        0,
        "memory for warm interpreters of images, in MiB; above it, idle ones go; 0: an eighth of the machine's",
        minimum=0,
    )
    debian_mirror: str = _setting(
        "", "URL of the Debian mirror that `Image.debian_slim` is made from; empty: that of this machine's apt"
    )
    database_url: str = _setting(
        "", "`postgresql://` URL of the Store's database; empty: SQLite in the home", private=True
    )
    seal_key: str = _setting(
        "", "32 bytes in base64 that seal secrets in the Store; empty: those in `state/seal.key`", private=True
    )
    server: str = _setting("", "URL of a server elsewhere, such as `https://host:7777`; empty: the one of this home")
    token_id: str = _setting("", "id of the token shown to that server")
    token_secret: str = _setting("", "secret of that token", private=True)
    environment: str = _setting("main", "environment of the workspace in which apps and secrets are looked for")
    profile: str = _setting("", "profile of the configuration file in force: which server, with what token")
    ca_file: str = _setting("", "certificates that vouch for that server, in PEM; empty: those the system trusts")
    listen: str = _setting("", "address and port where `squall up` takes clients from elsewhere; empty: nowhere")
    tls_cert: str = _setting("", "certificate chain in PEM for that address; empty: no TLS")
    tls_key: str = _setting("", "private key of that certificate, in PEM")
    max_connections: int = _setting(4096, "connections from elsewhere at a time", minimum=1)
    heartbeat: float = _setting(
        10.0,
        "seconds between two signs of life on a connection from elsewhere; three that are missing end it",
        minimum=0.1,
    )
    local_heartbeat: float = _setting(
        60.0,
        "seconds between two signs of life on a connection of this machine; a server that misses three is given up, a "
        "client is only told of; 0: none",
        minimum=0,
    )
    node_heartbeat: float = _setting(
        5.0,
        "seconds between two signs of life of a node and the server; after three that are missing a node gets nothing "
        "new, after six it is lost and what it ran is given to others",
        minimum=0.1,
    )
    drain_timeout: float = _setting(
        30.0, "seconds that running inputs may take to end when a server of `squall up` is stopped", minimum=0
    )
    reconnect_timeout: float = _setting(
        60.0,
        "seconds a program tries to reach a server again that is gone, before its calls fail; 0: not at all",
        minimum=0,
    )
    pending_limit: int = _setting(
        25_000, "inputs of one function that may wait, beside those of maps and those that were spawned", minimum=1
    )
    spawn_limit: int = _setting(1_000_000, "spawned inputs of one function that may be unfinished", minimum=1)
    traceback: bool = _setting(False, "show Squall's own frames when a command fails, for a bug report")

    @property
    def run_dir(self) -> Path:
        return self.home / "run"

    @property
    def state_dir(self) -> Path:
        return self.home / "state"

    @property
    def blobs_dir(self) -> Path:
        return self.home / "blobs"

    @property
    def node_dir(self) -> Path:
        return self.home / "node"

    @property
    def agent_lock(self) -> Path:
        """Held by the node agent of this home, whose pid is in it."""
        return self.node_dir / "agent.lock"

    @property
    def socket_path(self) -> Path:
        """Where the server of this home listens; whoever can open it may do everything (mode 0600)."""
        return self.run_dir / "server.sock"


@dataclass(frozen=True)
class Setting:
    """One row of the table of settings, for the documentation and for `squall doctor`."""

    name: str
    env: str
    default: object
    help: str
    choices: tuple[str, ...]
    minimum: float | None
    private: bool
    """Its value is shown nowhere, and handed on to no other process."""


def settings() -> list[Setting]:
    """Every setting, in the order of `Config`."""
    return [_row(f) for f in fields(Config)]


def shared_environ(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment without the variables of private settings, for a process that must not have them."""
    private = {row.env for row in settings() if row.private}
    return {name: value for name, value in (os.environ if environ is None else environ).items() if name not in private}


def _row(f: Field[Any]) -> Setting:
    return Setting(f.name, f"SQUALL_{f.name.upper()}", f.default, **f.metadata)


def load(environ: Mapping[str, str] | None = None) -> Config:
    """The settings in force. Raises InvalidError on a value that makes no sense, and says where it stands."""
    env = os.environ if environ is None else environ
    path = config_file(env)
    from_file = _read_file(path)
    profiles = from_file.pop("profile.", {})
    chosen = env.get("SQUALL_PROFILE") or str(from_file.get("profile", ""))
    from_profile = _chosen_profile(profiles, chosen, path)
    if env.get("SQUALL_SERVER", "") not in ("", from_profile.get("server", "")):
        # What the file holds is for the server it names: another must not be shown this one's token.
        from_profile = {name: value for name, value in from_profile.items() if not name.startswith("token_")}
        from_file = {name: value for name, value in from_file.items() if not name.startswith("token_")}
    values: dict[str, Any] = {}
    for setting in settings():
        if setting.env in env:
            values[setting.name] = _parse(setting, env[setting.env], f"variable `{setting.env}`")
        elif setting.name in from_profile:
            where = f"`{setting.name}` of profile `{chosen}` in {path}"
            values[setting.name] = _parse(setting, from_profile[setting.name], where)
        elif setting.name in from_file:
            values[setting.name] = _parse(setting, from_file[setting.name], f"`{setting.name}` in {path}")
    home = values.get("home") or default_home(env)
    return Config(**{**values, "home": _checked_home(Path(home))})


PROFILE_SETTINGS = ("server", "token_id", "token_secret", "environment", "ca_file")
"""What a profile may set."""


def _chosen_profile(profiles: Mapping[str, Mapping[str, Any]], chosen: str, path: Path) -> Mapping[str, Any]:
    if not chosen:
        return {}
    if chosen not in profiles:
        known = ", ".join(f"`{name}`" for name in sorted(profiles))
        raise InvalidError(
            f"configuration `{path}` has no profile `{chosen[:80]}`",
            hint=f"profiles: {known}" if known else "`squall token set --profile NAME --server URL` makes one",
        )
    return profiles[chosen]


def profiles(environ: Mapping[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """What each profile of the configuration file sets, by name. Holds token secrets: not to be shown."""
    env = os.environ if environ is None else environ
    found: dict[str, dict[str, Any]] = _read_file(config_file(env)).get("profile.", {})
    return found


def choose(**values: str) -> None:
    """Have `load` answer with these settings from now on, in this process and those it starts; empty ones stay."""
    variables = {row.name: row.env for row in settings()}
    for name, value in values.items():
        if value:
            os.environ[variables[name]] = value


def write(values: Mapping[str, str], *, profile: str = "", environ: Mapping[str, str] | None = None) -> Path:
    """Set text values in the configuration file, at its top or in a profile; all else in it stays as it is.

    The file is replaced whole and readable by its owner only, since it may hold a token."""
    env = os.environ if environ is None else environ
    named = env.get("SQUALL_CONFIG")
    path = Path(named) if named else config_file(env)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for name, value in values.items():
        text = _with_value(text, f"profile.{_toml_key(profile)}" if profile else "", name, value)
    _parse_toml(path, text)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(descriptor)
    os.replace(partial, path)
    return path


def _with_value(text: str, table: str, name: str, value: str) -> str:
    """A TOML document with `name = "value"` in a table, the empty one being the top."""
    lines = text.splitlines()
    heads = [i for i, line in enumerate(lines) if line.lstrip().startswith("[")]
    begin = 0
    if table:
        found = [i for i in heads if lines[i].split("#")[0].strip().strip("[]").replace(" ", "") == table]
        if not found:
            lines += [*([""] if lines and lines[-1] else []), f"[{table}]"]
            found = [len(lines) - 1]
        begin = found[0] + 1
    end = next((i for i in heads if i >= begin), len(lines))
    made = f"{name} = {_toml_text(value)}"
    for i in range(begin, end):
        if lines[i].split("=")[0].strip().strip("\"'") == name and "=" in lines[i]:
            lines[i] = made
            break
    else:
        while end > begin and not lines[end - 1].strip():
            end -= 1
        lines.insert(end, made)
        if not table and end + 1 < len(lines) and lines[end + 1].lstrip().startswith("["):
            lines.insert(end + 1, "")
    return "\n".join(lines) + "\n"


def _toml_key(name: str) -> str:
    return name if name and all(c.isascii() and (c.isalnum() or c in "_-") for c in name) else _toml_text(name)


def _toml_text(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    if not escaped.isprintable():
        raise InvalidError("a value for the configuration file holds a line break or a control character")
    return f'"{escaped}"'


def default_home(env: Mapping[str, str]) -> Path:
    """The XDG data directory of the user.

    For root it is root's own, whatever HOME and XDG_DATA_HOME say: under `sudo -E` they name another user's home,
    and files of root there would lock that user out.
    """
    if os.geteuid() == 0:
        return Path(_passwd_home(0), ".local/share/squall")
    data = env.get("XDG_DATA_HOME", "")
    if os.path.isabs(data):
        return Path(data, "squall")
    return Path(env.get("HOME") or _passwd_home(os.geteuid()), ".local/share/squall")


def _passwd_home(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_dir
    except KeyError:  # a uid without an account, common in images: it has no home but the root directory
        return "/"


def _checked_home(home: Path) -> Path:
    absolute = Path(os.path.abspath(home.expanduser()))
    if len(os.fsencode(absolute)) > HOME_LIMIT_BYTES:
        raise InvalidError(
            f"cannot use home `{absolute}`: its path is longer than {HOME_LIMIT_BYTES} bytes, too long for a socket",
            hint="set `SQUALL_HOME` to a shorter path",
        )
    return absolute


def config_file(env: Mapping[str, str]) -> Path:
    """The configuration file; it need not exist, unless `SQUALL_CONFIG` names it."""
    if named := env.get("SQUALL_CONFIG"):
        if not os.path.isfile(named):
            raise InvalidError(
                f"cannot read configuration `{named}`: there is no such file", hint="check the variable `SQUALL_CONFIG`"
            )
        return Path(named)
    base = env.get("XDG_CONFIG_HOME", "")
    if not os.path.isabs(base):
        base = os.path.join(env.get("HOME") or _passwd_home(os.geteuid()), ".config")
    return Path(base, "squall", "config.toml")


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidError(f"cannot read configuration `{path}`: {error}") from None
    values = _parse_toml(path, text)
    known = {setting.name for setting in settings()}
    values = _split_profiles(path, values)
    for name in values:
        if name == "profile.":
            continue
        if name not in known:
            raise InvalidError(
                f"configuration `{path}` sets `{name}`, which is no setting",
                hint=f"settings: {', '.join(sorted(known))}",
            )
    return values


def _split_profiles(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """All profiles as `profile.`, the one in force as `profile`. In TOML a name cannot be both a text and a table, so
    the file calls the latter `active_profile`."""
    found = values.pop("profile", {})
    if not isinstance(found, dict) or not all(isinstance(table, dict) for table in found.values()):
        raise InvalidError(
            f"configuration `{path}`: `profile` holds the tables of profiles",
            hint='write `active_profile = "NAME"` for the one in force, `[profile.NAME]` for what it sets',
        )
    for name, table in found.items():
        for key in table:
            if key not in PROFILE_SETTINGS:
                raise InvalidError(
                    f"profile `{name}` in {path} sets `{key}`", hint=f"it may set: {', '.join(PROFILE_SETTINGS)}"
                )
    if "active_profile" in values:
        values["profile"] = values.pop("active_profile")
    return {**values, "profile.": found} if found else values


def _parse_toml(path: Path, text: str) -> dict[str, Any]:
    try:
        return parse_toml(text)
    except ValueError as error:
        raise InvalidError(f"cannot read configuration `{path}`: {error}") from None


def parse_toml(text: str) -> dict[str, Any]:
    """The values of a TOML document. Raises ValueError."""
    # Imported here: a file is rare, and the parser costs more than the rest of this module together.
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    values: dict[str, Any] = tomllib.loads(text)
    return values


_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")
_WORDS = {**dict.fromkeys(_YES, True), **dict.fromkeys(_NO, False)}


def _parse(setting: Setting, value: object, where: str) -> object:
    """`value` in the type of the setting's default; a variable is always text, a file's value may be typed."""
    kind = type(setting.default)
    try:
        if kind is bool:
            parsed: object = _WORDS[str(value).strip().lower()]
        elif isinstance(setting.default, Path):
            parsed = Path(str(value)) if str(value) else None
        else:
            parsed = kind(value)  # type: ignore[call-arg]
    except (KeyError, ValueError, TypeError):
        raise InvalidError(
            f"{where} is `{value}`, which is no {_KINDS.get(kind, 'value')}", hint=f"it sets the {setting.help}"
        ) from None
    if setting.choices and parsed not in setting.choices:
        raise InvalidError(f"{where} is `{value}`", hint=f"it is one of: {', '.join(setting.choices)}")
    if setting.minimum is not None and not float(str(parsed)) >= setting.minimum:
        raise InvalidError(f"{where} is `{value}`", hint=f"it is at least {setting.minimum:g}")
    return parsed


_KINDS = {bool: "yes or no", int: "whole number", float: "number"}
