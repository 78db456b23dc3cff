"""Who may use a server, and where: `squall token`, `secret`, `environment`, `workspace`, `profile`, `config`.

What a token's secret is, is printed once and on standard output, so that a script can take it; the values of secrets
are never printed, for the server never gives them back. What writes into the configuration file goes through
`config.write`. Tested in `tests/unit/test_cli_access.py` and `tests/acceptance/test_server.py`.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import click

from squall import config
from squall.cli.documents import json_option, print_json, tell
from squall.cli.exec import ANSWER_SECONDS
from squall.cli.main import Group
from squall.cli.manage import Column, ago, ask, connect, date, print_table
from squall.client import Client
from squall.exception import InvalidError
from squall.protocol.messages import Message
from squall.protocol.requests import (
    CreateEnvironment,
    CreateToken,
    CreateWorkspace,
    DeleteEnvironment,
    DeleteSecret,
    DeleteWorkspace,
    GetServer,
    ListObjects,
    PutSecret,
    RenameEnvironment,
    RevokeToken,
    RotateToken,
)
from squall.secret import Secret

LIST_LIMIT = 10_000
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
yes_option = click.option("-y", "--yes", is_flag=True, help="Do not ask.")


def _send(message: Message, payload: bytes = b"") -> dict[str, Any]:
    """Ask the server; one of this home is started for it, as what is asked changes what its Store has."""
    client = connect(start=True)
    try:
        reply, _ = client.link.request(message, payload).wait(ANSWER_SECONDS)
        return reply.data
    finally:
        client.close()


def _list(kind: str, as_json: bool, empty: str, *columns: Column) -> None:
    client = connect(start=True)
    try:
        rows = ask(client.link, ListObjects(kind, limit=LIST_LIMIT)).get("rows", [])
    finally:
        client.close()
    if as_json:
        print_json(rows)
    else:
        print_table(rows, [c for c in columns if any(c.show(row) for row in rows)], empty)


def _text(title: str, key: str) -> Column:
    return Column(title, lambda row: _shown(row.get(key)))


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value in (None, False) else "yes" if value is True else str(value)


def _age(title: str, key: str) -> Column:
    return Column(title, lambda row: ago(float(row.get(key) or 0)))


def _when(title: str, key: str) -> Column:
    return Column(title, lambda row: date(row.get(key)))


def _ask_hidden(what: str) -> str:
    """Ask a person, without showing the answer; of a pipe, its next line is that."""
    if sys.stdin.isatty():
        return str(click.prompt(what, hide_input=True, err=True))
    line = sys.stdin.readline()
    if not line:
        raise InvalidError(f"the {what} was to come on standard input, which has ended")
    return line.rstrip("\n")


def _confirm(question: str, yes: bool) -> None:
    """Ask a person; a program is taken at its word."""
    if not yes and sys.stdin.isatty():
        click.confirm(question, abort=True, err=True)


class Duration(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases of click only
    """`90d`, `12h`, `30m`, `45s`, `2w`; in seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, (int, float)):
            return float(value)
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", str(value))
        if found is None:
            self.fail(f"`{value}` is no duration; write it as `90d`, `12h` or `30m`", param, ctx)
        return float(found[1]) * _UNITS[found[2]]


# ---- token --------------------------------------------------------------------------------------------------------


@click.group(cls=Group)
def token() -> None:
    """Tokens: who comes in from elsewhere."""


@token.command("new")
@click.option("-n", "--name", default="", help="A label, for people.")
@click.option("--workspace", default="main", show_default=True, help="The workspace it is good for.")
@click.option("--expires", type=Duration(), default=0.0, metavar="DURATION", help="Such as 90d; else it lasts.")
@click.option("--admin", is_flag=True, help="It may manage tokens and workspaces and stop the server.")
@json_option
def token_new(name: str, workspace: str, expires: float, admin: bool, as_json: bool) -> None:
    """Make a token. Its secret is shown now and never again."""
    _print_token(_send(CreateToken(workspace, name, expires, admin)), as_json)


@token.command("rotate")
@click.argument("token_ref", metavar="[TOKEN]", default="")
@click.option(
    "--grace", type=Duration(), default=0.0, metavar="DURATION", help="How long the old secret still counts, as 1h."
)
@json_option
def token_rotate(token_ref: str, grace: float, as_json: bool) -> None:
    """Give a token another secret; without TOKEN, the one that this command comes in with."""
    _print_token(_send(RotateToken(token_ref, grace)), as_json)


def _print_token(made: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(made)
        return
    click.echo(f"token id      {made['token_id']}")
    click.echo(f"token secret  {made['secret']}")
    if made.get("expires_at"):
        click.echo(f"expires       {date(made['expires_at'])}")
    click.echo("the secret is not shown again; on the other machine: `squall token set --server URL`", err=True)


@token.command("list")
@json_option
def token_list(as_json: bool) -> None:
    """List tokens; an administrator sees those of every workspace."""
    _list(
        "tokens",
        as_json,
        "no tokens (`squall token new` makes one)",
        _text("TOKEN", "token_id"),
        _text("NAME", "name"),
        _text("WORKSPACE", "workspace"),
        _text("ADMIN", "is_admin"),
        _text("STATE", "state"),
        _age("CREATED", "created_at"),
        _age("USED", "used_at"),
        _when("EXPIRES", "expires_at"),
    )


@token.command("revoke")
@click.argument("token_ref", metavar="TOKEN")
@json_option
def token_revoke(token_ref: str, as_json: bool) -> None:
    """Have a token count no more, and close its connections. TOKEN is its id or name."""
    made = _send(RevokeToken(token_ref))
    tell(as_json, {**made, "state": "revoked"}, f"token `{made['token_id']}` is revoked")


@token.command("set")
@click.option("--server", default="", metavar="URL", help="Where the server is, such as https://host:7777.")
@click.option("--token-id", default="", help="Id of the token; asked for when it is not given.")
@click.option("--token-secret", default="", help="Its secret; asked for when it is not given, and not shown then.")
@click.option("--ca-file", default="", help="Certificates that vouch for the server, in PEM.")
@click.option("--profile", "profile_name", default="", metavar="PROFILE", help="The one to write; else the active one.")
@click.option("--activate/--no-activate", default=True, help="Have commands and programs use this profile from now on.")
@click.option("--verify/--no-verify", default=True, help="See whether the server takes the token, before it is kept.")
@json_option
def token_set(
    server: str,
    token_id: str,
    token_secret: str,
    ca_file: str,
    profile_name: str,
    activate: bool,
    verify: bool,
    as_json: bool,
) -> None:
    """Keep a server's address and a token for it in a profile of the configuration file."""
    profile_name = profile_name or config.load().profile or "default"
    known = config.profiles().get(profile_name, {})
    server = server or str(known.get("server", "")) or click.prompt("server", err=True)
    token_id = token_id or click.prompt("token id", err=True)
    token_secret = token_secret or _ask_hidden("token secret")
    values = {"server": server, "token_id": token_id, "token_secret": token_secret}
    if ca_file:
        values["ca_file"] = str(Path(ca_file).expanduser().resolve())
    workspace = None
    if verify:
        client = Client.connect(config=_settings(values))
        place = ask(client.link, GetServer())
        client.close()
        workspace = place["workspace"]
        click.echo(f"{server} takes the token, for workspace `{workspace}`", err=True)
    path = config.write(values, profile=profile_name)
    if activate:
        config.write({"active_profile": profile_name})
    row = {"profile": profile_name, "server": server, "token_id": token_id, "workspace": workspace, "active": activate}
    tell(as_json, {**row, "path": str(path)}, f"kept in profile `{profile_name}` of {path}")


def _settings(values: dict[str, str]) -> config.Config:
    import dataclasses

    return dataclasses.replace(config.load(), **values)  # type: ignore[arg-type]


# ---- secret -------------------------------------------------------------------------------------------------------


@click.group(cls=Group)
def secret() -> None:
    """Secrets: values that only the containers get that name them."""


@secret.command("create")
@click.argument("name")
@click.argument("values", metavar="[KEY=VALUE | KEY]...", nargs=-1)
@click.option("--from-dotenv", type=click.Path(exists=True, dir_okay=False), help="Take values from a .env file.")
@click.option("--from-json", type=click.Path(exists=True, dir_okay=False), help="Take values from a JSON object.")
@click.option("--force", is_flag=True, help="Replace what the name holds; containers that run keep what they have.")
@json_option
def secret_create(
    name: str, values: tuple[str, ...], from_dotenv: str | None, from_json: str | None, force: bool, as_json: bool
) -> None:
    """Keep values under NAME, for `Secret.from_name`. KEY alone asks for its value, which is then not shown."""
    merged: dict[str, str] = {}
    if from_dotenv:
        merged.update(Secret.from_dotenv(from_dotenv)._values)
    if from_json:
        merged.update(_read_json(from_json))
    for word in values:
        key, equals, value = word.partition("=")
        merged[key] = value if equals else _ask_hidden(key)
    if not merged:
        raise click.UsageError("give at least one KEY=VALUE, --from-dotenv or --from-json")
    checked = Secret.from_dict(merged)._values
    _send(PutSecret(name, force), json.dumps(checked).encode())
    tell(as_json, {"name": name, "keys": sorted(checked)}, f"secret `{name}` holds {', '.join(sorted(checked))}")


def _read_json(path: str) -> dict[str, str]:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what = error.msg if isinstance(error, json.JSONDecodeError) else "it is no text"
        raise InvalidError(f"cannot read `{path}`: {what}") from None
    if not isinstance(found, dict) or not all(isinstance(value, (str, int, float)) for value in found.values()):
        raise InvalidError(f"`{path}` is not a JSON object of texts and numbers")
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in found.items()}


@secret.command("list")
@json_option
def secret_list(as_json: bool) -> None:
    """List secrets, with the names of what they hold."""
    keys, ages = _text("KEYS", "keys"), (_age("CREATED", "created_at"), _age("UPDATED", "updated_at"))
    _list("secrets", as_json, "no secrets", _text("SECRET", "name"), keys, *ages)


@secret.command("delete")
@click.argument("name")
@yes_option
@json_option
def secret_delete(name: str, yes: bool, as_json: bool) -> None:
    """Delete a secret; containers that run keep what they have, and no more are started that name it."""
    _confirm(f"delete secret `{name}`?", yes)
    _send(DeleteSecret(name))
    tell(as_json, {"name": name, "state": "deleted"}, f"secret `{name}` is deleted")


# ---- environment, workspace ---------------------------------------------------------------------------------------


@click.group(cls=Group)
def environment() -> None:
    """Environments: names of apps and secrets kept apart within a workspace."""


@environment.command("list")
@json_option
def environment_list(as_json: bool) -> None:
    """List the environments of the workspace."""
    _list("environments", as_json, "", _text("ENVIRONMENT", "name"), _age("CREATED", "created_at"))


@environment.command("create")
@click.argument("name")
@json_option
def environment_create(name: str, as_json: bool) -> None:
    """Make an environment; `-e NAME` of other commands, or SQUALL_ENVIRONMENT, then works in it."""
    _send(CreateEnvironment(name))
    tell(as_json, {"name": name, "state": "created"}, f"environment `{name}` is there")


@environment.command("rename")
@click.argument("name")
@click.argument("new_name")
@json_option
def environment_rename(name: str, new_name: str, as_json: bool) -> None:
    """Rename an environment in which nothing runs, its secrets with it."""
    _send(RenameEnvironment(name, new_name))
    tell(as_json, {"name": new_name, "was": name, "state": "renamed"}, f"environment `{name}` is now `{new_name}`")


@environment.command("delete")
@click.argument("name")
@yes_option
@json_option
def environment_delete(name: str, yes: bool, as_json: bool) -> None:
    """Delete an environment in which nothing runs, with its secrets."""
    _confirm(f"delete environment `{name}` with its secrets?", yes)
    _send(DeleteEnvironment(name))
    tell(as_json, {"name": name, "state": "deleted"}, f"environment `{name}` is deleted")


@click.group(cls=Group)
def workspace() -> None:
    """Workspaces: whose apps, secrets and tokens see nothing of each other's."""


@workspace.command("list")
@json_option
def workspace_list(as_json: bool) -> None:
    """List workspaces; without an administrator's token, one's own."""
    columns = _text("WORKSPACE", "name"), _text("ENVIRONMENTS", "environments"), _age("CREATED", "created_at")
    _list("workspaces", as_json, "", *columns)


@workspace.command("create")
@click.argument("name")
@json_option
def workspace_create(name: str, as_json: bool) -> None:
    """Make a workspace; `squall token new --workspace NAME` lets somebody in."""
    _send(CreateWorkspace(name))
    tell(as_json, {"name": name, "state": "created"}, f"workspace `{name}` is there")


@workspace.command("delete")
@click.argument("name")
@yes_option
@json_option
def workspace_delete(name: str, yes: bool, as_json: bool) -> None:
    """Delete a workspace in which nothing runs, with its environments, secrets and tokens."""
    _confirm(f"delete workspace `{name}` with its secrets and tokens?", yes)
    _send(DeleteWorkspace(name))
    tell(as_json, {"name": name, "state": "deleted"}, f"workspace `{name}` is deleted")


# ---- profile, config ----------------------------------------------------------------------------------------------


@click.group(cls=Group)
def profile() -> None:
    """Profiles: which server this machine's programs use, with what token."""


@profile.command("list")
@json_option
def profile_list(as_json: bool) -> None:
    """List the profiles of the configuration file."""
    active = config.load().profile
    rows = [
        {"name": name, "active": name == active, **{key: value for key, value in table.items() if "secret" not in key}}
        for name, table in config.profiles().items()
    ]
    if as_json:
        print_json(rows)
        return
    keys = ("name", "active", "server", "environment", "token_id")
    print_table(rows, [_text(key.upper().replace("_", " "), key) for key in keys], "no profiles (`squall token set`)")


@profile.command("current")
@json_option
def profile_current(as_json: bool) -> None:
    """Print the name of the profile in force."""
    name = config.load().profile
    if as_json:
        print_json({"name": name or None})
    else:
        click.echo(name or "(none: the server of this home)")


@profile.command("activate")
@click.argument("name")
@json_option
def profile_activate(name: str, as_json: bool) -> None:
    """Have commands and programs use a profile from now on; `-` for none: the server of this home."""
    if name != "-" and name not in config.profiles():
        config.choose(profile=name)
        config.load()  # says which there are
    chosen = "" if name == "-" else name
    config.write({"active_profile": chosen})
    tell(as_json, {"name": chosen or None}, f"profile `{name}` is active" if chosen else "no profile is active")


@click.group(cls=Group, name="config")
def config_group() -> None:
    """Settings: what is in force."""


@config_group.command("show")
@json_option
def config_show(as_json: bool) -> None:
    """Show the settings in force. A token's secret is never shown."""
    loaded = config.load()
    rows = [
        {"name": row.name, "value": _hidden(row, getattr(loaded, row.name)), "variable": row.env}
        for row in config.settings()
    ]
    if as_json:
        print_json({row["name"]: row["value"] for row in rows})
        return
    print_table(rows, [_text("SETTING", "name"), Column("VALUE", lambda row: str(row["value"]))], "")


def _hidden(row: config.Setting, value: Any) -> Any:
    if row.private:
        return "(set)" if value else ""
    return str(value) if isinstance(value, Path) else value


@config_group.command("set-environment")
@click.argument("name")
@json_option
def config_set_environment(name: str, as_json: bool) -> None:
    """Work in an environment from now on: written into the active profile, or at the top of the file."""
    profile_name = config.load().profile
    path = config.write({"environment": name}, profile=profile_name)
    document = {"environment": name, "profile": profile_name or None, "path": str(path)}
    tell(as_json, document, f"environment `{name}`, kept in {path}")
